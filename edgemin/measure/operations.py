"""Multiply-accumulate operations of one inference, by formula from the structure alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def operations(structure: Mapping[str, Any], length: int = 128) -> dict[str, int]:
    r"""Counts the operations of one sentence: what the products of matrices need, and nothing else.

    With n tokens, hidden size H, inner attention width W = heads x head size (H unless pruned), intermediate
    size I and n_k = min(n, window) keys per query (n where attention is global), one layer takes

    .. math:: 4 n H W + 2 n n_k W + 2 n H I \quad (3 n H I \text{ if the feed-forward is gated}),

    which is the familiar 4nH^2 + 2n^2H + 2nHI of an unpruned encoder. Pooler and classifier run on one token.
    Embedding look-ups, biases, LayerNorms, softmax and activations are left out, as everywhere in the
    literature. A local layer is charged a full window for every query: the few keys missing at the sentence's
    edges are not deducted. Padding counts like any token, and integer operations count like floating-point
    ones, so quantisation changes nothing here.

    Args:
        structure: As made by ``edgemin.encoder.structure``.
        length: Tokens n of the sentence.

    Returns:
        ``macs``, and ``flops`` = 2 ``macs``.
    """
    assert length >= 1, length
    hidden = structure["hidden"]
    macs = sum(inputs * outputs for inputs, outputs in structure["head"])
    if structure["projection"]:  # ELECTRA: a narrow embedding, projected to the hidden size
        macs += length * structure["embedding"] * hidden
    for layer in structure["layers"]:
        width = layer["heads"] * layer["head_size"]
        keys = length if layer["window"] is None else min(length, layer["window"])
        macs += 4 * length * hidden * width + 2 * length * keys * width
        macs += (3 if layer["gated"] else 2) * length * hidden * layer["ffn"]
    return {"macs": macs, "flops": 2 * macs}
