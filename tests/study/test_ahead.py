"""What comes before any job: plans of all, names that are names. And what is said of jobs that fail all the same."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import studies
from commands import Command

from edgemin import config
from edgemin.cli import Failure
from edgemin.config import KEYS
from edgemin.data import loading
from edgemin.errors import UserError
from edgemin.finetune import Finetune
from edgemin.store.artifacts import Store
from edgemin.study import failures, job, timing, tree
from edgemin.study.ahead import job_name
from edgemin.study.pipeline import Pipeline
from edgemin.study.plan import build
from edgemin.study.reading import read_study

SHORT = "stages=[finetune]"

MEASURES = "measure: expected one of default, grid, none, onnxruntime, openvino, quick, runtimes"


def left(directory: Path) -> list[str]:
    """What a command left in a directory, besides the test's own files."""
    return sorted(path.name for path in directory.iterdir() if path.name not in ("datasets", "files"))


# --- every job of a sweep before any trains ---------------------------------------------------------------


def test_all_jobs_that_cannot_work_are_named_and_nothing_is_trained(command: Command, tmp_path: Path) -> None:
    done = command("prune.ratio=0.25,2,-1", "seed=1,2", flags=("-m",))
    assert done.code == 2 and done.err.splitlines() == [
        "error: job 2 (prune.ratio=2 seed=1): prune.ratio: expected a share in [0, 1), given 2",
        "error: job 3 (prune.ratio=2 seed=2): prune.ratio: expected a share in [0, 1), given 2",
        "error: job 4 (prune.ratio=-1 seed=1): prune.ratio: expected a share in [0, 1), given -1",
        "error: job 5 (prune.ratio=-1 seed=2): prune.ratio: expected a share in [0, 1), given -1",
    ]
    assert (done.out, left(tmp_path)) == ("", [])


@pytest.mark.parametrize(
    ("swept", "line"),
    [
        ("task=toy,sst3", "job 1 (task=sst3): task: expected one of custom, mnli, none, qqp, sst2, toy, given sst3"),
        (
            "measure=none,5",
            f"job 1 (measure=5): {MEASURES}, given 5",
        ),
        ("study=mine,../theirs", "job 1 (study=../theirs): study: expected a name, without / and no path"),
        ("plan=false,maybe", "job 1 (plan=maybe): plan: expected true or false, given 'maybe'"),
        ("stages=[finetune],[finetune,nosuch]", "job 1 (stages=[finetune,nosuch]): stages: expected names of stages"),
        ("distill.relation_heads=4,7", "job 1 (distill.relation_heads=7): distill.relation_heads: expected a divisor"),
        ("paths.store=store,''", "job 1 (paths.store=''): paths.store: expected a directory, given ''"),
    ],
)
def test_a_job_is_refused_in_planning_whatever_is_wrong_with_it(
    swept: str, line: str, command: Command, tmp_path: Path
) -> None:
    done = command(swept, flags=("-m",))
    assert done.code == 2 and done.err.startswith(f"error: {line}") and len(done.err.splitlines()) == 1
    assert left(tmp_path) == []


def test_what_an_experiment_sweeps_is_planned_too(command: Command, tmp_path: Path) -> None:
    (tmp_path / "files" / "experiment").mkdir(parents=True)
    content = "# @package _global_\nhydra: {sweeper: {params: {prune.scope: 'layer,row'}}}\n"
    (tmp_path / "files" / "experiment" / "mine.yaml").write_text(content)
    done = command("experiment=mine", flags=("--config-dir", str(tmp_path / "files"), "-m"))
    assert done.code == 2 and done.err.startswith("error: job 1 (prune.scope=row): prune.scope: ")
    assert len(done.err.splitlines()) == 1 and left(tmp_path) == []


