"""Where the paths of a study start: its named models, read as far as planning needs them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from edgemin import checkpoint, roots
from edgemin.checkpoint import Facts
from edgemin.data import Splits
from edgemin.errors import UserError
from edgemin.roots import Outline, Root
from edgemin.stages.base import Shape

_PROBE = 256  # training texts on which two tokenizers must agree


@dataclass(frozen=True, eq=False)
class Start:
    """A named model, with what planning had to read of it.

    Attributes:
        name: ``teacher``, ``student``.
        root: its settings.
        config: of its checkpoint, or of its random weights.
        facts: of its checkpoint; ``None`` for random weights.
        tokenizer: ``None`` only without data.
        shape: what the stages find.
        own_labels: its checkpoint's head already speaks the task's labels.
    """

    name: str
    root: Root
    config: PretrainedConfig
    facts: Facts | None
    tokenizer: PreTrainedTokenizerBase | None
    shape: Shape
    own_labels: bool

    @property
    def generic_labels(self) -> bool:
        """Whether its checkpoint's labels are ``LABEL_0`` and so on."""
        return self.facts is not None and all(name.startswith("LABEL_") for name in self.facts.labels or ())

    def content(self, splits: Splits | None, parent_key: str | None) -> dict[str, Any]:
        """What decides the model that starts here, for its key: contents, never paths."""
        content: dict[str, Any] = {"root": roots.describe(self.root)}
        if parent_key is not None:
            content["parent"] = parent_key
        elif self.facts is not None:
            content["files"] = checkpoint.fingerprint(self.facts.directory)
        else:
            content |= {"family": self.shape.family, "vocabulary": self.config.vocab_size}
        content["tokenizer"] = _tokenizer_digest(self.tokenizer)
        if self.own_labels and splits is not None:
            content["labels"] = list(splits.labels)
        if self.facts is not None and self.facts.draws_head:
            content["seed"] = self.root.seed
        return content


def read_starts(named: Mapping[str, Root], splits: Splits | None) -> dict[str, Start]:
    """Find every named model's checkpoint and tokenizer; the teacher first, others may start from it.

    Raises:
        UserError: a checkpoint or tokenizer that cannot be had, or settings that contradict each other.
    """
    starts: dict[str, Start] = {}
    for name in sorted(named, key=lambda name: name != "teacher"):
        starts[name] = _read(name, named[name], starts.get("teacher"), splits)
    return starts


def _read(name: str, root: Root, teacher: Start | None, splits: Splits | None) -> Start:
    facts, config = _weights(name, root, teacher)
    tokenizer = _tokenizer(name, root, teacher)
    if tokenizer is None and splits is not None:
        raise UserError(f"{name}.tokenizer: expected a Hub id, a directory or toy, as there is no source, given null")
    try:
        if config is None:
            config = _random_config(root, teacher, tokenizer)
        outline = roots.outline(config, facts.structure if facts is not None else None, root)
    except UserError as error:
        raise UserError(f"{name}.{error}") from error
    if facts is not None and facts.quantised and outline.structure != facts.structure:
        raise UserError(f"{name}.source: expected weights that can be cut, given {root.source}, which is quantised")
    _check_tokenizer(name, outline, tokenizer, splits)
    labels = facts.labels if facts is not None and root.source != "teacher" else None
    own = (
        labels is not None
        and splits is not None
        and not splits.task.regression
        and checkpoint.head_order(labels, splits.labels) is not None
    )
    return Start(name, root, config, facts, tokenizer, _shape(outline.structure), own)


def _weights(name: str, root: Root, teacher: Start | None) -> tuple[Facts | None, PretrainedConfig | None]:
    if name == "teacher" and root.source in roots.FROM_TEACHER:
        raise UserError(f"teacher.source: expected a Hub id, a directory or null, given {root.source}")
    if name == "student" and root.stages:
        raise UserError(f"student.stages: expected none (the key stages has them), given {list(root.stages)}")
    if root.source in roots.FROM_TEACHER:
        assert teacher is not None
        if teacher.facts is None and root.source == "teacher.source":
            raise UserError(f"{name}.source: expected a teacher with weights, given teacher.source while that is null")
        return teacher.facts, teacher.config
    if root.source is not None:
        facts = checkpoint.read_facts(root.source, f"{name}.source")
        return facts, facts.config
    return None, None


def _tokenizer(name: str, root: Root, teacher: Start | None) -> PreTrainedTokenizerBase | None:
    source = root.tokenizer or (root.source if root.source not in roots.FROM_TEACHER else None)
    if source is not None:
        return checkpoint.read_tokenizer(source, f"{name}.tokenizer")
    return teacher.tokenizer if teacher is not None else None


def _random_config(root: Root, teacher: Start | None, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
    family = root.family or (teacher.shape.family if teacher is not None else None)
    if family is None:
        raise UserError("family: expected a family, as there is no source to take it from, given null")
    if tokenizer is None and root.vocabulary is None:
        raise UserError("vocabulary: expected a whole number, as there is no tokenizer to take it from, given null")
    padding = tokenizer.pad_token_id if tokenizer is not None else None
    return roots.random_config(root, family, len(tokenizer) if tokenizer is not None else 1, padding or 0)


def _shape(structure: Mapping[str, Any]) -> Shape:
    layers = structure["layers"]
    narrowed = any(layer["heads"] * layer["head_size"] != structure["hidden"] for layer in layers)
    return Shape(structure["family"], len(layers), structure["hidden"], layers[0]["heads"], narrowed)


def _check_tokenizer(
    name: str, outline: Outline, tokenizer: PreTrainedTokenizerBase | None, splits: Splits | None
) -> None:
    if tokenizer is None or splits is None:
        return
    rows = outline.structure["vocabulary"]
    if len(tokenizer) > rows:
        raise UserError(
            f"{name}.tokenizer: expected at most the {rows} tokens the weights embed, given one of {len(tokenizer)}"
        )
    limit, asked = min(outline.max_tokens, tokenizer.model_max_length), splits.task.max_length
    if asked > limit:
        raise UserError(f"task.max_length: expected at most {limit}, what the {name} takes, given {asked}")


def check_same_tokens(stage: str, student: Start, teacher: Start, splits: Splits | None) -> None:
    """Refuse a teacher whose tokenizer cuts the training texts otherwise than the student's.

    Raises:
        UserError: vocabularies or tokens differ.
    """
    mine, theirs = student.tokenizer, teacher.tokenizer
    if mine is theirs or mine is None or theirs is None or splits is None:
        return
    texts = [text for pair in splits.train.texts[:_PROBE] for text in pair]
    if mine.get_vocab() != theirs.get_vocab() or mine(texts)["input_ids"] != theirs(texts)["input_ids"]:
        raise UserError(
            f"{stage}.teacher: expected a teacher with the student's tokenizer, as relations compare token by token, "
            f"given {teacher.root.name} and {student.root.name}, whose tokens differ"
        )


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content |= {"padding": None, "truncation": None}  # states of its last call
    else:
        content = {"vocabulary": tokenizer.get_vocab()}
    content |= {"pad": tokenizer.pad_token_id, "inputs": list(tokenizer.model_input_names)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
