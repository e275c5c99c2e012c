"""Where paths start: a checkpoint cut to a shape, a teacher's layers, random weights; labels by name; tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from edgemin import artifact, checkpoint, config, toy
from edgemin.encoder import building, families, slicing, truncation
from edgemin.encoder.parts import classifier_prefix, head_prefixes, heads, label_names, num_layers
from edgemin.errors import UserError
from edgemin.study import roots
from edgemin.study.roots import Root

LAYERS = {"bert": "bert.encoder.layer", "roberta": "roberta.encoder.layer"}
LAYERS |= {"distilbert": "distilbert.transformer.layer", "modernbert": "model.layers"}
LAYERS |= {"mobilebert": "mobilebert.encoder.layer"}


def written(folder: Path, family: str = "bert", *, layers: int = 6) -> Path:
    """A Hugging Face checkpoint with the toy tokenizer and a head."""
    tiny.model(family, layers=layers).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return folder


def without(folder: Path, *parts: str) -> Path:
    """Take tensors out of a checkpoint: those whose names begin with a part or have it after a dot."""
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not any(f".{part}" in f".{name}" for part in parts)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def loaded(folder: Path, seed: int = 0) -> PreTrainedModel:
    return checkpoint.load_checkpoint(checkpoint.read_facts(str(folder), "teacher.source"), seed).eval()


@pytest.fixture
def batch(tmp_path: Path) -> Any:
    return tiny.data(tmp_path / "data").train.batch(range(5))


# Which layers


@pytest.mark.parametrize(
    ("layers", "choice", "of", "kept"),
    [
        (None, "even", 6, [1, 2, 3, 4, 5, 6]),
        (3, "even", 6, [2, 4, 6]),
        (4, "even", 6, [2, 3, 5, 6]),
        (1, "even", 6, [6]),
        (6, "even", 6, [1, 2, 3, 4, 5, 6]),
        (6, "even", 12, [2, 4, 6, 8, 10, 12]),
        (3, "first", 6, [1, 2, 3]),
        (3, "last", 6, [4, 5, 6]),
        ([1, 6], "even", 6, [1, 6]),
        ([2], "first", 6, [2]),
    ],
)
def test_layers_are_chosen_counting_from_one(layers: Any, choice: Any, of: int, kept: list[int]) -> None:
    assert Root("s", source="x", layers=layers, layer_choice=choice).chosen_layers(of) == kept


@pytest.mark.parametrize("layers", [0, 7, -1, [0, 1], [7], [2, 1], [1, 1], []])
def test_layers_the_source_does_not_have_are_refused_in_one_line(layers: Any) -> None:
    with pytest.raises(UserError, match=r"^layers: expected [^\n]* 6 [^\n]* given [^\n]*$"):
        Root("s", source="x", layers=layers).chosen_layers(6)


class Skipped(nn.Module):
    """A layer that hands on what it is given."""

    def forward(self, hidden: Any, *args: Any, **named: Any) -> Any:
        return hidden


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    ("layers", "choice", "kept"), [(3, "even", [2, 4, 6]), ([1, 5], "even", [1, 5]), (2, "last", [5, 6])]
)
def test_a_student_of_chosen_layers_is_its_source_without_the_others(
    family: str, layers: Any, choice: Any, kept: list[int], tmp_path: Path, batch: Any
) -> None:
    folder = written(tmp_path / "source", family)
    student = roots.reshape(loaded(folder), Root("s", source=str(folder), layers=layers, layer_choice=choice))
    assert num_layers(student) == student.config.num_hidden_layers == len(kept)
    whole = loaded(folder)
    blocks = whole.get_submodule(LAYERS[family])
    assert isinstance(blocks, nn.ModuleList)
    for index in range(6):
        if index + 1 not in kept:
            blocks[index].forward = Skipped().forward  # type: ignore[method-assign]
    torch.testing.assert_close(tiny.logits(student, batch), tiny.logits(whole, batch), atol=1e-5, rtol=0)


# Widths


def test_truncated_widths_keep_the_first_units_of_everything(tmp_path: Path) -> None:
    folder = written(tmp_path / "source", layers=2)
    source = loaded(folder).state_dict()
    root = Root("s", source=str(folder), hidden=16, heads=2, intermediate=20, layers=[2], truncate="first")
    student = roots.reshape(loaded(folder), root)
    found = building.outline(student)
    assert found.hidden == 16 and found.embedding == 16
    assert [(layer.heads, layer.head_size, layer.ffn) for layer in found.layers] == [(2, 8, 20)]
    mine = student.state_dict()
    wide, narrow = "bert.encoder.layer.1.", "bert.encoder.layer.0."
    for name, rows, columns in (
        ("attention.self.query.weight", 16, 16),  # heads 1 and 2 of 8 are the first 16 rows
        ("attention.output.dense.weight", 16, 16),
        ("intermediate.dense.weight", 20, 16),
        ("output.dense.weight", 16, 20),
    ):
        assert torch.equal(mine[narrow + name], source[wide + name][:rows, :columns]), name
    assert torch.equal(mine["classifier.weight"], source["classifier.weight"][:, :16])
    words = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(mine[words], source[words][:, :16])


def test_a_width_that_stays_changes_nothing(tmp_path: Path, batch: Any) -> None:
    folder = written(tmp_path / "source", layers=2)
    root = Root("s", source=str(folder), hidden=32, heads=4, intermediate=48)
    student = roots.reshape(loaded(folder), root)
    assert torch.equal(tiny.logits(student, batch), tiny.logits(loaded(folder), batch))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"hidden": 16}, "hidden"),
        ({"heads": 2}, "heads"),
        ({"intermediate": 40}, "intermediate"),
        ({"hidden": 64, "truncate": "first"}, "hidden"),
        ({"intermediate": 49, "truncate": "first"}, "intermediate"),
        ({"hidden": 16, "heads": 3, "truncate": "first"}, "heads"),
        ({"hidden": 32, "heads": 2, "truncate": "first"}, "heads"),
        ({"hidden": 64, "inherit": "embeddings"}, "hidden"),
        ({"hidden": 16, "inherit": "embeddings"}, "hidden"),
        ({"heads": 5, "inherit": "embeddings"}, "heads"),
    ],
)
def test_a_shape_the_weights_cannot_be_cut_to_is_refused_in_one_line(settings: Any, key: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "source", layers=1)
    with pytest.raises(UserError, match=f"^{key}: expected [^\n]* given {settings[key]}$"):
        roots.reshape(loaded(folder), Root("s", source=str(folder), **settings))


@pytest.mark.parametrize("how", ["first", "weight_product", "pca"])
def test_widths_are_cut_as_the_encoder_cuts_them(how: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "source", layers=3)
    widths: dict[str, Any] = {"hidden": 24, "heads": 4, "intermediate": 21}
    student = roots.reshape(loaded(folder), Root("s", source=str(folder), layers=[1, 3], truncate=how, **widths))
    expected = loaded(folder)
    slicing.slice_layers(expected, [0, 2])
    truncation.truncate(expected, how, heads=4, head_size=6, ffn=21, hidden=24)
    assert tiny.same_weights(student, expected)


def uneven(folder: Path) -> Path:
    model = tiny.model(layers=3)
    slicing.slice_heads(model, 1, [0, 3])
    slicing.slice_ffn(model, 2, range(40))
    folder.mkdir()
    artifact.save(folder, model, toy.tokenizer(), {"head_trained": True})
    return folder


def test_layers_of_different_widths_are_cut_to_one_that_all_have(tmp_path: Path) -> None:
    folder = uneven(tmp_path / "artifact")
    student = roots.reshape(loaded(folder), Root("s", source=str(folder), truncate="weight_product", intermediate=40))
    assert [layer.ffn for layer in building.outline(student).layers] == [40, 40, 40]
    assert heads(student) == [4, 2, 4]
    student = roots.reshape(loaded(folder), Root("s", source=str(folder), truncate="pca", hidden=16, heads=2))
    assert heads(student) == [2, 2, 2]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"intermediate": 44}, "intermediate: expected at most the 40 of [^\n]*, given 44"),
        ({"hidden": 16}, "heads: expected a whole number, as the layers of [^\n]* differ [^\n]*, given null"),
        ({"hidden": 16, "layers": [2, 3], "heads": 4}, "heads: expected at most the 2 of [^\n]*, given 4"),
        ({"hidden": 30, "layers": [1]}, "heads: expected a divisor [^\n]* given null, which keeps the 4 of [^\n]*"),
    ],
)
def test_layers_of_different_widths_are_refused_what_one_of_them_lacks(
    settings: Any, line: str, tmp_path: Path
) -> None:
    folder = uneven(tmp_path / "artifact")
    with pytest.raises(UserError, match=f"^{line}$"):
        roots.reshape(loaded(folder), Root("s", source=str(folder), truncate="first", **settings))


@pytest.mark.parametrize("settings", [{"hidden": 16, "heads": 2}, {"intermediate": 20}])
def test_a_family_that_cannot_be_cut_is_refused_before_there_are_weights(settings: Any, tmp_path: Path) -> None:
    config = tiny.model("mobilebert").config
    for how in ("first", "weight_product", "pca"):
        with pytest.raises(UserError, match=r"^truncate: [^\n]* cannot be cut for mobilebert, [^\n]*$|^heads: [^\n]*$"):
            roots.outline(config, None, Root("s", source="x", truncate=how, **settings))


def test_a_truncation_that_cuts_nothing_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny.model(layers=3).config
    for settings in ({"hidden": 32}, {"hidden": 32, "inherit": "embeddings", "heads": 2}, {"heads": 4, "layers": 2}):
        caplog.clear()
        roots.outline(config, None, Root("s", source="x", truncate="pca", **settings))
        assert ["s: truncate=pca cuts nothing" in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    for settings in ({"hidden": 16, "heads": 2}, {"hidden": 16, "inherit": "embeddings"}, {"intermediate": 20}):
        roots.outline(config, None, Root("s", source="x", truncate="pca", **settings))
    assert not caplog.records


# Embeddings alone


def drawn(source: Path, **settings: Any) -> PreTrainedModel:
    model, before = loaded(source), torch.get_rng_state()
    made = roots.reshape(model, Root("s", source=str(source), inherit="embeddings", **settings))
    assert torch.equal(torch.get_rng_state(), before)
    return made


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "electra"])
def test_a_student_may_take_its_embeddings_from_its_source_and_nothing_else(
    family: str, tmp_path: Path, batch: Any
) -> None:
    folder = written(tmp_path / "source", family, layers=2)
    first, again, other = (drawn(folder, layers=4, seed=seed) for seed in (1, 1, 2))
    assert tiny.same_weights(first, again)
    source, mine, theirs = (model.state_dict() for model in (loaded(folder), first, other))
    same = {name for name in mine if torch.equal(mine[name], theirs[name]) and mine[name].dim() == 2}
    assert same == {name for name in source if "embedding" in name and source[name].dim() == 2}
    assert all(torch.equal(mine[name], source[name]) for name in source if "embedding" in name)
    assert num_layers(first) == 4
    assert label_names(first) == label_names(loaded(folder))
    assert torch.isfinite(tiny.logits(first, batch)).all()


def test_embeddings_are_cut_to_a_smaller_hidden_size_and_layers_may_be_wider_than_the_sources(tmp_path: Path) -> None:
    folder = written(tmp_path / "source", layers=2)
    ways: list[truncation.Truncation] = ["first", "weight_product", "pca"]
    made = {how: drawn(folder, layers=3, hidden=20, heads=10, intermediate=100, truncate=how) for how in ways}
    for how, model in made.items():
        found = building.outline(model)
        assert (found.hidden, found.embedding) == (20, 20)
        assert [(layer.heads, layer.head_size, layer.ffn) for layer in found.layers] == [(10, 2, 100)] * 3
        expected = loaded(folder)
        truncation.truncate(expected, how, hidden=20)
        embedded = {name: tensor for name, tensor in expected.state_dict().items() if ".embeddings." in name}
        assert len(embedded) == 5 and all(torch.equal(model.state_dict()[name], embedded[name]) for name in embedded)


def test_what_a_root_inherits_and_how_it_is_cut_are_in_its_key() -> None:
    def described(**settings: Any) -> dict[str, Any]:
        return roots.describe(Root("s", source="x", hidden=16, **settings))

    ways = [described(truncate=how) for how in ("first", "weight_product", "pca")]
    assert len({way["truncate"] for way in ways}) == 3 and all("seed" not in way for way in ways)
    assert described(seed=1) == described(seed=2)
    assert described(inherit="embeddings", seed=1) != described(inherit="embeddings", seed=2)
    assert described(inherit="embeddings")["inherit"] != described()["inherit"]


# The shape before there are weights


@pytest.mark.parametrize("family", tiny.CUTTABLE)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers": [2, 3]},
        {"layers": 1, "hidden": 16, "heads": 2, "intermediate": 20, "truncate": "first"},
        {"hidden": 24, "heads": 3, "layers": [3], "truncate": "first"},
        {"hidden": 24, "heads": 3, "intermediate": 21, "truncate": "weight_product"},
        {"hidden": 24, "heads": 3, "intermediate": 21, "layers": 2, "truncate": "pca"},
        {"hidden": 24, "heads": 6, "layers": 5, "intermediate": 99, "truncate": "pca", "inherit": "embeddings"},
        {"inherit": "embeddings"},
    ],
    ids=["whole", "layers", "first", "first of one layer", "magnitude", "pca", "embeddings cut", "embeddings"],
)
def test_the_outline_of_a_cut_checkpoint_is_that_of_its_weights(family: str, settings: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "source", family, layers=3)
    facts, root = checkpoint.read_facts(str(folder), "student.source"), Root("s", source=str(folder), **settings)
    student = roots.reshape(loaded(folder), root)
    before = torch.get_rng_state()
    outline = roots.outline(facts.config, facts.outline, root)
    assert torch.equal(torch.get_rng_state(), before)
    assert outline == building.outline(student)
    assert facts.config.num_hidden_layers == 3, "the checkpoint's configuration stays as it is"


def test_smaller_heads_are_outlined_too_and_refused_where_they_cannot_be_cut(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"hidden": 16, "heads": 4, "truncate": "first"}
    for family in tiny.CUTTABLE:
        folder = written(tmp_path / family, family, layers=1)
        facts, root = checkpoint.read_facts(str(folder), "student.source"), Root("s", source=str(folder), **settings)
        if family == "modernbert":
            with pytest.raises(UserError, match=r"^[^\n]*rotary[^\n]*$"):
                roots.outline(facts.config, None, root)
        else:
            student = building.outline(roots.reshape(loaded(folder), root))
            assert roots.outline(facts.config, None, root) == student
            assert {layer.head_size for layer in student.layers} == {4}


def test_the_outline_of_an_uneven_artifact_has_its_widths(tmp_path: Path) -> None:
    model = tiny.model(layers=3)
    slicing.slice_heads(model, 1, [0, 3])
    artifact.save(tmp_path, model, toy.tokenizer(), {"head_trained": True})
    facts = checkpoint.read_facts(str(tmp_path), "student.source")
    outline = roots.outline(facts.config, facts.outline, Root("s", source=str(tmp_path), layers=[2, 3]))
    assert [layer.heads for layer in outline.layers] == [2, 4]


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "electra"])
def test_the_longest_input_is_what_the_positions_hold(family: str, padding: int) -> None:
    root = Root("s", layers=1, hidden=16, heads=2, intermediate=20)
    settings = roots.random_config(root, family, vocabulary=50, padding_id=padding)
    settings.max_position_embeddings = 40
    longest = roots.outline(settings, None, root).max_tokens
    # RoBERTa counts positions from the one after its padding token's
    assert longest == (40 - padding - 1 if family == "roberta" else 40)
    if family == "modernbert":  # rotary positions have no table that could end
        return
    model = building.build(settings).eval()

    def run(tokens: int) -> torch.Tensor:
        ids = torch.full((1, tokens), 5)
        return tiny.logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    assert torch.isfinite(run(longest)).all()
    with pytest.raises((IndexError, RuntimeError)):
        run(longest + 1)


# Random weights


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "electra"])
def test_random_weights_have_the_shape_that_was_asked_for(family: str) -> None:
    root = Root("s", layers=2, hidden=32, heads=4, intermediate=40)
    model = building.build(roots.random_config(root, family, vocabulary=90, padding_id=3))
    found = building.outline(model)
    assert (found.family, found.hidden, found.vocabulary) == (family, 32, 90)
    assert [(layer.heads, layer.ffn) for layer in found.layers] == [(4, 40)] * 2
    assert model.config.pad_token_id == 3


def test_a_vocabulary_may_be_larger_than_the_tokenizers_and_not_smaller() -> None:
    shape: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "intermediate": 40}
    assert roots.random_config(Root("s", vocabulary=96, **shape), "bert", 90, 0).vocab_size == 96
    with pytest.raises(UserError, match=r"^vocabulary: expected at least the tokenizer's 90, given 80$"):
        roots.random_config(Root("s", vocabulary=80, **shape), "bert", 90, 0)


@pytest.mark.parametrize("key", ["layers", "hidden", "heads", "intermediate"])
def test_a_shape_that_is_incomplete_is_refused_with_what_is_missing(key: str) -> None:
    shape: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "intermediate": 40} | {key: None}
    with pytest.raises(UserError, match=f"^{key}: expected a whole number, [^\n]* given None$"):
        roots.random_config(Root("s", **shape), "bert", 90, 0)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"hidden": 0}, "hidden"),
        ({"heads": -1}, "heads"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"source": "x", "family": "bert"}, "family"),
        ({"source": "x", "vocabulary": 10}, "vocabulary"),
        ({"layer_choice": "middle"}, "layer_choice"),
        ({"inherit": "embeddings"}, "inherit"),
        ({"inherit": "layers", "source": "x"}, "inherit"),
        ({"truncate": "first", "hidden": 16}, "truncate"),
        ({"truncate": True, "hidden": 16, "source": "x"}, "truncate"),
        ({"truncate": "pca", "source": "x"}, "truncate"),
        ({"truncate": "pca", "source": "x", "inherit": "embeddings", "heads": 2}, "truncate"),
        ({"layers": [1, 2], "source": "x", "inherit": "embeddings"}, "layers"),
        ({"layers": 0, "source": "x", "inherit": "embeddings"}, "layers"),
        ({"layer_choice": "last", "layers": 2, "source": "x", "inherit": "embeddings"}, "layer_choice"),
        ({"truncate_width": True}, "truncate_width"),
        ({"layers": "three"}, "layers"),
        ({"layer": 3}, "layer"),
    ],
)
def test_a_root_that_cannot_be_is_refused_with_its_key(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^student.{key}: [^\n]*$"):
        config.construct({"_target_": "edgemin.study.roots.Root", "name": "s"} | settings, "student")


# Labels by name


def with_labels(labels: list[str]) -> PreTrainedModel:
    model = tiny.model()
    building.attach_head(model, labels)
    return model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_head_is_brought_into_the_tasks_order_by_name(family: str, batch: Any) -> None:
    model = tiny.model(family)
    building.attach_head(model, ["Neutral", "CONTRADICTION", "entailment"])
    before = tiny.logits(model, batch)
    assert checkpoint.align_head(model, ["entailment", "neutral", "contradiction"], "single_label_classification")
    torch.testing.assert_close(tiny.logits(model, batch), before[:, [2, 0, 1]], atol=1e-6, rtol=1e-5)
    assert label_names(model) == ("entailment", "neutral", "contradiction")
    assert model.config.label2id == {"entailment": 0, "neutral": 1, "contradiction": 2}


def test_generic_labels_are_taken_in_the_order_they_come(batch: Any) -> None:
    model = with_labels(["LABEL_0", "LABEL_1"])
    before = tiny.logits(model, batch)
    assert checkpoint.align_head(model, ["negative", "positive"], "single_label_classification")
    assert torch.equal(tiny.logits(model, batch), before)
    assert label_names(model) == ("negative", "positive")


@pytest.mark.parametrize(
    ("have", "want", "order"),
    [
        (["not-duplicate", "Duplicate"], ["not_duplicate", "duplicate"], [0, 1]),
        (["duplicate", "not duplicate"], ["not_duplicate", "duplicate"], [1, 0]),
        (["LABEL_1", "LABEL_0"], ["a", "b"], None),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["a", "b"], None),
        (["positive", "negative", "neutral"], ["negative", "positive"], None),
        (["good", "bad"], ["negative", "positive"], None),
        (["a", "A"], ["a", "b"], None),
        (["a", "A", "b"], ["A", "a", "b"], [1, 0, 2]),
        (["a-b", "a_b"], ["a b", "A_B"], None),
        (["LABEL_0", "LABEL_1"], ["LABEL_1", "LABEL_0"], [1, 0]),
        (["label_0", "label_1"], ["LABEL_1", "LABEL_0"], [1, 0]),
        (
            [f"LABEL_{place}" for place in range(11)],
            sorted(f"LABEL_{place}" for place in range(11)),
            [0, 1, 10, *range(2, 10)],
        ),
    ],
)
def test_labels_are_matched_by_name_and_never_by_place(have: list[str], want: list[str], order: Any) -> None:
    assert checkpoint.head_order(have, want) == order


def test_a_head_of_other_labels_is_left_as_it_is(batch: Any) -> None:
    model = with_labels(["good", "bad"])
    before = tiny.logits(model, batch)
    assert not checkpoint.align_head(model, ["negative", "positive"], "single_label_classification")
    assert torch.equal(tiny.logits(model, batch), before) and label_names(model) == ("good", "bad")


# Reading checkpoints


def test_the_facts_of_a_checkpoint(tmp_path: Path) -> None:
    folder = written(tmp_path / "source")
    facts = checkpoint.read_facts(str(folder), "teacher.source")
    assert (facts.directory, facts.is_artifact, facts.labels) == (folder, False, toy.LABELS)
    assert (families.family(facts.config), facts.config.num_hidden_layers) == ("bert", 6)
    assert facts.outline.quantized is None and not facts.draws_head
    tiny.model(layers=1).base_model.save_pretrained(tmp_path / "bare")
    assert checkpoint.read_facts(str(tmp_path / "bare"), "teacher.source").labels is None


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "electra"])
def test_what_a_head_lacks_is_drawn_from_the_seed_and_nothing_else_is(family: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "source", family, layers=1)
    whole = loaded(folder)
    head = head_prefixes(whole)
    assert not checkpoint.read_facts(str(folder), "teacher.source").draws_head
    without(folder, *(f"{prefix}." for prefix in head))
    assert checkpoint.read_facts(str(folder), "teacher.source").draws_head
    torch.manual_seed(1)
    first = loaded(folder, seed=5)
    torch.manual_seed(2)
    assert tiny.same_weights(first, loaded(folder, seed=5))
    one, two, before = first.state_dict(), loaded(folder, seed=6).state_dict(), whole.state_dict()
    drawn = {name for name in one if not torch.equal(one[name], two[name])}
    assert drawn and all(name.startswith(head) for name in drawn)
    assert {name for name in one if not torch.equal(one[name], before[name])} >= drawn
    assert all(torch.equal(one[name], before[name]) for name in one if not name.startswith(head))


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "electra"])
def test_a_head_without_its_classifier_has_all_that_is_not_replaced(family: str, tmp_path: Path) -> None:
    """A classifier for the task's labels is attached anyway, by the stage that trains it."""
    folder = written(tmp_path / "source", family, layers=1)
    without(folder, classifier_prefix(tiny.model(family)) + ".")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("ForSequenceClassification", "Model"))
    assert not checkpoint.read_facts(str(folder), "teacher.source").draws_head


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "electra"])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_classifier_that_is_not_in_the_file_is_not_taken_for_trained(
    renamed: bool, family: str, tmp_path: Path
) -> None:
    folder = written(tmp_path / "source", family, layers=1)
    prefix = f"{classifier_prefix(tiny.model(family))}."
    tensors = load_file(folder / "model.safetensors")
    moved = {name.replace(prefix, f"{prefix}2."): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    without(folder, prefix)
    if renamed:
        save_file(load_file(folder / "model.safetensors") | moved, folder / "model.safetensors", {"format": "pt"})
    facts = checkpoint.read_facts(str(folder), "teacher.source")
    assert facts.labels is None and facts.draws_head


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "electra"])
@pytest.mark.parametrize("what", ["embedding", "layer"])
def test_a_checkpoint_without_all_weights_of_its_encoder_is_refused_in_one_line(
    family: str, what: str, tmp_path: Path
) -> None:
    folder = written(tmp_path / "source", family, layers=2)
    names = load_file(folder / "model.safetensors")
    gone = "embeddings." if what == "embedding" else next(name for name in names if ".1." in name)
    without(folder, gone)
    with pytest.raises(UserError, match=r"^teacher\.source: expected all weights of the encoder in [^\n]*$") as refused:
        loaded(folder)
    assert str(folder) in str(refused.value) and gone in str(refused.value)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "electra"])
