"""Gradual masks: gates that equal slices, a sparsity that is reached, scores that are movements; resumed, refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import edgemin
from edgemin import artifact, config
from edgemin.data.module import DataModule
from edgemin.encoder import building, gates, parts, taps
from edgemin.encoder.gates import Gates
from edgemin.encoder.outline import Outline, QuantizedLayers
from edgemin.errors import UserError
from edgemin.pruning import hard_concrete, settling
from edgemin.pruning.gradual import GradualPruning
from edgemin.pruning.joint import JointPruning
from edgemin.pruning.layer_match import nearest_layers
from edgemin.pruning.movement import MovementPruning, straight_through
from edgemin.training.teaching import OF_A_CORPUS

FAMILIES = (*tiny.CUTTABLE, "electra")
KINDS = ("joint", "movement")


@pytest.fixture
def data(tmp_path: Path) -> DataModule:
    return tiny.data(tmp_path)


def stage(kind: str, **settings: Any) -> GradualPruning:
    """A stage of the yaml, a few steps long."""
    short = {"mask_epochs": None, "mask_steps": 4, "epochs": None, "steps": 2, "batch_size": 8, "multiple": 4}
    return config.construct(tiny.node("prune", kind) | short | settings, "prune", GradualPruning)


def teachers_of(stage: GradualPruning, start: PreTrainedModel) -> list[PreTrainedModel]:
    return [copy.deepcopy(start) for _ in stage.teachers]


def some_gates(outline: Outline, *, without: int | None = 1) -> Gates:
    """Gates between 0 and 1 of which some are closed, all of one layer too."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int | None, closed: int) -> Tensor:
        assert count is not None
        found = 0.1 + 0.9 * torch.rand(count, generator=generator, dtype=torch.float64)
        return found.index_fill(0, torch.randperm(count, generator=generator)[:closed], 0.0)

    count = len(outline.layers)
    attention, ffn = draw(count, 0), draw(count, 0)
    if without is not None:
        attention[without] = ffn[without] = 0.0
    heads = [draw(layer.heads, 1 + index % 2) for index, layer in enumerate(outline.layers)]
    units = [draw(layer.ffn, 8 * index) for index, layer in enumerate(outline.layers)]
    return Gates(attention, heads, ffn, units, draw(outline.hidden, 8))


# Gates are slices


