"""The residual stream of H units between the layers: what writes to it, what reads it, which norms it runs through."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from edgemin.encoder.families import table
from edgemin.encoder.parts import has_projection, head_linears, hidden_size, layers
from edgemin.errors import UserError


class Read(NamedTuple):
    """A Linear that reads the stream, and the norm whose output it reads; ``None`` where it reads the stream bare."""

    linear: nn.Linear
    norm: nn.LayerNorm | None


class Stream(NamedTuple):
    """Everything that one choice of basis for the stream concerns.

    Attributes:
        tables: embeddings whose columns are the stream's units: none where a projection follows them.
        writers: Linears whose rows are the stream's units.
        reads: of all layers, Linears whose columns are the stream's units.
        head: the same of the head's first Linear.
        norms: every norm over the stream's units.
        carried: those of them whose output is the stream itself from there on, and not only read.
    """

    tables: list[nn.Embedding]
    writers: list[nn.Linear]
    reads: list[Read]
    head: Read
    norms: list[nn.LayerNorm]
    carried: list[nn.LayerNorm]


def stream(model: PreTrainedModel) -> Stream:
    """Find a model's residual stream through its family's table.

    Raises:
        UserError: the family's layers have a width of their own (MobileBERT); something of it is no plain float layer,
            as after quantisation.
    """
    family = table(model)
    if family.bottleneck is not None:
        raise UserError(
            f"hidden: cannot be cut for {family.name}, whose feature maps of {hidden_size(model)} units are tied by "
            "bottlenecks to another width inside the layers"
        )
    tables: list[nn.Embedding] = []
    writers: list[nn.Linear] = []
    now: nn.LayerNorm | None = None
    if has_projection(model):
        assert family.projection is not None
        writers.append(_linear(model, family.projection))
    else:
        paths = (family.words, family.positions, family.token_types)
        tables += [_table(model, path) for path in paths if path is not None]
        now = _norm(model, family.embedding_norm)
    embedded = now
    reads: list[Read] = []
    inside: list[nn.LayerNorm] = []
    for index, layer in enumerate(layers(model)):
        first, second = (_norm(layer.module, path) for path in family.norms)
        before_attention, before_ffn = now, first
        if family.attention_norm is not None:  # norms stand in front, and only ModernBERT's first layer may lack one
            before_attention, before_ffn = first or (embedded if index == 0 else None), second
        reads += [Read(_linear(layer.module, path), before_attention) for path in family.projections]
        reads.append(Read(_linear(layer.module, family.ffn_in), before_ffn))
        writers += [_linear(layer.module, family.output), _linear(layer.module, family.ffn_out)]
        inside += [norm for norm in (first, second) if norm is not None]
        now = second
    carried = [embedded] if embedded is not None else []
    if family.final_norm is not None:
        now = _norm(model, family.final_norm)
        assert now is not None
        inside.append(now)
    else:
        carried += inside
    norms = [*([embedded] if embedded is not None else []), *inside]
    return Stream(tables, writers, reads, Read(_linear(model, head_linears(model)[0]), now), norms, carried)


def _linear(owner: nn.Module, path: str) -> nn.Linear:
    module = owner.get_submodule(path)
    if type(module) is not nn.Linear:
        raise UserError(_refusal(module))
    return module


def _table(owner: nn.Module, path: str) -> nn.Embedding:
    module = owner.get_submodule(path)
    if type(module) is not nn.Embedding:
        raise UserError(_refusal(module))
    return module


def _norm(owner: nn.Module, path: str) -> nn.LayerNorm | None:
    module = owner.get_submodule(path)
    if isinstance(module, nn.Identity):
        return None
    if type(module) is not nn.LayerNorm:
        raise UserError(_refusal(module))
    return module


def _refusal(module: nn.Module) -> str:
    kind = f"{type(module).__module__}.{type(module).__name__}"
    return f"truncate: expected plain float layers to weigh or turn, given {kind}; cut before quantising"
