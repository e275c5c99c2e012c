"""Stages that prune to a budget in a study: their rows, keys and seeds, and the table of latencies that they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import studies

from edgemin.errors import UserError
from edgemin.measure.layer_latency import Timed
from edgemin.report.controls import controlled
from edgemin.report.schema import Run
from edgemin.store.artifacts import Store
from edgemin.study import latency_tables
from edgemin.study.family import expanded
from edgemin.study.job import plan_job, run_job
from edgemin.study.nodes import Node
from edgemin.study.order import RowSpec
from edgemin.study.plan import build
from edgemin.study.reading import read_study
from edgemin.training.latency import LatencyTable

STAGES = ("stages=[finetune,prune,quantize]", "prune=heads_ffn", "prune.criterion=fisher")
TABLE = LatencyTable({1: 0.2, 2: 0.3, 4: 0.6}, {8: 0.5, 24: 0.9}, 1.0, "torch", "int8", 1, "a processor", "bert", 16)


def nodes(*overrides: str) -> dict[str, Node]:
    return {node.path: node for node in studies.plan(*STAGES, *overrides).nodes}


PRUNE = "student/finetune/prune"


def test_each_factor_has_a_row_and_is_what_that_factor_alone_would_be() -> None:
    study = read_study(studies.settings(*STAGES, "prune.target.measure=macs", "prune.target.factors=[0.75,0.5]"))
    assert [row.name for row in study.rows] == [
        "Teacher",
        "Student: finetune",
        "+ prune (0.75x)",
        "+ prune (0.5x)",
        "+ quantize (0.75x)",
        "+ quantize (0.5x)",
    ]
    assert study.rows[-1].stages == ("finetune", "prune@0.5", "quantize")
    family = nodes("prune.target.measure=macs", "prune.target.factors=[0.75,0.5]")
    alone = nodes("prune.target.measure=macs", "prune.target.factor=0.5")
    for path in (PRUNE, f"{PRUNE}/quantize"):
        one = family[path.replace("prune", "prune@0.5")]
        assert (one.key, one.seed) == (alone[path].key, alone[path].seed)
    assert family[f"{PRUNE}@0.75"].key != family[f"{PRUNE}@0.5"].key
    assert family[f"{PRUNE}@0.75"].seed == family[f"{PRUNE}@0.5"].seed


def test_controls_and_comparisons_follow_the_factor() -> None:
    overrides = ("order=distill_prune_quantize", "prune.target.measure=macs", "prune.target.factors=[0.75,0.5]")
    settings = studies.settings(*overrides)
    rows = {row.name: row for row in read_study(settings).rows}
    controls = [row for row in rows.values() if row.control and "random_prune@0.5" in row.stages]
    assert len(controls) == 1
    run = Run.model_construct(config=read_study(settings).settings, rows=list(rows.values()))
    assert [row.stages[-1] for row in controlled(run, controls[0])] == ["prune@0.5"]  # type: ignore[arg-type]
    specs = [RowSpec(name, "student", stages) for name, stages in {"A": ("a",), "B": ("prune",)}.items()]
    _, made, pairs = expanded(settings, specs, [["B", "A"], ["B", "B"]])
    assert [row.name for row in made] == ["A", "B (0.75x)", "B (0.5x)"]
    assert pairs[:2] == [["B (0.75x)", "A"], ["B (0.5x)", "A"]]
    assert pairs[2:] == [["B (0.75x)", "B (0.75x)"], ["B (0.5x)", "B (0.5x)"]], "equal factors"


def test_the_key_holds_what_decides_and_nothing_else() -> None:
    target = ("prune.target.measure=macs", "prune.target.factor=0.75")
    key = nodes(*target)[PRUNE].key
    same = ("prune.ratio=0.7", "prune.ffn_ratio=0.7", "prune.scope=global", "prune.target.precision=fp32")
    assert {nodes(*target, override)[PRUNE].key for override in same} == {key}
    assert nodes("prune.target.measure=macs", "prune.target.factor=0.7")[PRUNE].key != key
    size = [
        nodes("prune.target.measure=size_mib", "prune.target.factor=0.9", more)[PRUNE].key
        for more in ("prune.target.precision=int8", "prune.target.precision=fp32", "prune.target.runtime=torch")
    ]
    assert len({*size}) == 2 and size[0] == size[2]
    assert "target" not in nodes()[PRUNE].content["stage"], "and without a target none of it"


def test_settings_that_decide_nothing_beside_a_target_are_told(tmp_path: Path) -> None:
    def notes(*overrides: str) -> list[str]:
        asked = studies.settings(*STAGES, *overrides, f"paths.store={tmp_path / 'store'}")
        job = studies.job(tmp_path) | {"given": {override.partition("=")[0]: [] for override in overrides}}
        return plan_job(asked, job, {}, timed=False).notes

    told = notes(
        "prune.target.measure=macs",
        "prune.target.factor=0.75",
        "prune.ratio=0.3",
        "prune.rounds=2",
        "prune.target.runtime=torch",
    )
    assert [note.partition(":")[0] for note in told if "decides nothing" in note] == [
        "prune.ratio",
        "prune.target.runtime",
    ]
    told = notes("prune.target.measure=macs", "prune.target.factors=[0.75,0.5]", "prune.scope=global")
    assert len([note for note in told if note.startswith("prune.scope: set, but decides nothing")]) == 1
    assert not any("there is no stage" in note for note in told)
    assert any(note.startswith("prune.target.precision: set, but") for note in notes("prune.target.precision=fp32"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("quantize=weight_only", "quantize.bits=4", "quantize.group_size=32"), ["quantize.group_size"]),
        (("quantize=weight_only", "quantize.percentile=99", "quantize.candidates=[8,4]"), ["percentile", "candidates"]),
        (("quantize=weight_only", "quantize.calibration_examples=9"), ["quantize.calibration_examples"]),
        (("quantize=reconstruct", "quantize.calibration_examples=9", "quantize.activations=none"), []),
        (("quantize=static", "quantize.activation_range=mse", "quantize.percentile=99"), ["quantize.percentile"]),
        (("quantize=static", "quantize.granularity=group", "quantize.group_size=8"), []),
        (("distill.corpus_length=64", "distill.corpus_column=review"), ["corpus_length", "corpus_column"]),
        (("distill=mlkd", "distill.prediction_share=0", "distill.soft_weight=2"), ["distill.soft_weight"]),
        (("distill=mlkd", "distill.steps=20", "distill.soft_weight=2", "distill.temperature=2"), []),
        (("quantize=qat", "quantize.steps=2", "quantize.candidates=[8,4]"), ["quantize.candidates"]),
    ],
)
def test_settings_that_decide_nothing_in_quantization_and_distillation_are_told(
    overrides: tuple[str, ...], told: list[str], tmp_path: Path
) -> None:
    asked = studies.settings("stages=[finetune,distill,quantize]", *overrides, f"paths.store={tmp_path / 'store'}")
    job = studies.job(tmp_path) | {"given": {override.partition("=")[0]: [] for override in overrides}}
    notes = [note for note in plan_job(asked, job, {}, timed=False).notes if "decides nothing" in note]
    assert [note.partition(":")[0].removeprefix("quantize.").removeprefix("distill.") for note in notes] == [
        name.rpartition(".")[2] for name in told
    ]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("prune.target.factors=[0.5,0.5]", "prune.target.measure=macs"), r"prune\.target\.factors: expected each"),
        (("prune.target.factors=[]", "prune.target.measure=macs"), r"prune\.target\.factors: expected"),
        (("prune.target.factors=[2]", "prune.target.measure=macs"), r"prune\.target\.factor: expected"),
        (("prune.target.factors=[0.5]",), r"prune\.target\.measure: expected latency_ms"),
    ],
)
def test_factors_that_cannot_be_are_refused(overrides: tuple[str, ...], line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        nodes(*overrides)


def test_factors_beside_an_ablation_are_refused() -> None:
    settings = studies.settings(
        "order=distill_prune_quantize",
        "ablate=leave_one_out",
        "prune.target.measure=macs",
        "prune.target.factors=[0.5]",
    )
    with pytest.raises(UserError, match=r"^prune\.target\.factors: expected null beside ablate[^\n]*$"):
        read_study(settings)


# The table


LATENCY = ("prune.target.measure=latency_ms", "prune.target.runtime=torch", "prune.target.factors=[0.8,0.6]")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Tables that were measured: made by hand here."""
    found: list[Any] = []

    def table(config: Any, outline: Any, runtime: str, precision: str, settings: Any, **_: Any) -> Any:
        found.append((outline, runtime, precision, settings))
        return Timed(TABLE, True, 0, 1)

    monkeypatch.setattr(latency_tables, "latency_table", table)
    return found


