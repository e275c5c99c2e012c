"""The models that paths start at: from a checkpoint, from a teacher's layers, or from a shape alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from edgemin import artifact, encoder, toy
from edgemin.errors import UserError
from edgemin.store import file_digest

#: Files of a checkpoint that decide what is loaded.
_FILES = (
    "model*.safetensors",
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
FROM_TEACHER = ("teacher", "teacher.source")
Layers = int | list[int] | None


@dataclass(frozen=True)
class Root:
    """A model as its yaml names it (``teacher=``, ``student=``). Layers count from 1.

    Attributes:
        name: how tables and logs call it.
        source: a Hub id or a local directory with weights, an EdgeMIN artifact included; for a student also
            ``teacher.source`` (the teacher's weights as they
            came) or ``teacher`` (its trained ones). ``None`` starts at random.
        family: only for a random start: ``bert``, ``electra``, ``distilbert``, ``roberta``, ``modernbert``; ``None``
            is the teacher's.
        layers: how many layers, or which (a list); ``None`` keeps all of the source.
        layer_choice: which, when ``layers`` is a number below the source's: ``even`` (evenly spaced, the last
            included), ``first``, ``last``.
        hidden: hidden size.
        heads: attention heads per layer.
        intermediate: FFN units per layer.
        vocabulary: rows of the word embedding; only for a random start, ``None`` is the tokenizer's.
        truncate_width: let ``hidden``, ``heads`` and ``intermediate`` cut the source's weights (the first ones are
            kept).
        tokenizer: Hub id, local directory or ``toy``; ``None`` is the source's, for a student without one the
            teacher's.
        stages: the path from the weights to the model that teaches: ``[finetune]``, or ``[]`` for a checkpoint that
            is already fine-tuned. Teachers only.
        seed: of random weights and of those stages.
    """

    name: str
    source: str | None = None
    family: str | None = None
    layers: Layers = None
    layer_choice: Literal["even", "first", "last"] = "even"
    hidden: int | None = None
    heads: int | None = None
    intermediate: int | None = None
    vocabulary: int | None = None
    truncate_width: bool = False
    tokenizer: str | None = None
    stages: Sequence[str] = ()
    seed: int = 42

    def __post_init__(self) -> None:
        for key in ("hidden", "heads", "intermediate", "vocabulary"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}: expected a whole number of at least 1, given {value}")
        if self.source is not None:
            for key in ("family", "vocabulary"):
                if getattr(self, key) is not None:
                    raise UserError(
                        f"{key}: expected null, it comes with source={self.source}, given {getattr(self, key)!r}"
                    )

    def chosen_layers(self, available: int) -> list[int]:
        """Which of a source's layers are kept, counted from 1.

        Raises:
            UserError: a layer the source does not have.
        """
        if self.layers is None:
            return list(range(1, available + 1))
        if isinstance(self.layers, list):
            wrong = [layer for layer in self.layers if not 1 <= layer <= available]
            if wrong or not self.layers or sorted(set(self.layers)) != self.layers:
                raise UserError(
                    f"layers: expected ascending layers from 1 to {available} of {self.source}, given {self.layers}"
                )
            return self.layers
        if not 1 <= self.layers <= available:
            raise UserError(
                f"layers: expected at most the {available} layers of {self.source}, at least 1, given {self.layers}"
            )
        if self.layer_choice == "first":
            return list(range(1, self.layers + 1))
        if self.layer_choice == "last":
            return list(range(available - self.layers + 1, available + 1))
        return [-(-layer * available // self.layers) for layer in range(1, self.layers + 1)]


@dataclass(frozen=True)
class Facts:
    """What planning knows of a checkpoint before its weights are read."""

    directory: Path
    family: str
    layers: int
    hidden: int
    heads: int
    labels: tuple[str, ...] | None  #: of a trained classification head; ``None`` without one


def read_facts(source: str, key: str) -> Facts:
    """Find a checkpoint (download it where it is a Hub id) and read its configuration.

    Raises:
        UserError: it is neither a directory nor to be had from the Hub, or its architecture is unknown.
    """
    directory = find(source, key)
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        raw = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: expected a checkpoint with a config.json, given {source} ({_first_line(error)})"
        ) from error
    layers = config.num_hidden_layers
    if (directory / artifact.STRUCTURE).is_file():
        layers = len(json.loads((directory / artifact.STRUCTURE).read_text())["layers"])
    classifier = any(str(name).endswith("ForSequenceClassification") for name in raw.get("architectures") or [])
    labels = tuple(config.id2label[index] for index in sorted(config.id2label)) if classifier else None
    return Facts(directory, encoder.family(config), layers, config.hidden_size, config.num_attention_heads, labels)


@cache
def find(source: str, key: str) -> Path:
    """The local directory of a checkpoint: a path as it is, a Hub id from the cache or the network."""
    if Path(source).is_dir():
        return Path(source)
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
    return {path.name: file_digest(path) for path in sorted(files)}


def read_tokenizer(source: str, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id or local directory, or the toy task's.

    Raises:
        UserError: there is none.
    """
    if source == "toy":
        return toy.tokenizer()
    directory = find(source, key)
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(directory, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{key}: expected a tokenizer beside the weights of {source}, found none ({_first_line(error)})"
        ) from error