def test_a_sweep_reads_its_data_once(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read: list[Path] = []
    reader = loading.read_file
    monkeypatch.setattr(loading, "read_file", lambda path: (read.append(path), reader(path))[1])
    (tmp_path / "files").mkdir()
    for split in ("train", "validation"):
        lines = [f"{word} {number},{label}" for number in range(9) for word, label in (("good", "p"), ("bad", "n"))]
        file = tmp_path / "files" / f"{split}.csv"
        file.write_text("\n".join(["text,label", *lines]))
        os.utime(file, (0, 0))  # what is a moment old may change again, and is not remembered
    own = ["task=custom", f"task.path={tmp_path / 'files'}", "task.max_length=16"]
    done = command(*own, SHORT, "seed=1,2,3", flags=("-m",))
    assert (done.code, done.err) == (0, "")
    assert sorted(path.name for path in read) == ["train.csv", "validation.csv"]


def test_files_that_change_are_read_again_and_warnings_come_every_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "validation.csv").write_text("text,label\none,x\ntwo,y\n")
    asked = ["task=custom", f"task.path={tmp_path}", "task.labels=[x,y,z]", "task.max_length=16"]
    for count in (2, 2, 3):
        (tmp_path / "train.csv").write_text("text,label\none,x\ntwo,y\n" + "three,y\n" * (count - 2))
        caplog.clear()
        splits = read_study(studies.settings(*asked)).splits
        assert splits is not None and len(splits.train) == count
        assert [record.getMessage() for record in caplog.records] == ["task custom: no training example of the class z"]


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (["seed=1", "prune.ratio=0.1,0.2"], "job 3 (prune.ratio=0.2)"),
        (["-m", "x.py", "seed=1", "prune.ratio=0.20"], "job 3"),
        (["prune.ratio=0.1", "prune.ratio=range(1,3)"], "job 3 (seed=1 prune.ratio=0.2)"),
        ([], "job 3 (seed=1 prune.ratio=0.2)"),
    ],
)
def test_a_job_is_named_by_what_the_sweep_gave_it(words: list[str], own: str) -> None:
    assert job_name(3, ["seed=1", "prune.ratio=0.2"], words) == own


