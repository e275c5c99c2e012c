"""The predictions that are kept beside `run.json`: small enough to be committed, and with every answer as it was."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edgemin.data.splits import Splits
from edgemin.study.nodes import Node, Plan, StudyData
from edgemin.study.scoring import Scored
from edgemin.tasks.base import Kind

DIRECTORY = "predictions"
_LARGEST = np.float16(65472)  # the last number of half precision but one, so that there is one above it


def write(
    run_dir: Path, plan: Plan, scored: Mapping[str, Scored], data: StudyData, transfer: Mapping[str, Splits]
) -> None:
    """Write the predictions of every row, and once what all rows share, in the place of any that were there.

    Args:
        run_dir: the job's directory.
        plan: its rows, in order.
        scored: what is known of each node, by key.
        data: the study's, in the tokens of its models.
        transfer: further tasks that rows were scored on, by name.
    """
    own = {data.study.splits.task.name: data.study.splits} if data.study.splits is not None else {}
    tasks = {**transfer, **own}
    directory = run_dir / DIRECTORY
    shutil.rmtree(directory, ignore_errors=True)
    for splits in tasks.values():
        write_examples(directory, splits, data, _reader(plan))
    for number, row in enumerate(plan.rows):
        for name, source in scored[row.node.key].predictions.items():
            kind = tasks[next(task for task in tasks if name.startswith(f"{task}."))].kind
            file = directory / str(number) / f"{name}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"logits": smallest(load_file(source)["logits"], kind)}, file)


def write_examples(directory: Path, splits: Splits, data: StudyData, reader: Node) -> None:
    """Write what was to be answered: the labels, the row numbers and the lengths in tokens, a file for each split."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, encoded in data.of(reader, splits).evaluation.items():
        tensors = {
            "labels": encoded.labels,
            "rows": splits.evaluation[split].rows.astype(np.int32),
            "tokens": encoded.lengths.astype(np.int16),
        }
        save_file(tensors, directory / f"examples.{splits.task.name}.{split}.safetensors")


def smallest(logits: NDArray[np.float32], kind: Kind) -> NDArray[np.float16] | NDArray[np.float32]:
    """The logits in half precision, where that gives every answer that they give; else as they are.

    Where rounding makes the highest logit equal to another, it becomes the next number above. Of a regression the
    numbers themselves are the answers, and half precision has three digits.

    Args:
        logits: `[N, C]`.
        kind: of the task that they answer.
    """
    half = logits.clip(-_LARGEST, _LARGEST).astype(np.float16)
    places = np.arange(len(half)), logits.argmax(axis=1)
    highest = half[places]
    tied = (half == highest[:, None]).sum(axis=1) > 1
    half[places] = np.where(tied, np.nextafter(highest, np.float16(np.inf)), highest)
    answers = (kind.answers(torch.from_numpy(some.astype(np.float32))) for some in (logits, half))
    return half if torch.equal(*answers) else logits


def _reader(plan: Plan) -> Node:
    """The model whose tokens are counted: the teacher, where there is one."""
    nodes = [*plan.nodes, *(row.node for row in plan.rows)]
    return next((node for node in nodes if node.start.name == "teacher"), nodes[0])
