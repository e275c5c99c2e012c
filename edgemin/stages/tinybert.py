"""TinyBERT: the student learns embeddings, hidden states and attention of every layer, then the teacher's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack, cast

import torch
from torch import Tensor, nn

from edgemin.distillation.attention import check_rebuildable, check_same_heads, matched_heads
from edgemin.distillation.layers import matched_layers
from edgemin.distillation.logits import check_outputs, check_temperature
from edgemin.distillation.tinybert import hidden_mse, prediction_loss, score_mse
from edgemin.distillation.weights import check_term_weights
from edgemin.encoder import Reading
from edgemin.errors import UserError
from edgemin.stages.base import Shape
from edgemin.stages.distillation import Asks, DistillSettings
from edgemin.stages.two_fits import TwoFits


class TinyBERT(TwoFits):
    r"""TinyBERT (Jiao et al. 2019, arXiv 1909.10351): first what happens inside, then the predictions.

    .. math:: L_1 = w_E L_{embd} + w_H L_{hidn} + w_A L_{attn}, \qquad L_2 = L_{pred}

    with the terms of :mod:`edgemin.distillation.tinybert`, each summed over the matched layers. The first fit trains
    the encoder by :math:`L_1`, the second encoder and head by :math:`L_2`; no label is looked at. With a corpus (the
    paper's general distillation) there is the first alone. The paper trains on 20 times the data, augmented by BERT and
    GloVe; nothing is augmented here.

    Args:
        layer_map: {student layer: teacher layer}, counted from 1; ``None`` spreads them evenly, the last to the last.
        embedding_weight: of what the embeddings give.
        hidden_weight: of the hidden states after the matched layers.
        attention_weight: of the attention scores before the softmax, head by head: the layers need equally many heads,
            and scores that follow from the projections alone, so not ModernBERT's.
        projection: ``learned`` maps the student's embeddings and hidden states to the teacher's width by two learnt
            matrices, which are dropped at the end. The published code has one map for both, with a bias, and learns it
            where widths are equal too. ``none`` compares them as they are, which needs equal widths.
        temperature: of the predictions.
        prediction_share: see :class:`edgemin.stages.two_fits.TwoFits`, as for
        prediction_learning_rate: this.
        settings: see :class:`edgemin.stages.distillation.Distillation`; ``learning_rate`` is that of the first fit.
    """

    def __init__(
        self,
        *,
        layer_map: dict[int, int] | None = None,
        embedding_weight: float = 1.0,
        hidden_weight: float = 1.0,
        attention_weight: float = 1.0,
        projection: Literal["learned", "none"] = "learned",
        temperature: float = 1.0,
        prediction_share: float = 0.2,
        prediction_learning_rate: float = 3e-5,
        **settings: Unpack[DistillSettings],
    ) -> None:
        super().__init__(
            prediction_share=prediction_share, prediction_learning_rate=prediction_learning_rate, settings=settings
        )
        check_temperature(temperature)
        self.weights = {"embedding": embedding_weight, "hidden": hidden_weight, "attention": attention_weight}
        check_term_weights(self.weights)
        if self.settings.trains and not any(self.weights.values()):
            raise UserError("hidden_weight: expected it, embedding_weight or attention_weight above 0, given all 0")
        self.layer_map, self.projection, self.temperature = layer_map, projection, temperature
        self.projections = nn.ModuleDict()
        self._pairs: dict[int, int] = {}
        self._heads: dict[int, int] = {}

    # -- what planning asks ------------------------------------------------------------------------

    def check(self, model: Shape, teachers: Sequence[Shape]) -> None:
        """Layers must exist; heads, widths and families fit what is compared."""
        (teacher,) = teachers
        matched_layers(self.layer_map, model.layers, teacher.layers)
        self._check_sides(model.family, teacher.family, model.hidden, teacher.hidden)
        if self.weights["attention"] and not (model.pruned or teacher.pruned):
            check_same_heads(model.heads, teacher.heads)

    def _check_sides(self, student: str, teacher: str, student_width: int, teacher_width: int) -> None:
        if self.weights["attention"]:
            check_rebuildable(student, teacher)
        if self.projection == "none" and student_width != teacher_width:
            raise UserError(
                f"projection: expected learned, as the student's hidden size {student_width} is not the teacher's "
                f"{teacher_width}, given none"
            )

    # -- training ----------------------------------------------------------------------------------

    def match(self, student: Mapping[str, Any], teachers: Sequence[Mapping[str, Any]]) -> None:
        """Match layers, make the projections."""
        (teacher,) = teachers
        self._check_sides(student["family"], teacher["family"], student["hidden"], teacher["hidden"])
        self._pairs = matched_layers(self.layer_map, len(student["layers"]), len(teacher["layers"]))
        if self.weights["attention"]:
            self._heads = matched_heads(student["layers"], teacher["layers"], self._pairs)
        if self.projection == "learned":
            for name in ("embedding", "hidden"):
                if self.weights[name]:
                    self.projections[name] = nn.Linear(student["hidden"], teacher["hidden"], bias=False)
        if self.corpus is not None:
            self.notes.append("a corpus has no predictions to learn: only embeddings, hidden states and attention were")
        elif self.trains_head:
            check_outputs(student["labels"], [teacher["labels"]])

    def asks_student(self) -> Asks:
        """Inside first, then the answers."""
        return self._asks(tuple(self._pairs))

    def asks_teacher(self) -> Asks:
        """As of the student, of the matched layers."""
        return self._asks(tuple(sorted(set(self._pairs.values()))))

    def _asks(self, layers: tuple[int, ...]) -> Asks:
        if self.phase == 1:
            return Asks(logits=True)
        embeddings = (0,) if self.weights["embedding"] else ()
        return Asks(
            projections=layers if self.weights["attention"] else (),
            hidden=embeddings + (layers if self.weights["hidden"] else ()),
        )

    def terms(self, student: Reading, teachers: Sequence[Reading], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``embedding``, ``hidden`` and ``attention``; then ``prediction``."""
        (teacher,) = teachers
        if self.phase == 1:
            assert student.logits is not None and teacher.logits is not None
            return {"prediction": prediction_loss(teacher.logits, student.logits, self.temperature)}
        mask, found = batch["attention_mask"], dict[str, list[Tensor]]()
        if self.weights["embedding"]:
            found["embedding"] = [hidden_mse(teacher.hidden[0], self._projected("embedding", student.hidden[0]), mask)]
        if self.weights["hidden"]:
            found["hidden"] = [
                hidden_mse(teacher.hidden[theirs], self._projected("hidden", student.hidden[mine]), mask)
                for mine, theirs in self._pairs.items()
            ]
        if self.weights["attention"]:
            found["attention"] = [
                score_mse(teacher.projections[theirs], student.projections[mine], mask, self._heads[mine])
                for mine, theirs in self._pairs.items()
            ]
        return {name: self.weights[name] * torch.stack(terms).sum() for name, terms in found.items()}

    def _projected(self, name: str, states: Tensor) -> Tensor:
        return cast(Tensor, self.projections[name](states)) if name in self.projections else states
