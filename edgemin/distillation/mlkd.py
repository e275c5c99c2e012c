"""Multi-level knowledge distillation: relations of tokens and of samples (MLKD-BERT, Zhang, Yang and Ji 2024).

We know arXiv 2407.02775 by its abstract and by summaries that others published, not by its text: nothing here could be
checked against the paper or a code of its authors.

The abstract says: knowledge of several levels, relations among it, is distilled, and the student may have any number of
attention heads. The summaries say: two stages, the first of embeddings and layers, the second of predictions, with
equally weighted sums

    L_1 = L_EMB + L_MHA + L_FFN,    L_2 = L_SS + L_SC + L_KD

With R(X) = softmax(X Xᵀ / √d) the relation of the rows of X, d their size, and g TinyBERT's even layer map:

    L_EMB = KL(R(E_T) ‖ R(E_S))                                 embeddings of the tokens of a sequence
    L_MHA = Σ_l 1/A · Σ_a KL(R(O_T,g(l),a) ‖ R(O_S,l,a))        outputs of attention heads, re-split into A parts
    L_FFN = Σ_l MSE(H_S,l W_h, H_T,g(l))                        hidden states, with a learnt matrix
    L_SS  = KL(R(C_T) ‖ R(C_S))                                 [CLS] of the examples of a batch
    L_SC  = contrast of [CLS] by label over both models         InfoNCE; see `contrastive_relation`
    L_KD  = τ² KL(softmax(z_T / τ) ‖ softmax(z_S / τ))          soft targets

Our own choices, where the summaries are silent: every KL is a mean over rows, then sequences; attention outputs are
those before the output projection and without dropout; A is the student's number of heads, or the next below that
divides both widths; the contrast is that of Khosla et al. (arXiv 2004.11362), of cosines at temperature 0.1, with the
student's [CLS] put through W_h; τ is 1.

A relation of samples depends on who else is in the batch, by nature: its size and composition are settings of L_2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgemin.config import Count, NonNegative, Part, Positive
from edgemin.distillation.relation import check_relation_heads, common_relation_heads
from edgemin.distillation.sample_relations import contrastive_relation, sample_relation
from edgemin.distillation.token_relations import attention_relation, token_relation
from edgemin.encoder.outline import LayerOutline, Outline
from edgemin.encoder.taps import Reading
from edgemin.errors import UserError
from edgemin.training.attention import check_rebuildable
from edgemin.training.distillation import Asks
from edgemin.training.fit import Fit
from edgemin.training.hidden_states import hidden_mse
from edgemin.training.layer_maps import matched_layers
from edgemin.training.projections import Projection
from edgemin.training.soft_targets import check_outputs, output_loss
from edgemin.training.stage import Effect, Place
from edgemin.training.teaching import Teaching
from edgemin.training.two_fits import TwoFits

_INSIDE, _PREDICTION = ("embedding", "attention", "hidden"), ("sample", "contrastive", "soft")


class _Heads(NamedTuple):
    """The numbers of heads of one pair of matched layers."""

    student: int
    teacher: int
    relation: int


class MLKD(TwoFits):
    r"""MLKD-BERT (Zhang, Yang and Ji 2024, arXiv 2407.02775), as far as it is known: see the note below.

    $$ L_1 = w_E L_{EMB} + w_A L_{MHA} + w_H L_{FFN}, \qquad L_2 = w_S L_{SS} + w_C L_{SC} + w_K L_{KD} $$

    with the terms of [`mlkd`][edgemin.distillation.mlkd]. The first fit trains the encoder by $L_1$: relations of
    tokens in the embeddings and in the outputs of attention, and hidden states. The second trains encoder and head by
    $L_2$: relations of the examples of a batch, a contrast of them by label, and soft targets. With a corpus there is
    only the first. The student may have any number of attention heads.

    Note:
        The paper's text was not at hand. That relations are distilled at several levels and heads are free is in its
        abstract; the stages and terms are those that published summaries of it name, not checked against the paper;
        what the summaries leave open is our choice, listed in [`mlkd`][edgemin.distillation.mlkd]. Its numbers cannot
        be expected of this.

    Relations of examples and their contrast depend on the batch by nature, so `batch_size` and what falls into one
    batch are part of $L_2$.

    Args:
        layer_map: {student layer: teacher layer}, counted from 1; `None` spreads them evenly, the last to the last.
        relation_heads: number of parts into which the outputs of all attention heads of a layer are re-split; `None` is
            the student's number of heads, or the next below that divides both widths.
        embedding_weight: weight of the relations of tokens in the embeddings.
        attention_weight: weight of the relations of attention's outputs; not for ModernBERT, whose attention does not
            follow from the projections alone.
        hidden_weight: weight of the hidden states, mapped to the teacher's width by a learnt matrix, which begins as
            [`projections`][edgemin.training.projections] says.
        sample_weight: weight of the relations of examples, by their [CLS] after the last layer.
        contrastive_weight: weight of the contrast of examples by label; left out where examples do not have one
            class each.
        contrastive_temperature: temperature of the contrast's similarities, which are cosines.
        soft_weight: weight of the teacher's answers.
        temperature: τ of the teacher's answers.
        prediction_share: share of the steps that the second fit gets; see
            [`TwoFits`][edgemin.training.two_fits.TwoFits].
        prediction_learning_rate: learning rate of the second fit.
        fit: as for any [`Distillation`][edgemin.training.distillation.Distillation];
            `learning_rate` is that of the first fit.
        teaching: likewise.
    """

    of_answers = (*TwoFits.of_answers, *(f"{name}_weight" for name in _PREDICTION), "contrastive_temperature")

    def __init__(
        self,
        *,
        layer_map: dict[int, int] | None = None,
        relation_heads: Count | None = None,
        embedding_weight: NonNegative = 1.0,
        attention_weight: NonNegative = 1.0,
        hidden_weight: NonNegative = 1.0,
        sample_weight: NonNegative = 1.0,
        contrastive_weight: NonNegative = 1.0,
        contrastive_temperature: Positive = 0.1,
        soft_weight: NonNegative = 1.0,
        temperature: Positive = 1.0,
        prediction_share: Part = 0.2,
        prediction_learning_rate: Positive = 3e-5,
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        super().__init__(
            prediction_share=prediction_share,
            prediction_learning_rate=prediction_learning_rate,
            fit=fit,
            teaching=teaching,
        )
        self.weights = {
            "embedding": embedding_weight,
            "attention": attention_weight,
            "hidden": hidden_weight,
            "sample": sample_weight,
            "contrastive": contrastive_weight,
            "soft": soft_weight,
        }
        self.layer_map, self.relation_heads = layer_map, relation_heads
        self.temperature, self.contrastive_temperature = temperature, contrastive_temperature
        self._check_weights()
        self.projection: nn.Linear | None = None
        self._pairs: dict[int, int] = {}
        self._heads: dict[int, _Heads] = {}
        self._last = (0, 0)

    def _check_weights(self) -> None:
        for fit, names in ((self.settings, _INSIDE), (self._prediction, _PREDICTION)):
            if fit is not None and fit.trains and not any(self.weights[name] for name in names):
                others = " or ".join(f"{name}_weight" for name in names[1:])
                raise UserError(f"{names[0]}_weight: expected it, {others} above 0, given all 0")

    # -- what planning asks ------------------------------------------------------------------------

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """The head is trained, and the teacher's is read, where the teacher's answers have a weight."""
        found = super().effect(model, teachers, place)
        answers = found.trains_head and self.weights["soft"] > 0
        return replace(found, trains_head=answers, reads_answers=answers)

    @property
    def reads_labels(self) -> bool:
        """The contrast of examples is by label; planning counts it also where a task's kind has it left out."""
        return super().reads_labels or (self._prediction is not None and self.weights["contrastive"] > 0)

    def match(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Match the layers and choose the relation heads of each pair; refuse what does not fit."""
        (teacher,) = teachers
        self._last = (len(student.layers), len(teacher.layers))
        self._pairs, self._heads = matched_layers(self.layer_map, *self._last), {}
        if self._prediction is not None and self.weights["soft"] > 0:
            check_outputs(student, teachers)
        if not self.weights["attention"]:
            return
        check_rebuildable(student, teacher)
        check_relation_heads(self.relation_heads, student, teacher, self._pairs)
        for mine, theirs in self._pairs.items():
            found = _common_heads(self.relation_heads, student.layers[mine - 1], teacher.layers[theirs - 1])
            if found is not None:
                self._heads[mine] = found

    # -- training ----------------------------------------------------------------------------------

    def equip(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Make the projection of hidden states, and leave out the contrast where there are no classes."""
        (teacher,) = teachers
        for mine, heads in self._heads.items():
            asked = self.relation_heads or heads.student
            if heads.relation != asked:
                widths = student.layers[mine - 1].inner, teacher.layers[self._pairs[mine] - 1].inner
                self.notes.append(
                    f"relation heads of student layer {mine}: {heads.relation} instead of {asked}, the largest that "
                    f"divides the widths {widths[0]} and {widths[1]}"
                )
        if self.corpus is not None:
            self.notes.append("a corpus has no predictions to learn: only relations of tokens and hidden states were")
        contrasts = self._prediction is not None and self.weights["contrastive"] > 0
        if contrasts and not self.data.kind.one_class:
            contrasts, self.weights["contrastive"] = False, 0.0
            self._check_weights()
            self.notes.append("the contrast by label was left out: examples of this task do not have one class each")
        if contrasts or self.weights["hidden"]:
            self.projection = nn.Linear(student.hidden, teacher.hidden, bias=False)

    def projected(self) -> Sequence[Projection]:
        """Of the hidden states, or of [CLS] after the last layers where those alone are mapped."""
        pairs = tuple(self._pairs.items()) if self.weights["hidden"] else (self._last,)
        return [] if self.projection is None else [Projection(self.projection, pairs)]

    def asks_student(self) -> Asks:
        """Reads the matched layers in the first fit, the last layer's [CLS] and the logits in the second."""
        return self._asks(tuple(self._pairs), self._last[0])

    def asks_teacher(self) -> Asks:
        """Reads the same of the teacher's matched layers."""
        return self._asks(tuple(sorted(set(self._pairs.values()))), self._last[1])

    def _asks(self, layers: tuple[int, ...], last: int) -> Asks:
        weights = self.weights
        if self.phase == 1:
            related = weights["sample"] or weights["contrastive"]
            return Asks(hidden=(last,) if related else (), logits=weights["soft"] > 0)
        embeddings = (0,) if weights["embedding"] else ()
        return Asks(
            projections=layers if weights["attention"] else (),
            hidden=embeddings + (layers if weights["hidden"] else ()),
        )

    def terms(self, student: Reading, teachers: Sequence[Reading], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`embedding`, `attention` and `hidden` in the first fit, `sample`, `contrastive` and `soft` in the second."""
        (teacher,) = teachers
        if self.phase == 1:
            found = self._between_examples(student, teacher, batch["labels"])
        else:
            found = self._between_tokens(student, teacher, batch["attention_mask"])
        return {name: self.weights[name] * term for name, term in found.items()}

    def _between_tokens(self, student: Reading, teacher: Reading, mask: Tensor) -> dict[str, Tensor]:
        found = {}
        if self.weights["embedding"]:
            found["embedding"] = token_relation(teacher.hidden[0], student.hidden[0], mask)
        if self.weights["attention"]:
            relations = [
                attention_relation(
                    teacher.projections[theirs],
                    student.projections[mine],
                    mask,
                    teacher_heads=self._heads[mine].teacher,
                    student_heads=self._heads[mine].student,
                    relation_heads=self._heads[mine].relation,
                )
                for mine, theirs in self._pairs.items()
            ]
            found["attention"] = torch.stack(relations).sum()
        if self.weights["hidden"]:
            assert self.projection is not None
            errors = [
                hidden_mse(teacher.hidden[theirs], self.projection(student.hidden[mine]), mask)
                for mine, theirs in self._pairs.items()
            ]
            found["hidden"] = torch.stack(errors).sum()
        return found

    def _between_examples(self, student: Reading, teacher: Reading, labels: Tensor) -> dict[str, Tensor]:
        found = {}
        if self.weights["sample"]:
            found["sample"] = sample_relation(teacher.hidden[self._last[1]][:, 0], student.hidden[self._last[0]][:, 0])
        if self.weights["contrastive"]:
            assert self.projection is not None
            mine, theirs = student.hidden[self._last[0]][:, 0], teacher.hidden[self._last[1]][:, 0]
            found["contrastive"] = contrastive_relation(
                theirs, self.projection(mine), labels, self.contrastive_temperature
            )
        if self.weights["soft"]:
            assert student.logits is not None and teacher.logits is not None
            found["soft"] = output_loss(self.data.kind, [teacher.logits], student.logits, self.temperature)
        return found


def _common_heads(asked: int | None, student: LayerOutline, teacher: LayerOutline) -> _Heads | None:
    """The numbers of heads of a pair of layers; `None` where they are not all known yet."""
    if student.heads is None or teacher.heads is None:
        return None
    widths = student.heads * student.head_size, teacher.heads * teacher.head_size
    return _Heads(student.heads, teacher.heads, common_relation_heads(asked or student.heads, *widths))
