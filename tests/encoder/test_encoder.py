"""Slicing, reading and rebuilding tiny models of every family."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    MobileBertConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
    XLMRobertaConfig,
)

from edgemin.encoder import building, families, slicing, structure_file, taps
from edgemin.encoder.outline import Outline
from edgemin.encoder.parts import classifier_prefix, head_linears, head_prefixes, heads, num_layers, parameters_by_depth
from edgemin.errors import UserError

LAYERS, HEADS, HEAD_SIZE, HIDDEN, FFN, VOCABULARY = 3, 4, 8, 32, 48, 100
FEATURES = 40  # MobileBERT's hidden size, while HIDDEN is the width of its bottlenecks
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
ROBERTA_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
MODERNBERT_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(**COMMON),
    "electra": lambda: ElectraConfig(embedding_size=16, **COMMON),
    "electra-wide": lambda: ElectraConfig(embedding_size=HIDDEN, **COMMON),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=HIDDEN,
        n_layers=LAYERS,
        n_heads=HEADS,
        hidden_dim=FFN,
        max_position_embeddings=40,
        num_labels=3,
    ),
    "roberta": lambda: RobertaConfig(type_vocab_size=1, **ROBERTA_TOKENS, **COMMON),
    "xlm-roberta": lambda: XLMRobertaConfig(type_vocab_size=1, **ROBERTA_TOKENS, **COMMON),
    "modernbert": lambda: ModernBertConfig(local_attention=4, **MODERNBERT_TOKENS, **COMMON),
    "modernbert-bias": lambda: ModernBertConfig(
        local_attention=4,
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        classifier_bias=True,
        classifier_pooling="mean",
        **MODERNBERT_TOKENS,
        **COMMON,
    ),
    # feature maps wider than the bottlenecks, in which the heads have the same widths as everywhere
    "mobilebert": lambda: MobileBertConfig(
        embedding_size=12, intra_bottleneck_size=HIDDEN, **COMMON | {"hidden_size": FEATURES}
    ),
    "mobilebert-norm": lambda: MobileBertConfig(
        embedding_size=12,
        intra_bottleneck_size=HIDDEN,
        num_feedforward_networks=1,
        normalization_type="layer_norm",
        use_bottleneck_attention=True,
        key_query_shared_bottleneck=False,
        classifier_activation=False,
        trigram_input=False,
        hidden_act="gelu",
        **COMMON | {"hidden_size": FEATURES},
    ),
}
FAMILIES = list(CONFIGS)
MOBILE = [name for name in FAMILIES if name.startswith("mobilebert")]
ONE_WIDTH = [name for name in FAMILIES if name not in MOBILE]  # through all layers: it can be cut
ONE_FFN = [name for name in FAMILIES if name != "mobilebert"]  # in each layer: its units can be cut
TYPED = ("bert", "electra", "electra-wide", *MOBILE)  # those that tell token types apart
BERT_LAYER = {
    "projections": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "output": "attention.output.dense",
    "ffn_out": "output.dense",
}
PATHS: dict[str, dict[str, Any]] = {
    "bert": {"layers": "bert.encoder.layer", "classifier": "classifier", **BERT_LAYER},
    "electra": {"layers": "electra.encoder.layer", "classifier": "classifier.out_proj", **BERT_LAYER},
    "roberta": {"layers": "roberta.encoder.layer", "classifier": "classifier.out_proj", **BERT_LAYER},
    "mobilebert": {"layers": "mobilebert.encoder.layer", "classifier": "classifier", **BERT_LAYER},
    "distilbert": {
        "layers": "distilbert.transformer.layer",
        "classifier": "classifier",
        "projections": ["attention.q_lin", "attention.k_lin", "attention.v_lin"],
        "output": "attention.out_lin",
        "ffn_out": "ffn.lin2",
    },
    "modernbert": {
        "layers": "model.layers",
        "classifier": "classifier",
        "projections": ["attn.Wqkv"],
        "output": "attn.Wo",
        "ffn_out": "mlp.Wo",
    },
}


def make(name: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model in eval mode whose weights are large enough for every part to matter."""
    torch.manual_seed(seed)
    model = building.build(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.1 if name == "mobilebert" else 0.3)  # without norms it would explode
    return model.eval()


