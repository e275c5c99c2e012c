"""Linear and Embedding that round their weights and inputs at every forward: quantized, and still trainable.

`weight` stays a float parameter, which an optimizer moves. The model computes with `quantized_weight()`, gradients go
straight through (see [`affine`][edgemin.quantization.affine]). On disk only integers and scales are left of it, so a
layer that was loaded starts at its dequantized weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgemin.encoder.slicing import kept_entries, slice_weight
from edgemin.processes import ranks
from edgemin.quantization.affine import LEVELS, SMALLEST, fake_quantize, input_scale, integers, quantize_tokens
from edgemin.quantization.packing import pack, packed_width, unpack
from edgemin.quantization.weights import (
    Spec,
    WeightRange,
    grouped,
    largest_scale,
    stored,
    ungrouped,
    weight_scale,
)

# What scales do while a model trains: stay, follow what they scale, or learn.
Scales = Literal["fixed", "moving", "learned"]
# Share of the old range in the moving average of an activation's range.
MOMENTUM = 0.99


class Quantized(nn.Module):
    """What quantized Linears and Embeddings have in common.

    Attributes:
        spec: how the weights are quantized.
        weight: `[R, C]`, float.
        weight_scale: `[R, G]`, see [`weights`][edgemin.quantization.weights].
        scales: what the scales do in training; `fixed` unless a stage says otherwise.
        rescaled: groups whose scale was chosen anew because a slice had cut through them.
    """

    spec: Spec
    weight: Tensor
    weight_scale: Tensor
    weight_share: Tensor  # moving scales' share of those of the largest weights, [R, G]

    def _begin(self, spec: Spec) -> None:
        self.spec, self.rescaled = spec, 0
        self.scales: Scales = "fixed"
        self._settled = False
        rows, columns = self.weight.shape
        shape = (1, 1) if spec.granularity == "tensor" else (rows, spec.groups(columns))
        self.register_buffer("weight_scale", torch.ones(shape, device=self.weight.device))

    def fit_weights(self, how: WeightRange) -> None:
        """Choose the scales by the weights as they are."""
        assert self.scales == "fixed"
        self.weight_scale = weight_scale(self.weight, self.spec, how)
        self._settled = False

    def quantized_weight(self) -> Tensor:
        """`[R, C]`: what the layer computes with."""
        return self.weight if self._settled else self._rounded(self.weight)

    def integers(self) -> Tensor:
        """`[R, C]`: the integers, as floats."""
        groups = grouped(self.weight.detach(), self.spec)
        return ungrouped(integers(groups, self._scale(groups)[..., None], *self.spec.grid), self.weight.shape)

    def settle(self) -> None:
        """Set the weights to their rounded values, so that forwards in eval mode need not round them again."""
        with torch.no_grad():
            self.weight.copy_(self.quantized_weight())
        self._settled = True

    def train(self, mode: bool = True) -> Any:
        """Switch the mode; training moves settled weights off the grid, so they are rounded again."""
        if mode:
            self._settled = False
        return super().train(mode)

    def follow(self, scales: Scales) -> None:
        """Set what scales do in training: stay, keep their share of the largest weight, or learn."""
        now = self._scale(grouped(self.weight, self.spec)).detach().clone()
        if isinstance(self.weight_scale, nn.Parameter):
            del self.weight_scale
            self.register_buffer("weight_scale", now)
        else:
            self.weight_scale = now
        self._buffers.pop("weight_share", None)
        if scales == "moving":
            self.register_buffer("weight_share", now / largest_scale(grouped(self.weight, self.spec), self.spec))
        elif scales == "learned":
            del self.weight_scale
            self.weight_scale = nn.Parameter(now)
        self.scales = scales

    def learned_scales(self) -> list[nn.Parameter]:
        """The scales that training moves."""
        return [self.weight_scale] if isinstance(self.weight_scale, nn.Parameter) else []

    def packed(self) -> dict[str, Tensor]:
        """What a file holds of the weights: `weight_packed` [R, bytes] and `weight_scale`."""
        scale = self._scale(grouped(self.weight.detach(), self.spec)).detach()
        return {"weight_packed": pack(self.integers(), self.spec.bits), "weight_scale": scale.to(self.spec.scale_dtype)}

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors that `packed` gave; the weights become the dequantized ones."""
        rows, columns = self.weight.shape
        scale = tensors["weight_scale"].float()
        if scale.shape != self.weight_scale.shape:
            raise RuntimeError(f"scales of shape {list(scale.shape)}, not {list(self.weight_scale.shape)}")
        packed, width = tensors["weight_packed"], packed_width(columns, self.spec.bits)
        if packed.shape != (rows, width):
            raise RuntimeError(f"packed weights of shape {list(packed.shape)}, not {[rows, width]}")
        found = unpack(packed, self.spec.bits, columns)
        self.weight_scale = scale
        with torch.no_grad():
            self.weight.copy_(ungrouped(grouped(found, self.spec) * scale[..., None], self.weight.shape))
        self._settled = True

    def slice(self, rows: Tensor | None, columns: Tensor | None) -> None:
        """Keep some rows and columns: the integers and scales of what stays are what they were.

        Only where the columns of a new group come from several old ones is its scale chosen anew, for the least error.
        """
        before = self.scales
        self.follow("fixed")
        scale = self.weight_scale
        if rows is not None and self.spec.granularity != "tensor":
            scale = scale[rows.to(scale.device)]
        self.weight = kept_entries(kept_entries(self.weight, 0, rows), 1, columns)
        if columns is not None and self.spec.group_size is not None:
            sources = [part.unique() for part in (columns // self.spec.group_size).split(self.spec.group_size)]
            mixed = torch.tensor([len(source) > 1 for source in sources], device=scale.device)
            scale = torch.stack([scale[:, source[0]] for source in sources], dim=1)
            if bool(mixed.any()):
                scale = torch.where(mixed, weight_scale(self.weight, self.spec, "mse"), scale)
                self.rescaled += int(mixed.sum()) * len(scale)
                self._settled = False
        self.weight_scale = scale.clone()
        self.follow(before)

    def _scale(self, groups: Tensor, rows: Tensor | None = None) -> Tensor:
        """The scales of these groups in the precision they are stored in; `rows` if only some rows are asked for."""

        def of_rows(found: Tensor) -> Tensor:
            return found if rows is None else functional.embedding(rows, found)

        if self.scales == "moving":
            return stored(of_rows(self.weight_share) * largest_scale(groups, self.spec), self.spec)
        scale = of_rows(self.weight_scale)
        if self.scales == "learned":
            positive = scale.abs().clamp(min=SMALLEST)
            return positive + (stored(positive.detach(), self.spec) - positive.detach())
        return scale

    def _rounded(self, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        groups = grouped(weight, self.spec)
        low, high = self.spec.grid
        # LSQ's 1 / sqrt(N Q_hi), N the weights that share a scale
        shrink = 1.0 / math.sqrt(groups.shape[-1] * high)
        return ungrouped(fake_quantize(groups, self._scale(groups, rows)[..., None], low, high, shrink), weight.shape)


class QuantizedLinear(Quantized, nn.Linear):
    """`y = q(x) q(W)ᵀ + b`.

    Args:
        linear: gives its weights and bias.
        spec: how it is quantized. With static activations there are `input_scale` and `input_zero_point`, one number
            each; they are not-a-number until
            [`QuantizedLinear.fit_inputs`][edgemin.quantization.layers.QuantizedLinear.fit_inputs].
    """

    input_scale: Tensor
    input_zero_point: Tensor
    input_range: Tensor  # [2]: the moving average of the least and the largest

    def __init__(self, linear: nn.Linear, spec: Spec) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().clone(), requires_grad=linear.weight.requires_grad)
        self.bias = linear.bias
        self._begin(spec)
        self.watching = False  # what it reads is being calibrated, and passes as it is
        if spec.activations == "static":
            for name in ("input_scale", "input_zero_point"):
                self.register_buffer(name, torch.full((1,), torch.nan, device=self.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        """The product of rounded inputs and rounded weights, in the precision of autocast."""
        if not self.watching:
            input = self._read(input)
        return functional.linear(input, self.quantized_weight(), self.bias)

    def fit_inputs(self, low: Tensor, high: Tensor) -> None:
        """Set scale and zero point of the inputs by the range of their values."""
        scale, zero = (found.reshape(1).to(self.weight.device) for found in input_scale(low, high))
        with torch.no_grad():
            self.input_scale.copy_(scale)
            self.input_zero_point.copy_(zero)
        if "input_range" in self._buffers:
            self.input_range.copy_(torch.cat([-zero * scale, (LEVELS - zero) * scale]))

    def follow(self, scales: Scales) -> None:
        """Set what the scales of weights and of inputs do in training."""
        super().follow(scales)
        if self.spec.activations != "static":
            return
        now, zero = self._positive_input_scale().detach().clone(), self.input_zero_point
        if isinstance(self.input_scale, nn.Parameter):
            del self.input_scale
            self.register_buffer("input_scale", now)
        self._buffers.pop("input_range", None)
        if scales == "moving":
            self.register_buffer("input_range", torch.cat([-zero * now, (LEVELS - zero) * now]))
        elif scales == "learned":
            del self.input_scale
            self.input_scale = nn.Parameter(now)

    def learned_scales(self) -> list[nn.Parameter]:
        """Those of the weights, and of static inputs."""
        found = super().learned_scales()
        if self.spec.activations == "static" and isinstance(self.input_scale, nn.Parameter):
            found.append(self.input_scale)
        return found

    def slice(self, rows: Tensor | None, columns: Tensor | None) -> None:
        """Keep some outputs and inputs, with their bias; the input range stays and may have to be calibrated again."""
        super().slice(rows, columns)
        if self.bias is not None:
            self.bias = kept_entries(self.bias, 0, rows)
        self.out_features, self.in_features = self.weight.shape

    def _positive_input_scale(self) -> Tensor:
        return self.input_scale.abs().clamp(min=SMALLEST)

    def _read(self, values: Tensor) -> Tensor:
        if self.spec.activations == "none":
            return values
        if self.spec.activations == "dynamic":
            return quantize_tokens(values)
        if self.scales == "moving" and self.training:
            self._move(values.detach())
        zero = float(self.input_zero_point)
        shrink = 1.0 / math.sqrt(values.shape[-1] * LEVELS)
        return fake_quantize(values, self._positive_input_scale(), -zero, LEVELS - zero, shrink)

    def _move(self, values: Tensor) -> None:
        """Move the input range towards that of these inputs, padding included, over all processes."""
        seen = ranks.mean(torch.stack(values.float().aminmax()))
        self.input_range.mul_(MOMENTUM).add_(seen, alpha=1 - MOMENTUM)
        scale, zero = input_scale(*self.input_range)
        self.input_scale.fill_(scale)
        self.input_zero_point.fill_(zero)


class QuantizedEmbedding(Quantized, nn.Embedding):
    """Rows of a quantized table. Only the rows that are read are rounded.

    Args:
        embedding: gives its entries.
        spec: how it is quantized; an embedding has no activations.
    """

    def __init__(self, embedding: nn.Embedding, spec: Spec) -> None:
        nn.Module.__init__(self)
        assert embedding.max_norm is None and not embedding.sparse, "no encoder's tables have these"
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = embedding.padding_idx, None, embedding.norm_type
        self.scale_grad_by_freq, self.sparse = embedding.scale_grad_by_freq, False
        self.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
        self._begin(spec)

    def forward(self, input: Tensor) -> Tensor:
        """The rounded rows for token ids: `[...]` to `[..., C]`."""
        if self._settled or self.spec.granularity == "tensor":
            return functional.embedding(input, self.quantized_weight(), self.padding_idx)
        ids = input.flatten()
        rows = functional.embedding(ids, self.weight, self.padding_idx)
        found: Tensor = self._rounded(rows, ids).unflatten(0, input.shape)
        return found

    def slice(self, rows: Tensor | None, columns: Tensor | None) -> None:
        """Keep some entries and features, and follow the entry of the padding token."""
        super().slice(rows, columns)
        self.num_embeddings, self.embedding_dim = self.weight.shape
        if rows is not None and self.padding_idx is not None:
            self.padding_idx = rows.tolist().index(self.padding_idx)


@slice_weight.register
def _(module: QuantizedLinear, rows: Tensor | None, columns: Tensor | None) -> None:
    module.slice(rows, columns)


@slice_weight.register
def _(module: QuantizedEmbedding, rows: Tensor | None, columns: Tensor | None) -> None:
    module.slice(rows, columns)
