"""deploy=transformers: what transformers makes of the folder by itself answers as the artifact does."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from bundles import SENTENCES, bare, exported, saved, to_integers, tokens, uneven
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import edgemin
from edgemin.encoder import slicing
from edgemin.quantization.layers import QuantizedLinear

FAMILIES = (*tiny.FAMILIES, "electra")
READ = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
found = {}
for folder, *texts in json.loads(sys.argv[1]):
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = tokenizer(texts, padding=True, return_tensors="pt")
    if model.config.model_type in ("distilbert", "modernbert"):
        del given["token_type_ids"]
    with torch.no_grad():
        found[folder] = [model.config.id2label[1], model.eval()(**given).logits.tolist()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By family: an artifact of uneven widths, and its folder."""
    made = {}
    for family in FAMILIES:
        base = tmp_path_factory.mktemp(family)
        source, out = saved(uneven(family), base / "artifact"), base / "out"
        assert exported(f"artifact={source}", "deploy=transformers", f"out={out}") == 0
        made[family] = source, out
    return made


def test_transformers_alone_loads_every_family_with_equal_logits(
    folders: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    asked = json.dumps([(str(out), *SENTENCES) for _, out in folders.values()])
    printed = json.loads(bare(tmp_path, ["-c", READ, asked], ["edgemin"], tmp_path / "site"))
    for source, out in folders.values():
        label, logits = printed[str(out)]
        model, tokenizer = edgemin.load(source)
        assert tokenizer is not None and label == "positive"
        expected = tiny.logits(model, tokens(SENTENCES))
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-5, rtol=0)


def test_the_card_says_what_was_filled_up_and_where_the_speed_is(folders: dict[str, tuple[Path, Path]]) -> None:
    card = (folders["bert"][1] / "README.md").read_text()
    assert "4 heads in each layer, of which 2, 4, 1 are its own; the rest is zero" in card
    assert "48 FFN units in each layer, of which 48, 11, 48 are its own; the rest is zero" in card
    assert "deploy=onnxruntime" in card and "| weights | fp32 |" in card
    assert {path.name for path in folders["bert"][1].iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }


def stock_logits(out: Path) -> Tensor:
    """Of transformers' model, its weights copied to where sums add in the artifact's order."""
    return tiny.logits(copy.deepcopy(AutoModelForSequenceClassification.from_pretrained(out)), tokens(SENTENCES))


def test_what_a_configuration_can_say_stays_small_and_equal_to_the_last_bit(tmp_path: Path) -> None:
    model = tiny.model()
    slicing.slice_layers(model, [0, 2])
    for layer in range(2):
        slicing.slice_ffn(model, layer, range(20))
    source, out = saved(model, tmp_path / "artifact"), tmp_path / "new" / "out"
    assert exported(f"artifact={source}", "deploy=transformers", f"out={out}") == 0
    assert torch.equal(stock_logits(out), tiny.logits(model, tokens(SENTENCES)))
    assert "| filled up with zeros | nothing |" in (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 20)


def test_large_numbers_may_round_as_they_do(tmp_path: Path) -> None:
    model = uneven()
    with torch.no_grad():
        model.classifier.weight.mul_(1e5)  # type: ignore[union-attr, operator]
    assert (
        exported(f"artifact={saved(model, tmp_path / 'artifact')}", "deploy=transformers", f"out={tmp_path / 'out'}")
        == 0
    )
    logits = stock_logits(tmp_path / "out")
    expected = tiny.logits(model, tokens(SENTENCES))
    assert expected.abs().max() > 1e4
    torch.testing.assert_close(logits, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(("bits", "activations"), [(8, "static"), (4, "none")])
def test_integers_become_the_floats_they_stand_for(bits: int, activations: str, tmp_path: Path) -> None:
    model = uneven()
    to_integers(model, bits, activations)
    source, out = saved(model, tmp_path / "artifact"), tmp_path / "out"
    assert exported(f"artifact={source}", "deploy=transformers", f"out={out}") == 0
    unrounded = copy.deepcopy(model)
    for layer in unrounded.modules():
        if isinstance(layer, QuantizedLinear):
            layer.watching = True  # its inputs pass as they are
    found = stock_logits(out)
    torch.testing.assert_close(found, tiny.logits(unrounded, tokens(SENTENCES)), atol=1e-5, rtol=0)
    card = (out / "README.md").read_text()
    assert f"fp32, the values of the quantized model's weights ({bits} bits, activations {activations})" in card
    says_so = "not rounded here, so that logits differ from that model's by up to " in card
    assert says_so == (activations == "static")
    assert torch.allclose(found, tiny.logits(model, tokens(SENTENCES)), atol=1e-5) == (not says_so)
