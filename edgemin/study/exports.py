"""Stored models as they run: read from disk when something needs them, exported where a runtime opens no artifact.

An exported file is kept in the store under what decides it, so that a job that is run again exports nothing.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from edgemin import artifact
from edgemin.deploy import model_files, onnx_runtime, open_vino
from edgemin.deploy.runtime import ARTIFACT, RUNTIMES, versions
from edgemin.encoder import quantized
from edgemin.measure.machine import machine_lock
from edgemin.measure.size import size_bytes
from edgemin.progress import live_line, node_line
from edgemin.store.artifacts import Store
from edgemin.store.content import content_key
from edgemin.store.digest import code_digest
from edgemin.study.nodes import Node

EXPORT_CODE = ("edgemin.deploy.model_files",)  # decides an exported file, beside the providers of quantized layers


class Lazy:
    """An artifact that is read from disk when something really has to run on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._model: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model, wherever it was last moved to."""
        if self._model is None:
            self._model = artifact.load(self.path)[0]
        return self._model


def providers(*nodes: Node) -> tuple[str, ...]:
    """The modules that know the quantized layers of these models."""
    return quantized.modules(*(node.outline.provider for node in nodes))


def machine(node: Node) -> AbstractContextManager[object]:
    """Hold the machine for work on a node that is no measurement."""
    return machine_lock("training", lambda line: node_line(node.path, "waiting", line))


class Exported(NamedTuple):
    """A model as a runtime loads it: the directory, and the bytes of what is loaded from there."""

    path: Path
    size_bytes: int


class Exports:
    """The exported files of the rows of one job.

    Args:
        store: where artifacts and exported files are kept.
        runtimes: the names of all runtimes that the job uses.
    """

    def __init__(self, store: Store, runtimes: Collection[str]) -> None:
        self.store, self.runtimes = store, runtimes

    def of(self, node: Node, cached: Lazy, runtime: str) -> Exported:
        """A row's model as a runtime loads it: its artifact, or an export of it that is made where there is none yet.

        Raises:
            UserError: the model cannot be exported.
        """
        if RUNTIMES[runtime].form == ARTIFACT:
            path = self.store.path(node.key)
            return Exported(path, size_bytes(path))
        content = {
            "artifact": node.key,
            "form": RUNTIMES[runtime].form,
            "code": code_digest(*EXPORT_CODE, *providers(node)),
            "versions": versions(runtime),
        }
        key, results = content_key(content), self.store.results
        kept = self.store.result("export", key)
        files = [results.find(f"export/{key}/{name}") for name in kept["files"]] if kept is not None else [None]
        whole = [file for file in files if file is not None]
        if len(whole) < len(files):
            # OpenVINO's file is made of the ONNX one, which need not be made twice.
            both = RUNTIMES[runtime].form == "openvino" and "onnxruntime" in self.runtimes
            onnx = self.of(node, cached, "onnxruntime") if both else None
            with (
                machine(node),
                live_line(f"{node.path}  exporting for {runtime}"),
                tempfile.TemporaryDirectory() as directory,
            ):
                if onnx is not None:
                    open_vino.write(onnx.path / onnx_runtime.FILE, Path(directory))
                else:
                    nn.Module.to(cached.model, "cpu")
                    model_files.write(cached.model, runtime, Path(directory))
                made = sorted(Path(directory).iterdir())
                whole = [
                    results.keep(f"export/{key}/{file.name}", functools.partial(shutil.copyfile, file)) for file in made
                ]
            self.store.keep_result("export", key, {"files": [file.name for file in made], "content": content})
        return Exported(whole[0].parent, sum(file.stat().st_size for file in whole))
