"""Narrower encoders out of wide ones, by their weights alone: no data is seen, nothing is trained.

What stays of a width is the `first` so many units, the most important ones by `weight_product`, or, of the hidden size
alone, the leading principal directions (`pca`, see [`rotation`][edgemin.encoder.rotation]; heads and FFN units go by
weight_product there).

The importance of a part is how much it writes times how much it reads, in squared norms, biases included. So a dead
part has none, and parts are ranked the same in a model that computes the same with other scales inside:

- head h: ‖W_O,h [W_V,h b_V,h]‖², the map from what it attends to to what it writes;
- FFN unit u: ‖W_out,u‖² · (‖W_in,u‖² + b_in,u²), and times the like of its gate where it has one;
- dimension d of a head: ‖W_Q,d‖² · ‖W_K,d‖² in the scores, ‖W_V,d‖² · ‖W_O,d‖² in what is written: these are two
  choices, as no weight ties one to the other;
- hidden unit i: (‖column i of the embeddings‖² + Σ ‖row i of W_O and W_out‖²) · Σ γ_i² ‖column i of all that reads‖²
  over all layers, γ the scale of the norm in between: one choice for the whole residual stream. The head, which may be
  fresh, has no say. Its own inner units have its widths and not the stream's meaning: they are chosen for themselves,
  by what they read times what the classifier reads of them.

Importances are sums in float64; between equals the lower index stays; what is kept keeps its order.

Shapes: H hidden size, A heads of a layer, D head size, F FFN units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.encoder import magnitude
from edgemin.encoder.building import build, outline
from edgemin.encoder.families import table
from edgemin.encoder.parts import Layer, has_projection, head_linears, hidden_size, layer_at, layers
from edgemin.encoder.rotation import rotate_hidden
from edgemin.encoder.slicing import slice_ffn, slice_head_size, slice_heads, slice_hidden, slice_weight
from edgemin.encoder.stream import plain, stream

Truncation = Literal["first", "weight_product", "pca"]


def truncate(
    model: PreTrainedModel,
    how: Truncation,
    *,
    heads: int | None = None,
    head_size: int | None = None,
    ffn: int | None = None,
    hidden: int | None = None,
) -> None:
    """Cut every layer to these widths, in place: heads, then their size, then FFN units, then the hidden size.

    Each choice is made on what the one before left. A width that is `None`, or that a layer does not exceed, stays
    as it is, to the last bit. On the meta device, where there are no weights to choose by, the first units are kept:
    the shapes are the same.

    Args:
        model: Changed in place.
        how: `first`, `weight_product` or `pca`.
        heads: A.
        head_size: D.
        ffn: FFN units.
        hidden: H.

    Raises:
        UserError: the family cannot be cut so (MobileBERT's hidden size and stacked networks, ModernBERT's head size),
            or the weights are quantized.
    """
    by_weight = how != "first"
    for index, layer in enumerate(layers(model)):
        if heads is not None and heads < layer.heads:
            slice_heads(model, index, leading(head_importance(layer), heads) if by_weight else range(heads))
    if head_size is not None and head_size < max(layer.head_size for layer in layers(model)):
        if by_weight and not table(model).rotary:
            _sort_head_dimensions(model, head_size)
        slice_head_size(model, head_size)
    for index, layer in enumerate(layers(model)):
        if ffn is not None and ffn < layer.ffn:
            weighed = by_weight and layer.networks == 1  # stacked ones are slice_ffn's to refuse
            slice_ffn(model, index, leading(ffn_importance(layer), ffn) if weighed else range(ffn))
    if hidden is not None and hidden < hidden_size(model):
        _cut_hidden(model, how, hidden)


def leading(importance: Tensor, keep: int) -> list[int]:
    """Indices of the most important parts, ascending; between equals the lower index goes first."""
    if importance.is_meta:
        return list(range(keep))
    return sorted(torch.sort(importance, descending=True, stable=True).indices[:keep].tolist())


def head_importance(layer: Layer) -> Tensor:
    """`[A]`: ‖W_O,h [W_V,h b_V,h]‖² of each head; pruning's criterion `weight_product` is the same."""
    value = _query_key_value(layer)[2].unflatten(0, (layer.heads, layer.head_size))  # [A, D, H + 1]
    output = _weight(layer.output).T.unflatten(0, (layer.heads, layer.head_size))  # [A, D, H]
    return magnitude.products(value, output)


def dimension_importance(layer: Layer) -> tuple[Tensor, Tensor]:
    """Importance of each head's dimensions, twice `[A, D]`: in the scores, and in what the head writes."""
    query, key, value = (part.square().sum(1) for part in _query_key_value(layer))
    output = _weight(layer.output).square().sum(0)
    shape = (layer.heads, layer.head_size)
    return (query * key).unflatten(0, shape), (value * output).unflatten(0, shape)


def ffn_importance(layer: Layer) -> Tensor:
    """`[F]`: what each FFN unit reads times what it writes, and times its gate's where it has one."""
    read = _weight_and_bias(layer.part(layer.family.ffn_in)).square().sum(1)
    if layer.family.gated:
        read = read.unflatten(0, (2, layer.ffn)).prod(0)
    return read * _weight(layer.part(layer.family.ffn_out)).square().sum(0)


