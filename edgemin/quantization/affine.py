r"""Rounding to a grid of integers, with the gradients that let a model be trained on it.

With scale s, the smallest and largest integer Q_lo and Q_hi of the grid, and v = x / s:

$$ q = round(clamp(v, Q_{lo}, Q_{hi})), \qquad \hat x = s \, q $$

Halves are rounded to even. Weights are symmetric: Q_lo = -2^(b-1), Q_hi = 2^(b-1) - 1. Activations have a zero point z:
their grid of 0 .. 255 is that of Q_lo = -z, Q_hi = 255 - z, so one function serves both.

Gradients are those of Learned Step Size Quantization (Esser et al. 2020, arXiv 1902.08153, equations 1 to 3): for x
straight through inside the grid and 0 outside; for the scale

$$ \frac{\partial \hat x}{\partial s} = q - v \text{ inside}, \; Q_{lo} \text{ below}, \; Q_{hi} \text{ above}, $$

summed over all that share it and multiplied by 1 / sqrt(N Q_hi), N their number.

That is all of LSQ that is here. LSQ trains by SGD, where this factor makes a scale's step as large for its size as the
weights' are for theirs. AdamW divides every gradient by its own size, so that a factor does next to nothing (it still
counts in the norm that is clipped, and beside Adam's eps); nor would training a logarithm of the scale bring it back.
What a step is to the scale is then for a learning rate of its own to say (`scale_learning_rate`). LSQ also starts
scales at 2 mean|x| / sqrt(Q_hi); here they start where they were calibrated. With fixed integers
([`Quantized.fix_integers`][edgemin.quantization.base.Quantized.fix_integers]) the gradient of a scale is the sum of
its integers times that of their weights, without that factor.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

# Activations are unsigned integers of 8 bits.
LEVELS = 255
# No scale is smaller (a row of zeros has this one); 2 ** -20 is exact in half precision.
SMALLEST = 2.0**-20


def weight_grid(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a weight: -2^(b-1) and 2^(b-1) - 1."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def fake_quantize(values: Tensor, scale: Tensor, low: float, high: float, gradient_scale: float = 1.0) -> Tensor:
    """Round to the grid and back, with the gradients above.

    Args:
        values: any shape.
        scale: positive; its shape broadcasts to that of `values`.
        low: Q_lo.
        high: Q_hi.
        gradient_scale: what the gradient of the scale is multiplied by.

    Returns:
        Of the shape and dtype of `values`; computed in at least float32.
    """
    return cast(Tensor, _FakeQuantize.apply(values, scale, low, high, gradient_scale))  # type: ignore[no-untyped-call]


def integers(values: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
    """The integers themselves, as floats: round(clamp(values / scale, low, high))."""
    return (values / scale).clamp(low, high).round()


def input_scale(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    r"""Scale and zero point of the 256 levels that cover [low, high] and 0, so that 0 is exact.

    $$ s = (max(high, 0) - min(low, 0)) / 255, \qquad z = round(-min(low, 0) / s) $$
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / LEVELS).clamp(min=SMALLEST)
    return scale, (-low / scale).round().clamp(0, LEVELS)


def quantize_tokens(values: Tensor) -> Tensor:
    """Dynamic activations: each token's own range, over its features, `[..., H]`; straight-through gradients.

    What is read of a token therefore does not depend on its neighbours in the batch.
    """
    wide = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    scale, zero = input_scale(*wide.aminmax(dim=-1, keepdim=True))
    rounded = ((wide / scale + zero).round().clamp(0, LEVELS) - zero) * scale
    return values + (rounded.to(values.dtype) - values.detach())


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, low: Any, high: Any, gradient_scale: float) -> Tensor:
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        ratio = wide / scale
        rounded = ratio.clamp(low, high).round_()
        if any(ctx.needs_input_grad):
            inside = (ratio >= low) & (ratio <= high)
            of_scale = rounded - ratio.mul_(inside) if ctx.needs_input_grad[1] else None
            ctx.save_for_backward(inside, of_scale)
            ctx.scale_shape, ctx.gradient_scale = scale.shape, gradient_scale
        return rounded.mul_(scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inside, of_scale = ctx.saved_tensors
        gradient = gradients[0]
        of_values = gradient * inside if ctx.needs_input_grad[0] else None
        if of_scale is None:
            return of_values, None, None, None, None
        total = (gradient.to(of_scale.dtype) * of_scale).sum_to_size(ctx.scale_shape)
        return of_values, total * ctx.gradient_scale, None, None, None