def load_checkpoint(facts: Facts) -> PreTrainedModel:
    """A checkpoint as a sequence classifier; a missing head is drawn at random and replaced when first trained."""
    if (facts.directory / artifact.STRUCTURE).is_file():
        return artifact.load(facts.directory)[0]
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    try:
        # torch reads .bin files with weights_only; no pickled object is ever executed
        model = AutoModelForSequenceClassification.from_pretrained(
            facts.directory, local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"source: the weights in {facts.directory} cannot be loaded ({_first_line(error)})") from error
    return cast(PreTrainedModel, model)


def reshape(model: PreTrainedModel, root: Root) -> PreTrainedModel:
    """Cut a checkpoint to a student's shape, in place: chosen layers, then the first units of each width.

    Raises:
        UserError: a shape the weights cannot be cut to.
    """
    found = encoder.structure(model)
    chosen = root.chosen_layers(len(found["layers"]))
    if len(chosen) < len(found["layers"]):
        encoder.slice_layers(model, [layer - 1 for layer in chosen])
    layer = found["layers"][0]
    here = {"hidden": found["hidden"], "heads": layer["heads"], "intermediate": layer["ffn"]}
    asked = {key: getattr(root, key) or value for key, value in here.items()}
    if asked == here:
        return model
    for key, value in here.items():
        if asked[key] > value:
            raise UserError(f"{key}: expected at most the {value} of {root.source}, given {asked[key]}")
    if not root.truncate_width:
        changed = next(key for key in here if asked[key] != here[key])
        raise UserError(
            f"{changed}: expected the {here[changed]} of {root.source}, or truncate_width=true to cut it, "
            f"given {asked[changed]}"
        )
    if asked["hidden"] % asked["heads"]:
        raise UserError(f"heads: expected a divisor of the hidden size {asked['hidden']}, given {asked['heads']}")
    head_size = asked["hidden"] // asked["heads"]
    if head_size > layer["head_size"]:
        raise UserError(
            f"heads: expected at least {asked['hidden'] // layer['head_size']}, of the size the source's heads have, "
            f"given {asked['heads']}"
        )
    for index in range(len(chosen)):
        encoder.slice_heads(model, index, range(asked["heads"]))
        encoder.slice_ffn(model, index, range(asked["intermediate"]))
    if head_size < layer["head_size"]:
        encoder.slice_head_size(model, head_size)
    encoder.slice_hidden(model, range(asked["hidden"]))
    return model


def random_model(root: Root, family: str, vocabulary: int, padding_id: int) -> PreTrainedModel:
    """An encoder of a shape with weights drawn from the root's seed.

    Raises:
        UserError: the shape is incomplete or impossible.
    """
    for key in ("layers", "hidden", "heads", "intermediate"):
        if not isinstance(getattr(root, key), int):
            raise UserError(
                f"{key}: expected a whole number, as there is no source to take it from, given {getattr(root, key)!r}"
            )
    config = encoder.configure(
        family,
        layers=cast(int, root.layers),
        hidden=cast(int, root.hidden),
        heads=cast(int, root.heads),
        intermediate=cast(int, root.intermediate),
        vocabulary=root.vocabulary or vocabulary,
        padding_id=padding_id,
    )
    torch.manual_seed(root.seed)
    return encoder.build(config)


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
    classifier = model.get_submodule(encoder.classifier_prefix(model))
    with torch.no_grad():
        for name in ("weight", "bias"):
            parameter = cast(torch.Tensor, getattr(classifier, name))
            parameter.copy_(parameter[order].clone())
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}
    model.config.problem_type = "single_label_classification"
    return True


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


def describe(root: Root) -> dict[str, Any]:
    """What of a root decides the model that it becomes (its name, path and place in the file system do not)."""
    keys = ["layers", "layer_choice", "hidden", "heads", "intermediate", "vocabulary", "truncate_width", "family"]
    return {key: getattr(root, key) for key in keys} | ({"seed": root.seed} if root.source is None else {})
