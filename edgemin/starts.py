"""Where the paths of a study start: its named models, read as far as planning needs them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from edgemin import roots
from edgemin.data import Splits
from edgemin.errors import UserError
from edgemin.roots import Facts, Root
from edgemin.stages.base import Shape

_PROBE = 256  # training texts on which two tokenizers must agree


@dataclass(frozen=True, eq=False)
class Start:
    """A named model, with what planning had to read of it.

    Attributes:
        name: ``teacher``, ``student``.
        root: its settings.
        facts: of its checkpoint; ``None`` for random weights.
        tokenizer: ``None`` only without data.
        family: as :func:`edgemin.encoder.family` names it.
        own_labels: its checkpoint's head already speaks the task's labels.
    """

    name: str
    root: Root
    facts: Facts | None
    tokenizer: PreTrainedTokenizerBase | None
    family: str
    own_labels: bool

    def shape(self, below: Shape | None) -> Shape:
        """The shape of the model that starts here; ``below`` is the trained teacher's where it is cut from that.

        Raises:
            UserError: the shape is incomplete or cannot be cut from the weights.
        """
        root, name = self.root, self.name
        if below is None and self.facts is not None:
            below = Shape(self.family, self.facts.layers, self.facts.hidden, self.facts.heads)
        if below is None:
            if (
                not isinstance(root.layers, int)
                or root.hidden is None
                or root.heads is None
                or root.intermediate is None
            ):
                raise UserError(
                    f"{name}.layers: expected whole numbers for layers, hidden, heads and intermediate of a model "
                    f"without source, given {root.layers}, {root.hidden}, {root.heads} and {root.intermediate}"
                )
            return Shape(self.family, root.layers, root.hidden, root.heads)
        try:
            layers = len(root.chosen_layers(below.layers))
        except UserError as error:
            raise UserError(f"{name}.{error}") from error
        for key, here in (("hidden", below.hidden), ("heads", below.heads)):
            asked = getattr(root, key)
            if asked is not None and asked != here and not root.truncate_width:
                raise UserError(
                    f"{name}.{key}: expected the {here} of {root.source}, or {name}.truncate_width=true to cut it, "
                    f"given {asked}"
                )
        return below._replace(layers=layers, hidden=root.hidden or below.hidden, heads=root.heads or below.heads)

    def content(self, splits: Splits | None, parent_key: str | None) -> dict[str, Any]:
        """What decides the model that starts here, for its key: contents, never paths."""
        content: dict[str, Any] = {"root": roots.describe(self.root)}
        if parent_key is not None:
            content["parent"] = parent_key
        elif self.facts is not None:
            content["files"] = roots.fingerprint(self.facts.directory)
        else:
            content |= {"family": self.family, "vocabulary": self.root.vocabulary or len(self.tokenizer or ())}
        if self.root.tokenizer is not None or self.facts is None:
            content["tokenizer"] = _tokenizer_digest(self.tokenizer)
        if self.own_labels and splits is not None:
            content["labels"] = list(splits.labels)
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
    if name == "teacher" and root.source in roots.FROM_TEACHER:
        raise UserError(f"teacher.source: expected a Hub id, a directory or null, given {root.source}")
    if name == "student" and root.stages:
        raise UserError(f"student.stages: expected none (the key stages has them), given {list(root.stages)}")
    facts, family = None, root.family or (teacher.family if teacher else "")
    tokenizer = teacher.tokenizer if teacher is not None else None
    if root.source in roots.FROM_TEACHER:
        assert teacher is not None
        if teacher.facts is None and root.source == "teacher.source":
            raise UserError(
                f"{name}.source: expected a teacher with weights of its own, given teacher.source while that is null"
            )
        facts, family = teacher.facts, teacher.family
    elif root.source is not None:
        facts = roots.read_facts(root.source, f"{name}.source")
        tokenizer, family = roots.read_tokenizer(root.tokenizer or root.source, f"{name}.tokenizer"), facts.family
    elif not family:
        raise UserError(
            f"{name}.family: expected a family, since there is no {name}.source to take it from, given null"
        )
    if root.tokenizer is not None:
        tokenizer = roots.read_tokenizer(root.tokenizer, f"{name}.tokenizer")
    if tokenizer is None and splits is not None:
        raise UserError(
            f"{name}.tokenizer: expected a Hub id, a directory or toy, since there is no {name}.source, given null"
        )
    labels = facts.labels if facts is not None and root.source != "teacher" else None
    own = (
        labels is not None
        and splits is not None
        and not splits.task.regression
        and roots.head_order(labels, splits.labels) is not None
    )
    return Start(name, root, facts, tokenizer, family, own)


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
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()
