"""The outline of a model, and how to build a model from one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from edgemin.encoder.families import Family, table
from edgemin.encoder.outline import LayerOutline, Outline
from edgemin.encoder.parts import (
    GLOBAL,
    LOCAL,
    Layer,
    has_projection,
    head_linears,
    hidden_size,
    layers,
    vocabulary_size,
)
from edgemin.errors import UserError

# What transformers calls kinds of task.
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


def outline(model: PreTrainedModel) -> Outline:
    """Every width of the model, read from its modules; of quantized layers see `quantized.outline`.

    Only `in_features`, `out_features`, `num_embeddings` and `embedding_dim` are read, so that layers
    without a float weight (torch's dynamic INT8) describe themselves too.

    Args:
        model: A sequence classification model of a known family.
    """
    family = table(model)
    head = [model.get_submodule(path) for path in head_linears(model)]
    return Outline(
        family=family.name,
        hidden=hidden_size(model),
        vocabulary=vocabulary_size(model),
        positions=_rows(model, family.positions),
        token_types=_rows(model, family.token_types),
        embedding=cast(int, model.get_submodule(family.words).embedding_dim),
        labels=cast(int, head[-1].out_features),
        layers=tuple(
            LayerOutline(
                heads=layer.heads,
                head_size=layer.head_size,
                ffn=layer.ffn,
                gated=family.gated,
                window=model.config.local_attention if layer.local else None,
                attention_norm=layer.has_attention_norm,
                networks=layer.networks,
                bottleneck=layer.bottleneck,
            )
            for layer in layers(model)
        ),
        projection=has_projection(model),
        trigram=family.bottleneck is not None and model.config.trigram_input,
        head=tuple((cast(int, linear.in_features), cast(int, linear.out_features)) for linear in head),
        max_tokens=_max_tokens(model, family),
    )


def build(config: PreTrainedConfig, outline: Outline | None = None) -> PreTrainedModel:
    """Build a sequence classification model with fresh weights.

    They are drawn as Hugging Face draws them, from the global generator.

    Args:
        config: The configuration of a known family; it is copied.
        outline: Of a model whose numbers are all known. Layers may differ from one another; it wins over the
            configuration. `None` builds what the configuration says.

    Returns:
        The model; a state dict of any model of this outline fits it strictly.

    Raises:
        UserError: unknown architecture, a MobileBERT that Hugging Face's code cannot run, or outline and
            configuration are of two families.
    """
    config = copy.deepcopy(config)
    family = table(config)
    if family.bottleneck is not None:
        _check_bottleneck(config)
    if outline is None:
        return _from_config(config)
    if outline.family != family.name:
        raise UserError(f"structure: expected family {family.name}, given {outline.family}")
    named = {key: getattr(config, key) for key in ("num_attention_heads", family.ffn_key)}
    _set_frame(config, family, outline)
    model = _from_config(config)
    for key, value in named.items():
        setattr(model.config, key, value)
    if outline.projection and not has_projection(model):
        # Hugging Face decides by comparing two widths, which slicing may have made equal.
        assert family.projection is not None
        projection = nn.Linear(outline.embedding, outline.hidden, dtype=model.dtype)
        projection.apply(model._init_weights)
        model.set_submodule(family.projection, projection)
    for layer, wanted in zip(layers(model), outline.layers, strict=True):
        _shape_layer(layer, wanted)
        layer.module.apply(model._init_weights)
    sync_config(model)
    return model


def attach_head(
    model: PreTrainedModel, labels: Sequence[str], problem_type: ProblemType = "single_label_classification"
) -> None:
    """Replace the final Linear by a fresh one for these labels, in place; the configuration learns them.

    Weights are drawn as Hugging Face draws them, from the global generator. Pooler and dense layers stay.

    Args:
        model: A sequence classification model of a known family.
        labels: Label names, in the order of the logits, at least one.
        problem_type: What transformers calls the kind of task.

    Raises:
        UserError: labels that repeat.
    """
    labels = [str(label) for label in labels]
    assert labels, "a head has outputs"
    if len(set(labels)) != len(labels):
        raise UserError(f"labels: expected distinct names, given {labels}")
    path = table(model).classifier
    _replace_linear(model, path, cast(int, model.get_submodule(path).in_features), len(labels))
    model.get_submodule(path).apply(model._init_weights)
    # Some families give the classifier an initialization of its own, through the module that owns it.
    model._init_weights(model.get_submodule(path.rpartition(".")[0]))
    cast(Any, model).num_labels = len(labels)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}
    model.config.problem_type = problem_type


def silence_padding(model: PreTrainedModel) -> None:
    """Zero the padding token's embedding, in place, where the token next to it reads it: then padding changes nothing.

    MobileBERT reads trigrams. As Hugging Face runs it, the last token of a sentence has the padding token beside it
    in a padded batch, and zeros in one without padding; so its logits would depend on the lengths of the other
    sentences. Fresh weights are zero there, published ones are not, and only a decoder tied to the words moves them.
    """
    words = cast(nn.Embedding, model.get_submodule(table(model).words))
    if getattr(model.config, "trigram_input", False) and words.padding_idx is not None:
        with torch.no_grad():
            words.weight[words.padding_idx] = 0


def sync_config(model: PreTrainedModel) -> None:
    """Write into the configuration what it can express of the model; uneven layers it cannot."""
    family, config, found = table(model), model.config, layers(model)
    config.hidden_size = hidden_size(model)
    config.num_hidden_layers = len(found)
    config.vocab_size = vocabulary_size(model)
    if family.embedding_key is not None:
        setattr(config, family.embedding_key, model.get_submodule(family.words).embedding_dim)
    if len({layer.ffn for layer in found}) == 1:
        setattr(config, family.ffn_key, found[0].ffn)
    heads = {(layer.heads, layer.inner) for layer in found}
    if heads == {(found[0].heads, found[0].width)}:
        config.num_attention_heads = found[0].heads
    if family.rotary:
        # What the rotary embedding's frequencies are made for, where the other two widths do not give it.
        if found[0].head_size != config.hidden_size // config.num_attention_heads:
            config.head_dim = found[0].head_size
        elif hasattr(config, "head_dim"):
            del config.head_dim
        config.layer_types = [LOCAL if layer.local else GLOBAL for layer in found]


def _set_frame(config: PreTrainedConfig, family: Family, outline: Outline) -> None:
    """Configure all but the insides of the layers, which are made as small as possible because they are replaced."""
    config.hidden_size = outline.hidden
    config.vocab_size = outline.vocabulary
    config.num_hidden_layers = len(outline.layers)
    config.num_attention_heads = 1  # divides any hidden size
    setattr(config, family.ffn_key, 1)
    if outline.positions:
        config.max_position_embeddings = outline.positions
    if outline.token_types:
        config.type_vocab_size = outline.token_types
    if family.embedding_key is not None:
        setattr(config, family.embedding_key, outline.embedding)
    assert outline.labels is not None
    if config.num_labels != outline.labels:
        config.num_labels = outline.labels
    if family.rotary:
        config.head_dim = outline.layers[0].head_size
        config.layer_types = [GLOBAL if layer.window is None else LOCAL for layer in outline.layers]
    if family.bottleneck is not None:
        _set_bottleneck(config, outline)


def _set_bottleneck(config: PreTrainedConfig, outline: Outline) -> None:
    """Configure what all layers of a MobileBERT have in common."""
    layer = outline.layers[0]
    bottleneck = layer.bottleneck
    config.trigram_input = outline.trigram
    config.num_feedforward_networks = layer.networks
    config.intermediate_size = layer.ffn  # of the stacked networks, which are not replaced
    config.use_bottleneck = bottleneck is not None
    config.true_hidden_size = outline.hidden
    if bottleneck is not None:
        config.intra_bottleneck_size = config.true_hidden_size = bottleneck.size
        config.key_query_shared_bottleneck = bottleneck.shared
        config.use_bottleneck_attention = bottleneck.attention


def _check_bottleneck(config: PreTrainedConfig) -> None:
    """Refuse a MobileBERT whose query and key have no bottleneck: they would read feature maps of another width."""
    reads_maps = config.use_bottleneck and not (config.key_query_shared_bottleneck or config.use_bottleneck_attention)
    if reads_maps and config.intra_bottleneck_size != config.hidden_size:
        raise UserError(
            "key_query_shared_bottleneck: expected true where the bottleneck's width "
            f"{config.intra_bottleneck_size} is not the hidden size {config.hidden_size}, given false"
        )


def _shape_layer(layer: Layer, wanted: LayerOutline) -> None:
    """Give a layer its heads and FFN units; the widths it has in common with its neighbours are there already."""
    family = layer.family
    inner = wanted.inner
    assert inner is not None and wanted.ffn is not None, "the numbers of heads and FFN units are known"
    for path in family.projections:
        _replace_linear(layer.module, path, _inputs(layer, path), layer.fused * inner)
    _replace_linear(layer.module, family.output, inner, layer.width)
    _replace_linear(layer.module, family.ffn_in, _inputs(layer, family.ffn_in), wanted.ffn * (2 if family.gated else 1))
    _replace_linear(layer.module, family.ffn_out, wanted.ffn, layer.width)
    layer.note_heads(wanted.head_size)
    if family.attention_norm is not None and wanted.attention_norm != layer.has_attention_norm:
        norm = copy.deepcopy(layer.part(family.norms[-1])) if wanted.attention_norm else nn.Identity()
        layer.module.set_submodule(family.attention_norm, norm)


def _from_config(config: PreTrainedConfig) -> PreTrainedModel:
    return cast(PreTrainedModel, AutoModelForSequenceClassification.from_config(config))


def _replace_linear(owner: nn.Module, path: str, inputs: int, outputs: int) -> None:
    old = owner.get_submodule(path)
    if not isinstance(old, nn.Linear):
        raise UserError(f"model: expected a float Linear at {path}, given {type(old).__name__}")
    weight = old.weight
    new = nn.Linear(inputs, outputs, bias=old.bias is not None, device=weight.device, dtype=weight.dtype)
    owner.set_submodule(path, new.train(old.training))


def _inputs(layer: Layer, path: str) -> int:
    return cast(int, layer.part(path).in_features)


def _max_tokens(model: PreTrainedModel, family: Family) -> int:
    """The longest input the position embedding (or, with rotary ones, the configuration) allows."""
    if family.positions is None:
        return cast(int, model.config.max_position_embeddings)
    rows = _rows(model, family.positions)
    return rows - (model.config.pad_token_id + 1) if family.positions_follow_padding else rows


def _rows(model: PreTrainedModel, path: str | None) -> int:
    return 0 if path is None else cast(int, model.get_submodule(path).num_embeddings)
