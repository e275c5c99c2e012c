"""The quality gate: a model against the one it was made from, and which layers are to blame."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.encoder import quantized, taps
from edgemin.progress import counted
from edgemin.quantization.sensitivity import damage
from edgemin.tasks.base import Kind

Answers = NDArray[np.float32]  # logits


class Metric(Protocol):
    """The metric of some answers."""

    def __call__(self, answers: Answers, chosen: Any = ...) -> float:
        """The metric of answers `[N, C]` to the sentences that were chosen, by their places; of all by default."""


Draws = Callable[[Metric, Answers, Answers], Any]

SENTENCES = 16  # of the scored split, that layers are blamed on: enough to name the worst, and a minute for BERT-base
NAMED = 5  # layers that are named
CHANCE = 0.05  # a loss that comes about by chance more often is none
FLIPS = 5  # so many answers must have changed: fewer, even if all are worse, come about in one exchange of 16
_DRAWS = 999
_ROUNDING = 1e-6  # metrics are computed in single precision: 0.90 less 0.89 may come out above 0.01


def chance(scored: Metric, before: Answers, after: Answers) -> float:
    """How often a loss as large comes about where it does not matter which of two models gave an answer.

    A paired randomization test (Noreen 1989): sentence by sentence the two answers are exchanged or not, at random. It
    takes any metric.

    Args:
        scored: the metric of some answers.
        before: `[N, C]`.
        after: `[N, C]`.

    Returns:
        The share of exchanges that lose as much as `after` does, in (0, 1].
    """
    drawn = np.random.default_rng(0)
    drop = scored(before) - scored(after) - _ROUNDING
    as_large = 0
    for _ in range(_DRAWS):
        exchanged = drawn.random((len(after), 1)) < 0.5
        loss = scored(np.where(exchanged, after, before)) - scored(np.where(exchanged, before, after))
        as_large += loss >= drop
    return (as_large + 1) / (_DRAWS + 1)


def interval(scored: Metric, before: Answers, after: Answers) -> list[float] | None:
    """From where to where the loss lies, as far as these sentences tell.

    A paired percentile bootstrap (Efron 1979) over sentences: they are drawn again with replacement, both models'
    answers to the same ones. It takes any metric.

    Args:
        scored: the metric of some answers.
        before: `[N, C]`.
        after: `[N, C]`.

    Returns:
        The 2.5th and the 97.5th percentile of the first's metric less the second's; `None` where it is no number.
    """
    drawn = np.random.default_rng(0)
    drops = []
    for _ in range(_DRAWS):
        chosen = drawn.integers(len(after), size=len(after))
        drops.append(scored(before[chosen], chosen) - scored(after[chosen], chosen))
    found = [float(end) for end in np.percentile(drops, [2.5, 97.5])]
    return found if all(map(math.isfinite, found)) else None


def _draw(draws: Draws, *compared: Any) -> Any:
    return draws(*compared)


def compare(
    kind: Kind,
    scored: Metric,
    before: Answers,
    after: Answers,
    max_drop: float,
    *,
    collapsed: bool = False,
    drawn: Callable[..., Any] = _draw,
) -> dict[str, Any]:
    """One model against the one it was made from, on the same sentences.

    Args:
        kind: of the task that was answered.
        scored: the metric of some answers.
        before: `[N, C]`, the answers of the model it was made from.
        after: `[N, C]`, its own, in the same order.
        max_drop: how much of the metric may be lost. A loss of just that passes, and so does one by `chance` or of
            fewer than `FLIPS` changed answers.
        collapsed: whether it gives one answer to every sentence; that never passes.
        drawn: called as `drawn(chance, ...)` or `drawn(interval, ...)` instead of these, so that it can keep results.

    Returns:
        `parent_value`, `value`, `drop` (the first less the second) and its `interval`; `max_drop`, `chance` (`None`
        where it decides nothing), `passed`, `collapsed`; `agreement` (share of the sentences with the same answer) and
        `flips` (number of the others), both `None` where answers are numbers; `examples`.
    """
    theirs, own = scored(before), scored(after)
    flips = kind.flips(torch.from_numpy(before), torch.from_numpy(after))
    lost = not theirs - own <= max_drop + _ROUNDING  # so that nan counts as lost
    by_chance = drawn(chance, scored, before, after) if lost and (flips is None or flips >= FLIPS) else None
    return {
        "parent_value": theirs,
        "value": own,
        "drop": theirs - own,
        "interval": drawn(interval, scored, before, after) if flips != 0 else [0.0, 0.0],
        "max_drop": max_drop,
        "chance": by_chance,
        "passed": not collapsed and (by_chance is None or by_chance > CHANCE),
        "collapsed": collapsed,
        "agreement": None if flips is None else 1 - flips / len(after),
        "flips": flips,
        "examples": len(after),
    }


@torch.no_grad()
def blame(
    parent: PreTrainedModel, changed: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], kind: Kind
) -> list[dict[str, Any]]:
    """How much each quantized layer changes the answers if it alone is put into the model before.

    Damage as [`damage`][edgemin.quantization.sensitivity.damage] has it.

    Args:
        parent: the model before, in full precision or not; left as it was.
        changed: the quantized one.
        batches: sentences.
        kind: of the task that they belong to.

    Returns:
        `layer` and `damage`, the worst first; without the layers that have no place of their shape in the parent.
    """
    parent.eval()
    changed.eval()
    mine = dict(parent.named_modules())
    layers = {
        path: module
        for path, module in quantized.layers(changed).items()
        if path in mine and _shape(module) == _shape(mine[path])
    }
    device = parent.device
    nn.Module.to(parent, "cpu")
    nn.Module.to(changed, "cpu")
    reference = [taps.logits(parent, batch) for batch in batches]
    found = []
    for path, layer in counted(layers.items(), "trying layers"):
        parent.set_submodule(path, layer)
        answers = [taps.logits(parent, batch) for batch in batches]
        parent.set_submodule(path, mine[path])
        found.append({"layer": path, "damage": damage(torch.cat(reference), torch.cat(answers), kind)})
    nn.Module.to(parent, device)
    return sorted(found, key=lambda entry: -entry["damage"])


def _shape(module: Any) -> tuple[Any, ...]:
    """Inputs and outputs of a Linear, torch's dynamic one included, or rows and columns of an Embedding."""
    names = ("in_features", "out_features", "num_embeddings", "embedding_dim")
    return tuple(getattr(module, name, None) for name in names)
