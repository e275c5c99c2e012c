"""DistilBERT's losses beside the soft targets: directions of hidden states, and masked words (arXiv 1910.01108).

Sanh, Debut, Chaumond and Wolf 2019 train a student by three losses: soft targets
([`soft_targets`][edgemin.training.soft_targets]), the cosine distance of the last hidden states h of the non-padding
tokens,

    L_cos = mean over tokens of 1 - h_S · h_T / (‖h_S‖ ‖h_T‖)

and BERT's masked language model. Both are averaged over sequences and inside one over its tokens, where their code
averages over all tokens of a batch: so a long neighbour does not make a short sequence count less.

Shapes: B batch, T tokens, H hidden size, E width of the word embeddings, V vocabulary, N masked tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgemin.config import NonNegative, Positive
from edgemin.encoder.outline import Outline
from edgemin.encoder.taps import Reading
from edgemin.errors import UserError
from edgemin.training.averages import arithmetic, over_tokens
from edgemin.training.distillation import Asks, Distillation
from edgemin.training.fit import Fit
from edgemin.training.soft_targets import check_outputs, output_loss
from edgemin.training.stage import Effect, Place
from edgemin.training.teaching import Teaching

IGNORED = -100
"""The target of a token that is not to be predicted."""

_MASKED, _REPLACED = 0.8, 0.1


def hidden_cosine(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Cosine distance of hidden states (equation above): `CosineEmbeddingLoss` with target 1.

    Computed as half the squared distance of the normalized states, which is the same number and exactly 0 for equal
    states; in float32 also under autocast and for 16-bit states, with a float64 argument in float64.

    Args:
        teacher: `[B, T, H]`; gets no gradient.
        student: `[B, T, H]`, of the same tokens.
        mask: `[B, T]`, non-zero where there is a token.

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
    prefers rare words.) Drawn from torch's generator of the device that `ids` lie on.

    Args:
        ids: `[B, T]`, token ids.
        maskable: `[B, T]`, non-zero where a token may be chosen: neither padding nor special.
        mask_id: the id of [MASK].
        vocabulary: V; replacements are drawn from all ids below it.
        share: of the maskable tokens to choose.

    Returns:
        What a model reads instead of `ids`, and the targets: the id of each chosen token, elsewhere `IGNORED`.
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
        """Logits `[N, V]` from hidden states `[N, H]` and the word embeddings `[V, E]`."""
        return F.linear(cast(Tensor, self.norm(F.gelu(self.transform(states)))), words, self.bias)


def masked_word_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the chosen tokens, averaged over sequences and inside one over its chosen tokens.

    Args:
        logits: `[N, V]`, of the tokens whose target is not `IGNORED`, row after row.
        targets: `[B, T]`, as `mask_tokens` gives them.

    Returns:
        A scalar in nats. A sequence without chosen tokens adds nothing and is not counted.
    """
    chosen = targets != IGNORED
    counts = chosen.sum(-1)
    dtype = arithmetic(logits)
    with torch.autocast(logits.device.type, enabled=False):
        losses = F.cross_entropy(logits.to(dtype), targets[chosen], reduction="none")
        return (losses / counts.repeat_interleave(counts)).sum() / counts.count_nonzero().clamp(min=1)


_SOFT_WEIGHT = 5.0


