"""MobileBERT's knowledge transfer: its losses against float64 loops, and its stage, layer after layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from edgemin import config
from edgemin.data.module import DataModule
from edgemin.distillation.feature_maps import feature_map_error, mean_error, variance_error
from edgemin.distillation.mobilebert import MobileBERT
from edgemin.distillation.multi import Multi
from edgemin.distillation.relation import attention_kl
from edgemin.encoder import parts, slicing, taps
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.training.fit import Fit

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

LENGTHS = [5, 7, 1, 3]  # of 7
MASK = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()


def whole(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    return feature_map_error(teacher, student, mask, normalize=False)


def normalized(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    return feature_map_error(teacher, student, mask, normalize=True)


LOSSES = [whole, normalized, mean_error, variance_error]


def maps(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def moments(units: list[float]) -> tuple[float, float]:
    mean = sum(units) / len(units)
    return mean, sum((unit - mean) ** 2 for unit in units) / len(units)


def of_token(loss: Any, teacher: list[float], student: list[float]) -> float:
    """The equations for one token, one number at a time."""
    (mean_t, variance_t), (mean_s, variance_s) = moments(teacher), moments(student)
    if loss is mean_error:
        return (mean_t - mean_s) ** 2
    if loss is variance_error:
        return abs(variance_t - variance_s)
    if loss is normalized:
        teacher = [(unit - mean_t) / variance_t**0.5 for unit in teacher]
        student = [(unit - mean_s) / variance_s**0.5 for unit in student]
    return sum((a - b) ** 2 for a, b in zip(teacher, student, strict=True)) / len(teacher)


# The losses


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_equals_a_float64_loop_over_its_equation(loss: Any) -> None:
    teacher, student = maps(0), maps(1)
    sequences = [
        sum(of_token(loss, teacher[i, t].tolist(), student[i, t].tolist()) for t in range(length)) / length
        for i, length in enumerate(LENGTHS)
    ]
    found = loss(teacher, student, MASK)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(sum(sequences) / len(sequences), rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_maps_have_no_loss_and_neither_padding_nor_neighbours_change_it(loss: Any) -> None:
    teacher, student = maps(0), maps(1)
    assert loss(teacher, teacher, MASK).item() == 0
    found = loss(teacher, student, MASK)
    padded = [functional.pad(side, (0, 0, 0, 3), value=9.0) for side in (teacher, student)]
    torch.testing.assert_close(loss(*padded, functional.pad(MASK, (0, 3))), found)
    alone = [loss(teacher[[i], :n], student[[i], :n], MASK[[i], :n]) for i, n in enumerate(LENGTHS)]
    torch.testing.assert_close(torch.stack(alone).mean(), found)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_sequence_without_tokens_adds_nothing_and_is_not_counted(loss: Any) -> None:
    teacher, student, mask = maps(0), maps(1).requires_grad_(), MASK.clone()
    mask[1] = 0
    rest = [0, 2, 3]
    found = loss(teacher, student, mask)
    torch.testing.assert_close(found, loss(teacher[rest], student[rest], MASK[rest]))
    found.backward()
    assert student.grad is not None and student.grad.isfinite().all() and not student.grad[1].any()
    assert loss(teacher, student, torch.zeros_like(mask)).item() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_in_float32_under_autocast_and_gives_the_teacher_no_gradient(loss: Any) -> None:
    teacher = maps(0, torch.bfloat16).requires_grad_()
    student = maps(1, torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(teacher, student, MASK)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), loss(teacher.double(), student.double(), MASK), rtol=1e-5, atol=1e-7)
    found.backward()
    assert teacher.grad is None and student.grad is not None


# The stage


def transfer(**settings: Any) -> MobileBERT:
    given: dict[str, Any] = {"steps": 6, "batch_size": 8, "task_weight": 0.0, "learning_rate": 1e-3, "warmup": 0.0}
    given |= settings
    return tiny.stage(
        MobileBERT, **(given if "epochs" not in settings else {k: v for k, v in given.items() if k != "steps"})
    )


def student_of(family: str = "bert", **shape: Any) -> PreTrainedModel:
    return tiny.model(family, **shape)


def teacher_of(family: str = "bert", **shape: Any) -> PreTrainedModel:
    return tiny.model(family, **({"layers": 6, "seed": 5} | shape))


def by_depth(of: PreTrainedModel) -> list[list[Tensor]]:
    return [[value.detach().clone() for value in group] for group in parts.parameters_by_depth(of)]


def changed(before: list[list[Tensor]], after: list[list[Tensor]]) -> list[int]:
    """At which depths (0: embeddings, l: layer l, last: head) any weight has moved."""
    pairs = enumerate(zip(before, after, strict=True))
    return [depth for depth, (one, two) in pairs if any(not torch.equal(*pair) for pair in zip(one, two, strict=True))]


class Watch(tiny.pl.Callback):
    """Which depths moved in each phase, and at which layers the student ran."""

    def __init__(self) -> None:
        self.moved: list[list[int]] = []
        self.deepest: list[int] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = by_depth(pl_module.model)
        layers = pl_module.model.get_submodule("bert.encoder.layer")
        self.ran: set[int] = set()
        self.hooks = [
            layer.register_forward_pre_hook(lambda *_, index=index: self.ran.add(index + 1))
            for index, layer in enumerate(layers)
        ]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        self.moved.append(changed(self.before, by_depth(pl_module.model)))
        self.deepest.append(max(self.ran))


WEIGHTS = {"feature_weight": 2.0, "mean_weight": 3.0, "variance_weight": 0.5, "attention_weight": 0.7}


def expected_terms(student: PreTrainedModel, teacher: PreTrainedModel, batch: Any) -> tuple[list[Tensor], Tensor]:
    """Each layer's terms with these weights, a third of them as there are three; and the answers', half and half."""
    with torch.no_grad():
        theirs = taps.read(teacher, batch, projections=[1, 3, 5], hidden=[2, 4, 6], logits=True)
        mine = taps.read(student, batch, projections=[0, 1, 2], hidden=[1, 2, 3], logits=True)
    mask, layers = batch["attention_mask"], []
    for layer, of in ((1, 2), (2, 4), (3, 6)):
        sides = theirs.hidden[of], mine.hidden[layer]
        found = 2.0 * normalized(*sides, mask) + 3.0 * mean_error(*sides, mask) + 0.5 * variance_error(*sides, mask)
        layers.append(
            (found + 0.7 * attention_kl(theirs.projections[of - 1], mine.projections[layer - 1], mask, 4)) / 3
        )
    assert mine.logits is not None and theirs.logits is not None
    logs = mine.logits.log_softmax(-1)
    soft = functional.kl_div(logs, theirs.logits.softmax(-1), reduction="batchmean")
    return layers, 0.5 * functional.nll_loss(logs, batch["labels"]) + 0.5 * soft


def test_all_layers_at_once_have_the_mean_of_every_matched_layers_losses(data: DataModule, batch: Any) -> None:
    student, teacher = student_of(), teacher_of()
    stage = transfer(progressive=False, task_weight=0.3, **WEIGHTS)
    tiny.prepared(stage, student, teacher, data)
    stage.setup("fit")
    layers, answers = expected_terms(student, teacher, batch)
    torch.testing.assert_close(stage.loss(batch).detach(), sum(layers) + 0.3 * answers, rtol=1e-5, atol=1e-6)


def test_layer_by_layer_each_has_its_own_share_and_the_last_fit_is_on_the_task_alone(
    data: DataModule, batch: Any
) -> None:
    student, teacher = student_of(), teacher_of()
    stage = tiny.prepared(transfer(task_weight=0.3, **WEIGHTS), student, teacher, data)
    layers, answers = expected_terms(student, teacher, batch)
    for stage.phase, expected in enumerate([*layers, 0.3 * answers]):
        stage.setup("fit")
        torch.testing.assert_close(stage.loss(batch).detach(), expected, rtol=1e-5, atol=1e-6)


def test_in_a_sum_of_methods_it_is_what_it_is_alone(data: DataModule, batch: Any) -> None:
    student, teacher = student_of(), teacher_of()
    own = {"progressive": False, "task_weight": 0.3, "alpha": 0.25}
    alone = tiny.prepared(transfer(**own), student, teacher, data)
    alone.setup("fit")
    part = {"_target_": "edgemin.distillation.mobilebert.MobileBERT", "weight": 2.0, **own}
    stage = tiny.stage(Multi, methods={"transfer": part}, task_weight=0.0, steps=6, batch_size=8)
    tiny.prepared(stage, student, teacher, data)
    torch.testing.assert_close(stage.loss(batch), 2 * alone.loss(batch))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_last_fit_may_have_labels_alone_or_the_teachers_answers_alone(
    alpha: float, data: DataModule, batch: Any
) -> None:
    student, teacher = student_of(), teacher_of()
    stage = tiny.prepared(transfer(task_weight=1.0, alpha=alpha), student, teacher, data)
    assert tiny.effect(stage).reads_answers == (alpha > 0) and tiny.effect(stage).trains_head
    stage.phase = 3
    stage.setup("fit")
    logs = tiny.logits(student, batch).log_softmax(-1)
    soft = functional.kl_div(logs, tiny.logits(teacher, batch).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(
        stage.loss(batch).detach(), soft if alpha else functional.nll_loss(logs, batch["labels"])
    )


class Modes(tiny.pl.Callback):
    """In each fit, the depths whose dropout is on, and the rate that each depth learns at."""

    def __init__(self) -> None:
        self.drop: list[set[str]] = []
        self.rates: list[dict[int, float]] = []

    def on_train_batch_end(self, trainer: Any, stage: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            return
        drop = [name for name, module in stage.model.named_modules() if "dropout" in name.lower() and module.training]
        self.drop.append(
            {name.split(".")[3] if ".layer." in name else name.split(".")[1] for name in drop if "bert" in name}
        )
        rates = {
            id(one): group["initial_lr"] for group in trainer.optimizers[0].param_groups for one in group["params"]
        }
        depths = enumerate(parts.parameters_by_depth(stage.model))
        self.rates.append({depth: rates[id(group[0])] for depth, group in depths if id(group[0]) in rates})


@pytest.mark.parametrize("lower_rate", [0.0, 0.1])
def test_layers_below_are_frozen_without_dropout_or_learn_on_more_slowly(
    lower_rate: float, data: DataModule, tmp_path: Path
) -> None:
    seen, watch = Modes(), Watch()
    stage = transfer(steps=8, task_weight=1.0, lower_rate=lower_rate, learning_rate=1e-3)
    tiny.fit(stage, student_of(dropout=0.1), data, [teacher_of()], work=tmp_path / "work", callbacks=[seen, watch])
    whole = {depth: 1e-3 for depth in range(5)}
    if lower_rate:
        assert seen.rates == [{0: 1e-3, 1: 1e-3}, {1: 1e-4, 2: 1e-3}, {1: 1e-4, 2: 1e-4, 3: 1e-3}, whole]
        assert watch.moved == [[0, 1], [1, 2], [1, 2, 3], [0, 1, 2, 3, 4]], "the embeddings rest after the first"
    else:
        assert seen.rates == [{0: 1e-3, 1: 1e-3}, {2: 1e-3}, {3: 1e-3}, whole]
        assert watch.moved == [[0, 1], [2], [3], [0, 1, 2, 3, 4]]
    learning = [{depth - 1 for depth in rates if depth} for rates in seen.rates[:3]]
    assert [{int(name) for name in names if name.isdigit()} for names in seen.drop[:3]] == learning
    assert ["embeddings" in names for names in seen.drop] == [True, False, False, True]
    assert {"0", "1", "2"} <= seen.drop[3]


@pytest.mark.parametrize("settings", [{}, {"normalize": False}, {"progressive": False}])
def test_a_student_equal_to_its_teacher_has_no_loss(settings: Any, data: DataModule, batch: Any) -> None:
    stage = transfer(**settings)
    tiny.prepared(stage, tiny.model(), tiny.model(), data)
    assert stage.loss(batch).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("student", ["bert", "distilbert", "roberta", "mobilebert"])
@pytest.mark.parametrize("teacher", ["bert", "mobilebert"])
def test_families_teach_one_another(student: str, teacher: str, data: DataModule, batch: Any) -> None:
    stage = transfer(progressive=False)
    tiny.prepared(stage, student_of(student), teacher_of(teacher), data)
    loss = stage.loss(batch)
    loss.backward()
    assert loss.isfinite() and loss.item() > 0
    assert all(value.grad is not None for group in parts.parameters_by_depth(stage.model)[:-1] for value in group)


def test_layer_after_layer_only_that_layer_moves_and_nothing_above_it_runs(data: DataModule, tmp_path: Path) -> None:
    watch = Watch()
    stage = transfer(steps=7)
    fitted = tiny.fit(stage, student_of(), data, [teacher_of()], work=tmp_path / "work", callbacks=[watch])
    assert watch.moved == [[0, 1], [2], [3]], "the embeddings with the first layer, the head never"
    assert watch.deepest == [1, 2, 3]
    assert [fit.steps for fit in stage.fits()] == [2, 2, 3] and fitted.steps == 7
    assert all(parameter.requires_grad for parameter in fitted.model.parameters())


def test_layers_between_two_matched_ones_learn_with_the_upper_one(data: DataModule, tmp_path: Path) -> None:
    watch = Watch()
    stage = transfer(steps=4, layer_map={4: 6, 2: 1})
    tiny.fit(stage, student_of(layers=5), data, [teacher_of()], work=tmp_path / "work", callbacks=[watch])
    assert watch.moved == [[0, 1, 2], [3, 4]]


def test_with_a_task_loss_the_whole_model_learns_at_last(data: DataModule, tmp_path: Path) -> None:
    watch = Watch()
    stage = transfer(steps=4, task_weight=1.0)
    assert tiny.effect(stage).trains_head and not tiny.effect(stage).leaves_head_stale
    tiny.fit(stage, student_of(), data, [teacher_of()], work=tmp_path / "work", callbacks=[watch])
    assert watch.moved == [[0, 1], [2], [3], [0, 1, 2, 3, 4]]
    assert watch.deepest == [1, 2, 3, 3]
    assert tiny.effect(stage).trains_head


def test_each_layer_comes_closer_to_its_teachers(data: DataModule, tmp_path: Path) -> None:
    student, teacher = student_of(), teacher_of()
    batch = data.train.batch(range(24))

    def errors(of: PreTrainedModel) -> list[float]:
        with torch.no_grad():
            mine = taps.read(of, batch, hidden=[1, 2, 3], logits=False).hidden
            theirs = taps.read(teacher, batch, hidden=[2, 4, 6], logits=False).hidden
        return [normalized(theirs[2 * layer], mine[layer], batch["attention_mask"]).item() for layer in (1, 2, 3)]

    before = errors(student)
    fitted = tiny.fit(
        transfer(steps=36, learning_rate=1e-2, warmup=0.1), student, data, [teacher], work=tmp_path / "work"
    )
    after = errors(fitted.model)
    assert all(now < 0.8 * then for now, then in zip(after, before, strict=True)), (before, after)


@pytest.mark.parametrize("task_weight", [0.0, 1.0])
@pytest.mark.parametrize(("kill", "phase"), [(1, 0), (2, 1), (1, 2), (2, 2)])
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(
    kill: int, phase: int, task_weight: float, data: DataModule, tmp_path: Path
) -> None:
    def run(work: str, **settings: Any) -> Any:
        stage = transfer(steps=9 if task_weight == 0 else 12, task_weight=task_weight)
        return tiny.fit(stage, student_of(dropout=0.1), data, [teacher_of()], work=tmp_path / work, **settings)

    unbroken = run("unbroken")
    with pytest.raises(tiny.KilledError):
        run("killed", seconds=0.0, callbacks=[tiny.Kill(kill, phase)])
    resumed = run("killed", seconds=0.0)
    assert tiny.same_weights(resumed.model, unbroken.model)
    assert resumed.steps == unbroken.steps


def test_a_head_that_nothing_trained_keeps_its_weights_killed_or_not(data: DataModule, tmp_path: Path) -> None:
    student = student_of()
    before = by_depth(student)
    with pytest.raises(tiny.KilledError):
        tiny.fit(transfer(), student, data, [teacher_of()], work=tmp_path, seconds=0.0, callbacks=[tiny.Kill(2, 1)])
    fitted = tiny.fit(transfer(), student_of(), data, [teacher_of()], work=tmp_path, seconds=0.0)
    assert changed(before, by_depth(fitted.model)) == [0, 1, 2, 3]


# The settings


def test_steps_and_epochs_are_divided_among_the_fits(data: DataModule) -> None:
    def fits(layers: int = 3, **settings: Any) -> list[Fit]:
        stage = transfer(**settings)
        tiny.prepared(stage, student_of(layers=layers), teacher_of(), data)
        return stage.fits()

    assert [fit.steps for fit in fits(steps=11)] == [3, 3, 5]
    assert [fit.steps for fit in fits(steps=11, task_weight=1.0)] == [2, 2, 2, 5]
    assert [fit.steps for fit in fits(steps=11, progressive=False)] == [11]
    assert [fit.epochs for fit in fits(epochs=1.5)] == [0.5, 0.5, 0.5]
    assert [fit.patience for fit in fits(steps=8, task_weight=1.0, patience=2)] == [None, None, None, 2]
    assert not any(fit.trains for fit in fits(steps=0))


def test_too_few_steps_for_every_layer_are_noted(data: DataModule) -> None:
    stage = transfer(steps=2)
    tiny.prepared(stage, student_of(), teacher_of(), data)
    assert [fit.steps for fit in stage.fits()] == [0, 0, 2]
    assert stage.notes == ["2 steps are too few for a fit of each layer: none of [1, 2]"]


def test_planning_knows_from_the_settings_alone_what_trains() -> None:
    assert tiny.effect(transfer()).steps and not tiny.effect(transfer(steps=0)).steps
    assert len(transfer().fits()) > 1 and len(transfer(progressive=False).fits()) == 1
    assert (
        tiny.effect(transfer(task_weight="auto", patience=2), head_trained=True).reads_holdout
        and not tiny.effect(transfer()).reads_holdout
    )
    assert tiny.effect(transfer()).leaves_head_stale and not tiny.effect(transfer()).trains_head


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"feature_weight": -1.0}, "feature_weight"),
        ({"mean_weight": float("nan")}, "mean_weight"),
        ({"variance_weight": float("inf")}, "variance_weight"),
        ({"attention_weight": -0.1}, "attention_weight"),
        (
            dict.fromkeys(["feature_weight", "mean_weight", "variance_weight", "attention_weight"], 0.0),
            "feature_weight",
        ),
        ({"patience": 1}, "patience"),
        ({"task_weight": -1.0}, "task_weight"),
        ({"alpha": 1.5}, "alpha"),
        ({"lower_rate": -0.1}, "lower_rate"),
        ({"lower_rate": 0.1, "progressive": False}, "lower_rate"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: expected [^\n]* given [^\n]*$"):
        tiny.effect(transfer(**settings))


BERT = tiny.outline("bert", 3, 512, 4)


@pytest.mark.parametrize(
    ("settings", "student", "teacher", "key"),
    [
        ({"layer_map": {4: 1}}, BERT, BERT, "layer_map"),
        ({"layer_map": {1: 4}}, BERT, BERT, "layer_map"),
        ({"layer_map": {}}, BERT, BERT, "layer_map"),
        ({}, replace(BERT, hidden=384), BERT, "feature_weight"),
        ({}, BERT, tiny.outline("bert", 3, 512, 8), "attention_weight"),
        ({}, BERT, replace(BERT, family="modernbert"), "attention_weight"),
    ],
)
def test_models_that_cannot_be_matched_are_refused_in_planning(
    settings: Any, student: Outline, teacher: Outline, key: str
) -> None:
    with pytest.raises(UserError, match=rf"^{key}: expected [^\n]* given [^\n]*$"):
        transfer(**settings).match(student, [teacher])


def test_what_is_not_compared_need_not_be_equal(data: DataModule, batch: Any) -> None:
    transfer(feature_weight=0.0, attention_weight=0.0).match(BERT, [tiny.outline("modernbert", 6, 384, 8)])
    stage = transfer(feature_weight=0.0, attention_weight=0.0, progressive=False)
    tiny.prepared(stage, student_of(), tiny.model("modernbert", hidden=64), data)
    assert stage.loss(batch).isfinite()


def test_heads_pruned_from_a_matched_layer_are_refused_when_they_are_known(data: DataModule) -> None:
    student = student_of()
    slicing.slice_heads(student, 1, [0, 2])
    stage = transfer()
    stage.match(tiny.outline("bert", 3, 512, None), [BERT])
    with pytest.raises(UserError, match=r"^attention_weight: expected [^\n]* given 2 heads [^\n]* 4 in the teacher$"):
        tiny.prepared(stage, student, teacher_of(), data)
    tiny.prepared(transfer(layer_map={1: 2, 3: 6}), student, teacher_of(), data)


def test_the_yaml_has_the_published_weights() -> None:
    node = tiny.node("distill", "mobilebert")
    stage = config.construct(node, "distill")
    assert isinstance(stage, MobileBERT) and stage.progressive and stage.normalize
    assert stage.weights == {"feature": 100.0, "mean": 5000.0, "variance": 5.0, "attention": 1.0} and stage.alpha == 0.5
