"""What pruning leaves is served everywhere: by transformers alone, in ONNX Runtime and in OpenVINO."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny
import torch
from bundles import SENTENCES, exported, mistake, saved, tokens
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import edgemin
from edgemin import artifact
from edgemin.deploy.runtime import open_model
from edgemin.pruning.stage import Pruning
from edgemin.pruning.vocabulary import VocabularyPruning

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


def test_a_pruned_vocabulary_goes_with_its_tokenizer(tmp_path: Path) -> None:
    data, source = tiny.data(tmp_path / "work", max_train_examples=6), tmp_path / "artifact"
    stage = tiny.stage(VocabularyPruning, epochs=0, learning_rate=1e-3, batch_size=8)
    fitted = tiny.fit(stage, tiny.model(), data, work=tmp_path / "work")
    source.mkdir()
    artifact.save(source, fitted.model, fitted.tokenizer, {"seed": 7, "task": {"name": "toy"}})
    model, tokenizer = edgemin.load(source)
    assert tokenizer is not None and len(tokenizer) < len(data.tokenizer)
    given = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    expected = tiny.logits(model, given)
    for form in ("transformers", "onnxruntime", "openvino"):
        out = tmp_path / form
        assert exported(f"artifact={source}", f"deploy={form}", f"out={out}") == 0
        if form == "transformers":
            stock = AutoModelForSequenceClassification.from_pretrained(out)
            found = tiny.logits(
                stock, AutoTokenizer.from_pretrained(out)(list(SENTENCES), padding=True, return_tensors="pt")
            )
        else:
            found = torch.tensor(open_model(form, out, 1).answers({name: given[name].numpy() for name in given}))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
