"""Turning an encoder's residual stream onto the principal directions of its word embeddings, from weights alone.

Everything that flows between the layers lives in one space of H units. In new coordinates v' = v Q, with Q orthogonal,
what writes there (embeddings, W_O, the FFN's second matrix) becomes W' = Qᵀ W and what reads there W' = W Q, and every
product is as it was. Keeping the first k coordinates afterwards drops the directions in which the words differ least
(Ashkboos et al. 2024, arXiv 2401.15024, does this with activations, and for norms without a scale).

LayerNorm does not commute with a rotation in general, for two reasons:

- It takes off the mean over the units. So the basis is made to keep the mean: Q takes the vector of ones to the vector
  of ones (over the k kept coordinates). Then LayerNorm's centring and length, hence n = LN(v) without scale and bias,
  turn along exactly.
- Its scale γ (a diagonal Γ) turns into QᵀΓQ, which is no diagonal. Γ is therefore moved into all that reads the norm's
  output, which is exact: with any new scale γ', W' = W Γ Q Γ'⁻¹, and b' = b + W β - W' β' as long as there is a bias.

What remains approximate, then, with all H coordinates kept: where a norm's output goes on as the stream itself (each
norm of the post-norm families, ModernBERT's first), the skip path gets Γ' in place of QᵀΓQ, the nearest diagonal,
γ'_j = Σ_i Q_ij² γ_i. It is exact where a norm's scales are all alike. What is lost by keeping fewer is the rest of the
stream: a norm now divides by the length of what is kept, which is put right on average, for the words' own share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edgemin.encoder.families import table
from edgemin.encoder.parts import has_projection, layers


class Basis(NamedTuple):
    """Where the residual stream is turned to."""

    turn: Tensor  #: Q [H, H], float64, orthogonal; its first k columns are what is kept.
    share: float  #: of the words' energy around each word's mean over the units, what the kept columns hold.


def principal_basis(words: Tensor, keep: int) -> Basis:
    """The leading principal directions of the rows of a matrix, with the mean over the units among them.

    With C = I - 11ᵀ/H and u_j the eigenvectors of C WᵀW C by falling eigenvalue, the first k columns are
    [u_1 ... u_(k-1), 1/√H] R, where R is the reflection that takes the last axis to 1/√k: so 1_H becomes a multiple of
    1_k. The words are not centred around their average word: nothing behind would add it back.

    Args:
        words: ``[V, H]``.
        keep: k.
    """
    width = words.shape[1]
    centred = words.double() - words.double().mean(1, keepdim=True)
    energy = centred.T @ centred
    ones = torch.ones(width, dtype=energy.dtype, device=energy.device) / width**0.5
    # Its eigenvalue is 0 and may not be alone there: below zero it is told apart, as the last.
    total = energy.trace()
    values, vectors = torch.linalg.eigh(energy - (total + 1) * torch.outer(ones, ones))
    vectors = vectors[:, 1:].flip(1)
    vectors = vectors * torch.where(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    axis = torch.zeros(keep, dtype=energy.dtype, device=energy.device)
    axis[-1] = 1
    across = axis - keep**-0.5
    turned = torch.cat([vectors[:, : keep - 1], ones[:, None]], dim=1)
    if keep > 1:
        turned = turned - 2 * (turned @ across)[:, None] * across / across.square().sum()
    share = 1.0 if energy.is_meta else float(values[1:].flip(0)[: keep - 1].sum() / total)
    return Basis(torch.cat([turned, vectors[:, keep - 1 :]], dim=1), share)


def rotate_hidden(model, keep, mode="fold", use_share=True):
    family = table(model)
    found = layers(model)
    H = model.get_submodule(family.head[0]).in_features
    words = model.get_submodule(family.words).weight.detach()
    proj = has_projection(model)
    basis = principal_basis(words, keep)
    Q = basis.turn.float()
    grow = (basis.share * H / keep) ** 0.5 if use_share else 1.0
    emb = model.get_submodule(family.embedding_norm)
    readers = []
    before = emb
    for l in found:
        n0, n1 = (l.part(p) for p in family.norms)
        readers += [(before, x) for x in l.projections] + [(n0, l.part(family.ffn_in))]
        before = n1
    readers.append((before, model.get_submodule(family.head[0])))
    norms = [emb] + [l.part(p) for l in found for p in family.norms]
    new = {id(n): (Q.square().T @ n.weight if mode != "uniform" else n.weight.mean().expand(H)) for n in norms}
    with torch.no_grad():
        for n, r in readers:
            if mode == "plain":
                r.weight.copy_(r.weight @ Q)
                continue
            b = n.bias
            shift = r.weight @ b
            r.weight.copy_((r.weight * n.weight) @ Q / new[id(n)])
            r.bias.add_(shift - r.weight[:, :keep] @ (b @ Q)[:keep])
        for n in norms:
            n.weight.copy_(new[id(n)] * grow)
            n.bias.copy_(n.bias @ Q)
        for p in (family.words, family.positions, family.token_types):
            if p:
                m = model.get_submodule(p)
                m.weight.copy_(m.weight @ Q)
        for l in found:
            for w in (l.output, l.part(family.ffn_out)):
                w.weight.copy_(Q.T @ w.weight)
                w.bias.copy_(w.bias @ Q)
    return basis
