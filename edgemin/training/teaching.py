"""Whom a student learns from, and on what text: the settings of every distillation beside its budget."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemin.config import Checked
from edgemin.errors import UserError

if TYPE_CHECKING:
    from edgemin.data.corpus import Corpus
    from edgemin.data.mixture import Mixture

# What reads a corpus. Found by its name, so that only the keys of what is trained on a corpus have it.
CORPUS_READER = "edgemin.data.packing"
# Settings that nothing reads where there is no corpus.
OF_A_CORPUS = ("corpus_subset", "corpus_split", "corpus_column", "corpus_length")


def corpus_reader() -> Any:
    """The module that reads a corpus."""
    return importlib.import_module(CORPUS_READER)


@dataclass(frozen=True)
class Teaching(Checked):
    """Whom a student learns from, and on what.

    Attributes:
        teacher: `teacher`, another model of the study, or `<model>.source` for its weights as they came; a list where
            the method takes several. `None` is `teacher`, with a corpus `teacher.source`.
        teacher_cache: compute what is read of the teachers once, before training, and read it from disk (memory-mapped,
            shared by every job on the same data). Worth it where the training set is passed over several times, or by
            several jobs. More than 8 GiB of them are refused, once the texts are tokenized.
        corpus: unlabelled text instead of the task's sentences: a Hub id or a local directory of text or parquet, or
            several of these. The result then does not depend on the task.
        corpus_weights: of several, how many of the sequences are of each, up to a factor; `None`: equally many.
        corpus_subset: the configuration inside a Hub data set; of several corpora, one for all or a list.
        corpus_split: the split that is read; likewise.
        corpus_column: the column of the texts; likewise.
        corpus_length: tokens of a packed sequence.
    """

    teacher: str | list[str] | None = None
    teacher_cache: bool = False
    corpus: str | list[str] | None = None
    corpus_weights: list[float] | None = None
    corpus_subset: str | list[str | None] | None = None
    corpus_split: str | list[str] = "train"
    corpus_column: str | list[str] = "text"
    corpus_length: int = 512

    @property
    def teachers(self) -> tuple[str, ...]:
        """The models that are learnt from.

        Raises:
            UserError: none, or one twice.
        """
        if self.teacher is None:
            return ("teacher.source" if self.corpus is not None else "teacher",)
        names = (self.teacher,) if isinstance(self.teacher, str) else tuple(self.teacher)
        if not names or len(set(names)) < len(names):
            raise UserError(f"teacher: expected distinct models, at least one, given {list(names)}")
        return names

    def read_corpus(self) -> Corpus | Mixture | None:
        """The corpus, not opened yet.

        Raises:
            UserError: its settings cannot be.
        """
        if self.corpus is None:
            if self.corpus_weights is not None:
                raise UserError(f"corpus_weights: expected null without a corpus, given {self.corpus_weights}")
            return None
        where = {"subset": self.corpus_subset, "split": self.corpus_split, "column": self.corpus_column}
        read = importlib.import_module("edgemin.data.mixture").read_corpus  # which the reader imports
        found: Corpus | Mixture = read(self.corpus, self.corpus_weights, self.corpus_length, **where)
        return found
