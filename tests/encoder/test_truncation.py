"""Widths cut by weight importance and along principal directions, and embeddings under fresh layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.encoder import building, parts, slicing, truncation
from edgemin.encoder.parts import layers
from edgemin.encoder.rotation import outlying_units, principal_basis, rotate_hidden
from edgemin.encoder.stream import stream
from edgemin.encoder.truncation import (
    ffn_importance,
    head_importance,
    hidden_importance,
    leading,
    truncate,
    with_fresh_layers,
)
from edgemin.errors import UserError
from edgemin.quantization import torch_layers

FAMILIES = [*tiny.CUTTABLE, "electra"]
HOW: list[truncation.Truncation] = ["first", "weight_product", "pca"]


@pytest.fixture
def batch(tmp_path: Path) -> Any:
    return tiny.data(tmp_path / "data").train.batch(range(5))


def reshaped(model: PreTrainedModel, *, hidden: int | None = None, **layer: int) -> PreTrainedModel:
    """A model like this one with other widths, its weights drawn."""
    outline = building.outline(model)
    outline = replace(outline, layers=tuple(replace(entry, **layer) for entry in outline.layers))
    if hidden is not None:
        outline = replace(outline, hidden=hidden, embedding=outline.embedding if outline.projection else hidden)
    return building.build(model.config, outline).eval()


def projected_electra(hidden: int = 32) -> PreTrainedModel:
    """ELECTRA whose embeddings, 20 wide, a Linear takes to the hidden size."""
    config = tiny.model("electra", layers=2, hidden=hidden, heads=hidden // 8).config
    config.embedding_size = 20
    torch.manual_seed(0)
    made = building.build(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def equal_scales(model: PreTrainedModel, scale: float = 0.7) -> PreTrainedModel:
    """Every norm of the stream with one scale for all units."""
    found = stream(model)
    with torch.no_grad():
        for norm in (*found.carried, *found.aside):
            norm.weight.fill_(scale)
    return model


# Importance: plain loops in float64 over the definition


def squared(values: Any) -> float:
    return sum(float(value) ** 2 for value in values)


def doubled(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def naive_bert(model: PreTrainedModel) -> dict[str, Tensor]:
    """Heads and FFN units of layer 2 and the hidden units of a BERT of 2 layers, 4 heads of 8 and 48 FFN units."""
    w = doubled(model)
    at = "bert.encoder.layer.1."
    value, constant = w[f"{at}attention.self.value.weight"], w[f"{at}attention.self.value.bias"]
    output = w[f"{at}attention.output.dense.weight"]
    heads = []
    for head in range(4):
        own = range(8 * head, 8 * head + 8)
        composed = [sum(output[i, d] * value[d, j] for d in own) for i in range(32) for j in range(32)]
        heads.append(squared(composed) + squared(sum(output[i, d] * constant[d] for d in own) for i in range(32)))
    read, bias = w[f"{at}intermediate.dense.weight"], w[f"{at}intermediate.dense.bias"]
    write = w[f"{at}output.dense.weight"]
    ffn = [(squared(read[u]) + float(bias[u]) ** 2) * squared(write[:, u]) for u in range(48)]
    hidden = []
    for unit in range(32):
        tables = ("word", "position", "token_type")
        written = sum(squared(w[f"bert.embeddings.{name}_embeddings.weight"][:, unit]) for name in tables)
        before, reads = "bert.embeddings.LayerNorm", 0.0
        for index in range(2):
            at = f"bert.encoder.layer.{index}."
            for name in ("attention.output.dense", "output.dense"):
                written += squared(w[f"{at}{name}.weight"][unit]) + float(w[f"{at}{name}.bias"][unit]) ** 2
            for name in ("query", "key", "value"):
                scale = w[f"{before}.weight"][unit]
                reads += squared(scale * w[f"{at}attention.self.{name}.weight"][:, unit])
            scale = w[f"{at}attention.output.LayerNorm.weight"][unit]
            reads += squared(scale * w[f"{at}intermediate.dense.weight"][:, unit])
            before = f"{at}output.LayerNorm"
        hidden.append(written * reads)
    return {name: torch.tensor(found) for name, found in (("heads", heads), ("ffn", ffn), ("hidden", hidden))}


def test_importance_is_what_a_plain_loop_over_its_definition_gives() -> None:
    model = tiny.model(layers=2)
    expected, layer = naive_bert(model), layers(model)[1]
    torch.testing.assert_close(head_importance(layer), expected["heads"].double())
    torch.testing.assert_close(ffn_importance(layer), expected["ffn"].double())
    torch.testing.assert_close(hidden_importance(model), expected["hidden"].double())


def test_fused_gated_and_prenormed_layers_are_weighed_by_the_same_definition() -> None:
    model = tiny.model("modernbert", layers=2)
    w = doubled(model)
    value, output = w["model.layers.1.attn.Wqkv.weight"][64:], w["model.layers.1.attn.Wo.weight"]
    heads = [(output[:, 8 * h : 8 * h + 8] @ value[8 * h : 8 * h + 8]).square().sum() for h in range(4)]
    torch.testing.assert_close(head_importance(layers(model)[1]), torch.stack(heads))
    both, write = w["model.layers.1.mlp.Wi.weight"], w["model.layers.1.mlp.Wo.weight"]
    ffn = [squared(both[u]) * squared(both[48 + u]) * squared(write[:, u]) for u in range(48)]
    torch.testing.assert_close(ffn_importance(layers(model)[1]), torch.tensor(ffn).double())
    written = w["model.embeddings.tok_embeddings.weight"].square().sum(0)
    read = torch.zeros(32).double()
    for index in range(2):
        at = f"model.layers.{index}."
        written = written + w[f"{at}attn.Wo.weight"].square().sum(1) + w[f"{at}mlp.Wo.weight"].square().sum(1)
        before = w["model.embeddings.norm.weight" if index == 0 else f"{at}attn_norm.weight"]
        read += (before * w[f"{at}attn.Wqkv.weight"]).square().sum(0)
        read += (w[f"{at}mlp_norm.weight"] * w[f"{at}mlp.Wi.weight"]).square().sum(0)
    torch.testing.assert_close(hidden_importance(model), written * read)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_scaled_up_here_and_down_there_is_as_important_as_before(family: str) -> None:
    model = tiny.model(family, layers=2)
    layer = layers(model)[1]
    hidden, heads, ffn = hidden_importance(model), head_importance(layer), ffn_importance(layer)
    with torch.no_grad():
        for linear, factor in ((layer.projections[-1], 5), (layer.part(layer.family.ffn_in), 3)):
            for parameter in linear.parameters():
                parameter *= factor
        layer.output.weight /= 5
        layer.part(layer.family.ffn_out).weight /= 9 if layer.family.gated else 3
    torch.testing.assert_close(head_importance(layer), heads, rtol=1e-5, atol=0)
    torch.testing.assert_close(ffn_importance(layer), ffn, rtol=1e-5, atol=0)
    model, factors = tiny.model(family, layers=2), torch.linspace(0.5, 2, 32)
    reads = stream(model).reads
    with torch.no_grad():
        for linear, _ in reads:
            linear.weight /= factors
        for norm in {read.norm for read in reads}:
            norm.weight *= factors
    torch.testing.assert_close(hidden_importance(model), hidden, rtol=1e-5, atol=0)


def test_between_equals_the_lower_index_stays_and_what_is_kept_keeps_its_order() -> None:
    assert leading(torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0]), 4) == [0, 1, 2, 3]
    assert leading(torch.zeros(5), 2) == [0, 1]
    assert leading(torch.tensor([0.0, 1.0, 2.0]), 2) == [1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_product_keeps_the_most_important_units_through_the_slices(family: str) -> None:
    model, expected = tiny.model(family, layers=2), tiny.model(family, layers=2)
    truncate(model, "weight_product", heads=3, ffn=20)
    for index in range(2):
        slicing.slice_heads(expected, index, leading(head_importance(layers(expected)[index]), 3))
        slicing.slice_ffn(expected, index, leading(ffn_importance(layers(expected)[index]), 20))
    assert tiny.same_weights(model, expected)
    words = stream(model).tables[0].weight.clone()
    kept = leading(hidden_importance(model), 24)
    truncate(model, "weight_product", hidden=24)
    assert torch.equal(stream(model).tables[0].weight, words[:, kept])
    assert kept != list(range(24))


# Dead parts


def planted(small: PreTrainedModel, large: PreTrainedModel, places: Mapping[int, list[int]]) -> PreTrainedModel:
    """The small model inside the large one, at these places of each width; all else is zero."""
    own = small.state_dict()
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            index = torch.meshgrid(
                *(
                    torch.tensor(places[wide] if wide != narrow else range(wide))
                    for wide, narrow in zip(parameter.shape, own[name].shape, strict=True)
                ),
                indexing="ij",
            )
            parameter.zero_()
            parameter[index] = own[name]
    return large


def spread(count: int, of: int, seed: int) -> list[int]:
    return sorted(torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:count].tolist())


def blocks(indices: list[int], size: int, stride: int | None = None) -> list[int]:
    return [index * (stride or size) + offset for index in indices for offset in range(size)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_among_dead_units_is_found_again_to_the_last_bit(family: str, batch: Any) -> None:
    small = tiny.model(family, layers=2)
    large = reshaped(small, hidden=40, heads=8, ffn=60)
    heads, ffn = blocks(spread(4, 8, 1), 8), spread(48, 60, 2)
    places = {40: spread(32, 40, 3), 64: heads, 60: ffn}
    places |= {
        192: [64 * part + unit for part in range(3) for unit in heads],
        120: [*ffn, *(60 + unit for unit in ffn)],
    }
    planted(small, large, places)
    truncate(large, "weight_product", heads=4, ffn=48, hidden=32)
    assert tiny.same_weights(large, small)
    assert torch.equal(tiny.logits(large, batch), tiny.logits(small, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_dead_heads_and_ffn_units_change_nothing_when_they_are_cut(family: str, batch: Any) -> None:
    """A part is dead that writes nothing, whatever it reads."""
    model = tiny.model(family, layers=2)
    with torch.no_grad():
        for layer in layers(model):
            layer.output.weight[:, 8:16] = 0
            layer.part(layer.family.ffn_out).weight[:, [0, 5, 47]] = 0
    before = tiny.logits(model, batch)
    truncate(model, "weight_product", heads=3, ffn=45)
    torch.testing.assert_close(tiny.logits(model, batch), before, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_dead_dimensions_of_heads_are_found_in_each_head_and_in_scores_and_values_apart(
    family: str, batch: Any
) -> None:
    small = tiny.model(family, layers=2, heads=8)  # of size 4
    large = reshaped(small, heads=8, head_size=6)
    scored, written = ([6 * head + d for head in range(8) for d in spread(4, 6, seed + head)] for seed in (0, 50))
    assert scored != written
    planted(small, large, {48: scored})
    with torch.no_grad():
        for mine, theirs in zip(layers(large), layers(small), strict=True):
            value, own_value = mine.projections[2], theirs.projections[2]
            for parameter in (*value.parameters(), mine.output.weight):
                parameter.zero_()
            value.weight[written], value.bias[written] = own_value.weight, own_value.bias
            mine.output.weight[:, written] = theirs.output.weight
    truncate(large, "weight_product", head_size=4)
    assert tiny.same_weights(large, small)


def test_units_of_pooler_and_classifier_are_chosen_apart_from_the_stream(batch: Any) -> None:
    small = tiny.model(layers=1)
    places = spread(32, 40, 3)
    large = planted(small, reshaped(small, hidden=40), {40: places})
    order = torch.randperm(40, generator=torch.Generator().manual_seed(7))
    slicing.slice_weight(large.get_submodule("bert.pooler.dense"), order, None)
    slicing.slice_weight(large.get_submodule("classifier"), None, order)
    truncate(large, "weight_product", hidden=32)
    torch.testing.assert_close(tiny.logits(large, batch), tiny.logits(small, batch), atol=1e-6, rtol=1e-5)


# No-op, shapes, refusals


@pytest.mark.parametrize("family", [*FAMILIES, "mobilebert"])
@pytest.mark.parametrize("how", HOW)
def test_widths_that_stay_change_nothing(family: str, how: truncation.Truncation) -> None:
    model, before = tiny.model(family, layers=2), tiny.model(family, layers=2)
    layer = building.outline(model).layers[0]
    truncate(model, how, heads=layer.heads, head_size=layer.head_size, ffn=layer.ffn, hidden=32)
    assert tiny.same_weights(model, before)


@pytest.mark.parametrize("family", [*FAMILIES, "projected electra"])
@pytest.mark.parametrize("how", HOW)
def test_shapes_are_known_without_weights(family: str, how: truncation.Truncation, batch: Any) -> None:
    model = projected_electra() if " " in family else tiny.model(family, layers=2)
    with torch.device("meta"):
        bare = building.build(model.config)
    widths = {"heads": 3, "ffn": 21, "hidden": 24} | ({} if family == "modernbert" else {"head_size": 6})
    truncate(model, how, **widths)
    truncate(bare, how, **widths)
    assert building.outline(bare) == building.outline(model)
    assert {name: tensor.shape for name, tensor in bare.state_dict().items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    assert torch.isfinite(tiny.logits(model, batch)).all()


@pytest.mark.parametrize("how", ["weight_product", "pca"])
def test_what_cannot_be_weighed_is_refused_in_one_line(how: truncation.Truncation) -> None:
    with pytest.raises(UserError, match=r"^hidden: cannot be cut for mobilebert, [^\n]*$"):
        truncate(tiny.model("mobilebert"), how, hidden=16)
    with pytest.raises(UserError, match=r"^ffn: cannot be cut for mobilebert, [^\n]*$"):
        truncate(tiny.model("mobilebert"), how, ffn=16)
    with pytest.raises(UserError, match=r"^head_size: cannot be cut for modernbert, whose rotary [^\n]*$"):
        truncate(tiny.model("modernbert"), how, head_size=4)
    quantized = tiny.model()
    torch_layers.quantize(quantized)
    with pytest.raises(UserError, match=r"^model: expected plain float layers [^\n]* given [^\n]*Linear; [^\n]*$"):
        truncate(quantized, how, hidden=16)


# Principal directions


def energy(words: Tensor) -> float:
    """Of all words around each word's mean over the units, which is all that a LayerNorm sees of them."""
    return (words - words.mean(1, keepdim=True)).double().square().sum().item()


