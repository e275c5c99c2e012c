"""A weighted sum of distillation methods, from one reading of the teacher and one of the student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin import config
from edgemin.data.module import DataModule
from edgemin.encoder.outline import Outline
from edgemin.encoder.taps import Reading
from edgemin.errors import UserError
from edgemin.training.distillation import Asks, Distillation, TaskWeight
from edgemin.training.fit import Fit
from edgemin.training.projections import Projection
from edgemin.training.stage import Effect, Place
from edgemin.training.teaching import Teaching


class MethodSum(Distillation):
    """What stages that learn by a weighted sum of methods have in common.

    Args:
        methods: by a name of its own, each method's node as its yaml has it, with a `weight` beside; `fit` and
            `teaching` are those of the whole. A method of several fits is refused, so TinyBERT and MLKD need
            `prediction_share: 0`, MobileBERT `progressive: false`.
        task_weight: weight of the task loss, added to what the methods themselves give it (`logits`: weight x (1 -
            alpha)); `auto` adds nothing where a method has it.
        fit: as for any [`Distillation`][edgemin.training.distillation.Distillation].
        teaching: likewise.
    """

    several_teachers: ClassVar[bool] = True  # a method that takes one refuses a list itself

    def __init__(
        self,
        *,
        methods: Mapping[str, dict[str, Any]],
        task_weight: TaskWeight,
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        super().__init__(fit=fit, teaching=teaching, task_weight=task_weight)
        self._weights = {name: _weight(name, node) for name, node in methods.items()}
        parts = {name: _part(name, node, fit, teaching) for name, node in methods.items()}
        # submodules, so that what a method learns besides the student is trained and checkpointed
        self.parts = nn.ModuleList(parts.values())
        self._parts = parts
        # the teacher is read once, for all of them
        self.same_tokens = any(part.same_tokens for part in parts.values())

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Do what any method does."""
        found = []
        for name, part in self._parts.items():
            with _named(name):
                part.planned = part.effect(model, teachers, Place(examples=place.examples, texts=place.texts))
            found.append(part.planned)
        whole = super().effect(model, teachers, place)
        assert self.task_weight != "auto"
        for name, part in self._parts.items():
            assert part.task_weight != "auto", "it has been planned"
            self.task_weight += self._weights[name] * part.task_weight
        return replace(
            whole,
            code=(*whole.code, *(module for effect in found for module in effect.code)),
            trains_head=self._methods_train_head or (self.task_weight > 0 and self.settings.trains),
            reads_answers=any(effect.reads_answers for effect in found),
        )

    @property
    def reads_labels(self) -> bool:
        """Whether any of the methods does, or the task loss beside them."""
        return super().reads_labels or any(part.reads_labels for part in self._parts.values())

    @property
    def _methods_train_head(self) -> bool:
        return any(part.planned.trains_head for part in self._parts.values())

    def auto_task_weight(self, place: Place) -> float:
        """0 also where a method trains the head by itself; 1 without methods, as labels are then all there is."""
        if not self._parts:
            return 1.0
        return 0.0 if self._methods_train_head else super().auto_task_weight(place)

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Give every method the model and its tokenizer, and match layers."""
        self.take_model(model)
        for part in self._parts.values():
            part._data = data
            part.read_tokenizer(data)
        super().prepare(model, data, teachers)

    def take_model(self, model: PreTrainedModel) -> None:
        """Give every method the student."""
        for part in self._parts.values():
            # past nn.Module's registration: the student is a submodule of the whole, once
            part.__dict__["model"] = model

    def beside(self) -> dict[str, Tensor]:
        """What each method learns besides the student, under the method's name."""
        return {f"{name}.{key}": tensor for name, part in self._parts.items() for key, tensor in part.beside().items()}

    def match(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Match the layers of each method."""
        for name, part in self._parts.items():
            with _named(name):
                part.match(student, teachers)

    def equip(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Let each method register what it learns."""
        for name, part in self._parts.items():
            part.notes = []
            with _named(name):
                part.equip(student, teachers)
            self.notes += [note for note in part.notes if note not in self.notes]

    def projected(self) -> Sequence[Projection]:
        """The learnt maps of all methods."""
        return [projection for part in self._parts.values() for projection in part.projected()]

    def asks_student(self) -> Asks:
        """Reads what any of the methods reads."""
        return _union([part.asks_student() for part in self._parts.values()])

    def asks_teacher(self) -> Asks:
        """Reads what any of the methods reads."""
        return _union([part.asks_teacher() for part in self._parts.values()])

    def inputs(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The batch after each method, in turn, has changed it."""
        for part in self._parts.values():
            batch = part.inputs(batch)
        return batch

    def terms(self, student: Reading, teachers: Sequence[Reading], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weighted terms of all methods, by method and term."""
        return {
            f"{name}.{term}": self._weights[name] * value
            for name, part in self._parts.items()
            for term, value in part.terms(student, teachers, batch).items()
        }


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the method's name in front of what it refuses."""
    try:
        yield
    except UserError as error:
        raise UserError(f"methods.{name}.{error}") from error


def _weight(name: str, node: Mapping[str, Any]) -> float:
    weight: Any = node.get("weight")
    config.check_type(weight, config.Positive, f"methods.{name}.weight")
    return float(weight)


def _part(name: str, node: Mapping[str, Any], fit: Fit, teaching: Teaching) -> Distillation:
    """A method with the budget, the teacher and the corpus of the whole."""
    key = f"methods.{name}"
    own = {setting: value for setting, value in node.items() if setting != "weight"}
    shared = sorted(own.keys() & (config.accepted(Fit).keys() | config.accepted(Teaching).keys()))
    if shared:
        raise UserError(f"{key}.{shared[0]}: expected beside methods, as it is that of the whole, given {own}")
    fit = replace(fit, patience=None)  # to be patient is for the whole
    part = config.construct(own, key, Distillation, fit=fit, teaching=teaching)
    if isinstance(part, MethodSum):
        raise UserError(f"{key}._target_: expected a distillation method, given {node.get('_target_')}")
    if len(part.fits()) != 1:
        raise UserError(f"{key}: expected a method of one fit, given one of {len(part.fits())}")
    return part


def _union(asks: Sequence[Asks]) -> Asks:
    return Asks(
        tuple(sorted({layer for ask in asks for layer in ask.projections})),
        tuple(sorted({layer for ask in asks for layer in ask.hidden})),
        any(ask.logits for ask in asks),
    )
