"""MiniLMv2: the student learns how the teacher's queries, keys and values relate the tokens of a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from edgemin.config import Count
from edgemin.distillation.relation import (
    check_relation_heads,
    check_weights,
    common_relation_heads,
    preset,
    relations_loss,
)
from edgemin.encoder.outline import Outline
from edgemin.encoder.taps import Reading
from edgemin.errors import UserError
from edgemin.training.distillation import Asks, Distillation, TaskWeight
from edgemin.training.fit import Fit
from edgemin.training.layer_maps import check_layers, layer_map, matched_layers
from edgemin.training.teaching import Teaching


class MiniLMv2(Distillation):
    r"""MiniLMv2 (Wang et al., arXiv 2012.15828): match Q-Q, K-K and V-V relations of chosen layers.

    $$ L = \frac{1}{P} \sum_{(l_S, l_T)} \sum_i \alpha_i \, KL(R^T_{i, l_T} \,\|\, R^S_{i, l_S}) + w \, L_{task} $$

    over P pairs of layers, with the relations and the KL of [`relation_kl`][edgemin.distillation.relation.relation_kl].

    Args:
        relation_heads: into how many heads Q, K and V are re-split; `None` takes the preset of the teacher. Must
            divide both widths.
        teacher_layer: which teacher layer is read, counted from 1; `None` takes the preset (usually the last).
        student_layer: which student layer learns, counted from 1; `None` is the last.
        layer_map: several pairs instead of one: `layer_to_layer` matches student layer l with teacher layer
            ceil(l L_T / L_S) (equation 1 of the EdgeMIN paper), a mapping says {student layer: teacher layer}.
        relations: weight of each of the nine relations, query side first: `{qq: 1, kk: 1, vv: 1}`.
        task_weight: weight of the task loss; see [`Distillation`][edgemin.training.distillation.Distillation].
        fit: as for any [`Distillation`][edgemin.training.distillation.Distillation].
        teaching: likewise.
    """

    def __init__(
        self,
        *,
        relation_heads: Count | None = None,
        teacher_layer: int | None = None,
        student_layer: int | None = None,
        layer_map: Literal["layer_to_layer"] | dict[int, int] | None = None,
        relations: Mapping[str, float],
        task_weight: TaskWeight = "auto",
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        super().__init__(fit=fit, teaching=teaching, task_weight=task_weight)
        if layer_map is not None and (teacher_layer is not None or student_layer is not None):
            raise UserError("layer_map: expected either layer_map or teacher_layer and student_layer, given both")
        if layer_map is not None and not layer_map:
            raise UserError("layer_map: expected null, layer_to_layer or at least one pair, given none")
        check_weights(relations)
        self.relation_heads = relation_heads
        self.teacher_layer, self.student_layer, self.layer_map = teacher_layer, student_layer, layer_map
        self.relations = dict(relations)
        self._pairs: dict[int, int] = {}
        self._heads: dict[int, int] = {}

    def pairs(self, student_layers: int, teacher: Outline) -> dict[int, int]:
        """The matched layers, {student: teacher}, counted from 1.

        Raises:
            UserError: a layer that one of the models does not have.
        """
        if self.layer_map == "layer_to_layer":
            return layer_map(student_layers, len(teacher.layers))
        if self.layer_map is not None:
            asked = {int(student): int(of) for student, of in self.layer_map.items()}
            return matched_layers(asked, student_layers, len(teacher.layers))
        published = preset(len(teacher.layers), teacher.hidden, teacher.family)[0]
        theirs = published if self.teacher_layer is None else self.teacher_layer
        found = {student_layers if self.student_layer is None else self.student_layer: theirs}
        check_layers(found, student_layers, len(teacher.layers))
        return found

    def match(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Match the layers and choose the relation heads of each pair; refuse what divides no width of its side."""
        (teacher,) = teachers
        self._pairs, self._heads = self.pairs(len(student.layers), teacher), {}
        check_relation_heads(self.relation_heads, student, teacher, self._pairs)
        for mine, theirs in self._pairs.items():
            widths = student.layers[mine - 1].inner, teacher.layers[theirs - 1].inner
            if widths[0] is not None and widths[1] is not None:
                self._heads[mine] = common_relation_heads(self._asked_heads(teacher), widths[0], widths[1])

    def equip(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Note where there are fewer relation heads than in layers that nothing was cut from."""
        (teacher,) = teachers
        asked = self._asked_heads(teacher)
        whole = asked if self.relation_heads else common_relation_heads(asked, student.hidden, teacher.hidden)
        for mine, theirs in self._pairs.items():
            if self._heads[mine] < whole:
                widths = student.layers[mine - 1].inner, teacher.layers[theirs - 1].inner
                self.notes.append(
                    f"relation heads of student layer {mine} and teacher layer {theirs}: {self._heads[mine]} "
                    f"instead of {whole}, the largest common divisor of the widths {widths[0]} and {widths[1]}"
                )

    def _asked_heads(self, teacher: Outline) -> int:
        published = preset(len(teacher.layers), teacher.hidden, teacher.family)[1]
        return published if self.relation_heads is None else self.relation_heads

    def asks_student(self) -> Asks:
        """Reads queries, keys and values of the matched student layers."""
        return Asks(projections=tuple(self._pairs))

    def asks_teacher(self) -> Asks:
        """Reads queries, keys and values of the matched teacher layers."""
        return Asks(projections=tuple(sorted(set(self._pairs.values()))))

    def terms(self, student: Reading, teachers: Sequence[Reading], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One term, `relation`: the mean over the matched pairs of layers."""
        (teacher,) = teachers
        losses = [
            relations_loss(
                teacher.projections[theirs],
                student.projections[mine],
                batch["attention_mask"],
                self._heads[mine],
                self.relations,
            )
            for mine, theirs in self._pairs.items()
        ]
        return {"relation": torch.stack(losses).mean()}
