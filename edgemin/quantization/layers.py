"""Linear and Embedding that round their weights and inputs at every forward: quantized, and still trainable."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgemin.encoder.slicing import kept_entries, slice_weight
from edgemin.processes import ranks
from edgemin.quantization.affine import LEVELS, SMALLEST, fake_quantize, input_scale, quantize_tokens
from edgemin.quantization.base import Quantized, Scales
from edgemin.quantization.weights import Spec

# Share of the old range in the moving average of an activation's range.
MOMENTUM = 0.99


class QuantizedLinear(Quantized, nn.Linear):
    """A linear layer that rounds its weights and, where asked, its inputs: `y = q(x) q(W)ᵀ + b`.

    With static activations one `input_scale` and one `input_zero_point` serve all inputs. Both are NaN until
    [`fit_inputs`][edgemin.quantization.layers.QuantizedLinear.fit_inputs] has seen calibration data.

    Args:
        linear: the layer whose weights and bias it takes.
        spec: how it is quantized.
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
        self.input_scales: Scales = "fixed"
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

    def follow(self, scales: Scales, inputs: Scales | None = None) -> None:
        """Set what the scales of weights and of inputs do in training; those of inputs do the same unless told."""
        super().follow(scales)
        if self.spec.activations != "static":
            return
        self.input_scales = inputs or scales
        now, zero = self._positive_input_scale().detach().clone(), self.input_zero_point
        if isinstance(self.input_scale, nn.Parameter):
            del self.input_scale
            self.register_buffer("input_scale", now)
        self._buffers.pop("input_range", None)
        if self.input_scales == "moving":
            self.register_buffer("input_range", torch.cat([-zero * now, (LEVELS - zero) * now]))
        elif self.input_scales == "learned":
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
        if self.input_scales == "moving" and self.training:
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
        if self._settled or self.held is not None or self.spec.granularity == "tensor":
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
