"""Turning an encoder's residual stream onto the principal directions of its word embeddings, by its weights alone.

All that flows between the layers are rows v of H units. In coordinates v' = v Q, with Q orthogonal, a Linear that
writes there becomes Qᵀ W, one that reads there W Q, an embedding E Q, and every product is what it was. Dropping all
but the first k coordinates then loses the directions in which the words differ least. Ashkboos et al. 2024 (arXiv
2401.15024) do so for norms without mean and scale, with directions found from data.

LayerNorm, γ ⊙ n(v) + β with n(v) = √H C v / ‖C v‖ and C = I - 11ᵀ/H, turns along only in part:

- C: exactly. Q takes the vector of ones to a multiple of ones, so that the mean over the units stays what it was and
  n(v Q) = n(v) Q. One of the k coordinates goes to the mean: k - 1 principal directions are kept.
- γ, as far as the norm's output is read: exactly. A diagonal Γ turns into QᵀΓQ, which is none; but any γ' will do if
  the readers make up for it, W' = W Γ Q Γ'⁻¹, and b' = b + W β - W' β' wherever there is a bias (ModernBERT has
  neither β nor b). Here γ'_j = Σ_i Q_ij² γ_i, the diagonal nearest to QᵀΓQ.
- γ, as far as the norm's output goes on as the stream itself (all norms of the families that have them behind attention
  and FFN; ModernBERT's embeddings): approximately, by γ' for QᵀΓQ. It is exact where the scales of a norm are equal.
  Trained encoders have a few units with huge values and a scale that is made for them (γ_i of 0.1 or 1.5 among
  0.6 +- 0.05); a mean scale would let those swamp the rest. So units whose scale is an outlier keep an axis of their
  own: those further than 5 robust standard deviations (1.4826 times the median absolute deviation) from the median of
  any such norm.
- Dropped coordinates: approximately, as with any cut. Where a share s of a row's squared length is left, a norm over k
  units makes it √(k / (s H)) times as long as it was within H; γ' is divided by that, with the words' own share for s.
  A stream that never leaves the directions kept is kept exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.encoder.families import table
from edgemin.encoder.parts import has_projection
from edgemin.encoder.stream import Read, Stream, stream

_OUTLIER = 5 * 1.4826  # median absolute deviations


@torch.no_grad()
def rotate_hidden(model: PreTrainedModel, keep: int) -> None:
    """Turn the residual stream, in place, so that its first coordinates are the ones to keep.

    The hidden size stays; [`slice_hidden`][edgemin.encoder.slicing.slice_hidden] with `range(keep)` is made to follow,
    and norms and biases are set for what it leaves. With `keep` the whole hidden size and equal scales in every norm
    whose output goes on as the stream, the model computes what it did. On the meta device nothing changes.

    Args:
        model: Changed in place.
        keep: k, at most H.

    Raises:
        UserError: there is no such stream (MobileBERT), or its weights are quantized.
    """
    found = stream(model)
    words = _words(model, found)
    if words.is_meta:
        return
    turn = principal_basis(words, keep, outlying_units(found.carried)[: keep - 1]).to(words.dtype)
    growth = (_kept_share(words, turn[:, :keep]) * len(turn) / keep).sqrt()
    for read in (*found.reads, found.head):
        _turn_reader(read, turn, keep)
    for embedding in found.tables:
        embedding.weight.copy_(embedding.weight @ turn)
    for linear in found.writers:
        linear.weight.copy_(turn.T @ linear.weight)
        if linear.bias is not None:
            linear.bias.copy_(linear.bias @ turn)
    for norm in (*found.carried, *found.aside):  # after the readers, which need them as they were
        norm.weight.copy_(growth * _turned_scale(norm, turn))
        if norm.bias is not None:
            norm.bias.copy_(norm.bias @ turn)


def principal_basis(words: Tensor, keep: int, axes: Sequence[int] = ()) -> Tensor:
    """An orthogonal basis whose leading columns hold the mean, some axes and the words' principal directions.

    With W the words, e_a the axes made orthogonal to the ones, and u_1, u_2 ... the eigenvectors of WᵀW within what is
    orthogonal to both, by falling eigenvalue, the first k columns are [e_a ... u_1 u_2 ... 1/√H] R. The reflection R
    takes the last coordinate to 1/√k, and so 1_H to a multiple of 1_k. W is not centred around its average word, as
    nothing behind would add that back; its mean over the units is the ones' share.

    Args:
        words: `[V, H]`.
        keep: k.
        axes: Units that keep an axis, at most k - 1.

    Returns:
        `[H, H]`, float64. Of each u the entry of largest size is positive.
    """
    words = words.detach().double()
    width = words.shape[1]
    fixed = torch.stack([torch.ones_like(words[0]), *torch.eye(width).to(words)[list(axes)]], dim=1)
    ones_and_axes = torch.linalg.qr(fixed).Q
    ones_and_axes = ones_and_axes * (ones_and_axes * fixed).sum(0).sign()
    rest = words - (words @ ones_and_axes) @ ones_and_axes.T
    energy = rest.T @ rest
    # What is fixed has the eigenvalue 0 and may share it with others: below zero it stands apart.
    apart = (energy.trace() + 1) * (ones_and_axes @ ones_and_axes.T)
    directions = torch.linalg.eigh(energy - apart).eigenvectors[:, fixed.shape[1] :].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * torch.where(largest < 0, -1.0, 1.0)
    ones, axes_turned = ones_and_axes[:, :1], ones_and_axes[:, 1:]
    kept = keep - fixed.shape[1]
    leading = torch.cat([axes_turned, directions[:, :kept], ones], dim=1)
    across = torch.eye(keep)[-1].to(words) - keep**-0.5
    if keep > 1:
        leading = leading - 2 * torch.outer(leading @ across, across) / across.square().sum()
    return torch.cat([leading, directions[:, kept:]], dim=1)


def outlying_units(norms: Sequence[nn.LayerNorm]) -> list[int]:
    """Units whose scale is an outlier in some norm, the farthest first."""
    scales = torch.stack([norm.weight.detach().double() for norm in norms])
    away = (scales - scales.median(1, keepdim=True).values).abs()
    spread = _OUTLIER * away.median(1, keepdim=True).values
    # Equal scales have no spread; what rounding left of them is no outlier.
    farthest = (away / spread.clamp(min=1e-4 * scales.abs().mean())).amax(0)
    order = torch.sort(farthest, descending=True, stable=True).indices
    return order[: int((farthest > 1).sum())].tolist()


def _words(model: PreTrainedModel, found: Stream) -> Tensor:
    """What each word puts into the stream: its embedding, through norm and projection where it is projected."""
    family = table(model)
    words = model.get_submodule(family.words).weight
    assert isinstance(words, Tensor)
    if not has_projection(model):
        return words
    projected = found.writers[0](model.get_submodule(family.embedding_norm)(words))
    assert isinstance(projected, Tensor)
    return projected


def _kept_share(words: Tensor, kept: Tensor) -> Tensor:
    """How much of the words' squared length, each around its mean over the units, lies in the kept directions."""
    centred = words - words.mean(1, keepdim=True)
    return (centred @ kept).square().sum() / centred.square().sum()


def _turn_reader(read: Read, turn: Tensor, keep: int) -> None:
    linear, norm = read
    if norm is None:
        linear.weight.copy_(linear.weight @ turn)
        return
    constant = linear.weight @ norm.bias if norm.bias is not None else None
    linear.weight.copy_((linear.weight * norm.weight) @ turn / _turned_scale(norm, turn))
    if constant is not None and linear.bias is not None:
        linear.bias.add_(constant - linear.weight[:, :keep] @ (norm.bias @ turn)[:keep])


def _turned_scale(norm: nn.LayerNorm, turn: Tensor) -> Tensor:
    """γ' [H]: the mean of γ in each direction; 1 where that is zero, as in a norm that is off altogether."""
    scale = norm.weight @ turn.square()
    return torch.where(scale == 0, 1.0, scale)