def test_a_job_measures_the_table_once_and_finds_it_afterwards(
    measured: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = studies.settings(*STAGES, *LATENCY, f"paths.store={tmp_path / 'store'}")
    planned = plan_job(asked, studies.job(tmp_path), {}, timed=False)
    assert not measured, "a plan measures nothing"
    (note,) = [note for note in planned.notes if "not measured yet" in note]
    assert note.startswith("prune.target: the latency table (int8 in torch) is not measured yet")
    first = studies.run(tmp_path / "1", *STAGES, *LATENCY, store=tmp_path / "store")
    ((outline, runtime, precision, settings),) = measured
    assert (runtime, precision, settings.runtimes) == ("torch", "int8", ("torch",))
    assert {(layer.heads, layer.ffn) for layer in outline.layers} == {(4, 24)}
    for row in first["rows"]:
        if row["stages"][-1:] in (["prune@0.8"], ["prune@0.6"]):
            found = row["findings"]["target"]
            assert found["asked"] == pytest.approx(found["factor"] * TABLE.ms(outline))
            assert 0.3 * TABLE.ms(outline) < found["predicted"] <= found["asked"]
            assert any(note.endswith("int8 in torch, by the table of a processor") for note in row["notes"])
    second = studies.run(tmp_path / "2", *STAGES, *LATENCY, store=tmp_path / "store")
    assert len(measured) == 1 and all(node["cached"] for node in second["nodes"])
    planned = plan_job(asked, studies.job(tmp_path), {}, timed=False)
    assert not [note for note in planned.notes if "not measured yet" in note]
    assert {node.state for node in planned.nodes} == {"cached"}
    assert f"{PRUNE}@0.6" in {node.path for node in planned.nodes}


def test_a_stage_of_no_row_has_its_table_too(measured: list[Any], tmp_path: Path) -> None:
    asked = ("teacher.stages=[finetune,prune]", *LATENCY[:2], "prune.target.factor=0.8", "order.stages=[distill]")
    rows = [{"name": "Student", "stages": ["distill"]}]
    settings = studies.settings(*asked, "distill.task_weight=1", f"paths.store={tmp_path / 'store'}")
    settings["order"] = {"name": "own", "stages": ["distill"], "rows": rows}
    (note,) = plan_job(settings, studies.job(tmp_path), {}, timed=False).notes
    assert note.startswith("prune.target: the latency table (int8 in torch) is not measured yet")
    with pytest.raises(UserError, match=r"^prune\.target\.measure: expected a model of [^\n]* hidden size 16[^\n]*$"):
        run_job(settings, studies.job(tmp_path), {})  # the table is of the student's shape
    assert len(measured) == 1


def test_a_table_that_was_measured_beside_other_work_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_tables, "latency_table", lambda *_, **__: Timed(TABLE, False, 2, 9))
    study, store = read_study(studies.settings(*STAGES, *LATENCY)), Store(tmp_path / "store")
    found, notes = latency_tables.with_latency(study, build(study), store, None, measured=True)
    assert found.latency == TABLE
    assert notes == [
        "prune.target: in the latency table the rounds of 2 of 9 shapes spread by more than 25 %, so the latencies "
        "that it predicts are rough",
        "prune.target: the latency table was measured beside other work, and is measured again next time",
    ]
    found, notes = latency_tables.with_latency(study, build(study), store, None, measured=False)
    assert found.latency is None and "not measured yet" in notes[0]


