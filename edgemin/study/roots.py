"""The models that paths start at: from a checkpoint, from a teacher's layers, or from a shape alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le
from transformers import PretrainedConfig, PreTrainedModel

from edgemin.config import Checked, Whole
from edgemin.encoder import building, config_file, parts, shapes, slicing, truncation
from edgemin.encoder.families import LARGEST
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError

log = logging.getLogger(__name__)
Layers = int | list[int] | None


@dataclass(frozen=True)
class Root(Checked):
    """A model as its yaml names it (`teacher=`, `student=`). Layers count from 1.

    Attributes:
        name: how tables and logs call it.
        source: a Hub id or a local directory with weights, an EdgeMIN artifact included; or another model of the study:
            `teacher.source` (its weights as they came) or `teacher` (its trained ones). `None` starts at random.
        family: only for a random start: `bert`, `electra`, `distilbert`, `roberta`, `modernbert`, `mobilebert`; `None`
            is the teacher's.
        inherit: what is taken of the source: `all`, or `embeddings` (tables, their norm and projection) under layers
            and a head drawn at random, as many and as wide as asked for.
        layers: how many layers, or which (a list); `None` keeps all of the source.
        layer_choice: which, when `layers` is a number below the source's: `even` (evenly spaced, the last included),
            `first`, `last`.
        hidden: hidden size.
        heads: attention heads per layer.
        intermediate: FFN units per layer.
        vocabulary: rows of the word embedding; only for a random start, `None` is the tokenizer's.
        truncate: how `hidden`, `heads` and `intermediate` may cut the source's weights: `first` (the first units are
            kept), `weight_product` (those that write and read most, as for the pruning criterion of that name), `pca`
            (of the hidden size the principal directions of the word embeddings, the rest by weight_product); see
            [`truncation`][edgemin.encoder.truncation]. `None` cuts no width.
        tokenizer: Hub id, local directory or `toy`; `None` is the source's, or for a student without a source the
            teacher's.
        stages: only for a teacher, the path from the weights to the model that teaches: `[finetune]`, or `[]` for a
            checkpoint that is already fine-tuned.
        latent: whether training begins at the unrounded weights and the scales that a quantized source has beside it
            (`quantize.keep_latent`), not at its rounded ones; `auto`: where it has them.
        seed: what random weights are drawn from, and what those stages run with.
    """

    name: str
    source: str | None = None
    family: str | None = None
    inherit: Literal["all", "embeddings"] = "all"
    layers: Layers = None
    layer_choice: Literal["even", "first", "last"] = "even"
    hidden: Annotated[int, Ge(1), Le(LARGEST["hidden"])] | None = None
    heads: Annotated[int, Ge(1), Le(LARGEST["heads"])] | None = None
    intermediate: Annotated[int, Ge(1), Le(LARGEST["intermediate"])] | None = None
    vocabulary: Annotated[int, Ge(1), Le(LARGEST["vocabulary"])] | None = None
    truncate: truncation.Truncation | None = None
    tokenizer: str | None = None
    stages: Sequence[str] = ()
    latent: Literal["auto"] | bool = "auto"
    seed: Whole = 42

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, int) and self.layers > LARGEST["layers"]:
            raise UserError(f"layers: expected a whole number up to {LARGEST['layers']}, given {self.layers}")
        if self.source is None:
            self._check_random()
        else:
            self._check_inherited(self.source)

    def _check_random(self) -> None:
        if self.inherit != "all":
            raise UserError(f"inherit: expected all, as there is no source, given {self.inherit}")
        if self.truncate is not None:
            raise UserError(f"truncate: expected null, as there is no source to cut, given {self.truncate}")

    def _check_inherited(self, source: str) -> None:
        for key in ("family", "vocabulary"):
            if getattr(self, key) is not None:
                raise UserError(f"{key}: expected null, it comes with source={source}, given {getattr(self, key)!r}")
        if self.inherit == "embeddings":
            if isinstance(self.layers, list) or (self.layers is not None and self.layers < 1):
                raise UserError(
                    "layers: expected a number of at least 1, as inherit=embeddings takes none of the source's, given "
                    f"{self.layers}"
                )
            if self.layer_choice != "even":
                raise UserError(
                    "layer_choice: expected even, the default, as inherit=embeddings has no layers to choose from, "
                    f"given {self.layer_choice}"
                )
        cut = ("hidden",) if self.inherit == "embeddings" else ("hidden", "heads", "intermediate")
        if self.truncate is not None and all(getattr(self, key) is None for key in cut):
            raise UserError(f"truncate: expected {' or '.join(cut)} beside it, to cut to, given {self.truncate} alone")

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


def outline(config: PretrainedConfig, source: Outline | None, root: Root) -> Outline:
    """The outline of the model that a root becomes, which is built without weights and cut as the weights will be.

    Args:
        config: of its source, or of a model that starts at random.
        source: the outline of its source, if it has one.
        root: what is asked for.

    Raises:
        UserError: a shape that the checkpoint cannot be cut to.
    """
    with torch.device("meta"):
        model = building.build(config, source)
    try:
        config_file.check_size(model)
    except UserError as error:
        raise UserError(f"hidden: {error}") from error
    before = building.outline(model)
    if root.source is None:
        return before
    after = building.outline(reshape(model, root))
    if root.truncate is not None and after.hidden == before.hidden:
        chosen = root.chosen_layers(len(before.layers)) if root.inherit == "all" else []
        if root.inherit == "embeddings" or after.layers == tuple(before.layers[layer - 1] for layer in chosen):
            log.warning(
                "%s: truncate=%s cuts nothing: no width that it may cut is asked below that of %s",
                *(root.name, root.truncate, root.source),
            )
    return after


def reshape(model: PreTrainedModel, root: Root) -> PreTrainedModel:
    """Bring a checkpoint to the shape of a root: its layers and widths cut, or its embeddings under fresh layers.

    Fresh layers are drawn from the root's seed; the global generator stays where it is.

    Args:
        model: the checkpoint; it is cut in place, or its embeddings are moved to another, so it is of no further use.
        root: what is asked for; it has a source.

    Raises:
        UserError: a shape that the weights cannot be cut to.
    """
    if root.inherit == "embeddings":
        return _with_fresh_layers(model, root)
    count = parts.num_layers(model)
    chosen = root.chosen_layers(count)
    if len(chosen) < count:
        slicing.slice_layers(model, [layer - 1 for layer in chosen])
    found = building.outline(model)
    cut = {key: _is_cut(key, widths, root) for key, widths in _widths(found).items()}
    if any(cut.values()):
        heads, head_size = _inner_widths(found, root) if cut["hidden"] or cut["heads"] else (None, None)
        _truncate(model, root, heads=heads, head_size=head_size, ffn=root.intermediate, hidden=root.hidden)
    return model


def _with_fresh_layers(model: PreTrainedModel, root: Root) -> PreTrainedModel:
    found = building.outline(model)
    layer = found.layers[0]
    _is_cut("hidden", [found.hidden], root)
    heads = root.heads or layer.heads
    assert heads is not None and layer.ffn is not None, "the model is here"
    _check_heads(heads, _attention_width(found, root), root)
    _truncate(model, root, hidden=root.hidden)
    assert not isinstance(root.layers, list)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(root.seed)
        return truncation.with_fresh_layers(
            model,
            layers=root.layers or len(found.layers),
            heads=heads,
            ffn=root.intermediate or layer.ffn,
        )


def _truncate(model: PreTrainedModel, root: Root, **widths: int | None) -> None:
    if root.truncate is None:
        return
    try:
        truncation.truncate(model, root.truncate, **widths)
    except UserError as error:
        raise UserError(f"truncate: {error}") from error


def _widths(found: Outline) -> dict[str, list[int]]:
    """The widths that the settings of these names would change: one number, or one for each layer."""
    return {
        "hidden": [found.hidden],
        "heads": [layer.heads for layer in found.layers if layer.heads is not None],
        "intermediate": [layer.ffn for layer in found.layers if layer.ffn is not None],
    }


def _is_cut(key: str, widths: list[int], root: Root) -> bool:
    """Whether a root asks for less of a width than its source has; refuses more, and less without `truncate`."""
    asked: int | None = getattr(root, key)
    if asked is None or set(widths) == {asked}:
        return False
    if asked > min(widths):
        raise UserError(f"{key}: expected at most the {min(widths)} of {root.source}, given {asked}")
    if root.truncate is None:
        raise UserError(
            f"{key}: expected the {max(widths)} of {root.source}, or truncate=first, weight_product or pca to cut it, "
            f"given {asked}"
        )
    return True


def _inner_widths(found: Outline, root: Root) -> tuple[int, int]:
    """How many heads a narrower model has, and their size: together they are as wide as what they write to."""
    if root.heads is None and len({layer.heads for layer in found.layers}) > 1:
        raise UserError(
            f"heads: expected a whole number, as the layers of {root.source} differ and hidden is cut, given null"
        )
    heads = root.heads or found.layers[0].heads
    assert heads is not None, "the model is here"
    width = _attention_width(found, root)
    _check_heads(heads, width, root)
    largest = min(layer.head_size for layer in found.layers)
    if width // heads > largest:
        raise UserError(
            f"heads: expected at least {-(-width // largest)}, of the size the source's heads have, given {heads}"
        )
    return heads, width // heads


def _check_heads(heads: int, width: int, root: Root) -> None:
    if width % heads:
        given = heads if root.heads is not None else f"null, which keeps the {heads} of {root.source}"
        raise UserError(f"heads: expected a divisor of the width {width} that they share, given {given}")


def _attention_width(found: Outline, root: Root) -> int:
    """The width that attention writes to: the hidden size asked for, or that of MobileBERT's bottleneck."""
    bottleneck = found.layers[0].bottleneck
    return bottleneck.size if bottleneck is not None else root.hidden or found.hidden


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
    return shapes.configure(family, **widths, vocabulary=root.vocabulary or vocabulary, padding_id=padding_id)


def describe(root: Root) -> dict[str, Any]:
    """The settings of a root that decide the model it becomes; its name, path and place on the disk do not."""
    keys = ["inherit", "layers", "layer_choice", "hidden", "heads", "intermediate", "truncate", "vocabulary", "family"]
    drawn = root.source is None or root.inherit == "embeddings"
    return {key: getattr(root, key) for key in keys} | ({"seed": root.seed} if drawn else {})
