"""What training goes on from after a quantized stage: unrounded weights, scales, and ranges that fit the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import studies
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from edgemin import artifact
from edgemin.data.module import DataModule
from edgemin.encoder import parts, slicing
from edgemin.encoder import quantized as quantized_encoder
from edgemin.errors import UserError
from edgemin.finetune import Finetune
from edgemin.pruning.stage import Pruning
from edgemin.quantization import model as quantization
from edgemin.quantization.base import Quantized
from edgemin.quantization.post_training import PostTraining
from edgemin.quantization.qat import QuantizationAware
from edgemin.quantization.reconstruct import Reconstruction
from edgemin.training import callbacks
from edgemin.training.fitting import Fitted

SETTINGS: dict[str, Any] = {"calibration_examples": 16, "bits": 3, "granularity": "group", "group_size": 8}
FIT: dict[str, Any] = {"steps": 3, "batch_size": 8, "learning_rate": 1e-2}
PRUNE: dict[str, Any] = {"ratio": 0.25, "calibration_examples": 8}
QUANTIZERS = {
    "static": (PostTraining, {}),
    "qat": (QuantizationAware, {"methods": {}, "task_weight": 1.0, **FIT}),
    "moving": (QuantizationAware, {"methods": {}, "task_weight": 1.0, "scales": "moving", **FIT}),
    "reconstruct": (Reconstruction, FIT),
}


def quantized(how: str, data: DataModule, work: Path, **settings: Any) -> Fitted:
    cls, own = QUANTIZERS[how]
    return tiny.fit(tiny.stage(cls, **SETTINGS | own | settings), tiny.model(), data, work=work)


def stored(fitted: Fitted, directory: Path) -> tuple[Any, dict[str, Tensor]]:
    """A result as the next stage is given it: the model from its file, and what lies beside."""
    directory.mkdir()
    artifact.save(directory, fitted.model, None, {}, fitted.state)
    return artifact.load(directory)[0], artifact.load_training_state(directory)


def live(model: Any) -> dict[str, Tensor]:
    """The weights and scales that quantized layers train with, by the names that a training state has."""
    return {
        f"latent/{path}.{name}": tensor.clone()
        for path, layer in quantization.quantized_layers(model).items()
        for name, tensor in (("weight", layer.weight.detach()), ("weight_scale", layer._own_scale().detach()))
    }


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Start(Finetune):
    """Remembers what it began with, and ends there."""

    def on_train_start(self) -> None:
        self.began = live(self.model)


@pytest.mark.parametrize("how", QUANTIZERS)
def test_a_later_stage_begins_with_the_very_weights_and_scales_that_the_earlier_one_ended_with(
    how: str, data: DataModule, batch: Any, tmp_path: Path
) -> None:
    ended: list[dict[str, Tensor]] = []
    cls, own = QUANTIZERS[how]

    class End(cls):  # type: ignore[misc]
        def finish(self) -> Any:
            ended.append(live(self.model))
            return super().finish()

    first = tiny.fit(tiny.stage(End, **SETTINGS | own), tiny.model(), data, work=tmp_path / "first")
    model, state = stored(first, tmp_path / "stored")
    logits = tiny.logits(model, batch)
    assert equal(state, ended[0])
    assert any(not torch.equal(layer.weight, state[f"latent/{path}.weight"]) for path, layer in _layers(model))
    stage = tiny.stage(Start, **FIT)
    second = tiny.fit(stage, model, data, work=tmp_path / "second", inherited=state)
    assert equal(stage.began, ended[0])
    assert second.state.keys() == state.keys() and not equal(second.state, state)
    third = tiny.fit(tiny.stage(Pruning, **PRUNE | {"ratio": 0.0, "epochs": 0}), model, data, work=tmp_path / "3")
    assert not third.state, "who is given no latent weights leaves none"
    again, _ = artifact.load(tmp_path / "stored")
    nothing = tiny.stage(Pruning, **PRUNE | {"ratio": 0.0, "epochs": 0})
    kept = tiny.fit(nothing, again, data, work=tmp_path / "4", inherited=state)
    assert equal(kept.state, state) and torch.equal(tiny.logits(kept.model, batch), logits)


def _layers(model: Any) -> list[tuple[str, Quantized]]:
    return list(quantization.quantized_layers(model).items())


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_they_survive_pruning_in_between(granularity: str, data: DataModule, tmp_path: Path) -> None:
    """Groups are whole heads here, so that no scale is chosen again."""
    first = quantized("qat", data, tmp_path / "first", granularity=granularity)
    model, state = stored(first, tmp_path / "stored")
    pruning = tiny.stage(Pruning, **PRUNE | {"epochs": 0})
    pruned = tiny.fit(pruning, model, data, work=tmp_path / "pruned", inherited=state)
    model, left = stored(pruned, tmp_path / "again")
    stage = tiny.stage(Start, **FIT)
    tiny.fit(stage, model, data, work=tmp_path / "second", inherited=left)
    assert equal(stage.began, left) and left.keys() == state.keys()
    whole, _ = artifact.load(tmp_path / "stored")
    assert quantized_encoder.take_up(whole, state)
    for index, (removed,) in enumerate(zip(*pruning.removed, strict=True)):
        slicing.slice_heads(whole, index, [head for head in range(4) if head not in removed])
    assert parts.heads(whole) == [3, 3, 3] and equal(live(whole), left)


def test_keep_latent_false_is_the_old_way(data: DataModule, tmp_path: Path) -> None:
    first = quantized("qat", data, tmp_path / "first", keep_latent=False)
    assert not first.state
    model, state = stored(first, tmp_path / "stored")
    rounded = {f"latent/{path}.weight": layer.weight.detach().clone() for path, layer in _layers(model)}
    stage = tiny.stage(Start, **FIT)
    second = tiny.fit(stage, model, data, work=tmp_path / "second", inherited=state)
    assert not second.state and any("begins at rounded weights" in note for note in second.notes)
    assert all(torch.equal(stage.began[name], weight) for name, weight in rounded.items())


@pytest.mark.parametrize("keep", [True, False])
def test_killed_and_resumed_a_later_stage_leaves_the_same(keep: bool, data: DataModule, tmp_path: Path) -> None:
    first = quantized("qat", data, tmp_path / "first", keep_latent=keep)
    stored(first, tmp_path / "stored")

    def run(work: str, **how: Any) -> Fitted:
        stage = tiny.stage(Pruning, **PRUNE, **FIT, rounds=2)
        model = artifact.load(tmp_path / "stored")[0]
        return tiny.fit(stage, model, data, work=tmp_path / work, seconds=0, inherited=first.state, **how)

    unbroken = run("a")
    for batch, phase in ((2, 0), (1, 1), (2, 1)):  # inside a fit, after a whole one, inside the second
        with pytest.raises(tiny.KilledError):
            run(f"b{batch}{phase}", callbacks=[tiny.Kill(batch, phase)])
        resumed = run(f"b{batch}{phase}")
        assert equal(resumed.state, unbroken.state) and resumed.notes == unbroken.notes
        assert tiny.same_weights(resumed.model, unbroken.model)


def test_the_models_file_is_the_same_with_and_without(data: DataModule, tmp_path: Path) -> None:
    for name, keep in (("with", True), ("without", False)):
        stored(quantized("static", data, tmp_path / f"{name} work", keep_latent=keep), tmp_path / name)
    files = [(tmp_path / name / artifact.WEIGHTS).read_bytes() for name in ("with", "without")]
    assert files[0] == files[1]
    assert not (tmp_path / "without" / artifact.TRAINING_STATE).exists()


@pytest.mark.parametrize("damage", ["lost", "shape", "of another"])
def test_latent_weights_that_do_not_fit_are_refused_in_one_line(damage: str, data: DataModule, tmp_path: Path) -> None:
    model, state = stored(quantized("static", data, tmp_path / "first"), tmp_path / "stored")
    name = next(iter(state))
    if damage == "lost":
        del state[name]
    elif damage == "shape":
        state[name] = state[name][1:]
    else:
        state["latent/bert.elsewhere.weight"] = state[name]
    with pytest.raises(UserError, match=r"^training state: expected latent weights that fit the model, given [^\n]*$"):
        tiny.fit(tiny.stage(Finetune, **FIT), model, data, work=tmp_path / "second", inherited=state)


def test_a_study_hands_them_on(tmp_path: Path) -> None:
    run = studies.run(
        tmp_path / "run",
        "quantize=qat",
        "quantize.steps=3",
        "quantize.calibration_examples=16",
        "+finetune@rest=short",
        "rest.epochs=null",
        "rest.steps=0",
        "prune.steps=0",
        "stages=[finetune,quantize,rest,prune]",
    )
    folders = {node["path"]: tmp_path / "run" / "store" / node["key"] for node in run["nodes"]}
    path = "student/finetune/quantize"
    first, rest, pruned = (
        load_file(folders[each] / artifact.TRAINING_STATE) for each in (path, f"{path}/rest", f"{path}/rest/prune")
    )
    assert first and equal(first, rest) and pruned.keys() == first.keys()


@pytest.fixture(scope="module")
def quantized_study(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The artifacts of a quantized student, with latent weights beside it and without."""
    place = tmp_path_factory.mktemp("sources")
    found = {}
    for keep in (True, False):
        asked = ("quantize=qat", "quantize.steps=3", "quantize.bits=3", "quantize.calibration_examples=16")
        run = studies.run(place / str(keep), *asked, f"quantize.keep_latent={keep}", "stages=[finetune,quantize]")
        found[keep] = place / str(keep) / "store" / run["nodes"][-1]["key"]
    return found


