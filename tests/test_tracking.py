"""Trackers: the CSV file, the offline W&B run as it lies on disk, and Lightning's way in."""

from __future__ import annotations

import csv
import json
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import wandb
import yaml

from edgemin.config import construct
from edgemin.errors import UserError
from edgemin.tracking import Tracker, read_points, write_points
from edgemin.weights_and_biases import WandbTracker, flatten, headline, resolve_mode

LOGGERS = Path(__file__).parents[1] / "conf" / "logger"

TASK = {"name": "toy", "splits": ["validation"], "metric": "accuracy"}
ROWS: list[dict[str, Any]] = [
    {
        "name": "Teacher",
        "stages": ["finetune"],
        "control": False,
        "metrics": {"toy": {"validation": {"accuracy": 0.9, "n": 100}}},
        "cost": {
            "params": 1000,
            "runtimes": {"torch": {"size_bytes": 2**21, "latency_ms": {"padded": {"p50": 3.5, "unstable": True}}}},
        },
        "delta": {"teacher": None},
    },
    {
        "name": "+ Distillation",
        "stages": ["finetune", "distill"],
        "control": False,
        "metrics": {"toy": {"validation": {"accuracy": 0.8, "n": 100}}},
        "cost": {"params": 500, "runtimes": {"torch": {"size_bytes": 2**20}}},
        "delta": {"teacher": {"metric": -0.1, "metric_retained": 0.875}},
        "findings": {"quantization": {"bits": {"bert.encoder.layer.0": 8}}},
        "notes": ["short"],
    },
    {
        "name": "Control: no teacher",
        "stages": ["finetune", "no_teacher"],
        "control": True,
        "metrics": {"toy": {"validation": {"accuracy": 0.7, "n": 100}}},
        "cost": {"params": 500, "runtimes": {"torch": {"size_bytes": 2**20}}},
        "delta": {"teacher": None},
    },
]


