"""The command line: what a user did wrong is one line and exit code 2; a sweep ends in one table."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import studies
import torch
from commands import Command

REPOSITORY = Path(__file__).parents[2]


def trained(tmp_path: Path) -> bool:
    """Whether anything was made: a committed artifact or a checkpoint."""
    store = tmp_path / "outputs" / "store"
    return any(store.glob("*/manifest.json")) or any(store.glob(".work/*"))


def rows(directory: Path) -> list[list[dict[str, Any]]]:
    """The rows of every job below a directory, by the job's number."""
    found = {int(path.parent.name): json.loads(path.read_text())["rows"] for path in directory.rglob("run.json")}
    return [found[number] for number in sorted(found)]


def shell(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["task=sst3"], r"task: expected one of custom, mnli, none, qqp, sst2, toy.*given sst3"),
        (["prune=nosuch"], r"prune: expected one of ffn, heads, .*given nosuch"),
        (["tsak=sst2"], r"tsak: unknown key"),
        (["prune.ratoi=0.1"], r"prune\.ratoi: unknown key"),
        (["+prune.ratoi=0.1"], r"prune\.ratoi: unknown key, did you mean 'ratio'\?"),
        (["prune.ratio=1.0"], r"prune\.ratio: expected a share in \[0, 1\), given 1\.0"),
        (["prune.ratio=-0.1"], r"prune\.ratio: expected a share in \[0, 1\), given -0\.1"),
        (["prune.ratio=abc"], r"prune\.ratio: expected a share in \[0, 1\), given 'abc'"),
        (["distill.relation_heads=7"], r"distill\.relation_heads: expected a divisor of .* given 7"),
        (["distill.teacher_layer=99"], r"distill\.teacher_layer: expected a teacher layer from 1 to 2, given 99"),
        (
            ["quantize=dynamic", "stages=[finetune,quantize,distill]"],
            r"stages: expected nothing after quantize.*given distill",
        ),
        (["stages=[foo]"], r"stages: expected names of stages .*given 'foo'"),
        (
            ["stages=[finetune]", "order=paper", "order.comparisons=[[typo,nope]]"],
            r"stages: expected no keys of order beside stages=\[\.\.\.\], given order, order\.comparisons$",
        ),
        (["dynamic_int8.bits=4"], r"dynamic_int8\.bits: expected 8.*given 4"),
        (["task.path=/nosuch/data", "task=sst2"], r"task\.path: expected an existing directory.*given /nosuch/data"),
        (["student.source=/nosuch/model"], r"student\.source: expected an existing directory.*given '/nosuch/model'"),
        (["task.holdout=1"], r"task\.holdout: expected a number in \[0, 1\), given 1"),
        (["task.labels=[good,bad]"], r"task\.label_column: expected labels out of good, bad, given positive in row 1"),
        (["finetune.patience=1"], r"finetune\.patience: "),
        (["evaluate.transfer=mnli"], r"evaluate\.transfer: expected a list"),
        (["evaluate.transfer=[toy]"], r"evaluate\.transfer: "),
        (["evaluate.transfer=[nosuch]"], r"evaluate\.transfer: .*given nosuch"),
        (["measure=default", "measure.runs=0"], r"measure\.runs: "),
        (["logger=wandb", "logger.mode=loud"], r"logger\.mode: "),
        (["paths.store=/dev/null/store"], r"paths\.store: "),
        (["order.rows=[{name: x, stages: [finetune], modle: teacher}]"], r"order\.rows\[0\]\.modle: unknown key"),
        (["plan=maybe"], r"plan: expected true or false, given 'maybe'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_that_names_the_key(
    overrides: list[str], expected: str, command: Command, tmp_path: Path
) -> None:
    assert re.match(expected, command(*overrides).line)
    assert not trained(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(command: Command, tmp_path: Path) -> None:
    assert command("trainer.accelerator=gpu").line.startswith("trainer.accelerator: expected cpu or auto")
    assert not trained(tmp_path)


def own_data(directory: Path, train: str, validation: str = "text,label\na b,x\nc d,y\n") -> list[str]:
    (directory / "train.csv").write_text(train)
    (directory / "validation.csv").write_text(validation)
    return ["task=custom", f"task.path={directory}", "task.max_length=16"]


GOOD = "text,label\none,x\ntwo,y\n"


@pytest.mark.parametrize(
    ("train", "validation", "changes", "expected"),
    [
        (GOOD, GOOD, ["task.text_columns=[sentence]"], r"task\.text_columns: expected columns of .*given sentence"),
        (GOOD, GOOD, ["task.label_column=class"], r"task\.label_column: expected a column of .*given class"),
        (GOOD, "text,label\none,z\n", [], r"task\.label_column: expected labels out of x, y, given z in row 1 of val"),
        (GOOD, "text,label\n", [], r"task\.evaluation_splits: expected a split with examples, given validation"),
        ("text,label\n", GOOD, [], r"task\.train_split: expected a split with examples, given train"),
        ("text,label\none,x\n,y\n", GOOD, [], r"task\.text_columns: expected a text in every row of text"),
        ("text,label\none,x\ntwo,x\n", "text,label\none,x\n", [], r"task\.label_column: expected at least two classes"),
        (GOOD, GOOD, ["task.evaluation_splits=[test]"], r"task\.path: expected a file for the split 'test'"),
        (GOOD, GOOD, ["task.kind=regression"], r"task\.label_column: expected finite numbers"),
        (GOOD, GOOD, ["task.metrics=[macro_f1]"], r"task\.metrics: "),
    ],
    ids=[
        "text column",
        "label column",
        "label",
        "no rows",
        "no train",
        "empty",
        "one class",
        "split",
        "number",
        "metric",
    ],
)
def test_data_that_is_not_what_the_task_says_is_one_line(
    train: str, validation: str, changes: list[str], expected: str, command: Command, tmp_path: Path
) -> None:
    assert re.match(expected, command(*own_data(tmp_path, train, validation), *changes).line)
    assert not trained(tmp_path)


@pytest.mark.parametrize(
    "overrides", [["task=sst3"], ["order=nosuch"], ["evaluate.transfer=[nosuch]"]], ids=lambda value: value[0]
)
def test_only_choices_are_offered_as_choices(overrides: list[str], command: Command) -> None:
    assert "provider=" not in command(*overrides).line


def test_a_misspelt_key_inside_a_mapping_is_named_whole(command: Command) -> None:
    assert command("distill.relations={qx:1}").line.startswith("distill.relations.qx: ")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["evaluate.transfer=[none]"], "evaluate.transfer: "),
        (["paths.store=null"], "paths.store: "),
        (["paths.outputs=/dev/null/outputs"], "paths.outputs: "),
        (["task=null"], "task: "),
        (["~trainer"], "trainer: "),
        (["seed=99999999999999999999999"], "seed: "),
        (["finetune._target_=edgemin.study.roots.find"], "finetune._target_: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_of_another_kind_is_one_line_too(overrides: list[str], key: str, command: Command) -> None:
    assert command(*overrides).line.startswith(key)


def test_outputs_go_to_no_directory_called_none(command: Command) -> None:
    assert command("paths.outputs=null", "plan=true").line.startswith("paths.outputs: ")


def test_an_order_without_rows_is_one_line(command: Command) -> None:
    assert command("order.rows=[]").line.startswith("order.rows: ")


def test_without_a_network_the_missing_data_or_model_is_named(tmp_path: Path) -> None:
    asked = [*studies.TINY, "task=sst2,toy", "teacher.source=nosuch/model", "teacher.family=null"]
    done = shell("-m", "edgemin.train", "-m", *asked, cwd=tmp_path, HF_HOME=str(tmp_path / "nothing cached"))
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first.startswith("error: job 0 (task=sst2): task.path: ")
    assert "nyu-mll/glue" in first and "task.path=<" in first
    assert second.startswith("error: job 1 (task=toy): teacher.source: ") and "'nosuch/model'" in second
    assert not (tmp_path / "outputs").exists()


def test_a_damaged_artifact_is_one_line(command: Command, tmp_path: Path) -> None:
    assert command("stages=[finetune]").code == 0
    (damaged,) = [
        path.parent
        for path in (tmp_path / "outputs" / "store").glob("*/provenance.json")
        if json.loads(path.read_text())["path"] == "student/finetune"
    ]
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    line = command("stages=[finetune]").line
    assert damaged.name in line and "corrupted, model.safetensors differs from its checksum" in line


# --- runs and sweeps --------------------------------------------------------------------------------------


def test_a_run_in_its_own_process_says_nothing_on_stderr(tmp_path: Path) -> None:
    done = shell("-m", "edgemin.train", *studies.TINY, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Pruned + quantized" in done.stdout and "student/finetune/distill  trained  2 steps" in done.stdout
    assert len(list((tmp_path / "outputs" / "main").glob("*/0/run.json"))) == 1


def test_every_job_has_a_log_of_its_own_with_notes_warnings_and_mistakes(command: Command, tmp_path: Path) -> None:
    asked = ("stages=[finetune,prune,quantize]", "prune.calibration_examples=4096", "hydra.sweep.dir=swept")
    assert command("prune.ratio=0.25,0.5", "seed=1", "evaluate.max_drop=0", *asked, flags=("-m",)).code == 0
    first, second = ((tmp_path / "swept" / str(number) / "train.log").read_text() for number in (0, 1))
    assert re.search(r"^\d{4}-\d\d-\d\d \S+ INFO student/finetune  trained  12 steps", first, re.MULTILINE)
    assert " INFO student/finetune/prune  note  removed 2 of 8 heads" in first
    assert " INFO student/finetune/prune/quantize  done  " in first
    assert " WARNING calibration: 4096 examples asked for, all 96 of train used" in first
    assert " INFO student/finetune  cached  " in second and "removed 4 of 8 heads" in second
    assert "removed 4 of 8 heads" not in first
    refused = command("prune.ratio=2", "hydra.run.dir=refused")
    assert f" INFO error: {refused.line}" in (tmp_path / "refused" / "train.log").read_text()


def test_no_empty_log_is_made(command: Command, tmp_path: Path) -> None:
    assert command("plan=true", "hydra.run.dir=planned").code == 0
    assert not list(tmp_path.rglob("train.log"))


def test_a_sweep_over_seeds_prints_one_table_with_mean_and_deviation(command: Command, tmp_path: Path) -> None:
    done = command("seed=1,2", "stages=[finetune,quantize]", flags=("-m",))
    assert (done.code, done.err) == (0, "")
    (study,) = (tmp_path / "outputs" / "main").iterdir()
    first, second = rows(study)
    assert [row["name"] for row in first] == [row["name"] for row in second]
    assert first[1]["metrics"] != second[1]["metrics"]
    table = done.out[done.out.rindex("What each stage cost") :]
    scores = [100 * run[1]["metrics"]["toy"]["validation"]["accuracy"] for run in (first, second)]
    mean = sum(scores) / 2
    line = next(line for line in table.splitlines() if "Student: finetune" in line)
    assert re.search(rf"{mean:.2f} ± \d+\.\d\d", re.sub(r"\s+", " ", line))
    interval = r"± is half of the 95 % interval: of metrics for other examples like these \d+ and other seeds"
    assert re.search(interval, re.sub(r"\s+", " ", table))
    assert "\nWhich differences of accuracy are more than noise\n" in done.out
    assert str((study / "report.md").relative_to(tmp_path)) in done.out


def test_flags_may_stand_between_keys(command: Command) -> None:
    done = command("plan=true", "-m", "seed=1,2", "stages=[finetune]")
    assert (done.code, done.err) == (0, "") and "job 1" in done.out


def test_a_finished_job_is_planned_as_cached(command: Command) -> None:
    assert command("stages=[finetune]").code == 0
    assert "4 nodes (4 cached)" in command("stages=[finetune]", "plan=true").out


def test_orders_sweep(command: Command, tmp_path: Path) -> None:
    done = command("order=paper,distill_prune_quantize,prune_distill_quantize", flags=("-m",))
    assert (done.code, done.err) == (0, "")
    assert [len(found) for found in rows(tmp_path / "outputs")] == [6, 7, 7]


def test_stages_sweep(command: Command, tmp_path: Path) -> None:
    done = command("stages=[finetune,distill],[finetune,prune,quantize]", flags=("-m",))
    assert (done.code, done.err) == (0, "")
    assert [len(found) for found in rows(tmp_path / "outputs")] == [3, 4]


CONTROL_ALONE = ["order=distill", "order.stages=[finetune]", "order.rows=[{name: Baseline, stages: [finetune]}]"]


@pytest.mark.parametrize(
    ("overrides", "stage", "named"),
    [
        (["quantize.bits=4", "quantize.group_size=32"], "quantize", {"quantize.bits", "quantize.group_size"}),
        (["order=distill", "prune.ratio=0.3"], "prune", {"prune.ratio"}),
        (["quantize=qat"], "quantize", {"quantize"}),
        (["+quantize@qat=qat"], "qat", {"qat"}),
        (["stages=[prune,finetune]", "prune.ratio=0.3"], "prune", set()),
        (["teacher.stages=[finetune,quantize]", "quantize.bits=4"], "quantize", set()),
        ([*CONTROL_ALONE, "distill.teacher=teacher"], "distill", {"distill.teacher"}),
        ([*CONTROL_ALONE, "distill=mlkd"], "distill", {"distill"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_key_of_a_stage_that_no_row_has_is_named_in_a_note(
    overrides: list[str], stage: str, named: set[str], command: Command
) -> None:
    done = command(*overrides, "plan=true")
    assert (done.code, done.err) == (0, "")
    pattern = rf"note: (.*): set, but there is no stage {stage} in this job, which has finetune"
    keys = {key for found in re.findall(pattern, done.out) for key in found.split(", ")}
    assert keys >= named and (named or not keys)
    assert "distill.steps" not in keys, "the control without a teacher takes it from there"


def test_transfer_reads_the_other_tasks_where_this_one_is_read(command: Command, tmp_path: Path) -> None:
    glue = studies.glue(tmp_path / "o'brien's glue")
    path = str(glue).replace("'", "\\'")
    done = command("task=sst2", f"task.path='{path}'", "evaluate.transfer=[mnli,qqp]", "stages=[finetune]")
    assert (done.code, done.err) == (0, "")
    ((teacher, _),) = rows(tmp_path / "outputs")
    assert teacher["transfer"] == ["mnli", "qqp"]
    assert teacher["metrics"]["mnli"]["validation_mismatched"]["n"] == 24
    assert "zero-shot" in next((tmp_path / "outputs").rglob("report.md")).read_text()


def test_users_can_add_their_own_configuration(command: Command, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "order"
    mine.mkdir(parents=True)
    (mine / "short.yaml").write_text(
        "# @package _global_\norder: {name: short, stages: [finetune, quantize], rows: null, controls: []}\n"
    )
    done = command("order=short", flags=("--config-dir", str(tmp_path / "mine")))
    assert (done.code, done.err) == (0, "")
    assert [row["stages"] for row in rows(tmp_path / "outputs")[0]][1:] == [["finetune"], ["finetune", "quantize"]]


def test_stages_by_hand_leave_out_what_an_experiment_says_of_the_order(command: Command, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "experiment"
    mine.mkdir(parents=True)
    (mine / "pairs.yaml").write_text("# @package _global_\norder: {comparisons: [[Teacher, Student baseline]]}\n")
    asked = ("experiment=pairs", "stages=[finetune]", "plan=true")
    assert command(*asked, flags=("--config-dir", str(tmp_path / "mine"))).code == 0


@pytest.mark.parametrize("flag", ["--help", "--cfg job"])
def test_help_and_configuration_are_shown_without_loading_torch(flag: str, tmp_path: Path) -> None:
    script = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pytorch_lightning', 'wandb', 'matplotlib', 'numpy'}\n"
        "atexit.register(lambda: print('loaded:', sorted(heavy & set(sys.modules))))\n"
        "from edgemin.train import main\n"
        "main()\n"
    )
    done = shell("-c", script, *flag.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "loaded: []"
    assert ("prune" in done.stdout) and ("EdgeMIN" in done.stdout or "_target_: edgemin.data.task.Task" in done.stdout)
    assert not list(tmp_path.iterdir())


# --- kill -9 ----------------------------------------------------------------------------------------------

SWEEP = ("prune.ratio=0.25,0.5", "trainer.checkpoint_seconds=0", "finetune.steps=40", "prune.steps=40")


@pytest.mark.slow
def test_a_sweep_killed_in_its_middle_ends_with_the_unbroken_table(tmp_path: Path) -> None:
    """SIGKILL while the third stage that trains is between two checkpoints, then the same command again."""
    arguments = ("-m", "edgemin.train", "-m", *studies.TINY, *SWEEP)
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "killed").mkdir()
    done = shell(*arguments, cwd=tmp_path / "unbroken")
    assert (done.returncode, done.stderr) == (0, "")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=tmp_path / "killed", env=environment, stdout=subprocess.DEVNULL
    )
    work, seen = tmp_path / "killed" / "outputs" / "store" / ".work", set[str]()
    while len(seen) < 4 and process.poll() is None:  # teacher, student, distillation, pruning
        seen |= {path.parent.name for path in work.glob("*/last.ckpt")}
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = {path.parent.name for path in work.glob("*/last.ckpt")}
    assert left <= seen and len(left) == 1
    planned = shell(*arguments, "plan=true", cwd=tmp_path / "killed")
    assert planned.returncode == 0 and set(re.findall(r"resumes  (\w+)", planned.stdout)) == left
    again = shell(*arguments, cwd=tmp_path / "killed")
    assert (again.returncode, again.stderr) == (0, "")
    (broken,) = [
        path for path in (tmp_path / "killed" / "outputs" / "main").iterdir() if (path / "report.md").is_file()
    ]
    (whole,) = (tmp_path / "unbroken" / "outputs" / "main").iterdir()
    assert rows(broken) == rows(whole)
    for table in ("stages.csv", "stages.md"):
        assert (broken / "tables" / table).read_text() == (whole / "tables" / table).read_text()
