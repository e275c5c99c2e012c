"""A sweep gives one table whatever launches its jobs, trains each shared node once, and outlives a job that dies."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import studies
from commands import Command

REPOSITORY = Path(__file__).parents[2]
NINE = ("task=sst2,mnli,qqp", "prune.ratio=0.25,0.5,0.75")
LAUNCHERS = {
    "joblib": ("launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit": ("hydra/launcher=submitit_local",),
    "ray": ("launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"),
}


def needs(launcher: str) -> pytest.MarkDecorator:
    plugin = f"hydra_{launcher}_launcher"
    return pytest.mark.skipif(not studies.is_installed(plugin), reason=f"{plugin} is not installed")


def start(outputs: Path, *words: str) -> subprocess.Popen[str]:
    """A sweep of tiny studies, one thread for each job."""
    given = [*studies.TINY, "trainer.threads=1", f"paths.outputs={outputs}", *words]
    return subprocess.Popen(
        [sys.executable, "-m", "edgemin.train", "-m", *given, "hydra.sweep.dir=${paths.outputs}/sweep"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(outputs.parent), "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def swept(outputs: Path, *words: str) -> str:
    """What a sweep that ends well prints."""
    process = start(outputs, *words)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def runs(outputs: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(outputs.glob("sweep/*/run.json"))]


def times_trained(outputs: Path) -> Counter[str]:
    """How often each node was made, by its key."""
    found: Counter[str] = Counter()
    for run in runs(outputs):
        found.update({node["key"]: not node["cached"] for node in run["nodes"]})
    return found


def table(outputs: Path) -> list[list[str]]:
    with (outputs / "sweep/tables/stages.csv").open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"task.path={studies.glue(tmp_path_factory.mktemp('glue'))}"


@pytest.fixture(scope="module")
def one_after_another(tmp_path_factory: pytest.TempPathFactory, glue: str) -> Path:
    """The nine jobs by Hydra's own launcher."""
    outputs = tmp_path_factory.mktemp("basic") / "out"
    swept(outputs, *NINE, glue)
    return outputs


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("launcher", [pytest.param(name, marks=needs(name)) for name in LAUNCHERS])
def test_nine_jobs_give_one_table_and_train_each_shared_node_once(
    launcher: str, one_after_another: Path, glue: str, tmp_path: Path
) -> None:
    said = swept(tmp_path / "out", *NINE, glue, *LAUNCHERS[launcher])
    assert table(tmp_path / "out") == table(one_after_another)
    assert len(runs(tmp_path / "out")) == 9
    trained = times_trained(tmp_path / "out")
    assert set(trained) == set(times_trained(one_after_another)) and set(trained.values()) == {1}
    assert said.count("The sweep's page, tables and figures:") == 1
    if launcher != "submitit":  # whose jobs write to files of their own
        assert {int(found) for found in re.findall(r"\[job (\d)\] teacher", said)} == set(range(9))
    for number, run in enumerate(runs(tmp_path / "out")):
        assert run["job"]["number"] == number and "prune.ratio=0.25,0.5,0.75" in run["job"]["command"]
        assert not [word for word in run["job"]["overrides"] if "launcher" in word]


def first(sweep: subprocess.Popen[str], pattern: str) -> str:
    """What the pattern's group is in the first line that has it."""
    assert sweep.stdout is not None
    for line in sweep.stdout:
        if found := re.search(pattern, line):
            return str(found[1])
    raise AssertionError(f"no line with {pattern}")


def end(sweep: subprocess.Popen[str]) -> tuple[int, str]:
    assert sweep.stdout is not None
    said = "".join(sweep.stdout)
    return sweep.wait(), said


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs("joblib")
def test_a_job_that_is_killed_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    sweep = start(tmp_path / "out", "finetune.steps=300", "prune.ratio=0.25,0.5,0.75", *LAUNCHERS["joblib"])
    number = first(sweep, r"\[job (\d)\] teacher  loading")
    (job,) = jobs_of(sweep, number)
    job.kill()
    code, said = end(sweep)
    assert code == 2, said
    assert {path.parent.name for path in tmp_path.glob("out/sweep/*/run.json")} == {"0", "1", "2"} - {number}
    assert "1 of 3 jobs has no result:" in said and said.count("(SIGKILL)") == 2  # at once, and below the table
    assert set(times_trained(tmp_path / "out").values()) == {1}


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs("joblib")
def test_a_worker_that_is_killed_ends_the_sweep_with_a_table(tmp_path: Path) -> None:
    sweep = start(tmp_path / "out", "finetune.steps=12,50000", "seed=1,2", *LAUNCHERS["joblib"])
    first(sweep, r"\[job ([01])\] What each stage")  # the first two are short
    first(sweep, r"\[job ([23])\] teacher")
    (job, *_) = jobs_of(sweep, "2") + jobs_of(sweep, "3")
    worker = job.parent()
    assert worker is not None
    worker.kill()
    code, said = end(sweep)
    assert code == 1, said
    assert "error: the launcher gave up: TerminatedWorkerError: " in said
    assert re.search("[23] of 4 jobs have no result:", said) and "Run the same command again" in said
    assert not psutil.wait_procs([job], timeout=60)[1]


def jobs_of(sweep: subprocess.Popen[str], number: str) -> list[psutil.Process]:
    processes = psutil.Process(sweep.pid).children(recursive=True)
    return [process for process in processes if process.cmdline()[-1:] == [f"job={number}"]]


@needs("joblib")
def test_a_launcher_needs_a_sweep(command: Command) -> None:
    expected = "launcher: expected the jobs of a sweep (-m), given one job and joblib"
    assert command("launcher=joblib").line == expected


@pytest.mark.skipif(studies.is_installed("hydra_ray_launcher"), reason="hydra_ray_launcher is installed")
def test_a_launcher_that_is_not_installed_is_said_to_be_so(command: Command) -> None:
    expected = "launcher: expected one that is installed (pip install 'edgemin[ray]'), given ray"
    assert command("launcher=ray", "seed=1,2", flags=("-m",)).line == expected