def some_batch(model: PreTrainedModel, seed: int = 1) -> dict[str, Tensor]:
    """Three sentences of 12, 9 and 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([12, 9, 5])
    mask = (torch.arange(12)[None] < lengths[:, None]).long()
    ids = torch.randint(5, VOCABULARY, (3, 12), generator=generator)
    token_types = (torch.arange(12)[None] >= 4).long().expand(3, 12) * mask
    padding = model.config.pad_token_id
    return {
        "input_ids": torch.where(mask.bool(), ids, padding),
        "attention_mask": mask,
        "token_type_ids": token_types,
    }


def layer_part(model: PreTrainedModel, layer: int, path: str = "") -> nn.Module:
    """A part of a layer, or the layer itself."""
    return model.get_submodule(f"{part_path(model, 'layers')}.{layer}").get_submodule(path)


def hidden_size(name: str) -> int:
    return FEATURES if name in MOBILE else HIDDEN


def part_path(model: PreTrainedModel, name: str) -> Any:
    return PATHS[families.family(model)][name]


@contextmanager
def inputs_masked(*masked: tuple[nn.Module, Tensor]) -> Iterator[None]:
    """Multiply the first input of these modules."""
    with ExitStack() as stack:
        for module, mask in masked:
            stack.enter_context(
                module.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask, *args[1:]))
            )
        yield


@contextmanager
def outputs_mapped(*mapped: tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]) -> Iterator[None]:
    """Replace the output of these modules by a function of their first input and their output."""
    with ExitStack() as stack:
        for module, change in mapped:
            stack.enter_context(module.register_forward_hook(lambda _, args, out, change=change: change(args[0], out)))
        yield


def ones_at(kept: list[int], size: int) -> Tensor:
    mask = torch.zeros(size)
    mask[kept] = 1
    return mask


def logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return taps.logits(model, batch)


def through_json(outline: Outline) -> Outline:
    """What a file keeps of an outline."""
    return structure_file.parsed(json.loads(json.dumps(structure_file.written(outline))), "structure.json")


def assert_rebuilds(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Structure and config go through JSON, the weights through a state dict, and the logits are equal."""
    outline = through_json(building.outline(model))
    config = type(model.config).from_dict(json.loads(model.config.to_json_string()))
    torch.manual_seed(99)
    rebuilt = building.build(config, outline).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert building.outline(rebuilt) == building.outline(model)
    assert torch.equal(logits(rebuilt, batch), logits(model, batch))
    assert rebuilt.config.to_dict() == model.config.to_dict()


# Families


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_and_its_config_name_the_same_family(name: str) -> None:
    model = make(name)
    expected = {"xlm-roberta": "roberta"}.get(name, name.partition("-")[0])
    assert families.family(model) == families.family(model.config) == expected
    assert num_layers(model) == LAYERS
    assert heads(model) == [HEADS] * LAYERS


@pytest.mark.parametrize("config", [GPT2Config(), T5Config()], ids=["gpt2", "t5"])
def test_an_unsupported_architecture_is_refused_with_the_list_of_families(config: PreTrainedConfig) -> None:
    for call in (families.family, building.build):
        with pytest.raises(UserError) as refused:
            call(config)
        line = str(refused.value)
        assert config.model_type in line and "\n" not in line
        for known in ("bert", "MiniLM", "electra", "distilbert", "roberta", "xlm-roberta", "modernbert", "mobilebert"):
            assert known in line


def test_a_model_without_a_classifier_is_refused() -> None:
    with pytest.raises(UserError, match="sequence classification"):
        families.family(BertForMaskedLM(BertConfig(**COMMON)))


@pytest.mark.parametrize("name", FAMILIES)
def test_head_prefixes_name_exactly_the_parameters_outside_embeddings_and_layers(name: str) -> None:
    model = make(name)
    prefixes = head_prefixes(model)
    body = ("embeddings", "encoder.layer", "transformer.layer", "model.layers", "final_norm")
    for parameter, _ in model.named_parameters():
        assert parameter.startswith(prefixes) != any(part in parameter for part in body), parameter
    assert classifier_prefix(model) == part_path(model, "classifier")
    assert model.get_submodule(classifier_prefix(model)).out_features == 3


# Slicing equals masking


@pytest.mark.parametrize("name", FAMILIES)
def test_slicing_heads_equals_masking_their_contexts(name: str) -> None:
    model = make(name)
    batch = some_batch(model)
    kept = {0: [1, 3], 1: [2], 2: [3, 0, 1]}
    masks = {layer: ones_at(heads, HEADS).repeat_interleave(HEAD_SIZE) for layer, heads in kept.items()}
    with inputs_masked(
        *((layer_part(model, layer, part_path(model, "output")), mask) for layer, mask in masks.items())
    ):
        masked = logits(model, batch)
    assert not torch.allclose(masked, logits(model, batch), atol=1e-3)
    for layer, kept_heads in kept.items():
        slicing.slice_heads(model, layer, kept_heads)
    torch.testing.assert_close(logits(model, batch), masked, atol=1e-5, rtol=0)
    assert heads(model) == [2, 1, 3]
    assert_rebuilds(model, batch)


