"""The models that paths start at: from a checkpoint, from a teacher's layers, or from a shape alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from edgemin import encoder
from edgemin.errors import UserError

FROM_TEACHER = ("teacher", "teacher.source")
Layers = int | list[int] | None


@dataclass(frozen=True)
class Root:
    """A model as its yaml names it (``teacher=``, ``student=``). Layers count from 1.

    Attributes:
        name: how tables and logs call it.
        source: a Hub id or a local directory with weights, an EdgeMIN artifact included; for a student also
            ``teacher.source`` (the teacher's weights as they came) or ``teacher`` (its trained ones). ``None`` starts
            at random.
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


class Outline(NamedTuple):
    """The shape of a model without its weights."""

    structure: dict[str, Any]
    max_tokens: int


def outline(config: PretrainedConfig, structure: dict[str, Any] | None, root: Root) -> Outline:
    """The model that a root becomes, built without weights and cut as the weights will be.

    Raises:
        UserError: a shape that the checkpoint cannot be cut to.
    """
    with torch.device("meta"):
        model = encoder.build(config, structure)
    if root.source is not None:
        reshape(model, root)
    return Outline(encoder.structure(model), encoder.max_tokens(model))


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


def random_config(root: Root, family: str, vocabulary: int, padding_id: int) -> PretrainedConfig:
    """The configuration of a model that starts at random.

    Raises:
        UserError: the shape is incomplete or impossible.
    """
    widths = {key: getattr(root, key) for key in ("layers", "hidden", "heads", "intermediate")}
    for key, value in widths.items():
        if not isinstance(value, int):
            raise UserError(f"{key}: expected a whole number, as there is no source to take it from, given {value!r}")
    if root.vocabulary is not None and root.vocabulary < vocabulary:
        raise UserError(f"vocabulary: expected at least the tokenizer's {vocabulary}, given {root.vocabulary}")
    return encoder.configure(family, **widths, vocabulary=root.vocabulary or vocabulary, padding_id=padding_id)


def describe(root: Root) -> dict[str, Any]:
    """What of a root decides the model that it becomes (its name, path and place in the file system do not)."""
    keys = ["layers", "layer_choice", "hidden", "heads", "intermediate", "vocabulary", "truncate_width", "family"]
    return {key: getattr(root, key) for key in keys} | ({"seed": root.seed} if root.source is None else {})
