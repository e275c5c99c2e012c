"""The ranges of activations, found on sentences without their padding.

`minmax` takes the least and the largest value, `moving_average` their moving average over batches. The other two look
at a histogram of all values between those two: `percentile` p leaves the same share (100 - p) / 2 % out at either end;
`mse` takes, of ranges that shrink towards 0 from either end, the one whose 256 levels have the least squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from edgemin.config import Checked, Count
from edgemin.errors import UserError
from edgemin.progress import counted
from edgemin.quantization.affine import LEVELS, input_scale
from edgemin.quantization.layers import QuantizedLinear

ActivationRange = Literal["minmax", "moving_average", "percentile", "mse"]
Percentile = Annotated[float, Gt(50), Le(100)]

_BINS = 2048
_MOMENTUM = 0.9
_SHARES = torch.linspace(1.0, 0.1, 46)  # of either end, that the error is tried at


@dataclass(frozen=True)
class Calibration(Checked):
    """How the ranges of static activations are chosen; a quantized model keeps it, to be calibrated again.

    Attributes:
        activation_range: see above.
        percentile: share of the values inside the range, in percent.
        examples: training sentences that are looked at.
    """

    activation_range: ActivationRange = "percentile"
    percentile: Percentile = 99.99
    examples: Count = 256

    def describe(self) -> dict[str, Any]:
        """The settings as JSON-able values, for structure.json."""
        return asdict(self)


class _Watch:
    """Collects the range and the histogram of one layer's inputs over all batches."""

    def __init__(self) -> None:
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        self.average: Tensor | None = None  # [2]
        self.counts: Tensor | None = None

    def extend(self, values: Tensor, name: str) -> None:
        low, high = values.aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            kind = "not-a-number" if bool(values.isnan().any()) else "infinite values"
            raise UserError(f"calibration: expected finite activations, given {kind} in what {name} reads")
        self.low, self.high = torch.minimum(self.low, low.cpu()), torch.maximum(self.high, high.cpu())
        now = torch.stack([low, high]).cpu()
        self.average = now if self.average is None else _MOMENTUM * self.average + (1 - _MOMENTUM) * now

    def count(self, values: Tensor, name: str) -> None:
        low, high = float(self.low), float(self.high)
        found = torch.histc(values, _BINS, low, high).cpu().double()
        self.counts = found if self.counts is None else self.counts + found


@torch.no_grad()
def calibrate(
    model: nn.Module,
    layers: Mapping[str, QuantizedLinear],
    run: Callable[[Mapping[str, Tensor]], object],
    batches: Iterable[Mapping[str, Tensor]],
    settings: Calibration,
) -> None:
    """Choose the input range of each layer, in eval mode, with weights rounded and activations not.

    Args:
        model: the whole model; left in the mode it was in.
        layers: those with static activations, by name.
        run: runs the model on a batch.
        batches: with `attention_mask`; padding is left out. Gone through twice for `percentile` and `mse`.
        settings: how ranges are chosen.

    Raises:
        UserError: there is no batch, or a layer reads a value that is not finite.
    """
    batches = list(batches)
    if not batches:
        raise UserError("calibration: expected at least one sentence to calibrate on, given none")
    if not layers:
        return
    watches = {name: _Watch() for name in layers}
    training = model.training
    model.eval()
    try:
        _pass(layers, run, batches, {name: watch.extend for name, watch in watches.items()})
        if settings.activation_range in ("percentile", "mse"):
            _pass(layers, run, batches, {name: watch.count for name, watch in watches.items()})
    finally:
        model.train(training)
    for name, layer in layers.items():
        layer.fit_inputs(*_chosen(watches[name], settings))


def _pass(
    layers: Mapping[str, QuantizedLinear],
    run: Callable[[Mapping[str, Tensor]], object],
    batches: Iterable[Mapping[str, Tensor]],
    see: Mapping[str, Callable[[Tensor, str], None]],
) -> None:
    mask: Tensor | None = None

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def watch(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].float()
            if mask is not None and values.shape[:-1] == mask.shape:  # the head reads one vector of each sentence
                values = values[mask.to(values.device)]
            see[name](values, name)

        return watch

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(hook(name)))
            layer.watching = True
            stack.callback(setattr, layer, "watching", False)
        for batch in counted(batches, "calibrating activations"):
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            run(batch)


def _chosen(watch: _Watch, settings: Calibration) -> tuple[Tensor, Tensor]:
    if settings.activation_range == "minmax":
        return watch.low, watch.high
    if settings.activation_range == "moving_average":
        assert watch.average is not None
        return watch.average[0], watch.average[1]
    if watch.counts is None or watch.low == watch.high:
        return watch.low, watch.high
    if settings.activation_range == "percentile":
        return percentile_range(watch.counts, watch.low, watch.high, settings.percentile)
    return least_error_range(watch.counts, watch.low, watch.high)


def percentile_range(counts: Tensor, low: Tensor, high: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The range that leaves (100 - percentile) / 2 % of the values out at either end, to the width of a bin.

    Args:
        counts: `[bins]`, of values between `low` and `high`.
        low: where the first bin begins.
        high: where the last bin ends.
        percentile: share inside, in percent.
    """
    width = (high - low).double() / len(counts)
    outside = counts.sum() * (100 - percentile) / 200
    below = int((counts.cumsum(0) <= outside).sum())
    above = int((counts.flip(0).cumsum(0) <= outside).sum())
    return (low + width * below).float(), (high - width * above).float()


def least_error_range(counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The range, among those that shrink from either end towards 0, whose 256 levels have the least squared error.

    One end after the other, the upper first: each by 46 shares from 1 down to 0.1, values in the middle of their bins.
    """
    centres = low + (torch.arange(len(counts)) + 0.5) * (high - low) / len(counts)
    for end in (1, 0):
        candidates = [(low, high * share) if end else (low * share, high) for share in _SHARES.tolist()]
        errors = [_error(counts, centres, *candidate) for candidate in candidates]
        low, high = candidates[int(torch.stack(errors).argmin())]
    return low, high


def _error(counts: Tensor, centres: Tensor, low: Tensor, high: Tensor) -> Tensor:
    scale, zero = input_scale(low, high)
    rounded = ((centres / scale + zero).round().clamp(0, LEVELS) - zero) * scale
    return (counts * (rounded - centres).square()).sum()