def test_weights_by_other_names_are_refused_instead_of_drawn(family: str, tmp_path: Path) -> None:
    """As a checkpoint has them whose conversion went wrong."""
    folder = written(tmp_path / "source", family, layers=1)
    tensors = load_file(folder / "model.safetensors")
    save_file({f"old.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"^teacher\.source: expected all weights of the encoder [^\n]*$"):
        loaded(folder)


def test_an_uneven_artifact_is_a_checkpoint_too(tmp_path: Path, batch: Any) -> None:
    model = tiny.model(layers=4)
    slicing.slice_heads(model, 1, [0, 3])
    expected = tiny.logits(model, batch)
    artifact.save(tmp_path, model, toy.tokenizer(), {"head_trained": True})
    assert checkpoint.read_facts(str(tmp_path), "student.source").outline == building.outline(model)
    assert torch.equal(tiny.logits(loaded(tmp_path), batch), expected)
    cut = roots.reshape(loaded(tmp_path), Root("s", source=str(tmp_path), layers=[2, 4]))
    assert heads(cut) == [2, 4]


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "one/two/three"])
def test_a_path_that_does_not_exist_is_refused_in_one_line(source: str) -> None:
    with pytest.raises(UserError, match=f"^student.source: expected [^\n]* given '{source}', which does not exist$"):
        checkpoint.read_facts(source, "student.source")