# --- plan=true --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("-m",)])
def test_a_plan_leaves_no_directories(flags: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    done = command("plan=true", flags=flags)
    assert (done.code, done.err, left(tmp_path)) == (0, "", [])
    assert "8 nodes (8 to run)" in done.out and done.out.splitlines()[-1] == "28 steps to train"


def test_a_sweep_is_planned_as_one_tree(command: Command, tmp_path: Path) -> None:
    done = command("prune.ratio=0.25,0.5", "plan=true", "quantize.bits=4", flags=("-m",))
    assert (done.code, done.err, left(tmp_path)) == (0, "", [])
    lines = [re.sub(r" +\w{20}", "", line) for line in done.out.splitlines()]
    assert lines == [
        "job 0 (prune.ratio=0.25)",
        "job 1 (prune.ratio=0.5)",
        "teacher                  to run",
        "  finetune                 to run  12 steps",
        "student                  to run",
        "  finetune                 to run  12 steps",
        "    distill                  to run  2 steps",
        "      prune                    to run  2 steps  job 0",
        "        dynamic_int8             to run  job 0",
        "      dynamic_int8             to run",
        "      prune                    to run  2 steps  job 1",
        "        dynamic_int8             to run  job 1",
        "10 nodes (10 to run): 1 teacher weights, 1 teacher finetune, 1 student weights, 1 student finetune, "
        "1 student distill, 2 student prune, 3 student dynamic_int8",
        "30 steps to train",
        "note: quantize.bits: set, but there is no stage quantize in this job, which has finetune, distill, prune, "
        "dynamic_int8",
    ]


def test_a_note_is_said_once_for_a_sweep(command: Command) -> None:
    done = command("quantize.bits=4", "order=paper,distill_prune_quantize", flags=("-m",))
    assert (done.code, done.err) == (0, "")
    assert re.findall(r".*no stage quantize.*", done.out) == [
        "note: quantize.bits: set, but there is no stage quantize in this job, which has finetune, distill, prune, "
        "dynamic_int8 (job 0)"
    ]


def test_minutes_are_told_where_a_like_stage_was_timed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    studies.run(tmp_path / "run", "stages=[finetune,prune]", store=store)
    for file in store.glob("*/provenance.json"):
        told = json.loads(file.read_text())
        told["seconds"] = 3.0 * told["steps"]
        file.write_text(json.dumps(told))

    def planned(*changes: str) -> dict[str, tuple[int, float | None]]:
        made = studies.plan("stages=[finetune,prune]", *changes)
        return {state.path: (state.steps, state.seconds) for state in tree.states(made, Store(store), timed=True)}

    assert planned("prune.steps=9")["student/finetune/prune"] == (9, 27.0)
    assert planned("prune.steps=9")["student/finetune"] == (0, None), "it is cached"
    epochs = planned("seed=5", "finetune.steps=null", "finetune.epochs=2")
    assert epochs["student/finetune"] == (12, 36.0) and epochs["student"] == (0, None)
    other = planned("prune.steps=9", "prune.batch_size=4")
    assert other["student/finetune/prune"] == (9, None), "another batch takes another time"
    assert planned("student.hidden=32")["student/finetune"] == (12, 36.0), "the teacher is of that size"
    for file in store.glob("*/provenance.json"):
        file.write_text('{"content": 5}')
    assert planned("prune.steps=9")["student/finetune/prune"] == (9, None)


@pytest.mark.parametrize(
    ("group", "choice", "changes", "steps"),
    [
        ("quantize", "reconstruct", {"calibration_examples": 64, "steps": 5}, 3 * 5),
        ("quantize", "reconstruct", {"calibration_examples": 64, "steps": None, "epochs": 1}, 3 * 2),
        ("quantize", "qat", {"calibration_examples": 64, "steps": None, "epochs": 1, "train_on": "calibration"}, 2),
        ("quantize", "qat", {"steps": None, "epochs": 1}, 3),
        ("distill", "mobilebert", {"steps": 7}, 7),
        ("distill", "tinybert", {"steps": 10}, 10),
        ("prune", "heads", {"rounds": 3, "epochs": None, "steps": 2}, 6),
        ("prune", "heads", {"importance": "training", "training_steps": 4, "epochs": None, "steps": 2}, 6),
    ],
)
def test_planning_knows_the_steps_of_every_kind_of_stage(
    group: str, choice: str, changes: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    made = studies.settings("student.hidden=32")
    made |= {group: studies.settings(f"{group}={choice}", tiny=False)[group] | changes, "stages": ["finetune", group]}
    plan = build(read_study(made))
    assert tree.states(plan, Store(tmp_path / "store"))[-1].steps == steps


def test_what_is_alike_takes_a_like_time() -> None:
    prune = next(node for node in studies.plan().nodes if node.stage == "prune")
    again = next(node for node in studies.plan("prune.ratio=0.5", "prune.steps=9").nodes if node.stage == "prune")
    other = next(node for node in studies.plan("task.max_length=40").nodes if node.stage == "prune")
    assert timing.signature(prune) == timing.signature(again) != timing.signature(other)


# --- jobs that fail all the same --------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Exception]]:
    """What the training of a seed's job raises, by seed."""
    raised: dict[int, Exception] = {}
    train = Pipeline.train

    def fail(self: Pipeline) -> Any:
        if self.study.seed in raised:
            raise raised[self.study.seed]
        return train(self)

    monkeypatch.setattr(Pipeline, "train", fail)
    yield raised


def test_a_jobs_unforeseen_exception_is_reported_and_the_others_go_on(
    failing: dict[int, Exception], command: Command, tmp_path: Path
) -> None:
    failing[2] = RuntimeError("what nobody\nthought of")
    done = command(SHORT, "seed=1,2,3", flags=("-m",))
    (study,) = (tmp_path / "outputs" / "main").iterdir()
    line = "job 1 (seed=2): RuntimeError: what nobody thought of (not foreseen; its traceback is in "
    assert done.code == 1 and done.err == f"error: {line}{study / '1' / 'error.txt'})\n"
    kept = (study / "1" / "error.txt").read_text()
    assert kept.startswith(line) and "Traceback (most recent call last)" in kept and "in fail" in kept
    assert sorted(path.parent.name for path in study.glob("*/run.json")) == ["0", "2"]
    assert "1 of 3 jobs has no result" in done.out and done.out.count(line) == 1
    assert "1 of 3 jobs has no result" in (study / "report.md").read_text()


def test_a_mistake_met_while_running_is_reported_and_the_others_go_on(
    failing: dict[int, Exception], command: Command, tmp_path: Path
) -> None:
    failing |= {1: UserError("learning_rate: too large"), 3: UserError("learning_rate: too large")}
    done = command(SHORT, "seed=1,2,3", flags=("-m",))
    (study,) = (tmp_path / "outputs" / "main").iterdir()
    lines = [f"job {number} (seed={number + 1}): learning_rate: too large" for number in (0, 2)]
    assert done.code == 2 and done.err.splitlines() == [f"error: {line}" for line in lines]
    assert (study / "0" / "error.txt").read_text() == f"{lines[0]}\n"
    assert "2 of 3 jobs have no result" in done.out and all(line in done.out for line in lines)


def test_a_single_job_that_fails_says_so_in_one_line(
    failing: dict[int, Exception], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing[42] = ValueError("what nobody thought of")
    done = command(SHORT)
    (run,) = (tmp_path / "outputs" / "main").glob("*/0")
    told = f"ValueError: what nobody thought of (not foreseen; its traceback is in {run / 'error.txt'})"
    assert (done.code, done.err) == (1, f"error: {told}\n")
    monkeypatch.setenv("EDGEMIN_TRACEBACK", "1")
    assert "Traceback" in command(SHORT).err


def test_a_job_that_works_again_forgets_that_it_failed(
    failing: dict[int, Exception], command: Command, tmp_path: Path
) -> None:
    place = f"hydra.run.dir={tmp_path / 'run'}"
    failing[42] = UserError("learning_rate: too large")
    assert command(SHORT, place).code == 2 and (tmp_path / "run" / "error.txt").is_file()
    failing.clear()
    assert command(SHORT, place).code == 0 and not (tmp_path / "run" / "error.txt").exists()


def test_jobs_of_other_processes_are_heard_of_by_their_files(tmp_path: Path) -> None:
    for number in (0, 1, 2, 10):
        (tmp_path / str(number)).mkdir()
    (tmp_path / "figures").mkdir()
    (tmp_path / "0" / "run.json").write_text("{}")
    failures.keep(tmp_path / "10", Failure("job 10: a bug", foreseen=False), RuntimeError("a bug"))
    failures.keep(tmp_path / "2", Failure("job 2: seed: too odd"), UserError("seed: too odd"))
    assert failures.below(tmp_path) == [
        Failure("job 1: ended without a result or a message (was it killed?)", foreseen=False),
        Failure("job 2: seed: too odd"),
        Failure("job 10: a bug", foreseen=False),
    ]
    assert failures.below(tmp_path / "nowhere") == []


# --- names are names, files are read at the start ---------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("task.name=a/b", "task.name: expected a name, without / and no path, given 'a/b'"),
        ("task.name=..", "task.name: expected a name"),
        ('task.name="a\tb"', "task.name: expected a name of at most 100 printable characters"),
        (f"task.name={'a' * 101}", "task.name: expected a name of at most 100 printable characters"),
        ("task.evaluation_splits=[../validation]", "task.evaluation_splits: expected a name"),
        ("task.train_split=a/b", "task.train_split: expected a name"),
        ("study=../elsewhere", "study: expected a name, without / and no path, given '../elsewhere'"),
        ("study=/elsewhere", "study: expected a name"),
        ("study=..", "study: expected a name"),
        ("study=''", "study: expected a name"),
        ("study=7", "study: expected a name, without / and no path, given 7"),
        ('study="\x1b[31mred"', "study: expected a name of at most 100 printable characters"),
        ("paths.store=''", "paths.store: expected a directory, given ''"),
        ("paths.outputs=''", "paths.outputs: expected a directory, given ''"),
        ("paths.outputs=null", "paths.outputs: expected a directory, given None"),
        ("+anything=1", "anything: unknown key (there are: "),
        ("+sead=1", "sead: unknown key, did you mean 'seed'?"),
        ("+anything={a: 1}", "anything: unknown key"),
        (
            "+anything={_target_: edgemin.data.task.Task}",
            "anything._target_: expected a stage or a model",
        ),
        ("+paths.stroe=x", "paths.stroe: unknown key, did you mean 'paths.store'?"),
        ("teacher.seed=-5", "teacher.seed: expected a whole number of at least 0, given -5"),
        ("student.seed=9223372036854775808", "student.seed: expected a whole number of at most 64 bits"),
        ("seed=-1", "seed: expected a whole number of at least 0, given -1"),
        ("published=/etc/passwd", "published: /etc/passwd: "),
        ("published=nosuch.yaml", "published: expected a file of published numbers, given 'nosuch.yaml'"),
        ("published=[1]", "published: expected a string, given [1]"),
        ("~evaluate", "evaluate.transfer: expected a list of tasks"),
        ("~order", "order.name: expected a string, given None"),
        ("order.stages=finetune", "order.stages: expected a list"),
    ],
)
def test_what_can_be_told_at_the_start_is_refused_at_the_start(
    given: str, line: str, command: Command, tmp_path: Path
) -> None:
    assert command(given).line.startswith(line)
    store = tmp_path / "outputs" / "store"
    assert not store.exists() and {*left(tmp_path)} <= {"outputs"}


def test_the_keys_of_a_study_are_those_of_its_configuration() -> None:
    cfg = studies.settings(tiny=False)
    stages_of_the_order = {"dynamic_int8"}
    assert {*cfg, *(f"paths.{key}" for key in cfg["paths"])} - stages_of_the_order == KEYS - {"ablate"}


def test_a_key_of_ones_own_that_another_refers_to_is_welcome(command: Command) -> None:
    assert command("+mine=7", "seed=${mine}", "plan=true").code == 0
    assert command("+paths.data=x", "teacher.name=${paths.data}", "plan=true").code == 0
    assert command("+mine=7", "hydra.run.dir=outputs/${mine}", "plan=true").code == 0


def test_what_was_read_of_published_numbers_is_what_lies_beside_the_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("# secret\nsource: S\nnotes: [n]\nrows: {Teacher: {size_mib: {value: 1.5, note: n}}}\n")
    studies.run(tmp_path / "run", SHORT, f"published={file}")
    kept = (tmp_path / "run" / "published.yaml").read_text()
    assert "secret" not in kept
    assert job.literature.read(tmp_path / "run" / "published.yaml") == job.literature.read(file)


@pytest.mark.parametrize(
    "content",
    [
        "rows: {T: {size_mib: .nan}}",
        f"rows: {{T: {{size_mib: 1{'0' * 400}}}}}",
        "rows: {}\nnotes: n",
        "rows: {}\n1: 2",
        "a: b: c",
        "- 1",
        "[" * 3000,
    ],
    ids=["nan", "no float", "notes", "key", "yaml", "list", "deep"],
)
def test_a_file_that_holds_no_published_numbers_is_refused_before_anything_is_trained(
    content: str, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    file = tmp_path / "files" / "mine.yaml"
    file.write_text(content)
    assert command(f"published={file}").line.startswith(f"published: {file}: ")
    assert not (tmp_path / "outputs" / "store").exists()


# --- messages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["measure.runs=20"], "measure.runs: expected no settings of measure, which is turned off (measure=none"),
        (["measure=5"], f"{MEASURES}, given 5"),
        (["task=null"], "task: expected one of custom, mnli, none, qqp, sst2, toy, given null"),
        (["finetune.epochs.x=5"], "finetune.epochs.x: unknown key"),
    ],
)
def test_a_group_that_is_off_or_no_choice_is_said(given: list[str], line: str, command: Command) -> None:
    assert command(*given).line.startswith(line)


