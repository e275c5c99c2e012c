"""A study runs from its configuration to run.json, trains nothing twice, and gives the same numbers every time."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import studies
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import edgemin
from edgemin import progress, toy
from edgemin.data import splits
from edgemin.errors import UserError
from edgemin.measure.runtime import Measure, Variant
from edgemin.report import interaction, schema, write
from edgemin.store import artifacts as store
from edgemin.store.memo import Memo
from edgemin.study import pipeline, runtimes, scoring

Run = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def quiet_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than the toy models: only the paper's rows are drawn, whose fixture comes before this."""
    monkeypatch.setattr(write, "figures", lambda study: ([], []))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def paper(place: Path) -> Run:
    """The paper's six rows; its results lie in place / "store"."""
    return studies.run(place / "paper", store=place / "store")


def metrics(run: Run) -> dict[str, Any]:
    return {row["name"]: row["metrics"] for row in run["rows"]}


def in_torch(costs: dict[str, Any]) -> dict[str, Any]:
    """Of a row's cost, or of a difference, what depends on the runtime."""
    found: dict[str, Any] = costs["runtimes"]["torch"]
    return found


def steps(run: Run) -> dict[str, int]:
    return {node["path"]: node["steps"] for node in run["nodes"]}


# --- what a run writes ------------------------------------------------------------------------------------


def test_run_json_is_read_by_the_report(paper: Run, place: Path) -> None:
    read = schema.read(place / "paper")
    assert [row.name for row in read.rows] == [
        "Teacher",
        "Student baseline",
        "+ Distillation",
        "+ Head pruning",
        "Quantized (not pruned)",
        "Pruned + quantized",
    ]
    assert (read.task.name, read.task.metric, read.splits, read.seed) == ("toy", "accuracy", ("validation",), 42)
    assert paper["order"] == {
        "name": "paper",
        "stages": ["finetune", "distill", "prune", "dynamic_int8"],
        "comparisons": [],
        "ablation": None,
    }
    assert paper["task"]["train_examples"] == 96 and paper["task"]["evaluation_examples"] == {"validation": 40}
    assert (paper["device"], paper["precision"]) == ("cpu", "32-true")
    for row in paper["rows"]:
        scores = row["metrics"]["toy"]["validation"]
        assert set(scores) == {"accuracy", "f1", "matthews", "loss", "n"} and scores["n"] == 40
        assert set(row["cost"]) == {"params", "params_visible", "macs", "flops", "runtimes"}
        assert {name: set(cost) for name, cost in row["cost"]["runtimes"].items()} == {"torch": {"size_bytes"}}
        assert row["artifact"] in {node["key"] for node in paper["nodes"]}
        assert row["transfer"] == []


def test_every_node_says_how_it_came_to_be(paper: Run) -> None:
    assert steps(paper) == {
        "teacher": 0,
        "teacher/finetune": 12,
        "student": 0,
        "student/finetune": 12,
        "student/finetune/distill": 2,
        "student/finetune/distill/prune": 2,
        "student/finetune/distill/dynamic_int8": 0,
        "student/finetune/distill/prune/dynamic_int8": 0,
    }
    assert not any(node["cached"] for node in paper["nodes"])
    assert all(node["path"].split("/") == [node["model"], *node["stages"]] for node in paper["nodes"])
    teachers = {node["path"]: node["teachers"] for node in paper["nodes"]}
    assert teachers.pop("student/finetune/distill") == ["teacher/finetune"]
    assert not any(teachers.values())


