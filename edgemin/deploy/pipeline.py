"""A model ready to answer texts: an artifact in torch, or a bundle in its runtime, and then without torch.

Answers have the form and the numbers of transformers' text-classification pipeline: the softmax of the logits where one
of several labels is right, the sigmoid of each where any number of them may be, the number itself in a regression.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from edgemin.deploy.runtime import Runtime, open_model
from edgemin.deploy.served import TOKENIZER, Served, described, text_settings
from edgemin.errors import UserError, first_line
from edgemin.plain_text import is_text

if TYPE_CHECKING:
    from edgemin.deploy.torch_eager import TorchEager

log = logging.getLogger(__name__)

Texts = tuple[str, ...]  # of one example: one, or the two of a pair
DELIMITER = "|"  # between the labels of an example that has several, as the files of such a task have it
_BATCH = 32
_LONG = 16  # characters for each token of the longest input; below that a text is at most somewhat too long
_PAD_TO = 8  # few distinct widths: a runtime prepares itself for each


class Answers(NamedTuple):
    """What a model answers to some examples.

    Attributes:
        labels: of each: a label, several with `|` between (empty where there is none), or a number.
        scores: of each: the probability that the model gives to exactly this answer, or the number itself.
        cut: the examples that were too long, by their place.
    """

    labels: list[str | float]
    scores: list[float]
    cut: list[int]


class Pipeline:
    """Answers texts.

    Args:
        served: what is known of the model.
        runtime: the model, opened.
        tokenizer: of the model; it is told to cut what is too long.
    """

    def __init__(self, served: Served, runtime: Runtime, tokenizer: Tokenizer) -> None:
        assert served.max_length is not None
        self.served, self._runtime, self._tokenizer = served, runtime, tokenizer
        tokenizer.no_padding()
        tokenizer.enable_truncation(served.max_length, direction=served.truncation_side)

    def __call__(self, inputs: Any, *, top_k: int | EllipsisType | None = ...) -> Any:
        """Answer as transformers' text-classification pipeline does.

        Args:
            inputs: a text, a pair as `{"text": ..., "text_pair": ...}`, or a list of them.
            top_k: how many labels to give, the likeliest first; `None`: all. Left out: the likeliest alone.

        Returns:
            `[{"label": ..., "score": ...}]` for a text, one such dict for a pair, a list of them for a list; with
            `top_k` a list of labels in the place of each.

        Raises:
            UserError: an input is empty or no text, or `top_k` is not a number above 0.
        """
        if top_k is not ... and top_k is not None and (type(top_k) is not int or top_k < 1):
            raise UserError(f"top_k: expected a whole number of at least 1, or None, given {top_k!r}")
        many = isinstance(inputs, list | tuple)
        given = [*inputs] if many else [inputs]
        places = [f" (input {place})" if many else "" for place in range(1, len(given) + 1)]
        logits, cut = self._logits([self._texts(one, where) for one, where in zip(given, places, strict=True)])
        for place in cut:
            log.warning("a text is longer than %d tokens and is cut%s", self.served.max_length, places[place])
        found = [self._ranked(row) for row in self._probabilities(logits)]
        if top_k is ...:
            best = [row[0] for row in found]
            return best[0] if isinstance(inputs, Mapping) else best
        cropped = [row[:top_k] for row in found]
        return cropped if many else cropped[0]

    def answers(self, examples: Sequence[Texts]) -> Answers:
        """The answers as the kind of task has them, which for any number of labels is all that are likely.

        Args:
            examples: the texts of each, none of them empty.
        """
        logits, cut = self._logits(examples)
        values = self._probabilities(logits)
        if self.served.problem_type == "regression":
            numbers = [float(value) for value in values[:, 0]]
            return Answers([*numbers], numbers, cut)
        if self.served.problem_type == "multi_label_classification":
            chosen = [[self._label(index) for index in np.flatnonzero(row > 0)] for row in logits]
            return Answers(
                [DELIMITER.join(labels) for labels in chosen], np.maximum(values, 1 - values).prod(1).tolist(), cut
            )
        return Answers([self._label(index) for index in values.argmax(1)], values.max(1).tolist(), cut)

    def _texts(self, given: Any, where: str) -> Texts:
        """The texts of one input from Python."""
        texts: tuple[Any, ...] = (given,)
        if isinstance(given, Mapping):
            if "text" not in given or given.keys() - {"text", "text_pair"}:
                found = ", ".join(map(str, given)) or "none"
                raise UserError(f"text: expected the keys text and text_pair, given {found}{where}")
            texts = tuple(given[name] for name in ("text", "text_pair") if given.get(name) is not None)
        check_example(texts, self.served.texts, where)
        return texts

    def _logits(self, examples: Sequence[Texts]) -> tuple[NDArray[np.float64], list[int]]:
        """The logits [N, C], and which examples were cut."""
        shorter = [tuple(map(self._shortened, texts)) for texts in examples]
        encodings = self._tokenizer.encode_batch_fast([texts if len(texts) > 1 else texts[0] for texts in shorter])
        order = sorted(range(len(examples)), key=lambda place: len(encodings[place].ids))
        size = 1 if self.served.length else _BATCH
        batches = (order[start : start + size] for start in range(0, len(order), size))
        found = [self._runtime.answers(self._batch([encodings[row] for row in rows])) for rows in batches]
        sorted_logits = np.concatenate([*found, np.zeros((0, found[0].shape[1] if found else 1))])
        logits = np.empty_like(sorted_logits)
        logits[order] = sorted_logits
        return logits, [place for place, encoding in enumerate(encodings) if encoding.overflowing]

    def _shortened(self, text: str) -> str:
        """A text that is far too long, as much of it as can matter: tokens for two inputs.

        To cut a pair of long texts, the tokenizer forms all pairs of their parts.
        """
        assert self.served.max_length is not None
        if len(text) <= _LONG * self.served.max_length:
            return text
        parts = self._tokenizer.encode(text).overflowing  # the first stands beside what is kept
        if len(parts) < 2:
            return text
        if self.served.truncation_side == "left":
            return text[min(start for start, end in parts[0].offsets if end) :]  # special tokens end at 0
        return text[: max(end for _, end in parts[0].offsets)]

    def _batch(self, encodings: Sequence[Encoding]) -> dict[str, NDArray[np.int64]]:
        """Padded to the longest, rounded up, or to the fixed length."""
        longest = max(len(encoding.ids) for encoding in encodings)
        assert self.served.max_length is not None
        width = self.served.length or min(-(-longest // _PAD_TO) * _PAD_TO, self.served.max_length)
        shape = len(encodings), width
        ids = np.full(shape, self.served.pad_id, dtype=np.int64)
        mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, encoding in enumerate(encodings):
            tokens = len(encoding.ids)
            ids[row, :tokens], mask[row, :tokens] = encoding.ids, 1
            if self.served.token_types:
                types[row, :tokens] = encoding.type_ids
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

    def _probabilities(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of each label, [N, C]; in a regression the numbers themselves."""
        if self.served.problem_type == "regression":
            return logits
        if self.served.problem_type == "multi_label_classification" or logits.shape[1] == 1:
            return cast("NDArray[np.float64]", np.exp(-np.logaddexp(0, -logits)))
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return cast("NDArray[np.float64]", shares / shares.sum(1, keepdims=True))

    def _ranked(self, values: NDArray[np.float64]) -> list[dict[str, Any]]:
        """All labels of one example, the likeliest first."""
        order = np.argsort(-values, kind="stable")
        return [{"label": self._label(index), "score": float(values[index])} for index in order]

    def _label(self, index: int | np.int64) -> str:
        return self.served.labels.get(int(index), f"LABEL_{index}")  # what transformers calls one without a name


