"""Integers of few bits side by side in bytes: how quantized weights lie on disk."""

from __future__ import annotations

import torch
from torch import Tensor

from edgemin.quantization.affine import weight_grid

_CHUNK = 2**22  # weights whose single bits are in memory at a time


def packed_width(columns: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-columns * bits // 8)


def pack(integers: Tensor, bits: int) -> Tensor:
    """Pack the integers of a matrix, row by row, without gaps inside a row.

    Value i of a row, less the smallest of the grid, takes the bits `i * bits` to `(i + 1) * bits - 1` of the row,
    counted from the lowest bit of its first byte; the last byte of a row is filled up with zeros. So 4 bits give two
    weights to a byte, the first in the lower half, and 3 bits eight weights to three bytes.

    Args:
        integers: `[R, C]`, whole numbers of the grid of so many bits.
        bits: 1 to 8.

    Returns:
        `[R, ceil(C * bits / 8)]`, uint8.
    """
    rows, columns = integers.shape
    width = packed_width(columns, bits)
    low, high = weight_grid(bits)
    packed = torch.empty(rows, width, dtype=torch.uint8)
    step = max(1, _CHUNK // max(1, columns * bits))
    shifts = torch.arange(bits, dtype=torch.uint8)
    places = 2 ** torch.arange(8)
    for start in range(0, rows, step):
        part = integers[start : start + step].cpu()
        assert low <= int(part.min()) and int(part.max()) <= high, "integers beyond the grid"
        unsigned = (part.to(torch.int16) - low).to(torch.uint8)
        stream = ((unsigned[..., None] >> shifts) & 1).flatten(1)  # [r, C * bits]
        stream = torch.nn.functional.pad(stream, (0, width * 8 - columns * bits))
        packed[start : start + step] = (stream.unflatten(1, (width, 8)) * places).sum(-1).to(torch.uint8)
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The integers that [`pack`][edgemin.quantization.packing.pack] took, `[R, C]`, float32."""
    rows = packed.shape[0]
    low, _ = weight_grid(bits)
    found = torch.empty(rows, columns)
    step = max(1, _CHUNK // max(1, columns * bits))
    shifts, places = torch.arange(8, dtype=torch.uint8), 2 ** torch.arange(bits)
    for start in range(0, rows, step):
        stream = ((packed[start : start + step, :, None] >> shifts) & 1).flatten(1)[:, : columns * bits]
        unsigned = (stream.unflatten(1, (columns, bits)) * places).sum(-1)
        found[start : start + step] = unsigned + low
    return found
