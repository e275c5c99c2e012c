"""That units are gone, for every structure and family: slicing equals masking, and the artifact holds it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import edgemin
from edgemin import artifact
from edgemin.data.module import DataModule
from edgemin.encoder import building, parts, truncation
from edgemin.pruning.selection import others
from edgemin.pruning.stage import Pruning

FAMILIES = (*tiny.CUTTABLE, "electra")
STRUCTURES = ("heads", "ffn", "layers", "hidden")
MOBILE = [("heads", "mobilebert"), ("layers", "mobilebert")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataModule:
    return tiny.data(tmp_path_factory.mktemp("data"))


def pruned(structure: str, start: PreTrainedModel, data: DataModule, work: Path, **settings: Any) -> Pruning:
    given = {"ratio": 0.5, "scope": "global", "epochs": 0, "calibration_examples": 8, "batch_size": 8}
    stage = tiny.stage(Pruning, structure=structure, criterion="taylor", learning_rate=1e-3, **{**given, **settings})
    assert tiny.fit(stage, start, data, work=work).model is start
    return stage


def times(mask: Tensor) -> Callable[..., Any]:
    return lambda _module, inputs: (inputs[0] * mask, *inputs[1:])


def skipped(_module: nn.Module, inputs: Any, output: Any) -> Any:
    return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]


def over_kept(mask: Tensor) -> Callable[..., Tensor]:
    """A LayerNorm whose mean and variance are those of the kept units alone, in the full width."""

    def change(norm: nn.LayerNorm, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        (states,) = inputs
        mean = (states * mask).sum(-1, keepdim=True) / mask.sum()
        variance = ((states - mean).square() * mask).sum(-1, keepdim=True) / mask.sum()
        bias = 0 if norm.bias is None else norm.bias
        return ((states - mean) / (variance + norm.eps).sqrt() * norm.weight + bias) * mask

    return change


def masked(model: PreTrainedModel, structure: str, gone: Sequence[Sequence[int]]) -> ExitStack:
    """The whole model as it answers without these units of each group: nothing reads what they hand on."""
    stack, layers = ExitStack(), parts.layers(model)
    for index, layer in enumerate(layers):
        if structure == "layers" and index in gone[0]:
            stack.enter_context(layer.module.register_forward_hook(skipped))
        elif structure == "heads":
            mask = ones_but(gone[index], layer.heads).repeat_interleave(layer.head_size)
            stack.enter_context(layer.output.register_forward_pre_hook(times(mask)))
        elif structure == "ffn":
            second = layer.part(layer.family.ffn_out)
            stack.enter_context(second.register_forward_pre_hook(times(ones_but(gone[index], layer.ffn))))
    if structure == "hidden":
        mask = ones_but(gone[0], parts.hidden_size(model))
        norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
        assert all(norm.normalized_shape == (len(mask),) for norm in norms)
        for norm in norms:
            stack.enter_context(norm.register_forward_hook(over_kept(mask)))
        stack.enter_context(model.get_submodule(parts.head_linears(model)[-1]).register_forward_pre_hook(times(mask)))
    return stack


def ones_but(units: Sequence[int], count: int) -> Tensor:
    mask = torch.ones(count)
    mask[list(units)] = 0
    return mask


@pytest.mark.parametrize(
    ("structure", "family"), [*((name, family) for family in FAMILIES for name in STRUCTURES), *MOBILE]
)
def test_slicing_equals_masking_and_the_artifact_can_be_pruned_again(
    structure: str, family: str, data: DataModule, tmp_path: Path
) -> None:
    start = tiny.model(family)
    whole = copy.deepcopy(start)
    stage = pruned(structure, start, data, tmp_path / "work")
    (gone,) = stage.removed
    assert any(gone)
    batch = data.evaluation["validation"].batch(range(8))
    assert 0 in batch["attention_mask"], "padding belongs to the test"
    before = tiny.logits(whole, batch)
    if structure == "hidden":  # the head keeps the most important units of its own, not those of the stream
        truncation.sort_head_units(whole, others(gone, [32])[0])
        torch.testing.assert_close(tiny.logits(whole, batch), before, atol=1e-5, rtol=0)
    with masked(whole, structure, gone):
        expected = tiny.logits(whole, batch)
    assert not torch.allclose(expected, before, atol=1e-4)
    torch.testing.assert_close(tiny.logits(start, batch), expected, atol=1e-5, rtol=0)

    place = tmp_path / "artifact"
    place.mkdir()
    artifact.save(place, start, data.tokenizer, {})
    loaded = edgemin.load(place)[0]
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(start, batch))
    settings = {"ratio": 0.4, "steps": 1, "epochs": None}
    for number, model in enumerate((start, loaded)):
        pruned(structure, model, data, tmp_path / str(number), **settings)
    assert tiny.same_weights(start, loaded), "pruned and trained again as if it had never left memory"
    assert building.outline(loaded) != building.outline(whole)
