r"""Layer-wise distillation of a student whose layers come and go (CoFi: Xia et al. 2022, arXiv 2204.00408).

Of the teacher some layers i teach, evenly spread; each is learnt by the student layer that is nearest to it now,

$$ L = \sum_i MSE(W H_S^{m(i)}, H_T^i), \qquad m(i) = \arg\min_{j < m(i + 1),\; z_{FFN}^j > 0} MSE(W H_S^j, H_T^i) $$

matched from the deepest to the first, so that the order of layers is kept, among the layers whose network is open. W is
one learnt map for all, which begins as the identity. A teacher layer for which no student layer is left is left out.

In two points the published code (princeton-nlp/CoFiPruning) is not followed: it looks up which layers are open by their
place in the order of distances instead of by their number, and takes layer 12 where none is left. An error is averaged
over the tokens of each sentence and then over sentences, padding left out.

Shapes: B batch, T tokens, H hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from edgemin.encoder.outline import Outline
from edgemin.encoder.taps import Reading
from edgemin.errors import UserError
from edgemin.training.distillation import Asks, Distillation
from edgemin.training.fit import Fit
from edgemin.training.hidden_states import hidden_mse
from edgemin.training.layer_maps import layer_map
from edgemin.training.projections import Projection
from edgemin.training.teaching import Teaching

TAUGHT = 4  # layers of the teacher that teach, unless some are named


def nearest_layers(distances: Sequence[Sequence[float]], is_open: Sequence[bool]) -> list[int | None]:
    """Which student layer learns from each teacher layer; layers count from 0.

    Args:
        distances: one row per teacher layer, in ascending order, with the distance to each student layer.
        is_open: for each student layer, whether it can be matched.

    Returns:
        For each teacher layer the nearest open student layer in front of the one matched before; `None` where there is
        none. Between equals the first.
    """
    matched: list[int | None] = []
    behind = len(is_open)
    for row in reversed(distances):
        left = [(distance, layer) for layer, distance in enumerate(row[:behind]) if is_open[layer]]
        matched.append(min(left)[1] if left else None)
        behind = min(left)[1] if left else behind
    return matched[::-1]


class LayerMatch(Distillation):
    """Learn hidden states of a teacher's layers, each by the student's layer that is nearest to it now.

    Args:
        teacher_layers: layers that teach, counted from 1; `None` spreads four evenly, the last among them.
        fit: as for any [`Distillation`][edgemin.training.distillation.Distillation].
        teaching: likewise.
    """

    def __init__(self, *, teacher_layers: list[int] | None = None, fit: Fit, teaching: Teaching) -> None:
        if teacher_layers is not None and (not teacher_layers or len(set(teacher_layers)) < len(teacher_layers)):
            raise UserError(f"teacher_layers: expected null or distinct layers, given {teacher_layers}")
        super().__init__(fit=fit, teaching=teaching)
        self.asked_layers = teacher_layers
        self.is_open: list[bool] | None = None  # for each student layer, where gates close some; `None`: all are
        self._mine, self._theirs = tuple[int, ...](), tuple[int, ...]()
        self.projection: nn.Linear

    def match(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Choose the teacher's layers; any of the student's may learn from each."""
        (teacher,) = teachers
        count = len(teacher.layers)
        for layer in self.asked_layers or ():
            if not 1 <= layer <= count:
                raise UserError(f"teacher_layers: expected layers from 1 to {count}, given {layer}")
        spread = layer_map(min(TAUGHT, count), count).values()
        self._theirs = tuple(sorted(self.asked_layers or spread))
        self._mine = tuple(range(1, len(student.layers) + 1))

    def equip(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Make the map to the teacher's width."""
        self.is_open = None
        self.projection = nn.Linear(student.hidden, teachers[0].hidden, bias=False)

    def projected(self) -> Sequence[Projection]:
        """The one map; its initial value is found as if layers were matched evenly."""
        even = layer_map(len(self._theirs), len(self._mine)).values()
        return [Projection(self.projection, tuple(zip(even, self._theirs, strict=True)))]

    def asks_student(self) -> Asks:
        """Read the output of every layer."""
        return Asks(hidden=self._mine)

    def asks_teacher(self) -> Asks:
        """Read the output of the layers that teach."""
        return Asks(hidden=self._theirs)

    def terms(self, student: Reading, teachers: Sequence[Reading], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One term, `layers`: the errors of the matched layers, summed."""
        (teacher,) = teachers
        mask = batch["attention_mask"]
        mapped = [self.projection(student.hidden[layer]) for layer in self._mine]
        errors = [[hidden_mse(teacher.hidden[layer], own, mask) for own in mapped] for layer in self._theirs]
        distances = torch.stack([torch.stack(row) for row in errors]).tolist()
        matched = nearest_layers(distances, self.is_open or [True] * len(self._mine))
        found = [row[layer] for row, layer in zip(errors, matched, strict=True) if layer is not None]
        return {"layers": torch.stack(found).sum() if found else 0.0 * errors[0][0]}
