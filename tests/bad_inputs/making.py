"""Files for bad inputs: whole ones to begin with, and what is done to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import studies
import torch
from safetensors.torch import load_file, save_file

from edgemin import artifact, toy
from edgemin import checkpoint as checkpoints
from edgemin.encoder import quantized as quantized_encoder
from edgemin.quantization import model as quantization
from edgemin.quantization.ranges import Calibration
from edgemin.quantization.weights import Spec

# What a file is made of: its text, its bytes, or whatever makes it (it is given the path).
Content = str | bytes | Callable[[Path], object]

LABELS = ["negative", "positive"]
DEEP = "[" * 100_000 + "]" * 100_000


def make(files: Mapping[str, Content], directory: Path) -> None:
    """Make files in their order, each after those before it; a name that ends in `/` is an empty directory."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        elif name.endswith("/"):
            path.mkdir(parents=True)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content)


def checkpoint(path: Path) -> None:
    """A BERT of three layers (hidden size 32, four heads) with the toy task's head and tokenizer."""
    studies.checkpoint(path, LABELS)


def saved(path: Path) -> None:
    """The same as an artifact of EdgeMIN, with a quantized Linear."""
    studies.checkpoint(path / "from", LABELS)
    model = checkpoints.load_checkpoint(checkpoints.read_facts(str(path / "from"), "source"), 0)
    layers = {"bert.encoder.layer.0.output.dense": Spec(8, "channel")}
    quantization.quantize(model, layers, "minmax", Calibration())
    quantized_encoder.settle(model)
    artifact.save(path, model, toy.tokenizer(), {"head_trained": True})


def changed(**settings: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file."""
    return edited(lambda content: content.update(settings))


def edited(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Do something to the content of a JSON file."""

    def change(path: Path) -> None:
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return change


def removed(path: Path) -> None:
    """Delete the file at this path."""
    path.unlink()


def truncated(path: Path) -> None:
    """Keep the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Do something to the tensors of a safetensors file."""

    def change(path: Path) -> None:
        content = load_file(path)
        edit(content)
        save_file(content, path, {"format": "pt"})

    return change


def pickled(content: Any) -> Callable[[Path], None]:
    """A file that `torch.save` wrote, which is a pickle."""
    return lambda path: torch.save(content, path)


def link(target: str) -> Callable[[Path], None]:
    """A symbolic link to this place."""
    return lambda path: path.symlink_to(target)


def sharded(edit: Callable[[dict[str, Any]], object] = lambda index: None) -> Callable[[Path], None]:
    """Split a `model.safetensors` in two with an index, and do something to the index."""

    def change(path: Path) -> None:
        names = sorted(content := load_file(path))
        path.unlink()
        weight_map: dict[str, Any] = {}
        for number, half in enumerate((names[::2], names[1::2]), start=1):
            file = f"model-{number:05}-of-00002.safetensors"
            save_file({name: content[name] for name in half}, path.with_name(file), {"format": "pt"})
            weight_map |= dict.fromkeys(half, file)
        index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        edit(index)
        path.with_name("model.safetensors.index.json").write_text(json.dumps(index))

    return change


def words(rename: Callable[[str], str | None]) -> Callable[[Path], None]:
    """Rename the words (special tokens apart) of a `tokenizer.json`; `None` leaves a word out."""

    def edit(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        renamed = {(word if word.startswith("[") else rename(word)): index for word, index in vocabulary.items()}
        content["model"]["vocab"] = {word: index for word, index in renamed.items() if word is not None}

    return edited(edit)


def parquet(**columns: list[Any]) -> Callable[[Path], None]:
    """A parquet file of these columns."""
    return lambda path: pq.write_table(pa.table(columns), path)


def finetuned(store: Path) -> Path:
    """The directory of the one fine-tuned student in a store."""
    (found,) = (
        path.parent
        for path in store.glob("*/provenance.json")
        if json.loads(path.read_text())["path"] == "student/finetune"
    )
    return found
