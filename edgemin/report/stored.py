"""Reads the predictions that a job has kept beside its run.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edgemin.errors import UserError
from edgemin.report.fields import Row
from edgemin.report.schema import Run


class Examples(NamedTuple):
    """What was to be answered, in the order of the answers.

    Attributes:
        labels: `[N]`, or `[N, C]` where an example has several.
        rows: where each stands among the rows of its split as the data set has it, counted from 0, `[N]`.
        tokens: how long each is in tokens, `[N]`.
    """

    labels: NDArray[Any]
    rows: NDArray[np.int32]
    tokens: NDArray[np.int16]


def examples(run: Run, task: str, split: str) -> Examples | None:
    """The examples of a split that a job scored; None where it kept none.

    Raises:
        UserError: the file cannot be used.
    """
    file = run.file.parent / "predictions" / f"examples.{task}.{split}.safetensors"
    tensors = _tensors(file, Examples._fields)
    if tensors is None:
        return None
    found = Examples(**tensors)
    if not len(found.labels) == len(found.rows) == len(found.tokens):
        raise UserError(
            f"{file}: expected as many labels, rows and tokens, given {', '.join(map(str, map(len, found)))}"
        )
    return found


def answers(run: Run, row: Row, task: str, split: str, runtime: str | None = None) -> NDArray[np.float32] | None:
    """The logits `[N, C]` of a row on a split, torch's or those of another runtime; None where the job kept none.

    Raises:
        UserError: the file cannot be used, or has not an answer for every example.
    """
    if row.predictions is None or (known := examples(run, task, split)) is None:
        return None
    name = ".".join([task, split, *([runtime] if runtime else []), "safetensors"])
    file = run.file.parent / row.predictions / name
    tensors = _tensors(file, ("logits",))
    if tensors is None:
        return None
    logits = tensors["logits"].astype(np.float32)
    if logits.ndim != 2 or len(logits) != len(known.labels):
        shape = " x ".join(map(str, logits.shape))
        raise UserError(f"{file}: expected logits of the {len(known.labels)} examples of {split}, given {shape}")
    return logits


def _tensors(file: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]] | None:
    """The tensors of these names; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: expected predictions (safetensors), given a file that cannot be read ({error})"
        ) from None
    if missing := [name for name in names if name not in tensors]:
        raise UserError(f"{file}: expected {', '.join(names)}, given no {missing[0]}")
    return {name: tensors[name] for name in names}
