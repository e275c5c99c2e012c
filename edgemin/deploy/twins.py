"""Quantized layers as an exporter can write them: integers in the file, and the operators that runtimes fuse.

While it trains, a quantized layer computes with rounded floats. Here each gets a twin that holds its integers and
computes the same by ONNX's `QuantizeLinear` (Q) and `DequantizeLinear` (DQ). Where they stand decides whether a runtime
computes with integers: Q and DQ on what a MatMul reads, DQ on its weights, nothing on what it gives. (With Q on outputs
too, ONNX Runtime no longer fuses GELU and LayerNorm.) Activations are uint8: with int8, ONNX Runtime leaves half the
products in float on x86.

Twins do not compute in torch, their operators are symbols: they are for the exporter alone.

Shapes: R rows (outputs, or entries of a table), C columns, G groups of S columns in a row, T tokens.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgemin.errors import UserError
from edgemin.quantization.affine import LEVELS, input_scale
from edgemin.quantization.base import Quantized
from edgemin.quantization.layers import QuantizedEmbedding, QuantizedLinear

Model = TypeVar("Model", bound=nn.Module)
OPSET = 21  # the first with 4-bit integers, and with groups in DequantizeLinear


def with_twins(model: Model) -> Model:
    """A copy of a model in eval mode, each of its quantized layers replaced by its twin.

    Raises:
        UserError: layers of torch's dynamic INT8, whose kernels are torch's own.
    """
    check(model)
    twin = copy.deepcopy(model).eval()
    for path, layer in list(twin.named_modules()):
        if isinstance(layer, QuantizedLinear):
            twin.set_submodule(path, LinearTwin(layer))
        elif isinstance(layer, QuantizedEmbedding):
            twin.set_submodule(path, EmbeddingTwin(layer))
    return twin


def check(model: nn.Module) -> None:
    """Refuse what no other format can hold.

    Raises:
        UserError: layers of torch's dynamic INT8, whose kernels are torch's own.
    """
    for path, layer in model.named_modules():
        if type(layer).__module__.startswith("torch.ao.nn.quantized"):
            raise UserError(
                "artifact: expected weights in float or quantized by quantize=static, weight_only, reconstruct or qat, "
                f"given torch's dynamic INT8 ({path}), which runs in torch alone"
            )


def stored_bits(bits: int) -> int:
    """Bits of one weight of a Linear in the exported file: ONNX has integers of 8 and of 4, the fewer lie in 4."""
    return 8 if bits == 8 else 4


class LinearTwin(nn.Module):
    """`y = DQ(Q(x)) DQ(W)ᵀ + b`, the weights as `[C, R]`, as MatMul takes them.

    Args:
        layer: calibrated, where its activations are static.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.activations = layer.spec.activations
        self.bits, columns = stored_bits(layer.spec.bits), layer.weight.shape[1]
        self.group = layer.spec.group_size if layer.spec.granularity == "group" else None
        integers, scale = _integers(layer), _scale(layer)
        if self.group is not None and columns % self.group:
            # a slice has left a shorter last group: one scale for each column says the same
            scale = scale.repeat_interleave(self.group, dim=1)[:, :columns]
            self.group = 1
        # [R], or [C / S, R] as DequantizeLinear has its groups
        scale = scale.flatten().expand(len(integers)) if self.group is None else scale.T
        self.register_buffer("weight", integers.T.contiguous())
        self.register_buffer("weight_scale", scale.contiguous())
        if layer.spec.activations == "static":
            self.register_buffer("input_scale", layer.input_scale.detach().abs().float().reshape(()))
            self.register_buffer("input_zero_point", layer.input_zero_point.detach().to(torch.uint8).reshape(()))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., C]` to `[..., R]`."""
        weight = _dequantized(self.weight, self.weight_scale, axis=1 if self.group is None else 0, block=self.group)
        found = torch.matmul(self._read(input), weight)
        return found if self.bias is None else found + self.bias

    def _read(self, input: Tensor) -> Tensor:
        if self.activations == "none":
            return input
        if self.activations == "dynamic":  # each token's own range: no operator has that, arithmetic does
            return _rounded(input, *input_scale(input.amin(-1, keepdim=True), input.amax(-1, keepdim=True)))
        scale, zero = self.input_scale, self.input_zero_point
        if self.group is not None:
            # No runtime multiplies groups as integers; of Q and DQ here ONNX Runtime makes a product that fails.
            return _rounded(input, scale, zero.float())
        quantized = _symbol("QuantizeLinear", (input, scale, zero), torch.uint8, input.shape)
        return _symbol("DequantizeLinear", (quantized, scale, zero), torch.float32, input.shape)


class EmbeddingTwin(nn.Module):
    """Rows of integers, looked up as they lie in the file and scaled after that.

    A table of fewer than 8 bits has several integers to a byte. They are taken apart by division, which all runtimes
    have, where few look up 4-bit integers. The columns in a byte lie half a row apart (of 2 bits, a quarter), so that
    the parts need only be joined: OpenVINO interleaves neighbours one by one, and looks up unsigned bytes slowly, which
    together made a small INT8 model a third slower (experiments/proposal/README.md).

    Args:
        layer: the quantized table.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, layer: QuantizedEmbedding) -> None:
        super().__init__()
        self.columns, self.group = layer.weight.shape[1], layer.spec.group_size
        self.bits = {3: 4}.get(layer.spec.bits, layer.spec.bits)  # 3 would not divide a byte
        integers = _integers(layer)
        if self.bits < 8:
            each = 8 // self.bits
            offset = (integers.to(torch.int16) + 2 ** (self.bits - 1)).to(torch.uint8)
            offset = functional.pad(offset, (0, -self.columns % each)).unflatten(1, (each, -1))
            shifts = self.bits * torch.arange(each, dtype=torch.uint8)
            integers = (offset << shifts[:, None]).sum(1, dtype=torch.int16).sub(128).to(torch.int8)
        self.register_buffer("weight", integers.contiguous())
        self.register_buffer("weight_scale", _scale(layer).contiguous())

    def forward(self, input: Tensor) -> Tensor:
        """Token ids `[...]` to `[..., C]`."""
        values = functional.embedding(input, self.weight).float()
        if self.bits < 8:
            parts, size, values = [], 2**self.bits, values + 128
            for _ in range(8 // self.bits):
                above = (values / size).floor()
                parts.append(values - size * above - size // 2)
                values = above
            values = torch.cat(parts, dim=-1)[..., : self.columns]
        if self.weight_scale.shape == (1, 1):
            return values * self.weight_scale.reshape(())
        scale = functional.embedding(input, self.weight_scale)
        if self.group is None:
            return values * scale
        # Values are put in their groups, as OpenVINO repeats scales one by one; a last group may be a shorter one.
        groups = functional.pad(values, (0, -self.columns % self.group)).unflatten(-1, (-1, self.group))
        scaled: Tensor = (groups * scale.unsqueeze(-1)).flatten(-2)
        return scaled[..., : self.columns]


def _rounded(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Rounded to uint8 and back, by arithmetic."""
    return ((values / scale + zero).round().clamp(0, LEVELS) - zero) * scale


def _integers(layer: Quantized) -> Tensor:
    """`[R, C]`, int8."""
    return layer.integers().to(torch.int8)


def _scale(layer: Quantized) -> Tensor:
    """`[R, G]` (`[1, 1]` for one scale), float32, as the file has it."""
    return layer.packed()["weight_scale"].float()


def _dequantized(integers: Tensor, scale: Tensor, *, axis: int, block: int | None) -> Tensor:
    attributes: dict[str, Any] = {"axis": axis} | ({} if block is None else {"block_size": block})
    return _symbol("DequantizeLinear", (integers, scale), torch.float32, integers.shape, attributes)


def _symbol(
    name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape: Any, attributes: dict[str, Any] | None = None
) -> Tensor:
    found: Tensor = torch.onnx.ops.symbolic(
        name, inputs, attrs=attributes or {}, dtype=dtype, shape=shape, version=OPSET
    )
    return found
