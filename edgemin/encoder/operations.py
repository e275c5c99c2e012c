"""Multiply-accumulate operations of one inference, by formula from the outline alone."""

from __future__ import annotations

from edgemin.encoder.outline import LayerOutline, Outline


def operations(outline: Outline, length: int = 128) -> dict[str, int]:
    r"""Counts the operations of one sentence: what the products of matrices need, and nothing else.

    With n tokens, hidden size H, inner attention width W = heads x head size (H unless pruned), intermediate
    size I and n_k = min(n, window) keys per query (n where attention is global), one layer takes

    $$ 4 n H W + 2 n n_k W + 2 n H I \quad (3 n H I \text{ if the feed-forward is gated}), $$

    which is the familiar 4nH^2 + 2n^2H + 2nHI of an unpruned encoder. A MobileBERT layer works in a bottleneck of
    width M between feature maps of width H, with F feed-forward networks one after the other, and takes

    $$ k n H M + n (3 M + V) W + 2 n^2 W + 2 F n M I + n M H $$

    for its k bottlenecks (2 where query and key have one of their own, else 1), query, key, value and output
    projections (value reads V = H features, or M where it reads the bottleneck), attention, the networks and the
    way back to the feature map. What comes before the first layer is a Linear on trigrams, 3 n E H for embeddings of
    width E; without trigrams, and for ELECTRA's, it is n E H. Pooler and classifier run on one token.
    Embedding look-ups, biases, LayerNorms, softmax and activations are left out, as everywhere in the
    literature. A local layer is charged a full window for every query: the few keys missing at the sentence's
    edges are not deducted. Padding counts like any token, and integer operations count like floating-point
    ones, so quantization changes nothing here.

    Args:
        outline: Of a model whose numbers are all known.
        length: Tokens n of the sentence.

    Returns:
        `macs`, and `flops` = 2 `macs`.
    """
    assert length >= 1, length
    macs = sum(inputs * outputs for inputs, outputs in outline.head)
    if outline.projection:  # ELECTRA, MobileBERT: a narrow embedding, projected to the hidden size
        macs += length * (3 if outline.trigram else 1) * outline.embedding * outline.hidden
    macs += sum(_layer(layer, outline.hidden, length) for layer in outline.layers)
    return {"macs": macs, "flops": 2 * macs}


def _layer(layer: LayerOutline, hidden: int, length: int) -> int:
    """Multiply-accumulates of one layer, attention's two products included."""
    bottleneck, inner = layer.bottleneck, layer.inner
    assert inner is not None and layer.ffn is not None, "the numbers of heads and FFN units are known"
    width = hidden if bottleneck is None else bottleneck.size
    values = width if bottleneck is None or bottleneck.attention else hidden
    keys = length if layer.window is None else min(length, layer.window)
    per_token = (3 * width + values + 2 * keys) * inner
    per_token += (3 if layer.gated else 2) * width * layer.ffn * layer.networks
    if bottleneck is not None:
        ways_in = 2 if bottleneck.shared and not bottleneck.attention else 1
        per_token += (ways_in + 1) * hidden * width
    return length * per_token
