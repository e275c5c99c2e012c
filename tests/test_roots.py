"""Where paths start: a checkpoint cut to a shape, a teacher's layers, random weights; labels by name; tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import PreTrainedModel

from edgemin import artifact, config, encoder, roots, toy
from edgemin.errors import UserError
from edgemin.roots import Root

LAYERS = {"bert": "bert.encoder.layer", "roberta": "roberta.encoder.layer"}
LAYERS |= {"distilbert": "distilbert.transformer.layer", "modernbert": "model.layers"}


def checkpoint(folder: Path, family: str = "bert", *, layers: int = 6, tokenizer: Any = None) -> Path:
    """A Hugging Face checkpoint with the toy tokenizer and a head."""
    tiny.model(family, layers=layers).save_pretrained(folder)
    (tokenizer or toy.tokenizer()).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> PreTrainedModel:
    return checkpoint.load_checkpoint(checkpoint.read_facts(str(folder), "teacher.source"), seed=0).eval()


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
    folder = checkpoint(tmp_path / "source", family)
    student = roots.reshape(loaded(folder), Root("s", source=str(folder), layers=layers, layer_choice=choice))
    assert encoder.num_layers(student) == student.config.num_hidden_layers == len(kept)
    whole = loaded(folder)
    blocks = whole.get_submodule(LAYERS[family])
    assert isinstance(blocks, nn.ModuleList)
    for index in range(6):
        if index + 1 not in kept:
            blocks[index].forward = Skipped().forward  # type: ignore[method-assign]
    torch.testing.assert_close(tiny.logits(student, batch), tiny.logits(whole, batch), atol=1e-5, rtol=0)


# Widths


def test_truncated_widths_keep_the_first_units_of_everything(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "source", layers=2)
    source = loaded(folder).state_dict()
    root = Root("s", source=str(folder), hidden=16, heads=2, intermediate=20, layers=[2], truncate_width=True)
    student = roots.reshape(loaded(folder), root)
    found = encoder.structure(student)
    assert found["hidden"] == 16 and found["embedding"] == 16
    assert [(layer["heads"], layer["head_size"], layer["ffn"]) for layer in found["layers"]] == [(2, 8, 20)]
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
    folder = checkpoint(tmp_path / "source", layers=2)
    root = Root("s", source=str(folder), hidden=32, heads=4, intermediate=48)
    student = roots.reshape(loaded(folder), root)
    assert torch.equal(tiny.logits(student, batch), tiny.logits(loaded(folder), batch))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"hidden": 16}, "hidden"),
        ({"heads": 2}, "heads"),
        ({"intermediate": 40}, "intermediate"),
        ({"hidden": 64, "truncate_width": True}, "hidden"),
        ({"intermediate": 49, "truncate_width": True}, "intermediate"),
        ({"hidden": 16, "heads": 3, "truncate_width": True}, "heads"),
        ({"hidden": 32, "heads": 2, "truncate_width": True}, "heads"),
    ],
)
def test_a_shape_the_weights_cannot_be_cut_to_is_refused_in_one_line(settings: Any, key: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "source", layers=1)
    with pytest.raises(UserError, match=f"^{key}: expected [^\n]* given {settings[key]}$"):
        roots.reshape(loaded(folder), Root("s", source=str(folder), **settings))


# Random weights


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "electra"])
def test_random_weights_have_the_shape_and_depend_on_the_seed_alone(family: str) -> None:
    def draw(seed: int) -> PreTrainedModel:
        root = Root("s", layers=2, hidden=32, heads=4, intermediate=40, seed=seed)
        torch.manual_seed(seed * 7 + 1)
        return roots.random_model(root, family, vocabulary=90, padding_id=3)

    first = draw(1)
    assert tiny.same_weights(first, draw(1)) and not tiny.same_weights(first, draw(2))
    found = encoder.structure(first)
    assert (found["family"], found["hidden"], found["vocabulary"]) == (family, 32, 90)
    assert [(layer["heads"], layer["ffn"]) for layer in found["layers"]] == [(4, 40)] * 2
    assert first.config.pad_token_id == 3


@pytest.mark.parametrize("key", ["layers", "hidden", "heads", "intermediate"])
def test_a_shape_that_is_incomplete_is_refused_with_what_is_missing(key: str) -> None:
    shape: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "intermediate": 40} | {key: None}
    with pytest.raises(UserError, match=f"^{key}: expected a whole number, [^\n]* given None$"):
        roots.random_model(Root("s", **shape), "bert", 90, 0)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"hidden": 0}, "hidden"),
        ({"heads": -1}, "heads"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"source": "x", "family": "bert"}, "family"),
        ({"source": "x", "vocabulary": 10}, "vocabulary"),
        ({"layer_choice": "middle"}, "layer_choice"),
        ({"layers": "three"}, "layers"),
        ({"layer": 3}, "layer"),
    ],
)
def test_a_root_that_cannot_be_is_refused_with_its_key(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^student.{key}: [^\n]*$"):
        config.construct({"_target_": "edgemin.roots.Root", "name": "s"} | settings, "student")


# Labels by name


def with_labels(labels: list[str]) -> PreTrainedModel:
    model = tiny.model()
    encoder.attach_head(model, labels)
    return model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_head_is_brought_into_the_tasks_order_by_name(family: str, batch: Any) -> None:
    model = tiny.model(family)
    encoder.attach_head(model, ["Neutral", "CONTRADICTION", "entailment"])
    before = tiny.logits(model, batch)
    assert checkpoint.align_head(model, ["entailment", "neutral", "contradiction"])
    torch.testing.assert_close(tiny.logits(model, batch), before[:, [2, 0, 1]], atol=1e-6, rtol=1e-5)
    assert encoder.label_names(model) == ("entailment", "neutral", "contradiction")
    assert model.config.label2id == {"entailment": 0, "neutral": 1, "contradiction": 2}


def test_generic_labels_are_taken_in_the_order_they_come(batch: Any) -> None:
    model = with_labels(["LABEL_0", "LABEL_1"])
    before = tiny.logits(model, batch)
    assert checkpoint.align_head(model, ["negative", "positive"])
    assert torch.equal(tiny.logits(model, batch), before)
    assert encoder.label_names(model) == ("negative", "positive")


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
    ],
)
def test_labels_are_matched_by_name_and_never_by_place(have: list[str], want: list[str], order: Any) -> None:
    assert checkpoint.head_order(have, want) == order


def test_a_head_of_other_labels_is_left_as_it_is(batch: Any) -> None:
    model = with_labels(["good", "bad"])
    before = tiny.logits(model, batch)
    assert not checkpoint.align_head(model, ["negative", "positive"])
    assert torch.equal(tiny.logits(model, batch), before) and encoder.label_names(model) == ("good", "bad")


# Reading checkpoints


def test_the_facts_of_a_checkpoint_are_read_without_its_weights(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "source")
    (folder / "model.safetensors").write_bytes(b"")
    facts = checkpoint.read_facts(str(folder), "teacher.source")
    assert (facts.family, facts.layers, facts.hidden, facts.heads) == ("bert", 6, 32, 4)
    assert facts.labels == toy.LABELS
    bare = tiny.model(layers=1).get_submodule("bert")
    bare.save_pretrained(tmp_path / "bare")  # type: ignore[operator]
    assert checkpoint.read_facts(str(tmp_path / "bare"), "teacher.source").labels is None


def test_a_missing_head_is_always_the_same_one(tmp_path: Path) -> None:
    tiny.model(layers=1).get_submodule("bert").save_pretrained(tmp_path)  # type: ignore[operator]
    torch.manual_seed(1)
    first = loaded(tmp_path)
    torch.manual_seed(2)
    assert tiny.same_weights(first, loaded(tmp_path))


def test_an_uneven_artifact_is_a_checkpoint_too(tmp_path: Path, batch: Any) -> None:
    model = tiny.model(layers=4)
    encoder.slice_heads(model, 1, [0, 3])
    expected = tiny.logits(model, batch)
    artifact.save(tmp_path, model, toy.tokenizer(), {})
    assert checkpoint.read_facts(str(tmp_path), "student.source").layers == 4
    assert torch.equal(tiny.logits(loaded(tmp_path), batch), expected)
    cut = roots.reshape(loaded(tmp_path), Root("s", source=str(tmp_path), layers=[2, 4]))
    assert encoder.heads(cut) == [2, 4]


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "one/two/three"])
def test_a_path_that_does_not_exist_is_refused_in_one_line(source: str) -> None:
    with pytest.raises(UserError, match=f"^student.source: expected [^\n]* given '{source}', which does not exist$"):
        checkpoint.read_facts(source, "student.source")


def test_a_hub_id_that_cannot_be_had_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **named: Any) -> str:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(roots, "snapshot_download", unreachable)
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


def test_damaged_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "source", layers=1)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"^source: the weights in [^\n]* cannot be loaded[^\n]*$"):
        loaded(folder)


def test_a_missing_or_damaged_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    assert checkpoint.read_tokenizer("toy", "k").get_vocab() == toy.tokenizer().get_vocab()
    folder = checkpoint(tmp_path / "source", layers=1)
    for content in ("{", None):
        file = folder / "tokenizer.json"
        file.write_text(content) if content else file.unlink()
        with pytest.raises(UserError, match=r"^teacher\.tokenizer: expected a tokenizer beside [^\n]*$"):
            checkpoint.read_tokenizer(str(folder), "teacher.tokenizer")


def test_a_fingerprint_is_of_what_is_loaded_and_of_nothing_else(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "source", layers=1)
    before = checkpoint.fingerprint(folder)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(before)
    (folder / "README.md").write_text("more")
    (folder / "pytorch_model.bin").write_bytes(b"not read where safetensors are")
    assert checkpoint.fingerprint(folder) == before
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_act": "relu"}))
    changed = checkpoint.fingerprint(folder)
    assert {name for name in before if changed[name] != before[name]} == {"config.json"}