def hidden_importance(model: PreTrainedModel) -> Tensor:
    """`[H]`: what is written to each hidden unit times what is read of it, the norms' scales included."""
    found = stream(model)
    written = [_weight(linear_or_table).square().sum(0) for linear_or_table in found.tables]
    written += [_weight_and_bias(linear).square().sum(1) for linear in found.writers]
    read = []
    for linear, norm in found.reads:
        scale = norm.weight.detach().double() if norm is not None else 1.0
        read.append((_weight(linear) * scale).square().sum(0))
    return torch.stack(written).sum(0) * torch.stack(read).sum(0)


def with_fresh_layers(model: PreTrainedModel, *, layers: int, heads: int, ffn: int) -> PreTrainedModel:
    """A new model with this one's embeddings, and layers and head of its own.

    They are drawn as Hugging Face draws them, from the global generator. All else (activation, dropout, positions,
    labels) is as the model's configuration has it; a pattern of local and global layers goes on as it begins.

    Args:
        model: Its embedding tables, their norm and their projection move into the new model.
        layers: L, of any number.
        heads: A, a divisor of the layers' width: H, or the size of MobileBERT's bottleneck.
        ffn: F.
    """
    family, found = table(model), outline(model)
    width = layer_at(model, 0).width
    assert width % heads == 0
    wanted = replace(found.layers[0], heads=heads, head_size=width // heads, ffn=ffn)
    fresh_layers = tuple(
        # ModernBERT's first layer has no norm in front of attention, as that of the embeddings is there
        replace(wanted, window=window, attention_norm=index > 0 or family.attention_norm is None)
        for index, window in enumerate(_continued([layer.window for layer in found.layers], layers))
    )
    with torch.device(model.device):
        fresh = build(model.config, replace(found, layers=fresh_layers))
    paths = [family.words, family.positions, family.token_types, family.embedding_norm]
    for path in [*paths, family.projection if has_projection(model) else None]:
        if path is not None:
            fresh.set_submodule(path, model.get_submodule(path))
    return fresh


def _cut_hidden(model: PreTrainedModel, how: Truncation, keep: int) -> None:
    kept: Sequence[int] = range(keep)
    if how == "weight_product":
        kept = leading(hidden_importance(model), keep)
    elif how == "pca":
        rotate_hidden(model, keep)
    if how != "first":
        sort_head_units(model, kept)
    slice_hidden(model, kept)


def sort_head_units(model: PreTrainedModel, places: Sequence[int]) -> None:
    """Move the most important inner units of pooler and classifier to the places that the hidden size keeps."""
    dense, classifier = (model.get_submodule(path) for path in head_linears(model))
    importance = _weight_and_bias(dense).square().sum(1) * _weight(classifier).square().sum(0)
    count = len(importance)
    order = torch.empty(count, dtype=torch.long)
    order[_in_front(places, count)] = _in_front(leading(importance, len(places)), count)
    slice_weight(dense, order, None)
    slice_weight(classifier, None, order)
    for path in table(model).head_norms:
        slice_weight(model.get_submodule(path), None, order)


def _sort_head_dimensions(model: PreTrainedModel, keep: int) -> None:
    """Move the most important dimensions of every head to its front; the model computes what it did."""
    for layer in layers(model):
        orders = []
        for importance in dimension_importance(layer):
            chosen = [_in_front(leading(row, keep), layer.head_size) for row in importance]
            orders.append(torch.cat([head * layer.head_size + order for head, order in enumerate(chosen)]))
        scored, written = orders
        query, key, value = layer.projections
        for module, order in ((query, scored), (key, scored), (value, written)):
            slice_weight(module, order, None)
        slice_weight(layer.output, None, written)


def _in_front(chosen: Sequence[int], count: int) -> Tensor:
    """All indices below `count`: the chosen ones in front, the others behind them, each in their order."""
    others = sorted(set(range(count)) - set(chosen))
    return torch.tensor([*chosen, *others])


def _continued(pattern: Sequence[int | None], length: int) -> list[int | None]:
    """A pattern cut or repeated to a length, by the shortest period that it has."""
    periods = range(1, len(pattern) + 1)
    period = next(p for p in periods if all(entry == pattern[i % p] for i, entry in enumerate(pattern)))
    return [pattern[index % period] for index in range(length)]


def _query_key_value(layer: Layer) -> list[Tensor]:
    """Weights and biases of query, key and value, each `[A*D, H + 1]`, be they in one Linear or in three."""
    found = [_weight_and_bias(linear) for linear in layer.projections]
    return found if layer.fused == 1 else list(found[0].chunk(3))


def _weight(module: nn.Module) -> Tensor:
    found = plain(module, nn.Embedding) if isinstance(module, nn.Embedding) else plain(module, nn.Linear)
    return found.weight.detach().double()


def _weight_and_bias(module: nn.Module) -> Tensor:
    """`[out, in + 1]`, or `[out, in]` without a bias."""
    linear = plain(module, nn.Linear)
    parts = [linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]]
    return torch.cat(parts, dim=1).detach().double()
