"""Torch with `torch.compile`: an artifact whose operators inductor has fused into C++ for this machine.

It needs no file but the artifact, and a C++ compiler. Quantized layers have their rounding fused too, but it stays the
arithmetic of rounded floats: integers are multiplied in ONNX Runtime and OpenVINO. Torch's dynamic INT8 cannot be
compiled.

Compiling takes a minute for two small layers. It is part of opening the model, so it counts as its cold start. Inductor
keeps what it has compiled in a directory of its own (`TORCHINDUCTOR_CACHE_DIR`), for when a model is opened again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch._dynamo
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgemin import artifact
from edgemin.deploy import torch_eager
from edgemin.deploy.runtime import Batch
from edgemin.deploy.torch_eager import TorchEager
from edgemin.encoder import taps
from edgemin.errors import UserError, first_line

_SAMPLE = 16  # tokens of the sentence that is compiled on; any number above one gives the same code


class TorchCompiled(TorchEager):
    """A compiled artifact, a [`Runtime`][edgemin.deploy.runtime.Runtime].

    The code is made for one sentence of any length when the model is opened, and for more sentences at the first
    such batch: inductor makes code of its own for a batch of one. It is made for the threads that torch then has.

    Args:
        path: of the artifact.
        model: loaded from it.
        tokenizer: loaded from it.
        threads: of this process's torch once the model is released: a job scores rows here between its stages.

    Raises:
        UserError: torch cannot compile the model.
    """

    def __init__(
        self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, threads: int
    ) -> None:
        super().__init__(path, model, tokenizer)
        self._threads = threads
        # Static activations have zero points, which the layers read as numbers.
        self._settings = torch._dynamo.config.patch(capture_scalar_outputs=True)
        # A whole graph or an error: parts that torch falls back on eagerly would not be what the name says.
        self._forward = torch.compile(taps.logits, dynamic=True, fullgraph=True)
        sample = np.ones((1, _SAMPLE), dtype=np.int64)
        self.answers({"input_ids": sample, "attention_mask": sample, "token_type_ids": sample * 0})

    def answers(self, batch: Batch) -> NDArray[np.float32]:
        """The logits [B, C].

        Raises:
            UserError: torch cannot compile the model for a batch of this kind.
        """
        # Copies, because strides are compiled in: a part of a wider array would be given code of its own.
        given = {name: torch.from_numpy(np.array(values, order="C")) for name, values in batch.items()}
        try:
            with torch.inference_mode(), self._settings:
                found = self._forward(self.model, given)
        except Exception as error:  # torch's own are many, and some are the C++ compiler's
            raise UserError(f"{self.path}: torch.compile cannot compile it ({first_line(error)})") from error
        return np.asarray(found.float().numpy())

    def release(self) -> None:
        """Give back its memory, its code and the threads."""
        super().release()
        del self._forward
        torch._dynamo.reset()
        torch.set_num_threads(self._threads)


def start(threads: int) -> None:
    """Set the threads and load torch's kernels, as for eager torch; each model is compiled as it is opened."""
    torch_eager.start(threads)


def open(path: Path, threads: int) -> TorchCompiled:
    """Load and compile an artifact, and set the threads of this process's torch (0: they stay as they are)."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    return TorchCompiled(path, *artifact.load(path), before)
