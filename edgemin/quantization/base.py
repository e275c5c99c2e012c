"""What quantized Linears and Embeddings have in common: weights that are rounded at every forward, and their scales.

`weight` stays a float parameter, which an optimizer moves. The model computes with `quantized_weight()`, gradients go
straight through (see [`affine`][edgemin.quantization.affine]). In a model's file only integers and scales are left of
it, so a layer that was loaded starts at its dequantized weights, until it takes up the latent ones beside the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgemin.encoder.slicing import kept_entries
from edgemin.quantization.affine import SMALLEST, fake_quantize, integers
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


class Quantized(nn.Module):
    """What quantized Linears and Embeddings have in common.

    Attributes:
        spec: how the weights are quantized.
        weight: `[R, C]`, float.
        weight_scale: `[R, G]`, see [`weights`][edgemin.quantization.weights].
        scales: what the scales of the weights do in training; `fixed` unless a stage says otherwise.
        rescaled: groups whose scale was chosen anew because a slice had cut through them.
    """

    spec: Spec
    weight: Tensor
    weight_scale: Tensor  # in full precision; computed with in the precision of the file
    weight_share: Tensor  # moving scales' share of those of the largest weights, [R, G]
    held: Tensor | None  # the rounded weights, while nothing of them is trained
    fixed_integers: Tensor | None  # while the scales alone are trained

    def _begin(self, spec: Spec) -> None:
        self.spec, self.rescaled = spec, 0
        self.scales: Scales = "fixed"
        self._settled = False
        rows, columns = self.weight.shape
        shape = (1, 1) if spec.granularity == "tensor" else (rows, spec.groups(columns))
        self.register_buffer("weight_scale", torch.ones(shape, device=self.weight.device))
        for name in ("held", "fixed_integers"):
            self.register_buffer(name, None, persistent=False)

    def fit_weights(self, how: WeightRange) -> None:
        """Choose the scales by the weights as they are."""
        assert self.scales == "fixed"
        self.weight_scale = weight_scale(self.weight, self.spec, how)
        self._settled = False

    def quantized_weight(self) -> Tensor:
        """`[R, C]`: what the layer computes with."""
        if self.held is not None:
            return self.held
        return self.weight if self._settled else self._rounded(self.weight)

    def integers(self) -> Tensor:
        """`[R, C]`: the integers, as floats."""
        if self.fixed_integers is not None:
            return self.fixed_integers
        groups = grouped(self.weight.detach(), self.spec)
        scale = self._scale(groups).detach()
        return ungrouped(integers(groups, scale[..., None], *self.spec.grid), self.weight.shape)

    def hold(self) -> None:
        """Round once for all forwards until the layer is trained again."""
        self.held = self.quantized_weight().detach()

    def fix_integers(self) -> None:
        """Compute with these integers whatever becomes of the scales; the gradient of a scale is then that integer."""
        self.fixed_integers = self.integers()

    def free_integers(self) -> None:
        """Undo `fix_integers`: the weights become what the integers stand for."""
        with torch.no_grad():
            self.weight.copy_(self.quantized_weight())
        self.fixed_integers = None

    def settle(self) -> None:
        """Be as a file would bring the layer back: fixed scales in its precision, weights at their rounded values."""
        self.follow("fixed")
        with torch.no_grad():
            scale = self._scale(grouped(self.weight, self.spec))
            self.weight.copy_(self.quantized_weight())
            self.weight_scale.copy_(scale)
        self.held = self.fixed_integers = None
        self._settled = True

    def train(self, mode: bool = True) -> Any:
        """Switch the mode; training moves weights off the grid, so they are rounded at every forward again."""
        if mode:
            self._settled, self.held = False, None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Take weights from a checkpoint, which are not rounded."""
        self._settled, self.held = False, None
        super()._load_from_state_dict(*args)

    def latents(self) -> dict[str, Tensor]:
        """What training goes on from: the weights before they are rounded, and the scales."""
        return {"weight": self.weight.detach(), "weight_scale": self._own_scale().detach()}

    def take_up(self, latents: Mapping[str, Tensor]) -> None:
        """Go on training from the weights and scales that `latents` gave."""
        own = self.latents()
        for name, tensor in latents.items():
            if tensor.shape != own[name].shape:
                raise RuntimeError(f"{name} of shape {list(tensor.shape)}, not {list(own[name].shape)}")
        with torch.no_grad():
            self.weight.copy_(latents["weight"])
            self.weight_scale.copy_(latents["weight_scale"])
        self._settled = False

    def follow(self, scales: Scales) -> None:
        """Set what the scales of the weights do in training: stay, keep their share of the largest weight, or learn."""
        now = self._own_scale().detach().clone()
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
        assert self.held is None and self.fixed_integers is None, "surgery comes before training"
        before = self.scales
        Quantized.follow(self, "fixed")
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
        Quantized.follow(self, before)

    def _scale(self, groups: Tensor, rows: Tensor | None = None) -> Tensor:
        """The scales of these groups in the precision they are stored in; `rows` if only some rows are asked for."""

        def of_rows(found: Tensor) -> Tensor:
            return found if rows is None else functional.embedding(rows, found)

        if self.scales == "moving":
            return stored(of_rows(self.weight_share) * largest_scale(groups, self.spec), self.spec)
        positive = of_rows(self.weight_scale).abs().clamp(min=SMALLEST)
        return positive + (stored(positive.detach(), self.spec) - positive.detach())

    def _own_scale(self) -> Tensor:
        """The scales before they are rounded to the precision they are stored in."""
        if self.scales == "moving":
            return self._scale(grouped(self.weight, self.spec))
        return self.weight_scale.abs().clamp(min=SMALLEST)

    def _rounded(self, weight: Tensor, rows: Tensor | None = None) -> Tensor:
        groups = grouped(weight, self.spec)
        scale = self._scale(groups, rows)[..., None]
        if (whole := self.fixed_integers) is not None:
            of_rows = whole if rows is None else functional.embedding(rows, whole)
            return ungrouped(grouped(of_rows, self.spec) * scale, weight.shape)
        low, high = self.spec.grid
        # LSQ's 1 / sqrt(N Q_hi), N the weights that share a scale
        shrink = 1.0 / math.sqrt(groups.shape[-1] * high)
        return ungrouped(fake_quantize(groups, scale, low, high, shrink), weight.shape)
