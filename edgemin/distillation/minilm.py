"""Deep self-attention distillation: MiniLM (Wang et al. 2020, arXiv 2002.10957).

One layer of the student learns from one layer of the teacher; in the paper both are the last. With A attention heads,
queries Q_a, keys K_a, values V_a and head size d (each side's own), what is learnt is

    the attention distributions  A_a  = softmax(Q_a K_aᵀ / √d)
    the value relations          VR_a = softmax(V_a V_aᵀ / √d)

    L_AT = 1 / (A |x|) · Σ_a Σ_t KL(A_a,t of the teacher ‖ A_a,t of the student),   L_VR likewise
    L    = L_AT + L_VR

Heads are matched one by one, so both layers need equally many; their sizes may differ. Only tokens that are no padding,
|x| of them, are rows or columns. MiniLMv2 ([`relation`][edgemin.distillation.relation]) re-splits the heads instead.

Shapes: B batch, T tokens, Ht and Hs widths of the projections of teacher and student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from edgemin.config import NonNegative
from edgemin.distillation.relation import attention_kl, value_kl
from edgemin.encoder.outline import Outline
from edgemin.encoder.taps import Reading
from edgemin.errors import UserError
from edgemin.training.attention import check_rebuildable, matched_heads
from edgemin.training.distillation import Asks, Distillation, TaskWeight
from edgemin.training.fit import Fit
from edgemin.training.layer_maps import check_layers
from edgemin.training.teaching import Teaching


class MiniLM(Distillation):
    r"""MiniLM (Wang et al. 2020, arXiv 2002.10957): match attention distributions and value relations of one layer.

    $$ L = w_{AT} L_{AT} + w_{VR} L_{VR} + w \, L_{task} $$

    with [`attention_kl`][edgemin.distillation.relation.attention_kl] and
    [`value_kl`][edgemin.distillation.relation.value_kl]; the paper's weights are 1, 1 and 0. Both layers need equally
    many attention heads (`minilmv2` does not), and attention that follows from the projections alone: not ModernBERT's.
    For a student of at most half the layers and half the width of its teacher the paper puts an assistant of the
    teacher's depth and the student's width between them.

    Args:
        teacher_layer: which teacher layer is read, counted from 1; `None` is the last.
        student_layer: which student layer learns, counted from 1; `None` is the last.
        attention_weight: weight of the attention distributions.
        value_weight: weight of the value relations.
        task_weight: weight of the task loss; see [`Distillation`][edgemin.training.distillation.Distillation].
        fit: as for any [`Distillation`][edgemin.training.distillation.Distillation].
        teaching: likewise.
    """

    def __init__(
        self,
        *,
        teacher_layer: int | None = None,
        student_layer: int | None = None,
        attention_weight: NonNegative = 1.0,
        value_weight: NonNegative = 1.0,
        task_weight: TaskWeight = "auto",
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        super().__init__(fit=fit, teaching=teaching, task_weight=task_weight)
        if attention_weight == value_weight == 0:
            raise UserError("attention_weight: expected it or value_weight above 0, given both 0")
        self.teacher_layer, self.student_layer = teacher_layer, student_layer
        self.attention_weight, self.value_weight = attention_weight, value_weight
        self._pair = (0, 0)
        self._heads = 0

    def match(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Choose the layer of each side; refuse unequal head counts, and attention that is not what is projected."""
        (teacher,) = teachers
        mine, theirs = self._pair = self.pair(len(student.layers), len(teacher.layers))
        if self.attention_weight:
            check_rebuildable(student, teacher)
        expected = "as many attention heads as in the teacher's layer (minilmv2 takes any number)"
        self._heads = matched_heads(student, teacher, {mine: theirs}, "student_layer", expected).get(mine, 0)

    def pair(self, student_layers: int, teacher_layers: int) -> tuple[int, int]:
        """The student's layer and the teacher's, counted from 1.

        Raises:
            UserError: a layer that one of the models does not have.
        """
        mine = student_layers if self.student_layer is None else self.student_layer
        theirs = teacher_layers if self.teacher_layer is None else self.teacher_layer
        check_layers({mine: theirs}, student_layers, teacher_layers)
        return mine, theirs

    def asks_student(self) -> Asks:
        """Reads queries, keys and values of the layer that learns."""
        return Asks(projections=self._pair[:1])

    def asks_teacher(self) -> Asks:
        """Reads queries, keys and values of the layer that is learnt from."""
        return Asks(projections=self._pair[1:])

    def terms(self, student: Reading, teachers: Sequence[Reading], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Two terms: `attention` (distributions) and `value` (value relations), each where its weight is above 0."""
        (teacher,) = teachers
        sides = teacher.projections[self._pair[1]], student.projections[self._pair[0]]
        mask, found = batch["attention_mask"], {}
        if self.attention_weight:
            found["attention"] = self.attention_weight * attention_kl(*sides, mask, self._heads)
        if self.value_weight:
            found["value"] = self.value_weight * value_kl(*sides, mask, self._heads)
        return found