@pytest.mark.parametrize("name", ONE_FFN)
def test_slicing_ffn_units_equals_masking_them(name: str) -> None:
    model = make(name)
    batch = some_batch(model)
    kept = {0: list(range(0, FFN, 3)), 2: [47, 5, 11]}
    with inputs_masked(
        *((layer_part(model, layer, part_path(model, "ffn_out")), ones_at(units, FFN)) for layer, units in kept.items())
    ):
        masked = logits(model, batch)
    assert not torch.allclose(masked, logits(model, batch), atol=1e-3)
    for layer, units in kept.items():
        slicing.slice_ffn(model, layer, units)
    torch.testing.assert_close(logits(model, batch), masked, atol=1e-5, rtol=0)
    assert [layer.ffn for layer in building.outline(model).layers] == [16, FFN, 3]
    assert_rebuilds(model, batch)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kept", [[0, 2], [1, 2], [1]])
def test_slicing_layers_equals_skipping_the_others(name: str, kept: list[int]) -> None:
    model = make(name)
    batch = some_batch(model)
    skipped = [layer_part(model, layer) for layer in range(LAYERS) if layer not in kept]
    with outputs_mapped(*((module, lambda hidden, _: hidden) for module in skipped)):
        expected = logits(model, batch)
    slicing.slice_layers(model, kept)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-6, rtol=0)
    assert num_layers(model) == model.config.num_hidden_layers == len(kept)
    assert_rebuilds(model, batch)


