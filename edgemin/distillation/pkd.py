"""Patient knowledge distillation: [CLS] of several layers (Sun, Cheng, Gan and Liu 2019, arXiv 1908.09355).

With h_i,l the hidden state of example i's first token, [CLS], after layer l, and P matched pairs of layers,

    L_PT = 1 / (B P) · Σ_i Σ_(l_S, l_T) ‖ h_i,l_S / ‖h_i,l_S‖ - h_i,l_T / ‖h_i,l_T‖ ‖²

Only directions count, so a distance is between 0 and 4 whatever the width. The paper sums over examples and layers;
here they are averaged, so that the weight β does not depend on their numbers. Like the paper, and unlike its
official code, the H dimensions are summed. That code takes ``mse_loss`` of the normalised states, a mean over
dimensions too, so its β is H times ours: 500, its example's for BERT-base, is 500 / 768 = 0.65 here.

Shapes: B batch, P pairs of layers, H hidden size.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from edgemin.distillation.averages import arithmetic
from edgemin.errors import UserError

Strategy = Literal["skip", "last"]


def patience_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared distance of normalised states (equation above), averaged over examples and pairs of layers.

    Computed in float32 also under autocast and for 16-bit states; with a float64 argument in float64.

    Args:
        teacher: ``[B, P, H]``, the [CLS] states of the matched teacher layers; get no gradient.
        student: ``[B, P, H]``, those of the student layers that learn from them.

    Returns:
        A scalar from 0 (equal directions) to 4 (opposite ones).
    """
    assert teacher.shape == student.shape and student.ndim == 3, "equal numbers of layers, equal widths"
    dtype = arithmetic(teacher, student)
    with torch.autocast(student.device.type, enabled=False):
        target = F.normalize(teacher.detach().to(dtype), dim=-1)
        learnt = F.normalize(student.to(dtype), dim=-1)
        return (learnt - target).square().sum(-1).mean()


def patient_layers(strategy: Strategy, student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Which teacher layer each student layer but the last learns from; layers count from 1.

    | strategy | student layer l of L_S learns from   | 12 -> 6 (published) | 12 -> 3 |
    |----------|--------------------------------------|---------------------|---------|
    | skip     | ⌈l L_T / L_S⌉, evenly spaced         | 2, 4, 6, 8, 10      | 4, 8    |
    | last     | L_T - L_S + l, the layers at the top | 7, 8, 9, 10, 11     | 10, 11  |

    The last layers are not matched: the outputs, which stand on them, are.

    Raises:
        UserError: the student has a single layer, so that none is left to match, or more layers than its teacher.
    """
    if not 2 <= student_layers <= teacher_layers:
        raise UserError(
            f"layer_map: expected a student of at least 2 layers and at most its teacher's {teacher_layers} for "
            f"{strategy}, given one of {student_layers}"
        )
    if strategy == "last":
        return {layer: teacher_layers - student_layers + layer for layer in range(1, student_layers)}
    return {layer: -(-layer * teacher_layers // student_layers) for layer in range(1, student_layers)}
