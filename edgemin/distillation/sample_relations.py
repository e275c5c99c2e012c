"""Relations of the examples of a batch, each one vector: what [`mlkd`][edgemin.distillation.mlkd] learns second.

Shapes: B batch, H hidden size, Ht and Hs those of teacher and student.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgemin.distillation.relation import relation_kl
from edgemin.training.averages import arithmetic


def sample_relation(teacher: Tensor, student: Tensor) -> Tensor:
    """L_SS: KL of the teacher's relation of the examples of a batch from the student's, averaged over examples.

    Args:
        teacher: one vector per example, `[B, Ht]`; gets no gradient.
        student: `[B, Hs]`.

    Returns:
        A scalar in nats; 0 for equal relations, and for a batch of one.
    """
    everyone = torch.ones(1, len(student), dtype=torch.bool, device=student.device)
    return relation_kl(teacher[None], student[None], everyone, relation_heads=1)


def contrastive_relation(teacher: Tensor, student: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """L_SC: examples of one class closer than others, over both models' vectors of a batch.

    With the 2B vectors z of teacher and student normalized, and P(i) those other than i whose label is that of i (the
    other model's vector of the same example always is):

        L = 1 / 2B · Σ_i 1 / |P(i)| · Σ_(p in P(i)) -ln(exp(z_i · z_p / τ) / Σ_(a ≠ i) exp(z_i · z_a / τ))

    This is the supervised contrast of Khosla et al. (2020, arXiv 2004.11362) with two models in place of two views.
    Computed in float32 also under autocast; with a float64 argument in float64.

    Args:
        teacher: one vector per example, `[B, H]`; gets no gradient.
        student: `[B, H]`, projected to the teacher's width.
        labels: `[B]`, class indices.
        temperature: τ, above 0.

    Returns:
        A scalar in nats, above 0 but for a batch of one.
    """
    assert teacher.shape == student.shape and labels.shape == student.shape[:1]
    dtype = arithmetic(teacher, student)
    with torch.autocast(student.device.type, enabled=False):
        vectors = F.normalize(torch.cat([teacher.detach().to(dtype), student.to(dtype)]), dim=-1)
        itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
        similarities = (vectors @ vectors.T / temperature).masked_fill(itself, -torch.inf)
        classes = labels.repeat(2)
        positive = (classes[:, None] == classes) & ~itself
        chosen = F.log_softmax(similarities, dim=-1).masked_fill(~positive, 0.0)
        return -(chosen.sum(-1) / positive.sum(-1)).mean()
