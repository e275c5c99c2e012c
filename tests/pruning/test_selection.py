"""Selection of heads: the arithmetic of ratios and rounds, and the choice against a greedy loop."""

from __future__ import annotations

import math
import random
from decimal import Decimal

import pytest
import torch
from torch import Tensor

from edgemin.errors import UserError
from edgemin.pruning.selection import removal_count, round_targets, select_units


def greedy(scores: list[list[float]], count: int, minimum: int) -> list[list[int]]:
    """Take the lowest head that may go, one at a time."""
    left = {(layer, head): score for layer, row in enumerate(scores) for head, score in enumerate(row)}
    removed: list[list[int]] = [[] for _ in scores]
    for _ in range(count):
        free = [place for place in left if sum(layer == place[0] for layer, _ in left) > minimum]
        layer, head = min(free, key=lambda place: (left[place], place))
        del left[layer, head]
        removed[layer].append(head)
    return [sorted(heads) for heads in removed]


def drawn(seed: int) -> tuple[list[Tensor], float, int]:
    """Random layers of different sizes whose scores take few values, so that many are equal."""
    source = random.Random(seed)
    scores = [
        torch.tensor(
            [source.choice([0.0, 0.5, source.random()]) for _ in range(source.randint(1, 9))],
            dtype=torch.float64,
        )
        for _ in range(source.randint(1, 5))
    ]
    return scores, source.choice([0.0, 0.1, 0.2, 0.3, 0.5, 0.7, source.random()]), source.randint(1, 2)


@pytest.mark.parametrize("percent", range(100))
def test_the_count_is_what_exact_arithmetic_says(percent: int) -> None:
    for count in range(301):
        assert removal_count(count, percent / 100) == percent * count // 100
        assert removal_count(count, percent / 1000) == math.floor(Decimal(percent) / 1000 * count)


@pytest.mark.parametrize(
    ("ratio", "count", "expected"),
    [(0.2, 144, 28), (0.2, 12, 2), (0.3, 10, 3), (0.29, 100, 29), (0.05, 12, 0), (0.0, 12, 0)],
)
def test_known_counts(ratio: float, count: int, expected: int) -> None:
    assert removal_count(count, ratio) == expected


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_a_ratio_outside_zero_to_one_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match=rf"^ratio: expected a number in \[0, 1\), given {ratio}$"):
        removal_count(12, ratio)


@pytest.mark.parametrize("rounds", range(1, 31))
def test_rounds_end_exactly_at_the_count_in_even_steps(rounds: int) -> None:
    for count, ratio in ((144, 0.2), (12, 0.2), (144, 0.7), (10, 0.0)):
        targets = round_targets(count, ratio, rounds)
        steps = [after - before for before, after in zip([0, *targets], targets, strict=False)]
        assert len(targets) == rounds and targets[-1] == removal_count(count, ratio)
        assert min(steps) >= 0 and max(steps) - min(steps) <= 1


def test_rounds_below_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"^rounds: .* given 0$"):
        round_targets(12, 0.2, 0)


@pytest.mark.parametrize("seed", range(200))
def test_global_selection_is_the_greedy_one_over_all_layers(seed: int) -> None:
    scores, ratio, minimum = drawn(seed)
    rows = [row.tolist() for row in scores]
    count = removal_count(sum(map(len, rows)), ratio)
    if count > sum(max(0, len(row) - minimum) for row in rows):
        with pytest.raises(UserError, match=r"^ratio: expected one that leaves .* to remove, \d+ can go$"):
            select_units(scores, ratio, "global", minimum=minimum)
        return
    removed = select_units(scores, ratio, "global", minimum=minimum)
    assert removed == greedy(rows, count, minimum)
    assert sum(map(len, removed)) == count
    assert all(len(row) - len(heads) >= min(minimum, len(row)) for row, heads in zip(rows, removed, strict=True))


@pytest.mark.parametrize("seed", range(200))
def test_selection_by_layer_is_the_greedy_one_in_each_layer(seed: int) -> None:
    scores, ratio, _ = drawn(seed)
    removed = select_units(scores, ratio, "layer")
    for row, heads in zip(scores, removed, strict=True):
        assert [heads] == greedy([row.tolist()], removal_count(len(row), ratio), 1)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("seed", range(60))
