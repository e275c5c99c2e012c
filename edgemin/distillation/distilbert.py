"""DistilBERT's losses beside the soft targets: directions of hidden states, and masked words (arXiv 1910.01108).

Sanh, Debut, Chaumond and Wolf 2019 train a student by three losses: soft targets
(:mod:`edgemin.distillation.logits`), the cosine distance of the last hidden states h of the non-padding tokens,

    L_cos = mean over tokens of 1 - h_S · h_T / (‖h_S‖ ‖h_T‖)

and BERT's masked language model. Both are averaged over sequences and inside one over its tokens, where their code
averages over all tokens of a batch: so a long neighbour does not make a short sequence count less.

Shapes: B batch, T tokens, H hidden size, E width of the word embeddings, V vocabulary, N masked tokens of a batch.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgemin.distillation.averages import arithmetic, over_tokens

IGNORED = -100
"""The target of a token that is not to be predicted."""

_MASKED, _REPLACED = 0.8, 0.1


def hidden_cosine(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Cosine distance of hidden states (equation above): ``CosineEmbeddingLoss`` with target 1.

    Computed as half the squared distance of the normalised states, which is the same number and exactly 0 for equal
    states; in float32 also under autocast and for 16-bit states, with a float64 argument in float64.

    Args:
        teacher: ``[B, T, H]``; gets no gradient.
        student: ``[B, T, H]``, of the same tokens.
        mask: ``[B, T]``, non-zero where there is a token.

    Returns:
        A scalar from 0 to 2. A sequence without any token adds nothing and is not counted.
    """
    assert teacher.shape == student.shape and teacher.shape[:2] == mask.shape, "the same tokens, equal widths"
    dtype = arithmetic(teacher, student)
    with torch.autocast(student.device.type, enabled=False):
        target = F.normalize(teacher.detach().to(dtype), dim=-1)
        learnt = F.normalize(student.to(dtype), dim=-1)
        return over_tokens((learnt - target).square().sum(-1) / 2, mask.bool())


def mask_tokens(
    ids: Tensor, maskable: Tensor, *, mask_id: int, vocabulary: int, share: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Hide words as BERT does: of the chosen tokens 80 % become [MASK], 10 % any word, 10 % stay as they are.

    As in BERT's own code a fixed share of each sequence's tokens is chosen, rounded, and at least one. (DistilBERT's
    prefers rare words.) Drawn from torch's generator of the device that ``ids`` lie on.

    Args:
        ids: ``[B, T]``, token ids.
        maskable: ``[B, T]``, non-zero where a token may be chosen: neither padding nor special.
        mask_id: the id of [MASK].
        vocabulary: V; replacements are drawn from all ids below it.
        share: of the maskable tokens to choose.

    Returns:
        What a model reads instead of ``ids``, and the targets: the id of each chosen token, elsewhere ``IGNORED``.
    """
    assert ids.shape == maskable.shape
    allowed = maskable.bool()
    available = allowed.sum(-1, keepdim=True)
    wanted = (share * available).round().clamp(min=1).minimum(available)
    lots = torch.rand(ids.shape, device=ids.device).masked_fill(~allowed, 2.0)
    chosen = lots.argsort(-1).argsort(-1) < wanted
    fate = torch.rand(ids.shape, device=ids.device)
    words = torch.randint(vocabulary, ids.shape, device=ids.device, dtype=ids.dtype)
    hidden = ids.masked_fill(chosen & (fate < _MASKED), mask_id)
    hidden = torch.where(chosen & (fate >= _MASKED) & (fate < _MASKED + _REPLACED), words, hidden)
    return hidden, ids.masked_fill(~chosen, IGNORED)


class MaskedLanguageHead(nn.Module):
    """BERT's head for masked words: Linear, GELU, LayerNorm, then a decoder tied to the word embeddings.

    The Linear leads from the hidden size to the width of the word embeddings (equal in BERT).

    Args:
        hidden: H.
        embedding: E.
        vocabulary: V, for the decoder's own bias.
    """

    def __init__(self, hidden: int, embedding: int, vocabulary: int) -> None:
        super().__init__()
        self.transform = nn.Linear(hidden, embedding)
        self.norm = nn.LayerNorm(embedding, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.normal_(self.transform.weight, std=0.02)
        nn.init.zeros_(self.transform.bias)

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        """Logits ``[N, V]`` from hidden states ``[N, H]`` and the word embeddings ``[V, E]``."""
        return F.linear(cast(Tensor, self.norm(F.gelu(self.transform(states)))), words, self.bias)


def masked_word_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the chosen tokens, averaged over sequences and inside one over its chosen tokens.

    Args:
        logits: ``[N, V]``, of the tokens whose target is not ``IGNORED``, row after row.
        targets: ``[B, T]``, as ``mask_tokens`` gives them.

    Returns:
        A scalar in nats. A sequence without chosen tokens adds nothing and is not counted.
    """
    chosen = targets != IGNORED
    counts = chosen.sum(-1)
    dtype = arithmetic(logits)
    with torch.autocast(logits.device.type, enabled=False):
        losses = F.cross_entropy(logits.to(dtype), targets[chosen], reduction="none")
        return (losses / counts.repeat_interleave(counts)).sum() / counts.count_nonzero().clamp(min=1)
