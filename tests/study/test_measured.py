"""What a job has of its measurement: batches, the profiler's traces, and what the store gives back of both."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import studies

from edgemin.errors import UserError
from edgemin.measure import machine
from edgemin.measure.runtime import Variant
from edgemin.study import runtimes
from edgemin.study.job import plan_job

ASKED = (
    "measure=grid",
    *("measure.length=8", "measure.warmup=1", "measure.runs=2", "measure.rounds=2", "measure.max_rounds=2"),
    *("measure.sentences=2", "measure.threads=1", "measure.wait_minutes=0"),
    *("measure.batch_sizes=[2]", "measure.lengths=[4,4096]", "measure.profile=true"),
    "stages=[finetune]",
)
Run = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module", autouse=True)
def alone(place: Path) -> Iterator[None]:
    """The machine's lock is the tests' own: a measurement beside other work would not be kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "LOCK_DIRECTORY", place)
        yield


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    return studies.run(place / "run", *ASKED, store=place / "store")


def test_every_row_has_its_batches_and_its_trace(run: Run, place: Path) -> None:
    for number, row in enumerate(run["rows"]):
        cost = row["cost"]["runtimes"]["torch"]
        assert [(cell["batch"], cell["length"]) for cell in cost["grid"]] == [(2, 4)]
        assert row["notes"][-1] == "no batches of 4096 tokens: it takes at most 128"
        assert cost["profile"]["trace"] == f"profile/{number}.json.gz"
        assert len(cost["profile"]["operators"]) == 10
        assert (place / "run" / cost["profile"]["trace"]).read_bytes()[:2] == b"\x1f\x8b"
        assert len(cost["latency_ms"]["padded"]["rounds"]) == 2


def test_a_job_run_again_measures_nothing_and_has_the_traces_too(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_given: object, **_named: object) -> None:
        pytest.fail("measured again")

    monkeypatch.setattr(runtimes, "measure", refuse)
    again = studies.run(place / "again", *ASKED, store=place / "store")
    assert [row["cost"] for row in again["rows"]] == [row["cost"] for row in run["rows"]]
    for number in range(len(run["rows"])):
        files = [place / name / "profile" / f"{number}.json.gz" for name in ("run", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_trace_that_was_lost_is_measured_again(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place / "lost"
    shutil.copytree(place / "store", store)
    next((store / ".results" / "measurement").glob("*/*.json.gz")).write_bytes(b"not what it was")
    told: list[list[str]] = []

    def stand_in(variants: dict[str, Variant], *_given: object, traces: dict[str, Path], **_named: object) -> Run:
        told.append(list(traces))
        for trace in traces.values():
            trace.write_bytes(b"a trace")
        cost = {"latency_ms": {"padded": {"p50": 1.0, "mean": 1.0}}, "profile": {"operators": []}}
        return {name: dict(cost) for name in variants}

    monkeypatch.setattr(runtimes, "measure", stand_in)
    studies.run(place / "once_more", *ASKED, store=store)
    assert told == [["teacher/finetune (torch)", "student/finetune (torch)"]]
    assert (place / "once_more" / "profile" / "1.json.gz").read_bytes() == b"a trace"


def test_a_padded_input_that_a_model_does_not_take_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    settings = studies.settings("measure=default", "measure.length=129", f"paths.outputs={tmp_path}")
    with pytest.raises(UserError) as caught:
        plan_job(settings, studies.job(tmp_path), {}, timed=False)
    assert str(caught.value) == "measure.length: expected at most 128, what teacher/finetune takes, given 129"
    settings["measure"] = None
    plan_job(settings, studies.job(tmp_path), {}, timed=False)
