"""MobileBERT as a family: its bottlenecks, stacked networks and trigrams described, rebuilt, counted and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MobileBertConfig, PreTrainedModel

from edgemin import artifact, checkpoint, toy
from edgemin.encoder import building, parts, shapes, slicing, structure_file, taps
from edgemin.encoder.operations import operations
from edgemin.errors import UserError
from edgemin.finetune import Finetune
from edgemin.measure.params import count_parameters
from edgemin.pruning.stage import Pruning
from edgemin.quantization import torch_layers

TINY: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "embedding_size": 10,
    "intra_bottleneck_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
    "num_labels": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {"classifier_activation": False},
    "pooler": {},
    "two networks": {"num_feedforward_networks": 2},
    "one network": {"num_feedforward_networks": 1},
    "bottleneck attention": {"use_bottleneck_attention": True, "key_query_shared_bottleneck": False},
    "an idle bottleneck": {"use_bottleneck_attention": True},
    "attention on feature maps": {"key_query_shared_bottleneck": False, "intra_bottleneck_size": 24},
    "an inverted bottleneck": {"intra_bottleneck_size": 48, "num_feedforward_networks": 1, "hidden_act": "gelu"},
    "no bottleneck": {"use_bottleneck": False, "normalization_type": "layer_norm"},
    "no trigrams": {"trigram_input": False},
    "an idle projection": {"trigram_input": False, "embedding_size": 24},
}


def made(variant: str = "published") -> PreTrainedModel:
    torch.manual_seed(0)
    model = building.build(MobileBertConfig(**TINY | VARIANTS[variant]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def sentences(lengths: tuple[int, ...] = (9, 6, 3)) -> dict[str, Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": mask * (torch.arange(max(lengths)) > 3)}


# Structure


def test_the_published_shape_is_described_in_full() -> None:
    with torch.device("meta"):
        model = building.build(MobileBertConfig(classifier_activation=False))
    structure = json.loads(json.dumps(structure_file.written(building.outline(model))))
    layers = structure.pop("layers")
    assert structure == {
        "format": 2,
        "family": "mobilebert",
        "hidden": 512,
        "vocabulary": 30522,
        "positions": 512,
        "token_types": 2,
        "embedding": 128,
        "projection": True,
        "trigram": True,
        "labels": 2,
        "head": [[512, 2]],
    }
    bottleneck = {"size": 128, "shared": True, "attention": False}
    sizes = {"heads": 4, "head_size": 32, "ffn": 512, "networks": 4, "bottleneck": bottleneck}
    assert layers == [sizes | {"gated": False, "window": None, "attention_norm": True}] * 24
    assert building.outline(model).max_tokens == 512


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pruned", [False, True])
def test_outline_and_configuration_rebuild_every_variant(variant: str, pruned: bool) -> None:
    model = made(variant)
    if pruned:
        slicing.slice_heads(model, 1, [2, 0])
    written = json.loads(json.dumps(structure_file.written(building.outline(model))))
    outline = structure_file.parsed(written, "structure.json")
    config = MobileBertConfig.from_dict(json.loads(model.config.to_json_string()))
    rebuilt = building.build(config, outline).eval()
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert building.outline(rebuilt) == building.outline(model) and rebuilt.config.to_dict() == model.config.to_dict()
    assert torch.equal(tiny.logits(rebuilt, sentences()), tiny.logits(model, sentences()))


def test_an_outline_wins_over_a_configuration_of_other_widths() -> None:
    for variant in VARIANTS:
        model = made(variant)
        config = MobileBertConfig(hidden_act=model.config.hidden_act, **VARIANTS["published"] | {"num_labels": 3})
        config.classifier_activation = model.config.classifier_activation
        assert building.outline(building.build(config, building.outline(model))) == building.outline(model), variant


def test_a_configuration_that_hugging_face_cannot_run_is_refused_in_one_line() -> None:
    config = MobileBertConfig(**TINY | {"key_query_shared_bottleneck": False})
    with pytest.raises(
        UserError, match=r"^key_query_shared_bottleneck: expected true [^\n]* 16 [^\n]* 24, given false$"
    ):
        building.build(config)


@pytest.mark.parametrize(("variant", "dense"), [("published", False), ("pooler", True)])
def test_a_pooler_has_a_linear_or_none(variant: str, dense: bool, tmp_path: Path) -> None:
    model = made(variant)
    assert parts.head_parts(model.config) == (("pooler.dense",) if dense else ())
    head = {name for name, _ in model.named_parameters() if name.startswith(parts.head_prefixes(model))}
    pooler = {f"mobilebert.pooler.dense.{part}" for part in ("weight", "bias")} if dense else set()
    assert head == {"classifier.weight", "classifier.bias"} | pooler
    model.base_model.save_pretrained(tmp_path)
    facts = checkpoint.read_facts(str(tmp_path), "teacher.source")
    assert not facts.draws_head and facts.labels is None


def test_parameters_come_in_the_order_of_a_forward() -> None:
    model = made("pooler")
    names = {parameter: name for name, parameter in model.named_parameters()}
    embeddings, first, second, head = ([names[p] for p in group] for group in parts.parameters_by_depth(model))
    assert all(name.startswith("mobilebert.embeddings.") for name in embeddings) and len(embeddings) == 7
    assert all(name.startswith("mobilebert.encoder.layer.0.") for name in first)
    assert all(name.startswith("mobilebert.encoder.layer.1.") for name in second) and len(first) == len(second)
    assert set(head) == {
        f"{part}.{kind}" for part in ("mobilebert.pooler.dense", "classifier") for kind in ("weight", "bias")
    }
    assert sum(map(len, (embeddings, first, second, head))) == len(names)


# Reading


def test_hidden_states_are_the_feature_maps_between_the_layers() -> None:
    model, batch = made(), sentences()
    with torch.no_grad():
        read = taps.read(model, batch, projections=[1], hidden=[0, 1, 2], logits=True)
        expected = model(**batch, output_hidden_states=True).hidden_states
    assert [read.hidden[depth].shape for depth in range(3)] == [(3, 9, 24)] * 3
    for depth in range(3):
        assert torch.equal(read.hidden[depth], expected[depth]), depth
    assert [part.shape for part in read.projections[1]] == [(3, 9, 16)] * 3


# Padding


def alone(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The logits of each sentence without any padding."""
    lengths = batch["attention_mask"].sum(-1).tolist()
    rows = [{name: tensor[[i], :n] for name, tensor in batch.items()} for i, n in enumerate(lengths)]
    return torch.cat([tiny.logits(model, row) for row in rows])