@pytest.mark.parametrize("asked", ["demo", "deployment int4.group_size=8", "sst2_offline"])
def test_measuring_is_skipped_in_an_experiment_that_says_how_to_measure(asked: str, command: Command) -> None:
    done = command(*f"experiment={asked}".split(), "measure=none", "teacher.stages=[finetune]", "plan=true")
    assert done.code == 0, done.err


def test_measuring_is_skipped_where_an_experiment_sets_keys_of_it(command: Command, tmp_path: Path) -> None:
    (tmp_path / "files" / "experiment").mkdir(parents=True)
    content = "# @package _global_\ndefaults: [override /measure: runtimes]\nmeasure: {runs: 20, threads: 1}\n"
    (tmp_path / "files" / "experiment" / "mine.yaml").write_text(content)
    flags = ("--config-dir", str(tmp_path / "files"))
    assert command("experiment=mine", "plan=true", flags=flags).code == 0
    assert command("experiment=mine", "measure.runs=30", "plan=true", flags=flags).line == (
        "measure.runs: expected no settings of measure, which is turned off (measure=none or null), given one"
    )


def test_an_order_is_told_its_comparisons_on_the_command_line(command: Command) -> None:
    asked = ["order=distill", "plan=true"]
    assert command(*asked, "order.comparisons=[[+ Distillation,'Control: no teacher']]").code == 0
    line = command(*asked, "order.comparisons=[[Pruned,Teacher]]").line
    assert line.startswith("order.comparisons[0]: expected rows of the order (Teacher, Student baseline, + Dist")


