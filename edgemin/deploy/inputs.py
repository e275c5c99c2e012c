"""What an export is compared with torch on: sentences of the artifact's own task, those of a file, or random tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgemin.data.splits import load
from edgemin.data.task import Task
from edgemin.deploy import row_files, torch_eager
from edgemin.deploy.pipeline import check
from edgemin.deploy.runtime import Batch
from edgemin.encoder import parts, quantized
from edgemin.errors import UserError
from edgemin.tasks.base import Kind, LabelColumn, Labels
from edgemin.tasks.table import KINDS

MOST = 1000  # sentences, evenly spaced over what there is
_RANDOM = 32
_BATCH = 16
Texts = Sequence[tuple[str, ...]]


class Inputs(NamedTuple):
    """What two runtimes of one model are to answer.

    Attributes:
        batches: of arrays [B, T].
        origin: what these are, in words that follow a number: `sentences of sst2 (validation)`.
        kind: of the task.
        labels: of all examples in the order of the batches; `None` where they are not known.
        metrics: what the labels are scored by, the first one leads.
    """

    batches: list[Batch]
    origin: str
    kind: Kind
    labels: Labels | None = None
    metrics: tuple[str, ...] = ()

    def compared(self, mine: NDArray[np.float32], theirs: NDArray[np.float32], outputs: int) -> dict[str, Any]:
        """How far two sets of logits [N, C] are apart, and what the second scores.

        Returns:
            `examples`, `inputs` (what they are), `largest_difference` of two logits, `largest_logit` of the first set
            (its absolute value), `agreement` (share of equal answers; `None` where answers are numbers), `metrics`
            (empty without labels).
        """
        one, other = torch.from_numpy(mine), torch.from_numpy(theirs)
        flips, scores = self.kind.flips(one, other), dict[str, float]()
        if self.labels is not None:
            scores = self.kind.score(other, torch.from_numpy(self.labels), self.metrics, outputs)
        return {
            "examples": len(mine),
            "inputs": self.origin,
            "largest_difference": float(np.abs(mine - theirs).max()),
            "largest_logit": float(np.abs(mine).max()),
            "agreement": None if flips is None else 1 - flips / len(mine),
            "metrics": scores,
        }


def find(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    provenance: Mapping[str, Any],
    texts: Path | None = None,
    length: int | None = None,
) -> Inputs:
    """The sentences of a file, else those of the task as far as its data can still be read, else random tokens.

    Args:
        model: the artifact's.
        tokenizer: the artifact's; it is told to cut and to pad.
        provenance: the artifact's, which says what data it was made with.
        texts: a file with the columns that the model was trained on; with the column of labels they are scored too.
        length: of all inputs; `None`: any.

    Raises:
        UserError: the file cannot be read, or has not got the columns.
    """
    recorded = provenance.get("task") or {}
    kind = next(kind for kind in KINDS.values() if kind.problem_type == (model.config.problem_type or _ONE_LABEL))
    if texts is not None:
        found, labels = _of_file(texts, recorded, kind, parts.label_names(model))
        origin, metrics = f"sentences of {texts.name}", kind.metrics(len(parts.label_names(model)))
    else:
        try:
            found, labels, origin, metrics = _of_task(recorded, parts.label_names(model))
        except UserError as error:
            return Inputs(_random(model, length), f"inputs of random tokens ({error})", kind)
    longest = min(length or torch_eager.longest(model), recorded.get("max_length") or torch_eager.longest(model))
    order = sorted(range(len(found)), key=lambda row: sum(map(len, found[row])))
    batches = [*_batches([found[row] for row in order], tokenizer, longest, length)]
    return Inputs(batches, origin, kind, None if labels is None else labels[order], metrics)


_ONE_LABEL = "single_label_classification"  # what transformers takes a model for that says nothing


def _of_task(recorded: Mapping[str, Any], names: Sequence[str]) -> tuple[Texts, Labels, str, tuple[str, ...]]:
    """Evenly spaced examples of the first split that is reported.

    Raises:
        UserError: why there are none.
    """
    if "evaluation_splits" not in recorded or recorded["name"] == "none":
        raise UserError("the artifact records no data; texts=<file> gives some")
    try:
        splits = load(Task(**recorded))
    except UserError as error:
        raise UserError(f"the data of {recorded['name']} cannot be read: {error}") from error
    if [*splits.labels] != [*names]:
        raise UserError(f"the data of {recorded['name']} has other labels than the model by now")
    split, examples = next(iter(splits.evaluation.items()))
    rows = np.unique(np.linspace(0, len(examples) - 1, min(MOST, len(examples))).round().astype(np.int64))
    chosen = examples.take(rows)
    return chosen.texts, chosen.labels, f"sentences of {recorded['name']} ({split})", splits.metrics


def _of_file(file: Path, recorded: Mapping[str, Any], kind: Kind, names: Sequence[str]) -> tuple[Texts, Labels | None]:
    """The first examples of a file; labels where it has their column."""
    columns, label = recorded.get("text_columns") or ["text"], recorded.get("label_column", "label")
    try:
        rows = list(next(row_files.read(file), []))[:MOST]
    except UserError as error:
        raise UserError(f"texts: {str(error).removeprefix('input: ')}") from error
    if not rows:
        raise UserError(f"texts: expected a file with rows, given {file} without any")
    there = list(dict.fromkeys(chain.from_iterable(rows)))
    for column in columns:
        if column not in there:
            raise UserError(f"texts: expected a column {column}, as the model was trained on, given {', '.join(there)}")
    found: list[tuple[str, ...]] = []
    for number, row in enumerate(rows, start=1):
        texts: tuple[Any, ...] = tuple(row.get(column) for column in columns)
        for text in texts:
            check("texts", text, f" in row {number} of {file}")
        found.append(texts)
    if label not in there:
        return found, None
    try:
        return found, kind.read(LabelColumn(label, file.name, [row.get(label) for row in rows]), names)
    except UserError as error:
        raise UserError(f"texts: {error}") from error


def _batches(texts: Texts, tokenizer: PreTrainedTokenizerBase, longest: int, length: int | None) -> Iterator[Batch]:
    size = 1 if length else _BATCH
    for start in range(0, len(texts), size):
        columns = [list(column) for column in zip(*texts[start : start + size], strict=True)]
        found = tokenizer(*columns, truncation=True, max_length=longest, padding="longest", return_tensors="np")
        ids = np.asarray(found["input_ids"], np.int64)
        more = ((0, 0), (0, max(0, (length or 0) - ids.shape[1])))  # inputs may be cut shorter than the fixed length
        types = np.asarray(found.get("token_type_ids", np.zeros_like(ids)), np.int64)
        yield {
            "input_ids": np.pad(ids, more, constant_values=tokenizer.pad_token_id),
            "attention_mask": np.pad(np.asarray(found["attention_mask"], np.int64), more),
            "token_type_ids": np.pad(types, more),
        }


def _random(model: PreTrainedModel, length: int | None) -> list[Batch]:
    """Tokens of many lengths, rare pieces too, some padded."""
    draw = np.random.default_rng(0)
    vocabulary, longest = quantized.outline(model).vocabulary, length or torch_eager.longest(model)
    batches: list[Batch] = []
    for number in range(_RANDOM):
        tokens = length or int(draw.integers(2, min(longest, 128) + 1))
        ids = draw.integers(0, vocabulary, (1, tokens))
        mask = np.ones_like(ids)
        if number % 2:
            mask[:, (tokens + 1) // 2 :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return batches