@pytest.mark.parametrize("keep", [1, 2, 9, 32])
def test_the_basis_is_orthogonal_and_keeps_the_mean_a_mean(keep: int) -> None:
    words = torch.randn(90, 32, generator=torch.Generator().manual_seed(1))
    turn = principal_basis(words, keep)
    torch.testing.assert_close(turn.T @ turn, torch.eye(32).double(), atol=1e-12, rtol=0)
    ones = torch.ones(32).double() @ turn
    torch.testing.assert_close(ones[:keep], torch.full((keep,), (32 / keep) ** 0.5).double())
    torch.testing.assert_close(ones[keep:], torch.zeros(32 - keep).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("keep", [2, 9, 31])
def test_the_basis_keeps_as_much_of_the_words_as_any_could(keep: int) -> None:
    words = torch.randn(90, 32, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.arange(32.0))
    centred = words.double() - words.double().mean(1, keepdim=True)
    best = torch.linalg.svdvals(centred)[: keep - 1].square().sum()
    assert energy(words.double() @ principal_basis(words, keep)[:, :keep]) == pytest.approx(float(best))


def test_units_that_keep_an_axis_are_kept_whole() -> None:
    words = torch.randn(90, 32, generator=torch.Generator().manual_seed(1))
    words[:, [4, 20]] *= 1e-3
    kept = principal_basis(words, 8, axes=[20, 4])[:, :8]
    for unit in range(32):
        whole = float(kept[unit].square().sum())
        assert (whole == pytest.approx(1.0)) if unit in (4, 20) else whole < 0.9
    torch.testing.assert_close(
        principal_basis(words, 8, [20, 4]).T @ principal_basis(words, 8, [20, 4]),
        torch.eye(32).double(),
        atol=1e-12,
        rtol=0,
    )


def test_only_scales_far_from_all_others_are_outliers() -> None:
    norms = stream(equal_scales(tiny.model(layers=2))).carried
    assert outlying_units(norms) == []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.55, 0.65, generator=generator)
        assert outlying_units(norms) == []
        norms[2].weight[7], norms[0].weight[30] = 1.5, -0.9
    assert outlying_units(norms) == [30, 7]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden", [8, 16, 24])
