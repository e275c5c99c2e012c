"""MiniLMv2: the student learns the teacher's self-attention relations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin import encoder
from edgemin.data import DataModule
from edgemin.distillation.relation import check_weights, common_relation_heads, layer_map, preset, relations_loss
from edgemin.errors import UserError
from edgemin.stages.base import Fit, FitSettings, Shape, Stage, task_loss


class RelationDistillation(Stage):
    r"""MiniLMv2 (Wang et al., arXiv 2012.15828): match Q-Q, K-K and V-V relations of chosen layers.

    .. math:: L = \frac{1}{P} \sum_{(l_S, l_T)} \sum_i \alpha_i \, KL(R^T_{i, l_T} \,\|\, R^S_{i, l_S}) + w \, L_{task}

    over P pairs of layers, with the relations and the KL of
    :func:`edgemin.distillation.relation.relation_kl`. The teacher runs in eval mode
    without gradients
    and stops after the deepest layer it is read at; so does the student when nothing above that layer is trained.

    Args:
        teacher: the model to learn from: ``teacher``, ``teacher.source`` (its weights as they came) or another model
            of the study.
        relation_heads: into how many heads Q, K and V are re-split; ``None`` takes the preset of the teacher. Must
            divide both widths.
        teacher_layer: which teacher layer is read, counted from 1; ``None`` takes the preset (usually the last).
        student_layer: which student layer learns, counted from 1; ``None`` is the last.
        layer_map: several pairs instead of one: ``layer_to_layer`` matches student layer l with teacher layer ceil(l
            L_T / L_S) (equation 1 of
            the EdgeMIN paper), a mapping says {student layer: teacher layer}.
        relations: weight of each relation, query side first: ``{qq: 1, kk: 1, vv: 1}``.
        task_weight: weight of the task loss beside it; ``auto`` is 1 where a head that was trained earlier would
            otherwise go stale (a fine-tuning before and
            none after), else 0.
        settings: see :class:`edgemin.stages.base.Fit`.
    """

    same_tokens: ClassVar[bool] = True

    def __init__(
        self,
        *,
        teacher: str = "teacher",
        relation_heads: int | None = None,
        teacher_layer: int | None = None,
        student_layer: int | None = None,
        layer_map: Literal["layer_to_layer"] | dict[int, int] | None = None,
        relations: Mapping[str, float],
        task_weight: float | Literal["auto"] = "auto",
        **settings: Unpack[FitSettings],
    ) -> None:
        super().__init__()
        if relation_heads is not None and relation_heads < 1:
            raise UserError(f"relation_heads: expected null or a whole number of at least 1, given {relation_heads}")
        if layer_map is not None and (teacher_layer is not None or student_layer is not None):
            raise UserError("layer_map: expected either layer_map or teacher_layer and student_layer, given both")
        check_weights(relations)
        if task_weight != "auto" and not 0 <= task_weight < math.inf:
            raise UserError(f"task_weight: expected auto or a number of at least 0, given {task_weight}")
        self.settings = Fit(**settings)
        self.teacher = teacher
        self.relation_heads = relation_heads
        self.teacher_layer, self.student_layer, self.layer_map = teacher_layer, student_layer, layer_map
        self.relations = dict(relations)
        self.task_weight = task_weight
        self._teachers: list[
            PreTrainedModel
        ] = []  # a list, so that the teacher is no submodule: neither trained nor checkpointed
        self._pairs: dict[int, int] = {}
        self._heads: dict[int, int] = {}

    @property
    def trains_head(self) -> bool:
        """Where the task loss is on."""
        return self.task_weight != "auto" and self.task_weight > 0 and self.settings.trains

    @property
    def leaves_head_stale(self) -> bool:
        """Without the task loss."""
        return self.settings.trains and not self.trains_head

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The one teacher."""
        return (self.teacher,)

    def resolve(self, config: dict[str, Any], head_trained: bool, finetuned_later: bool) -> dict[str, Any]:
        """Decide ``task_weight=auto``."""
        if config.get("task_weight", "auto") != "auto":
            return config
        return config | {"task_weight": 1.0 if head_trained and not finetuned_later else 0.0}

    def check(self, model: Shape, teachers: Sequence[Shape]) -> None:
        """Layers must exist and relation heads divide both widths."""
        (teacher,) = teachers
        self.pairs(model.layers, teacher)
        asked = self.relation_heads
        if asked is None:
            return
        for side, shape in (("student", model), ("teacher", teacher)):
            if not shape.pruned and shape.hidden % asked:
                raise UserError(
                    f"relation_heads: expected a divisor of the {side}'s width {shape.hidden}, given {asked}"
                )

    def pairs(self, student_layers: int, teacher: Shape) -> dict[int, int]:
        """The matched layers, {student: teacher}, counted from 1.

        Raises:
            UserError: a layer that one of the models does not have.
        """
        if self.layer_map == "layer_to_layer":
            return layer_map(student_layers, teacher.layers)
        if self.layer_map is not None:
            found, key = {int(student): int(of) for student, of in self.layer_map.items()}, "layer_map"
        else:
            teacher_layer = (
                preset(teacher.layers, teacher.hidden, teacher.family)[0]
                if self.teacher_layer is None
                else self.teacher_layer
            )
            found, key = {student_layers if self.student_layer is None else self.student_layer: teacher_layer}, "layer"
        for student, of in found.items():
            for side, layer, count in (("student", student, student_layers), ("teacher", of, teacher.layers)):
                if not 1 <= layer <= count:
                    name = f"{side}_{key}" if key == "layer" else key
                    raise UserError(f"{name}: expected a {side} layer from 1 to {count}, given {layer}")
        return found

    def prepare(
        self, model: PreTrainedModel, data: DataModule | None, teachers: Sequence[PreTrainedModel] = ()
    ) -> None:
        """Match layers, choose the relation heads of each pair."""
        super().prepare(model, data, teachers)
        self._teachers = [teacher.eval().requires_grad_(False) for teacher in teachers]
        mine, theirs = encoder.structure(model), encoder.structure(self._teachers[0])
        shape = Shape(theirs["family"], len(theirs["layers"]), theirs["hidden"], theirs["layers"][0]["heads"])
        self._pairs = self.pairs(len(mine["layers"]), shape)
        asked = (
            preset(shape.layers, shape.hidden, shape.family)[1] if self.relation_heads is None else self.relation_heads
        )
        for student, teacher in self._pairs.items():
            widths = [_width(mine, student), _width(theirs, teacher)]
            self._heads[student] = common_relation_heads(asked, *widths)
            whole = asked if self.relation_heads else common_relation_heads(asked, mine["hidden"], theirs["hidden"])
            if self._heads[student] != whole:
                self.notes.append(
                    f"relation heads of student layer {student} and teacher layer {teacher}: {self._heads[student]} "
                    f"instead of {whole}, the largest common divisor of the widths {widths[0]} and {widths[1]}"
                )

    def phases(self) -> list[Fit]:
        """One fit."""
        return [self.settings]

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Relation loss, mean over the matched pairs, plus the weighted task loss."""
        teacher = self._teachers[0]
        if teacher.device != batch["input_ids"].device:
            nn.Module.to(teacher, batch["input_ids"].device)
        with torch.no_grad():
            target = encoder.read(teacher, batch, [layer - 1 for layer in self._pairs.values()], stop=True)
        assert self.task_weight != "auto"
        learnt = encoder.read(self.model, batch, [layer - 1 for layer in self._pairs], stop=self.task_weight == 0)
        losses = [
            relations_loss(
                target.projections[of - 1],
                learnt.projections[student - 1],
                batch["attention_mask"],
                self._heads[student],
                self.relations,
            )
            for student, of in self._pairs.items()
        ]
        total = torch.stack(losses).mean()
        self.log("relation_loss", total.detach())
        if self.task_weight:
            assert learnt.logits is not None
            task = task_loss(learnt.logits, batch["labels"], regression=self.data.regression)
            self.log("task_loss", task.detach())
            total = total + self.task_weight * task
        return total


def _width(structure: dict[str, Any], layer: int) -> int:
    kept = structure["layers"][layer - 1]
    width = kept["heads"] * kept["head_size"]
    assert isinstance(width, int)
    return width