def test_modernbert_layers_take_their_kind_of_attention_and_missing_norm_along() -> None:
    model = make("modernbert")
    assert [layer.window for layer in building.outline(model).layers] == [None, 4, 4]
    slicing.slice_layers(model, [2, 0])
    layers = building.outline(model).layers
    assert [layer.window for layer in layers] == [4, None]
    assert [layer.attention_norm for layer in layers] == [True, False]
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert_rebuilds(model, some_batch(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_slicing_the_vocabulary_keeps_the_logits_of_remapped_ids(name: str) -> None:
    model = make(name)
    batch = some_batch(model)
    batch["input_ids"][batch["input_ids"] >= 60] -= 50
    expected = logits(model, batch)
    kept = [0, 1, 2, *range(59, 2, -1)]
    slicing.slice_vocabulary(model, kept)
    new_ids = {old: new for new, old in enumerate(kept)}
    batch["input_ids"].apply_(lambda old: new_ids[old])
    assert torch.equal(logits(model, batch), expected)
    assert building.outline(model).vocabulary == model.config.vocab_size == 60
    assert_rebuilds(model, batch)


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
def test_slicing_the_vocabulary_moves_the_padding_and_other_special_tokens(name: str) -> None:
    model = make(name)
    expected = logits(model, some_batch(model))
    slicing.slice_vocabulary(model, range(VOCABULARY - 1, -1, -1))
    batch = some_batch(make(name))
    batch["input_ids"] = VOCABULARY - 1 - batch["input_ids"]
    assert torch.equal(logits(model, batch), expected)
    assert model.config.pad_token_id == model.get_input_embeddings().padding_idx == VOCABULARY - 1
    if name == "modernbert":
        assert (model.config.cls_token_id, model.config.sep_token_id) == (98, 97)


@pytest.mark.parametrize("name", ONE_WIDTH)
def test_slicing_hidden_units_equals_norms_over_the_kept_units_in_the_full_model(name: str) -> None:
    model = make(name)
    batch = some_batch(model)
    kept = [31, *range(1, 28, 2)]
    mask = ones_at(kept, HIDDEN)

    def over_kept(norm: nn.LayerNorm) -> Callable[[Tensor, Tensor], Tensor]:
        def change(hidden: Tensor, _: Tensor) -> Tensor:
            mean = (hidden * mask).sum(-1, keepdim=True) / len(kept)
            variance = ((hidden - mean).square() * mask).sum(-1, keepdim=True) / len(kept)
            bias = 0 if norm.bias is None else norm.bias
            return ((hidden - mean) / (variance + norm.eps).sqrt() * norm.weight + bias) * mask

        return change

    changes = [
        (module, over_kept(module))
        for module in model.modules()
        if isinstance(module, nn.LayerNorm) and module.normalized_shape == (HIDDEN,)
    ]
    if name == "electra":
        changes.append((model.get_submodule("electra.embeddings_project"), lambda _, out: out * mask))
    classifier = model.get_submodule(part_path(model, "classifier"))
    with outputs_mapped(*changes), inputs_masked((classifier, mask)):
        expected = logits(model, batch)
    slicing.slice_hidden(model, kept)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=0)
    outline = building.outline(model)
    assert outline.hidden == model.config.hidden_size == len(kept)
    assert outline.head == ((15, 15), (15, 3))
    assert [(layer.heads, layer.head_size) for layer in outline.layers] == [(4, 8)] * LAYERS
    assert_rebuilds(model, batch)


def test_an_electra_projection_survives_a_hidden_size_equal_to_the_embeddings() -> None:
    model = make("electra")
    slicing.slice_hidden(model, range(16))
    outline = building.outline(model)
    assert outline.embedding == outline.hidden == 16 and outline.projection
    assert_rebuilds(model, some_batch(model))


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("modernbert")])
def test_slicing_the_head_size_equals_masking_dimensions_under_the_new_scale(name: str) -> None:
    model = make(name)
    batch = some_batch(model)
    mask = (torch.arange(HEAD_SIZE) < 5).float().repeat(HEADS)
    reference = copy.deepcopy(model)
    projections = [
        layer_part(reference, layer, path) for layer in range(LAYERS) for path in part_path(model, "projections")
    ]
    for module in reference.modules():
        if hasattr(module, "scaling"):
            module.scaling = 5**-0.5
    with outputs_mapped(*((linear, lambda _, out: out * mask) for linear in projections)):
        expected = logits(reference, batch)
    slicing.slice_head_size(model, 5)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=0)
    assert heads(model) == [HEADS] * LAYERS
    assert {layer.head_size for layer in building.outline(model).layers} == {5}
    assert_rebuilds(model, batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_everything_changes_nothing(name: str) -> None:
    model = make(name)
    batch = some_batch(model)
    expected, outline, config = logits(model, batch), building.outline(model), model.config.to_dict()
    slicing.slice_layers(model, range(LAYERS))
    for layer in range(LAYERS):
        slicing.slice_heads(model, layer, range(HEADS))
        if name in ONE_FFN:
            slicing.slice_ffn(model, layer, range(FFN))
    if name in ONE_WIDTH:
        slicing.slice_hidden(model, range(HIDDEN))
    slicing.slice_vocabulary(model, range(VOCABULARY))
    assert torch.equal(logits(model, batch), expected)
    assert building.outline(model) == outline
    assert model.config.to_dict() == config


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_sliced_in_every_way_is_rebuilt_and_trains(name: str) -> None:
    model = make(name)
    slicing.slice_heads(model, 0, [0, 2])
    if name in ONE_FFN:
        slicing.slice_ffn(model, 2, range(7))
    slicing.slice_layers(model, [0, 2])
    if name in ONE_WIDTH:
        slicing.slice_hidden(model, range(3, 30))
    slicing.slice_vocabulary(model, range(90))
    slicing.slice_heads(model, 1, [1])
    batch = some_batch(model)
    batch["input_ids"] %= 90
    assert_rebuilds(model, batch)
    taps.logits(model, batch).sum().backward()
    for parameter, value in model.named_parameters():
        assert value.requires_grad and value.grad is not None, parameter
        assert value.grad.shape == value.shape


def test_even_slices_are_written_into_the_config_and_uneven_ones_are_not() -> None:
    model = make("bert")
    slicing.slice_ffn(model, 0, range(10))
    assert model.config.intermediate_size == FFN
    for layer in (1, 2):
        slicing.slice_ffn(model, layer, range(10))
    assert model.config.intermediate_size == 10
    for layer in range(LAYERS):
        slicing.slice_heads(model, layer, [0, 1])
    assert model.config.num_attention_heads == HEADS  # 2 heads would mean a head size of 16
    slicing.slice_hidden(model, range(16))
    assert (model.config.num_attention_heads, model.config.hidden_size) == (2, 16)
    plain = building.build(model.config).eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    batch = some_batch(model)
    assert torch.equal(logits(plain, batch), logits(model, batch))


def test_frozen_parameters_stay_frozen() -> None:
    model = make("distilbert").requires_grad_(False)
    slicing.slice_heads(model, 0, [0])
    slicing.slice_hidden(model, range(8))
    slicing.slice_vocabulary(model, range(9))
    assert not any(parameter.requires_grad for parameter in model.parameters())


# Mistakes


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        (
            lambda m: slicing.slice_heads(m, 3, [0]),
            "layer: expected 1 to 3, the layers the model has, given 4",
        ),
        (lambda m: slicing.slice_heads(m, -1, [0]), "given 0"),
        (lambda m: slicing.slice_heads(m, 0, []), "keep: expected at least one of 4 heads, given none"),
        (lambda m: slicing.slice_heads(m, 0, [4]), "keep: expected heads from 0 to 3, given 4"),
        (lambda m: slicing.slice_heads(m, 0, [1, 1]), "keep: expected heads once each, given 1 twice"),
        (lambda m: slicing.slice_ffn(m, 0, [-1]), "keep: expected FFN units from 0 to 47, given -1"),
        (lambda m: slicing.slice_ffn(m, 5, [0]), "layer: expected 1 to 3"),
        (lambda m: slicing.slice_layers(m, []), "keep: expected at least one of 3 layers"),
        (lambda m: slicing.slice_layers(m, [3]), "keep: expected layers from 1 to 3, given 4"),
        (lambda m: slicing.slice_hidden(m, [0, 32]), "keep: expected hidden units from 0 to 31, given 32"),
        (lambda m: slicing.slice_vocabulary(m, [0, 100]), "keep: expected token ids from 0 to 99, given 100"),
        (lambda m: slicing.slice_vocabulary(m, [5, 6]), "keep: expected the special token 0 (pad_token_id)"),
        (lambda m: slicing.slice_head_size(m, 0), "head_size: expected 1 to 8, given 0"),
        (lambda m: slicing.slice_head_size(m, 9), "head_size: expected 1 to 8, given 9"),
        (lambda m: taps.read(m, some_batch(m), projections=[3], logits=False), "layer: expected 1 to 3"),
        (lambda m: building.attach_head(m, ["a", "a"]), "labels: expected distinct names"),
        (
            lambda m: building.build(m.config, building.outline(make("roberta"))),
            "structure: expected family bert",
        ),
    ],
)
def test_a_mistake_ends_in_one_line_and_changes_nothing(mistake: Callable[[PreTrainedModel], None], line: str) -> None:
    model = make("bert")
    before, config = building.outline(model), model.config.to_dict()
    with pytest.raises(UserError) as refused:
        mistake(model)
    assert line in str(refused.value) and "\n" not in str(refused.value)
    assert building.outline(model) == before and model.config.to_dict() == config