def test_principal_directions_hold_more_of_the_words_than_the_first_units(family: str, hidden: int) -> None:
    kept = {}
    for how in HOW:
        model = tiny.model(family, layers=1)
        truncate(model, how, hidden=hidden)
        kept[how] = energy(stream(model).tables[0].weight)
    assert kept["pca"] > max(kept["first"], kept["weight_product"])


@pytest.mark.parametrize("family", [*FAMILIES, "projected electra"])
def test_a_turned_stream_computes_what_it_did_where_a_norms_scales_are_equal(family: str, batch: Any) -> None:
    model = equal_scales(projected_electra() if " " in family else tiny.model(family, layers=3))
    before, weights = tiny.logits(model, batch), tiny.weights(model)
    rotate_hidden(model, 32)
    changed = stream(model).writers[0].weight
    assert not any(torch.equal(changed, tensor) for tensor in weights.values())
    torch.testing.assert_close(tiny.logits(model, batch), before, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_scale_of_a_norm_that_is_only_read_moves_into_its_readers(family: str, batch: Any) -> None:
    model = tiny.model(family, layers=3)
    found = stream(model)
    given = [norm.weight.detach().clone() for norm in found.aside]
    last = found.head.norm
    assert last is not None
    equal_scales(model)
    with torch.no_grad():
        for norm, scale in zip(found.aside, given, strict=True):
            norm.weight.copy_(scale)
        last.weight.uniform_(0.2, 2.0, generator=torch.Generator().manual_seed(0))
    before = tiny.logits(model, batch)
    rotate_hidden(model, 32)
    torch.testing.assert_close(tiny.logits(model, batch), before, atol=2e-5, rtol=1e-4)


def lifted(small: PreTrainedModel, hidden: int) -> PreTrainedModel:
    """The small model's stream turned into a subspace of a wider one's, the mean over the units still a mean."""
    large = reshaped(small, hidden=hidden)
    width = stream(small).reads[0].linear.in_features
    generator = torch.Generator().manual_seed(5)
    turn = principal_basis(torch.randn(60, hidden, generator=generator), width)[:, :width].float()  # [H, h]
    mine, theirs = stream(large), stream(small)
    classifiers: list[Any] = [model.get_submodule(parts.classifier_prefix(model)) for model in (large, small)]
    places = spread(width, hidden, 9)  # of the units between pooler and classifier, which are not the stream's
    with torch.no_grad():
        for table, source in zip(mine.tables, theirs.tables, strict=True):
            table.weight.copy_(source.weight @ turn.T)
        for writer, origin in zip(mine.writers, theirs.writers, strict=True):
            writer.weight.copy_(turn @ origin.weight)
            writer.bias.copy_(turn @ origin.bias)
        for read, as_read in zip(mine.reads, theirs.reads, strict=True):
            read.linear.weight.copy_(as_read.linear.weight @ turn.T)
            read.linear.bias.copy_(as_read.linear.bias)
        for norm, as_norm in zip(mine.carried, theirs.carried, strict=True):
            norm.weight.fill_(float(as_norm.weight[0]) * (width / hidden) ** 0.5)
            norm.bias.copy_(turn @ as_norm.bias)
        for parameter in (*mine.head.linear.parameters(), classifiers[0].weight):
            parameter.zero_()
        mine.head.linear.weight[places] = theirs.head.linear.weight @ turn.T
        mine.head.linear.bias[places] = theirs.head.linear.bias
        classifiers[0].weight[:, places] = classifiers[1].weight
        classifiers[0].bias.copy_(classifiers[1].bias)
    return large


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_a_model_in_a_turned_subspace_is_found_again(family: str, batch: Any) -> None:
    small = equal_scales(tiny.model(family, layers=2, hidden=24, heads=3))
    large = lifted(small, 40)
    torch.testing.assert_close(tiny.logits(large, batch), tiny.logits(small, batch), atol=1e-4, rtol=1e-4)
    truncate(large, "pca", hidden=24)
    torch.testing.assert_close(tiny.logits(large, batch), tiny.logits(small, batch), atol=1e-4, rtol=1e-4)


def test_principal_directions_do_not_depend_on_how_often_they_are_asked_for() -> None:
    first, second = tiny.model(layers=2), tiny.model(layers=2)
    for model in (first, second):
        truncate(model, "pca", heads=2, ffn=20, hidden=16)
    assert tiny.same_weights(first, second)


# Embeddings under fresh layers


@pytest.mark.parametrize("family", [*FAMILIES, "mobilebert", "projected electra"])
def test_fresh_layers_stand_on_the_embeddings_that_were_there(family: str, batch: Any) -> None:
    source = projected_electra() if " " in family else tiny.model(family, layers=2)
    before = tiny.weights(source)
    outline = building.outline(source)
    torch.manual_seed(3)
    made = with_fresh_layers(source, layers=5, heads=2, ffn=70).eval()
    after = building.outline(made)
    assert len(after.layers) == made.config.num_hidden_layers == 5
    width = 8 if family == "mobilebert" else 32
    assert {(layer.heads, layer.head_size, layer.ffn) for layer in after.layers} == {(2, width // 2, 70)}
    for key in ("family", "hidden", "vocabulary", "positions", "token_types", "embedding", "projection", "labels"):
        assert getattr(after, key) == getattr(outline, key), key
    mine = made.state_dict()
    embedded = {name for name in before if "embedding" in name}
    assert embedded == {name for name in mine if "embedding" in name}
    assert all(torch.equal(mine[name], before[name]) for name in embedded)
    drawn = [name for name in mine if name not in embedded and name.endswith("weight") and mine[name].dim() == 2]
    assert not any(name in before and torch.equal(mine[name], before[name]) for name in drawn)
    assert torch.isfinite(tiny.logits(made, batch)).all()


@pytest.mark.parametrize(("layers_before", "windows"), [(3, "GLLGLLG"), (4, "GLLGLLG"), (1, "GGGGGGG")])
def test_a_pattern_of_local_layers_goes_on_as_it_begins(layers_before: int, windows: str) -> None:
    made = with_fresh_layers(tiny.model("modernbert", layers=layers_before), layers=7, heads=4, ffn=48)
    found = building.outline(made).layers
    assert "".join("G" if layer.window is None else "L" for layer in found) == windows
    assert [layer.attention_norm for layer in found] == [False] + [True] * 6


def test_fresh_layers_are_drawn_as_those_of_a_model_that_starts_at_random() -> None:
    made = with_fresh_layers(tiny.model(layers=2, hidden=64), layers=3, heads=4, ffn=100)
    for layer in layers(made):
        for module in layer.module.modules():
            if isinstance(module, nn.Linear):
                assert float(module.weight.detach().std()) == pytest.approx(made.config.initializer_range, rel=0.1)
                assert not module.bias.any()
