"""Relational knowledge distillation: distances and angles between examples (Park et al. 2019, arXiv 1904.05068).

Nothing of one example is compared with the teacher, only how the examples of a batch lie to one another. With one
vector x_i per example, of teacher (t) or student (s), and l the Huber loss (1/2 d² for |d| ≤ 1, else |d| - 1/2),

    ψ_D(x_i, x_j) = ‖x_i - x_j‖ / μ,   μ the mean distance of the batch's examples
    ψ_A(x_i, x_j, x_k) = cos ∠ x_i x_j x_k, the angle at x_j

    L_D = mean over pairs of l(ψ_D(t_i, t_j) - ψ_D(s_i, s_j))
    L_A = mean over triples of l(ψ_A(t_i, t_j, t_k) - ψ_A(s_i, s_j, s_k))

Both are means over pairs or triples of different examples. The published code averages over all B² and B³, most of the
others being 0, so that its terms are (B - 1) / B and (B - 1)(B - 2) / B² of these.

Shapes: B batch, H hidden size, Ht and Hs those of teacher and student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from edgemin.config import NonNegative
from edgemin.encoder.outline import Outline
from edgemin.encoder.taps import Reading
from edgemin.errors import UserError
from edgemin.training.averages import arithmetic
from edgemin.training.distillation import Asks, Distillation, TaskWeight
from edgemin.training.fit import Fit
from edgemin.training.teaching import Teaching


def distance_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """L_D (equation above). Scaling or turning either side's vectors changes nothing.

    Computed in float32 also under autocast and for 16-bit vectors; with a float64 argument in float64.

    Args:
        teacher: one vector per example, `[B, Ht]`; gets no gradient.
        student: `[B, Hs]`.

    Returns:
        A scalar of at least 0; 0 for a batch of one.
    """
    return _compared(teacher, student, _distances, _different(len(student), 2, student.device))


def angle_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """L_A (equation above). Scaling, moving or turning either side's vectors changes nothing. Arithmetic as in L_D.

    Args:
        teacher: one vector per example, `[B, Ht]`; gets no gradient.
        student: `[B, Hs]`.

    Returns:
        A scalar from 0 to 1.5; 0 for a batch of two. The cosine beside two equal vectors is taken as 0.
    """
    return _compared(teacher, student, _angles, _different(len(student), 3, student.device))


def _compared(teacher: Tensor, student: Tensor, relation: Callable[[Tensor], Tensor], counted: Tensor) -> Tensor:
    assert len(teacher) == len(student) and teacher.ndim == student.ndim == 2, "one vector per example on both sides"
    dtype = arithmetic(teacher, student)
    with torch.autocast(student.device.type, enabled=False):
        target = relation(teacher.detach().to(dtype))
        losses = F.smooth_l1_loss(relation(student.to(dtype)), target, reduction="none")
        return losses[counted].sum() / counted.sum().clamp(min=1)


def _distances(vectors: Tensor) -> Tensor:
    """ψ_D `[B, B]`."""
    found: Tensor = torch.linalg.vector_norm(vectors[:, None] - vectors, dim=-1)
    apart = found > 0
    return found / (found[apart].mean() if apart.any() else 1.0)


def _angles(vectors: Tensor) -> Tensor:
    """ψ_A `[B, B, B]`, the vertex first."""
    sides = vectors - vectors[:, None]  # from each vertex to each other
    lengths = torch.linalg.vector_norm(sides, dim=-1, keepdim=True)
    # Equal vectors have no direction; a division by almost 0 would have an endless gradient.
    units = torch.where(lengths > 0, sides / lengths.clamp(min=torch.finfo(vectors.dtype).tiny ** 0.5), 0.0)
    return units @ units.mT


def _different(examples: int, count: int, device: torch.device) -> Tensor:
    """Which pairs (or triples) are of different examples: `[B] * count`, bool."""
    other = ~torch.eye(examples, dtype=torch.bool, device=device)
    return other if count == 2 else other[:, :, None] & other[:, None, :] & other


class RelationalDistillation(Distillation):
    r"""RKD (Park et al. 2019, arXiv 1904.05068): examples lie to one another as the teacher has them.

    $$ L = w_D L_D + w_A L_A $$

    with [`distance_loss`][edgemin.distillation.rkd.distance_loss] and
    [`angle_loss`][edgemin.distillation.rkd.angle_loss] of the [CLS] states after the last layer. Widths, depths, heads,
    families and tokenizers may differ, for only the examples of a batch are compared with each other. They must be what
    a head reads, so the teacher should have been trained on the task.

    Both depend on the batch by nature: `batch_size` is part of the method, and of several processes each compares its
    own part of a batch.

    Args:
        distance_weight: w_D.
        angle_weight: w_A.
        task_weight: weight of the task loss; see [`Distillation`][edgemin.training.distillation.Distillation].
        fit: as for any [`Distillation`][edgemin.training.distillation.Distillation].
        teaching: likewise.
    """

    takes_corpus: ClassVar[bool] = False
    same_tokens = False

    def __init__(
        self,
        *,
        distance_weight: NonNegative = 1.0,
        angle_weight: NonNegative = 2.0,
        task_weight: TaskWeight = "auto",
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        super().__init__(fit=fit, teaching=teaching, task_weight=task_weight)
        self.weights = {"distance": distance_weight, "angle": angle_weight}
        if not any(self.weights.values()):
            raise UserError("distance_weight: expected it or angle_weight above 0, given both 0")
        self._last = (0, 0)

    def match(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Remember how deep both are."""
        (teacher,) = teachers
        self._last = len(student.layers), len(teacher.layers)

    def asks_student(self) -> Asks:
        """Reads the last hidden states."""
        return Asks(hidden=(self._last[0],))

    def asks_teacher(self) -> Asks:
        """Reads the last hidden states."""
        return Asks(hidden=(self._last[1],))

    def terms(self, student: Reading, teachers: Sequence[Reading], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`distance` and `angle`, each where its weight is above 0."""
        (teacher,) = teachers
        vectors = teacher.hidden[self._last[1]][:, 0], student.hidden[self._last[0]][:, 0]
        losses = {"distance": distance_loss, "angle": angle_loss}
        return {name: weight * losses[name](*vectors) for name, weight in self.weights.items() if weight > 0}
