"""A job in a process of its own says what went wrong, and lets go of what it was computing when it is killed."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import studies

from edgemin.errors import UserError
from edgemin.store.artifacts import Store
from edgemin.study import own_process

LOGGING: dict[str, Any] = {"version": 1, "root": {"level": "WARNING"}}


def asked(folder: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    settings = studies.settings(f"paths.store={folder / 'store'}", f"paths.outputs={folder}", *overrides)
    return settings, studies.job(folder, 3, overrides), {}, LOGGING


def test_lines_begin_with_the_number_and_are_written_whole() -> None:
    into = io.StringIO()
    numbered = own_process.Numbered(into, 12)
    print("a", "b", sep="\n", file=numbered)
    print("c", end="", file=numbered)
    assert into.getvalue() == "[job 12] a\n[job 12] b\n"
    print("d\n", file=numbered)
    assert into.getvalue().endswith("[job 12] cd\n[job 12] \n")
    assert not numbered.isatty()


def test_what_went_wrong_comes_back(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^finetune\.learning_rate: "):
        own_process.run_job(*asked(tmp_path, "finetune.learning_rate=-1"))
    settings, job, transfer, logging = asked(tmp_path)
    with pytest.raises(Exception, match="PathLike") as error:
        own_process.run_job(settings, {**job, "run_dir": None}, transfer, logging)
    assert type(error.value).__name__ == "TypeError"
    assert "Traceback" in "".join(error.value.__notes__)


def test_a_job_that_is_killed_lets_go_of_its_node(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "store")

    def kill() -> None:
        while not any(tmp_path.glob("store/.work/*")):
            time.sleep(0.05)
        children = psutil.Process().children()  # W&B's service of an earlier test may be among them
        (job,) = [child for child in children if "edgemin.study.own_process" in child.cmdline()]
        job.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match=r"ended without a result \(SIGKILL\).* run the same command again"):
        own_process.run_job(*asked(tmp_path, "finetune.steps=20000"))
    killer.join()
    (work,) = tmp_path.glob("store/.work/*")
    with store.lock(work.name, waiting=lambda: pytest.fail("the lock is still held")):
        pass
    assert "[job 3] teacher  loading  random weights\n" in capfd.readouterr().out
