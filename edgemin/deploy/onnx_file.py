"""A model as one ONNX file: fp32, or with the integers of its quantized layers."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from edgemin.deploy import attention, twins
from edgemin.deploy.extras import extra
from edgemin.encoder import taps

MOST = 2**31 - 2**24  # bytes of weights in one protobuf, some left for the graph
SAMPLE = (2, 17)  # batch and tokens of the input that is traced: unlike any width of a model, and unequal
_LOGGERS = ("torch.onnx", "torch.onnx._internal.exporter._registration", "transformers.exporters", "onnxscript")


def write(model: PreTrainedModel, path: Path, *, length: int | None = None) -> None:
    """Write a model as ONNX, verified to take any batch and any length.

    Args:
        model: an encoder of any family, float or with EdgeMIN's quantized layers, on the CPU.
        path: of the file, `.onnx`. Everything is in it, up to 2 GB, the most that the format takes: the weights of a
            larger model are in a second file beside it, of the same name with `.data` behind.
        length: a fixed length of all inputs, for accelerators that need one; then the batch is 1. `None`: any.

    Raises:
        UserError: a layer that cannot be written, or a package that is not installed.
    """
    onnx_ir = extra("onnx_ir", "onnxruntime")
    exporters = extra("transformers.exporters", "onnxruntime")
    names = taps.inputs(model)
    batch, tokens = (1, length) if length is not None else SAMPLE
    sample = {name: torch.ones(batch, tokens, dtype=torch.int64) for name in names}
    any_size = torch.export.Dim.DYNAMIC  # refuses to be fixed, where AUTO would be silently
    twin = twins.with_twins(model)
    attention.direct(twin)
    shapes = None if length is not None else {name: {0: any_size, 1: any_size} for name in names}
    config = exporters.OnnxConfig(opset_version=twins.OPSET, dynamic_shapes=shapes)
    with _quiet(), torch.no_grad():
        program, _ = exporters.OnnxExporter().export_program(twin, sample, config)
    _check_axes(program, names, fixed=length is not None)
    narrow(program, twin)
    tensors = [value.const_value for value in program.graph.initializers.values() if value.const_value is not None]
    larger = sum(tensor.nbytes for tensor in tensors) > MOST
    onnx_ir.save(program, str(path), external_data=f"{path.name}.data" if larger else None)


def _check_axes(program: Any, names: list[str], *, fixed: bool) -> None:
    """Make sure of the axes: one that the exporter has silently fixed would serve one length alone."""
    found = {value.name: value for value in program.graph.inputs}
    assert list(found) == names, f"inputs {list(found)}, not {names}"
    for value in found.values():
        dynamic = [not isinstance(size, int) for size in value.shape]
        assert dynamic == [not fixed] * 2, f"the exporter gave {value.name} the shape {value.shape}"


def narrow(program: Any, twin: nn.Module) -> None:
    """Give the weights of 4 bits and fewer the type INT4: torch has none, so they were traced as INT8."""
    onnx_ir, ml_dtypes = extra("onnx_ir", "onnxruntime"), extra("ml_dtypes", "onnxruntime")
    for path, layer in twin.named_modules():
        # of equal tensors the exporter keeps one
        value = program.graph.initializers.get(f"{path}.weight")
        if isinstance(layer, twins.LinearTwin) and layer.bits == 4 and value is not None:
            values = layer.weight.numpy().astype(ml_dtypes.int4)
            value.const_value = onnx_ir.Tensor(values, dtype=onnx_ir.DataType.INT4, name=value.name)
            value.dtype = onnx_ir.DataType.INT4


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its steps, and warns of packages and versions that do not matter here."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    export = torch.onnx.export
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    torch.onnx.export = functools.partial(export, verbose=False)  # transformers does not say it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.onnx.export = export
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