def check(name: str, text: Any, where: str = "") -> None:
    """Refuse what is no text.

    Args:
        name: what the user calls it.
        text: from anywhere.
        where: the place that it stands in, for messages.

    Raises:
        UserError: it is empty or no text.
    """
    if not isinstance(text, str):
        raise UserError(f"{name}: expected a text, given a {type(text).__name__}{where}")
    if not text.strip():
        raise UserError(f"{name}: expected a text, given an empty one{where}")
    if not is_text(text):
        raise UserError(f"{name}: expected a text in UTF-8, given half a character (a lone surrogate){where}")


def check_example(texts: Sequence[Any], expected: int | None, where: str = "") -> None:
    """Refuse an example that a model cannot answer.

    Args:
        texts: one, or the two of a pair.
        expected: how many the model takes, where that is known.
        where: the place that it stands in, for messages.

    Raises:
        UserError: there are not as many as the model takes, or one is empty or no text.
    """
    if expected is not None and len(texts) != expected:
        wanted = "a second text, as the model takes pairs" if expected == 2 else "nothing, as the model takes one text"
        raise UserError(f"text_pair: expected {wanted}, given {'one' if len(texts) == 2 else 'none'}{where}")
    for name, text in zip(("text", "text_pair"), texts, strict=False):
        check(name, text, where)


def open_pipeline(served: Served, threads: int = 0) -> Pipeline:
    """Open a model that was described.

    Raises:
        UserError: the runtime is not installed, or a file is missing or damaged.
    """
    file = served.path / TOKENIZER
    if not file.is_file():
        raise UserError(f"model: expected a file {TOKENIZER} in {served.path}, found none")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare ones
        raise UserError(f"model: {file} is damaged ({first_line(error)})") from error
    runtime = open_model(served.runtime, served.path, threads)
    if served.runtime == "torch":
        opened = cast("TorchEager", runtime)
        served = replace(served, max_length=min(served.max_length or opened.longest(), opened.longest()))
        if opened.tokenizer is not None:
            served = replace(served, **text_settings(opened.tokenizer))
    return Pipeline(served, runtime, tokenizer)


def pipeline(path: str | Path, *, threads: int = 0) -> Pipeline:
    """Open an artifact or a bundle: a callable that answers texts as transformers' text-classification pipeline does.

    Args:
        path: the artifact's or the bundle's directory.
        threads: of one inference; 0: as many as the runtime chooses.

    Raises:
        UserError: it is neither, its runtime is not installed, or a file is missing or damaged.
    """
    if type(threads) is not int or threads < 0:
        raise UserError(f"threads: expected a whole number of at least 0, given {threads!r}")
    return open_pipeline(described(Path(path)), threads)
