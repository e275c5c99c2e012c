"""Head pruning: how many heads go, which, that they are gone, and that nothing else changed."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgemin import config
from edgemin.data.batches import TrainBatches
from edgemin.data.module import DataModule
from edgemin.encoder import building, parts
from edgemin.encoder.outline import QuantizedLayers
from edgemin.errors import UserError
from edgemin.pruning import shares
from edgemin.pruning.criteria.base import Given
from edgemin.pruning.criteria.table import CRITERIA, find
from edgemin.pruning.selection import others
from edgemin.pruning.stage import Pruning
from edgemin.pruning.structures import HEADS
from edgemin.tasks.classification import Classification
from edgemin.training.teaching import OF_A_CORPUS


@pytest.fixture
def data(tmp_path: Path) -> DataModule:
    return tiny.data(tmp_path)


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    return Classification().loss(logits, labels, "none")


def pruning(**settings: Any) -> Pruning:
    given: dict[str, Any] = {"ratio": 0.5, "epochs": 0, "calibration_examples": 48, "batch_size": 8}
    given |= {"learning_rate": 1e-3}
    given |= settings
    return tiny.stage(
        Pruning, **{key: value for key, value in given.items() if key != "epochs" or "steps" not in settings}
    )


def cut(start: PreTrainedModel, data: DataModule | None, work: Path, **settings: Any) -> tuple[Pruning, Any]:
    stage = pruning(**settings)
    return stage, tiny.fit(stage, start, data, work=work)


def gone(stage: Pruning, layers: int = 3) -> list[list[int]]:
    """Removed heads of each layer, of a stage of one round."""
    (removed,) = stage.removed
    assert len(removed) == layers
    return removed


# How many


@pytest.mark.parametrize(
    ("ratio", "scope", "left"),
    [
        (0.0, "layer", 24),
        (0.2, "layer", 21),
        (0.5, "layer", 12),
        (0.99, "layer", 3),
        (0.2, "global", 20),
        (0.5, "global", 12),
    ],
)
def test_int_of_ratio_times_heads_are_removed_physically(
    ratio: float, scope: Any, left: int, data: DataModule, tmp_path: Path
) -> None:
    start = tiny.model(heads=8)
    full = sum(parameter.numel() for parameter in start.parameters())
    stage, fitted = cut(start, data, tmp_path, ratio=ratio, scope=scope)
    heads = parts.heads(fitted.model)
    assert sum(heads) == left and min(heads) >= 1
    if scope == "layer":
        assert len(set(heads)) == 1
    assert [8 - len(removed) for removed in gone(stage)] == heads
    # one head of size 4: rows of Q, K, V with their biases, columns of O
    one = 3 * 4 * (32 + 1) + 4 * 32
    assert full - sum(parameter.numel() for parameter in fitted.model.parameters()) == (24 - left) * one
    for layer, count in enumerate(heads):
        attention = fitted.model.get_submodule(f"bert.encoder.layer.{layer}.attention")
        assert attention.get_submodule("self.query").weight.shape == (4 * count, 32)
        assert attention.get_submodule("output.dense").weight.shape == (32, 4 * count)
    assert fitted.notes[-1] == f"removed {24 - left} of 24 heads; left per layer: {heads}"


def test_a_ratio_of_zero_leaves_every_weight_alone(data: DataModule, tmp_path: Path) -> None:
    start = tiny.model()
    before = copy.deepcopy(start)
    _, fitted = cut(start, data, tmp_path, ratio=0.0)
    assert tiny.same_weights(fitted.model, before)
    assert fitted.notes == ["removed 0 of 12 heads; left per layer: [4, 4, 4]"]


@pytest.mark.parametrize(("scope", "ratio"), [("layer", 0.2), ("global", 0.05)])
def test_a_ratio_that_removes_nothing_says_so(scope: Any, ratio: float, data: DataModule, tmp_path: Path) -> None:
    _, fitted = cut(tiny.model(), data, tmp_path, ratio=ratio, scope=scope)
    assert parts.heads(fitted.model) == [4, 4, 4]
    assert fitted.notes[0].startswith(f"ratio {ratio} removes nothing")
    assert ("scope=global" in fitted.notes[0]) == (scope == "layer")


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("importance", ["calibration", "training"])
def test_rounds_end_at_the_same_number_of_heads(scope: Any, importance: Any, data: DataModule, tmp_path: Path) -> None:
    counts = set()
    for rounds in (1, 2, 3):
        stage, fitted = cut(
            tiny.model(heads=8),
            data,
            tmp_path / str(rounds),
            ratio=0.4,
            scope=scope,
            rounds=rounds,
            importance=importance,
            training_steps=1,
            steps=1,
        )
        counts.add(sum(parts.heads(fitted.model)))
        assert len(stage.removed) == rounds
        assert sum(len(layer) for one_round in stage.removed for layer in one_round) == 24 - counts.copy().pop()
        assert fitted.steps == rounds * (2 if importance == "training" else 1)
    assert counts == {15}  # int(0.4 x 8) of each of 3 layers; int(0.4 x 24) of all


def test_the_ratio_is_of_the_heads_at_the_start_of_the_stage(data: DataModule, tmp_path: Path) -> None:
    """A second pruning of a pruned encoder counts what it was given."""
    _, first = cut(tiny.model(heads=8), data, tmp_path / "1", ratio=0.5)
    _, second = cut(first.model, data, tmp_path / "2", ratio=0.5)
    assert parts.heads(second.model) == [2, 2, 2]


def test_a_global_ratio_that_empties_a_layer_is_refused_in_planning() -> None:
    stage = tiny.stage(Pruning, ratio=0.99, scope="global", steps=1)
    with pytest.raises(UserError, match=r"^ratio: expected [^\n]* 12 layers, given 0\.99 of 144[^\n]*$"):
        tiny.effect(stage, tiny.outline("bert", 12, 384, 12))
    tiny.effect(tiny.stage(Pruning, ratio=0.9, scope="global", steps=1), tiny.outline("bert", 12, 384, 12))


def test_a_ratio_of_counts_that_planning_did_not_know_is_refused_with_its_key_before_training(
    data: DataModule, tmp_path: Path
) -> None:
    both = {"structure": "heads_ffn", "criterion": "magnitude", "scope": "global", "rounds": 2, "steps": 1}
    for settings, key in (({"ratio": 0.9}, "ratio"), ({"ratio": 0.1, "ffn_ratio": 0.99}, "ffn_ratio")):
        stage = tiny.stage(Pruning, **both, **settings)
        tiny.effect(stage, tiny.outline().with_heads([None] * 3).with_ffn([None] * 3))
        with pytest.raises(UserError, match=rf"^{key}: expected one that leaves 1 of [^\n]* in all 3 layers, given"):
            tiny.fit(stage, tiny.model(), data, work=tmp_path / key)


def test_settings_that_decide_nothing_are_known_to_planning() -> None:
    def idle(**settings: Any) -> set[str]:
        return {*tiny.effect(pruning(**settings)).idle} - {"target", *OF_A_CORPUS}

    assert idle() == {"schedule", "training_steps", "methods"}
    assert idle(rounds=2) == {"training_steps", "methods"}
    assert idle(importance="training") == {"schedule", "calibration_examples", "methods"}
    assert idle(criterion="magnitude") == {"schedule", "training_steps", "calibration_examples", "methods"}
    taught = {"teacher": "parent", "methods": tiny.node("prune", "heads")["methods"]}
    assert idle(**taught, steps=1) == {"schedule", "training_steps"}
    never = idle(**taught)
    assert {"teacher", "teacher_cache", "methods", "task_weight"} <= never, "what is never trained learns from nobody"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"ratio": 1.0}, "ratio"),
        ({"ratio": -0.1}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"ratio": "a fifth"}, "ratio"),
        ({"rounds": 0}, "rounds"),
        ({"training_steps": 0}, "training_steps"),
        ({"calibration_examples": 0}, "calibration_examples"),
        ({"criterion": "gradient"}, "criterion"),
        ({"scope": "layers"}, "scope"),
        ({"importance": "training", "criterion": "random"}, "importance"),
        ({"importance": "training", "criterion": "magnitude"}, "importance"),
        ({"importance": "training", "criterion": "weight_product"}, "importance"),
        ({"importance": "training", "criterion": "activation"}, "importance"),
        ({"importance": "training", "criterion": "ziplm"}, "importance"),
        ({"importance": "training", "criterion": "kwon"}, "importance"),
        ({"ration": 0.2}, "ration"),
    ],
)
def test_a_pruning_that_cannot_be_is_refused_with_its_key(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^prune.{key}: [^\n]*$"):
        config.construct(tiny.node("prune", "heads") | settings, "prune")


# Which


@pytest.mark.parametrize("criterion", ["gradient_norm", "taylor", "activation"])
def test_the_batch_size_does_not_change_which_heads_go(criterion: Any, data: DataModule, tmp_path: Path) -> None:
    found = [
        gone(
            cut(tiny.model(heads=8), data, tmp_path / str(size), criterion=criterion, scope="global", batch_size=size)[
                0
            ]
        )
        for size in (1, 7, 48)
    ]
    assert found[0] == found[1] == found[2]


def test_dropout_does_not_change_which_heads_go_by_calibration(data: DataModule, tmp_path: Path) -> None:
    found = [
        gone(cut(tiny.model(heads=8, dropout=dropout).train(), data, tmp_path / str(dropout))[0])
        for dropout in (0.0, 0.5)
    ]
    assert found[0] == found[1]


def test_the_heads_that_go_are_those_of_least_importance(data: DataModule, tmp_path: Path) -> None:
    start = tiny.model(heads=8)
    scores = find("gradient_norm", "heads").scores(Given(start, HEADS, data.calibration(48, 8, seed=1), losses))
    expected = [sorted(layer.argsort()[:4].tolist()) for layer in scores]
    assert gone(cut(start, data, tmp_path)[0]) == expected


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_ranks_the_heads_that_its_name_in_the_yaml_says(
    criterion: str, data: DataModule, tmp_path: Path
) -> None:
    start = tiny.model(heads=8)
    settings = {"criterion": criterion, "ratio": 0.5, "epochs": 0, "calibration_examples": 48, "batch_size": 8}
    stage = config.construct(tiny.node("prune", "heads") | settings, "prune", Pruning)
    given = Given(copy.deepcopy(start), HEADS, data.calibration(48, 8, seed=1), losses, seed=1)
    expected = [sorted(layer.argsort()[:4].tolist()) for layer in find(criterion, "heads").scores(given)]
    keep = find(criterion, "heads").compensate(given, others(expected, [8, 8, 8]))
    made = tiny.fit(stage, start, data, work=tmp_path).model
    assert gone(stage) == others(keep, [8, 8, 8])
    HEADS.cut(given.model, keep)
    assert tiny.same_weights(made, given.model)


@pytest.mark.parametrize("criterion", [name for name, known in CRITERIA.items() if known.changes_weights])
def test_weights_of_a_quantized_model_are_not_solved_for(criterion: str) -> None:
    stage = pruning(criterion=criterion)
    quantized = dataclasses.replace(tiny.SMALL, quantized=QuantizedLayers("integers"))
    line = rf"^criterion: expected one that leaves a quantized model's weights alone, given {criterion}, which solves"
    with pytest.raises(UserError, match=line):
        tiny.effect(stage, quantized)


def test_random_heads_depend_on_the_seed_alone_and_need_no_data(tmp_path: Path) -> None:
    stage = pruning(criterion="random")
    assert not tiny.effect(stage).reads_task
    found = []
    for number, seed in enumerate((1, 1, 2)):
        stage = pruning(criterion="random", scope="global")
        tiny.fit(stage, tiny.model(heads=8, seed=number), None, work=tmp_path / str(number), seed=seed)
        found.append(gone(stage))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("criterion", ["gradient_norm", "taylor"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_ranking_during_training_sums_what_calibration_would_on_the_same_batches(
    criterion: Any, accumulate: int, data: DataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a learning rate of next to nothing and without dropout, training is calibration on its own batches."""
    ranked: list[list[Tensor]] = []
    select = shares.select_units

    def remember(importance: Any, *args: Any, **named: Any) -> Any:
        ranked.append(importance)
        return select(importance, *args, **named)

    monkeypatch.setattr(shares, "select_units", remember)
    start = tiny.model(dropout=0.0)
    settings: dict[str, Any] = {"criterion": criterion, "batch_size": 5, "accumulate": accumulate}
    before = copy.deepcopy(start)
    cut(
        start,
        data,
        tmp_path,
        importance="training",
        training_steps=2,
        learning_rate=1e-12,
        weight_decay=0.0,
        **settings,
    )
    batches = TrainBatches(data.train, 5, seed=1, steps=2 * accumulate)
    by = find(criterion, "heads")
    expected = by.ranked(by.scores(Given(before, HEADS, batches, losses)))
    assert len(ranked) == 1
    for got, wanted in zip(ranked[0], expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-9)