def test_with_its_padding_silenced_a_sentence_does_not_see_the_lengths_of_others() -> None:
    model, batch = made(), sentences()
    unpadded = alone(model, batch)
    assert not torch.allclose(tiny.logits(model, batch), unpadded, atol=1e-4), "its last token reads the padding"
    building.silence_padding(model)
    assert torch.equal(alone(model, batch), unpadded), "without padding nothing has changed"
    torch.testing.assert_close(tiny.logits(model, batch), unpadded, atol=1e-5, rtol=0)


def test_a_loaded_checkpoint_has_its_padding_silenced_and_training_leaves_it_so(tmp_path: Path) -> None:
    source = tiny.model("mobilebert", layers=1)
    words = source.get_input_embeddings()
    with torch.no_grad():
        words.weight[source.config.pad_token_id] = 1.0
    source.save_pretrained(tmp_path / "source")
    loaded = checkpoint.load_checkpoint(checkpoint.read_facts(str(tmp_path / "source"), "teacher.source"), 0)
    stage = tiny.stage(Finetune, steps=3, batch_size=8, learning_rate=1e-2)
    fitted = tiny.fit(stage, loaded, tiny.data(tmp_path), work=tmp_path / "work")
    row, before = fitted.model.get_input_embeddings().weight, words.weight
    assert not row[source.config.pad_token_id].any() and not torch.equal(row[1:], before[1:])


