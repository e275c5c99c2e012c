"""One description of a model: what planning, stages, structure.json and the counts of operations know of it.

It needs no weights, so that it tells of a model that exists as well as of one that is yet to be made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import ConfigDict, Field

from edgemin.encoder.families import BY_NAME, LARGEST

# The kinds of quantized layers, by the name that structure.json has.
ProviderName = Literal["integers", "torch_dynamic"]
# The ranges hold for what is read from a file.
Width = Annotated[int, Field(strict=True, ge=1, le=max(LARGEST["hidden"], LARGEST["intermediate"]))]
Rows = Annotated[int, Field(strict=True, ge=0, le=LARGEST["vocabulary"])]
Flag = Annotated[bool, Field(strict=True)]


class Matrix(NamedTuple):
    """A weight matrix: of a Linear `[out, in]`, or of an embedding table `[entries, features]`."""

    place: str  # `embeddings`, the number of a layer from `1`, `head`, or `classifier` for the final Linear
    is_table: bool
    rows: int | None  # `None` where a stage decides it only when it runs
    columns: int | None

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of a matrix whose widths are known."""
        assert self.rows is not None and self.columns is not None, self
        return self.rows, self.columns


class _Form:
    """What is read from a file has these fields and no other."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Bottleneck(_Form):
    """What narrows the feature map for a MobileBERT layer.

    Attributes:
        size: the width inside the layer.
        shared: whether query and key read a bottleneck of their own, and value the feature map.
        attention: whether all three read the one the residual goes through.
    """

    size: Width
    shared: Flag
    attention: Flag


@dataclass(frozen=True)
class LayerOutline(_Form):
    """One transformer layer.

    Attributes:
        heads: attention heads; `None` where a stage decides their number only when it runs.
        head_size: D.
        ffn: units of the feed-forward network; `None` likewise.
        gated: whether the feed-forward network has a second input matrix, its gate.
        window: tokens that a local layer sees, as the configuration's `local_attention` counts them; `None` where all
            are seen.
        attention_norm: `False` where ModernBERT's first layer has none.
        networks: feed-forward networks one after the other, of `ffn` units each; MobileBERT stacks several.
        bottleneck: MobileBERT's, if it has one.
    """

    heads: Width | None
    head_size: Width
    ffn: Width | None
    gated: Flag = False
    window: Width | None = None
    attention_norm: Flag = True
    networks: Width = 1
    bottleneck: Bottleneck | None = None

    @property
    def inner(self) -> int | None:
        """The width inside attention, A*D: all heads side by side."""
        return None if self.heads is None else self.heads * self.head_size


@dataclass(frozen=True)
class QuantizedLayers(_Form):
    """Which layers are quantized, and how.

    Attributes:
        provider: the kind of layers, a name in [`PROVIDERS`][edgemin.encoder.quantized.PROVIDERS].
        layers: how each is quantized, by path; `None` before the stage that quantizes has run.
        shared: what they have in common, as the provider describes it.
    """

    provider: ProviderName
    layers: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] | None = None
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outline(_Form):
    """All that is known of a model besides its weights.

    Attributes:
        family: as [`family`][edgemin.encoder.families.family] names it.
        hidden: H; of MobileBERT the width of the feature maps between its layers.
        vocabulary: rows of the word embeddings; `None` where a stage decides their number only when it runs.
        positions: rows of the position embeddings, 0 without any.
        token_types: rows of the embeddings of token types, 0 without any.
        embedding: the width of the word embeddings.
        labels: C, the outputs of the head; `None` where the task's head is yet to be attached.
        layers: the transformer layers, first to last.
        projection: whether a Linear takes the embeddings to the hidden size.
        trigram: whether that Linear reads each token with both its neighbours (MobileBERT).
        head: inputs and outputs of the Linears of pooler and classifier, in the order they run.
        quantized: which layers are quantized; `None` in a float model.
        max_tokens: tokens of the longest input; `None` as read from a structure.json, which does not hold it.
        tokenizer: a hash of what decides the tokens it reads, or, where a stage decides them only when it runs, of what
            will decide them; `None` without a tokenizer.
    """

    family: str
    hidden: Width
    vocabulary: Annotated[int, Field(strict=True, ge=1, le=LARGEST["vocabulary"])] | None
    positions: Rows
    token_types: Rows
    embedding: Width
    labels: Width | None
    layers: Annotated[tuple[LayerOutline, ...], Field(min_length=1, max_length=LARGEST["layers"])]
    projection: Flag = False
    trigram: Flag = False
    head: tuple[tuple[Width, Width], ...] = ()
    quantized: QuantizedLayers | None = None
    max_tokens: int | None = None
    tokenizer: str | None = None

    @property
    def provider(self) -> ProviderName | None:
        """The kind of its quantized layers; `None` in a float model."""
        return None if self.quantized is None else self.quantized.provider

    def width(self, layer: LayerOutline) -> int:
        """The width that attention of a layer adds its output to: the hidden size, or that of its bottleneck."""
        return self.hidden if layer.bottleneck is None else layer.bottleneck.size

    @property
    def is_known(self) -> bool:
        """Whether all its numbers are known, the labels apart."""
        layers = all(layer.heads is not None and layer.ffn is not None for layer in self.layers)
        return layers and self.vocabulary is not None

    def is_cut(self, layer: LayerOutline) -> bool:
        """Whether heads of a layer are gone, or may be: those that are left do not fill its width."""
        return layer.inner != self.width(layer)

    def with_heads(self, heads: Sequence[int | None]) -> Outline:
        """This model with these numbers of heads, one for each layer."""
        pairs = zip(self.layers, heads, strict=True)
        return replace(self, layers=tuple(replace(layer, heads=count) for layer, count in pairs))

    def with_ffn(self, ffn: Sequence[int | None]) -> Outline:
        """This model with these numbers of FFN units, one for each layer."""
        pairs = zip(self.layers, ffn, strict=True)
        return replace(self, layers=tuple(replace(layer, ffn=count) for layer, count in pairs))

    def with_layers(self, count: int) -> Outline:
        """This model with `count` of its layers; which ones is not known, so a width that differs becomes `None`."""
        if count == len(self.layers):
            return self
        first = self.layers[0]
        heads = first.heads if len({layer.heads for layer in self.layers}) == 1 else None
        ffn = first.ffn if len({layer.ffn for layer in self.layers}) == 1 else None
        left = tuple(replace(layer, heads=heads, ffn=ffn) for layer in self.layers[:count])
        held = self.quantized and replace(self.quantized, layers=None)
        return replace(self, layers=left, quantized=held)

    def with_hidden(self, hidden: int) -> Outline:
        """This model with this hidden size, in its head too; embeddings that a projection follows keep their width."""
        head = tuple(
            (hidden, outputs if index == len(self.head) - 1 else hidden) for index, (_, outputs) in enumerate(self.head)
        )
        return replace(self, hidden=hidden, embedding=self.embedding if self.projection else hidden, head=head)

    def with_labels(self, labels: int) -> Outline:
        """This model with a head for this number of labels."""
        return replace(self, labels=labels, head=(*self.head[:-1], (self.head[-1][0], labels)))

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """The weight matrices that a forward multiplies by or looks up in, by path, in the order of a forward."""
        family = BY_NAME[self.family]
        # A projection is behind all tables, or, of MobileBERT, behind that of the words alone.
        beside_words = self.hidden if family.bottleneck is not None else self.embedding
        rows = {family.words: self.vocabulary, family.positions: self.positions, family.token_types: self.token_types}
        found = {
            path: Matrix("embeddings", True, count, self.embedding if path == family.words else beside_words)
            for path, count in rows.items()
            if path is not None
        }
        if self.projection:
            assert family.projection is not None
            read = self.embedding * (3 if self.trigram else 1)
            found[family.projection] = Matrix("embeddings", False, self.hidden, read)
        for index, layer in enumerate(self.layers):
            for path, outputs, inputs in self._linears(layer):
                found[f"{family.layers}.{index}.{path}"] = Matrix(str(index + 1), False, outputs, inputs)
        # A MobileBERT may lack the first, its pooler's.
        for path, (inputs, outputs) in zip(family.head[-len(self.head) :], self.head, strict=True):
            found[path] = Matrix("classifier" if path == family.classifier else "head", False, outputs, inputs)
        return found

    def _linears(self, layer: LayerOutline) -> Iterator[tuple[str, int | None, int | None]]:
        """Path in the layer, outputs and inputs of its Linears."""
        family, width, inner = BY_NAME[self.family], self.width(layer), layer.inner
        bottleneck = layer.bottleneck
        for path in family.projections:
            reads_map = bottleneck is not None and not bottleneck.attention and path == family.projections[-1]
            outputs = None if inner is None else inner * 3 // len(family.projections)
            yield path, outputs, self.hidden if reads_map else width
        yield family.output, width, inner
        yield family.ffn_in, None if layer.ffn is None else layer.ffn * (2 if layer.gated else 1), width
        yield family.ffn_out, width, layer.ffn
        if bottleneck is not None:
            yield f"{family.ffn_out.partition('.')[0]}.bottleneck.dense", self.hidden, width
            for name in ("input", "attention") if bottleneck.shared else ("input",):
                yield f"{family.bottleneck}.{name}.dense", width, self.hidden
        for number in range(layer.networks - 1):
            yield f"{family.stacked}.{number}.{family.ffn_in}", layer.ffn, width
            yield f"{family.stacked}.{number}.{family.ffn_out}", width, layer.ffn
