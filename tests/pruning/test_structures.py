"""FFN units, layers and hidden units: their scores against gates, how many go, and that slicing equals masking."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import edgemin
from edgemin import artifact, config
from edgemin.data.module import DataModule
from edgemin.encoder import building, parts, taps, truncation
from edgemin.errors import UserError
from edgemin.pruning.criteria.base import Given
from edgemin.pruning.criteria.table import CRITERIA, find
from edgemin.pruning.several import Several
from edgemin.pruning.stage import Pruning
from edgemin.pruning.structures import FFN, HEADS, HIDDEN, LAYERS, Structure
from edgemin.tasks.classification import Classification

BY_NAME: dict[str, Structure] = {"heads": HEADS, "ffn": FFN, "layers": LAYERS, "hidden": HIDDEN}
REMOVABLE = ("ffn", "heads_ffn", "layers", "hidden")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataModule:
    return tiny.data(tmp_path_factory.mktemp("data"))


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    return Classification().loss(logits, labels, "none")


def pruning(structure: str, **settings: Any) -> Pruning:
    given: dict[str, Any] = {"ratio": 0.5, "epochs": 0, "calibration_examples": 8, "batch_size": 8}
    given |= {"criterion": "taylor", "learning_rate": 1e-3, "structure": structure}
    given |= {"scope": "global"} if structure in ("layers", "hidden") else {}
    given |= settings
    return tiny.stage(
        Pruning, **{key: value for key, value in given.items() if key != "epochs" or "steps" not in settings}
    )


def reloaded(model: PreTrainedModel, data: DataModule, place: Path) -> PreTrainedModel:
    place.mkdir()
    artifact.save(place, model, data.tokenizer, {})
    return edgemin.load(place)[0]


def scored(model: PreTrainedModel, data: DataModule, name: str, of: Any, size: int = 8) -> list[Tensor]:
    return find(name).scores(Given(model, of, data.calibration(5, size, seed=1), losses))


# Scores


def gated(model: PreTrainedModel, structure: str, gates: list[Tensor]) -> ExitStack:
    """Multiply what units hand on by gates: of an FFN unit its activation, of a layer what it adds."""
    stack = ExitStack()

    def at_input(gate: Tensor) -> Any:
        return lambda _module, inputs: (inputs[0] * gate, *inputs[1:])

    def at_output(gate: Tensor) -> Any:
        def change(_module: nn.Module, inputs: Any, output: Any) -> Any:
            state = output[0] if isinstance(output, tuple) else output
            state = inputs[0] + gate * (state - inputs[0]) if structure == "layers" else state * gate
            return (state, *output[1:]) if isinstance(output, tuple) else state

        return change

    found = parts.layers(model)
    if structure == "hidden":
        stack.enter_context(found[0].module.register_forward_pre_hook(at_input(gates[0])))
    for index, layer in enumerate(found):
        if structure == "ffn":
            stack.enter_context(layer.part(layer.family.ffn_out).register_forward_pre_hook(at_input(gates[index])))
        else:
            gate = gates[0][index] if structure == "layers" else gates[0]
            stack.enter_context(layer.module.register_forward_hook(at_output(gate)))
    return stack


@pytest.mark.parametrize("family", tiny.CUTTABLE)
@pytest.mark.parametrize("structure", ["ffn", "layers", "hidden"])
def test_taylor_is_the_gradient_of_a_gate_on_every_unit(structure: str, family: str, data: DataModule) -> None:
    model = tiny.model(family).double()
    gates = [torch.ones(count, dtype=torch.double, requires_grad=True) for count in BY_NAME[structure].units(model)]
    sums = [torch.zeros_like(gate) for gate in gates]
    for batch in data.calibration(5, 1, seed=1):
        with gated(model, structure, gates):
            loss = losses(taps.logits(model, batch), batch["labels"]).sum()
        for total, gradient in zip(sums, torch.autograd.grad(loss, gates), strict=True):
            total += gradient.abs()
    for found, total in zip(scored(model, data, "taylor", BY_NAME[structure]), sums, strict=True):
        torch.testing.assert_close(found, total / 5, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", tiny.CUTTABLE)
def test_weights_rank_units_as_truncation_does(family: str, data: DataModule) -> None:
    model = tiny.model(family)
    for found, layer in zip(scored(model, data, "weight_product", FFN), parts.layers(model), strict=True):
        torch.testing.assert_close(found, truncation.ffn_importance(layer))
    torch.testing.assert_close(scored(model, data, "weight_product", HIDDEN), [truncation.hidden_importance(model)])


def test_the_activity_of_a_layer_is_how_far_it_turns_a_token(data: DataModule) -> None:
    model = tiny.model()
    turned = []
    for batch in data.calibration(5, 1, seed=1):
        states = taps.read(model, batch, hidden=range(4), logits=False).hidden
        here = batch["attention_mask"].bool()
        cosines = [torch.cosine_similarity(states[at], states[at + 1], dim=-1)[here].mean() for at in range(3)]
        turned.append(1 - torch.stack(cosines).detach())
    (found,) = scored(model, data, "activation", LAYERS, size=7)
    torch.testing.assert_close(found.float(), torch.stack(turned).mean(0), rtol=1e-4, atol=1e-6)


def test_several_structures_are_scored_in_one_pass_as_each_alone(
    data: DataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, forwards = tiny.model(), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    for name in ("taylor", "activation", "random", "magnitude"):
        both = Several([HEADS, FFN])
        del forwards[:]
        together = both.split(model, scored(model, data, name, both))
        assert len(forwards) == (1 if name in ("taylor", "activation") else 0)
        assert all(torch.equal(a, b) for a, b in zip(together[0], scored(model, data, name, HEADS), strict=True))
        if name != "random":
            assert all(torch.equal(a, b) for a, b in zip(together[1], scored(model, data, name, FFN), strict=True))


@pytest.mark.parametrize(
    ("structure", "lacks"),
    [("layers", {"gradient_norm", "magnitude", "weight_product"}), ("hidden", {"gradient_norm"})],
)
def test_a_criterion_that_a_structure_does_not_have_is_refused(structure: str, lacks: set[str]) -> None:
    for name in CRITERIA:
        if name in lacks:
            with pytest.raises(
                UserError, match=rf"^criterion: expected one of [^\n]* for {structure}, given '{name}'$"
            ):
                pruning(structure, criterion=name)
        elif structure in CRITERIA[name].structures:
            pruning(structure, criterion=name)


# How many


@pytest.mark.parametrize(
    ("structure", "settings", "left"),
    [
        ("ffn", {"ratio": 0.4}, [32, 32, 32]),  # 19 of 48 leave 29: rounded up to 32
        ("ffn", {"ratio": 0.4, "multiple": 1}, [29, 29, 29]),
        ("ffn", {"ratio": 0.4, "multiple": 1, "rounds": 3, "schedule": "cubic"}, [29, 29, 29]),
        ("layers", {"ratio": 0.4}, 2),
        ("hidden", {"ratio": 0.5}, 16),
        ("hidden", {"ratio": 0.3}, 24),
        ("heads_ffn", {"ratio": 0.25, "ffn_ratio": 0.5}, ([3, 3, 3], [24, 24, 24])),
        ("heads_ffn", {"ratio": 0.5}, ([2, 2, 2], [24, 24, 24])),
    ],
)
def test_units_are_removed_and_planning_knows_how_many(
    structure: str, settings: Any, left: Any, data: DataModule, tmp_path: Path
) -> None:
    stage, start = pruning(structure, **settings), tiny.model()
    planned = tiny.plan(stage, start).outline
    done = tiny.fit(stage, start, data, work=tmp_path).model
    found = building.outline(done)
    heads, ffn = ([getattr(layer, key) for layer in found.layers] for key in ("heads", "ffn"))
    assert (
        left == {"ffn": ffn, "layers": len(found.layers), "hidden": found.hidden, "heads_ffn": (heads, ffn)}[structure]
    )
    assert planned == found


def test_a_global_share_of_ffn_units_is_rounded_in_each_layer(data: DataModule, tmp_path: Path) -> None:
    stage = pruning("ffn", ratio=0.5, scope="global")
    assert {layer.ffn for layer in tiny.plan(stage, tiny.model()).outline.layers} == {None}
    done = tiny.fit(stage, tiny.model(), data, work=tmp_path)
    left = FFN.units(done.model)
    assert all(count % 8 == 0 for count in left) and 72 <= sum(left) < 72 + 3 * 8 and len({*left}) > 1
    assert done.notes[-1].startswith(
        f"removed {144 - sum(left)} of 144 FFN units (not 72: 8 are kept at a time); left per"
    )


@pytest.mark.parametrize("structure", REMOVABLE)
def test_a_ratio_of_zero_changes_nothing_and_says_so(structure: str, data: DataModule, tmp_path: Path) -> None:
    start = tiny.model()
    before = copy.deepcopy(start)
    done = tiny.fit(pruning(structure, ratio=0.0), start, data, work=tmp_path)
    assert tiny.same_weights(done.model, before) and all(note.startswith("removed 0 of ") for note in done.notes)


def test_a_ratio_that_rounding_undoes_says_so(data: DataModule, tmp_path: Path) -> None:
    done = tiny.fit(pruning("ffn", ratio=0.1), tiny.model(), data, work=tmp_path)
    assert done.notes[0] == "ratio 0.1 removes nothing: FFN units are left in multiples of 8"


@pytest.mark.parametrize(
    ("structure", "settings", "key"),
    [
        ("ffn", {"ffn_ratio": 0.3}, "ffn_ratio"),
        ("heads", {"multiple": 8}, "multiple"),
        ("layers", {"multiple": 8}, "multiple"),
        ("layers", {"scope": "layer"}, "scope"),
        ("hidden", {"scope": "layer"}, "scope"),
        ("hidden", {"importance": "training"}, "importance"),
        ("layers", {"importance": "training"}, "importance"),
        ("ffn", {"schedule": "square"}, "schedule"),
        ("ffn", {"teacher": "teacher"}, "methods"),
        ("ffn", {"corpus": "text"}, "corpus"),
    ],
)
def test_a_setting_that_a_structure_does_not_have_is_refused(structure: str, settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: [^\n]*$"):
        pruning(structure, **settings)


@pytest.mark.parametrize("structure", ["ffn", "heads_ffn", "hidden"])
def test_mobilebert_is_refused_with_the_reason_in_planning(structure: str) -> None:
    with pytest.raises(UserError, match=r"^(ffn|hidden): cannot be cut for mobilebert, whose [^\n]*$"):
        tiny.plan(pruning(structure), tiny.model("mobilebert", hidden=64, heads=4))


def test_a_ratio_that_empties_a_layer_is_refused_in_planning() -> None:
    stage = pruning("heads_ffn", ratio=0.2, ffn_ratio=0.99, scope="global", multiple=1)
    with pytest.raises(UserError, match=r"^ffn_ratio: expected [^\n]* FFN units in all 3 layers, given 0\.99 of 144$"):
        tiny.plan(stage, tiny.model())


def test_scores_are_kept_beside_the_model_and_in_the_findings(data: DataModule, tmp_path: Path) -> None:
    stage = pruning("heads_ffn", rounds=2)
    done = tiny.fit(stage, tiny.model(), data, work=tmp_path / "work")
    found = done.findings["pruning"]
    assert [sum(number > 0 for number in layer) for layer in found["heads"]["gone"]] == [2, 2, 2]
    assert {number for layer in found["heads"]["gone"] for number in layer} == {0, 1, 2}
    assert [len(layer) for layer in found["ffn"]["scores"]] == [48] * 3
    artifact.save_scores(tmp_path, done.scores)
    kept = load_file(tmp_path / "scores.safetensors")
    assert sorted(kept) == [f"{name}.{layer}" for name in ("ffn", "heads") for layer in (1, 2, 3)]
    assert kept["heads.1"].tolist() == pytest.approx(found["heads"]["scores"][0], rel=1e-3)


# Recovery


@pytest.mark.parametrize("structure", ["heads_ffn", "layers", "hidden"])
def test_recovery_learns_from_a_teacher_once_the_student_has_its_shape(
    structure: str, data: DataModule, tmp_path: Path
) -> None:
    given = tiny.node("prune", structure) | {"teacher": "teacher", "epochs": None, "steps": 2, "rounds": 2}
    given |= {"ratio": 0.5, "calibration_examples": 16, "batch_size": 8, "learning_rate": 1e-3}
    changes: list[dict[str, Any]]
    changes = [{}, {"teacher": None}, {"teacher": None, "methods": {}}, {"epochs": 0, "steps": None}]
    stages = [config.construct(given | changed, "prune", Pruning) for changed in changes]
    done = []
    for number, stage in enumerate(stages):
        teachers = [tiny.model(seed=7)] * len(stage.teachers)
        effect = tiny.plan(stage, tiny.model(), teachers)
        assert effect.reads_answers == bool(teachers) and effect.trains_head == (number < 3)
        done.append(tiny.fit(stage, tiny.model(), data, teachers, work=tmp_path / str(number)))
    assert [len(stage.teachers) for stage in stages] == [1, 0, 0, 0]
    assert not tiny.same_weights(done[0].model, done[1].model)
    assert tiny.same_weights(done[1].model, done[2].model), "methods are those of a teacher"
    assert building.outline(done[0].model) == building.outline(done[3].model)


def test_a_run_killed_in_a_taught_recovery_goes_on_where_it_was(data: DataModule, tmp_path: Path) -> None:
    def run(work: str, **options: Any) -> Any:
        method = {"_target_": "edgemin.distillation.tinybert.TinyBERT", "prediction_share": 0.0, "weight": 1.0}
        methods = {"states": method}  # its maps to the teacher's width begin at the width that each round leaves
        stage = pruning("hidden", steps=3, rounds=2, teacher="teacher", methods=methods)
        return tiny.fit(stage, tiny.model(), data, [tiny.model(seed=7)], work=tmp_path / work, seconds=0.0, **options)

    whole = run("whole")
    with pytest.raises(tiny.KilledError):
        run("killed", callbacks=[tiny.Kill(2, phase=1)])
    assert tiny.same_weights(run("killed").model, whole.model)