def test_other_families_keep_their_padding_embedding() -> None:
    model = tiny.model("bert")
    before = tiny.weights(model)
    building.silence_padding(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# What cannot be cut


@pytest.mark.parametrize(
    ("surgery", "key"),
    [
        (lambda model: slicing.slice_ffn(model, 0, [0, 1]), "ffn"),
        (lambda model: slicing.slice_hidden(model, range(8)), "hidden"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason_and_changes_nothing(surgery: Any, key: str) -> None:
    model = made()
    before = building.outline(model)
    with pytest.raises(UserError, match=rf"^{key}: cannot be cut for mobilebert, whose [^\n]*$"):
        surgery(model)
    assert building.outline(model) == before


def test_heads_can_be_pruned_down_to_one_of_each_layer() -> None:
    shape = tiny.outline("mobilebert", 3, 512, 4)
    tiny.effect(tiny.stage(Pruning, ratio=0.5, scope="global", epochs=1), shape)
    with pytest.raises(UserError, match=r"^ratio: expected one that leaves 1 of the heads in all 3 layers"):
        tiny.effect(tiny.stage(Pruning, ratio=0.9, scope="global", epochs=1), shape)


# A shape alone


def test_a_shape_alone_has_the_published_proportions() -> None:
    config = shapes.configure("mobilebert", layers=24, hidden=512, heads=4, intermediate=512, vocabulary=30522)
    with torch.device("meta"):
        published, asked = (building.outline(building.build(c)) for c in (MobileBertConfig(), config))
    assert asked == published


@pytest.mark.parametrize(
    ("hidden", "heads", "key"), [(30, 2, "hidden"), (32, 3, "heads"), (32, 16, "heads"), (2, 1, "hidden")]
)
def test_a_shape_whose_bottleneck_cannot_be_is_refused_in_one_line(hidden: int, heads: int, key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: expected [^\n]* given {hidden if key == 'hidden' else heads}$"):
        shapes.configure("mobilebert", layers=1, hidden=hidden, heads=heads, intermediate=8, vocabulary=50)


# What it costs


def test_the_published_model_has_its_known_parameters_and_operations() -> None:
    with torch.device("meta"):
        model = building.build(MobileBertConfig(classifier_activation=False))
    norm = 2  # vectors: scale and bias
    embeddings = 30522 * 128 + (512 + 2) * 512 + (3 * 128 + 1) * 512 + norm * 512
    bottlenecks = 2 * ((512 + 1) * 128 + norm * 128) + (128 + 1) * 512 + norm * 512
    attention = 2 * (128 + 1) * 128 + (512 + 1) * 128 + (128 + 1) * 128 + norm * 128
    networks = 4 * ((128 + 1) * 512 + (512 + 1) * 128 + norm * 128)
    total = embeddings + 24 * (bottlenecks + attention + networks) + (512 + 1) * 2
    assert count_parameters(model)["params"] == total == 24_582_914
    of_token = 2 * 512 * 128 + 2 * 128 * 128 + 512 * 128 + 128 * 128 + 4 * 2 * 128 * 512 + 128 * 512
    macs = 128 * (3 * 128 * 512 + 24 * (of_token + 2 * 128 * 128)) + 512 * 2
    assert operations(building.outline(model), 128) == {"macs": macs, "flops": 2 * macs}


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_linear_part_is_what_torch_counts(variant: str, pruned: bool) -> None:
    model, length = made(variant), 12
    if pruned:
        slicing.slice_heads(model, 0, [1])
    ids = torch.arange(2, 2 + length)[None]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        taps.logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    counts = counter.get_flop_counts()["Global"]
    linear = sum(flops for operation, flops in counts.items() if "mm" in str(operation))
    outline = building.outline(model)
    attention = sum(2 * 2 * length**2 * layer.heads * layer.head_size for layer in outline.layers)
    assert linear == operations(outline, length)["flops"] - attention


# On disk, in integers


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("quantized", [False, True])
def test_every_variant_is_saved_and_loaded_with_equal_logits(variant: str, quantized: bool, tmp_path: Path) -> None:
    model = made(variant)
    slicing.slice_layers(model, [1, 0])
    counted, outline = count_parameters(model)["params"], building.outline(model)
    if quantized:
        torch_layers.quantize(model)
        assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert count_parameters(model)["params"] == counted and building.outline(model) == outline
    artifact.save(tmp_path, model, toy.tokenizer(), {"head_trained": True})
    loaded, _ = artifact.load(tmp_path)
    assert building.outline(loaded) == outline
    assert torch.equal(tiny.logits(loaded, sentences()), tiny.logits(model, sentences()))
