"""TinyBERT: first the inside of the encoder is learnt, then its answers (Jiao et al. 2019, arXiv 1909.10351).

With matched layers l -> g(l), hidden states H, embeddings E = H after no layer, attention scores
S_a = Q_a K_aᵀ / √d before the softmax, logits z, learnt matrices W_e and W_h and a temperature t:

    L_embd = MSE(E_S W_e, E_T)
    L_hidn = Σ_l MSE(H_S,l W_h, H_T,g(l))
    L_attn = Σ_l 1/A · Σ_a MSE(S_S,l,a, S_T,g(l),a)
    L_pred = CE(z_T / t, z_S / t) = -Σ_c softmax(z_T / t)_c · ln softmax(z_S / t)_c

A mean of squares is over sequences and, inside one, over its tokens and their dimensions, or over heads, rows and
columns. L_pred comes times t², which keeps the size of its gradient as t changes.

The published code differs in four points that are not followed here: it averages over padding too (scores of -100 and
less, as masked ones are, become 0 on both sides); one `nn.Linear` with a bias is W_e and W_h at once; its L_pred ends
in `.mean()`, which divides by the number of classes as well; and where the output is a score it trains on the labels in
place of the teacher's outputs.

Shapes: B batch, T tokens, H hidden size, A attention heads, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from edgemin.config import NonNegative, Part, Positive
from edgemin.encoder.outline import Outline
from edgemin.encoder.taps import Reading
from edgemin.errors import UserError
from edgemin.training.attention import attention_scores, check_rebuildable, matched_heads
from edgemin.training.averages import arithmetic, over_sequences
from edgemin.training.distillation import Asks
from edgemin.training.fit import Fit
from edgemin.training.hidden_states import hidden_mse
from edgemin.training.layer_maps import matched_layers
from edgemin.training.projections import Projection
from edgemin.training.soft_targets import check_outputs
from edgemin.training.teaching import Teaching
from edgemin.training.two_fits import TwoFits


def score_mse(
    teacher: tuple[Tensor, Tensor, Tensor], student: tuple[Tensor, Tensor, Tensor], mask: Tensor, heads: int
) -> Tensor:
    """Mean squared error of the attention scores of one pair of layers, averaged over sequences.

    Inside a sequence the mean is over heads and over those rows and columns that are no padding. Arithmetic as in
    `hidden_mse`.

    Args:
        teacher: raw queries, keys and values `[B, T, Ht]` of the teacher's layer ; they get no gradient, and the
            values are not used.
        student: those of the student's layer, `[B, T, Hs]`.
        mask: `[B, T]`, non-zero where there is a token.
        heads: A, attention heads, equally many on both sides; each side's scores have the scale of its own head size.

    Returns:
        A scalar. A sequence without any token adds nothing and is not counted.
    """
    assert teacher[0].shape[:2] == student[0].shape[:2] == mask.shape, "teacher and student must read the same tokens"
    tokens = mask.bool()
    dtype = arithmetic(teacher[0], student[0])

    def scores(query: Tensor, key: Tensor) -> Tensor:
        # Queries and keys of padding are made 0: then so are scores in its rows and columns, on both sides.
        queries, keys = (part.to(dtype).masked_fill(~tokens[..., None], 0.0) for part in (query, key))
        return attention_scores(queries, keys, heads)

    with torch.autocast(student[0].device.type, enabled=False):
        with torch.no_grad():
            target = scores(teacher[0], teacher[1])
        squares = (scores(student[0], student[1]) - target).square().sum((1, 2, 3))
        lengths = tokens.sum(-1)
        return over_sequences(squares / heads / lengths.clamp(min=1), lengths)


class TinyBERT(TwoFits):
    r"""TinyBERT (Jiao et al. 2019, arXiv 1909.10351): first what happens inside, then the predictions.

    $$ L_1 = w_E L_{embd} + w_H L_{hidn} + w_A L_{attn}, \qquad L_2 = L_{pred} $$

    with the terms of [`tinybert`][edgemin.distillation.tinybert], each summed over the matched layers. The first fit
    trains the encoder by $L_1$, the second encoder and head by $L_2$; no label is looked at. With a corpus (the paper's
    general distillation) there is the first alone. The paper trains on 20 times the data, augmented by BERT and GloVe;
    nothing is augmented here.

    Args:
        layer_map: {student layer: teacher layer}, counted from 1; `None` spreads them evenly, the last to the last.
        embedding_weight: weight of the embeddings' output.
        hidden_weight: weight of the hidden states after the matched layers.
        attention_weight: weight of the attention scores before the softmax, head by head: the layers need equally many
            heads, and scores that follow from the projections alone, so not ModernBERT's.
        projection: `learned` maps the student's embeddings and hidden states to the teacher's width by two learnt
            matrices, which begin as [`projections`][edgemin.training.projections] says (the identity between equal
            widths) and are kept beside the model for the next stage of this method, so that the paper's general and
            task distillation share them (`order=tinybert`). The published code has one map for both, with a bias, and
            begins it at random where widths are equal too. `none` compares them as they are, which needs equal widths.
        temperature: t of the predictions.
        prediction_share: share of the steps that the second fit gets; see
            [`TwoFits`][edgemin.training.two_fits.TwoFits].
        prediction_learning_rate: learning rate of the second fit.
        fit: as for any [`Distillation`][edgemin.training.distillation.Distillation];
            `learning_rate` is that of the first fit.
        teaching: likewise.
    """

    def __init__(
        self,
        *,
        layer_map: dict[int, int] | None = None,
        embedding_weight: NonNegative = 1.0,
        hidden_weight: NonNegative = 1.0,
        attention_weight: NonNegative = 1.0,
        projection: Literal["learned", "none"] = "learned",
        temperature: Positive = 1.0,
        prediction_share: Part = 0.2,
        prediction_learning_rate: Positive = 3e-5,
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        super().__init__(
            prediction_share=prediction_share,
            prediction_learning_rate=prediction_learning_rate,
            fit=fit,
            teaching=teaching,
        )
        self.weights = {"embedding": embedding_weight, "hidden": hidden_weight, "attention": attention_weight}
        if self.settings.trains and not any(self.weights.values()):
            raise UserError("hidden_weight: expected it, embedding_weight or attention_weight above 0, given all 0")
        self.layer_map, self.projection, self.temperature = layer_map, projection, temperature
        self.projections = nn.ModuleDict()
        self._pairs: dict[int, int] = {}
        self._heads: dict[int, int] = {}

    # -- what planning asks ------------------------------------------------------------------------

    def match(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Match the layers; refuse heads, widths, families or outputs that cannot be compared."""
        (teacher,) = teachers
        self._pairs = matched_layers(self.layer_map, len(student.layers), len(teacher.layers))
        if self.weights["attention"]:
            check_rebuildable(student, teacher)
        if self.projection == "none" and student.hidden != teacher.hidden:
            raise UserError(
                f"projection: expected learned, as the student's hidden size {student.hidden} is not the teacher's "
                f"{teacher.hidden}, given none"
            )
        if self.weights["attention"]:
            self._heads = matched_heads(student, teacher, self._pairs)
        if self._prediction is not None:
            check_outputs(student, teachers)

    # -- training ----------------------------------------------------------------------------------

    def equip(self, student: Outline, teachers: Sequence[Outline]) -> None:
        """Make the projections to the teacher's width."""
        if self.projection == "learned":
            for name in ("embedding", "hidden"):
                if self.weights[name]:
                    self.projections[name] = nn.Linear(student.hidden, teachers[0].hidden, bias=False)
        if self.corpus is not None:
            self.notes.append("a corpus has no predictions to learn: only embeddings, hidden states and attention were")

    def projected(self) -> Sequence[Projection]:
        """Of the embeddings and of the hidden states, where they are learnt."""
        states = {"embedding": ((0, 0),), "hidden": tuple(self._pairs.items())}
        return [Projection(cast(nn.Linear, linear), states[name]) for name, linear in self.projections.items()]

    def asks_student(self) -> Asks:
        """Reads the matched layers in the first fit, the logits in the second."""
        return self._asks(tuple(self._pairs))

    def asks_teacher(self) -> Asks:
        """Reads the same of the teacher's matched layers."""
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
        """`embedding`, `hidden` and `attention` in the first fit, `prediction` in the second."""
        (teacher,) = teachers
        if self.phase == 1:
            assert student.logits is not None and teacher.logits is not None
            kind = self.data.kind
            return {"prediction": kind.soft_loss(teacher.logits, student.logits, self.temperature, entropy=True)}
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
