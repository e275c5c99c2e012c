"""OpenVINO on the CPU, and its file format (IR), which is made from the ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemin.deploy.extras import extra
from edgemin.deploy.runtime import Batch, taken
from edgemin.errors import UserError, first_line

FILES = ("model.xml", "model.bin")


class OpenVINO:
    """A model compiled from IR, a [`Runtime`][edgemin.deploy.runtime.Runtime]."""

    def __init__(self, path: Path, compiled: Any, version: str) -> None:
        self.path, self.version = path, version
        self.request = compiled.create_infer_request()
        self.names = [given.any_name for given in compiled.inputs]

    def answers(self, batch: Batch) -> NDArray[np.float32]:
        """The logits [B, C]."""
        return np.array(self.request.infer(taken(batch, self.names))[0])

    def files(self) -> list[Path]:
        """Graph and weights."""
        return [self.path / name for name in FILES]

    def release(self) -> None:
        """Give back its memory and threads."""
        del self.request


def write(onnx_file: Path, directory: Path) -> None:
    """Convert an ONNX file to IR; weights keep their types, so fp32 stays fp32."""
    openvino = extra("openvino", "openvino")
    openvino.save_model(openvino.convert_model(str(onnx_file)), str(directory / FILES[0]), compress_to_fp16=False)


def start(threads: int) -> None:
    """Load the library and its CPU plugin; the threads are those of each model."""
    extra("openvino", "openvino").Core().get_property("CPU", "FULL_DEVICE_NAME")


def open(path: Path, threads: int, precision: str = "f32") -> OpenVINO:
    """Compile a model for latency.

    What is not integer is computed in fp32 (`INFERENCE_PRECISION_HINT`): left alone, OpenVINO takes bf16 on some CPUs,
    and an fp32 row would not be one. `openvino_bf16` is that runtime, by a name of its own.

    The first input of a length takes about 2.5 times as long as later ones of that length, because OpenVINO makes
    kernels for a length when it meets it, and keeps them (12 layers of width 384 in INT8, 6 to 45 tokens in random
    order: 28 ms of CPU time at first, then 11, where ONNX Runtime takes 9 from the start). A larger cache of kernels
    (`CPU_RUNTIME_CACHE_CAPACITY`) gains nothing. Where all inputs are padded to one length, export with it.
    """
    openvino = extra("openvino", "openvino")
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    try:
        compiled = openvino.Core().compile_model(str(path / FILES[0]), "CPU", settings)
    except Exception as error:  # its classes are of many kinds
        raise UserError(f"{path / FILES[0]}: OpenVINO cannot open it ({first_line(error)})") from error
    return OpenVINO(path, compiled, openvino.__version__)