def read_csv(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "training.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def _not_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    # wandb keeps caches and settings of its own below the home directory.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def test_csv_has_one_line_per_number_and_begins_anew_when_a_job_is_run_again(tmp_path: Path) -> None:
    tracker = Tracker()
    tracker.start(tmp_path, "group", "job", {})
    tracker.log("student/finetune", {"loss": 0.5, "lr": 1e-05}, 10)
    assert len(read_csv(tmp_path)) == 2, "flushed before it is closed"
    tracker.close(failed=True)
    tracker.close(failed=True)
    assert read_csv(tmp_path)[1] == {"stage": "student/finetune", "step": "10", "metric": "lr", "value": "1e-05"}
    tracker.start(tmp_path, "group", "job", {})
    tracker.log("student/finetune", {"loss": float("nan")}, 20)
    tracker.close(failed=False)
    assert [line["value"] for line in read_csv(tmp_path)] == ["nan"]


def test_kept_curves_come_back_as_they_were(tmp_path: Path) -> None:
    points = [("student/finetune", 1, {"loss": 0.1 + 0.2}), ("student/finetune", 10, {"loss": 1e-05, "lr": 0.0})]
    write_points(tmp_path / "training.csv", points)
    assert list(read_points(tmp_path / "training.csv")) == points


def test_a_row_is_flattened_to_dotted_columns_without_nulls() -> None:
    assert flatten(ROWS[1]) == {
        "name": "+ Distillation",
        "stages": "finetune, distill",
        "control": False,
        "metrics.toy.validation.accuracy": 0.8,
        "metrics.toy.validation.n": 100,
        "cost.params": 500,
        "cost.runtimes.torch.size_bytes": 2**20,
        "delta.teacher.metric": -0.1,
        "delta.teacher.metric_retained": 0.875,
        "findings.quantization.bits.bert.encoder.layer.0": 8,
        "notes": "short",
    }
    assert flatten({"delta": {"teacher": None}}) == {}


def test_auto_is_online_only_for_a_user_who_is_logged_in(tmp_path: Path) -> None:
    assert resolve_mode("auto", {}) == "offline"
    assert resolve_mode("auto", {"WANDB_API_KEY": "k"}) == "online"
    assert resolve_mode("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}) == "disabled"
    assert resolve_mode("offline", {"WANDB_API_KEY": "k", "WANDB_MODE": "online"}) == "offline"

    logins = tmp_path / "logins"
    logins.write_text("machine wandb.example.org login user password secret\n")
    logins.chmod(0o600)
    here = {"NETRC": str(logins), "WANDB_BASE_URL": "https://wandb.example.org"}
    assert resolve_mode("auto", here) == "online"
    assert resolve_mode("auto", {"NETRC": str(logins)}) == "offline", "a login elsewhere is none here"
    logins.write_text("machine\n")
    assert resolve_mode("auto", here) == "offline"


@pytest.mark.parametrize("name", sorted(path.stem for path in LOGGERS.glob("*.yaml")))
def test_every_logger_file_builds_a_tracker(name: str) -> None:
    tracker = construct(yaml.safe_load((LOGGERS / f"{name}.yaml").read_text()), "logger")
    assert isinstance(tracker, Tracker)
    tracker.close(failed=False)


def test_an_unknown_mode_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^logger\.mode: expected auto, online, .* given 'cloud'$"):
        construct({"_target_": "edgemin.weights_and_biases.WandbTracker", "mode": "cloud"}, "logger")


def test_two_offline_jobs_of_one_process_leave_two_whole_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    matplotlib.figure.Figure().savefig(tmp_path / "pareto.png")
    (tmp_path / "pareto.svg").write_text("<svg/>")
    tracker = WandbTracker(tags=["short", "x" * 80])
    for job in ("prune.ratio=0.1", "prune.ratio=0.2," + "y" * 200):
        run_dir = tmp_path / job[:15]
        tracker.start(run_dir, "study", job, {"seed": 1, "prune": {"ratio": 0.1}}, tags=["toy"])
        for step in range(3):
            tracker.log("student/finetune", {"loss": 1.0 - 0.1 * step}, step)
            tracker.log("student/finetune/distill", {"loss": 2.0}, step)
        tracker.rows(ROWS, TASK)
        tracker.figures([tmp_path / "pareto.png", tmp_path / "pareto.svg"])
        tracker.close(failed=job.endswith("y"))
    tracker.close(failed=False)
    assert wandb.run is None
    assert capfd.readouterr() == ("", ""), "the console stays quiet"

    for run_dir in (tmp_path / "prune.ratio=0.1", tmp_path / "prune.ratio=0.2"):
        (files,) = run_dir.glob("wandb/offline-run-*/files")
        (table,) = files.glob("media/table/stages*.json")
        content = json.loads(table.read_text())
        cells = [dict(zip(content["columns"], line, strict=True)) for line in content["data"]]
        assert [cell["name"] for cell in cells] == [row["name"] for row in ROWS]
        assert [cell["cost.runtimes.torch.latency_ms.padded.p50"] for cell in cells] == [3.5, None, None]
        assert [cell["findings.quantization.bits.bert.encoder.layer.0"] for cell in cells] == [None, 8, None]
        assert len(list(files.glob("media/images/figure_pareto*.png"))) == 1

        summary = json.loads((files / "wandb-summary.json").read_text())
        numbers = {name: value for name, value in summary.items() if isinstance(value, int | float) and name[0] != "_"}
        assert numbers == {
            "final/accuracy": 0.8,
            "final/size_mib": 1.0,
            "final/retained": 0.875,
            "row/Teacher/accuracy": 0.9,
            "row/Teacher/size_mib": 2.0,
            "row/Teacher/latency_torch_ms": 3.5,
            "row/+ Distillation/accuracy": 0.8,
            "row/+ Distillation/size_mib": 1.0,
            "row/+ Distillation/retained": 0.875,
            "row/Control: no teacher/accuracy": 0.7,
            "row/Control: no teacher/size_mib": 1.0,
        }
        assert len(read_csv(run_dir)) == 6


def test_a_row_without_a_task_has_its_size_alone() -> None:
    cost = {"runtimes": {"torch": {"size_bytes": 2**20}}}
    assert headline({"cost": cost, "delta": {"teacher": {}}, "metrics": {}}, None) == {"size_mib": 1.0}


def test_a_row_has_its_latency_in_every_runtime_that_was_timed() -> None:
    timed = {"size_bytes": 2**20, "latency_ms": {"padded": {"p50": 1.25}}}
    row = {"metrics": {}, "delta": {}, "cost": {"runtimes": {"torch": {"size_bytes": 2**20}, "openvino": timed}}}
    assert headline(row, None) == {"size_mib": 1.0, "latency_openvino_ms": 1.25}


class Server:
    """As much of W&B as a tracker uses, with runs that remember."""

    Error = RuntimeError
    Settings = staticmethod(dict)
    kept: dict[str, list[dict[str, Any]]]

    def __init__(self) -> None:
        self.kept, self.asked = {}, list[dict[str, Any]]()

    def init(self, **options: Any) -> Any:
        self.asked.append(options)
        history = self.kept.setdefault(options["id"], [])
        return type(
            "Run",
            (),
            {
                "offline": False,
                "starting_step": len(history),
                "summary": {},
                "define_metric": lambda run, *args, **kwargs: None,
                "log": lambda run, metrics: history.append(metrics),
                "finish": lambda run, exit_code: None,
            },
        )()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_a_job_that_is_resumed_goes_on_in_its_run_and_no_step_stands_twice(tmp_path: Path, server: Server) -> None:
    points = [{"loss": 1.0 / step} for step in range(1, 6)]
    tracker = WandbTracker(mode="online")
    for known in (3, 5):  # killed after three, then all again
        tracker.start(tmp_path / "0", "main/now", "job", {"seed": 1})
        for step, point in enumerate(points[:known]):
            tracker.log("student/finetune", point, step)
        tracker.close(failed=False)
    ((history),) = server.kept.values()
    assert [entry["student/finetune/step"] for entry in history] == [0, 1, 2, 3, 4]
    assert all(options["resume"] == "allow" and options["group"] == "main/now" for options in server.asked)

    for directory, seed in (("0", 2), ("1", 1)):  # something else is asked for there; another job
        tracker.start(tmp_path / directory, "main/now", "job", {"seed": seed})
        tracker.close(failed=False)
    assert len({options["id"] for options in server.asked}) == 3
    assert all(re.fullmatch(r"[\w-]{1,128}", options["id"]) for options in server.asked)


@pytest.mark.parametrize(
    "left", ["{", "[]", "{}", '{"id": 5}', "\udcff"], ids=["torn", "list", "empty", "number", "bytes"]
)
def test_a_damaged_record_of_a_run_begins_a_new_one(left: str, tmp_path: Path, server: Server) -> None:
    kept = tmp_path / "wandb" / "job.json"
    kept.parent.mkdir()
    kept.write_bytes(left.encode("utf-8", "surrogateescape"))
    tracker = WandbTracker(mode="online")
    for _ in range(2):
        tracker.start(tmp_path, "main/now", "job", {"seed": 1})
        tracker.close(failed=False)
    first, second = (options["id"] for options in server.asked)
    assert first == second == json.loads(kept.read_text())["id"]


def test_offline_nothing_is_resumed(tmp_path: Path, server: Server) -> None:
    tracker = WandbTracker(mode="offline")
    tracker.start(tmp_path, "main/now", "job", {})
    tracker.close(failed=False)
    assert "resume" not in server.asked[0]


def test_what_is_sent_names_no_place_or_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "janes-laptop")
    monkeypatch.setenv("USER", "jane")
    secret = "/somewhere/jane/secret"
    config = {
        "paths": {"outputs": f"{secret}/outputs"},
        "logger": {"entity": "jane"},
        "task": {"path": f"{secret}/reviews", "text_columns": ["a/b"]},
        "teacher": {"source": "~/jane/models/bert", "tokenizer": "google/bert"},
    }
    tracker = WandbTracker(mode="offline")
    name = f"task.path={secret}/reviews,seed=1,teacher.source=google/bert,corpora=[{secret}/a,{secret}/b]"
    tracker.start(tmp_path, "main/now", name, config, [f"{secret}/model"])
    assert dict(tracker._run.config) == {
        "task": {"path": "reviews", "text_columns": ["a/b"]},
        "teacher": {"source": "bert", "tokenizer": "google/bert"},
    }
    assert tracker._run.name == "task.path=reviews,seed=1,teacher.source=google/bert,corpora=[a,b]"
    tracker.close(failed=False)
    (sent,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + 30
    while b"reviews" not in (content := sent.read_bytes()):  # another process writes it
        assert time.monotonic() < end
        time.sleep(0.01)
    assert b"jane" not in content and str(Path.cwd()).encode() not in content
    assert not list(tmp_path.glob("wandb/offline-run-*/files/wandb-metadata.json"))


def test_a_sweep_has_a_run_of_its_own_with_table_and_figures(tmp_path: Path) -> None:
    for number in (1, 0):
        (tmp_path / str(number)).mkdir()
        run = {"job": {"number": number, "overrides": [f"seed={number}"]}, "seed": number, "task": TASK, "rows": ROWS}
        (tmp_path / str(number) / "run.json").write_text(json.dumps(run))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "stages.csv").write_text("Model,Accuracy\nTeacher,90.0\n")
    (tmp_path / "figures").mkdir()
    matplotlib.figure.Figure().savefig(tmp_path / "figures" / "pareto.png")
    WandbTracker(mode="offline").sweep(tmp_path, "main/now", "main")
    (files,) = tmp_path.glob("wandb/offline-run-*/files")
    tables = {path.name.partition("_")[0]: json.loads(path.read_text()) for path in files.glob("media/table/*.json")}
    assert [line[:5] for line in tables["rows"]["data"]] == [
        [number, f"seed={number}", number, row["name"], row["control"]] for number in (0, 1) for row in ROWS
    ]
    assert tables["rows"]["columns"][5:] == ["accuracy", "size_mib", "latency_torch_ms", "retained"]
    assert tables["stages"]["data"] == [["Teacher", "90.0"]]
    assert list(files.glob("media/images/figure_pareto*.png"))
    assert wandb.run is None


@pytest.mark.slow
def test_auto_goes_on_offline_when_the_server_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracker = WandbTracker()
    with pytest.warns(UserWarning, match="logged offline"):
        tracker.start(tmp_path, "study", "job", {})
    tracker.log("finetune", {"loss": 1.0}, 0)
    tracker.close(failed=False)
    assert list(tmp_path.glob("wandb/offline-run-*/files/wandb-summary.json"))
    with pytest.raises(UserError, match=r"^logger\.mode: W&B cannot start in mode 'online'"):
        WandbTracker(mode="online").start(tmp_path / "other", "study", "job", {})


def test_a_stage_is_no_formula_in_the_csv(tmp_path: Path) -> None:
    tracker = Tracker()
    tracker.start(tmp_path, "study", "job", {})
    tracker.log("=1+1/finetune", {"-loss": -0.5}, 0)
    tracker.close(failed=False)
    assert read_csv(tmp_path) == [{"stage": "'=1+1/finetune", "step": "0", "metric": "'-loss", "value": "-0.5"}]
