r"""What a difference of two models is worth: tests and intervals as functions of numbers and arrays.

Two things limit what a table can say: it has few seeds, and few examples. An interval here is for new seeds and for new
examples at once. With $m_s$ what is compared in seed $s$ of $S$, its sample variance $s^2$, and $c$ the mean covariance
that two seeds share because they answered the same examples, the mean over seeds has the variance

$$V = s^2 / S + \max(c, 0), \qquad df = (S - 1) V / (s^2 / S)$$

The variance is Obuchowski and Rockette's (1995): readers of the same X-rays are seeds that answer the same sentences.
Satterthwaite's degrees of freedom (Hillis 2007) have the square of that last ratio; with three seeds, where it is
poorly known, their intervals cover 92 to 94 % instead of 95 % in simulations, those of the ratio itself 94 to 97 %.
Where seeds share nothing, this is the t interval over seeds. One model alone, or one pair of models, has an interval
for new examples only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import ttost_paired

from edgemin.errors import UserError
from edgemin.report.scores import Answers, Numbers, score

LEVEL = 0.95
"""How often an interval holds the truth."""
CHANCE = 1 - LEVEL
"""A difference that comes about by chance more often is noise."""
DRAWS = 2000
_AT_ONCE = 2_000_000  # numbers that a bootstrap holds at a time: 16 MB
_AGREE_BY_CHANCE = 0.05


@dataclass(frozen=True)
class Spread:
    """How far an estimate may be from the truth.

    Args:
        error: its standard error.
        df: the degrees of freedom of that.
        share: how much of its variance comes from the examples; the rest comes from the seeds.
    """

    error: float
    df: float = math.inf
    share: float = 1.0

    @property
    def of_examples(self) -> Spread:
        """What of it comes from the examples: how far it would be with very many seeds."""
        return Spread(self.error * math.sqrt(self.share))

    def around(self, estimate: float) -> tuple[float, float]:
        """The ends of the 95 % interval."""
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.df)) * self.error
        return estimate - half, estimate + half

    def p(self, estimate: float) -> float:
        """The two-sided p of the hypothesis that the truth is 0."""
        return float(2 * stats.t.sf(abs(estimate) / self.error, self.df)) if self.error > 0 else float(estimate == 0)

    def p_equivalent(self, estimate: float, margin: float) -> float:
        """The p of the hypothesis that the truth is at least a margin from 0: two one-sided t tests (Schuirmann 1987).

        Below 0.05 exactly where the 90 % interval lies within the margin.
        """
        beyond = abs(estimate) - margin
        return float(stats.t.cdf(beyond / self.error, self.df)) if self.error > 0 else float(beyond >= 0)


def check_margin(margin: float) -> float:
    """The margin, a share between 0 and 1.

    Raises:
        UserError: it is not.
    """
    if not 0 < margin < 1:
        raise UserError(f"margin: expected a fraction above 0 and below 1 (0.01 is one point), given {margin}")
    return margin


def mcnemar_mid_p(lost: int, gained: int) -> float:
    r"""Whether two models answer equally well: McNemar's mid-p of the examples that only one of them has right.

    $p_{exact} - \binom{b + c}{b} / 2^{b + c}$ (Fagerland, Lydersen and Laake 2013): the exact test is far too careful.

    Args:
        lost: examples that only the first has right, b.
        gained: those that only the second has right, c.
    """
    exact = float(mcnemar([[0, lost], [gained, 0]], exact=True).pvalue)
    return exact - float(stats.binom.pmf(min(lost, gained), lost + gained, 0.5)) if lost + gained else 1.0


def paired_proportions(lost: int, gained: int, examples: int) -> tuple[float, Spread]:
    r"""The difference of two models' accuracies on the same examples, for the interval around it.

    With $p_b = (b + 1) / (n + 2)$ and $p_c = (c + 1) / (n + 2)$ it is $p_c - p_b$, its variance
    $(p_b + p_c - (p_c - p_b)^2) / (n + 2)$ (Bonett and Price 2012, recommended by Fagerland, Lydersen and Laake 2014):
    two models with the same answers are not known to be equal.

    Args:
        lost: examples that only the first has right, b.
        gained: those that only the second has right, c.
        examples: n.
    """
    only_first, only_second = (lost + 1) / (examples + 2), (gained + 1) / (examples + 2)
    difference = only_second - only_first
    return difference, Spread(math.sqrt((only_first + only_second - difference**2) / (examples + 2)))


def proportion_interval(right: int, examples: int) -> tuple[float, float]:
    """Wilson's (1927) interval of an accuracy."""
    low, high = proportion_confint(right, examples, alpha=CHANCE, method="wilson")
    return float(low), float(high)


