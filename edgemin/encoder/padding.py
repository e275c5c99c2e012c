"""A model as transformers' own classes can hold it: every layer alike, what pruning has taken away filled with zeros.

A configuration of transformers has one number of heads and one of FFN units for all layers, and heads fill the width of
a layer. A head whose query, key, value and output weights are zero adds nothing to what attention gives, and neither
does an FFN unit of zeros, so the logits stay what they were. A norm would count zeros: no width that a norm runs over
can be filled up.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from edgemin.encoder.building import build
from edgemin.encoder.families import table
from edgemin.encoder.parts import Layer, has_projection, layers
from edgemin.errors import UserError


class Padded(NamedTuple):
    """A model of transformers' own classes, and one note for each thing that was filled up in it, often none."""

    model: PreTrainedModel
    notes: list[str]


def padded(model: PreTrainedModel) -> Padded:
    """A float model with the same logits that its configuration alone describes.

    Widths that are the same in all layers stay as they are.

    Args:
        model: as it was loaded; quantized weights are taken as the floats they stand for.

    Raises:
        UserError: a shape that no configuration of its family can say.
    """
    family, found = table(model), layers(model)
    heads, ffn = _heads(found), max(layer.ffn for layer in found)
    # ModernBERT's first layer has no norm. Where the first that is left has one, a layer of zeros goes in front of it.
    in_front = int(family.attention_norm is not None and found[0].has_attention_norm)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.num_attention_heads = in_front + len(found), heads
    setattr(config, family.ffn_key, ffn)
    if family.rotary:
        config.layer_types = config.layer_types[:1] * in_front + config.layer_types
        if hasattr(config, "head_dim"):
            del config.head_dim
    with torch.random.fork_rng(devices=[]):  # all that is drawn here is overwritten
        stock = build(config)
    if has_projection(stock) != has_projection(model):
        raise UserError(_refusal(f"projects its embeddings to the width that they have, {config.hidden_size}"))
    lacking = [number for number, layer in enumerate(found[1:], start=2) if not layer.has_attention_norm]
    if lacking:
        raise UserError(_refusal(f"has no norm in front of the attention of layer {lacking[0]}"))
    _fill(stock, model, in_front)
    return Padded(stock.eval(), _notes(found, heads, ffn, in_front))


def _heads(found: list[Layer]) -> int:
    """The number of heads that fills the width of a layer."""
    size, width = found[0].head_size, found[0].width
    most = max(layer.heads for layer in found)
    if width % size or most * size > width or any(layer.head_size != size for layer in found):
        raise UserError(_refusal(f"has {most} heads of size {size} in layers of width {width}"))
    return width // size


def _refusal(has: str) -> str:
    return (
        f"artifact: expected a shape that transformers has a configuration for, given one that {has} "
        "(deploy=onnxruntime and openvino serve any)"
    )


def _fill(stock: PreTrainedModel, model: PreTrainedModel, in_front: int) -> None:
    """Copy all weights, each to the upper left of the matrix that holds it; a layer in front becomes zero."""
    family, given = table(model), model.state_dict()
    start = f"{family.layers}."
    # Query, key and value in one matrix, and a unit with its gate, are filled up each for itself.
    blocks = dict.fromkeys(family.projections, 3 // len(family.projections)) | {family.ffn_in: 2 if family.gated else 1}
    filled = {}
    for name, wanted in stock.state_dict().items():
        inside = name.removeprefix(start)
        if inside == name:
            filled[name] = given[name]
            continue
        index, _, part = inside.partition(".")
        source = int(index) - in_front
        count = blocks.get(part.rpartition(".")[0], 1)
        filled[name] = (
            torch.zeros_like(wanted) if source < 0 else _filled(given[f"{start}{source}.{part}"], wanted, count)
        )
    stock.load_state_dict(filled)


def _filled(given: Tensor, wanted: Tensor, blocks: int) -> Tensor:
    """A matrix or bias of so many blocks of rows, filled up to the shape of `wanted`."""
    rows, target = given.unflatten(0, (blocks, -1)), wanted.unflatten(0, (blocks, -1))
    missing = [want - have for have, want in zip(rows.shape[1:], target.shape[1:], strict=True)]
    return functional.pad(rows, [count for size in reversed(missing) for count in (0, size)]).flatten(0, 1)


def _notes(found: list[Layer], heads: int, ffn: int, in_front: int) -> list[str]:
    notes = []
    for what, own, count in (("heads", [x.heads for x in found], heads), ("FFN units", [x.ffn for x in found], ffn)):
        if {*own} != {count}:
            notes.append(
                f"{count} {what} in each layer, of which {', '.join(map(str, own))} are its own; the rest is zero"
            )
    if in_front:
        notes.append("a layer of zeros in front, which hands on what it reads: the first has no norm in transformers")
    return notes
