"""What pruning leaves is served everywhere: by transformers alone, in ONNX Runtime and in OpenVINO."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from bundles import SENTENCES, exported, mistake, saved, tokens
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import edgemin
from edgemin.deploy.runtime import open_model
from edgemin.pruning.stage import Pruning

FAMILIES = (*tiny.CUTTABLE, "electra")
STRUCTURES = ("heads", "ffn", "layers", "hidden")


def pruned(work: Path, family: str, *structures: str) -> PreTrainedModel:
    """A model that has lost units of these structures, one after the other."""
    model, data = tiny.model(family), tiny.data(work)
    for structure in structures:
        given = {"ratio": 0.4, "scope": "global", "criterion": "taylor", "epochs": 0, "calibration_examples": 8}
        stage = tiny.stage(Pruning, structure=structure, batch_size=8, learning_rate=1e-3, **given)
        model = tiny.fit(stage, model, data, work=work / structure).model
    return model


@pytest.mark.parametrize("structure", [*STRUCTURES[:-1], "all three"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_alone_answers_as_the_artifact(family: str, structure: str, tmp_path: Path) -> None:
    model = pruned(tmp_path / "work", family, *(STRUCTURES[:-1] if " " in structure else [structure]))
    source, out = saved(model, tmp_path / "artifact"), tmp_path / "out"
    assert exported(f"artifact={source}", "deploy=transformers", f"out={out}") == 0
    stock = copy.deepcopy(AutoModelForSequenceClassification.from_pretrained(out))
    expected = tiny.logits(edgemin.load(source)[0], tokens(SENTENCES))
    torch.testing.assert_close(tiny.logits(stock, tokens(SENTENCES)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_hidden_units_have_no_folder_for_transformers_which_is_said(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(pruned(tmp_path / "work", family, "hidden"), tmp_path / "artifact")
    line = mistake([f"artifact={source}", "deploy=transformers", f"out={tmp_path / 'out'}"], capsys)
    assert line == (
        "artifact: expected a shape that transformers has a configuration for, given one that has 4 heads of size 8 in "
        "layers of width 24 (deploy=onnxruntime and openvino serve any)"
    )


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != "bert")]
)
def test_a_model_that_lost_units_of_every_structure_answers_in_a_runtime_as_in_torch(
    family: str, runtime: str, tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    source, out = saved(pruned(tmp_path / "work", family, *STRUCTURES), tmp_path / "artifact"), tmp_path / "out"
    assert exported(f"artifact={source}", f"deploy={runtime}", f"out={out}") == 0
    model = edgemin.load(source)[0]
    opened = open_model(runtime, out, 1)
    for texts in (SENTENCES, SENTENCES[:1]):
        found = torch.tensor(opened.answers({name: tensor.numpy() for name, tensor in tokens(texts).items()}))
        expected = tiny.logits(model, tokens(texts))
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
