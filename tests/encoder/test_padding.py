"""Uneven models in the classes of transformers: equal logits, and one line where no configuration can say the shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from edgemin.encoder import building, padding, shapes, slicing
from edgemin.errors import UserError

FAMILIES = (*tiny.FAMILIES, "electra", "xlm-roberta")


def made(family: str) -> PreTrainedModel:
    """A tiny model of three layers with four heads of size 8 (MobileBERT: 2) and 48 FFN units each."""
    if family != "xlm-roberta":
        return tiny.model(family)
    roberta = tiny.model("roberta")
    model = building.build(AutoConfig.for_model(**roberta.config.to_dict() | {"model_type": family}))
    model.load_state_dict(roberta.state_dict())
    return model.eval()


def batch() -> dict[str, Tensor]:
    """Sentences of two token types, some of them padded."""
    ids = torch.randint(4, 60, (5, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2:, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 30).long()}


@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_heads_and_ffn_are_filled_up_and_the_logits_stay(family: str) -> None:
    model = made(family)
    slicing.slice_heads(model, 0, [1, 3])
    slicing.slice_heads(model, 2, [0])
    cuttable = family != "mobilebert"
    if cuttable:
        slicing.slice_ffn(model, 0, range(11))
        slicing.slice_ffn(model, 1, range(7))
        slicing.slice_ffn(model, 2, [0, 5, 9])
    stock, notes = padding.padded(model)
    torch.testing.assert_close(tiny.logits(stock, batch()), tiny.logits(model, batch()), atol=1e-5, rtol=0)
    assert type(stock) is type(model)
    ffn = 11 if cuttable else 48  # no more than the widest layer has
    assert {(layer.heads, layer.ffn) for layer in building.outline(stock).layers} == {(4, ffn)}
    assert stock.config.num_attention_heads == 4
    expected = ["4 heads in each layer, of which 2, 4, 1 are its own; the rest is zero"]
    assert (
        notes == expected + ["11 FFN units in each layer, of which 11, 7, 3 are its own; the rest is zero"] * cuttable
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_heads_that_do_not_fill_the_width_are_filled_up_too(family: str) -> None:
    model = made(family)
    for layer in range(3):
        slicing.slice_heads(model, layer, [0, 2, 3])
    stock, notes = padding.padded(model)
    torch.testing.assert_close(tiny.logits(stock, batch()), tiny.logits(model, batch()), atol=1e-5, rtol=0)
    assert len(notes) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_layers_words_and_equal_ffn_stay_small_and_equal_to_the_last_bit(family: str) -> None:
    model = made(family)
    slicing.slice_layers(model, [0, 2])
    slicing.slice_vocabulary(model, range(62))
    if family != "mobilebert":
        for layer in range(2):
            slicing.slice_ffn(model, layer, range(layer, 20 + layer))
    stock, notes = padding.padded(model)
    assert not notes
    assert torch.equal(tiny.logits(stock, batch()), tiny.logits(model, batch()))
    assert building.outline(stock) == building.outline(model)


def test_a_cut_hidden_size_that_heads_still_fill_is_no_obstacle() -> None:
    model = made("bert")
    for layer in range(3):
        slicing.slice_heads(model, layer, [0, 1])
    slicing.slice_hidden(model, range(24))
    stock, _ = padding.padded(model)
    assert stock.config.num_attention_heads == 3
    torch.testing.assert_close(tiny.logits(stock, batch()), tiny.logits(model, batch()), atol=1e-5, rtol=0)


def test_a_first_layer_with_a_norm_gets_a_layer_of_zeros_in_front() -> None:
    model = made("modernbert")
    slicing.slice_layers(model, [1, 2])
    slicing.slice_heads(model, 0, [2])
    stock, notes = padding.padded(model)
    torch.testing.assert_close(tiny.logits(stock, batch()), tiny.logits(model, batch()), atol=1e-5, rtol=0)
    assert stock.config.num_hidden_layers == len(stock.config.layer_types) == 3
    assert notes[1].startswith("a layer of zeros in front")


def equal_projection() -> PreTrainedModel:
    """An ELECTRA whose embeddings are projected to a hidden size that a slice has made theirs."""
    config = shapes.configure("electra", layers=2, hidden=32, heads=4, intermediate=48, vocabulary=70)
    config.embedding_size = 16
    model = building.build(config)
    for layer in range(2):
        slicing.slice_heads(model, layer, [0, 1])
    slicing.slice_hidden(model, range(16))
    return model


def sliced(family: str, cut: Callable[..., None], *keep: Any) -> PreTrainedModel:
    model = made(family)
    cut(model, *keep)
    return model


@pytest.mark.parametrize(
    ("make", "has"),
    [
        (lambda: sliced("bert", slicing.slice_hidden, range(24)), "has 4 heads of size 8 in layers of width 24"),
        (lambda: sliced("bert", slicing.slice_head_size, 5), "has 4 heads of size 5 in layers of width 32"),
        (
            lambda: sliced("modernbert", slicing.slice_layers, [1, 0]),
            "has no norm in front of the attention of layer 2",
        ),
        (equal_projection, "projects its embeddings to the width that they have, 16"),
    ],
    ids=["hidden", "head_size", "norm", "projection"],
)
def test_a_shape_that_no_configuration_can_say_is_refused(make: Callable[[], PreTrainedModel], has: str) -> None:
    with pytest.raises(UserError) as error:
        padding.padded(make())
    (line,) = error.value.args
    assert line.startswith("artifact: ") and has in line and "deploy=onnxruntime" in line