class DistilbertDistillation(Distillation):
    r"""DistilBERT's triple loss (Sanh et al. 2019, arXiv 1910.01108), on a task or on a corpus.

    $$ L = w_{soft} \, \tau^2 \, KL + w_{cos} \, L_{cos} + w_{hard} \, L_{hard} $$

    with the KL of [`soft_target_kl`][edgemin.tasks.classification.soft_target_kl], the cosine distance of the last
    layers' hidden states ([`hidden_cosine`][edgemin.distillation.distilbert.hidden_cosine]; of ModernBERT before its
    final norm), and as hard loss the task's on a task, BERT's masked language model on a corpus. There both sides read
    the masked text, and the student's head for masked words, tied to its word embeddings, is trained with it and left
    behind at the end.

    The paper's soft targets are the teacher's distribution over the vocabulary. That takes its language-model head,
    which a classifier does not have: on a corpus there are none here, on a task they are the classifier's.

    Student and teacher need equal hidden sizes where `cosine_weight` is above 0. On a corpus with `cosine_weight` 0
    masked words alone are learnt and the teacher does not run: the control of a distillation on the same text.

    Args:
        temperature: τ of the soft targets, above 0.
        soft_weight: weight of the soft targets; `auto` is 5 on a task and 0 on a corpus.
        cosine_weight: weight of the cosine distance.
        hard_weight: weight of the task loss; on a corpus, of the loss on masked words.
        fit: as for any [`Distillation`][edgemin.training.distillation.Distillation].
        teaching: likewise.
    """

    def __init__(
        self,
        *,
        temperature: Positive,
        soft_weight: Literal["auto"] | NonNegative = "auto",
        cosine_weight: NonNegative,
        hard_weight: NonNegative,
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        on_task = teaching.corpus is None
        if not on_task and soft_weight not in ("auto", 0):
            raise UserError(
                "soft_weight: expected auto or 0 with a corpus, for soft targets over the vocabulary take the "
                f"teacher's language-model head, which a classifier does not have, given {soft_weight}"
            )
        super().__init__(fit=fit, teaching=teaching, task_weight=hard_weight if on_task else 0.0)
        self.soft_weight = (_SOFT_WEIGHT if on_task else 0.0) if soft_weight == "auto" else soft_weight
        self.temperature, self.cosine_weight = temperature, cosine_weight
        self.word_weight = 0.0 if on_task else hard_weight
        if self.soft_weight == cosine_weight == self.word_weight == 0:
            other = "soft_weight" if on_task else "hard_weight"
            raise UserError(f"cosine_weight: expected cosine_weight or {other} above 0, given both 0")
        if self.soft_weight == cosine_weight == 0:
            self.teachers, self.same_tokens = (), False
        self._last = (0, 0)
        self._vocabulary = 0
        self.word_head: MaskedLanguageHead | None = None

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        """Soft targets and labels train the classification head; a corpus has neither."""
        found = super().effect(model, teachers, place)
        trains_head = found.trains_head or (self.soft_weight > 0 and self.settings.trains)
        idle = () if self.teachers else ("teacher",)
        return replace(found, trains_head=trains_head, reads_answers=self.soft_weight > 0, idle=(*found.idle, *idle))

    def match(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Match the last layers; refuse unequal hidden sizes where they are compared, and other outputs."""
        if self.cosine_weight > 0 and student.hidden != teachers[0].hidden:
            raise UserError(
                f"cosine_weight: expected 0 where the student's hidden size {student.hidden} is not the teacher's "
                f"{teachers[0].hidden}, as their states cannot be compared, given {self.cosine_weight}"
            )
        self._last = len(student.layers), len(teachers[0].layers) if teachers else 0
        if self.soft_weight > 0:
            check_outputs(student, teachers)
        # Whoever reads the text must know what a word is replaced by; a table may be longer than the tokenizer. How
        # many rows a stage leaves may not be known in planning.
        known = [side.vocabulary for side in (student, *teachers) if side.vocabulary is not None]
        self._vocabulary = min(known, default=0)

    def equip(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """On a corpus, make the head for masked words."""
        if self.word_weight == 0:
            return
        if self.mask_id is None:
            raise UserError(
                "hard_weight: expected 0 with a corpus, as the student's tokenizer has no mask token, "
                f"given {self.word_weight}"
            )
        assert student.vocabulary is not None, "the student is here"
        self.word_head = MaskedLanguageHead(student.hidden, student.embedding, student.vocabulary)

    def inputs(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """On a corpus, the text with words masked, and `masked_words`, what they were."""
        if self.word_head is None:
            return batch
        assert self.mask_id is not None
        ids = batch["input_ids"]
        special = torch.isin(ids, torch.tensor(self.special_ids, device=ids.device, dtype=ids.dtype))
        masked, targets = mask_tokens(
            ids, batch["attention_mask"].bool() & ~special, mask_id=self.mask_id, vocabulary=self._vocabulary
        )
        return {**batch, "input_ids": masked, "masked_words": targets}

    def asks_student(self) -> Asks:
        """Reads the last hidden states, and the logits where soft targets are learnt."""
        states = (self._last[0],) if self.cosine_weight > 0 or self.word_weight > 0 else ()
        return Asks(hidden=states, logits=self.soft_weight > 0)

    def asks_teacher(self) -> Asks:
        """Reads the last hidden states where they are compared, and the logits where soft targets are learnt."""
        return Asks(hidden=(self._last[1],) if self.cosine_weight > 0 else (), logits=self.soft_weight > 0)

    def terms(self, student: Reading, teachers: Sequence[Reading], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms with a weight above 0: `soft` (answers), `cosine` (hidden states) and `word` (masked words)."""
        mine, theirs = self._last
        found = {}
        if self.soft_weight > 0:
            assert student.logits is not None and teachers[0].logits is not None
            soft = output_loss(self.data.kind, [teachers[0].logits], student.logits, self.temperature)
            found["soft"] = self.soft_weight * soft
        if self.cosine_weight > 0:
            distance = hidden_cosine(teachers[0].hidden[theirs], student.hidden[mine], batch["attention_mask"])
            found["cosine"] = self.cosine_weight * distance
        if self.word_head is not None:
            targets = batch["masked_words"]
            words = cast(Tensor, self.model.get_input_embeddings().weight)
            predicted = self.word_head(student.hidden[mine][targets != IGNORED], words)
            found["word"] = self.word_weight * masked_word_loss(predicted, targets)
        return found
