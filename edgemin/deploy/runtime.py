"""The runtimes that a model is served in, behind one small interface."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemin.errors import UserError

# `input_ids`, `attention_mask` and `token_type_ids`, each [B, T].
Batch = Mapping[str, NDArray[np.int64]]


class Runtime(Protocol):
    """A model that has been opened in a runtime."""

    version: str
    """Of the runtime, and what else decides its speed."""

    def answers(self, batch: Batch) -> NDArray[np.float32]:
        """The logits [B, C] of a batch of arrays [B, T]; what the model does not take of it is left out."""

    def files(self) -> list[Path]:
        """What the runtime loads the model from: its size, tokenizer apart."""

    def release(self) -> None:
        """Free the runtime's memory and threads; the model answers no more."""


class Known(NamedTuple):
    """What is known of a runtime before it is imported.

    Attributes:
        module: has `open(path, threads)`.
        form: what it opens: an `artifact`, or a file that [`export`][edgemin.deploy] writes: `onnx`, `openvino`.
        packages: whose versions decide what it answers and how fast; the first is the runtime's own, and an extra of
            its name brings them all.
    """

    module: str
    form: str
    packages: tuple[str, ...]

    @property
    def package(self) -> str:
        """The runtime's own package."""
        return self.packages[0]


ARTIFACT = "artifact"
_EXPORTER = ("onnx-ir", "onnxscript", "torch", "transformers")
RUNTIMES: dict[str, Known] = {
    "torch": Known("edgemin.deploy.torch_eager", ARTIFACT, ("torch",)),
    "torch_compiled": Known("edgemin.deploy.torch_compiled", ARTIFACT, ("torch",)),
    "onnxruntime": Known("edgemin.deploy.onnx_runtime", "onnx", ("onnxruntime", *_EXPORTER)),
    "openvino": Known("edgemin.deploy.open_vino", "openvino", ("openvino", *_EXPORTER)),
    "openvino_bf16": Known("edgemin.deploy.open_vino_bf16", "openvino", ("openvino", *_EXPORTER)),
}


def check_names(names: Sequence[str], key: str) -> None:
    """Refuse names of no runtime.

    Raises:
        UserError: names the key.
    """
    for name in names:
        if name not in RUNTIMES:
            raise UserError(f"{key}: expected {', '.join(RUNTIMES)}, given {name!r}")


def check_installed(names: Sequence[str], key: str) -> None:
    """Refuse runtimes that are not installed, whose files could not be written, or that this machine cannot run.

    Raises:
        UserError: names the key, what is missing and the extra that brings it.
    """
    for name in names:
        for package in RUNTIMES[name].packages:
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError as error:
                needed = f"{package} to be installed for {name} (pip install 'edgemin[{RUNTIMES[name].package}]')"
                raise UserError(f"{key}: expected {needed}, given none") from error
    if "torch_compiled" in names and compiler() is None:
        raise UserError(f"{key}: expected a C++ compiler for torch_compiled (g++, or the one named by CXX), given none")
    if "openvino_bf16" in names:
        importlib.import_module(RUNTIMES["openvino_bf16"].module).check(key)


def compiler() -> str | None:
    """The C++ compiler that torch.compile would take, if it is there."""
    return shutil.which(os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")))


def versions(name: str) -> dict[str, str]:
    """The versions of what decides a runtime's answers and speed, for a key."""
    return {package: importlib.metadata.version(package) for package in RUNTIMES[name].packages}


def start(name: str, threads: int) -> None:
    """Load a runtime into this process without a model: what memory it takes by itself.

    Raises:
        UserError: it is not installed.
    """
    importlib.import_module(RUNTIMES[name].module).start(threads)


def open_model(name: str, path: Path, threads: int) -> Runtime:
    """Open a model in a runtime.

    Args:
        name: one of [`RUNTIMES`][edgemin.deploy.runtime.RUNTIMES].
        path: the directory that holds the artifact or the exported files.
        threads: of one inference; 0: as many as the runtime chooses.

    Raises:
        UserError: the runtime is not installed, or the file is missing or damaged.
    """
    found: Runtime = importlib.import_module(RUNTIMES[name].module).open(path, threads)
    return found


def taken(batch: Batch, names: Sequence[str]) -> dict[str, Any]:
    """Those inputs of a batch that a model takes; a tokenizer that makes no segment ids leaves them to be zeros."""
    return {name: batch[name] if name in batch else np.zeros_like(batch["input_ids"]) for name in names}
