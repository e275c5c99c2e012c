"""The scales of weights: which weights share one, and how large it is.

A matrix `[R, C]` is seen as `[R, G, S]`: G groups of S columns in each row, the last filled up with zeros where a
slice has left it shorter. Scales are `[R, G]`; one per row (`channel`) is G = 1, one for all (`tensor`) is [1,
1].
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from edgemin.quantization.affine import SMALLEST, integers, weight_grid

Granularity = Literal["tensor", "channel", "group"]
Activations = Literal["static", "dynamic", "none"]
WeightRange = Literal["minmax", "mse"]

WeightBits = Literal[2, 3, 4, 8]
BITS = get_args(WeightBits)  # of a quantized weight
FLOAT = 32  # bits of a weight that stays as it is
_SHARES = torch.linspace(1.0, 0.2, 41)  # of the largest weight, that the error is tried at
_CHUNK = 2**24


@dataclass(frozen=True)
class Spec:
    """How one layer is quantized.

    Attributes:
        bits: of its weights, one of [`BITS`][edgemin.quantization.weights.BITS].
        granularity: what shares a scale: the whole `tensor`, a row (`channel`: an output of a Linear, an entry of
            an embedding), or a `group` of neighbouring columns in a row.
        group_size: columns of a group; `None` for the other two.
        activations: what a Linear reads: `static` (uint8, one range for all, calibrated), `dynamic` (uint8, each
            token's own range) or `none` (float).
    """

    bits: int
    granularity: Granularity
    group_size: int | None = None
    activations: Activations = "none"

    def describe(self) -> dict[str, Any]:
        """The specification as JSON-able values, for structure.json."""
        return asdict(self)

    @property
    def grid(self) -> tuple[int, int]:
        """The smallest and the largest integer of the grid."""
        return weight_grid(self.bits)

    @property
    def scale_dtype(self) -> torch.dtype:
        """How scales are stored: those of groups are many, and take half precision."""
        return torch.float16 if self.granularity == "group" else torch.float32

    def groups(self, columns: int) -> int:
        """Scales of a row of so many columns."""
        return -(-columns // self.group_size) if self.group_size is not None else 1


def grouped(weight: Tensor, spec: Spec) -> Tensor:
    """`[R, C]` as `[R, G, S]`, or `[1, 1, R * C]` for one scale."""
    if spec.granularity == "tensor":
        return weight.reshape(1, 1, -1)
    if spec.group_size is None:
        return weight[:, None]
    columns = weight.shape[1]
    missing = spec.groups(columns) * spec.group_size - columns
    if missing:
        weight = functional.pad(weight, (0, missing))
    found: Tensor = weight.unflatten(1, (-1, spec.group_size))
    return found


def ungrouped(values: Tensor, shape: torch.Size) -> Tensor:
    """Undo `grouped`: from groups back to a matrix `[R, C]`."""
    return values.reshape(shape) if values.numel() == shape.numel() else values.flatten(1)[:, : shape[1]]


def largest_scale(groups: Tensor, spec: Spec) -> Tensor:
    """`minmax`: s = max|w| / Q_hi over each group; `[..., S]` to `[...]`."""
    return stored(groups.detach().abs().amax(-1).float() / spec.grid[1], spec)


def weight_scale(weight: Tensor, spec: Spec, how: WeightRange) -> Tensor:
    """Scales of a matrix.

    Args:
        weight: `[R, C]`.
        spec: what shares a scale, and the bits.
        how: `minmax`: the largest weight is the end of the grid. `mse`: of 41 shares of that, from 1 down to 0.2,
            the one with the least squared error; the largest weights are cut where that serves the others.

    Returns:
        `[R, G]`, float32, of a precision that [`Spec.scale_dtype`][edgemin.quantization.weights.Spec.scale_dtype] holds
        exactly.
    """
    groups = grouped(weight.detach().float(), spec)
    widest = largest_scale(groups, spec)
    if how == "minmax":
        return widest
    rows = max(1, _CHUNK // groups[0].numel())
    parts = zip(groups.split(rows), widest.split(rows), strict=True)
    return torch.cat([_least_error(part, scale, spec) for part, scale in parts])


def _least_error(groups: Tensor, widest: Tensor, spec: Spec) -> Tensor:
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in _SHARES.tolist():
        scale = stored(widest * share, spec)
        error = (integers(groups, scale[..., None], *spec.grid) * scale[..., None] - groups).square().sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def stored(scale: Tensor, spec: Spec) -> Tensor:
    """A scale as the file will hold it, float32; never below [`SMALLEST`][edgemin.quantization.affine.SMALLEST]."""
    return scale.clamp(min=SMALLEST).to(spec.scale_dtype).float()
