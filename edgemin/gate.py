"""The quality gate: a model against the one it was made from, and which layers are to blame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin import encoder
from edgemin.quantization import dynamic
from edgemin.quantization.layers import Quantised
from edgemin.quantization.sensitivity import damage

SENTENCES = 64  #: of the scored split, that layers are blamed on
NAMED = 5  #: layers that are named
MIN_CHANGED = 5  #: answers; of fewer, all for the worse, a sign test at 5 % would not call it a loss: 0.5^4 > 0.05
_ROUNDING = 1e-6  #: metrics are computed in single precision: 0.90 less 0.89 may come out above 0.01


def compare(
    before: float,
    after: float,
    logits_before: NDArray[np.float32],
    logits_after: NDArray[np.float32],
    max_drop: float,
    *,
    collapsed: bool = False,
) -> dict[str, Any]:
    """One model against the one it was made from, on the same sentences.

    Args:
        before: the metric of the model it was made from.
        after: its own.
        logits_before: ``[N, C]``.
        logits_after: ``[N, C]``, in the same order.
        max_drop: how much of the metric may be lost; a loss of just that passes, and so does one that fewer than
            :data:`MIN_CHANGED` answers make.
        collapsed: whether it gives one answer to every sentence; that never passes.

    Returns:
        ``parent_value``, ``value``, ``drop`` (before less after), ``max_drop``, ``passed``, ``collapsed``;
        ``agreement`` (share of the sentences with the same answer) and ``flips`` (number of the others), both ``None``
        for a regression; ``examples``.
    """
    lost = not before - after <= max_drop + _ROUNDING  # what is not a number is lost
    found: dict[str, Any] = {
        "parent_value": before,
        "value": after,
        "drop": before - after,
        "max_drop": max_drop,
        "passed": not (lost or collapsed),
        "collapsed": collapsed,
        "agreement": None,
        "flips": None,
        "examples": len(logits_after),
    }
    if logits_after.shape[1] > 1:
        same = logits_before.argmax(1) == logits_after.argmax(1)
        flips = int((~same).sum())
        found |= {"agreement": float(same.mean()), "flips": flips}
        found["passed"] = not collapsed and (not lost or flips < MIN_CHANGED)
    return found


@torch.no_grad()
def blame(
    parent: PreTrainedModel, changed: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]
) -> list[dict[str, Any]]:
    """How much each quantised layer does to the answers when it alone takes its place in the model before.

    Damage as :func:`edgemin.quantization.sensitivity.damage` has it.

    Args:
        parent: the model before, in full precision or not; left as it was.
        changed: the quantised one.
        batches: sentences.

    Returns:
        ``layer`` and ``damage``, the worst first; without the layers that have no place of their shape in the parent.
    """
    parent.eval()
    changed.eval()
    mine = dict(parent.named_modules())
    layers = {
        path: module
        for path, module in changed.named_modules()
        if (isinstance(module, Quantised) or dynamic.is_quantised(module))
        and path in mine
        and _shape(module) == _shape(mine[path])
    }
    device = parent.device
    nn.Module.to(parent, "cpu")
    nn.Module.to(changed, "cpu")
    reference = [encoder.logits(parent, batch) for batch in batches]
    found = []
    for path, layer in layers.items():
        parent.set_submodule(path, layer)
        answers = [encoder.logits(parent, batch) for batch in batches]
        parent.set_submodule(path, mine[path])
        found.append({"layer": path, "damage": damage(torch.cat(reference), torch.cat(answers))})
    nn.Module.to(parent, device)
    return sorted(found, key=lambda entry: -entry["damage"])


def _shape(module: Any) -> tuple[Any, ...]:
    """Inputs and outputs of a Linear, torch's dynamic one included, or rows and columns of an Embedding."""
    names = ("in_features", "out_features", "num_embeddings", "embedding_dim")
    return tuple(getattr(module, name, None) for name in names)
