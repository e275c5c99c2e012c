"""Mixed precision: what each matrix does to the answers at each bit-width, and the bits that do least within a size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from edgemin import encoder
from edgemin.encoder import Matrix
from edgemin.errors import UserError
from edgemin.quantization.model import quantised_layer
from edgemin.quantization.packing import packed_width
from edgemin.quantization.weights import Spec, WeightRange

_MIB = 2**20
#: The damage of answers that are no numbers any more: above all others, and still a number for files and solvers.
NOT_FINITE = 1e6


def damage(before: Tensor, after: Tensor) -> float:
    """How far answers have moved, ``[N, C]`` each.

    The mean Kullback-Leibler divergence, in nats, of the distributions before from those after; for one output (C = 1)
    the mean squared difference.
    """
    before, after = before.double(), after.double()
    if not bool(after.isfinite().all()):
        return NOT_FINITE
    if before.shape[1] == 1:
        return float(functional.mse_loss(after, before))
    target, answer = before.log_softmax(1), after.log_softmax(1)
    return max(0.0, float(functional.kl_div(answer, target, reduction="batchmean", log_target=True)))


@torch.no_grad()
def sensitivity(
    model: PreTrainedModel,
    specs: Mapping[str, Sequence[Spec]],
    weight_range: WeightRange,
    batches: Sequence[Mapping[str, Tensor]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[int, float]]:
    """The damage of each matrix alone, at each of its bit-widths.

    Args:
        model: in full precision; left as it was, in eval mode.
        specs: by path, the ways to quantise a matrix; activations stay in float.
        weight_range: how scales are chosen.
        batches: sentences.
        progress: told how many of how many passes are done.

    Returns:
        By path and bits, :func:`damage`.
    """
    model.eval()
    batches = [{name: tensor.to(model.device) for name, tensor in batch.items()} for batch in batches]

    def answers() -> Tensor:
        return torch.cat([encoder.logits(model, batch).float() for batch in batches])

    reference = answers()
    total, done = sum(map(len, specs.values())), 0
    found: dict[str, dict[int, float]] = {}
    for path, ways in specs.items():
        own = model.get_submodule(path)
        found[path] = {}
        for spec in ways:
            model.set_submodule(path, quantised_layer(own, spec, weight_range).eval())
            found[path][spec.bits] = damage(reference, answers())
            done += 1
            progress(done, total)
        model.set_submodule(path, own)
    return found


def matrix_bytes(matrix: Matrix, spec: Spec) -> int:
    """What a file holds of a quantised matrix: packed integers and scales."""
    scales = 1 if spec.granularity == "tensor" else matrix.rows * spec.groups(matrix.columns)
    return matrix.rows * packed_width(matrix.columns, spec.bits) + scales * spec.scale_dtype.itemsize


def assign(
    damages: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, int]], budget: int
) -> dict[str, int]:
    r"""The bits of each matrix that do the least damage in all within a budget of bytes: an integer programme, exact.

    With d and s the damage and the bytes of matrix m at b bits and x one where it has them:

    .. math:: min \sum d_{mb} x_{mb}, \quad \sum s_{mb} x_{mb} \le S, \quad \sum_b x_{mb} = 1

    Damages of single matrices do not add up exactly; that they nearly do is what every method of this kind supposes.

    Args:
        damages: by path and bits.
        sizes: bytes, likewise.
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
    weights = np.array([sizes[path][bits] for path, bits in choices], dtype=float)
    solved = milp(
        np.array([damages[path][bits] for path, bits in choices]),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        # in units of the budget: the solver's tolerances are absolute
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weights[None] / max(budget, 1), ub=1.0)],
        options={"mip_rel_gap": 0.0},
    )
    assert solved.success, solved.message
    return {path: bits for (path, bits), taken in zip(choices, solved.x, strict=True) if taken > 0.5}