def test_tables_figures_and_curves_lie_beside_it(paper: Run, place: Path) -> None:
    written = {path.relative_to(place / "paper").as_posix() for path in (place / "paper").rglob("*") if path.is_file()}
    assert {f"tables/stages.{suffix}" for suffix in ("md", "csv", "tex")} <= written
    assert {"report.md", "figures/pipeline.svg", "training.csv", "run.json"} <= written
    lines = (place / "paper" / "training.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines[1:]} == {path for path, count in steps(paper).items() if count}
    assert {line.split(",")[2] for line in lines[1:]} >= {"loss", "learning_rate", "gradient_norm"}


def test_curves_of_cached_stages_come_from_the_store(paper: Run, place: Path, tmp_path: Path) -> None:
    again = studies.run(tmp_path, store=place / "store")
    assert all(node["cached"] for node in again["nodes"]) and again["rows"] == paper["rows"]
    assert (tmp_path / "training.csv").read_text() == (place / "paper" / "training.csv").read_text()
    for row in paper["rows"]:
        artifact = place / "store" / row["artifact"]
        trained = row["stages"][-1] != "dynamic_int8"
        assert ("training.csv" in json.loads((artifact / "manifest.json").read_text())["files"]) == trained
        model = ("model.safetensors", "config.json", "structure.json")
        assert in_torch(row["cost"])["size_bytes"] == sum((artifact / name).stat().st_size for name in model)


def test_rows_name_what_they_were_made_from(paper: Run) -> None:
    assert [row["made_from"] for row in paper["rows"]] == [
        None,
        None,
        "Student baseline",
        "+ Distillation",
        "+ Distillation",
        "+ Head pruning",
    ]


def test_deltas_are_differences_and_quotients_of_the_rows(paper: Run) -> None:
    rows = {row["name"]: row for row in paper["rows"]}
    mine, teacher = rows["Pruned + quantized"], rows["Teacher"]
    references = {"teacher": teacher, "student": rows["Student baseline"], "parent": rows["+ Head pruning"]}
    for name, other in references.items():
        score, theirs = (row["metrics"]["toy"]["validation"]["accuracy"] for row in (mine, other))
        share = {} if "collapsed" in other else {"metric_retained": score / theirs}
        delta = dict(mine["delta"][name])
        size, theirs_size = (in_torch(row["cost"])["size_bytes"] for row in (mine, other))
        assert delta.pop("runtimes") == {"torch": {"compression_ratio": pytest.approx(theirs_size / size, rel=1e-12)}}
        assert delta == pytest.approx(
            {
                "metric": score - theirs,
                **share,
                "params_ratio": other["cost"]["params"] / mine["cost"]["params"],
                "flops_ratio": other["cost"]["flops"] / mine["cost"]["flops"],
            },
            rel=1e-12,
        )
    assert teacher["delta"]["parent"] is None
    assert teacher["delta"]["teacher"] == {
        "metric": 0.0,
        **({} if "collapsed" in teacher else {"metric_retained": 1.0}),
        "params_ratio": 1.0,
        "flops_ratio": 1.0,
        "runtimes": {"torch": {"compression_ratio": 1.0}},
    }


def test_stored_predictions_give_the_metrics(paper: Run, place: Path) -> None:
    for row in paper["rows"]:
        kept = studies.predictions(place / "paper", row, "toy.validation")
        logits, labels = kept["logits"].astype(np.float64), kept["labels"]
        scores = row["metrics"]["toy"]["validation"]
        predicted = logits.argmax(axis=1)
        assert scores["accuracy"] == pytest.approx((predicted == labels).mean(), abs=1e-7)
        likelihood = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert scores["loss"] == pytest.approx(-likelihood[np.arange(len(labels)), labels].mean(), abs=1e-3)
        both = ((predicted == 1) & (labels == 1)).sum()
        assert scores["f1"] == pytest.approx(2 * both / max((predicted == 1).sum() + (labels == 1).sum(), 1), abs=1e-6)


def test_a_rows_artifact_is_loaded_and_gives_the_stored_predictions(paper: Run, place: Path) -> None:
    text, label = toy.generate(40, 42)
    for row in paper["rows"]:
        model, tokenizer = edgemin.load(place / "store" / row["artifact"])
        assert tokenizer is not None
        kept = studies.predictions(place / "paper", row, "toy.validation")
        assert kept["labels"].tolist() == [toy.LABELS.index(name) for name in label]
        with torch.inference_mode():
            logits = model(**tokenizer(text[:1], return_tensors="pt")).logits
        # dynamic quantization scales activations over the batch, which is another one here
        assert torch.allclose(logits[0], torch.from_numpy(kept["logits"][0]), atol=0.02)


def test_pruning_leaves_fewer_heads_and_says_so(paper: Run, place: Path) -> None:
    row = next(row for row in paper["rows"] if row["name"] == "+ Head pruning")
    assert "removed 2 of 8 heads; left per layer: [3, 3]" in row["notes"]
    structure = json.loads((place / "store" / row["artifact"] / "structure.json").read_text())
    assert [layer["heads"] for layer in structure["layers"]] == [3, 3]


# --- nothing twice, and always the same -------------------------------------------------------------------


def test_a_second_run_trains_nothing_and_prints_the_same_table(
    paper: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing is trained or evaluated again")

    monkeypatch.setattr(pipeline.fitting, "run", refuse)
    monkeypatch.setattr(scoring, "evaluate", refuse)
    again = studies.run(place / "again", store=place / "store")
    assert all(node["cached"] for node in again["nodes"])
    assert again["rows"] == paper["rows"]
    table = Path("tables/stages.csv")
    assert (place / "again" / table).read_text() == (place / "paper" / table).read_text()


def test_run_json_and_the_tables_say_what_was_trained_with(paper: Run, place: Path) -> None:
    assert paper["threads"] == [torch.get_num_threads()]
    foot = (place / "paper" / "tables" / "stages.md").read_text()
    assert "trained on the CPU in " in foot and f"with {torch.get_num_threads()} thread" in foot


def test_without_the_store_all_numbers_come_out_again_to_the_last_digit(paper: Run, place: Path) -> None:
    fresh = studies.run(place / "fresh", store=place / "fresh store")
    assert not any(node["cached"] for node in fresh["nodes"])
    assert fresh["rows"] == paper["rows"]


def test_a_reused_prefix_changes_nothing_downstream(paper: Run, place: Path) -> None:
    asked = ("prune.ratio=0.5",)
    reused = studies.run(place / "reused", *asked, store=place / "store")
    alone = studies.run(place / "alone", *asked, store=place / "store alone")
    assert {node["path"] for node in reused["nodes"] if not node["cached"]} == {
        "student/finetune/distill/prune",
        "student/finetune/distill/prune/dynamic_int8",
    }
    assert reused["rows"] == alone["rows"]


def test_another_seed_gives_another_study(paper: Run, place: Path) -> None:
    other = studies.run(place / "seed", "seed=1", store=place / "store")
    assert not any(node["cached"] for node in other["nodes"])
    assert metrics(other) != metrics(paper)


def test_measurements_are_merged_and_made_once(paper: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[list[str]] = []

    def stand_in(
        variants: Mapping[str, Variant], sentences: list[list[int]], settings: Measure, **kwargs: object
    ) -> dict[str, Any]:
        assert all((one.path / "model.safetensors").is_file() for one in variants.values())
        assert len(sentences) == 40 and settings.runs == 7
        measured.append(list(variants))
        found = {}
        for number, name in enumerate(variants, 1):
            p50 = {"padded": 8.0 / number, "task": 4.0 / number}
            found[name] = {"latency_ms": {form: {"p50": value, "mean": value} for form, value in p50.items()}}
        return found

    monkeypatch.setattr(runtimes, "measure", stand_in)
    asked = ("measure=default", "measure.runs=7")
    first = studies.run(place / "measured", *asked, store=place / "store")
    second = studies.run(place / "measured again", *asked, store=place / "store")
    assert len(measured) == 1 and len(measured[0]) == 6
    assert first["rows"] == second["rows"]
    assert metrics(first) == metrics(paper)
    last = first["rows"][5]
    assert in_torch(last["cost"])["latency_ms"]["padded"]["p50"] == 8.0 / 6
    speed_ups = {name: in_torch(delta)["speed_up"] for name, delta in last["delta"].items()}
    assert speed_ups["teacher"] == {"padded": pytest.approx(6.0), "task": pytest.approx(6.0)}
    assert speed_ups["student"]["padded"] == pytest.approx(3.0)
    assert speed_ups["parent"]["padded"] == pytest.approx(6 / 4)


def test_crossed_stages_are_named_in_run_json_and_found_by_the_report(paper: Run, place: Path) -> None:
    crossed = ("ablate=interaction", "ablate.stages=[prune,dynamic_int8]")
    run = studies.run(place / "crossed", *crossed, store=place / "store")
    assert all(node["cached"] for node in run["nodes"])
    assert run["order"]["ablation"] == {"name": "interaction", "stages": ["prune", "dynamic_int8"]}
    four = interaction.cells(schema.read(place / "crossed"))
    assert four is not None
    assert [row.stages[2:] for row in four] == [[], ["prune"], ["dynamic_int8"], ["prune", "dynamic_int8"]]


def test_stages_left_out_one_by_one_are_rows_of_a_study_and_add_up_or_not(paper: Run, place: Path) -> None:
    left = ("ablate=leave_one_out", "ablate.stages=[distill,dynamic_int8]")
    run = studies.run(place / "left out", *left, store=place / "store")
    assert run["order"]["ablation"] == {"name": "leave_one_out", "stages": ["distill", "dynamic_int8"]}
    found = interaction.cells(schema.read(place / "left out"))
    assert found is not None
    assert [row.name for row in found] == [
        "Neither distill nor dynamic_int8",
        "Without distill",
        "Without dynamic_int8",
        "Both distill and dynamic_int8",
    ]
    assert "95 % interval" in (place / "left out/tables/stages.md").read_text(), "the answers were kept"
    lines = (place / "left out/tables/broken.csv").read_text().splitlines()
    assert len(lines) == 1 + len(run["rows"]) and lines[0].startswith("name,agreement_with_parent_fraction,")


# --- any order --------------------------------------------------------------------------------------------

AGAIN = ("quantize=dynamic", "+finetune@recover=short", "recover.epochs=null", "recover.steps=2")
ORDERS = [
    *itertools.permutations(("finetune", "distill", "prune")),
    ("finetune", "prune", "distill", "recover"),
    ("finetune", "finetune"),
    ("distill", "distill", "finetune"),
    ("finetune", "prune", "prune"),
    ("prune", "recover", "distill", "prune", "finetune"),
    ("recover",),
]


@pytest.mark.parametrize("stages", ORDERS, ids="-".join)
def test_every_order_runs_and_can_be_quantized_at_the_end(stages: tuple[str, ...], paper: Run, place: Path) -> None:
    order = (*stages, "quantize")
    asked = (*AGAIN, "prune.ratio=0.5", f"stages=[{','.join(order)}]")
    run = studies.run(place / "-".join(order), *asked, store=place / "store")
    last = run["rows"][-1]
    assert tuple(last["stages"]) == order
    structure = json.loads((place / "store" / last["artifact"] / "structure.json").read_text())
    heads = 4
    for _ in range(order.count("prune")):
        heads -= heads // 2
    assert [layer["heads"] for layer in structure["layers"]] == [heads] * 2
    assert last["cost"]["params_visible"] < last["cost"]["params"]
    scored = {tuple(row["stages"]) for row in run["rows"] if row["model"] == "student"}
    expected = {order[:end] for end in range(1, len(order) + 1) if has_a_fresh_head(order, end)}
    assert run["order"] == {"name": "by hand", "stages": list(order), "comparisons": [], "ablation": None}
    assert scored == expected
    assert sum("is not scored" in line for line in run["warnings"]) == len(order) - len(expected)


def has_a_fresh_head(order: tuple[str, ...], end: int) -> bool:
    """Whether the head was trained, and the encoder not since: a distillation before a fine-tuning trains no head."""
    fresh = False
    for number, stage in enumerate(order[:end], 1):
        if stage == "distill":
            fresh = fresh and not {"finetune", "recover"} & set(order[number:])
        fresh = fresh or stage in ("finetune", "recover", "prune")
    return fresh


def test_a_narrowed_layer_is_distilled_with_fewer_relation_heads_and_says_so(paper: Run, place: Path) -> None:
    run = studies.run(place / "narrow", "stages=[finetune,prune,distill]", store=place / "store")
    # widths 12 (3 heads of 4) and 32: the largest common divisor not above 4 is 4
    assert not any("relation heads" in note for note in run["rows"][-1]["notes"])
    asked = ("stages=[finetune,prune,distill]", "distill.relation_heads=16")
    run = studies.run(place / "narrower", *asked, store=place / "store")
    assert any("4 instead of 16" in note for note in run["rows"][-1]["notes"])


def test_a_ratio_that_removes_nothing_says_so(paper: Run, place: Path) -> None:
    run = studies.run(place / "nothing", "prune.ratio=0.2", "stages=[finetune,prune]", store=place / "store")
    assert any("removes nothing" in note for note in run["rows"][-1]["notes"])


def test_what_a_stage_refuses_while_it_runs_is_told_with_its_name(tmp_path: Path) -> None:
    first = ("stages=[finetune,prune,again]", "finetune.steps=1", "prune.scope=global", "prune.criterion=magnitude")
    again = ("+prune@again=heads", "again.scope=global", "again.ratio=0.9", "again.epochs=0")
    with pytest.raises(UserError, match=r"^again\.ratio: expected [^\n]* given 0\.9 of 6$"):
        studies.run(tmp_path, *first, *again)


def test_a_fine_tuned_checkpoint_teaches_as_it_is(place: Path, tmp_path: Path) -> None:
    tuned = studies.checkpoint(tmp_path / "tuned", ["Positive", "Negative"])
    shape = [f"teacher.{key}=null" for key in ("family", "layers", "hidden", "heads", "intermediate")]
    asked = (f"teacher.source={tuned}", *shape, "teacher.stages=[]", "stages=[finetune,distill]")
    run = studies.run(tmp_path / "run", *asked, store=place / "store")
    teacher = run["rows"][0]
    assert (teacher["stages"], run["nodes"][0]["steps"]) == ([], 0)
    kept = studies.predictions(tmp_path / "run", teacher, "toy.validation")["logits"]
    text = toy.generate(40, 42)[0]
    model = edgemin.load(place / "store" / teacher["artifact"])[0]
    assert model.config.id2label == {0: "negative", 1: "positive"}
    original = AutoModelForSequenceClassification.from_pretrained(tuned).eval()
    batch = AutoTokenizer.from_pretrained(tuned)(text, return_tensors="pt", padding=True)
    with torch.inference_mode():
        theirs = original(**batch).logits.numpy()
    assert np.allclose(kept, theirs[:, ::-1], atol=1e-3)  # kept in half precision


# --- tasks ------------------------------------------------------------------------------------------------


def test_scores_on_other_tasks_are_marked_as_zero_shot(place: Path, tmp_path: Path) -> None:
    glue = studies.glue(tmp_path / "glue")
    local = (f"task.path={glue}", "task.max_length=48")
    others = {name: studies.settings(f"task={name}", *local)["task"] for name in ("mnli", "qqp")}
    run = studies.run(
        tmp_path / "run", "task=sst2", *local, "stages=[finetune]", store=place / "store", transfer=others
    )
    for row in run["rows"]:
        assert row["transfer"] == ["mnli", "qqp"]
        assert set(row["metrics"]) == {"sst2", "mnli", "qqp"}
        assert set(row["metrics"]["mnli"]) == {"validation_matched", "validation_mismatched"}
        assert set(row["metrics"]["mnli"]["validation_matched"]) == {"accuracy", "macro_f1", "matthews", "n"}
        # the third class is one that a head of two cannot predict
        assert row["metrics"]["mnli"]["validation_matched"]["accuracy"] <= 16 / 24
        kept = studies.predictions(tmp_path / "run", row, "mnli.validation_matched")
        assert kept["logits"].shape == (24, 2)
    assert "zero-shot" in (tmp_path / "run" / "report.md").read_text()
    assert not {node["path"] for node in run["nodes"]} - {"teacher", "teacher/finetune", "student", "student/finetune"}


def test_other_tasks_must_be_other_classification_tasks(tmp_path: Path) -> None:
    own = studies.settings()["task"]
    with pytest.raises(UserError, match=r"^evaluate\.transfer: "):
        studies.run(tmp_path, transfer={"toy": own})


def test_a_regression_on_own_files_runs(place: Path, tmp_path: Path) -> None:
    for split, count, seed in (("train", 64, 1), ("validation", 20, 2)):
        texts = toy.generate(count, seed)[0]
        lines = [f"{text.replace(',', ';')},{len(text) / 40:.3f}" for text in texts]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,score", *lines]) + "\n")
    own = ("task=custom", f"task.path={tmp_path}", "task.label_column=score", "task.kind=regression")
    run = studies.run(tmp_path / "run", *own, "task.max_length=48", "stages=[finetune,distill,quantize]")
    assert run["task"]["metric"] == "pearson" and run["task"]["labels"] == ["score"]
    for row in run["rows"]:
        scores = row["metrics"]["custom"]["validation"]
        assert set(scores) == {"pearson", "spearman", "loss", "n"}
        kept = studies.predictions(tmp_path / "run", row, "custom.validation")
        assert kept["logits"].shape == (20, 1) and kept["labels"].dtype == np.float32
        squares = (kept["logits"][:, 0] - kept["labels"]).astype(np.float64) ** 2
        assert scores["loss"] == pytest.approx(squares.mean(), rel=1e-5)


def test_three_named_classes_from_csv_run(tmp_path: Path) -> None:
    names = ["neutral", "bad", "good"]
    for split, count, seed in (("train", 60, 1), ("validation", 21, 2)):
        texts = toy.generate(count, seed)[0]
        lines = [f'"{text}",{names[row % 3]}' for row, text in enumerate(texts)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    own = ("task=custom", f"task.path={tmp_path}", "task.max_length=48")
    run = studies.run(tmp_path / "run", *own, "stages=[finetune,prune]")
    assert run["task"]["labels"] == ["bad", "good", "neutral"]
    last = run["rows"][-1]
    assert set(last["metrics"]["custom"]["validation"]) == {"accuracy", "macro_f1", "matthews", "loss", "n"}
    model = edgemin.load(tmp_path / "run" / "store" / last["artifact"])[0]
    assert model.config.id2label == {0: "bad", 1: "good", 2: "neutral"}


def test_the_first_metric_asked_for_leads_everywhere(tmp_path: Path) -> None:
    asked = ("task.metrics=[matthews,f1]", "task.holdout=0.25", "task.max_train_examples=400")
    asked += ("finetune.epochs=2", "finetune.steps=null", "finetune.patience=1", "quantize=weight_only")
    run = studies.run(tmp_path, *asked, "stages=[finetune,quantize]", "evaluate.max_drop=0")
    assert run["task"]["metric"] == "matthews"
    teacher, _, last = (row["metrics"]["toy"]["validation"] for row in run["rows"])
    assert list(last) == ["matthews", "f1", "loss", "n"]
    assert run["rows"][-1]["delta"]["teacher"]["metric"] == last["matthews"] - teacher["matthews"]
    assert run["rows"][-1]["gate"]["metric"] == "matthews" and run["rows"][-1]["gate"]["value"] == last["matthews"]
    assert "holdout_matthews" in (tmp_path / "training.csv").read_text()
    header = (tmp_path / "tables/stages.csv").read_text().splitlines()[0].split(",")
    assert header[:2] == ["name", "matthews"] and "f1_fraction" in header


def test_architectures_alone_need_no_data(tmp_path: Path) -> None:
    asked = ("task=none", "teacher.tokenizer=null", "teacher.vocabulary=50", "student.vocabulary=50")
    run = studies.run(
        tmp_path, *asked, "teacher.stages=[]", "prune.criterion=random", "prune.steps=0", "stages=[prune,dynamic_int8]"
    )
    assert run["task"] is None
    assert [row["metrics"] for row in run["rows"]] == [{}, {}, {}]
    assert "metric" not in run["rows"][1]["delta"]["teacher"]
    assert schema.read(tmp_path).task.name is None


def test_whatever_may_take_minutes_says_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(splits, "_known", Memo())  # the jobs of a process read equal data once

    def open_line(board: Any, line: progress.Line, *where: Any) -> None:
        board.lines.append(line)
        said.append(line.text)

    monkeypatch.setattr(progress._Board, "open", open_line)
    asked = ("distill.teacher_cache=true", "quantize=reconstruct", "quantize.sensitivity=true")
    asked += ("quantize.calibration_examples=8", "quantize.epochs=null", "quantize.steps=1")
    studies.run(tmp_path, *asked, "evaluate.max_drop=0", "stages=[finetune,distill,prune,quantize]")
    assert {
        "plan  reading models and data",
        "toy  reading the data",
        "tokenizing",
        "student/finetune  loading",
        "student/finetune",
        "student/finetune  saving",
        "keeping teacher outputs",
        "ranking heads",
        "measuring the sensitivity of matrices",
        "choosing bits",
        "choosing scales",
        "calibrating activations",
        "student/finetune/distill/prune/quantize/phase 2",
        "student/finetune  evaluating on toy validation",
        "scoring sentences",
        "tables and figures  drawing",
    } <= set(said)


def test_early_stopping_looks_at_the_holdout_alone(tmp_path: Path) -> None:
    asked = (
        "task.holdout=0.25",
        "finetune.steps=null",
        "finetune.epochs=4",
        "finetune.patience=1",
        "stages=[finetune]",
    )
    run = studies.run(tmp_path / "run", *asked)
    assert run["task"]["train_examples"] == 72
    batches = -(-72 // 16)
    assert all(count in {batches * epoch for epoch in range(1, 5)} for count in steps(run).values() if count)
    assert "holdout_accuracy" in (tmp_path / "run" / "training.csv").read_text()


# --- when something breaks --------------------------------------------------------------------------------


def test_a_damaged_artifact_is_named_and_computed_again_once_deleted(paper: Run, place: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(place / "store", tmp_path / "store")
    damaged = copy / paper["rows"][2]["artifact"]
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"corrupted, model\.safetensors differs from its checksum") as caught:
        studies.run(tmp_path / "run", store=copy)
    assert str(damaged) in str(caught.value)
    shutil.rmtree(damaged)
    again = studies.run(tmp_path / "run", store=copy)
    assert [node["path"] for node in again["nodes"] if not node["cached"]] == ["student/finetune/distill"]
    assert again["rows"] == paper["rows"]


def test_a_full_disk_is_said_in_one_line_and_loses_nothing(
    paper: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    save = pipeline.artifact.save

    def fill_up(*args: Any) -> None:
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args)

    monkeypatch.setattr(pipeline.artifact, "save", fill_up)
    with pytest.raises(UserError, match=r"^paths\.store: the disk is full"):
        studies.run(tmp_path / "run", store=tmp_path / "store")
    kept = store.Store(tmp_path / "store")
    assert sum(kept.has(node["key"]) for node in paper["nodes"]) == 3
    assert not [path for path in kept.root.iterdir() if path.name.startswith(".") and "-" in path.name]
    again = studies.run(tmp_path / "run", store=tmp_path / "store")
    assert sum(node["cached"] for node in again["nodes"]) == 3
    assert again["rows"] == paper["rows"]


class Killed(BaseException):
    """Ends a run in a test as a signal would: nothing in the pipeline catches it."""


SHORT = ("trainer.checkpoint_seconds=0", "finetune.steps=4", "distill.steps=3", "prune.steps=3")


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Run:
    return studies.run(place / "unbroken", *SHORT, store=place / "store of unbroken")


@pytest.mark.parametrize(
    "path", ["teacher/finetune", "student/finetune/distill", "student/finetune/distill/prune"], ids=lambda path: path
)
def test_a_stage_killed_in_its_middle_ends_with_the_same_numbers(
    path: str, unbroken: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = pipeline.NodeProgress.on_train_batch_end

    def die(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        end(self, trainer, *args, **kwargs)
        if trainer.lightning_module.fit_name == path and trainer.global_step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.NodeProgress, "on_train_batch_end", die)
        with pytest.raises(Killed):
            studies.run(tmp_path / "killed", *SHORT, store=tmp_path / "store")
    assert list((tmp_path / "store" / ".work").glob("*/last.ckpt"))
    made: list[str] = []

    def count(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        end(self, trainer, *args, **kwargs)
        made.append(trainer.lightning_module.fit_name)

    monkeypatch.setattr(pipeline.NodeProgress, "on_train_batch_end", count)
    resumed = studies.run(tmp_path / "resumed", *SHORT, store=tmp_path / "store")
    assert 0 < made.count(path) < steps(unbroken)[path]
    assert steps(resumed)[path] == steps(unbroken)[path]  # those before the kill count too
    assert resumed["rows"] == unbroken["rows"]
    curves = [(directory / "training.csv").read_text() for directory in (place / "unbroken", tmp_path / "resumed")]
    assert curves[0] == curves[1], "what was logged before the kill is there again, once"


def test_a_stage_may_have_any_name(tmp_path: Path) -> None:
    """Nodes of models alone are told from stages by what they are, not by a name."""
    found = studies.run(tmp_path / "run", "+finetune@weights=short", "stages=[weights]")
    (trained,) = [node for node in found["nodes"] if node["path"] == "student/weights"]
    assert trained["steps"] > 0