def go_on(source: Path, *asked: str) -> tuple[str, ...]:
    return ("student=checkpoint", f"student.source={source}", "stages=[rest]", "+finetune@rest=short", *asked)


@pytest.mark.parametrize("latent", ["auto", "true", "false"])
def test_a_study_of_an_artifact_goes_on_from_its_latent_weights(
    latent: str, quantized_study: dict[bool, Path], tmp_path: Path
) -> None:
    source = quantized_study[True]
    asked = ("rest.epochs=null", "rest.steps=0", f"student.latent={latent}")
    run = studies.run(tmp_path, *go_on(source, *asked))
    folders = {node["path"]: tmp_path / "store" / node["key"] for node in run["nodes"]}
    begun = folders["student"]
    assert (begun / artifact.WEIGHTS).read_bytes() == (source / artifact.WEIGHTS).read_bytes()
    notes = artifact.read_provenance(begun)["notes"]
    if latent == "false":
        assert not artifact.has_latents(begun) and notes == []
        return
    kept = load_file(source / artifact.TRAINING_STATE)
    assert all(equal(load_file(folder / artifact.TRAINING_STATE), kept) for folder in (begun, folders["student/rest"]))
    assert notes == [f"goes on from the latent weights of {source}"]


def test_latent_weights_of_a_source_are_cut_with_it_and_are_part_of_its_key(
    quantized_study: dict[bool, Path], tmp_path: Path
) -> None:
    keys = set()
    for latent in ("auto", "false"):
        asked = ("rest.epochs=null", "rest.steps=0", f"student.latent={latent}", "student.layers=[2]")
        run = studies.run(tmp_path / latent, *go_on(quantized_study[True], *asked))
        keys.add(next(node["key"] for node in run["nodes"] if node["path"] == "student"))
    assert len(keys) == 2
    (key,) = (key for key in keys if (tmp_path / "auto" / "store" / key).exists())
    cut = load_file(tmp_path / "auto" / "store" / key / artifact.TRAINING_STATE)
    whole = load_file(quantized_study[True] / artifact.TRAINING_STATE)
    for name, tensor in cut.items():
        assert torch.equal(tensor, whole[name.replace("layer.0.", "layer.1.")])
    assert len(cut) < len(whole)


