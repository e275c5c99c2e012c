"""ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemin.deploy.extras import extra
from edgemin.deploy.runtime import Batch, taken
from edgemin.errors import UserError, first_line

FILE = "model.onnx"
DATA = f"{FILE}.data"  # the weights of a model that is too large for one file


class OnnxRuntime:
    """A session on one ONNX file, a [`Runtime`][edgemin.deploy.runtime.Runtime]."""

    def __init__(self, path: Path, session: Any, version: str) -> None:
        self.path, self.session = path, session
        self.version = version
        self.names = [given.name for given in session.get_inputs()]

    def answers(self, batch: Batch) -> NDArray[np.float32]:
        """The logits [B, C]."""
        return np.asarray(self.session.run(None, taken(batch, self.names))[0])

    def files(self) -> list[Path]:
        """The one file, of a very large model two."""
        return [file for name in (FILE, DATA) if (file := self.path / name).is_file()]

    def release(self) -> None:
        """Give back its memory and threads."""
        del self.session


def start(threads: int) -> None:
    """Load the library; its threads are those of each session."""
    extra("onnxruntime", "onnxruntime")


def open(path: Path, threads: int) -> OnnxRuntime:
    """Start a session with all of ONNX Runtime's optimizations.

    `accuracy_level` 4 lets 4-bit weights be multiplied with int8 activations.
    """
    onnxruntime = extra("onnxruntime", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path / FILE), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes are of many kinds and private
        raise UserError(f"{path / FILE}: ONNX Runtime cannot open it ({first_line(error)})") from error
    return OnnxRuntime(path, session, onnxruntime.__version__)
