"""The plan is a tree of keyed nodes, and what cannot work is refused in it, before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import studies

from edgemin.errors import UserError
from edgemin.store.artifacts import Store
from edgemin.study import plan as planning
from edgemin.study import tree
from edgemin.study.nodes import Node, Plan
from edgemin.study.plan import build
from edgemin.study.reading import read_study

CONTROLS = "order=distill_prune_quantize"


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return studies.glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a bare encoder, without a classification head."""
    return studies.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose head knows the toy task's labels, in another order."""
    return studies.checkpoint(tmp_path_factory.mktemp("tuned"), ["Positive", "Negative"])


def source(model: str, directory: Path | str, *changes: str) -> list[str]:
    """Overrides that take a model from a checkpoint instead of from a shape."""
    shape = ["layers", "hidden", "heads", "intermediate"]
    family = ["teacher.family=null"] if model == "teacher" else []
    return [f"{model}.source={directory}", *family, *(f"{model}.{key}=null" for key in shape), *changes]


@cache
def keys(*overrides: str) -> dict[str, str]:
    return {node.path: node.key for node in studies.plan(*overrides).nodes}


def node(plan: Plan, path: str) -> Node:
    return next(found for found in plan.nodes if found.path == path)


def refusal(*overrides: str) -> str:
    settings = studies.settings(*overrides)
    with pytest.raises(UserError) as caught:
        build(read_study(settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the tree ---------------------------------------------------------------------------------------------


def test_equal_prefixes_are_one_node() -> None:
    plan = studies.plan()
    assert [found.path for found in plan.nodes] == [
        "teacher",
        "teacher/finetune",
        "student",
        "student/finetune",
        "student/finetune/distill",
        "student/finetune/distill/prune",
        "student/finetune/distill/dynamic_int8",
        "student/finetune/distill/prune/dynamic_int8",
    ]
    assert [row.node.path for row in plan.rows] == [row.spec.path for row in plan.rows]
    assert len(plan.rows) == 6 and not plan.notes


def test_parents_and_teachers_come_before_what_is_made_of_them() -> None:
    plan = studies.plan(CONTROLS, "student.source=teacher", *source("student", "teacher"))
    place = {id(found): number for number, found in enumerate(plan.nodes)}
    for found in plan.nodes:
        for needed in filter(None, (found.parent, *found.teachers)):
            assert place[id(needed)] < place[id(found)]


def test_the_teacher_of_a_distillation_is_its_trained_node() -> None:
    plan = studies.plan()
    distilled = node(plan, "student/finetune/distill")
    assert distilled.teachers == (node(plan, "teacher/finetune"),)
    assert distilled.content["teachers"] == [node(plan, "teacher/finetune").key]


def test_teacher_source_means_its_weights_as_they_came(base: Path) -> None:
    plan = studies.plan(*source("teacher", base), "distill.teacher=teacher.source")
    distilled = node(plan, "student/finetune/distill")
    assert distilled.teachers == (node(plan, "teacher"),)
    tuned = studies.plan(*source("teacher", base), "distill.teacher=teacher.source", "finetune.learning_rate=2e-4")
    assert node(tuned, "student").key == node(plan, "student").key


def test_a_source_teacher_does_not_bring_the_trained_one_into_the_key(base: Path) -> None:
    chosen = [*source("teacher", base), "distill.teacher=teacher.source", "stages=[distill,finetune]"]
    first, other = keys(*chosen), keys(*chosen, "finetune.learning_rate=2e-4")
    assert first["student/distill"] == other["student/distill"]
    assert first["student/distill/finetune"] != other["student/distill/finetune"]


def test_nine_jobs_share_what_they_can(glue: Path, base: Path, tmp_path: Path) -> None:
    entries: list[tree.State] = []
    store = Store(tmp_path)
    for task in ("sst2", "mnli", "qqp"):
        for ratio in (0.1, 0.25, 0.5):
            local = [f"task={task}", f"task.path={glue}", f"prune.ratio={ratio}", "task.max_length=48"]
            models = [*source("teacher", base), *source("student", "teacher.source", "student.layers=2")]
            plan = studies.plan(*local, *models)
            assert len(plan.rows) == 6
            entries += tree.states(plan, store)
    distinct = {entry.key: entry.path for entry in entries}
    counts = Counter((path.split("/")[0], path.split("/")[-1]) for path in distinct.values())
    assert counts == {
        ("teacher", "teacher"): 1,
        ("student", "student"): 1,
        ("teacher", "finetune"): 3,
        ("student", "finetune"): 3,
        ("student", "distill"): 3,
        ("student", "prune"): 9,
        ("student", "dynamic_int8"): 12,
    }
    line = tree.summary(entries)
    assert line.startswith("32 nodes (32 to run): ")
    for words in ("3 teacher finetune", "3 student finetune", "3 student distill", "9 student prune"):
        assert words in line
    assert "12 student dynamic_int8" in line


def test_a_plan_says_what_is_stored_and_what_will_run(tmp_path: Path) -> None:
    plan, store = studies.plan(), Store(tmp_path)
    with store.commit(node(plan, "teacher").key) as directory:
        (directory / "model.safetensors").write_text("x")
    (store.work(node(plan, "teacher/finetune").key) / "last.ckpt").write_text("x")
    found = tree.states(plan, store)
    states = {entry.path: entry.state for entry in found}
    assert states["teacher"] == "cached"
    assert states["teacher/finetune"] == "resumes"
    assert states["student"] == "to run"
    lines = tree.lines(found)
    assert lines[1].startswith("  finetune") and "resumes" in lines[1]
    assert lines[-1] == "28 steps to train"
    assert lines[-2].startswith("8 nodes (1 cached, 1 resumes, 6 to run): 1 teacher weights, 1 teacher finetune")


# --- keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "measure=default",
        "logger=wandb",
        "study=other",
        "paths.store=elsewhere",
        "teacher.name=other",
        "student.name=other",
        "trainer.threads=1",
        "trainer.checkpoint_seconds=1",
        "task.name=custom",
        "task.metrics=[f1]",
        "published=some.yaml",
        "plan=true",
    ],
)
def test_names_paths_logging_and_measuring_are_in_no_key(override: str, tmp_path: Path) -> None:
    changes = [override]
    if override == "task.name=custom":  # the very same data under another name, from files
        changes = own_copy_of_toy(tmp_path)
    assert keys(*changes) == keys()


