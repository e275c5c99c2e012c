"""Physical removal of heads, FFN units, layers, vocabulary rows, hidden units and head dimensions, in place.

Every change is a list of cuts, checked as a whole before the first is made, so that a refused slice leaves
the model as it was. A cut goes through [`slice_weight`][edgemin.encoder.slicing.slice_weight]: a new kind of layer
becomes sliceable by registering itself there. `keep` is taken in the order given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.encoder.building import sync_config
from edgemin.encoder.families import Family, check_ffn, check_hidden, table
from edgemin.encoder.parts import (
    Layer,
    has_projection,
    head_linears,
    hidden_size,
    layer_at,
    layers,
    vocabulary_size,
)
from edgemin.errors import UserError

Cut = tuple[nn.Module, Tensor | None, Tensor | None]
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


@singledispatch
def slice_weight(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Keep some outputs and inputs of one layer, in place.

    Args:
        module: A Linear (rows are its outputs, columns its inputs), an Embedding (rows are its entries,
            columns its features) or a LayerNorm (columns are its features).
        rows: Indices to keep; `None` keeps all.
        columns: Indices to keep; `None` keeps all.

    Raises:
        UserError: this kind of layer cannot be sliced.
    """
    raise UserError(_refusal(module))


@slice_weight.register
def _(module: nn.Linear, rows: Tensor | None, columns: Tensor | None) -> None:
    assert type(module) is nn.Linear, "a subclass of Linear slices itself: register it"
    module.weight = kept_entries(kept_entries(module.weight, 0, rows), 1, columns)
    if module.bias is not None:
        module.bias = kept_entries(module.bias, 0, rows)
    module.out_features, module.in_features = module.weight.shape


@slice_weight.register
def _(module: nn.Embedding, rows: Tensor | None, columns: Tensor | None) -> None:
    assert type(module) is nn.Embedding, "a subclass of Embedding slices itself: register it"
    module.weight = kept_entries(kept_entries(module.weight, 0, rows), 1, columns)
    module.num_embeddings, module.embedding_dim = module.weight.shape
    if rows is not None and module.padding_idx is not None:
        module.padding_idx = rows.tolist().index(module.padding_idx)


@slice_weight.register
def _(module: nn.LayerNorm, rows: Tensor | None, columns: Tensor | None) -> None:
    assert rows is None and columns is not None
    module.normalized_shape = (len(columns),)
    if module.weight is not None:
        module.weight = kept_entries(module.weight, 0, columns)
    if module.bias is not None:
        module.bias = kept_entries(module.bias, 0, columns)


@slice_weight.register
def _(module: nn.Identity, rows: Tensor | None, columns: Tensor | None) -> None:
    """An absent norm has nothing to slice."""


def slice_heads(model: PreTrainedModel, layer: int, keep: Sequence[int]) -> None:
    """Keep these heads of one layer: rows of query, key and value, columns of the output projection.

    Equal to zeroing the other heads' contexts in front of the output projection.

    Args:
        model: Changed in place.
        layer: Counted from 0.
        keep: Heads to keep, counted from 0.

    Raises:
        UserError: no such layer; no head kept; a head out of range or named twice; a layer of a kind
            that cannot be sliced.
    """
    part = layer_at(model, layer)
    kept = _checked(keep, part.heads, "heads")
    _keep_inner(model, {layer: _blocks(kept, part.head_size)}, part.head_size)


def slice_head_size(model: PreTrainedModel, keep: int) -> None:
    """Keep the first dimensions of every head of every layer; the scores' scale follows, `keep ** -0.5`.

    Args:
        model: Changed in place.
        keep: The new head size D.

    Raises:
        UserError: out of range, or the family turns heads by a rotary embedding, whose pairs of dimensions
            and frequencies belong to the full head.
    """
    if table(model).rotary:
        raise UserError(
            f"head_size: cannot be cut for {table(model).name}, whose rotary embedding spans the whole head"
        )
    found = layers(model)
    size = min(part.head_size for part in found)
    if not 1 <= keep <= size:
        raise UserError(f"head_size: expected 1 to {size}, given {keep}")
    inner = {
        index: (torch.arange(part.heads)[:, None] * part.head_size + torch.arange(keep)).flatten()
        for index, part in enumerate(found)
    }
    _keep_inner(model, inner, keep)


def slice_ffn(model: PreTrainedModel, layer: int, keep: Sequence[int]) -> None:
    """Keep these FFN units of one layer; a gated unit goes with its gate.

    Equal to zeroing the other units' activations in front of the FFN's second Linear.

    Args:
        model: Changed in place.
        layer: Counted from 0.
        keep: Units to keep, counted from 0.

    Raises:
        UserError: no such layer; no unit kept; a unit out of range or named twice; a layer of a kind
            that cannot be sliced; several feed-forward networks stacked in the layer (MobileBERT).
    """
    part = layer_at(model, layer)
    check_ffn(part.family.name, part.networks)
    kept = _checked(keep, part.ffn, "FFN units")
    rows = torch.cat([kept, kept + part.ffn]) if part.family.gated else kept
    _apply([(part.part(part.family.ffn_in), rows, None), (part.part(part.family.ffn_out), None, kept)])
    sync_config(model)


def slice_layers(model: PreTrainedModel, keep: Sequence[int]) -> None:
    """Keep these layers, in this order; each stays the module it was.

    So it takes its kind of attention, and a norm it lacks (ModernBERT's first), to its new place.

    Args:
        model: Changed in place.
        keep: Layers to keep, counted from 0.

    Raises:
        UserError: no layer kept; a layer out of range or named twice (the message counts from 1).
    """
    found = layers(model)
    kept = _checked(keep, len(found), "layers", first=1).tolist()
    model.set_submodule(table(model).layers, nn.ModuleList(found[index].module for index in kept))
    for index, part in enumerate(layers(model)):
        for module in part.module.modules():
            if hasattr(module, "layer_idx"):
                cast(Any, module).layer_idx = index
    sync_config(model)


