"""One store, several runs: of another user, one that died, one whose files were damaged."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import studies
import torch

from edgemin.report import write
from edgemin.study import runtimes

REPOSITORY = Path(__file__).parents[2]
Run = dict[str, Any]


@pytest.fixture(autouse=True)
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "figures", lambda study: ([], []))


# --- another user ------------------------------------------------------------------------------------------

# Root fills a store and loads all modules (another user may not be able to read the environment), then becomes nobody.
STRANGER = """
import json, os, sys
from pathlib import Path
import datasets
import studies
from edgemin.errors import UserError
from edgemin.report import write

write.figures = lambda study: ([], [])
place = Path(sys.argv[1])
home = place / "home"
data = studies.glue(place / "glue")
asked = ["task=sst2", f"task.path={data}", "stages=[finetune,distill]"]
datasets.config.HF_DATASETS_CACHE = place / "cache of root"
mine = studies.run(place / "mine", *asked, f"paths.outputs={place}/outputs", store=place / "store")
for path in [place / "cache of root", *(place / "cache of root").rglob("*")]:
    path.chmod(0)
home.mkdir()
os.chown(home, 65534, 65534)
os.environ["HOME"] = str(home)
datasets.config.HF_DATASETS_CACHE = home / "datasets"
os.chdir(home)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
before = sorted((str(path), path.stat().st_mtime_ns) for path in (place / "store").rglob("*"))

def run(name, *more):
    outputs = home / "outputs"
    return studies.run(outputs / name, *asked, f"paths.outputs={outputs}", *more, store=place / "store")

theirs = run("theirs")
scored = run("scored", "task.max_evaluation_examples=8")
try:
    run("trained", "finetune.steps=3")
    refused = None
except UserError as error:
    refused = str(error)
after = sorted((str(path), path.stat().st_mtime_ns) for path in (place / "store").rglob("*"))
new = sorted({path.parent.name for path in (home / "outputs").glob(".*/*/*")})
kept = sorted(path.name for path in (home / "outputs").glob(".*"))
found = {"mine": mine["rows"], "theirs": theirs["rows"], "cached": [node["cached"] for node in theirs["nodes"]]}
found |= {"same": before == after, "kept": kept, "refused": refused, "n": scored["rows"][0]["metrics"]}
(home / "found.json").write_text(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may become another user")
def test_a_store_that_one_user_filled_serves_another() -> None:
    # Not pytest's own directory, which lies in one that only its owner may enter.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        script = [sys.executable, "-c", STRANGER, place]
        paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads((Path(place) / "home" / "found.json").read_text())
    assert found["theirs"] == found["mine"]
    assert all(found["cached"]) and found["same"]
    assert found["n"]["sst2"]["validation"]["n"] == 8  # scored anew, and kept
    assert found["kept"] == [".results", ".tokens"]
    assert found["refused"].startswith("paths.store: expected a store that can be written, as ")
    assert "(such as teacher/finetune)" in found["refused"] and "paths.outputs" not in found["refused"]


# --- damage ------------------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        damage,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("{}"),
        Path.unlink,
        lambda path: (path.unlink(), path.symlink_to("/dev/null")),
    ],
    ids=["flipped", "empty", "{}", "gone", "a link"],
)
def test_damaged_results_and_tokens_are_made_again(
    change: Callable[[Path], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = ("stages=[finetune]", "finetune.steps=2")
    first = studies.run(tmp_path / "first", *asked, store=tmp_path / "store")
    files = [path for name in (".results", ".tokens") for path in (tmp_path / "store" / name).rglob("*.*")]
    for path in files:
        change(path)
    with caplog.at_level(logging.WARNING):
        again = studies.run(tmp_path / "again", *asked, store=tmp_path / "store")
    assert again["rows"] == first["rows"]
    assert all(node["cached"] for node in again["nodes"])
    assert all(path.is_file() and not path.is_symlink() for path in files if ".results" in path.parts)
    caplog.clear()
    studies.run(tmp_path / "third", *asked, store=tmp_path / "store")
    assert not [line for line in caplog.messages if "made again" in line]


# --- measured beside other work ----------------------------------------------------------------------------


def test_what_was_measured_beside_other_work_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Any] = []
    times = {form: {"length": 128, "p50": 2.0, "mean": 2.0, "n": 5, "unstable": False} for form in ("padded", "task")}

    def measured(artifacts: Any, *rest: Any, **named: Any) -> Any:
        calls.append(1)
        flag = {"measured_beside_other_work": True} if len(calls) == 1 else {}
        return {name: {"latency_ms": times, **flag} for name in artifacts}

    monkeypatch.setattr(runtimes, "measure", measured)
    asked = ("measure=default", "stages=[finetune]", "finetune.steps=2")
    runs = [studies.run(tmp_path / str(n), *asked, store=tmp_path / "store") for n in range(3)]
    assert len(calls) == 2
    measured_in = [[row["cost"]["runtimes"]["torch"] for row in run["rows"]] for run in runs]
    flags = [[cost.get("measured_beside_other_work") for cost in costs] for costs in measured_in]
    assert flags == [[True, True], [None, None], [None, None]]
    assert any("not kept for later jobs" in line for line in runs[0]["warnings"])
    assert "beside other work" in (tmp_path / "0" / "report.md").read_text()
    studies.run(tmp_path / "longer", *asked, "measure.wait_minutes=3", store=tmp_path / "store")
    assert len(calls) == 2


# --- threads -----------------------------------------------------------------------------------------------


def test_provenance_has_the_threads_that_were_trained_with(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for number, (threads, real) in enumerate([("1", 1), ("null", 2)]):  # a sweep: the second has its own choice
            asked = ("stages=[finetune]", "finetune.steps=2", f"seed={number}", f"trainer.threads={threads}")
            found = studies.run(tmp_path / str(number), *asked, store=tmp_path / "store")
            for node in found["nodes"]:
                if node["path"].endswith("finetune"):
                    content = json.loads((tmp_path / "store" / node["key"] / "provenance.json").read_text())
                    assert content["threads"] == real
    finally:
        torch.set_num_threads(before)


# --- a run that died ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_its_stage_to_the_one_that_waits(tmp_path: Path) -> None:
    asked = [*studies.TINY, "stages=[finetune]", "finetune.steps=3000", "trainer.checkpoint_seconds=0.2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "edgemin.train", *asked, f"paths.outputs={name}", "paths.store=store"]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    first = start("first")
    while not list((tmp_path / "store").glob(".work/*/last.ckpt")) and first.poll() is None:
        time.sleep(0.01)
    second = start("second")
    assert second.stdout is not None
    lines = [second.stdout.readline()]
    while lines[-1] and "waiting" not in lines[-1]:
        lines.append(second.stdout.readline())
    assert "another run computes it" in lines[-1], lines
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second.communicate()
    assert second.returncode == 0
    (path,) = (tmp_path / "second").rglob("run.json")
    third = start("third")  # the lock files of both still lie there
    third.communicate()
    assert third.returncode == 0
    assert (
        json.loads(path.read_text())["rows"]
        == json.loads(next((tmp_path / "third").rglob("run.json")).read_text())["rows"]
    )
