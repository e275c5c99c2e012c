"""Rounding to a grid: against float64 loops of the equations, and the gradients of the LSQ paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from edgemin.quantization.affine import SMALLEST, fake_quantize, input_scale, quantize_tokens, weight_grid
from edgemin.quantization.packing import pack, packed_width, unpack
from edgemin.quantization.weights import Spec, WeightRange, grouped, ungrouped, weight_scale


def rounded(value: float, scale: float, low: int, high: int) -> float:
    """The equation, in float64; Python rounds halves to even too."""
    return scale * min(max(round(value / scale), low), high)


@pytest.mark.parametrize(
    "spec",
    [Spec(8, "tensor"), Spec(8, "channel"), Spec(8, "group", 4), Spec(4, "group", 3), Spec(2, "channel")],
    ids=str,
)
def test_fake_quantized_weights_are_those_of_a_float64_loop(spec: Spec) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    scale = weight_scale(weight, spec, "minmax")
    found = ungrouped(fake_quantize(grouped(weight, spec), scale[..., None], *spec.grid), weight.shape)
    high = 2 ** (spec.bits - 1) - 1
    for row in range(6):
        for column in range(8):
            if spec.granularity == "tensor":
                peers = weight.flatten()
            elif spec.granularity == "channel":
                peers = weight[row]
            else:
                begin = column // (spec.group_size or 1) * (spec.group_size or 1)
                peers = weight[row, begin : begin + (spec.group_size or 1)]
            step = max(abs(float(value)) for value in peers) / high
            if spec.granularity == "group":
                step = float(torch.tensor(step).half())
            assert float(found[row, column]) == pytest.approx(
                rounded(float(weight[row, column]), step, -high - 1, high), abs=1e-6
            )


def test_halves_are_rounded_to_even_and_zero_stays_zero() -> None:
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.0, 9.0, -9.0])
    found = fake_quantize(values, torch.tensor(1.0), -4, 3)
    assert found.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0, 0.0, 3.0, -4.0]


@pytest.mark.parametrize(("low", "high"), [(-1.5, 3.0), (0.2, 2.0), (-3.0, -1.0), (0.0, 0.0)])
def test_activations_take_256_levels_that_hold_zero(low: float, high: float) -> None:
    scale, zero = (float(found) for found in input_scale(torch.tensor(low), torch.tensor(high)))
    least, most = min(low, 0.0), max(high, 0.0)
    step = max((most - least) / 255, SMALLEST)
    assert (scale, zero) == (pytest.approx(step), min(max(round(-least / step), 0), 255))
    for value in (low, high, 0.0, 0.37 * low + 0.63 * high):
        found = float(fake_quantize(torch.tensor([value]), torch.tensor(scale), -zero, 255 - zero))
        assert found == pytest.approx(rounded(value, scale, int(-zero), int(255 - zero)), abs=1e-6)
        assert abs(found - value) <= step + 1e-6


def test_the_scales_gradient_is_lsqs_inside_below_and_above() -> None:
    values = torch.tensor([0.3, -0.6, 5.0, -7.0, 1.2], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    low, high = weight_grid(3)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    shrink = 1 / math.sqrt(len(values) * high)
    fake_quantize(values, scale, low, high, shrink).backward(upstream)
    expected = 0.0
    for value, weight in zip(values.tolist(), upstream.tolist(), strict=True):
        ratio = value / 0.5
        term = low if ratio <= low else high if ratio >= high else round(ratio) - ratio
        expected += weight * term
    assert scale.grad is not None and values.grad is not None
    assert float(scale.grad) == pytest.approx(shrink * expected, abs=1e-6)
    assert values.grad.tolist() == [1.0, 2.0, 0.0, 0.0, 5.0]  # straight through inside, nothing outside


def test_each_group_has_the_gradient_of_its_own_scale() -> None:
    values = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(2))
    scale = torch.rand(3, 2, 1, generator=torch.Generator().manual_seed(3)).add(0.1).requires_grad_()
    fake_quantize(values, scale, -8, 7).square().sum().backward()
    for row in range(3):
        for group in range(2):
            alone = scale.detach()[row, group].clone().requires_grad_()
            fake_quantize(values[row, group], alone, -8, 7).square().sum().backward()
            assert scale.grad is not None and alone.grad is not None
            assert torch.allclose(scale.grad[row, group], alone.grad, rtol=1e-5)


def test_outside_the_grid_the_gradient_is_that_of_finite_differences() -> None:
    values, scale = torch.tensor([9.0, -9.0], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    learned = scale.clone().requires_grad_()
    fake_quantize(values, learned, -4, 3).sum().backward()
    step = 1e-5
    after, before = (fake_quantize(values, scale + delta, -4, 3).sum() for delta in (step, -step))
    assert learned.grad is not None and float(learned.grad) == pytest.approx(float((after - before) / (2 * step)))


def test_dynamic_activations_look_at_each_token_alone() -> None:
    tokens = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(4), requires_grad=True)
    found = quantize_tokens(tokens)
    with torch.no_grad():
        assert torch.equal(found[1, 2], quantize_tokens(tokens[1, 2]))
        step = (tokens.amax(-1).clamp(min=0) - tokens.amin(-1).clamp(max=0)) / 255
        assert bool(((found - tokens).abs() <= step[..., None] / 2 + 1e-6).all())
    found.sum().backward()
    assert tokens.grad is not None and bool((tokens.grad == 1).all())


@pytest.mark.parametrize("how", ["minmax", "mse"])
def test_no_other_share_of_the_range_has_less_error_than_mse(how: WeightRange) -> None:
    spec = Spec(3, "channel")
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(5)) ** 3

    def errors(scale: Tensor) -> Tensor:
        return (fake_quantize(weight[:, None], scale[..., None], *spec.grid)[:, 0] - weight).square().sum(1)

    least = errors(weight_scale(weight, spec, "mse"))
    widest = weight_scale(weight, spec, "minmax")
    for share in (1.0, 0.9, 0.7, 0.5, 0.3, 0.2):
        assert bool((least <= errors(widest * share) + 1e-5).all())
    assert bool((errors(weight_scale(weight, spec, how)) >= least - 1e-6).all())


def test_scales_are_of_the_precision_that_a_file_holds() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(6))
    grouped_scale = weight_scale(weight, Spec(4, "group", 8), "mse")
    assert torch.equal(grouped_scale, grouped_scale.half().float()) and grouped_scale.shape == (4, 4)
    assert bool((weight_scale(torch.zeros(2, 8), Spec(4, "channel"), "minmax") == SMALLEST).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 3, 5, 7, 8, 383])
def test_unpacking_what_was_packed_gives_it_back(bits: int, columns: int) -> None:
    low, high = weight_grid(bits)
    whole = torch.randint(low, high + 1, (3, columns), generator=torch.Generator().manual_seed(columns)).float()
    whole[0, 0], whole[-1, -1] = low, high
    packed = pack(whole, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, math.ceil(columns * bits / 8))
    assert packed.shape[1] == packed_width(columns, bits)
    assert torch.equal(unpack(packed, bits, columns), whole)


def test_two_weights_share_a_byte_the_first_in_the_lower_half() -> None:
    assert pack(torch.tensor([[-8.0, 7.0, 0.0]]), 4).tolist() == [[0 + 16 * 15, 8]]
    assert pack(torch.tensor([[-2.0, -1.0, 0.0, 1.0]]), 2).tolist() == [[0 + 4 * 1 + 16 * 2 + 64 * 3]]
