"""An encoder on disk: whole and equal when it comes back, one clear line when it is not whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import edgemin
from edgemin import artifact, checkpoint, toy
from edgemin.encoder import building, parts, slicing
from edgemin.encoder import quantized as quantized_layers
from edgemin.errors import UserError
from edgemin.quantization import torch_layers as dynamic


def saved(folder: Path, family: str = "bert", *, quantized: bool = False, head_trained: bool = True) -> Path:
    model = tiny.model(family)
    slicing.slice_heads(model, 0, [1, 2])
    if family in tiny.CUTTABLE:
        slicing.slice_ffn(model, 1, range(7))
    if quantized:
        dynamic.quantize(model)
    folder.mkdir(parents=True)
    artifact.save(folder, model, toy.tokenizer(), {"seed": 7, "head_trained": head_trained})
    return folder


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_uneven_encoder_comes_back_with_equal_logits(family: str, quantized: bool, tmp_path: Path) -> None:
    batch = tiny.data(tmp_path).train.batch(range(5))
    model = tiny.model(family)
    slicing.slice_heads(model, 0, [1, 2])
    if family in tiny.CUTTABLE:
        slicing.slice_ffn(model, 1, range(7))
    if quantized:
        dynamic.quantize(model)
    expected = tiny.logits(model, batch)
    folder = saved(tmp_path / "artifact", family, quantized=quantized)
    loaded, tokenizer = edgemin.load(folder)
    assert torch.equal(tiny.logits(loaded, batch), expected)
    assert building.outline(loaded) == building.outline(model)
    assert parts.label_names(loaded) == toy.LABELS
    assert not loaded.training
    assert tokenizer is not None and tokenizer("the plot was good")["input_ids"][0] == 2
    assert artifact.read_provenance(folder) == {"seed": 7, "head_trained": True}


@pytest.mark.parametrize("quantized", [False, True])
def test_nothing_pickled_is_written_and_integers_are_stored_as_integers(quantized: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path / "artifact", quantized=quantized)
    files = sorted(path.name for path in folder.rglob("*") if path.is_file())
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}
    for name in files:
        head = (folder / name).read_bytes()[:2]
        assert head != b"PK" and head[:1] != b"\x80", name
        if name.endswith(".json"):
            json.loads((folder / name).read_text())
    tensors = load_file(folder / artifact.WEIGHTS)
    integers = {name for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    assert bool(integers) == quantized and all(name.endswith(".weight_int8") for name in integers)
    if quantized:
        assert not any(
            ".query.weight" in name and tensor.is_floating_point() and tensor.ndim for name, tensor in tensors.items()
        )


def test_an_artifact_is_saved_without_a_tokenizer_where_there_is_none(tmp_path: Path) -> None:
    artifact.save(tmp_path, tiny.model(), None, {})
    assert artifact.load(tmp_path)[1] is None


def test_loading_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "artifact")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    artifact.load(folder)
    assert torch.equal(torch.rand(4), expected)


# An artifact is a checkpoint too: `teacher.source=<artifact> teacher.stages=[]`


@pytest.mark.parametrize("quantized", [False, True])
def test_what_planning_needs_of_an_artifact_is_known_before_its_weights_are_read(
    quantized: bool, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "artifact", quantized=quantized)
    facts = checkpoint.read_facts(str(folder), "teacher.source")
    assert facts.outline == quantized_layers.outline(artifact.load(folder)[0])
    assert facts.labels == toy.LABELS
    assert (facts.outline.provider, facts.draws_head) == ("torch_dynamic" if quantized else None, False)


def test_an_artifact_is_fine_tuned_only_where_its_provenance_says_so(tmp_path: Path) -> None:
    """Its class is one with a classifier and its labels are the task's, trained or not."""
    folder = saved(tmp_path / "artifact", head_trained=False)
    assert parts.label_names(artifact.load(folder)[0]) == toy.LABELS
    assert checkpoint.read_facts(str(folder), "teacher.source").labels is None


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_an_artifact_that_does_not_say_where_it_came_from_is_no_source(content: str | None, tmp_path: Path) -> None:
    path = saved(tmp_path / "artifact") / artifact.PROVENANCE
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"^teacher\.source: expected a checkpoint [^\n]*$"):
        checkpoint.read_facts(str(path.parent), "teacher.source")