def seeds_alone(values: Sequence[float]) -> Spread:
    """The t interval over seeds: it holds what more seeds would give on these very examples.

    Args:
        values: of each seed, at least two, as one says nothing about others.
    """
    assert len(values) > 1, "of one seed there is an interval for other examples alone"
    return Spread(float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1, 0.0)


def shared_by_seeds(per_example: Numbers) -> Numbers:
    """The covariance `[S, S]` of the means over examples that seeds have because they answered the same ones.

    As Bonett and Price do for one pair, each seed counts two examples more, one lost and one gained: seeds without a
    difference are not known to have none.

    Args:
        per_example: `[S, N]`: 0 or 1, or a difference of these.
    """
    seeds, examples = per_example.shape
    shared = np.cov(per_example).reshape(seeds, seeds) / examples
    return np.asarray(shared + 2 / examples**2 * np.eye(seeds))


def over_seeds(values: Sequence[float], shared: Numbers) -> Spread:
    """How far the mean over seeds may be from what new seeds on new examples would give (equation above).

    Three seeds may agree by chance far better than their examples allow. The sample variance is never taken to be less
    than what one such draw of twenty falls below, were all of it noise of the examples.

    Args:
        values: of each seed, at least two.
        shared: `[S, S]`, the covariance that these have because of their examples.
    """
    alone = seeds_alone(values)
    seeds = len(values)
    own = float(np.trace(shared)) / seeds
    common = max((float(shared.sum()) - seeds * own) / (seeds * (seeds - 1)), 0.0)
    least = max(own - common, 0.0) * float(stats.chi2.ppf(_AGREE_BY_CHANCE, seeds - 1)) / (seeds - 1)
    between = max(seeds * alone.error**2, least)
    variance = between / seeds + common
    if variance == 0:
        return Spread(0.0, seeds - 1)
    df = (seeds - 1) * seeds * variance / between if between > 0 else math.inf
    of_examples = (max(own - common, 0.0) / seeds + common) / variance
    return Spread(math.sqrt(variance), df, min(of_examples, 1.0))


def resamples(metric: str, models: Sequence[Answers], labels: NDArray[np.generic]) -> Numbers:
    """A metric of each of several models on the same resampled examples, `[models, DRAWS]`: a paired bootstrap.

    Examples with equal labels and equal answers of all models are drawn together: as many of each sort as a multinomial
    distribution gives, which is what drawing them one by one comes to.
    """
    columns = [labels.reshape(len(labels), -1), *(said.reshape(len(labels), -1) for said in models)]
    sorts, first, counts = np.unique(np.concatenate(columns, 1), axis=0, return_index=True, return_counts=True)
    rng = np.random.default_rng(0)
    found = []
    for begin in range(0, DRAWS, step := max(1, _AT_ONCE // len(sorts))):
        drawn = rng.multinomial(len(labels), counts / len(labels), size=min(step, DRAWS - begin)).astype(np.float64)
        found.append(np.stack([score(metric, said[first], labels[first], drawn) for said in models]))
    return np.concatenate(found, 1)


def percentiles(draws: Numbers) -> tuple[float, float]:
    """The ends of the 95 % percentile interval of a bootstrap (Efron 1979)."""
    low, high = np.nanquantile(draws, [CHANCE / 2, 1 - CHANCE / 2])
    return float(low), float(high)


def bootstrap_p(draws: Numbers) -> float:
    """Twice the share of the resampled differences on the rarer side of 0, or at it."""
    known = draws[~np.isnan(draws)]
    rarer = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(known) + 1))


def tost(per_example: Numbers, margin: float) -> float:
    """The p of the hypothesis that a mean over examples is at least a margin from 0, by statsmodels.

    Args:
        per_example: `[N]`: differences of correctness, averaged over seeds.
        margin: a fraction.
    """
    if len(per_example) < 2 or np.ptp(per_example) == 0:
        return float(abs(per_example.mean()) >= margin)
    return float(ttost_paired(per_example, np.zeros_like(per_example), -margin, margin)[0])


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) correction over a family of tests."""
    return [float(one) for one in multipletests(p, method="holm")[1]] if p else []
