"""The table over the jobs of a sweep, and what is said where Hydra or the launcher itself fails."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import run_json
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from edgemin import cli
from edgemin.errors import UserError
from edgemin.report import write
from edgemin.study import ahead, failures
from edgemin.study.jobs import Ended, Jobs, current


def sweep(directory: Path) -> DictConfig:
    """What Hydra says of a sweep, as far as it is read after its last job."""
    return OmegaConf.create(
        {
            "study": "main",
            "logger": {"_target_": "edgemin.tracking.Tracker"},
            "paths": {"outputs": "outputs", "store": "store"},
            "hydra": {
                "mode": RunMode.MULTIRUN,
                "sweep": {"dir": str(directory)},
                "launcher": {"_target_": "hydra_plugins.elsewhere.Launcher"},
            },
        }
    )


def test_the_table_over_a_sweep_is_written_printed_and_its_failed_jobs_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, ratio in enumerate((0.1, 0.2)):
        run_json.save(tmp_path / str(number), run_json.run(number=number, overrides=(f"prune.ratio={ratio}",)))
    (tmp_path / "2").mkdir()
    jobs = Jobs()
    jobs.on_multirun_end(sweep(tmp_path))
    printed = capsys.readouterr().out
    assert "prune.ratio" in printed and "1 of 3 jobs has no result" in printed
    assert (tmp_path / "tables" / "stages.csv").is_file()
    assert [failure.foreseen for failure in jobs.failed] == [False]
    jobs.on_multirun_end(sweep(tmp_path / "none"))
    assert capsys.readouterr().err.startswith("No table over the sweep: study: expected")


def test_a_sweep_does_not_mix_its_jobs_with_those_of_an_earlier_one(tmp_path: Path) -> None:
    for number in range(3):
        run_json.save(tmp_path / str(number), run_json.run(number=number))
    failures.check_alone(tmp_path, 3)
    with pytest.raises(
        UserError, match=r"^hydra\.sweep\.dir: expected [^\n]* the 2 of this command, given [^\n]*/2/run"
    ):
        failures.check_alone(tmp_path, 2)


def test_a_disk_that_is_full_when_the_table_is_written_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "stages.md")

    monkeypatch.setattr(write, "of_study", full)
    with pytest.raises(Ended) as ended:  # Hydra would make a warning of an Exception and go on
        Jobs().on_multirun_end(sweep(tmp_path))
    assert isinstance(ended.value.__cause__, OSError)
    assert cli.guarded(lambda: Jobs().run(lambda: Jobs().on_multirun_end(sweep(tmp_path)))) == 2
    assert capsys.readouterr().err == "error: stages.md: No space left on device\n"


def test_where_the_launcher_gives_up_the_jobs_so_far_make_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "jobs", lambda config: [ahead.Job(f"job {n} (seed={n})", dict) for n in range(2)])
    monkeypatch.setattr(ahead, "is_here", lambda config: False)
    run_json.save(tmp_path / "0", run_json.run())
    jobs = Jobs()

    def launch() -> None:
        assert current() is jobs, "Hydra finds the object that the command line holds"
        current().on_multirun_start(sweep(tmp_path))
        raise RuntimeError("a worker\ndied")

    jobs.run(launch)
    assert current() is not jobs
    out, err = capsys.readouterr()
    assert err == "error: the launcher gave up: RuntimeError: a worker died\n"
    assert "job 1 (seed=1): never begun" in out and f"python -m edgemin.report study={tmp_path}" in out
    assert [failure.foreseen for failure in jobs.failed] == [False, False]


def test_what_is_no_mistake_of_the_users_goes_on() -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        Jobs().run(fail)
