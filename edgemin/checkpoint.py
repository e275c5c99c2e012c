"""A checkpoint as its makers left it: found, fingerprinted, read, its head brought into a task's label order."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from edgemin import artifact, encoder, toy
from edgemin.disk import file_digest
from edgemin.errors import UserError

#: Files of a checkpoint that decide what is loaded.
_FILES = (
    "model*.safetensors",
    "*.index.json",
    "pytorch_model*.bin",
    "config.json",
    "structure.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
)


@dataclass(frozen=True)
class Facts:
    """What planning knows of a checkpoint before its weights are read."""

    directory: Path
    config: PretrainedConfig
    structure: dict[str, Any] | None  #: of an EdgeMIN artifact, whose widths the configuration cannot say
    labels: tuple[str, ...] | None  #: of a trained classification head; ``None`` without one
    quantised: bool  #: its Linears are torch's dynamic INT8
    draws_head: bool  #: parts of its head besides the classifier are missing and drawn at random


def read_facts(source: str, key: str) -> Facts:
    """Find a checkpoint (download it where it is a Hub id) and read its configuration.

    Raises:
        UserError: it is neither a directory nor to be had from the Hub, or its architecture is unknown.
    """
    directory = find(source, key)
    structure = None
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        raw = json.loads((directory / artifact.CONFIG).read_text())
        if (directory / artifact.STRUCTURE).is_file():  # an EdgeMIN artifact says itself whether its head was trained
            structure = json.loads((directory / artifact.STRUCTURE).read_text())
            classifier = bool(artifact.read_provenance(directory)["head_trained"])
        else:
            classifier = any(str(name).endswith("ForSequenceClassification") for name in raw.get("architectures") or [])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{key}: expected a checkpoint with a config.json, given {source} ({_first_line(error)})"
        ) from error
    encoder.family(config)
    labels = tuple(config.id2label[index] for index in sorted(config.id2label)) if classifier else None
    names = _tensor_names(directory, key)
    quantised = any(name.endswith(f".{artifact.PACKED}") for name in names)
    draws_head = not all(any(part in name for name in names) for part in encoder.head_parts(config))
    return Facts(directory, config, structure, labels, quantised, draws_head)


def _tensor_names(directory: Path, key: str) -> list[str]:
    """What is in a checkpoint's safetensors; nothing is known of other files before they are loaded."""
    names: list[str] = []
    for path in sorted(directory.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names += file.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{key}: the weights in {path} cannot be read ({_first_line(error)})") from error
    return names


@cache
def find(source: str, key: str) -> Path:
    """The local directory of a checkpoint: a path as it is, a Hub id from the cache or the network."""
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{key}: expected an existing directory or a Hub id, given {source!r}, which does not exist")
    try:
        kept = snapshot_download(source, allow_patterns=list(_FILES), ignore_patterns=["*/*"])
    except Exception as error:  # the Hub's client raises many kinds
        raise UserError(
            f"{key}: expected a local directory or a Hub id that is cached or can be reached, given {source!r} "
            f"({type(error).__name__}); "
            f"without a network give {key}=<directory with the weights>"
        ) from error
    return Path(kept)


def fingerprint(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint that decides what is loaded, by name."""
    files = {path for pattern in _FILES for path in directory.glob(pattern) if path.is_file()}
    if any(path.suffix == ".safetensors" for path in files):
        files = {path for path in files if path.suffix != ".bin"}
    return {path.name: _digest(path, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)}


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """A file's, once for every state of it: all jobs of a sweep ask for that of the same weights."""
    return file_digest(path)


def read_tokenizer(source: str, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id or local directory, or the toy task's.

    Raises:
        UserError: there is none.
    """
    if source == "toy":
        return toy.tokenizer()
    directory = find(source, key)
    try:
        return cast(
            PreTrainedTokenizerBase,
            AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False),
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{key}: expected a tokenizer beside the weights of {source}, found none ({_first_line(error)})"
        ) from error


def load_checkpoint(facts: Facts, seed: int) -> PreTrainedModel:
    """A checkpoint as a sequence classifier; what its head lacks is drawn from the seed.

    Raises:
        UserError: the weights are damaged, or the encoder's are not all there.
    """
    if facts.structure is not None:
        return artifact.load(facts.directory)[0]
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    try:
        # torch reads .bin files with weights_only; no pickled object is ever executed
        model, report = AutoModelForSequenceClassification.from_pretrained(
            facts.directory,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, EOFError, ValueError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"source: the weights in {facts.directory} cannot be loaded ({_first_line(error)})") from error
    absent = sorted(key for key in report["missing_keys"] if not key.startswith(encoder.head_prefixes(model)))
    if absent:
        raise UserError(f"source: expected all weights of the encoder in {facts.directory}, given none for {absent[0]}")
    encoder.silence_padding(model)
    return cast(PreTrainedModel, model)


def align_head(model: PreTrainedModel, labels: Sequence[str]) -> bool:
    """Bring the head of an already fine-tuned checkpoint into the task's label order, by name.

    Returns:
        Whether the head speaks this task's labels: their names (case apart) are the same, or the checkpoint has only
        generic names
        (``LABEL_0`` ...) and as many of them.
    """
    order = head_order(encoder.label_names(model), labels)
    if order is None:
        return False
    if order == list(range(len(labels))):
        _name_labels(model, labels)
        return True
    classifier = model.get_submodule(encoder.classifier_prefix(model))
    if not isinstance(classifier, torch.nn.Linear):
        raise UserError(
            f"source: expected the labels in the order {list(labels)} of a head that is quantised, given others"
        )
    encoder.slice_weight(classifier, torch.tensor(order), None)
    _name_labels(model, labels)
    return True


def _name_labels(model: PreTrainedModel, labels: Sequence[str]) -> None:
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}
    model.config.problem_type = "single_label_classification"


def head_order(have: Sequence[str], want: Sequence[str]) -> list[int] | None:
    """For each wanted label the row of the head that scores it, or ``None`` where the labels do not match."""
    if [name.upper() for name in have] == [f"LABEL_{index}" for index in range(len(want))]:
        return list(range(len(want)))
    rows = {_plain(name): index for index, name in enumerate(have)}
    if len(have) != len(want) or set(rows) != {_plain(name) for name in want}:
        return None
    return [rows[_plain(name)] for name in want]


def _plain(label: str) -> str:
    return label.lower().replace("-", "_").replace(" ", "_")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
