"""What all distillation methods share: teachers, what is read of both sides, the task loss beside it, a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.config import NonNegative
from edgemin.data.batches import Batches
from edgemin.data.module import DataModule
from edgemin.encoder import building, taps
from edgemin.encoder.outline import Outline
from edgemin.encoder.taps import Reading
from edgemin.errors import UserError
from edgemin.processes import ranks
from edgemin.training import projections
from edgemin.training.fit import Fit
from edgemin.training.projections import Projection
from edgemin.training.stage import Effect, Place, Stage
from edgemin.training.teacher_outputs import TeacherOutputs, teacher_outputs
from edgemin.training.teaching import CORPUS_READER, OF_A_CORPUS, Teaching, corpus_reader

TaskWeight = Literal["auto"] | NonNegative

# What projections to another width begin with is found on so much text.
_SENTENCES, _SENTENCES_AT_ONCE, _CORPUS_TOKENS = 512, 32, 8192


class Asks(NamedTuple):
    """What is read of one side. Layers count from 1.

    Attributes:
        projections: layers whose queries, keys and values are read.
        hidden: where the residual stream is read: 0 before the first layer, l after l layers.
        logits: whether the model runs to its end.
    """

    projections: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    logits: bool = False


class Distillation(Stage):
    """A student learns from one or more teachers.

    A method says what it reads of both sides (`asks_student`, `asks_teacher`) and what it makes of it (`terms`).
    Teachers run in eval mode without gradients and stop after the deepest layer that is read; so does the student where
    nothing above is trained. Attention stays fused: everything is read by hooks.

    Args:
        task_weight: weight of the task loss beside the method's own terms; `auto` is 1 where a head that was trained
            earlier would otherwise go stale (a fine-tuning before and none after), else 0.
        fit: budget and optimizer.
        teaching: teachers and corpus.
    """

    # Whether it can learn from more than one teacher.
    several_teachers: ClassVar[bool] = False
    # Whether it can learn from text without labels.
    takes_corpus: ClassVar[bool] = True
    same_tokens: bool = True

    def __init__(self, *, fit: Fit, teaching: Teaching, task_weight: TaskWeight = 0.0) -> None:
        super().__init__()
        self.settings, self.teacher_cache = fit, teaching.teacher_cache
        self.task_weight = self._asked_task_weight = task_weight
        self._check_corpus(teaching)
        self.corpus, self.teachers = teaching.read_corpus(), teaching.teachers
        if len(self.teachers) > 1 and not self.several_teachers:
            raise UserError(f"teacher: expected one model, as layers are matched with one, given {list(self.teachers)}")
        # a list, so that the teachers are no submodules: neither trained nor checkpointed
        self._teachers: list[PreTrainedModel] = []
        self._outputs: list[TeacherOutputs] = []
        self.special_ids: tuple[int, ...] = ()
        self.mask_id: int | None = None

    def _check_corpus(self, teaching: Teaching) -> None:
        if teaching.corpus is None:
            return
        fit, weight, cached = self.settings, self.task_weight, teaching.teacher_cache
        refused = {
            "corpus": (self.takes_corpus, "null, as this method needs the task's labels", teaching.corpus),
            "epochs": (fit.epochs is None, "null and steps instead, as a corpus is streamed", fit.epochs),
            "patience": (fit.patience is None, "null, as no task is looked at with a corpus", fit.patience),
            "task_weight": (weight in ("auto", 0), "0, as a corpus has no labels", weight),
            "teacher_cache": (not cached, "false with a corpus, which is too large to keep outputs of", cached),
        }
        for key, (holds, expected, given) in refused.items():
            if not holds:
                raise UserError(f"{key}: expected {expected}, given {given}")

    # -- what a method says ------------------------------------------------------------------------

    def match(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Pair the student with its teachers.

        Called in planning, where a number may not be known yet (`None`), and again with the models themselves.

        Raises:
            UserError: they cannot be paired; the setting's key first.
        """

    def equip(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Once they are paired and here, register what learns besides the student, and note what there is to know."""

    def asks_student(self) -> Asks:
        """What is read of the student; may depend on the fit that runs."""
        raise NotImplementedError

    def asks_teacher(self) -> Asks:
        """What is read of every teacher; may depend on the fit that runs."""
        raise NotImplementedError

    def terms(self, student: Reading, teachers: Sequence[Reading], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weighted terms of its loss by name, the task loss apart. Readings count layers as `Asks` does."""
        raise NotImplementedError

    def inputs(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The batch as both sides read it; a method may mask words here, for example."""
        return batch

    def projected(self) -> Sequence[Projection]:
        """The learnt maps to the teacher's width among what `equip` made."""
        return ()

    # -- what planning asks ------------------------------------------------------------------------

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Check that models can be paired and a corpus can be read, and decide `task_weight=auto`."""
        self.match(replace(model, labels=None), teachers)  # the task's head is attached when it runs
        if self.corpus is not None:
            self.corpus.fingerprint()
            self.corpus.open()
        asked = self._asked_task_weight
        self.task_weight = self.auto_task_weight(place) if asked == "auto" else asked
        found = super().effect(model, teachers, replace(place, examples=place.given(self.reads_labels)))
        return replace(
            found,
            # the reader of a corpus is found by its name, so that only what is trained on a corpus has it in its key
            code=found.code + ((CORPUS_READER,) if self.corpus is not None else ()),
            trains_head=self.task_weight > 0 and self.settings.trains,
            moves_encoder=True,
            reads_task=self.corpus is None,
            reads_labels=self.reads_labels,
            reads_answers=self.several_teachers,
            same_tokens=self.same_tokens,
            corpus=self.corpus,
            # the student may stop below its head, and what a fit learns beside it may rest in another
            reaches_all=False,
            decided={"task_weight": self.task_weight} if asked == "auto" else {},
            # what a corpus and the teachers are is in the key, where they lie and how they are called is not
            not_keyed=("corpus", "teacher"),
            idle=OF_A_CORPUS if self.corpus is None else (),
        )

    @property
    def reads_labels(self) -> bool:
        """Whether any of its losses reads a label, once `task_weight` is decided."""
        return self.task_weight != 0

    def auto_task_weight(self, place: Place) -> float:
        """What `task_weight=auto` comes to: 1 where a trained head would go stale, else 0."""
        return 1.0 if place.head_trained and not place.finetuned_later and self.corpus is None else 0.0

    # -- training ----------------------------------------------------------------------------------

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Take the student and its teachers, and match their layers."""
        super().prepare(model, data, teachers)
        self._teachers = [teacher.eval().requires_grad_(False) for teacher in teachers]
        self.read_tokenizer(data)
        self.prepare_teaching()

    def prepare_teaching(self) -> None:
        """Match the student's layers with its teachers', and make what learns besides it."""
        self.pair_models()
        if found := self.projected():
            nn.Module.to(self, self.model.device)
            projections.start(found, self._readings(*projections.asked(found)))
        self._take_up()

    def pair_models(self) -> None:
        """Match layers and make what learns besides the student, at random: enough where a checkpoint is read."""
        outlines = building.outline(self.model), [building.outline(teacher) for teacher in self._teachers]
        self.match(*outlines)
        self.equip(*outlines)

    def _readings(self, mine: tuple[int, ...], theirs: tuple[int, ...]) -> Iterator[tuple[Reading, Reading, Tensor]]:
        """Hidden states of student and teacher on some sentences, without dropout."""
        teacher, device = self._teachers[0], self.model.device
        nn.Module.to(teacher, device)
        self.model.eval()
        for batch in self._sample():
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.no_grad():
                sides = (self.model, Asks(hidden=mine)), (teacher, Asks(hidden=theirs))
                student, taught = (_read(model, batch, asks) for model, asks in sides)
            yield student, taught, batch["attention_mask"]

    def _sample(self) -> Iterable[Mapping[str, Tensor]]:
        """Batches of some hundred sentences, or of as many tokens of the corpus."""
        if self.corpus is None:
            return self.data.calibration(min(_SENTENCES, len(self.data.train)), _SENTENCES_AT_ONCE, self.seed)
        steps = max(1, _CORPUS_TOKENS // self.corpus.length)
        found: Iterable[Mapping[str, Tensor]] = corpus_reader().CorpusBatches(
            self.corpus, self.data.tokenizer, 1, seed=self.seed, steps=steps, shuffle_window=steps
        )
        return found

    def beside(self) -> dict[str, Tensor]:
        """What is learnt besides the student, such as projections to the teacher's width, by method and name."""
        learnt = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("model.")}
        return {f"{type(self).__name__}.{name}": tensor for name, tensor in learnt.items()}

    def _take_up(self) -> None:
        """Go on from what an earlier stage of this method has learnt besides the student, where it fits."""
        unfit = []
        for name, tensor in self.beside().items():
            earlier = self.inherited.get(name)
            if earlier is None:
                continue
            if earlier.shape == tensor.shape:
                tensor.copy_(earlier)
            else:
                unfit.append(f"{name} is {list(earlier.shape)} in an earlier stage and {list(tensor.shape)} here")
        if unfit:
            self.notes.append(f"learnt anew, as widths have changed: {', '.join(unfit)}")

    def training_state(self) -> Mapping[str, Tensor]:
        """What was learnt besides the student, for a later stage of the same method."""
        return self.beside()

    def read_tokenizer(self, data: DataModule | None) -> None:
        """Remember which tokens are special, and which one masks."""
        if data is not None:
            self.special_ids = tuple(int(index) for index in data.tokenizer.all_special_ids)
            self.mask_id = cast("int | None", data.tokenizer.mask_token_id)

    def on_fit_start(self) -> None:
        """Compute and keep the teachers' outputs (`teacher_cache`); a resumed fit finds them."""
        self._outputs = []
        if not self.teacher_cache or self.asks_teacher() == Asks():
            return
        self._outputs = [ranks.together(partial(self._kept, index)) for index in range(len(self._teachers))]

    def _kept(self, index: int) -> TeacherOutputs:
        asks = self.asks_teacher()
        nn.Module.to(self._teachers[index], self.device)
        return teacher_outputs(
            self._teachers[index],
            self._tokens_of(index).train,
            projections=[layer - 1 for layer in asks.projections],
            hidden=asks.hidden,
            logits=asks.logits,
            cache=self.data.cache,
        )

    def batches(self, fit: Fit) -> Batches:
        """The batches of the corpus if there is one, else of the task."""
        if self.corpus is None:
            return super().batches(fit)
        found: Batches = corpus_reader().CorpusBatches(
            self.corpus,
            self.data.tokenizer,
            fit.batch_size,
            seed=self.seed + self.phase,
            steps=fit.batches(0),
            rank=ranks.rank(),
            world=ranks.world(),
        )
        return found

    def finish(self) -> PreTrainedModel:
        """Return the student, its padding embedding silenced again: a tied decoder may have moved it."""
        building.silence_padding(self.model)
        return super().finish()

    def fits(self) -> list[Fit]:
        """A distillation is one fit, unless the method says otherwise."""
        return [self.settings]

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The sum of the method's terms and the weighted task loss."""
        batch = self.inputs(batch)
        asks, weight = self.asks_student(), self.task_weight
        assert weight != "auto", "auto is decided in planning"
        taught = [self._taught(index, batch) for index in range(len(self._teachers))]
        student = _read(self.model, batch, asks._replace(logits=asks.logits or weight > 0))
        terms = self.terms(student, taught, batch)
        if weight > 0:
            assert student.logits is not None
            terms["task"] = weight * self.data.kind.loss(student.logits, batch["labels"])
        for name, term in terms.items():
            self.record(f"{name}_loss", term)
        return torch.stack(list(terms.values())).sum()

    def _taught(self, index: int, batch: Mapping[str, Tensor]) -> Reading:
        """One teacher's outputs on a batch: computed, or read from disk; none where a fit learns nothing of it."""
        device = batch["input_ids"].device
        if self.asks_teacher() == Asks():
            return Reading(None, {}, {})
        if self._outputs:
            return self._outputs[index].batch(batch["index"], batch["attention_mask"].shape[1], device)
        teacher = self._teachers[index]
        if teacher.device != device:
            nn.Module.to(teacher, device)
        if not self.same_tokens and self._tokens_of(index) is not self.data:
            theirs = self._tokens_of(index).train.batch(batch["index"].cpu().numpy())
            batch = {name: tensor.to(device) for name, tensor in theirs.items()}
        with torch.no_grad():
            return _read(teacher, batch, self.asks_teacher())

    def _tokens_of(self, teacher: int) -> DataModule:
        """The task's data in the tokens of a teacher."""
        return self.data.of_teachers[teacher] if self.data.of_teachers else self.data


def _read(model: PreTrainedModel, batch: Mapping[str, Tensor], asks: Asks) -> Reading:
    """Run a model and read what is asked for; layers count from 1."""
    projections = [layer - 1 for layer in asks.projections]
    found = taps.read(model, batch, projections=projections, hidden=asks.hidden, logits=asks.logits)
    return found._replace(projections={layer + 1: read for layer, read in found.projections.items()})