def test_a_table_whose_rounds_spread_is_kept_and_says_so_whenever_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_tables, "latency_table", lambda *_, **__: Timed(TABLE, True, 2, 9))
    study, store = read_study(studies.settings(*STAGES, *LATENCY)), Store(tmp_path / "store")
    told = [latency_tables.with_latency(study, build(study), store, None, measured=now)[1] for now in (True, False)]
    assert told[0] == told[1] and "the rounds of 2 of 9 shapes" in told[0][0]


def test_a_latency_that_cannot_be_reached_is_refused_before_anything_is_trained(
    measured: list[Any], tmp_path: Path
) -> None:
    asked = studies.settings(*STAGES, *LATENCY[:2], "prune.target.factor=0.3", f"paths.store={tmp_path / 'store'}")
    with pytest.raises(UserError, match=r"^prune\.target\.factor: expected at least [^\n]* can reach, given 0\.3$"):
        run_job(asked, studies.job(tmp_path), {})
    assert len(measured) == 1 and not list((tmp_path / "store").glob("*/manifest.json"))


def test_what_is_refused_without_a_table_is_refused_before_it_is_measured(measured: list[Any], tmp_path: Path) -> None:
    asked = studies.settings(*STAGES, *LATENCY, "quantize.bits=7", f"paths.store={tmp_path / 'store'}")
    with pytest.raises(UserError, match=r"^quantize\.bits"):
        run_job(asked, studies.job(tmp_path), {})
    assert not measured


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("prune.target.runtime=fastest",), r"prune\.target\.runtime: expected "),
        (
            (
                "+prune@more=heads",
                "+more.target.measure=latency_ms",
                "+more.target.factor=0.9",
                "stages=[finetune,prune,more]",
                "more.target.precision=fp32",
                "more.target.runtime=torch",
            ),
            r"more\.target: expected one runtime, precision and table [^\n]*int8 in torch and fp32 in torch",
        ),
    ],
)
def test_tables_that_cannot_be_are_refused(
    overrides: tuple[str, ...], line: str, measured: list[Any], tmp_path: Path
) -> None:
    study = read_study(studies.settings(*STAGES, *LATENCY, *overrides))
    with pytest.raises(UserError, match=f"^{line}"):
        latency_tables.with_latency(study, build(study), Store(tmp_path / "store"), None, measured=True)