def slice_vocabulary(model: PreTrainedModel, keep: Sequence[int]) -> None:
    """Keep these rows of the word embeddings: token `keep[i]` gets the id i, also in the configuration.

    Args:
        model: Changed in place.
        keep: Token ids to keep, in the order of their new ids.

    Raises:
        UserError: no row kept; an id out of range or named twice; a special token of the configuration
            dropped; RoBERTa's padding moved, from which its positions are counted.
    """
    family, config = table(model), model.config
    words = model.get_submodule(family.words)
    size = vocabulary_size(model)
    rows = _checked(keep, size, "token ids")
    new_ids = {old: new for new, old in enumerate(rows.tolist())}
    special = {name: getattr(config, name, None) for name in _SPECIAL_TOKENS}
    # Class defaults may name tokens beyond a smaller table: those mean nothing.
    special = {name: old for name, old in special.items() if isinstance(old, int) and old < size}
    for name, old in special.items():
        if old not in new_ids:
            raise UserError(f"keep: expected the special token {old} ({name}) among the kept, which it is not")
    padding = cast(int, words.padding_idx)
    if family.positions_follow_padding and new_ids[padding] != padding:
        raise UserError(f"keep: expected the padding token at {padding}, where {family.name} counts positions from")
    _apply([(words, rows, None)])
    for name, old in special.items():
        setattr(config, name, new_ids[old])
    sync_config(model)


def slice_hidden(model: PreTrainedModel, keep: Sequence[int]) -> None:
    """Keep these hidden units everywhere: embeddings, residual stream, norms, pooler and classifier.

    Norms then run over the kept units only, so unlike the other slices this one is not equal to masking. The
    width inside attention stays, and so do embeddings that a projection separates from the hidden size: there
    only the projection's outputs are cut.

    Args:
        model: Changed in place.
        keep: Hidden units to keep, counted from 0.

    Raises:
        UserError: no unit kept; a unit out of range or named twice; a layer that cannot be sliced; a family
            whose layers have a width of their own (MobileBERT).
    """
    family = table(model)
    check_hidden(family.name, hidden_size(model))
    kept = _checked(keep, hidden_size(model), "hidden units")
    cuts = _embedding_cuts(model, family, kept)
    for layer in layers(model):
        cuts += [(linear, None, kept) for linear in (*layer.projections, layer.part(family.ffn_in))]
        cuts += [(linear, kept, None) for linear in (layer.output, layer.part(family.ffn_out))]
        cuts += [(layer.part(path), None, kept) for path in family.norms]
    if family.final_norm is not None:
        cuts.append((model.get_submodule(family.final_norm), None, kept))
    cuts += [(model.get_submodule(path), kept, kept) for path in head_linears(model)[:-1]]
    cuts += [(model.get_submodule(path), None, kept) for path in (*family.head_norms, family.classifier)]
    _apply(cuts)
    sync_config(model)


def _embedding_cuts(model: PreTrainedModel, family: Family, kept: Tensor) -> list[Cut]:
    if has_projection(model):
        assert family.projection is not None
        return [(model.get_submodule(family.projection), kept, None)]
    paths = (family.words, family.positions, family.token_types, family.embedding_norm)
    return [(model.get_submodule(path), None, kept) for path in paths if path is not None]


def _keep_inner(model: PreTrainedModel, inner: dict[int, Tensor], head_size: int) -> None:
    """Keep these dimensions of the attention width, per layer."""
    parts: list[tuple[Layer, Tensor]] = [(layer_at(model, index), kept) for index, kept in inner.items()]
    cuts: list[Cut] = []
    for part, kept in parts:
        rows = torch.cat([kept + part.inner * block for block in range(part.fused)])
        cuts += [(linear, rows, None) for linear in part.projections]
        cuts.append((part.output, None, kept))
    _apply(cuts)
    for part, _ in parts:
        part.note_heads(head_size)
    sync_config(model)


def _apply(cuts: list[Cut]) -> None:
    for module, _, _ in cuts:
        if slice_weight.dispatch(type(module)) is slice_weight.dispatch(nn.Module):
            raise UserError(_refusal(module))
    for module, rows, columns in cuts:
        slice_weight(module, rows, columns)


def _refusal(module: nn.Module) -> str:
    kind = f"{type(module).__module__}.{type(module).__name__}"
    return f"model: expected layers that can be sliced, given {kind}; slice before quantizing"


def _blocks(kept: Tensor, size: int) -> Tensor:
    return (kept[:, None] * size + torch.arange(size)).flatten()


def kept_entries(parameter: Tensor, dim: int, index: Tensor | None) -> nn.Parameter:
    """A parameter of the entries at `index` of a dimension (`None`: of all), trained where the old one was."""
    found = parameter.detach() if index is None else parameter.detach().index_select(dim, index.to(parameter.device))
    return nn.Parameter(found, requires_grad=parameter.requires_grad)


def _checked(keep: Sequence[int], count: int, what: str, *, first: int = 0) -> Tensor:
    """The indices as a tensor; messages count from `first`."""
    kept = [int(index) for index in keep]
    if not kept:
        raise UserError(f"keep: expected at least one of {count} {what}, given none")
    last = count - 1 + first
    for index in kept:
        if not 0 <= index < count:
            raise UserError(f"keep: expected {what} from {first} to {last}, given {index + first}")
    if len(set(kept)) != len(kept):
        repeated = next(index for index in kept if kept.count(index) > 1)
        raise UserError(f"keep: expected {what} once each, given {repeated + first} twice")
    return torch.tensor(kept)