def test_modernbert_heads_cannot_be_shortened_because_of_their_rotary_embedding() -> None:
    with pytest.raises(UserError, match="rotary"):
        slicing.slice_head_size(make("modernbert"), 4)


def test_roberta_padding_cannot_move_because_positions_are_counted_from_it() -> None:
    with pytest.raises(UserError, match="counts positions"):
        slicing.slice_vocabulary(make("roberta"), [1, 0, 2, 3])


# Reading


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stop", [True, False])
def test_what_is_read_of_layer_l_is_the_projection_of_hidden_state_l(name: str, stop: bool) -> None:
    model = make(name)
    batch = some_batch(model)
    with torch.no_grad():
        reading = taps.read(model, batch, projections=[0, 2], hidden=[0, 2], logits=not stop)
        accepted = {key: value for key, value in batch.items() if key != "token_type_ids" or name in TYPED}
        hidden = model(**accepted, output_hidden_states=True).hidden_states
    assert list(reading.projections) == [0, 2] == list(reading.hidden)
    for layer, stream in reading.hidden.items():
        torch.testing.assert_close(stream, hidden[layer], atol=1e-6, rtol=0)
    for layer, read in reading.projections.items():
        inputs = [hidden[layer]] * 3
        if name.startswith("modernbert"):
            inputs = [layer_part(model, layer, "attn_norm")(hidden[layer])]
        elif name in MOBILE:
            inputs = layer_part(model, layer, "bottleneck")(hidden[layer])[:3]
        linears = [layer_part(model, layer, path) for path in part_path(model, "projections")]
        projected = [linear(given) for linear, given in zip(linears, inputs, strict=True)]
        expected = torch.cat(projected, dim=-1).split(HIDDEN, dim=-1)
        for found, wanted in zip((read.query, read.key, read.value), expected, strict=True):
            assert found.shape == (3, 12, HEADS * HEAD_SIZE)
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    if stop:
        assert reading.logits is None
    else:
        assert reading.logits is not None and torch.equal(reading.logits, logits(model, batch))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stopped_forward_runs_nothing_behind_the_deepest_layer_read(name: str) -> None:
    model = make(name)
    ran: list[tuple[str, int]] = []
    for layer in range(LAYERS):
        for part in ("output", "ffn_out"):
            module = layer_part(model, layer, part_path(model, part))
            module.register_forward_hook(lambda *_, mark=(part, layer): ran.append(mark))
    reading = taps.read(model, some_batch(model), projections=[1, 0], logits=False)
    assert list(reading.projections) == [0, 1]
    assert ran == [("output", 0), ("ffn_out", 0)]
    ran.clear()
    taps.read(model, some_batch(model), projections=[1], logits=True)
    assert len(ran) == 2 * LAYERS
    ran.clear()
    taps.read(model, some_batch(model), hidden=[0, 1], logits=False)
    assert ran == [("output", 0), ("ffn_out", 0)]
    ran.clear()
    taps.read(model, some_batch(model), hidden=[0], logits=False)
    assert ran == []


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stop", [True, False])
def test_reading_leaves_no_hook_and_lets_gradients_flow(name: str, stop: bool) -> None:
    model = make(name)
    batch = some_batch(model)
    before = logits(model, batch)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    read = taps.read(model, batch, projections=[1], logits=not stop).projections[1]
    (read.query.sum() + read.key.sum() + read.value.sum()).backward()
    for path in part_path(model, "projections"):
        assert layer_part(model, 1, path).weight.grad.abs().sum() > 0
        assert layer_part(model, 0, path).weight.grad.abs().sum() > 0
        assert layer_part(model, 2, path).weight.grad is None
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_given_what_another_models_layers_make_goes_on_from_there(name: str, layer: int) -> None:
    model, other = make(name), make(name, seed=7)
    batch = some_batch(model)
    given = taps.read(other, batch, hidden=[layer], logits=False).hidden[layer].detach()
    # the same from a model that is the other up to this layer
    spliced = copy.deepcopy(model)
    parts = zip(*(parameters_by_depth(one)[: layer + 1] for one in (spliced, other)), strict=True)
    with torch.no_grad():
        for own, theirs in parts:
            for parameter, source in zip(own, theirs, strict=True):
                parameter.copy_(source)
    before, seen = logits(model, batch), []

    def change(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return given

    with taps.changed_input(model, layer, change):
        assert torch.equal(logits(model, batch), logits(spliced, batch))
    assert torch.equal(logits(model, batch), before) and not torch.equal(logits(spliced, batch), before)
    (own_states,) = seen
    assert torch.equal(own_states, taps.read(model, batch, hidden=[layer], logits=False).hidden[layer])


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_head_contexts_are_those_of_a_gate_on_every_head(name: str) -> None:
    model = make(name)
    batch = some_batch(model)
    slicing.slice_heads(model, 1, [0, 3, 1])
    gates = [torch.ones(count, requires_grad=True) for count in heads(model)]
    with inputs_masked(
        *(
            (layer_part(model, layer, part_path(model, "output")), gate.repeat_interleave(HEAD_SIZE))
            for layer, gate in enumerate(gates)
        )
    ):
        expected = torch.autograd.grad(taps.logits(model, batch).square().sum(), gates)
    with taps.head_contexts(model) as contexts:
        assert contexts == []
        taps.logits(model, batch)
        taps.logits(model, batch).square().sum().backward()
    assert [context.shape[-1] // HEAD_SIZE for context in contexts] == [4, 3, 4]
    for context, gradient in zip(contexts, expected, strict=True):
        assert context.grad is not None
        found = (context * context.grad).unflatten(-1, (-1, HEAD_SIZE)).sum(dim=(0, 1, 3))
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_head_contexts_of_frozen_layers_get_gradients_too() -> None:
    model = make("bert")
    batch = some_batch(model)
    grads = []
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        with taps.head_contexts(model) as contexts:
            taps.logits(model, batch).square().sum().backward()
        grads.append([context.grad for context in contexts])
    # a context cut off from the layers below still has the whole gradient of what lies above it
    for live, cut in zip(*grads, strict=True):
        torch.testing.assert_close(cut, live)
    with torch.no_grad(), taps.head_contexts(model) as contexts:
        taps.logits(model, batch)
        assert len(contexts) == LAYERS and not contexts[0].requires_grad


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_takes_what_the_family_accepts_and_leaves_the_rest(name: str) -> None:
    model = make(name)
    batch = some_batch(model)
    expected = logits(model, batch)
    assert expected.shape == (3, 3)
    assert torch.equal(logits(model, {**batch, "labels": torch.zeros(3, dtype=torch.long)}), expected)
    untyped = {key: value for key, value in batch.items() if key != "token_type_ids"}
    assert torch.equal(logits(model, untyped), expected) == (name not in TYPED)


# Structure


@pytest.mark.parametrize("name", FAMILIES)
def test_the_outline_of_a_fresh_model_is_its_config(name: str) -> None:
    structure = structure_file.written(building.outline(make(name)))
    modern, hidden = name.startswith("modernbert"), hidden_size(name)
    pooler = [] if name == "mobilebert-norm" else [[hidden, hidden]]
    bottleneck = {"size": HIDDEN, "shared": name == "mobilebert", "attention": name != "mobilebert"}
    assert json.loads(json.dumps(structure)) == {
        "format": 2,
        "family": families.family(CONFIGS[name]()),
        "hidden": hidden,
        "vocabulary": VOCABULARY,
        "positions": 0 if modern else 40,
        "token_types": 2 if name in TYPED else 1 if "roberta" in name else 0,
        "embedding": 16 if name == "electra" else 12 if name in MOBILE else HIDDEN,
        "projection": name in ("electra", *MOBILE),
        **({"trigram": name == "mobilebert"} if name in MOBILE else {}),
        "labels": 3,
        "head": [*pooler, [hidden, 3]],
        "layers": [
            {
                "heads": HEADS,
                "head_size": HEAD_SIZE,
                "ffn": FFN,
                "gated": modern,
                "window": 4 if modern and layer > 0 else None,
                "attention_norm": not modern or layer > 0,
                **({"networks": 4 if name == "mobilebert" else 1, "bottleneck": bottleneck} if name in MOBILE else {}),
            }
            for layer in range(LAYERS)
        ],
    }


def walked(model: PreTrainedModel) -> dict[str, tuple[str, bool, int, int]]:
    """The matrices that a forward runs, by a walk through the modules."""
    ran: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda module, *_: ran.append(module))
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    logits(model, some_batch(model))
    for handle in handles:
        handle.remove()
    head, found = head_linears(model), {}
    for path, module in model.named_modules():
        if any(module is other for other in ran) and isinstance(module, nn.Linear | nn.Embedding):
            in_layer = re.search(r"\.layers?\.(\d+)\.", path)
            place = str(int(in_layer[1]) + 1) if in_layer else "head" if path in head else "embeddings"
            place = "classifier" if path == head[-1] else place
            found[path] = (place, isinstance(module, nn.Embedding), *module.weight.shape)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_matrices_follow_from_the_outline(name: str) -> None:
    model = make(name)
    assert building.outline(model).matrices == walked(model)
    slicing.slice_layers(model, [2, 0])
    slicing.slice_heads(model, 1, [0, 2])
    if name in ONE_FFN:
        slicing.slice_ffn(model, 0, [1, 5, 3])
    if name in ONE_WIDTH:
        slicing.slice_hidden(model, range(12))
    found = building.outline(model)
    assert found.matrices == walked(model)
    assert [found.is_cut(layer) for layer in found.layers] == [name in ONE_WIDTH, True]


@pytest.mark.parametrize("name", FAMILIES)
def test_widths_that_follow_from_an_unknown_number_of_heads_are_unknown(name: str) -> None:
    whole = building.outline(make(name))
    unknown = whole.with_heads([None] * LAYERS)
    slicing.slice_heads(model := make(name), 1, [0, 2])
    assert whole.with_heads([HEADS, 2, HEADS]) == building.outline(model)
    cut = building.outline(model).matrices
    for path, matrix in unknown.matrices.items():
        if matrix.place == "2":
            moved = [before != after for before, after in zip(whole.matrices[path], cut[path], strict=True)]
            assert [value is None for value in matrix] == moved, path
        elif matrix.place not in ("1", "3"):
            assert matrix == whole.matrices[path]


@pytest.mark.parametrize("name", FAMILIES)
def test_build_draws_weights_as_hugging_face_does(name: str) -> None:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    plain = building.build(config)
    shaped = building.build(config, building.outline(plain))
    assert config.to_dict() == CONFIGS[name]().to_dict()  # the caller's config is left alone
    for (parameter, expected), found in zip(
        plain.requires_grad_(False).named_parameters(), shaped.requires_grad_(False).parameters(), strict=True
    ):
        assert found.shape == expected.shape
        if expected.numel() > 500:
            assert found.std().item() == pytest.approx(expected.std().item(), rel=0.2), parameter
            assert found.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.5), parameter
        elif expected.ndim == 1:
            assert torch.equal(found, expected), parameter