def test_ranking_during_training_trains(data: DataModule, tmp_path: Path) -> None:
    start = tiny.model()
    before = tiny.weights(start)
    cut(start, data, tmp_path, importance="training", training_steps=2)
    assert not torch.equal(start.get_submodule("classifier").weight, before["classifier.weight"])
    assert not any(module._forward_pre_hooks for module in start.modules()), "the taps are gone"


# Recovery


def test_recovery_changes_weights_and_no_shape(data: DataModule, tmp_path: Path) -> None:
    _, bare = cut(tiny.model(), data, tmp_path / "1")
    _, recovered = cut(tiny.model(), data, tmp_path / "2", steps=3)
    assert building.outline(bare.model) == building.outline(recovered.model)
    assert not tiny.same_weights(bare.model, recovered.model)
    assert tiny.effect(pruning(steps=3)).trains_head and not tiny.effect(pruning()).trains_head


def test_planning_knows_who_trains_the_head_and_who_ranks_by_it() -> None:
    by_name = {criterion: pruning(criterion=criterion) for criterion in CRITERIA}
    by_gradient = {"gradient_norm", "taylor", "fisher", "kwon"}
    assert {name for name, stage in by_name.items() if tiny.effect(stage).reads_head} == by_gradient
    needs_none = {"magnitude", "weight_product", "random"}
    assert {name for name, stage in by_name.items() if not tiny.effect(stage).reads_task} == needs_none
    during_training = pruning(importance="training", training_steps=3)
    assert tiny.effect(during_training).trains_head, "ranking during training is training"
    assert not tiny.effect(during_training).reads_head, "what it ranks by, it learns"
    assert not any(tiny.effect(stage).trains_head for stage in by_name.values())
