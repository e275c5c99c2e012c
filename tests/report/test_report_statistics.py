"""Tests and intervals against scipy and examples worked by hand; what share of the intervals holds the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

from edgemin.errors import UserError
from edgemin.report import scores
from edgemin.report import statistics as st
from edgemin.report.scores import Numbers
from edgemin.tasks.classification import Classification
from edgemin.tasks.multi_label import MultiLabel


def test_mcnemar_by_hand_and_in_the_paper() -> None:
    # Fagerland, Lydersen and Laake 2013, airway hyper-responsiveness: 1 and 7 discordant pairs, mid-p 0.039.
    assert st.mcnemar_mid_p(1, 7) == pytest.approx(2 * (1 + 8) / 2**8 - 8 / 2**8) == pytest.approx(0.0391, abs=1e-4)
    assert st.mcnemar_mid_p(7, 1) == st.mcnemar_mid_p(1, 7)
    assert st.mcnemar_mid_p(0, 0) == 1 and st.mcnemar_mid_p(6, 6) == pytest.approx(1 - math.comb(12, 6) / 2**12)
    for lost, gained in ((3, 11), (20, 31), (40, 12)):
        exact = stats.binomtest(lost, lost + gained).pvalue
        assert st.mcnemar_mid_p(lost, gained) == pytest.approx(exact - stats.binom.pmf(lost, lost + gained, 0.5))


def test_the_interval_of_a_pair_by_hand() -> None:
    centre, spread = st.paired_proportions(8, 3, 98)
    assert centre == pytest.approx((4 - 9) / 100)
    assert spread.error == pytest.approx(math.sqrt((0.13 - 0.05**2) / 100))
    assert spread.around(centre) == pytest.approx((-0.05 - 1.959964 * spread.error, -0.05 + 1.959964 * spread.error))
    assert st.paired_proportions(0, 0, 872)[1].error > 0, "two models with the same answers are not known to be equal"


def test_wilson_by_hand() -> None:
    low, high = st.proportion_interval(10, 10)
    assert high == pytest.approx(1) and low == pytest.approx(10 / (10 + 1.959964**2))


def test_holm_by_hand() -> None:
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert st.holm([]) == []


def test_equivalence_is_that_of_scipy_and_of_the_90_percent_interval() -> None:
    drawn = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], p=[0.01, 0.975, 0.015], size=872)
    lower = stats.ttest_1samp(drawn, -0.01, alternative="greater").pvalue
    upper = stats.ttest_1samp(drawn, 0.01, alternative="less").pvalue
    assert st.tost(drawn, 0.01) == pytest.approx(max(lower, upper))
    spread = st.Spread(float(stats.sem(drawn)), 871)
    assert spread.p_equivalent(float(drawn.mean()), 0.01) == pytest.approx(max(lower, upper))
    half = float(stats.t.ppf(0.95, 871)) * spread.error
    assert spread.p_equivalent(0.01 - half, 0.01) == pytest.approx(0.05)
    assert st.tost(np.zeros(9), 0.01) == 0 and st.tost(np.full(9, 0.5), 0.01) == 1


def test_three_quarters_of_a_point_of_error_prove_no_margin_below_1_23_points() -> None:
    spread = st.Spread(0.0075)
    assert spread.p_equivalent(0, 0.0123) > 0.05 > spread.p_equivalent(0, 0.0124)


@pytest.mark.parametrize("margin", [0, 1, -0.01, 1.5, math.nan])
def test_a_margin_is_a_fraction_between_0_and_1(margin: float) -> None:
    with pytest.raises(UserError, match="margin: expected a fraction above 0 and below 1"):
        st.check_margin(margin)


def test_seeds_that_share_nothing_have_the_t_interval() -> None:
    values = [0.01, 0.03, -0.005]
    spread = st.over_seeds(values, np.zeros((3, 3)))
    known = stats.ttest_1samp(values, 0)
    assert spread.around(float(np.mean(values))) == pytest.approx(known.confidence_interval(0.95))
    assert spread.p(float(np.mean(values))) == pytest.approx(known.pvalue) and spread.share == 0
    assert st.seeds_alone(values).around(0.0) == pytest.approx(st.Spread(stats.sem(values), 2).around(0.0))


def test_examples_that_all_seeds_answer_alike_make_the_interval_wider() -> None:
    shared = np.full((3, 3), 4e-5)
    spread = st.over_seeds([0.01, 0.03, -0.005], shared)
    own = float(np.var([0.01, 0.03, -0.005], ddof=1)) / 3
    assert spread.error**2 == pytest.approx(own + 4e-5)
    assert spread.df == pytest.approx(2 * (own + 4e-5) / own)
    assert spread.share == pytest.approx(4e-5 / (own + 4e-5))
    equal = st.over_seeds([0.01, 0.01, 0.01], shared)
    assert equal.df == math.inf and equal.share == 1 and equal.error == pytest.approx(math.sqrt(4e-5))


def test_seeds_that_agree_by_chance_are_not_taken_at_their_word() -> None:
    noise = np.eye(3) * 6e-5
    assert st.over_seeds([0.01, 0.01, 0.01], noise).error > 0.2 * math.sqrt(6e-5 / 3)
    same = np.zeros((3, 872))
    assert st.over_seeds([0.0] * 3, st.shared_by_seeds(same)).error > 0


def weighted(count: int, rng: np.random.Generator) -> tuple[Numbers, list[list[int]]]:
    """Three resamples: as weights, and as the places that were drawn."""
    drawn = [list(range(count)), *rng.integers(count, size=(2, count)).tolist()]
    return np.array([np.bincount(places, minlength=count) for places in drawn], dtype=np.float64), drawn


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_of_classes_are_those_of_torchmetrics(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels, logits = rng.integers(classes, size=60), rng.normal(size=(60, classes)).astype(np.float32)
    weights, drawn = weighted(60, rng)
    kind, said = Classification(), scores.answers(logits, labels)
    for metric in kind.metrics(classes):
        found = scores.score(metric, said, labels, weights)
        for value, places in zip(found, drawn, strict=True):
            chosen = torch.from_numpy(logits[places]), torch.from_numpy(labels[places])
            assert value == pytest.approx(kind.scorers(*chosen, classes)[metric](), abs=1e-6), metric


def test_metrics_of_several_labels_are_those_of_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 3)) < 0.4).astype(np.float32)
    logits = rng.normal(size=(60, 3)).astype(np.float32)
    weights, drawn = weighted(60, rng)
    kind, said = MultiLabel(), scores.answers(logits, labels)
    for metric in kind.metrics(3):
        found = scores.score(metric, said, labels, weights)
        for value, places in zip(found, drawn, strict=True):
            chosen = torch.from_numpy(logits[places]), torch.from_numpy(labels[places])
            assert value == pytest.approx(kind.scorers(*chosen, 3)[metric](), abs=1e-6), metric


def test_correlations_are_those_of_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(11, size=60).astype(np.float32) / 2  # many are equal, as in STS-B
    logits = (labels + rng.normal(size=60).astype(np.float32))[:, None]
    weights, drawn = weighted(60, rng)
    said = scores.answers(logits, labels)
    for metric, reference in (("pearson", pearson_corrcoef), ("spearman", spearman_corrcoef)):
        found = scores.score(metric, said, labels, weights)
        for value, places in zip(found, drawn, strict=True):
            expected = reference(torch.from_numpy(logits[places, 0]), torch.from_numpy(labels[places]))
            assert value == pytest.approx(float(expected), abs=1e-5), metric


def test_one_answer_to_everything_has_a_score() -> None:
    labels, once = np.array([0, 1, 1, 0]), np.ones((1, 4))
    said = np.ones(4)
    assert scores.score("matthews", said, labels, once) == [0]
    assert scores.score("f1", np.zeros(4), labels, once) == [0]
    assert np.isnan(scores.score("pearson", said, labels.astype(np.float32), once))


def test_the_bootstrap_draws_examples_and_both_models_on_the_same_ones() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=400)
    one, other = (np.where(rng.random(400) < right, labels, 1 - labels).astype(float) for right in (0.9, 0.8))
    draws = st.resamples("accuracy", [one, other], labels)
    difference = (one == labels) * 1.0 - (other == labels)
    assert draws.shape == (2, st.DRAWS)
    assert (draws[0] - draws[1]).std() == pytest.approx(stats.sem(difference), rel=0.05)
    known = stats.bootstrap((difference,), np.mean, n_resamples=2000, method="percentile", rng=rng)
    assert st.percentiles(draws[0] - draws[1]) == pytest.approx(known.confidence_interval, abs=0.006)
    assert st.bootstrap_p(draws[0] - draws[1]) < 0.01 and st.bootstrap_p(draws[0] - draws[0]) == 1


def correct(seeds: int, examples: int, seed_sd: float, method_sd: float, rng: np.random.Generator) -> list[Numbers]:
    """Which examples two methods have right: `[S, N]` each, by thresholds of normal variables."""
    hard = rng.normal(0, 2.0, examples)  # examples differ
    return [
        (
            easy
            + hard
            + rng.normal(0, seed_sd, (seeds, 1))  # seeds are better or worse
            + rng.normal(0, method_sd, examples)  # all seeds of a method have the same trouble with an example
            + rng.normal(0, 0.7, (seeds, examples))
            > 0
        ).astype(np.float64)
        for easy in EASY
    ]


EASY = (1.9, 2.1)


def covered(seeds: int, seed_sd: float, method_sd: float, times: int) -> dict[str, float]:
    """How often the intervals hold what very many seeds would give on very many examples."""
    rng, held = np.random.default_rng(1), {"one model": 0, "pair": 0, "mean": 0, "difference": 0}
    scale = math.sqrt(2.0**2 + seed_sd**2 + method_sd**2 + 0.7**2)
    one, other = (float(stats.norm.cdf(easy / scale)) for easy in EASY)

    def holds(ends: tuple[float, float], truth: float) -> int:
        return int(ends[0] <= truth <= ends[1])

    for _ in range(times):
        first, second = correct(seeds, 872, seed_sd, method_sd, rng)
        for name, per_example, truth in (("mean", first, one), ("difference", second - first, other - one)):
            values = per_example.mean(1)
            spread = st.over_seeds(values.tolist(), st.shared_by_seeds(per_example))
            held[name] += holds(spread.around(float(values.mean())), truth)
        if seed_sd == 0:  # with one seed the truth is that of these models
            held["one model"] += holds(st.proportion_interval(int(first[0].sum()), 872), one)
            change = second[0] - first[0]
            centre, spread = st.paired_proportions(int((change < 0).sum()), int((change > 0).sum()), 872)
            held["pair"] += holds(spread.around(centre), other - one)
    return {name: count / times for name, count in held.items() if count}


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    found = covered(3, 0.0, 0.7, 300)
    assert set(found) == {"one model", "pair", "mean", "difference"}
    assert all(0.91 < share < 0.99 for share in found.values()), found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    "seed_sd", [0.0, 0.05, 0.1, 0.2]
)  # the differences of seeds spread by 0.9, 1.2, 1.8, 3.2 points
@pytest.mark.parametrize("method_sd", [0.0, 0.7])
def test_intervals_hold_the_truth_in_95_of_100_studies(seeds: int, seed_sd: float, method_sd: float) -> None:
    found = covered(seeds, seed_sd, method_sd, 6000)
    assert all(0.93 < share < 0.97 for share in found.values()), found