def test_build_draws_from_the_global_generator() -> None:
    outline = building.outline(make("bert"))
    built = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        built.append(building.build(CONFIGS["bert"](), outline).state_dict())
    assert all(torch.equal(built[0][key], built[1][key]) for key in built[0])
    assert not torch.equal(built[0]["classifier.weight"], built[2]["classifier.weight"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sliced_config_survives_config_json(name: str, tmp_path: Any) -> None:
    model = make(name)
    if name in ONE_WIDTH:
        slicing.slice_hidden(model, range(30))
    slicing.slice_layers(model, [2])
    model.config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    rebuilt = building.build(config, building.outline(model)).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    batch = some_batch(model)
    assert torch.equal(logits(rebuilt, batch), logits(model, batch))


# Quantized layers


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_dynamically_quantized_model_is_described_and_read_and_refuses_surgery(name: str) -> None:
    model = make(name)
    slicing.slice_heads(model, 1, [0, 2])
    if name in ONE_FFN:
        slicing.slice_ffn(model, 2, range(5))
    outline = building.outline(model)
    batch = some_batch(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert building.outline(quantized) == outline
    assert heads(quantized) == [4, 2, 4]
    before = logits(quantized, batch)
    with torch.no_grad():
        reading = taps.read(quantized, batch, projections=[1], logits=True)
    assert torch.equal(reading.logits, before)
    assert reading.projections[1].value.shape == (3, 12, 16)
    for surgery, applies in (
        (lambda: slicing.slice_heads(quantized, 0, [0]), True),
        (lambda: slicing.slice_ffn(quantized, 0, [0]), name in ONE_FFN),
        (lambda: slicing.slice_hidden(quantized, [0]), name in ONE_WIDTH),
        (lambda: building.attach_head(quantized, ["a", "b"]), True),
    ):
        if not applies:
            continue
        with pytest.raises(UserError, match="Linear"):
            surgery()
    assert building.outline(quantized) == outline
    assert torch.equal(logits(quantized, batch), before)


def test_a_new_kind_of_linear_brings_its_own_slicing() -> None:
    class Doubled(nn.Module):
        """A Linear stored at half its size."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.halved, self.bias = nn.Parameter(linear.weight.detach() / 2), linear.bias
            self.out_features, self.in_features = self.halved.shape

        def forward(self, inputs: Tensor) -> Tensor:
            return nn.functional.linear(inputs, 2 * self.halved, self.bias)

    @slicing.slice_weight.register(Doubled)
    def _(module: Doubled, rows: Tensor | None, columns: Tensor | None) -> None:
        if rows is not None:
            module.halved, module.bias = nn.Parameter(module.halved[rows]), nn.Parameter(module.bias[rows])
        if columns is not None:
            module.halved = nn.Parameter(module.halved[:, columns])
        module.out_features, module.in_features = module.halved.shape

    model, plain = make("bert"), make("bert")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, Doubled(module))
    for changed in (model, plain):
        slicing.slice_heads(changed, 0, [2, 1])
        slicing.slice_hidden(changed, range(20))
    assert building.outline(model) == building.outline(plain)
    batch = some_batch(plain)
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), atol=1e-6, rtol=0)


# Head


@pytest.mark.parametrize("name", FAMILIES)
def test_an_attached_head_is_fresh_fits_its_labels_and_leaves_the_rest(name: str) -> None:
    model = make(name)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    building.attach_head(model, ["no", "maybe", "yes", "never"])
    classifier = model.get_submodule(classifier_prefix(model))
    assert (classifier.in_features, classifier.out_features) == (hidden_size(name), 4)
    expected_std = hidden_size(name) ** -0.5 if name.startswith("modernbert") else model.config.initializer_range
    assert classifier.weight.std().item() == pytest.approx(expected_std, rel=0.3)
    assert classifier.bias.abs().sum() == 0
    for key, value in model.state_dict().items():
        if not key.startswith(classifier_prefix(model) + "."):
            assert torch.equal(value, before[key]), key
    config = model.config
    assert config.id2label == {0: "no", 1: "maybe", 2: "yes", 3: "never"}
    assert config.label2id == {"no": 0, "maybe": 1, "yes": 2, "never": 3}
    assert config.num_labels == model.num_labels == building.outline(model).labels == 4
    assert config.problem_type == "single_label_classification"
    assert_rebuilds(model, some_batch(model))
    weight = classifier.weight.clone()
    torch.manual_seed(5)
    building.attach_head(model, ["no", "maybe", "yes", "never"])
    assert torch.equal(model.get_submodule(classifier_prefix(model)).weight, weight)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_regression_head_has_one_output(name: str) -> None:
    model = make(name)
    building.attach_head(model, ["score"], "regression")
    batch = some_batch(model)
    assert logits(model, batch).shape == (3, 1)
    assert model.config.problem_type == "regression" and model.config.num_labels == 1
    assert_rebuilds(model, batch)


def test_an_attached_head_keeps_device_and_dtype() -> None:
    model = make("roberta").to(torch.float64)
    building.attach_head(model, ["a", "b"])
    assert model.get_submodule("classifier.out_proj").weight.dtype == torch.float64
