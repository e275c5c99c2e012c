"""A model's parts, found through its family's table: layers and their widths, the head, the embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from edgemin.encoder.families import Family, table
from edgemin.encoder.outline import Bottleneck
from edgemin.errors import UserError

LOCAL, GLOBAL = "sliding_attention", "full_attention"


class Layer:
    """One transformer layer seen through its family's table; widths are read from its modules."""

    def __init__(self, module: nn.Module, family: Family) -> None:
        self.module = module
        self.family = family

    def part(self, path: str) -> nn.Module:
        """The submodule at a path of the table."""
        return self.module.get_submodule(path)

    @property
    def projections(self) -> list[nn.Module]:
        """The query, key and value Linears, or the one that holds all three."""
        return [self.part(path) for path in self.family.projections]

    @property
    def fused(self) -> int:
        """How many of query, key and value one projection holds: 1 or 3."""
        return 3 // len(self.family.projections)

    @property
    def output(self) -> nn.Module:
        """The Linear that projects the heads' outputs back to the layer's width."""
        return self.part(self.family.output)

    @property
    def width(self) -> int:
        """The width that attention adds its output to: the hidden size H, or that of a bottleneck."""
        return cast(int, self.output.out_features)

    @property
    def inner(self) -> int:
        """The width inside attention, A*D: all heads side by side."""
        return cast(int, self.output.in_features)

    @property
    def head_size(self) -> int:
        """The size D of one attention head."""
        return cast(int, getattr(self.part(self.family.attention), self.family.head_size))

    @property
    def heads(self) -> int:
        """The number A of attention heads in the layer."""
        return self.inner // self.head_size

    @property
    def ffn(self) -> int:
        """Number of FFN units, of each network where several are stacked."""
        return cast(int, self.part(self.family.ffn_out).in_features)

    @property
    def networks(self) -> int:
        """Number of feed-forward networks, one after the other."""
        stacked = getattr(self.module, self.family.stacked, ()) if self.family.stacked is not None else ()
        return 1 + len(stacked)

    @property
    def bottleneck(self) -> Bottleneck | None:
        """The bottleneck in front of a MobileBERT layer."""
        found = getattr(self.module, self.family.bottleneck, None) if self.family.bottleneck is not None else None
        if found is None:
            return None
        size = cast(int, found.get_submodule("input.dense").out_features)
        return Bottleneck(size, found.key_query_shared_bottleneck, found.use_bottleneck_attention)

    @property
    def local(self) -> bool:
        """Whether attention sees only a window."""
        return getattr(self.module, "attention_type", GLOBAL) == LOCAL

    @property
    def has_attention_norm(self) -> bool:
        """Whether a norm stands in front of (or behind) attention: ModernBERT's first layer has none."""
        path = self.family.attention_norm
        return path is None or not isinstance(self.part(path), nn.Identity)

    def note_heads(self, head_size: int) -> None:
        """Bring the attention module's own numbers in step with its Linears, the score's scale included."""
        attention = self.part(self.family.attention)
        setattr(attention, self.family.head_size, head_size)
        if hasattr(attention, "scaling"):
            attention.scaling = head_size**-0.5
        if self.family.head_count is not None:
            setattr(attention, self.family.head_count, self.heads)
        if self.family.inner_width is not None:
            setattr(attention, self.family.inner_width, self.inner)


def layers(model: PreTrainedModel) -> list[Layer]:
    """The model's layers, first to last."""
    family = table(model)
    return [Layer(module, family) for module in model.get_submodule(family.layers).children()]


def layer_at(model: PreTrainedModel, index: int) -> Layer:
    """One layer, counted from 0.

    Raises:
        UserError: the model has no such layer (the message counts from 1).
    """
    found = layers(model)
    if not 0 <= index < len(found):
        raise UserError(f"layer: expected 1 to {len(found)}, the layers the model has, given {index + 1}")
    return found[index]


def num_layers(model: PreTrainedModel) -> int:
    """Number of transformer layers L."""
    return len(layers(model))


def heads(model: PreTrainedModel) -> list[int]:
    """Attention heads that each layer still has, first layer first."""
    return [layer.heads for layer in layers(model)]


def hidden_size(model: PreTrainedModel) -> int:
    """Hidden size H, the width of the residual stream: what the head reads."""
    return cast(int, model.get_submodule(head_linears(model)[0]).in_features)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the word embeddings."""
    return cast(int, model.get_submodule(table(model).words).num_embeddings)


def has_projection(model: PreTrainedModel) -> bool:
    """Whether a Linear takes the embeddings to the hidden size (some ELECTRA, MobileBERT)."""
    path = table(model).projection
    if path is None:
        return False
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    if not hasattr(owner, name):
        return False
    # MobileBERT always has its Linear, and runs it for trigrams or between different widths.
    linear = owner.get_submodule(name)
    return bool(getattr(owner, "trigram_input", True) or linear.in_features != linear.out_features)


def head_linears(model_or_config: PreTrainedModel | PretrainedConfig) -> tuple[str, ...]:
    """Paths of the Linears of pooler and classifier, in the order they run, as far as this model has them."""
    family = table(model_or_config)
    is_model = isinstance(model_or_config, PreTrainedModel)
    config = model_or_config.config if is_model else model_or_config
    if family.pooler_key is None or getattr(config, family.pooler_key):
        return family.head
    return family.head[1:]


def parameters_by_depth(model: PreTrainedModel) -> list[list[nn.Parameter]]:
    """All parameters in the order of a forward: the embeddings', those of each layer, and last what follows them."""
    found: list[list[nn.Parameter]] = [[] for _ in range(num_layers(model) + 2)]
    for name, parameter in model.named_parameters():
        found[_depth(model, name)].append(parameter)
    return found


def silence_frozen(model: PreTrainedModel) -> None:
    """Put embeddings and layers of which no parameter learns in eval mode, so that their dropout adds no noise."""
    frozen = [not any(parameter.requires_grad for parameter in group) for group in parameters_by_depth(model)]
    for name, module in model.named_modules():
        if frozen[_depth(model, name)]:
            module.training = False


def _depth(model: PreTrainedModel, name: str) -> int:
    """Where a parameter or module of this name runs: 0 embeddings, l layer l, one more what follows the layers."""
    family = table(model)
    if name.startswith(f"{family.layers}."):
        return int(name.removeprefix(f"{family.layers}.").partition(".")[0]) + 1
    behind = head_prefixes(model) if family.final_norm is None else (*head_prefixes(model), family.final_norm)
    return num_layers(model) + 1 if name.startswith(behind) else 0


def head_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """Parameter-name prefixes of the classification head, pooler and dense layer included.

    Made for `name.startswith(head_prefixes(model))`.
    """
    return table(model).head_prefixes


def in_layers(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The names of a file's tensors that belong to layers, with or without the base model's name in front."""
    layers = table(model).layers
    short = layers.partition(".")[2]
    return [name for name in names if name.startswith((f"{layers}.", f"{short}."))]


def classifier_prefix(model: PreTrainedModel) -> str:
    """Name of the final Linear, e.g. `classifier` or `classifier.out_proj`."""
    return table(model).classifier


def head_parts(config: PretrainedConfig) -> tuple[str, ...]:
    """How the names of the head's modules end, the final Linear apart: what a bare encoder's checkpoint may lack."""
    return tuple(".".join(path.split(".")[-2:]) for path in head_linears(config)[:-1])


def label_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The labels of a model's head, in the order of the logits."""
    names = model.config.id2label or {}
    return tuple(str(name) for _, name in sorted(names.items()))
