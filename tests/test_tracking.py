"""Trackers: the CSV file, the offline W&B run as it lies on disk, and Lightning's way in."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
import pytorch_lightning as pl
import torch
import wandb
import yaml

from edgemin.config import construct
from edgemin.errors import UserError
from edgemin.tracking import Tracker, TrackerLogger, WandbTracker, flatten, resolve_mode

LOGGERS = Path(__file__).parents[1] / "conf" / "logger"

ROWS: list[dict[str, Any]] = [
    {
        "name": "Teacher",
        "stages": ["finetune"],
        "control": False,
        "metrics": {"toy": {"validation": {"accuracy": 0.9, "n": 100}}},
        "cost": {"params": 1000, "latency_ms": {"padded": {"p50": 3.5, "unstable": True}}},
        "delta": {"teacher": None},
    },
    {
        "name": "+ Distillation",
        "stages": ["finetune", "distill"],
        "control": False,
        "metrics": {"toy": {"validation": {"accuracy": 0.8, "n": 100}}},
        "cost": {"params": 500},
        "delta": {"teacher": {"metric": -0.1}},
        "notes": ["short"],
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


def test_csv_has_one_line_per_number_and_survives_being_reopened(tmp_path: Path) -> None:
    tracker = Tracker()
    tracker.start(tmp_path, "study", "job", {})
    tracker.log("student/finetune", {"loss": 0.5, "lr": 1e-05}, 10)
    assert len(read_csv(tmp_path)) == 2, "flushed before it is closed"
    tracker.close(failed=True)
    tracker.close(failed=True)
    tracker.start(tmp_path, "study", "job", {})
    tracker.log("student/finetune", {"loss": float("nan")}, 20)
    tracker.close(failed=False)
    lines = read_csv(tmp_path)
    assert lines[1] == {"stage": "student/finetune", "step": "10", "metric": "lr", "value": "1e-05"}
    assert [line["value"] for line in lines] == ["0.5", "1e-05", "nan"]


def test_csv_drops_the_line_that_a_killed_job_left_half_written(tmp_path: Path) -> None:
    (tmp_path / "training.csv").write_text("stage,step,metric,value\nfinetune,1,loss,0.5\nfinetune,2,lo")
    tracker = Tracker()
    tracker.start(tmp_path, "study", "job", {})
    tracker.log("finetune", {"loss": 0.25}, 2)
    tracker.close(failed=False)
    assert [(line["step"], line["value"]) for line in read_csv(tmp_path)] == [("1", "0.5"), ("2", "0.25")]


def test_a_row_is_flattened_to_dotted_columns_without_nulls() -> None:
    assert flatten(ROWS[1]) == {
        "name": "+ Distillation",
        "stages": "finetune, distill",
        "control": False,
        "metrics.toy.validation.accuracy": 0.8,
        "metrics.toy.validation.n": 100,
        "cost.params": 500,
        "delta.teacher.metric": -0.1,
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
    with pytest.raises(UserError, match=r"^logger\.mode: expected auto or online .* given 'cloud'$"):
        construct({"_target_": "edgemin.tracking.WandbTracker", "mode": "cloud"}, "logger")


def test_two_offline_jobs_of_one_process_leave_two_whole_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    matplotlib.figure.Figure().savefig(tmp_path / "pareto.png")
    (tmp_path / "pareto.svg").write_text("<svg/>")
    tracker = WandbTracker(tags=["house", "x" * 80])
    for job in ("prune.ratio=0.1", "prune.ratio=0.2," + "y" * 200):
        run_dir = tmp_path / job[:15]
        tracker.start(run_dir, "study", job, {"seed": 1, "prune": {"ratio": 0.1}}, tags=["toy"])
        for step in range(3):
            tracker.log("student/finetune", {"loss": 1.0 - 0.1 * step}, step)
            tracker.log("student/finetune/distill", {"loss": 2.0}, step)
        tracker.rows(ROWS)
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
        assert [cell["name"] for cell in cells] == ["Teacher", "+ Distillation"]
        assert [cell["cost.latency_ms.padded.p50"] for cell in cells] == [3.5, None]
        assert len(list(files.glob("media/images/figure_pareto*.png"))) == 1

        summary = json.loads((files / "wandb-summary.json").read_text())
        assert summary["student/finetune/loss"] == pytest.approx(0.8)
        assert summary["student/finetune/step"] == 2
        assert summary["row/+ Distillation/metrics.toy.validation.accuracy"] == 0.8
        assert summary["row/Teacher/cost.latency_ms.padded.p50"] == 3.5
        assert "row/Teacher/cost.latency_ms.padded.unstable" not in summary
        assert len(read_csv(run_dir)) == 6


class Model(pl.LightningModule):
    """One weight that goes to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.weight - batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_lightning_logs_arrives_under_the_stage(tmp_path: Path) -> None:
    tracker = Tracker()
    tracker.start(tmp_path, "study", "job", {})
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=4,
        log_every_n_steps=2,
        logger=TrackerLogger(tracker, "student/finetune"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=2))
    tracker.close(failed=False)
    losses = [line for line in read_csv(tmp_path) if line["metric"] == "loss"]
    assert [(line["stage"], line["step"]) for line in losses] == [
        ("student/finetune", "1"),
        ("student/finetune", "3"),
    ]
    assert float(losses[0]["value"]) == pytest.approx(0.64)


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
