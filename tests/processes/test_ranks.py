"""Several processes train as one does, decide as one, and end together."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import several
import studies
import tiny
import torch

from edgemin import toy
from edgemin.errors import SharedError, UserError
from edgemin.processes import launch, ranks
from edgemin.processes.launch import Place
from edgemin.training import fitting

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD_SIZE"))},
    "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "tests"))),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
PATIENCE = 240  # seconds until a hang is one


def torchrun(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a script or module."""
    return subprocess.run(
        [*TORCHRUN, *arguments],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


# --- where a process stands -------------------------------------------------------------------------------

SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[05-06]",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Place()),
        ({"WORLD_SIZE": "4"}, Place()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Place(3, 4, 1, 2)),
        (SRUN, Place(5, 8, 1, 4)),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, Place(0, 2, 0, 2)),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, Place()),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, Place()),
    ],
    ids=["alone", "a leftover", "torchrun", "srun", "torchrun under srun", "a batch script", "srun of one"],
)
def test_a_process_knows_its_place_from_its_launcher(environment: dict[str, str], expected: Place) -> None:
    assert launch.place(environment) == expected


@pytest.mark.parametrize(
    ("listed", "first"),
    [("gpu[05-06]", "gpu05"), ("gpu[3,7-9],cpu1", "gpu3"), ("one", "one"), ("a1,b2", "a1"), ("r[1-2]n", "r1n")],
)
def test_processes_of_srun_meet_at_its_first_machine(listed: str, first: str) -> None:
    found = launch.variables(SRUN | {"SLURM_STEP_NODELIST": listed})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == (first, str(15000 + 123456 % 20000))
    assert launch.variables(SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "7"})["MASTER_ADDR"] == "here"


def test_unequal_machines_are_refused() -> None:
    with pytest.raises(UserError, match=r"^srun: expected equally many processes on every machine [^\n]*, given 3,1$"):
        launch.place(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3,1"})


# --- by itself --------------------------------------------------------------------------------------------


def test_a_process_by_itself_is_the_first_of_one() -> None:
    ranks.start()
    assert (ranks.rank(), ranks.world(), ranks.is_main(), ranks.is_first_here()) == (0, 1, True, True)
    value, given = torch.ones(3), object()
    assert ranks.mean(value) is value and ranks.total(value) is value
    assert ranks.from_main(lambda: given) is given and ranks.together(lambda: given) is given
    with pytest.raises(UserError) as refused:
        ranks.together(lambda: studies.plan("seed=-1"))
    assert not isinstance(refused.value, SharedError)
    ranks.agree()
    ranks.finish()


@pytest.mark.parametrize(
    ("started", "asked", "line"),
    [
        (2, 1, "processes: expected 2, as many as were started (trainer=ddp), given 1"),
        (1, 4, "processes: expected 1, as many as were started, given 4; start them by torchrun --nproc-per-node=4 "),
        (2, 4, "processes: expected 2, as many as were started, given 4; start them by torchrun --nproc-per-node=4 "),
    ],
)
def test_another_number_of_processes_than_was_started_is_refused(
    started: int, asked: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "world", lambda: started)
    with pytest.raises(UserError) as refused:
        fitting.Trainer(accelerator="cpu", processes=asked)
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)
    assert fitting.Trainer(accelerator="cpu", processes=None).processes is None


def test_the_number_of_processes_is_in_the_key_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> dict[str, str]:
        return {node.path: node.key for node in studies.plan("trainer=ddp", "trainer.accelerator=cpu").nodes}

    alone = keys()
    assert alone == {node.path: node.key for node in studies.plan("trainer=auto", "trainer.accelerator=cpu").nodes}
    monkeypatch.setattr(ranks, "world", lambda: 2)
    both = keys()
    assert {path for path in alone if alone[path] == both[path]} == {"teacher", "student"}


# --- two processes ----------------------------------------------------------------------------------------