def test_latent_weights_asked_of_a_source_that_has_none_are_refused(quantized_study: dict[bool, Path]) -> None:
    said = (
        r"^student\.latent: expected auto or false, as no latent weights lie beside the source \([^\n]*\), given true$"
    )
    with pytest.raises(UserError, match=said):
        studies.plan(*go_on(quantized_study[False], "student.latent=true"))
    with pytest.raises(UserError, match=said):
        studies.plan("student.latent=true")  # drawn at random
    assert studies.plan(*go_on(quantized_study[False])).notes == []


# Ranges of activations


def test_what_early_stopping_scored_is_what_is_kept(
    data: DataModule, batch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quantized("qat", data, tmp_path / "first")
    scored: list[Tensor] = []
    real = callbacks.evaluate

    def look(model: Any, *args: Any, **kwargs: Any) -> Any:
        scored.append(tiny.logits(model, batch).clone())
        return real(model, *args, **kwargs)

    monkeypatch.setattr(callbacks, "evaluate", look)
    held = tiny.data(tmp_path / "held", holdout=0.25)
    fit: dict[str, Any] = {"batch_size": 8, "learning_rate": 1e-2, "epochs": 2}
    for name, stage in {
        "finetune": tiny.stage(Finetune, **fit, patience=5),
        "prune": tiny.stage(Pruning, **PRUNE, **fit, patience=5),
    }.items():
        model, state = stored(first, tmp_path / name)
        scored.clear()
        done = tiny.fit(stage, model, held, work=tmp_path / f"{name} work", inherited=state)
        kept, _ = stored(done, tmp_path / f"{name} kept")
        assert len(scored) == 2 and any(torch.equal(tiny.logits(kept, batch), each) for each in scored), name


def test_only_a_stage_that_changes_the_structure_calibrates_again_and_before_it_trains(
    data: DataModule, tmp_path: Path
) -> None:
    first = quantized("static", data, tmp_path / "first")
    ranges = {path: float(layer.input_scale) for path, layer in quantization.static_layers(first.model).items()}

    class Look(Pruning):
        def on_train_start(self) -> None:
            now = quantization.static_layers(self.model).items()
            self.began = {path: float(layer.input_scale) for path, layer in now}

    stages = {"finetune": tiny.stage(Start, **FIT), "prune": tiny.stage(Look, **PRUNE, **FIT)}
    for name, stage in stages.items():
        model, state = stored(first, tmp_path / name)
        done = tiny.fit(stage, model, data, work=tmp_path / f"{name} work", inherited=state)
        found = {path: float(layer.input_scale) for path, layer in quantization.static_layers(done.model).items()}
        assert (found == ranges) == (name == "finetune")
        assert any("calibrated the activations of 19" in note for note in done.notes) == (name == "prune")
        assert not isinstance(stage, Look) or stage.began == found


def test_a_cut_that_saw_no_data_is_made_good_by_the_next_stage_that_does(data: DataModule, tmp_path: Path) -> None:
    first = quantized("static", data, tmp_path / "first")
    model, state = stored(first, tmp_path / "stored")
    blind = tiny.stage(Pruning, **PRUNE, criterion="weight_product", epochs=0)
    pruned = tiny.fit(blind, model, data, work=tmp_path / "pruned", inherited=state)
    assert any("keep their ranges" in note for note in pruned.notes)
    model, state = stored(pruned, tmp_path / "again")
    assert json.loads((tmp_path / "again" / artifact.STRUCTURE).read_text())["quantized"]["needs_ranges"]
    done = tiny.fit(tiny.stage(Finetune, **FIT), model, data, work=tmp_path / "then", inherited=state)
    assert any("calibrated the activations of 19" in note for note in done.notes)
    stored(done, tmp_path / "last")
    assert "needs_ranges" not in json.loads((tmp_path / "last" / artifact.STRUCTURE).read_text())["quantized"]
