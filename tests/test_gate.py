"""The quality gate: what is compared, who is blamed, what a run says."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import studies
import tiny
import torch

from edgemin import gate
from edgemin.data import DataModule
from edgemin.quantization import dynamic
from edgemin.quantization import model as quantisation
from edgemin.quantization.ranges import Calibration
from edgemin.quantization.sensitivity import damage
from edgemin.quantization.weights import Spec


def test_agreement_and_flips_are_counted_over_answers() -> None:
    before = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]], dtype=np.float32)
    after = np.array([[0.0, 1.0], [0.0, 1.0], [2.0, 1.9], [0.0, 3.0]], dtype=np.float32)
    found = gate.compare(0.9, 0.85, before, after, 0.049)
    assert (found["agreement"], found["flips"], found["examples"]) == (0.75, 1, 4)
    assert found["drop"] == pytest.approx(0.05) and not found["passed"]
    assert gate.compare(0.9, 0.95, before, after, 0.0)["passed"]
    one = gate.compare(0.9, 0.9, before[:, :1], after[:, :1], 0.0)
    assert one["agreement"] is None and one["flips"] is None and one["passed"]


def test_the_worst_layer_is_the_one_that_does_most_alone(data: DataModule) -> None:
    parent, changed = tiny.model(), tiny.model()
    bits = {"bert.encoder.layer.0.output.dense": 2, "bert.encoder.layer.1.output.dense": 8}
    quantisation.quantise(changed, {path: Spec(many, "tensor") for path, many in bits.items()}, "minmax", Calibration())
    batches = data.calibration(12, 5, seed=1)
    modules = dict(parent.named_modules())
    found = gate.blame(parent, changed, batches)
    assert [entry["layer"] for entry in found] == list(bits)
    assert all(module is modules[path] for path, module in parent.named_modules())
    reference = torch.cat([tiny.logits(parent, batch) for batch in batches])
    parent.set_submodule(
        "bert.encoder.layer.0.output.dense", changed.get_submodule("bert.encoder.layer.0.output.dense")
    )
    alone = torch.cat([tiny.logits(parent, batch) for batch in batches])
    assert found[0]["damage"] == pytest.approx(damage(reference, alone), abs=1e-9)


def test_torchs_dynamic_layers_are_blamed_too(data: DataModule) -> None:
    changed = tiny.model()
    dynamic.quantise(changed)
    found = gate.blame(tiny.model(), changed, data.calibration(4, 4, seed=1))
    assert len(found) == 20 and found[0]["damage"] >= found[-1]["damage"] >= 0


def test_a_run_says_what_was_lost_and_names_the_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = ["quantize=weight_only", "quantize.bits=2", "quantize.granularity=tensor", "quantize.weight_range=minmax"]
    asked += ["quantize.embedding_bits=2", "finetune.steps=300", "stages=[finetune,quantize]"]
    asked += ["task.max_train_examples=400", "seed=1"]
    with caplog.at_level(logging.WARNING):
        first = studies.run(tmp_path / "0", *asked, "quantize.max_drop=0", store=tmp_path / "store")
    row = first["rows"][-1]
    found = row["gate"]
    assert not found["passed"] and found["drop"] > 0 and found["flips"] > 0
    assert (found["parent"], found["parent_artifact"]) == ("student/finetune", first["rows"][-2]["artifact"])
    assert 0 < len(found["worst"]) <= 5 and found["worst"][0]["damage"] > 0
    warned = [line for line in first["warnings"] if "more than max_drop" in line]
    assert len(warned) == 1 and found["worst"][0]["layer"] in warned[0]
    assert "quality gate" in (tmp_path / "0/report.md").read_text()
    # another bound judges the same artifact otherwise, and nothing is computed again
    kept = sorted(path.name for path in (tmp_path / "store/.results").rglob("*") if path.is_file())
    again = studies.run(tmp_path / "1", *asked, "quantize.max_drop=1", store=tmp_path / "store")
    assert again["rows"][-1]["gate"]["passed"] and "worst" not in again["rows"][-1]["gate"]
    assert again["rows"][-1]["artifact"] == row["artifact"]
    assert sorted(path.name for path in (tmp_path / "store/.results").rglob("*") if path.is_file()) == kept
    assert json.loads((tmp_path / "1/run.json").read_text())["rows"][-1]["gate"]["max_drop"] == 1


def test_without_a_bound_nothing_is_judged(tmp_path: Path) -> None:
    found = studies.run(tmp_path, "quantize=weight_only", "quantize.max_drop=null", "stages=[finetune,quantize]")
    assert "gate" not in found["rows"][-1] and found["rows"][-1]["findings"]["quantisation"]