def test_rounds_under_steady_importance_remove_the_same_heads_as_one_shot(seed: int, scope: str) -> None:
    scores, ratio, _ = drawn(seed)
    ratio = min(ratio, 0.4)
    if sum(max(0, len(row) - 1) for row in scores) < removal_count(sum(map(len, scores)), ratio):
        ratio = 0.0
    rounds = 1 + seed % 4
    initial = [len(row) for row in scores]
    left = [list(range(count)) for count in initial]
    for done in range(rounds):
        current = [row[heads] for row, heads in zip(scores, left, strict=True)]
        going = select_units(current, ratio, scope, initial=initial, completed_rounds=done, rounds=rounds)
        left = [
            [head for place, head in enumerate(heads) if place not in gone]
            for heads, gone in zip(left, going, strict=True)
        ]
        if scope == "global":
            assert sum(initial) - sum(map(len, left)) == round_targets(sum(initial), ratio, rounds)[done]
    one_shot = select_units(scores, ratio, scope)
    assert [sorted(set(range(n)) - set(heads)) for n, heads in zip(initial, left, strict=True)] == one_shot


def test_ties_go_to_the_lower_layer_then_to_the_lower_head() -> None:
    scores = [torch.ones(4), torch.ones(4), torch.ones(4)]
    assert select_units(scores, 0.5, "global") == [[0, 1, 2], [0, 1, 2], []]
    assert select_units(scores, 0.5, "layer") == [[0, 1]] * 3


def test_a_layer_down_to_its_minimum_passes_its_turn_to_the_next_candidates() -> None:
    scores = [torch.tensor([0.1, 0.2, 0.3]), torch.tensor([5.0, 4.0, 6.0])]
    assert select_units(scores, 0.5, "global") == [[0, 1], [1]]
    assert select_units(scores, 0.34, "global", minimum=2) == [[0], [1]]


def test_ratio_is_of_the_count_at_the_start_and_what_went_beyond_it_stays_gone() -> None:
    scores = [torch.arange(10.0)]
    assert select_units(scores, 0.25, "layer", initial=[12]) == [[0]]
    assert select_units(scores, 0.1, "layer", initial=[12]) == [[]]
    assert select_units(scores, 0.5, "global", initial=[12]) == [[0, 1, 2, 3]]


def test_the_papers_student_loses_two_heads_a_layer_or_28_of_144() -> None:
    scores = list(torch.rand(12, 12, generator=torch.Generator().manual_seed(0)))
    assert [len(heads) for heads in select_units(scores, 0.2, "layer")] == [2] * 12
    assert sum(map(len, select_units(scores, 0.2, "global"))) == 28


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scope": "model"}, r"^scope: expected one of global, layer, given 'model'$"),
        ({"ratio": 1.0}, r"^ratio: .*given 1.0$"),
        ({"minimum": 0}, r"^minimum: .*given 0$"),
        ({"rounds": 0}, r"^rounds: .*given 0$"),
        ({"ratio": 0.9}, r"^ratio: .*given 0.9: 7 of 8 to remove, 6 can go$"),
        ({"ratio": 0.5, "minimum": 3, "scope": "layer"}, r"^ratio: .*leaves 3 .*2 of 4 to remove, 1 can go$"),
        ({"importance": [torch.tensor([1.0, math.nan])]}, r"^importance: .*nan in layer 1$"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(changes: dict, message: str) -> None:
    arguments = {"importance": [torch.ones(4), torch.ones(4)], "ratio": 0.5, "scope": "global"} | changes
    with pytest.raises(UserError, match=message) as error:
        select_units(**arguments)
    assert "\n" not in str(error.value)


def test_the_cubic_schedule_removes_most_at_first_and_ends_at_the_ratio() -> None:
    # 0.5 of 100 over 4 rounds: 50 (1 - (1 - t/4)^3)
    assert round_targets(100, 0.5, 4, "cubic") == [28, 43, 49, 50]
    assert round_targets(144, 0.2, 1, "cubic") == [28] == round_targets(144, 0.2, 1)


def test_what_is_left_is_rounded_up_to_a_multiple_and_the_most_important_stay() -> None:
    scores = [torch.arange(20.0)]
    assert select_units(scores, 0.5, "layer", multiple=8) == [[0, 1, 2, 3]]  # 10 leave 10: rounded up to 16
    assert select_units(scores, 0.1, "layer", multiple=8) == [[]], "18 are rounded up past all there are"
    both = [torch.arange(16.0), torch.arange(16.0) + 9]
    assert select_units(both, 0.5, "global", multiple=4) == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], []]


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_rounds_with_a_multiple_end_where_one_does(rounds: int) -> None:
    left = [torch.arange(50.0)]
    for done in range(rounds):
        (gone,) = select_units(left, 0.55, "layer", multiple=8, initial=[50], completed_rounds=done, rounds=rounds)
        left = [left[0][len(gone) :]]
        assert gone == list(range(len(gone)))
    assert len(left[0]) == 24  # 23 are asked for