def run_by_two(folder: Path, *names: str) -> dict[str, several.Ended]:
    done = torchrun(str(REPOSITORY / "tests" / "several.py"), str(folder), *names, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return several.kept(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes run all cases, after one has left a run behind for them to end."""
    made = tmp_path_factory.mktemp("several")
    several.killed(made / "broken by one")
    return made


@pytest.fixture(scope="module")
def by_two(folder: Path) -> dict[str, several.Ended]:
    return run_by_two(folder)


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_same(two: several.Ended, one: several.Ended, *, since: int = 0) -> None:
    """Equal but for rounding, from a step on."""
    assert (two.steps, two.structure) == (one.steps, one.structure)
    expected = one.terms[since:]
    assert len(two.terms) == len(expected) > 0
    for here, there in zip(two.terms, expected, strict=True):
        assert here == pytest.approx(there, abs=1e-4, rel=0)
    assert two.weights.keys() == one.weights.keys()
    for name, tensor in one.weights.items():
        assert torch.allclose(two.weights[name], tensor, atol=2e-5), name


def test_two_processes_distil_as_one_does_over_50_steps(tmp_path: Path, threads: None) -> None:
    """Also where parameters have no gradient: the student stops below its head."""
    name = "a student that stops below its end"
    one = several.run(name, tmp_path / "one")
    check_same(run_by_two(tmp_path, name)[name], one)
    assert len(one.terms) == 50


@pytest.mark.slow
@pytest.mark.parametrize("name", several.CASES)
def test_two_processes_learn_what_one_learns(
    name: str, by_two: dict[str, several.Ended], tmp_path: Path, threads: None
) -> None:
    one = several.run(name, tmp_path)
    check_same(by_two[name], one)
    start = tiny.model().state_dict()
    moved = [
        float((one.weights[key] - tensor).abs().max())
        for key, tensor in start.items()
        if key.endswith("LayerNorm.bias")
    ]
    assert max(moved) > 5e-4, "something was learnt"


@pytest.mark.slow
def test_what_one_process_began_two_end_and_the_other_way_round(
    folder: Path, by_two: dict[str, several.Ended], tmp_path: Path, threads: None
) -> None:
    whole = several.run("finetune", tmp_path)
    check_same(by_two["resumed"], whole, since=several.KILLED_AT - 1)
    check_same(several.run("finetune", folder / "broken by several"), whole, since=several.KILLED_AT - 1)


@pytest.mark.slow
def test_a_mistake_of_any_process_is_told_to_all(folder: Path, by_two: dict[str, several.Ended]) -> None:
    lines = ["key: refused by 0", "key: refused by 0", "key: refused by 1 (process 1)", "key: refused by 0"]
    assert torch.load(folder / "told0.pt") == [*lines, "0", "0"]
    assert torch.load(folder / "told1.pt") == [*lines, "0", "1"]


# --- the command line -------------------------------------------------------------------------------------

DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32", "trainer.threads=1")
SHORT = ("stages=[finetune,distill]", "measure=none")


def train(cwd: Path, *overrides: str, two: bool = True, flags: tuple[str, ...] = ()) -> Any:
    """The command line in two processes, or in one; temporary files in `cwd/tmp`."""
    (cwd / "tmp").mkdir(parents=True, exist_ok=True)
    module = ("-m", "edgemin.train", *flags, *studies.TINY, *overrides)
    if two:
        return torchrun(*module, cwd=cwd, TMPDIR=str(cwd / "tmp"))
    return subprocess.run(
        [sys.executable, *module],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def errors(stderr: str) -> list[str]:
    return [line.removeprefix("error: ") for line in stderr.splitlines() if line.startswith("error: ")]


def curve(directory: Path) -> dict[tuple[str, int], float]:
    """The losses of training.csv; each step stands there once."""
    (path,) = (path for path in directory.rglob("training.csv") if "store" not in path.parts)
    with path.open() as file:
        lines = [row for row in csv.DictReader(file) if row["metric"] == "loss"]
    found = {(row["stage"], int(row["step"])): float(row["value"]) for row in lines}
    assert len(found) == len(lines)
    return found


@pytest.mark.slow
def test_the_command_line_in_two_processes_ends_as_in_one(tmp_path: Path) -> None:
    """50 steps without dropout: the same training.csv to 1e-4; and one process alone writes, says and keeps."""
    sources = {name: tmp_path / name for name in ("teacher", "student")}
    for seed, source in enumerate(sources.values()):
        tiny.model(layers=3 - seed, dropout=0.0, seed=seed).save_pretrained(source)
        toy.tokenizer().save_pretrained(source)
    overrides = [f"{name}.source={source}" for name, source in sources.items()]
    given = ("family", "tokenizer", "layers", "hidden", "heads", "intermediate")
    overrides += [f"{name}.{key}=null" for name in sources for key in given]
    overrides += ["finetune.steps=50", "finetune.batch_size=7", "distill.steps=50", *SHORT]
    two = train(tmp_path / "two", *overrides, *DDP)
    assert (two.returncode, errors(two.stderr)) == (0, []), two.stderr
    one = train(tmp_path / "one", *overrides, "trainer.precision=32", two=False)
    assert one.returncode == 0, one.stderr
    here, there = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert len(here) == 18 and here == pytest.approx(there, abs=1e-4, rel=0)
    assert sum("trained  50 steps" in line for line in two.stdout.splitlines()) == 3
    assert len(list(tmp_path.glob("two/outputs/main/*"))) == 1, "one process has the job's directory"
    assert not list((tmp_path / "two" / "tmp").glob("edgemin-*")), "the others leave nothing"
    assert not list(tmp_path.glob("two/outputs/store/.work/*"))
    again = train(tmp_path / "two", *overrides, *DDP)
    assert again.returncode == 0 and "  trained  " not in again.stdout and again.stdout.count("cached") == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ((), "trainer.processes: expected 2, as many as were started (trainer=ddp), given 1"),
        ((*DDP, "trainer.processes=3"), "trainer.processes: expected 2, as many as were started, given 3; "),
        (("task=nosuch",), "task: expected one of "),
        ((*DDP, "paths.outputs=/dev/null/outputs"), "paths.outputs: "),
        ((*DDP, "finetune.learning_rate=1e30", "finetune.gradient_clip=0"), "finetune.learning_rate: the loss of "),
    ],
    ids=["another trainer", "another number", "before the job", "in the first process alone", "in training"],
)
def test_what_is_refused_is_said_once_and_ends_all(overrides: tuple[str, ...], line: str, tmp_path: Path) -> None:
    done = train(tmp_path, *SHORT, *overrides)
    assert done.returncode != 0
    (said,) = errors(done.stderr)
    assert said.startswith(line)
    assert not list((tmp_path / "tmp").glob("edgemin-*"))


@pytest.mark.slow
def test_a_sweep_in_two_processes_is_planned_before_any_job(tmp_path: Path) -> None:
    done = train(tmp_path, *SHORT, *DDP, "distill.relation_heads=7,4,5", flags=("-m",))
    assert done.returncode != 0
    first, second = errors(done.stderr)
    assert first.startswith("job 0 (distill.relation_heads=7): distill.relation_heads: ")
    assert second.startswith("job 2 (distill.relation_heads=5): distill.relation_heads: ")
    assert not (tmp_path / "outputs").exists()
    planned = train(tmp_path, *SHORT, *DDP, "seed=1,2", "plan=true", flags=("-m",))
    assert planned.returncode == 0 and planned.stdout.count("10 nodes (10 to run)") == 1
    assert not (tmp_path / "outputs").exists() and not list((tmp_path / "tmp").glob("edgemin-*"))


@pytest.mark.slow
def test_a_sweep_in_two_processes_goes_on_after_a_job_that_fails(tmp_path: Path) -> None:
    rates = ("finetune.learning_rate=1e30,3e-3", "finetune.gradient_clip=0")
    done = train(tmp_path, *SHORT, *DDP, *rates, flags=("-m",))
    assert done.returncode != 0
    (said,) = errors(done.stderr)
    assert said.startswith("job 0 (finetune.learning_rate=1e+30): finetune.learning_rate: the loss of ")
    assert len(list(tmp_path.rglob("run.json"))) == 1 and "1 of 2 jobs has no result" in done.stdout
    assert done.stdout.count("The sweep's page, tables and figures:") == 1


@pytest.mark.slow
def test_two_processes_killed_and_started_again_end_with_the_same_bytes(tmp_path: Path) -> None:
    overrides = (*SHORT, *DDP, "trainer.checkpoint_seconds=0", "finetune.steps=60", "distill.steps=10")
    whole = train(tmp_path / "whole", *overrides)
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "killed" / "tmp").mkdir(parents=True)
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "edgemin.train", *studies.TINY, *overrides],
        cwd=tmp_path / "killed",
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    work = tmp_path / "killed" / "outputs" / "store" / ".work"
    while len(list(work.glob("*/last.ckpt"))) < 1 and process.poll() is None:
        time.sleep(0.002)
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        one.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(work.glob("*/last.ckpt"))) == 1
    again = train(tmp_path / "killed", *overrides)
    assert again.returncode == 0, again.stderr

    def artifacts(folder: Path) -> dict[str, dict[str, str]]:
        store = folder / "outputs" / "store"
        found = {path.parent.name: json.loads(path.read_text())["files"] for path in store.glob("*/manifest.json")}
        return {
            key: {name: digest for name, digest in files.items() if "provenance" not in name}
            for key, files in found.items()
        }

    assert artifacts(tmp_path / "killed") == artifacts(tmp_path / "whole") != {}