def test_the_directory_above_the_group_is_asked_for(command: Command, tmp_path: Path) -> None:
    mine = tmp_path / "files" / "order"
    mine.mkdir(parents=True)
    (mine / "short.yaml").write_text(
        "# @package _global_\norder: {name: short, stages: [finetune], rows: null, controls: []}\n"
    )
    done = command("order=short", "plan=true", flags=("--config-dir", str(mine)))
    assert done.line.startswith(f"--config-dir: expected the directory that holds order/, given {mine}")
    assert command("order=short", "plan=true", flags=("--config-dir", str(mine.parent))).code == 0


def test_a_key_that_the_experiment_sets_and_the_choice_lacks_is_explained(command: Command, tmp_path: Path) -> None:
    (tmp_path / "files" / "experiment").mkdir(parents=True)
    content = "# @package _global_\ndistill: {teacher_layer: 1}\n"
    (tmp_path / "files" / "experiment" / "mine.yaml").write_text(content)
    flags = ("--config-dir", str(tmp_path / "files"))
    asked = ["~distill.relation_heads", "experiment=mine", "distill=mlkd", "plan=true"]
    line = command(*asked, flags=flags).line
    assert line == (
        "distill.teacher_layer: experiment=mine sets it, and the distill that was chosen has no such key; leave it out "
        "with ~distill.teacher_layer"
    )
    assert command(*asked, "~distill.teacher_layer", flags=flags).code == 0


