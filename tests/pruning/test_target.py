"""Pruning to a budget: it is kept, what goes is the least important within it, and what cannot be is refused."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgemin.data.module import DataModule
from edgemin.encoder import building, parts
from edgemin.encoder.operations import operations
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.pruning.by_target import ByTarget
from edgemin.pruning.criteria.table import CRITERIA, find
from edgemin.pruning.stage import Pruning
from edgemin.pruning.structures import FFN, HEADS, Ffn, Structure
from edgemin.pruning.target import Target
from edgemin.training.latency import LatencyTable

# By hand: heads cost little here, FFN units much, and the line between widths is bent.
TABLE = LatencyTable(
    {1: 0.2, 2: 0.3, 4: 0.6}, {8: 0.5, 24: 0.9, 48: 2.0}, 1.0, "openvino", "int8", 1, "a processor", "bert", 32
)


@pytest.fixture
def data(tmp_path: Path) -> DataModule:
    return tiny.data(tmp_path)


def stage(**settings: Any) -> Pruning:
    given: dict[str, Any] = {"ratio": 0.5, "epochs": 0, "calibration_examples": 16, "batch_size": 8}
    given |= {"structure": "heads_ffn", "criterion": "fisher", "learning_rate": 1e-3} | settings
    return tiny.stage(
        Pruning, **{key: value for key, value in given.items() if key != "epochs" or "steps" not in settings}
    )


def run(
    given: Pruning, data: DataModule | None, work: Path, model: PreTrainedModel | None = None, **named: Any
) -> tuple[Pruning, Any]:
    start = model or tiny.model()
    tiny.plan(given, start, latency=TABLE)
    return given, tiny.fit(given, start, data, work=work, **named)


def cost_of(measure: str, model: Any) -> float:
    outline = model if isinstance(model, Outline) else building.outline(model)
    return Target(measure=measure, factor=0.5).cost(TABLE)(outline)


def between(measure: str, whole: Any, least: Outline, share: float) -> float:
    """A budget that leaves so much of what can go."""
    low, high = cost_of(measure, least), cost_of(measure, whole)
    return low + share * (high - low)


def least_loss(
    outline: Outline, structures: Sequence[Structure], scores: Sequence[Sequence[Tensor]], budget: float, measure: str
) -> float:
    """By trying every number of units in every group."""
    pairs = zip(structures, scores, strict=True)
    groups = [(structure.multiple, len(group)) for structure, own in pairs for group in own]
    kept = [sorted({*range(step, units, step), units}) for step, units in groups]
    found = []
    for counts in itertools.product(*kept):
        shape, lost, chosen = outline, 0.0, iter(counts)
        for structure, own in zip(structures, scores, strict=True):
            here = [next(chosen) for _ in own]
            shape = structure.shaped(shape, here)
            lost += sum(float(of.sort().values[: len(of) - count].sum()) for of, count in zip(own, here, strict=True))
        if cost_of(measure, shape) <= budget:
            found.append(lost)
    return min(found)


FFN_8 = Ffn(8)


@pytest.mark.parametrize("measure", ["macs", "size_mib", "latency_ms"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
def test_the_search_loses_next_to_the_least_of_all_that_the_budget_allows(measure: Any, share: float) -> None:
    outline = building.outline(tiny.model(layers=2))
    draw = torch.Generator().manual_seed(int(100 * share))
    scores = [[torch.rand(count, generator=draw) for _ in range(2)] for count in (4, 48)]
    budget = between(measure, outline, outline.with_heads([1, 1]).with_ffn([8, 8]), share)
    amount = ByTarget(Target(measure=measure, value=budget), [HEADS, FFN_8], 1, "linear")
    amount.after(outline, TABLE)
    removed = amount.removed(outline, scores, 0)
    groups = [group for own in scores for group in own]
    lost = sum(float(group[gone].sum()) for group, gone in zip(groups, removed, strict=True))
    left = [len(group) - len(gone) for group, gone in zip(groups, removed, strict=True)]
    after = outline.with_heads(left[:2]).with_ffn(left[2:])
    assert cost_of(measure, after) <= budget
    assert all(count % 8 == 0 for count in left[2:])
    for group, gone in zip(groups, removed, strict=True):
        assert sorted(gone) == sorted(group.argsort()[: len(gone)].tolist()), "the least important of each group"
    best, next_best = (least_loss(outline, [HEADS, FFN_8], scores, share * budget, measure) for share in (1, 0.999))
    assert best - 1e-6 <= lost <= next_best + 1e-6, "costs are rounded up"


def test_a_model_stays_within_its_latency_where_heads_and_ffn_units_save_less_together() -> None:
    outline, table = building.outline(tiny.model()), replace(TABLE, joint_ms=0.5)
    draw = torch.Generator().manual_seed(1)
    scores = [[torch.rand(count, generator=draw) for _ in range(3)] for count in (4, 48)]
    for factor in (0.9, 0.7, 0.62):
        amount = ByTarget(Target(measure="latency_ms", factor=factor), [HEADS, FFN_8], 1, "linear")
        amount.after(outline, table)
        left = [len(gone) for gone in amount.removed(outline, scores, 0)]
        after = outline.with_heads([4 - gone for gone in left[:3]]).with_ffn([48 - gone for gone in left[3:]])
        assert 0.9 * factor * table.ms(outline) <= table.ms(after) <= factor * table.ms(outline)


@pytest.mark.parametrize("measure", ["macs", "size_mib", "latency_ms"])
@pytest.mark.parametrize("structure", ["heads", "ffn", "heads_ffn", "layers", "hidden"])
def test_every_structure_stays_within_its_budget(
    structure: str, measure: str, data: DataModule, tmp_path: Path
) -> None:
    if (structure, measure) == ("hidden", "latency_ms"):
        pytest.skip("refused")
    start = tiny.model()
    whole = building.outline(start)
    few: dict[str, Outline] = {"heads": whole.with_heads([1] * 3), "ffn": whole.with_ffn([8] * 3)}
    few |= {"layers": whole.with_layers(1), "hidden": whole.with_hidden(8)}
    few["heads_ffn"] = few["heads"].with_ffn([8] * 3)
    budget = between(measure, start, few[structure], 0.6)
    given = stage(structure=structure, scope="global", target={"measure": measure, "value": budget})
    planned = tiny.plan(given, start, latency=TABLE)
    assert planned.reads_latency == (measure == "latency_ms")
    _, fitted = run(given, data, tmp_path, start)
    after = cost_of(measure, fitted.model)
    assert between(measure, whole, few[structure], 0.2) <= after <= budget
    if structure in ("layers", "hidden"):
        assert planned.outline == replace(building.outline(fitted.model), max_tokens=planned.outline.max_tokens)
    found = fitted.findings["target"]
    assert found["asked"] == budget
    assert (found["before"], found["predicted"]) == (pytest.approx(cost_of(measure, whole)), pytest.approx(after))
    assert fitted.notes[-1].startswith("target ") and ("a processor" in fitted.notes[-1]) == planned.reads_latency


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
def test_rounds_go_from_the_whole_to_the_budget(schedule: Any, data: DataModule, tmp_path: Path) -> None:
    spent = []

    class Watched(Pruning):
        def prepare_teaching(self) -> None:
            if self.removed:
                spent.append(cost_of("macs", self.model))
            super().prepare_teaching()

    settings: dict[str, Any] = {"ratio": 0.5, "steps": 1, "calibration_examples": 16, "batch_size": 8}
    settings |= {"structure": "heads_ffn", "criterion": "fisher", "learning_rate": 1e-3, "rounds": 4}
    given = tiny.stage(Watched, **settings, schedule=schedule, target={"measure": "macs", "factor": 0.6})
    start = tiny.model()
    whole = cost_of("macs", start)
    run(given, data, tmp_path, start)
    left = [3 / 4, 2 / 4, 1 / 4, 0] if schedule == "linear" else [27 / 64, 8 / 64, 1 / 64, 0]
    for found, share in zip(spent, left, strict=True):
        budget = whole * (0.6 + 0.4 * share)
        assert 0.9 * budget <= found <= budget


def test_a_run_that_was_killed_ends_at_the_same_model(data: DataModule, tmp_path: Path) -> None:
    target = {"measure": "latency_ms", "factor": 0.7}
    settings: dict[str, Any] = {"target": target, "rounds": 2, "steps": 3}
    _, whole = run(stage(**settings), data, tmp_path / "whole")
    with pytest.raises(tiny.KilledError):
        run(stage(**settings), data, tmp_path / "killed", seconds=0, callbacks=[tiny.Kill(2, phase=1)])
    _, resumed = run(stage(**settings), data, tmp_path / "killed", seconds=0)
    assert tiny.same_weights(whole.model, resumed.model)
    assert whole.findings["target"] == resumed.findings["target"] and whole.notes[-1] == resumed.notes[-1]


@pytest.mark.parametrize("criterion", [name for name, known in CRITERIA.items() if "ffn" in known.structures])
def test_every_criterion_prunes_to_a_budget(criterion: str, data: DataModule, tmp_path: Path) -> None:
    start = tiny.model()
    _, fitted = run(stage(criterion=criterion, target={"measure": "macs", "factor": 0.6}), data, tmp_path, start)
    assert operations(building.outline(fitted.model))["macs"] <= fitted.findings["target"]["asked"]


def test_scores_are_weighed_as_their_criterion_says() -> None:
    amount = ByTarget(Target(measure="macs", factor=0.5), [HEADS, FFN], 1, "linear")
    scores = [[torch.tensor([1.0, 3.0]), torch.tensor([4.0, 0.0])], [torch.tensor([0.5]), torch.tensor([1.5])]]

    def weighed(name: str) -> list[list[list[float]]]:
        return [[group.tolist() for group in own] for own in amount.weighed(find(name), scores)]

    assert weighed("fisher") == weighed("taylor") == weighed("kwon") == [[[1, 3], [4, 0]], [[0.5], [1.5]]]
    assert weighed("ziplm") == [[[0.25, 0.75], [1, 0]], [[1], [1]]], "shares of what each layer writes"
    assert weighed("magnitude") == [[[0.125, 0.375], [0.5, 0]], [[0.25], [0.75]]], "heads count as FFN units do"


def test_a_quantized_or_pruned_model_costs_by_the_widths_that_it_has(data: DataModule, tmp_path: Path) -> None:
    _, first = run(stage(target={"measure": "latency_ms", "factor": 0.8}), data, tmp_path / "1")
    before = TABLE.ms(building.outline(first.model))
    _, second = run(stage(target={"measure": "latency_ms", "factor": 0.8}), data, tmp_path / "2", first.model)
    assert second.findings["target"]["before"] == before
    assert TABLE.ms(building.outline(second.model)) <= 0.8 * before


def test_a_target_that_the_model_meets_removes_nothing_and_says_so(data: DataModule, tmp_path: Path) -> None:
    start = tiny.model()
    _, fitted = run(stage(target={"measure": "macs", "value": 1e12}), data, tmp_path, start)
    assert fitted.notes[0].startswith("target 1000 G multiply-accumulates removes nothing")
    assert parts.heads(fitted.model) == [4, 4, 4]


LATENCY = {"measure": "latency_ms", "factor": 0.5}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"target": {"measure": "speed", "factor": 0.5}}, r"target\.measure: expected .*given 'speed'"),
        ({"target": {"measure": "macs"}}, r"target\.measure: expected one of value, factor and factors .* none"),
        ({"target": {"measure": "macs", "value": 1.0, "factor": 0.5}}, r"target\.measure: expected one of .* and"),
        ({"target": {"factor": 0.5}}, r"target\.measure: expected latency_ms, size_mib or macs beside factor"),
        ({"target": {"measure": "macs", "factor": 1.5}}, r"target\.factor: expected .*given 1\.5"),
        ({"target": {"measure": "macs", "value": 0.0}}, r"target\.value: expected a number above 0"),
        ({"target": {"measure": "macs", "factor": 0.5, "table": "a.json"}}, r"target\.table: expected null but for"),
        ({"target": {"measure": "macs", "factors": [0.5]}}, r"target\.factors: expected null on the path of a model"),
        ({"target": {"speed": 2}}, r"target\.speed: unknown key"),
        (
            {"structure": "hidden", "scope": "global", "target": LATENCY},
            r"target\.measure: expected size_mib or macs for hidden units",
        ),
    ],
)
def test_a_target_that_cannot_be_is_refused_with_its_key(settings: Mapping[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}[^\n]*$"):
        stage(**settings)


@pytest.mark.parametrize("structure", ["heads", "ffn", "heads_ffn", "layers"])
@pytest.mark.parametrize("key", ["value", "factor"])
def test_a_budget_below_what_is_reachable_names_the_least_that_is(structure: str, key: str) -> None:
    start = tiny.model()
    settings: dict[str, Any] = {"structure": structure, "scope": "global"}
    with pytest.raises(
        UserError, match=rf"^target\.{key}: expected at least [^\n]* can reach, given 0\.01$"
    ) as refused:
        tiny.plan(stage(**settings, target={"measure": "latency_ms", key: 0.01}), start, latency=TABLE)
    least = float(str(refused.value).split("at least ")[1].split(",")[0])
    tiny.plan(stage(**settings, target={"measure": "latency_ms", key: least}), start, latency=TABLE)
    with pytest.raises(UserError, match="can reach"):
        tiny.plan(stage(**settings, target={"measure": "latency_ms", key: 0.98 * least}), start, latency=TABLE)


def test_what_planning_does_not_know_is_looked_at_when_the_stage_runs(data: DataModule, tmp_path: Path) -> None:
    unknown = tiny.outline("bert", 3, 32).with_heads([None, None, None])
    given = stage(target={"measure": "macs", "factor": 0.01})
    tiny.effect(given, unknown)
    with pytest.raises(UserError, match=r"^target\.factor: expected at least"):
        tiny.fit(given, tiny.model(), data, work=tmp_path)
    for structure in ("layers", "hidden"):
        given = stage(structure=structure, scope="global", target={"measure": "macs", "factor": 0.5})
        with pytest.raises(UserError, match=r"^target\.measure: expected null, and a ratio, for [^\n]* first$"):
            tiny.effect(given, unknown)


def test_a_model_of_other_layers_than_the_table_has_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^target\.measure: expected at most 4 heads in a layer[^\n]*given a model with 8"
    ):
        tiny.plan(stage(target=LATENCY), tiny.model(heads=8), latency=TABLE)
    with pytest.raises(
        UserError, match=r"^target\.measure: expected a model of family bert and hidden size 32.*and 64$"
    ):
        tiny.plan(stage(target=LATENCY), tiny.model(hidden=64), latency=TABLE)


def test_importance_is_computed_once_for_all_budgets_of_a_model(
    data: DataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    for known in ("fisher", "activation"):
        scores = CRITERIA[known].scores

        def counted(self: Any, given: Any, scores: Any = scores, known: str = known) -> Any:
            computed.append(known)
            return scores(self, given)

        monkeypatch.setattr(CRITERIA[known], "scores", counted)
    models = []
    for number, (criterion, factor) in enumerate(
        [("fisher", 0.8), ("fisher", 0.6), ("activation", 0.8), ("fisher", 0.8)]
    ):
        given = stage(criterion=criterion, target={"measure": "macs", "factor": factor})
        models.append(run(given, data, tmp_path / str(number))[1].model)
    assert computed == ["fisher", "activation"]
    assert tiny.same_weights(models[0], models[3]), "found again, it decides the same"
    run(stage(target={"measure": "macs", "factor": 0.8}), data, tmp_path / "other", tiny.model(seed=1))
    run(stage(target={"measure": "macs", "factor": 0.8}), data, tmp_path / "seed", seed=2)
    run(stage(structure="ffn", target={"measure": "macs", "factor": 0.9}), data, tmp_path / "ffn")
    assert computed[2:] == ["fisher"] * 3, "another model, other examples, other units"
