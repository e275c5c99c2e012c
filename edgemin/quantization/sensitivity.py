"""Mixed precision: the damage that each matrix does at each bit-width, and the bits with least damage within a size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor
from transformers import PreTrainedModel

from edgemin.encoder import taps
from edgemin.encoder.outline import Matrix
from edgemin.errors import UserError
from edgemin.progress import live_line
from edgemin.quantization.model import quantized_layer
from edgemin.quantization.packing import packed_width
from edgemin.quantization.weights import Spec, WeightRange
from edgemin.tasks.base import Kind

_MIB = 2**20
# The damage of answers that are not finite: above all others, and still a number for files and solvers.
NOT_FINITE = 1e6
# Of the solver's objective; it stops within 1e-6 of the least.
_SCALE = 1e6


def damage(before: Tensor, after: Tensor, kind: Kind) -> float:
    """How far logits `[N, C]` have moved, as the kind of task has it, computed in float64.

    [`NOT_FINITE`][edgemin.quantization.sensitivity.NOT_FINITE] where either is not all
    numbers.
    """
    before, after = before.double(), after.double()
    if not bool(before.isfinite().all() and after.isfinite().all()):
        return NOT_FINITE
    return kind.distance(before, after)


@torch.no_grad()
def sensitivity(
    model: PreTrainedModel,
    specs: Mapping[str, Sequence[Spec]],
    weight_range: WeightRange,
    batches: Sequence[Mapping[str, Tensor]],
    kind: Kind,
) -> dict[str, dict[int, float]]:
    """The damage of each matrix alone, at each of its bit-widths.

    Args:
        model: in full precision; left as it was, in eval mode.
        specs: by path, the ways to quantize a matrix. Only its weights are: activations stay as they are in the model.
        weight_range: how scales are chosen.
        batches: sentences.
        kind: of the task that they belong to.

    Returns:
        By path and bits, [`damage`][edgemin.quantization.sensitivity.damage].
    """
    model.eval()
    batches = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]

    def answers() -> Tensor:
        return torch.cat([taps.logits(model, batch).float() for batch in batches])

    found: dict[str, dict[int, float]] = {}
    with live_line("measuring the sensitivity of matrices", sum(map(len, specs.values()))) as line:
        reference = answers()
        for path, ways in specs.items():
            own = model.get_submodule(path)
            found[path] = {}
            try:
                for spec in ways:
                    # static activations are not calibrated yet, and their rounding is not what bits are chosen for
                    weights = replace(spec, activations="none")
                    model.set_submodule(path, quantized_layer(own, weights, weight_range).eval())
                    found[path][spec.bits] = damage(reference, answers(), kind)
                    line.done += 1
            finally:
                model.set_submodule(path, own)
    return found


def matrix_bytes(matrix: Matrix, spec: Spec) -> int:
    """The bytes of a quantized matrix in a file: packed integers and scales."""
    rows, columns = matrix.size
    scales = 1 if spec.granularity == "tensor" else rows * spec.groups(columns)
    return rows * packed_width(columns, spec.bits) + scales * spec.scale_dtype.itemsize


def assign(
    damages: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, int]], budget: int
) -> dict[str, int]:
    r"""The bits of each matrix that do the least damage in all within a budget of bytes: an integer programme, exact.

    With d and s the damage and the bytes of matrix m at b bits and x one where it has them:

    $$ min \sum d_{mb} x_{mb}, \quad \sum s_{mb} x_{mb} \le S, \quad \sum_b x_{mb} = 1 $$

    The damages of single matrices do not add up exactly; every method of this kind assumes that they nearly do.

    Args:
        damages: by path and bits; at least one path.
        sizes: bytes by path and bits.
        budget: S.

    Raises:
        UserError: even the fewest bits are more than the budget.
    """
    least = sum(min(of.values()) for of in sizes.values())
    if least > budget:
        raise UserError(
            f"size_mib: expected room for {least / _MIB:.2f} MiB, what the matrices take at the fewest bits of "
            f"candidates, given {max(budget, 0) / _MIB:.2f} MiB beside all that stays in float"
        )
    choices = [(path, bits) for path, of in damages.items() for bits in of]
    one_each = np.array([[path == wanted for path, _ in choices] for wanted in damages], dtype=float)
    # The solver's tolerances are absolute. Of sizes: whole units and a bound half a unit above leave no doubt.
    unit = math.gcd(*(sizes[path][bits] for path, bits in choices))
    units = np.array([[sizes[path][bits] // unit for path, bits in choices]], dtype=float)
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(units, ub=budget // unit + 0.5)]
    # Of damages, which span many powers of ten: scaled by the best sum so far, until that is no longer much smaller.
    # What alone does more damage than that sum is in no better one.
    excess = np.array([damages[path][bits] - min(damages[path].values()) for path, bits in choices])
    most = float(excess.max())
    while True:
        solved = milp(
            np.minimum(excess / most, 1.0) * _SCALE if most > 0 else excess,
            integrality=np.ones(len(choices)),
            bounds=Bounds(0, (excess <= most).astype(float)),
            constraints=limits,
            options={"mip_rel_gap": 0.0},
        )
        assert solved.success, solved.message
        taken = solved.x > 0.5
        found = float(excess[taken].sum())
        if found == 0.0 or found >= most / 2:
            return {path: bits for (path, bits), one in zip(choices, taken, strict=True) if one}
        most = found