@pytest.mark.parametrize("content", ["[]", "7", '{"head_trained": "yes"}', '{"notes": {}}', "[" * 100_000, "{"])
def test_a_provenance_of_another_form_is_one_line(content: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "artifact") / artifact.PROVENANCE
    path.write_text(content)
    with pytest.raises(UserError, match=r"^artifact [^\n]*provenance\.json (is not of the form|cannot be read)[^\n]*$"):
        artifact.read_provenance(path.parent)


# Damage


def halve(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return change


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def unpickled_instead(folder: Path) -> None:
    torch.save({"weights": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / artifact.WEIGHTS).unlink()


def a_pickle_by_the_name_of_the_weights(folder: Path) -> None:
    torch.save(tiny.model(), folder / artifact.WEIGHTS)


def flip_a_header_byte(folder: Path) -> None:
    content = bytearray((folder / artifact.WEIGHTS).read_bytes())
    content[20] ^= 0xFF
    (folder / artifact.WEIGHTS).write_bytes(content)


def another_shape(folder: Path) -> None:
    structure = json.loads((folder / artifact.STRUCTURE).read_text())
    structure["layers"][0]["heads"] = 3
    (folder / artifact.STRUCTURE).write_text(json.dumps(structure))


def another_family(folder: Path) -> None:
    structure = json.loads((folder / artifact.STRUCTURE).read_text())
    (folder / artifact.STRUCTURE).write_text(json.dumps(structure | {"family": "roberta"}))


def a_tensor_less(folder: Path) -> None:
    tensors = load_file(folder / artifact.WEIGHTS)
    del tensors["classifier.bias"]
    save_file(tensors, folder / artifact.WEIGHTS)


def a_tensor_more(folder: Path) -> None:
    save_file(load_file(folder / artifact.WEIGHTS) | {"more": torch.zeros(1)}, folder / artifact.WEIGHTS)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated weights": (halve(artifact.WEIGHTS), "damaged"),
    "empty weights": (write(artifact.WEIGHTS, ""), "damaged"),
    "flipped header": (flip_a_header_byte, "damaged"),
    "pickled weights": (a_pickle_by_the_name_of_the_weights, "damaged"),
    "pickle beside": (unpickled_instead, "expected a file model.safetensors, found none"),
    "no weights": (delete(artifact.WEIGHTS), "expected a file model.safetensors, found none"),
    "no config": (delete(artifact.CONFIG), "expected a file config.json, found none"),
    "no structure": (delete(artifact.STRUCTURE), "expected a file structure.json, found none"),
    "truncated config": (halve(artifact.CONFIG), "damaged"),
    "truncated structure": (halve(artifact.STRUCTURE), "damaged"),
    "empty structure": (write(artifact.STRUCTURE, ""), "damaged"),
    "other shape": (another_shape, "does not fit structure.json"),
    "other family": (another_family, "family"),
    "missing tensor": (a_tensor_less, "does not fit structure.json .*classifier.bias"),
    "spare tensor": (a_tensor_more, "does not fit structure.json .*more"),
    "structure without layers": (write(artifact.STRUCTURE, "{}"), "structure.json"),
    "structure that is a list": (write(artifact.STRUCTURE, "[]"), "structure.json"),
    "config of nothing": (write(artifact.CONFIG, "{}"), "config.json|damaged"),
    "config of an unknown model": (write(artifact.CONFIG, '{"model_type": "nope"}'), "config.json|damaged"),
    "truncated tokenizer": (halve("tokenizer.json"), "tokenizer|damaged"),
    "truncated tokenizer configuration": (halve("tokenizer_config.json"), "tokenizer|damaged"),
    "no tokenizer.json": (delete("tokenizer.json"), "tokenizer|damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_artifact_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    change, expected = DAMAGE[name]
    folder = saved(tmp_path / "artifact")
    change(folder)
    with pytest.raises(UserError, match=expected) as refused:
        artifact.load(folder)
    line = str(refused.value)
    assert "\n" not in line and (str(folder) in line or name == "other family")


def test_a_directory_that_does_not_exist_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^artifact: expected a directory, given '[^\n]*nowhere', which does not exist$"
    ):
        edgemin.load(tmp_path / "nowhere")