def test_a_key_that_an_order_includes_and_the_choice_lacks_is_explained(command: Command) -> None:
    assert command("order=methods", "distill@minilm=none", "plan=true").line == (
        "minilm.teacher: order=methods sets it, and the minilm that was chosen has no such key; leave it out with "
        "~minilm.teacher"
    )


class ConstructedError(Exception):
    pass


class Harmful:
    def __init__(self) -> None:
        raise ConstructedError


class Mine(Finetune):
    pass


def test_a_class_of_the_wrong_kind_is_refused_before_it_is_constructed() -> None:
    path = f"{__name__}.Harmful"
    found: Mapping[str, Any] = studies.settings()
    for key in ("task", "trainer", "logger", "teacher", "student", "finetune"):
        with pytest.raises(UserError, match=rf"^{key}\._target_: expected .* or a subclass of it, given {path}$"):
            job.plan_job(found | {key: {"_target_": path}}, {"given": {}, "set_by": {}}, {}, timed=False)
    with pytest.raises(ConstructedError):
        config.construct({"_target_": path}, "thing")


def test_a_class_of_ones_own_is_welcome() -> None:
    found = studies.settings(SHORT)
    found["finetune"]["_target_"] = f"{__name__}.Mine"
    plan = build(read_study(found))
    assert isinstance(plan.nodes[-1].step, Mine)