def own_copy_of_toy(directory: Path) -> list[str]:
    splits = read_study(studies.settings()).splits
    assert splits is not None
    for split, examples in (("train", splits.train), ("validation", splits.evaluation["validation"])):
        rows = [
            {"sentence": text, "label": splits.labels[label]}
            for (text,), label in zip(examples.texts, examples.labels, strict=True)
        ]
        (directory / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["task.name=mine", f"task.path={directory}"]


def changed(*overrides: str) -> set[str]:
    before, after = keys(), keys(*overrides)
    assert before.keys() == after.keys()
    return {path for path in before if before[path] != after[path]}


ALL = frozenset(
    {
        "teacher",
        "teacher/finetune",
        "student",
        "student/finetune",
        "student/finetune/distill",
        "student/finetune/distill/prune",
        "student/finetune/distill/dynamic_int8",
        "student/finetune/distill/prune/dynamic_int8",
    }
)
PRUNED = frozenset({path for path in ALL if "prune" in path})


def test_the_ratio_changes_what_is_pruned_and_what_follows() -> None:
    assert changed("prune.ratio=0.5") == PRUNED


def test_a_seed_changes_everything_that_it_draws() -> None:
    assert changed("seed=1") == ALL


def test_a_fixed_teacher_seed_keeps_the_teacher() -> None:
    assert changed("seed=1", "teacher.seed=42") == ALL - {"teacher", "teacher/finetune"}


def test_other_data_changes_what_was_trained_on_it() -> None:
    assert changed("task.seed=1") == ALL - {"teacher", "student"}
    assert changed("task.max_train_examples=90") == ALL - {"teacher", "student"}
    assert changed("task.max_length=40") == ALL - {"teacher", "student"}


def test_local_data_in_the_hubs_layout_is_read_from_the_files_as_they_are_now(tmp_path: Path) -> None:
    for directory, count in (("one", 48), ("other", 30)):
        glue = studies.glue(tmp_path / directory / "glue", train=count)
        splits = read_study(studies.settings("task=sst2", f"task.path={glue}")).splits
        assert splits is not None and len(splits.train) == count


def test_what_is_only_evaluated_changes_no_key(tmp_path: Path) -> None:
    files = own_copy_of_toy(tmp_path)
    before = dict(keys(*files))
    (tmp_path / "validation.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    assert keys(*files, "task.max_evaluation_examples=20") == before


def test_the_teacher_enters_the_key_of_what_learns_from_it() -> None:
    assert changed("teacher.intermediate=40") == ALL - {"student", "student/finetune"}


def test_precision_changes_what_is_trained() -> None:
    assert changed("trainer.precision=bf16") == ALL - {"teacher", "student"}


def test_code_changes_the_key_of_what_it_made(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = planning.code_digest
    before = keys.__wrapped__()
    monkeypatch.setattr(
        planning, "code_digest", lambda *modules: digest(*modules) + ("+" if "edgemin.pruning.stage" in modules else "")
    )
    after = keys.__wrapped__()
    assert {path for path in ALL if before[path] != after[path]} == PRUNED


def test_weights_enter_by_their_content_not_by_their_path(base: Path, tmp_path: Path) -> None:
    same = studies.checkpoint(tmp_path / "same")
    other = studies.checkpoint(tmp_path / "other", layers=2)
    asked = "stages=[finetune]"
    assert keys(*source("teacher", base), asked) == keys(*source("teacher", same), asked)
    first, second = keys(*source("teacher", base), asked), keys(*source("teacher", other), asked)
    assert {path for path in first if first[path] != second[path]} == {"teacher", "teacher/finetune"}


def test_a_students_own_tokenizer_is_in_its_key(base: Path, tmp_path: Path) -> None:
    other = studies.tokenizer(tmp_path / "tokenizer")
    first = keys(*source("student", base), "stages=[finetune]")
    second = keys(*source("student", base), f"student.tokenizer={other}", "stages=[finetune]")
    assert {path for path in first if first[path] != second[path]} == {"student", "student/finetune"}


def test_the_tokenizer_a_student_takes_from_its_teacher_is_in_its_key(base: Path, tmp_path: Path) -> None:
    other = studies.tokenizer(tmp_path / "tokenizer")
    models = [*source("teacher", base), *source("student", "teacher.source"), "stages=[finetune]"]
    first, second = keys(*models), keys(*models, f"teacher.tokenizer={other}")
    assert first["teacher"] != second["teacher"]
    assert first["student"] != second["student"]


def test_a_stage_of_another_name_draws_other_numbers() -> None:
    plan = studies.plan("+finetune@again=default", "again.epochs=null", "again.steps=12", "stages=[finetune,again]")
    first, second = node(plan, "student/finetune"), node(plan, "student/finetune/again")
    assert first.seed != second.seed and first.key != second.key


# --- stages by hand and by name ---------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["quantize", "dynamic_int8"])
def test_stages_by_hand_take_the_groups_choices_also_where_they_spell_the_papers_order(last: str) -> None:
    plan = studies.plan(f"stages=[finetune,distill,prune,{last}]")
    assert [row.spec.path for row in plan.rows] == [
        "teacher/finetune",
        "student/finetune",
        "student/finetune/distill",
        "student/finetune/distill/prune",
        f"student/finetune/distill/prune/{last}",
    ]
    assert not any(row.spec.named for row in plan.rows)
    method = {"quantize": "PostTraining", "dynamic_int8": "DynamicQuantization"}[last]
    assert plan.rows[-1].node.settings["_target_"].endswith(f".{method}")


def test_stages_by_hand_give_every_prefix_a_row() -> None:
    plan = studies.plan("stages=[finetune,prune,quantize]")
    assert [row.spec.path for row in plan.rows] == [
        "teacher/finetune",
        "student/finetune",
        "student/finetune/prune",
        "student/finetune/prune/quantize",
    ]


def test_controls_are_rows_of_their_own() -> None:
    plan = studies.plan(CONTROLS)
    assert [row.spec.path for row in plan.rows if row.spec.control] == [
        "student/finetune/no_teacher",
        "student/finetune/distill/random_prune",
    ]
    assert len(studies.plan(CONTROLS, "order.controls=[]").rows) == 5


# --- what depends on the neighbours -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "path", "weight"),
    [
        ("[finetune,distill]", "student/finetune/distill", 1.0),
        ("[finetune,distill,quantize]", "student/finetune/distill", 1.0),
        ("[finetune,distill,prune]", "student/finetune/distill", 1.0),
        ("[distill,finetune]", "student/distill", 0.0),
        ("[distill,prune]", "student/distill", 0.0),
        ("[finetune,distill,finetune]", "student/finetune/distill", 0.0),
        ("[finetune,prune,distill]", "student/finetune/prune/distill", 1.0),
        ("[prune,distill]", "student/prune/distill", 1.0),
    ],
)
def test_the_task_loss_is_on_where_a_trained_head_would_go_stale(stages: str, path: str, weight: float) -> None:
    found = node(studies.plan(f"stages={stages}"), path)
    assert found.settings["task_weight"] == weight
    assert found.content["stage"]["task_weight"] == weight


def test_a_task_weight_that_is_given_is_taken() -> None:
    found = node(studies.plan("stages=[distill,finetune]", "distill.task_weight=0.5"), "student/distill")
    assert found.settings["task_weight"] == 0.5 and found.head_trained


def test_a_row_without_a_trained_head_is_refused_when_it_is_named() -> None:
    line = refusal("order.rows=[{name: Bare, stages: [distill]}, {name: All, stages: ${order.stages}}]")
    assert line.startswith("stages: expected a stage that trains the head on toy") and "'Bare'" in line


def test_a_control_of_other_length_is_told_of() -> None:
    epochs = ("order=distill", "distill.task_weight=0", "distill.steps=null", "distill.epochs=2")
    assert not [note for note in studies.plan(*epochs).notes if "control" in note]
    (note,) = [note for note in studies.plan(*epochs, "task.labelled_examples=32").notes if "control" in note]
    assert note.startswith("row 'Control: no teacher' trains for ") and "give both the same steps" in note


@pytest.mark.parametrize("ablate", ["interaction", "leave_one_out"])
def test_a_control_is_only_compared_with_rows_that_it_is_there_for(ablate: str) -> None:
    """Pruning at random differs from the row `Only quantize` in one stage, too, but of another kind."""
    notes = studies.plan("order=distill_prune_quantize", f"ablate={ablate}", "prune.steps=9").notes
    assert not [note for note in notes if "give both the same steps" in note]


def test_a_prefix_with_a_stale_head_is_left_out_with_a_note() -> None:
    plan = studies.plan("stages=[finetune,distill,finetune]")
    assert [row.spec.path for row in plan.rows][1:] == ["student/finetune", "student/finetune/distill/finetune"]
    (note,) = plan.notes
    assert note.startswith("row '+ distill' is not scored: ")


def test_a_prefix_without_a_trained_head_is_left_out_with_a_note() -> None:
    plan = studies.plan("stages=[distill,finetune,quantize]")
    assert [row.spec.path for row in plan.rows] == [
        "teacher/finetune",
        "student/distill/finetune",
        "student/distill/finetune/quantize",
    ]
    assert plan.notes == ["row 'Student: distill' is not scored: no stage up to student/distill trains the head"]


@pytest.mark.parametrize(
    "stages", [["stages=[distill]"], ["stages=[]"], ["stages=[prune]", "prune.steps=0"], ["stages=[quantize]"]]
)
def test_stages_that_never_train_the_head_are_refused(stages: list[str]) -> None:
    assert refusal(*stages).startswith("stages: expected a stage that trains the head")


def test_a_long_path_that_never_trains_the_head_is_refused() -> None:
    assert refusal("stages=[distill,prune]", "prune.steps=0").startswith(
        "stages: expected a stage that trains the head"
    )


def test_without_data_rows_need_no_head() -> None:
    bare = ("task=none", "teacher.stages=[]", "quantize=weight_only", "prune.criterion=random", "prune.steps=0")
    plan = studies.plan(*bare, "stages=[prune,quantize]")
    assert [row.spec.path for row in plan.rows] == ["teacher", "student/prune", "student/prune/quantize"]
    assert refusal("task=none").startswith("teacher.stages: expected only stages that need no data with task=none")


# --- teachers ---------------------------------------------------------------------------------------------


def test_a_teacher_without_stages_needs_a_head_of_the_task(base: Path, tuned: Path) -> None:
    plan = studies.plan(*source("teacher", tuned), "teacher.stages=[]")
    assert node(plan, "teacher").head_trained
    assert node(plan, "student/finetune/distill").teachers == (node(plan, "teacher"),)
    for without in (source("teacher", base), []):
        line = refusal(*without, "teacher.stages=[]")
        assert line.startswith("teacher.stages: expected a stage that trains the head on toy")


def test_a_head_for_other_labels_does_not_count(tmp_path: Path) -> None:
    other = studies.checkpoint(tmp_path, ["entailment", "contradiction"])
    assert refusal(*source("teacher", other), "teacher.stages=[]").startswith("teacher.stages: ")


def test_an_artifact_of_edgemin_is_a_fine_tuned_teacher(tmp_path: Path) -> None:
    run = studies.run(tmp_path / "run", "stages=[finetune]", store=tmp_path / "store")
    artifact = tmp_path / "store" / run["rows"][0]["artifact"]
    plan = studies.plan(*source("teacher", artifact), "teacher.stages=[]")
    assert node(plan, "teacher").head_trained


def test_a_student_of_the_trained_teacher_starts_from_its_node() -> None:
    plan = studies.plan(*source("student", "teacher", "student.layers=1"), "stages=[quantize]")
    assert node(plan, "student").parent is node(plan, "teacher/finetune")
    assert node(plan, "student").head_trained
    assert node(plan, "student").outline.layers[1:] == ()


def test_a_student_cannot_start_from_a_teacher_that_cannot_be_trained() -> None:
    line = refusal(*source("student", "teacher"), "quantize=dynamic", "teacher.stages=[finetune,quantize]")
    assert line.startswith("student.source: expected a model that can be cut and trained")


def test_teacher_source_needs_a_teacher_with_weights() -> None:
    assert refusal(*source("student", "teacher.source")).startswith("student.source: expected a model with weights")
    assert refusal(*source("teacher", "teacher")).startswith("teacher.source: ")


def test_a_teacher_with_another_tokenizer_cannot_teach(base: Path, tmp_path: Path) -> None:
    other = studies.tokenizer(tmp_path / "tokenizer")
    models = [*source("student", base), f"student.tokenizer={other}"]
    assert refusal(*models).startswith("distill.teacher: expected a teacher with the student's tokenizer")
    assert len(studies.plan(*models, "stages=[finetune,quantize]").rows) == 3


@pytest.mark.parametrize("stages", ["[distill]", "[finetune,distill]"])
def test_a_teacher_cannot_learn_from_itself(stages: str) -> None:
    assert refusal(f"teacher.stages={stages}").startswith("teacher.stages: ")


def test_an_unknown_stage_of_the_teacher_is_reported_under_its_key() -> None:
    assert refusal("teacher.stages=[nosuch]").startswith("teacher.stages: ")


# --- what cannot work -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["distill", "prune", "finetune", "quantize"])
def test_nothing_comes_after_dynamic_quantization(after: str) -> None:
    line = refusal("quantize=dynamic", f"stages=[finetune,quantize,{after}]")
    assert line.startswith("stages: expected nothing after quantize") and line.endswith(f"given {after}")


@pytest.mark.parametrize("name", ["foo", "task", "teacher", "trainer", "order", "seed"])
def test_only_stages_can_be_stages(name: str) -> None:
    line = refusal(f"stages=[finetune,{name}]")
    assert line.startswith("stages: expected names of stages") and line.endswith(f"given {name!r}")


def test_the_stages_that_there_are_do_not_include_the_trainer() -> None:
    assert "(distill, dynamic_int8, finetune, prune, quantize)" in refusal("stages=[foo]")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["distill.relation_heads=7"], "distill.relation_heads: "),
        (["distill.teacher_layer=99"], "distill.teacher_layer: "),
        (["distill.student_layer=0"], "distill.student_layer: "),
        (["distill.layer_map={9:1}"], "distill.layer_map: "),
        (["distill.layer_map={1:9}"], "distill.layer_map: "),
        (["distill.layer_map=layer_to_layer", "distill.student_layer=1"], "distill.layer_map: "),
        (["distill.relations={qq:1,kk:-1,vv:1}"], "distill.relations"),
        (["distill.teacher=assistant"], "distill.teacher: "),
        (["distill.task_weight=-1"], "distill.task_weight: "),
        (["prune.ratio=1.0"], "prune.ratio: "),
        (["prune.ratio=-0.1"], "prune.ratio: "),
        (["prune.ratio=abc"], "prune.ratio: "),
        (["prune.scope=global", "prune.ratio=0.9"], "prune.ratio: "),
        (["prune.scope=row"], "prune.scope: "),
        (["prune.importance=training", "prune.criterion=random"], "prune.importance: "),
        (["prune.rounds=0"], "prune.rounds: "),
        (["quantize.bits=5", "stages=[finetune,quantize]"], "quantize.bits: "),
        (["dynamic_int8.bits=4"], "dynamic_int8.bits: "),
        (["finetune.patience=2"], "finetune.patience: expected null, or task.holdout above 0"),
        (["finetune.epochs=1"], "finetune.epochs: expected either epochs or steps"),
        (["finetune.learning_rate=0"], "finetune.learning_rate: "),
        (["finetune.batch_size=0"], "finetune.batch_size: "),
        (["finetune.warmup=2"], "finetune.warmup: "),
        (["+prune.ratoi=0.1"], "prune.ratoi: unknown key, did you mean 'ratio'?"),
        (["finetune._target_=edgemin.study.roots.Root"], "finetune."),
        (["student.layers=[1,2]"], "student.layers: "),
        (["student.source=/nosuch", "student.layers=null"], "student.source: "),
        (["teacher.family=null"], "teacher.family: "),
        (["teacher.tokenizer=null"], "teacher.tokenizer: "),
        (["trainer.accelerator=tpu"], "trainer.accelerator: "),
        (["trainer.precision=16"], "trainer.precision: "),
        (["seed=abc", "teacher.seed=1", "student.seed=1"], "seed: "),
        (["stages=finetune"], "stages: "),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_its_key(overrides: list[str], key: str) -> None:
    assert refusal(*overrides).startswith(key)


def test_a_patience_is_taken_with_a_holdout() -> None:
    plan = studies.plan("finetune.patience=2", "task.holdout=0.25")
    assert node(plan, "student/finetune").settings["patience"] == 2


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["student.layers=4"], "student.layers: "),
        (["student.layers=0"], "student.layers: "),
        (["student.layers=[3,1]"], "student.layers: "),
        (["student.hidden=16"], "student.hidden: "),
        (["student.heads=2"], "student.heads: "),
        (["student.family=bert"], "student.family: "),
    ],
)
def test_a_shape_that_cannot_be_cut_is_refused(changes: list[str], key: str, base: Path) -> None:
    assert refusal(*source("student", base), *changes).startswith(key)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["student.intermediate=20"], "student.intermediate: "),
        (["student.intermediate=99", "student.truncate=first"], "student.intermediate: "),
        (["student.hidden=64", "student.truncate=first"], "student.hidden: "),
        (["student.hidden=24", "student.heads=5", "student.truncate=first"], "student.heads: "),
    ],
    ids=["intermediate", "wider intermediate", "wider hidden", "heads"],
)
def test_a_width_that_cannot_be_cut_is_refused_in_planning(changes: list[str], key: str, base: Path) -> None:
    assert refusal(*source("student", base), *changes, "stages=[finetune]").startswith(key)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (["student.heads=3"], "student.heads: "),
        (["student.vocabulary=5"], "student.vocabulary: "),
        (["student.family=nosuch"], "student.family: "),
        (["student.layers=0", "stages=[finetune]"], "student.layers: "),
    ],
    ids=["heads", "vocabulary", "family", "layers"],
)
def test_a_random_shape_that_cannot_be_built_is_refused_in_planning(changes: list[str], key: str) -> None:
    assert refusal(*changes).startswith(key)


def test_more_tokens_than_the_tokenizer_takes_are_refused_in_planning() -> None:
    assert refusal("task.max_length=999").startswith("task.max_length: ")


def test_more_tokens_than_the_model_has_positions_are_refused_in_planning(base: Path, tmp_path: Path) -> None:
    endless = shutil.copytree(base, tmp_path / "endless")
    content = json.loads((endless / "tokenizer_config.json").read_text())
    content["model_max_length"] = 10**30  # as many tokenizers on the Hub have it
    (endless / "tokenizer_config.json").write_text(json.dumps(content))
    positions = json.loads((endless / "config.json").read_text())["max_position_embeddings"]
    line = refusal(
        *source("teacher", endless, "teacher.tokenizer=null"), f"task.max_length={positions + 1}", "stages=[finetune]"
    )
    assert line.startswith("task.max_length: ") and str(positions) in line


def test_a_plan_trains_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = studies.settings()
    build(read_study(found))
    assert not list(tmp_path.iterdir())
