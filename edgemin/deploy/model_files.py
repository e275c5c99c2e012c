"""The files that a runtime loads a model from, and nothing else of a bundle."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from edgemin.deploy import onnx_file, onnx_runtime, open_vino
from edgemin.deploy.runtime import RUNTIMES


def write(model: PreTrainedModel, runtime: str, out: Path, *, length: int | None = None) -> None:
    """Write what a runtime loads a model from.

    Args:
        model: on the CPU.
        runtime: one that opens no artifact.
        out: an existing directory.
        length: fixed length of all inputs; `None`: any.

    Raises:
        UserError: a layer that cannot be exported.
    """
    onnx = out / onnx_runtime.FILE
    onnx_file.write(model, onnx, length=length)
    if RUNTIMES[runtime].form == "openvino":
        open_vino.write(onnx, out)
        onnx.unlink()
        (out / onnx_runtime.DATA).unlink(missing_ok=True)