def test_a_hub_id_that_cannot_be_had_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **named: Any) -> str:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(checkpoint, "snapshot_download", unreachable)
    with pytest.raises(
        UserError, match=r"^teacher\.source: expected [^\n]* given 'no-such/model' \(ConnectionError\)[^\n]*$"
    ):
        checkpoint.read_facts("no-such/model", "teacher.source")


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model_type": "gpt2"}'])
def test_a_directory_without_a_known_configuration_is_refused_in_one_line(content: Any, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as refused:
        checkpoint.read_facts(str(tmp_path), "teacher.source")
    assert "\n" not in str(refused.value)


def test_damaged_weights_are_refused_in_planning_in_one_line(tmp_path: Path) -> None:
    folder = written(tmp_path / "source", layers=1)
    content = (folder / "model.safetensors").read_bytes()
    for damaged in (content[: len(content) // 2], b""):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=r"^teacher\.source: the weights in [^\n]* cannot be read [^\n]*$"):
            checkpoint.read_facts(str(folder), "teacher.source")


def test_damaged_weights_of_torchs_own_format_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = written(tmp_path / "source", layers=1)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"^teacher\.source: expected weights in safetensors, [^\n]*$"):
        loaded(folder)


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    folder = written(tmp_path / "source", layers=1)
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Touches(tmp_path / "was here")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^teacher\.source: expected weights in safetensors, [^\n]*$"):
        loaded(folder)
    assert not (tmp_path / "was here").exists()


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_missing_or_damaged_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    assert checkpoint.read_tokenizer("toy", "k").get_vocab() == toy.tokenizer().get_vocab()
    folder = written(tmp_path / "source", layers=1)
    for content in ("{", None):
        file = folder / "tokenizer.json"
        file.write_text(content) if content else file.unlink()
        with pytest.raises(UserError, match=r"^teacher\.tokenizer: (the|expected a) tokenizer [^\n]*$"):
            checkpoint.read_tokenizer(str(folder), "teacher.tokenizer")


def test_a_fingerprint_is_of_what_is_loaded_and_of_nothing_else(tmp_path: Path) -> None:
    folder = written(tmp_path / "source", layers=1)
    before = checkpoint.fingerprint(folder)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(before)
    (folder / "README.md").write_text("more")
    (folder / "pytorch_model.bin").write_bytes(b"not read where safetensors are")
    assert checkpoint.fingerprint(folder) == before
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_act": "relu"}))
    changed = checkpoint.fingerprint(folder)
    assert {name for name in before if changed[name] != before[name]} == {"config.json"}
