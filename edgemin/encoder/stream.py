"""The residual stream of H units between the layers: what writes to it, what reads it, which norms it passes."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import nn
from transformers import PreTrainedModel

from edgemin.encoder.families import check_hidden, table
from edgemin.encoder.parts import has_projection, head_linears, hidden_size, layers
from edgemin.errors import UserError

_Kind = TypeVar("_Kind", bound=nn.Module)


class Read(NamedTuple):
    """A Linear that reads the stream, and the norm whose output it reads; `None` where it reads the stream bare."""

    linear: nn.Linear
    norm: nn.LayerNorm | None


class Stream(NamedTuple):
    """Everything whose weights have the stream's units as rows or columns."""

    tables: list[nn.Embedding]  # embeddings, whose columns are the units; none where a projection follows them
    writers: list[nn.Linear]  # their rows are the units
    reads: list[Read]  # in the layers; their columns are the units
    head: Read  # the head's first Linear
    carried: list[nn.LayerNorm]  # norms whose output goes on as the stream itself
    aside: list[nn.LayerNorm]  # norms whose output is only read


def stream(model: PreTrainedModel) -> Stream:
    """Find a model's residual stream through its family's table.

    Raises:
        UserError: the family's layers have a width of their own (MobileBERT), or one of the modules is no plain
            float layer.
    """
    family = table(model)
    check_hidden(family.name, hidden_size(model))
    tables, writers, embedded = _embeddings(model)
    reads: list[Read] = []
    behind: list[nn.LayerNorm] = []  # norms behind attention or FFN, as BERT has them
    in_front: list[nn.LayerNorm] = []  # of attention, FFN or head, as ModernBERT has them
    now = embedded
    for index, layer in enumerate(layers(model)):
        first, second = (_norm(layer.module, path) for path in family.norms)
        found = [norm for norm in (first, second) if norm is not None]
        if family.attention_norm is None:
            read_by_attention, read_by_ffn, now = now, first, second
            behind += found
        else:
            # Only ModernBERT's first layer lacks a norm: there, the embeddings' own stands in front of it.
            read_by_attention, read_by_ffn, now = first or (embedded if index == 0 else None), second, None
            in_front += found
        reads += [Read(plain(layer.part(path), nn.Linear), read_by_attention) for path in family.projections]
        reads.append(Read(plain(layer.part(family.ffn_in), nn.Linear), read_by_ffn))
        writers += [plain(layer.part(path), nn.Linear) for path in (family.output, family.ffn_out)]
    if family.final_norm is not None:
        now = plain(model.get_submodule(family.final_norm), nn.LayerNorm)
        in_front.append(now)
    head = Read(plain(model.get_submodule(head_linears(model)[0]), nn.Linear), now)
    carried = [*([embedded] if embedded is not None else []), *behind]
    return Stream(tables, writers, reads, head, carried, in_front)


def plain(module: nn.Module, kind: type[_Kind]) -> _Kind:
    """A module that is exactly of this kind, so that its `weight` is all there is to it.

    Raises:
        UserError: it is not, as after quantization.
    """
    if type(module) is not kind:
        given = f"{type(module).__module__}.{type(module).__name__}"
        raise UserError(f"model: expected plain float layers to be weighed, given {given}; cut before quantizing")
    return module


def _embeddings(model: PreTrainedModel) -> tuple[list[nn.Embedding], list[nn.Linear], nn.LayerNorm | None]:
    """The modules that first write to the stream, and the norm at its beginning."""
    family = table(model)
    if has_projection(model):
        assert family.projection is not None
        return [], [plain(model.get_submodule(family.projection), nn.Linear)], None
    paths = [path for path in (family.words, family.positions, family.token_types) if path is not None]
    tables = [plain(model.get_submodule(path), nn.Embedding) for path in paths]
    return tables, [], plain(model.get_submodule(family.embedding_norm), nn.LayerNorm)


def _norm(owner: nn.Module, path: str) -> nn.LayerNorm | None:
    module = owner.get_submodule(path)
    return None if isinstance(module, nn.Identity) else plain(module, nn.LayerNorm)
