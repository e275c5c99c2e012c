"""Rows beside one another on the same examples, seed by seed: estimates and intervals from stored predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemin.errors import UserError
from edgemin.report import scores, stored
from edgemin.report import statistics as st
from edgemin.report.fields import Row
from edgemin.report.fold import Line
from edgemin.report.schema import Run
from edgemin.report.scores import Answers, Numbers
from edgemin.report.statistics import Spread

MCNEMAR, BOOTSTRAP, OVER_SEEDS = "McNemar's mid-p", "paired bootstrap", "t over seeds and examples"
Models = tuple[tuple[Run, Row], ...]
"""A job and its row for each of several rows that are compared."""


@dataclass(frozen=True)
class Score:
    """A metric of stored predictions: its task, split and name, and the runtime that answered (None: torch)."""

    task: str
    split: str
    metric: str
    runtime: str | None = None


@dataclass(frozen=True)
class Estimate:
    """A metric of one row, or a sum and difference of those of several, and what limits how well it is known.

    Args:
        values: of each seed that has models of its own; one where all seeds share them.
        low: the lower end of the 95 % interval.
        high: its upper end.
        p: of the hypothesis that the truth is 0.
        examples: how many were answered.
        test: which test `p` is of.
        spread: the standard error, its degrees of freedom, and the share of the examples in it.
        per_example: of an accuracy, the same for each example, averaged over seeds, `[N]`.
    """

    values: tuple[float, ...]
    low: float
    high: float
    p: float
    examples: int
    test: str
    spread: Spread
    per_example: Numbers | None

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return math.fsum(self.values) / len(self.values)

    def p_equivalent(self, margin: float) -> float:
        """The p of the hypothesis that the truth is at least a margin from 0, in new examples and in new seeds.

        Of an accuracy it is the larger one of two: that of its examples (their correctness averaged over seeds, paired)
        and that of the spread, so that nothing is equivalent whose interval says otherwise.
        """
        own = self.spread.p_equivalent(self.value, margin)
        return own if self.per_example is None else max(own, st.tost(self.per_example, margin))


def estimate(terms: Sequence[tuple[float, Line]], score: Score) -> Estimate | None:
    """A weighted sum of a metric over rows: one row alone, a difference of two, an interaction of four.

    Seeds in which all rows are the same models count once: a teacher that all seeds share is one model.

    Args:
        terms: weights, and rows with their seeds; seeds that not all of them have are left out.
        score: the metric.

    Returns:
        None where predictions are missing.

    Raises:
        UserError: the rows are of different tasks, predictions are not of the examples that the metric was computed
            of, or the seeds answered different ones.
    """
    weights = [weight for weight, _ in terms]
    answered = [_answered(models, score) for models in distinct([line for _, line in terms])]
    known = [one for one in answered if one is not None]
    if not known or len(known) < len(answered):
        return None
    labels = known[0][0]
    if any(not np.array_equal(labels, others) for others, _ in known):
        raise UserError(f"{terms[0][1].runs[0].file}: expected the same examples of {score.task} in all seeds")
    said = [models for _, models in known]
    if score.metric == "accuracy":
        return _of_accuracy(weights, said, labels)
    return _of_metric(weights, said, labels, score.metric)


def missing(run: Run) -> list[str]:
    """The names of the rows whose predictions run.json names, but which are not there."""
    task, split = run.task.name, run.first_split
    if task is None or split is None:
        return []
    named = (row for row in run.rows if row.predictions is not None)
    return [row.name for row in named if stored.answers(run, row, task, split) is None]


def distinct(lines: Sequence[Line]) -> list[Models]:
    """The models that several rows have in each seed, those that are the same in several seeds once.

    Left out are seeds that not all rows have, and those in which one of the rows is several models: a row that several
    jobs share cannot be compared with one that they do not share.
    """
    by_seed = [line.seeds for line in lines]
    found: dict[tuple[object, ...], Models] = {}
    for seed in by_seed[0]:
        here = [seeds[seed] for seeds in by_seed if seed in seeds]
        if len(here) == len(lines) and all(len(line.models.rows) == 1 for line in here):
            models = tuple((line.runs[0], line.rows[0]) for line in here)
            found.setdefault(tuple(row.artifact or id(row) for _, row in models), models)
    return list(found.values())


def _answered(models: Models, score: Score) -> tuple[NDArray[Any], list[Answers]] | None:
    """The labels, and what each model answers."""
    tasks = {run.task.name: row.name for run, row in models}
    if len(tasks) > 1:
        named = " and ".join(f'"{name}" of {task}' for task, name in tasks.items())
        raise UserError(f"{models[0][0].file}: expected rows of one task to compare, given {named}")
    labels, said = None, []
    for run, row in models:
        examples = stored.examples(run, score.task, score.split)
        logits = stored.answers(run, row, score.task, score.split, score.runtime)
        if examples is None or logits is None:
            return None
        if labels is not None and not np.array_equal(labels, examples.labels):
            raise UserError(f"{run.file}: expected the examples of {score.task} that {models[0][0].file} has")
        labels = examples.labels
        _check_length(run, row, score, len(labels))
        said.append(scores.answers(logits, labels))
    return (labels, said) if labels is not None else None


def _check_length(run: Run, row: Row, score: Score, examples: int) -> None:
    counted = row.score(score.task, score.split, "n")
    if counted is not None and counted != examples:
        raise UserError(
            f"{run.file.parent / 'predictions'}: expected predictions of the {counted:.0f} examples of {score.task} "
            f"{score.split} that {run.file.name} counts, given {examples}"
        )


def _of_accuracy(weights: Sequence[float], said: Sequence[Sequence[Answers]], labels: NDArray[Any]) -> Estimate:
    """From the examples that each model has right."""
    right = np.array([[scores.right(one, labels) for one in models] for models in said])  # [S, terms, N]
    per_example = np.einsum("t,stn->sn", np.array(weights), right)
    values, examples = tuple(per_example.mean(1).tolist()), len(labels)
    if len(said) > 1:
        return _over_seeds(values, st.shared_by_seeds(per_example), examples, per_example.mean(0))
    if len(weights) == 1:
        low, high = st.proportion_interval(int(right.sum()), examples)
        spread = Spread(math.sqrt(values[0] * (1 - values[0]) / examples))
        return Estimate(values, low, high, spread.p(values[0]), examples, "", spread, per_example[0])
    if tuple(weights) == (1.0, -1.0):
        lost, gained = int((per_example < 0).sum()), int((per_example > 0).sum())
        centre, spread = st.paired_proportions(lost, gained, examples)
        p = st.mcnemar_mid_p(lost, gained)
        return Estimate(values, *spread.around(centre), p, examples, MCNEMAR, spread, per_example[0])
    spread = Spread(math.sqrt(float(st.shared_by_seeds(per_example)[0, 0])), examples - 1)
    p = spread.p(values[0])
    return Estimate(values, *spread.around(values[0]), p, examples, "t over examples", spread, per_example[0])


def _of_metric(
    weights: Sequence[float], said: Sequence[Sequence[Answers]], labels: NDArray[Any], metric: str
) -> Estimate | None:
    """From a bootstrap over examples, all models on the same ones; None of a metric that no draw has a value of."""
    shape = len(said), len(weights)
    models = [one for models in said for one in models]
    once = np.ones((1, len(labels)))
    found = np.array([scores.score(metric, one, labels, once)[0] for one in models]).reshape(shape)
    draws = st.resamples(metric, models, labels).reshape(*shape, -1)
    values = tuple((found @ weights).tolist())
    drawn = np.einsum("t,std->sd", np.array(weights), draws)
    drawn = drawn[:, ~np.isnan(drawn).any(0)]
    if drawn.shape[1] < 2:
        return None
    if len(said) > 1:
        return _over_seeds(values, np.cov(drawn), len(labels), None)
    spread = Spread(float(drawn.std(ddof=1)))
    return Estimate(values, *st.percentiles(drawn), st.bootstrap_p(drawn), len(labels), BOOTSTRAP, spread, None)


def _over_seeds(values: tuple[float, ...], shared: Numbers, examples: int, per_example: Numbers | None) -> Estimate:
    spread = st.over_seeds(values, shared)
    mean = math.fsum(values) / len(values)
    return Estimate(values, *spread.around(mean), spread.p(mean), examples, OVER_SEEDS, spread, per_example)


def reference(line: Line, name: str) -> Line | None:
    """A row's `parent`, or the first row of a model, in each of its jobs; None where any of them has none."""
    found = [run.reference(name, row) for run, row in zip(line.runs, line.rows, strict=True)]
    rows = tuple(row for row in found if row is not None)
    return Line(line.runs, rows) if len(rows) == len(found) else None