@pytest.mark.parametrize("narrow", [False, True], ids=["", "embeddings of their own width"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folded_and_sliced_computes_what_the_gates_let_pass(family: str, narrow: bool, data: DataModule) -> None:
    model = tiny.model(family).double()
    if narrow:
        if family != "electra":
            pytest.skip("has no projection")
        model.config.embedding_size = 16
        model = building.build(model.config).double().eval()
    before = building.outline(model)
    chosen = some_gates(before)
    batch = data.evaluation["validation"].batch(range(8))
    plain = tiny.logits(model, batch)
    with gates.gated(model, lambda: chosen):
        masked = tiny.logits(model, batch)
    assert torch.equal(tiny.logits(model, batch), plain), "the gates are gone"
    assert (masked - plain).abs().max() > 1e-3
    settling.cut(model, chosen)
    torch.testing.assert_close(tiny.logits(model, batch), masked, rtol=0, atol=1e-9)
    after = building.outline(model)
    assert (len(after.layers), after.hidden) == (2, 24)
    assert [layer.heads for layer in after.layers] == [3, 3] and [layer.ffn for layer in after.layers] == [48, 32]


def test_a_closed_gate_of_a_block_drops_its_bias_and_leaves_its_norm(data: DataModule) -> None:
    model = tiny.model().double()
    whole = some_gates(building.outline(model), without=None)
    closed = whole._replace(attention=torch.tensor([1.0, 0.0, 1.0]))
    batch = data.evaluation["validation"].batch(range(4))
    with gates.gated(model, lambda: closed):
        found = tiny.logits(model, batch)
    output = parts.layers(model)[1].output
    assert isinstance(output, nn.Linear)
    with torch.no_grad():
        output.weight.zero_()
        output.bias.zero_()
    with gates.gated(model, lambda: whole._replace(attention=torch.ones(3))):
        torch.testing.assert_close(tiny.logits(model, batch), found, rtol=0, atol=1e-12)


# The sparsity


def test_expected_sparsity_is_the_mean_over_all_ways_to_close_gates() -> None:
    """Every pattern of ten gates, weighed by its probability, its sparsity counted by the outline."""
    outline = tiny.outline("bert", 2, 8, 2)
    layers = tuple(replace(layer, ffn=1) for layer in outline.layers)
    outline = replace(outline, layers=layers, hidden=2)
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(12, generator=generator, dtype=torch.float64)

    def arranged(flat: Tensor) -> Gates:
        attention, first, second, ffn, one, two, hidden = flat.split([2, 2, 2, 2, 1, 1, 2])
        return Gates(attention, [first, second], ffn, [one, two], hidden)

    expected = 0.0
    for pattern in range(2**12):
        bits = torch.tensor([pattern >> place & 1 for place in range(12)]).double()
        weight = float((bits * probability + (1 - bits) * (1 - probability)).prod())
        found = arranged(bits)
        kept = settling.Left(
            [True, True],
            [int(block * own.sum()) for block, own in zip(found.attention, found.heads, strict=True)],
            [int(block * own.sum()) for block, own in zip(found.ffn, found.units, strict=True)],
            int(found.hidden.sum()),
        )
        expected += weight * settling.sparsity_of(kept, outline)
    assert float(settling.expected_sparsity(arranged(probability), outline)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("target", [0.1, 0.5, 0.8])
def test_settled_gates_have_the_least_sparsity_above_the_target(target: float, family: str) -> None:
    model = tiny.model(family)
    outline = building.outline(model)
    generator = torch.Generator().manual_seed(3)

    def draw(count: int | None) -> Tensor:
        assert count is not None
        return 3 * torch.randn(count, generator=generator)

    layers = outline.layers
    log_alpha = Gates(
        draw(3), [draw(layer.heads) for layer in layers], draw(3), [draw(layer.ffn) for layer in layers], draw(32)
    )
    chosen = settling.settled(log_alpha, outline, target, 4)
    settling.cut(model, chosen)
    found = settling.sparsity(outline, building.outline(model))
    assert found >= target
    shifts = [0.05 * step for step in range(-400, 401)]
    reachable = [settling.sparsity_of(settling.left(log_alpha, shift, 4), outline) for shift in shifts]
    assert reachable == sorted(reachable, reverse=True), "less goes where log α is larger"
    assert found <= min(value for value in reachable if value >= target)
    assert all(layer.ffn is not None and layer.ffn % 4 == 0 for layer in building.outline(model).layers)
    assert parts.hidden_size(model) % 4 == 0
    for gate, own in zip(chosen.units, log_alpha.units, strict=True):
        stays = gate > 0
        torch.testing.assert_close(gate[stays], torch.sigmoid(own[stays] * 1.5 * 0.8))
        assert own[stays].min() > own[~stays].max() if 0 < int(stays.sum()) < len(own) else True


def test_when_everything_closes_a_head_and_some_units_of_one_layer_stay() -> None:
    outline = building.outline(tiny.model())
    closed = Gates(*(torch.full((3,), -9.0), [torch.full((4,), -9.0)] * 3) * 2, torch.full((32,), -9.0))
    closed = closed._replace(ffn=torch.tensor([-9.0, -8.0, -9.0]))
    greatest = settling.greatest_sparsity(outline, 4)
    closed = closed._replace(units=[torch.full((48,), -9.0)] * 3)
    left = settling.left(closed, 0.0, 4)
    assert left == settling.Left([False, True, False], [1, 1, 1], [4, 4, 4], 4)
    assert settling.sparsity_of(left, outline) == pytest.approx(greatest)
    chosen = settling.settled(closed, outline, greatest - 1e-6, 4)
    assert [len(settling.open_units(gate)) for gate in chosen.heads] == [0, 1, 0], "all of a layer that goes is gone"
    assert [len(settling.open_units(gate)) for gate in chosen.units] == [0, 4, 0]


def test_a_layer_whose_attention_alone_is_closed_keeps_its_best_head_at_its_gates() -> None:
    model = tiny.model()
    outline = building.outline(model)
    heads = [torch.tensor([4.0, 4.0, 4.0, 4.0]), torch.tensor([1.0, 2.0, 4.0, 1.0]), torch.tensor([4.0] * 4)]
    units = [torch.full((48,), 4.0)] * 3
    log_alpha = Gates(torch.tensor([4.0, -4.0, 4.0]), heads, torch.tensor([4.0] * 3), units, torch.full((32,), 4.0))
    chosen = settling.settled(log_alpha, outline, 0.01, 4)
    assert settling.open_units(chosen.heads[1]) == [2]
    assert float(chosen.attention[1]) == pytest.approx(float(torch.sigmoid(torch.tensor(-4.0 * 1.2))))
    settling.cut(model, chosen)
    assert parts.heads(model) == [4, 1, 4]


# The stages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_has_the_sparsity_and_loads_with_equal_logits(
    kind: str, family: str, data: DataModule, tmp_path: Path
) -> None:
    start = tiny.model(family)
    before = building.outline(start)
    params = sum(parameter.numel() for parameter in start.parameters())
    pruning = stage(kind, sparsity=0.5)
    fitted = tiny.fit(pruning, start, data, teachers_of(pruning, start), work=tmp_path / "work")
    after = building.outline(fitted.model)
    found = settling.sparsity(before, after)
    assert fitted.steps == 6
    assert found >= 0.5 if kind == "joint" else found == pytest.approx(0.5, abs=0.06)
    assert f"{found:.1%} of the weights of the layers' matrices are gone, 50.0% were to go" in fitted.notes[-1]
    rebuilt = sum(parameter.numel() for parameter in building.build(fitted.model.config, after).parameters())
    assert sum(parameter.numel() for parameter in fitted.model.parameters()) == rebuilt < params
    assert all(parameter.requires_grad for parameter in fitted.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in fitted.model.modules())
    assert {"heads.1", "ffn.1"} <= fitted.scores.keys() and {"heads", "ffn"} <= fitted.findings["pruning"].keys()

    (tmp_path / "artifact").mkdir()
    artifact.save(tmp_path / "artifact", fitted.model, data.tokenizer, {})
    loaded, _ = edgemin.load(tmp_path / "artifact")
    batch = data.evaluation["validation"].batch(range(8))
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(fitted.model, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_that_is_cut_is_the_one_under_masks(
    kind: str, data: DataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tiny.model()
    batch = data.evaluation["validation"].batch(range(8))
    seen: list[Tensor] = []
    cut = settling.cut

    def watched(model: PreTrainedModel, chosen: Gates) -> None:
        with gates.gated(model, lambda: chosen):
            seen.append(tiny.logits(model, batch))
        cut(model, chosen)

    monkeypatch.setattr(settling, "cut", watched)
    pruning = stage(kind, sparsity=0.5, steps=0)
    fitted = tiny.fit(pruning, start, data, teachers_of(pruning, start), work=tmp_path)
    torch.testing.assert_close(tiny.logits(fitted.model, batch), seen[0], rtol=0, atol=1e-5)


def test_the_lagrangian_brings_the_expected_sparsity_to_the_target(data: DataModule, tmp_path: Path) -> None:
    start = tiny.model()
    pruning = stage("joint", sparsity=0.4, batch_size=2, mask_steps=150, mask_learning_rate=0.2, steps=0, teacher=None)
    fitted = tiny.fit(pruning, start, data, work=tmp_path)
    curve = [values for _, _, values in fitted.points if "expected_sparsity" in values]
    assert curve[0]["expected_sparsity"] < 0.1 and curve[0]["target_sparsity"] < 0.05
    assert curve[-1]["expected_sparsity"] == pytest.approx(0.4, abs=0.05)
    assert curve[-1]["target_sparsity"] == pytest.approx(0.4)


def test_embeddings_do_not_learn_in_joint_pruning(data: DataModule, tmp_path: Path) -> None:
    start = tiny.model()
    before = tiny.weights(start)
    pruning = stage("joint", sparsity=0.05, multiple=1)
    fitted = tiny.fit(pruning, start, data, teachers_of(pruning, start), work=tmp_path)
    assert pruning.gone is not None
    words = fitted.model.get_submodule("bert.embeddings.word_embeddings").weight
    assert torch.equal(
        words, before["bert.embeddings.word_embeddings.weight"][:, settling.open_units(pruning.gone.hidden)]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "phase"), [(3, 0), (2, 1)])
def test_a_killed_run_ends_with_the_same_weights(
    kind: str, batch: int, phase: int, data: DataModule, tmp_path: Path
) -> None:
    def run(work: Path, **more: Any) -> Any:
        start = tiny.model(dropout=0.1)
        pruning = stage(kind, sparsity=0.5, steps=3)
        return tiny.fit(pruning, start, data, teachers_of(pruning, tiny.model()), work=work, **more)

    whole = run(tmp_path / "whole")
    with pytest.raises(tiny.KilledError):
        run(tmp_path / "killed", seconds=0, callbacks=[tiny.Kill(batch, phase)])
    resumed = run(tmp_path / "killed")
    assert building.outline(resumed.model) == building.outline(whole.model)
    assert tiny.same_weights(resumed.model, whole.model)
    assert resumed.notes == whole.notes and resumed.findings == whole.findings


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparsity_of_zero_only_fine_tunes_and_says_so(kind: str, data: DataModule, tmp_path: Path) -> None:
    start = tiny.model()
    before = building.outline(start)
    pruning = stage(kind, sparsity=0.0)
    fitted = tiny.fit(pruning, start, data, teachers_of(pruning, start), work=tmp_path)
    assert (fitted.steps, building.outline(fitted.model)) == (2, before)
    assert "sparsity 0.0 removes nothing" in fitted.notes


def test_the_gates_have_a_constant_rate_and_the_multipliers_ascend(data: DataModule, tmp_path: Path) -> None:
    seen: list[list[tuple[float, bool]]] = []

    class Watch(tiny.pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append([(group["lr"], group["maximize"]) for group in trainer.optimizers[0].param_groups])

    start = tiny.model()
    pruning = stage("joint", mask_learning_rate=0.03, steps=0, mask_steps=4, warmup=0.5, learning_rate=1e-3)
    tiny.fit(pruning, start, data, teachers_of(pruning, start), work=tmp_path, callbacks=[Watch()])
    assert [groups[0][0] for groups in seen] == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])
    assert all(groups[2:] == [(0.03, False), (0.03, True)] for groups in seen)


# Movement


def test_the_gradient_of_a_score_is_the_movement_of_the_weights_it_gates(data: DataModule) -> None:
    """dL/dS = Σ w dL/dw over W_O's columns, over W_V's rows and bias, and over W_2's columns."""
    model = tiny.model().double()
    pruning = stage("movement", teacher=None)
    tiny.plan(pruning, model)
    pruning.prepare(model, data)
    nn.Module.double(pruning.gating)
    pruning.batch_count = 1
    batch = {name: tensor for name, tensor in data.evaluation["validation"].batch(range(8)).items()}
    drawn = pruning.drawn()
    assert isinstance(pruning, MovementPruning)
    with gates.gated(model, lambda: drawn):
        data.kind.loss(taps.logits(model, batch), batch["labels"]).backward()
    for index, layer in enumerate(parts.layers(model)):
        moved = {
            path: linear.weight * linear.weight.grad
            for path in ("attention.output.dense", "attention.self.value", "output.dense")
            if isinstance(linear := layer.part(path), nn.Linear) and linear.weight.grad is not None
        }
        bias = layer.part("attention.self.value").bias
        by_head = (layer.heads, layer.head_size)
        written = moved["attention.output.dense"].sum(0).unflatten(0, by_head).sum(1)
        read = (moved["attention.self.value"].sum(1) + bias * bias.grad).unflatten(0, by_head).sum(1)
        heads, units = pruning.gating.heads[index].grad, pruning.gating.units[index].grad
        assert heads is not None and units is not None and heads.abs().min() > 0
        torch.testing.assert_close(heads, written)
        torch.testing.assert_close(heads, read)
        torch.testing.assert_close(units, moved["output.dense"].sum(0))


def test_the_lowest_scores_of_all_layers_are_closed_and_learn_all_the_same() -> None:
    scores = [nn.Parameter(torch.tensor([0.3, -0.2])), nn.Parameter(torch.tensor([0.1, 0.5, -0.1]))]
    found = straight_through(scores, 0.5)
    assert [gate.tolist() for gate in found] == [[1.0, 0.0], [1.0, 1.0, 0.0]]
    sum(((gate * torch.arange(1.0, 1 + len(gate))).sum() for gate in found), torch.zeros(())).backward()
    assert scores[0].grad is not None and scores[0].grad.tolist() == [1.0, 2.0]


def test_the_share_of_closed_gates_rises_cubically_and_stays(data: DataModule) -> None:
    pruning = stage("movement", teacher=None, sparsity=0.5, sparsity_warmup=0.5)
    model = tiny.model()
    tiny.plan(pruning, model)
    pruning.prepare(model, data)
    pruning.batch_count = 8
    closed = []
    for pruning.batch in range(8):
        closed.append(sum(int((gate == 0).sum()) for gate in pruning.drawn().units))
    assert closed == [int(144 * 0.5 * (1 - (1 - min(1.0, batch / 4)) ** 3)) for batch in range(8)]


# Layers


def test_layers_are_matched_from_the_deepest_in_order_among_open_ones() -> None:
    distances = [[1.0, 2.0, 3.0, 9.0], [5.0, 1.0, 2.0, 0.5], [9.0, 3.0, 2.0, 1.0]]
    assert nearest_layers(distances, [True] * 4) == [0, 1, 3]
    assert nearest_layers(distances, [True, True, True, False]) == [0, 1, 2]
    # the published code looks up the first place of the order by distance, and would take layer 1 here
    assert nearest_layers([[3.0, 1.0, 2.0]], [True, False, True]) == [2]
    assert nearest_layers(distances, [False, False, True, False]) == [None, None, 2]
    assert nearest_layers(distances, [False] * 4) == [None] * 3


def test_a_student_that_is_its_teacher_has_nothing_to_learn_of_its_layers(data: DataModule, tmp_path: Path) -> None:
    start = tiny.model(dropout=0.0)
    methods = {"layers": tiny.node("prune", "joint")["methods"]["layers"]}
    pruning = stage("joint", sparsity=0.0, steps=1, methods=methods, task_weight=0.0)
    fitted = tiny.fit(pruning, start, data, teachers_of(pruning, start), work=tmp_path)
    (point,) = [values for _, _, values in fitted.points if "layers.layers_loss" in values]
    assert point["layers.layers_loss"] == pytest.approx(0, abs=1e-10)


# Refusals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"multiple": 0}, "multiple"),
        ({"mask_epochs": 1.0}, "mask_epochs"),
        ({"mask_steps": None}, "mask_epochs"),
        ({"mask_steps": 0}, "mask_steps"),
        ({"mask_learning_rate": 0.0}, "mask_learning_rate"),
        ({"sparsity_warmup": 1.5}, "sparsity_warmup"),
        ({"teacher": None, "task_weight": 0.5}, "task_weight"),
        ({"teacher": None, "teacher_cache": True}, "teacher_cache"),
        ({"teacher": "parent", "methods": {}}, "methods"),
        ({"teacher": "teacher", "corpus": "text", "mask_epochs": 1.0, "mask_steps": None}, "mask_epochs"),
        ({"ratio": 0.5}, "ratio"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(kind: str, settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^prune.{key}: [^\n]*$"):
        stage(kind, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_such_parts_or_would_be_emptied_is_refused_in_planning(kind: str) -> None:
    with pytest.raises(UserError, match=r"^hidden: cannot be cut for mobilebert[^\n]*$"):
        tiny.plan(stage(kind), tiny.model("mobilebert"))
    with pytest.raises(UserError, match=r"^sparsity: expected a model in full precision[^\n]*$"):
        tiny.effect(stage(kind), replace(tiny.SMALL, quantized=QuantizedLayers("integers")))
    with pytest.raises(UserError, match=r"^sparsity: expected [^\n]*, given 0\.999[^\n]*$"):
        tiny.effect(stage(kind, sparsity=0.999))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparsity_beyond_a_model_that_planning_did_not_know_is_refused_before_training(
    kind: str, data: DataModule, tmp_path: Path
) -> None:
    start, pruning = tiny.model(), stage(kind, sparsity=0.999, teacher=None)
    outline = building.outline(start)
    tiny.effect(pruning, outline.with_heads([None] * 3).with_ffn([None] * 3), head_trained=True)
    with pytest.raises(UserError, match=r"^sparsity: expected [^\n]*, given 0\.999[^\n]*$"):
        tiny.fit(pruning, start, data, work=tmp_path)
    assert building.outline(start) == outline


def test_the_greatest_sparsity_that_is_named_is_one() -> None:
    with pytest.raises(UserError, match=r"^sparsity: expected at most 0\.\d+, ") as refused:
        tiny.effect(stage("joint", sparsity=0.9999, multiple=1))
    named = float(str(refused.value).split("at most ")[1].split(",")[0])
    assert named < settling.greatest_sparsity(tiny.SMALL, 1) < named + 1e-4
    tiny.effect(stage("joint", sparsity=named, multiple=1), head_trained=True)


@pytest.mark.parametrize("kind", KINDS)
def test_planning_does_not_know_how_much_of_a_layer_is_left(kind: str) -> None:
    found = tiny.effect(stage(kind, sparsity=0.5), head_trained=True)
    assert {(layer.heads, layer.ffn) for layer in found.outline.layers} == {(None, None)}
    assert (found.steps, found.trains_head, found.reads_task) == (6, True, True)
    assert tiny.effect(stage(kind, sparsity=0.0)).outline == tiny.SMALL


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_decide_nothing_are_known_to_planning(kind: str) -> None:
    assert tiny.effect(stage(kind, teacher="parent"), head_trained=True).idle == OF_A_CORPUS
    assert tiny.effect(stage(kind, teacher=None), head_trained=True).idle == (*OF_A_CORPUS, "methods")
    assert "mask_learning_rate" in tiny.effect(stage(kind, sparsity=0.0), head_trained=True).idle


def test_layers_of_a_teacher_that_has_none_such_are_refused() -> None:
    methods = tiny.node("prune", "joint")["methods"]
    methods["layers"]["teacher_layers"] = [4]
    with pytest.raises(UserError, match=r"^methods\.layers\.teacher_layers: expected layers from 1 to 3, given 4$"):
        tiny.effect(stage("joint", methods=methods))
    methods["layers"]["teacher_layers"] = [1, 1]
    with pytest.raises(UserError, match=r"^prune\.methods\.layers\.teacher_layers: expected null or distinct layers"):
        stage("joint", methods=methods)


def test_gates_begin_almost_open() -> None:
    open_at_first = hard_concrete.open_probability(torch.tensor(hard_concrete.LARGEST))
    assert float(open_at_first) > 0.99
    assert issubclass(JointPruning, GradualPruning)
