"""Eager torch as a runtime: the artifact as `edgemin.load` gives it, quantized layers computing with rounded floats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgemin import artifact
from edgemin.deploy.runtime import Batch
from edgemin.encoder import quantized, taps
from edgemin.errors import UserError


def longest(model: PreTrainedModel) -> int:
    """Tokens of the longest input that a model takes."""
    found = quantized.outline(model).max_tokens
    assert found is not None, "known of every model that there is"
    return found


def check_length(model: PreTrainedModel, length: int | None) -> None:
    """Refuse a fixed length of all inputs that a model does not take.

    Raises:
        UserError: names the length.
    """
    most = longest(model)
    if length is not None and not 2 <= length <= most:
        raise UserError(f"length: expected a whole number from 2 to {most}, what the model takes, given {length}")


class TorchEager:
    """An artifact as torch computes it, a [`Runtime`][edgemin.deploy.runtime.Runtime]."""

    def __init__(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.path, self.model = path, model
        self.tokenizer = tokenizer  # in memory, as in that of whoever serves the model
        self.version = str(torch.__version__)

    def answers(self, batch: Batch) -> NDArray[np.float32]:
        """The logits [B, C]."""
        with torch.inference_mode():
            found = taps.logits(self.model, {name: torch.from_numpy(values) for name, values in batch.items()})
        return np.asarray(found.float().numpy())

    def files(self) -> list[Path]:
        """Weights, configuration and structure."""
        return [self.path / name for name in artifact.MODEL_FILES]

    def longest(self) -> int:
        """Tokens of the longest input."""
        return longest(self.model)

    def release(self) -> None:
        """Give back its memory."""
        del self.model, self.tokenizer


def start(threads: int) -> None:
    """Set the threads, and load what torch needs for its first product: thread pool and kernels."""
    torch.set_num_threads(threads)
    some = torch.ones(256, 256)
    some @ some


def open(path: Path, threads: int) -> TorchEager:
    """Load an artifact, and set the threads of this process's torch (0: they stay as they are)."""
    if threads:
        torch.set_num_threads(threads)
    return TorchEager(path, *artifact.load(path))
