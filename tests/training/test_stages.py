"""Every stage that a yaml names, from prepare to the reloaded artifact; the settings of a fit; dynamic INT8."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from edgemin import artifact, config
from edgemin.encoder import building, quantized, slicing
from edgemin.encoder.parts import heads, label_names
from edgemin.encoder.quantized import is_trainable
from edgemin.errors import UserError
from edgemin.finetune import Finetune
from edgemin.quantization import torch_layers
from edgemin.quantization.dynamic import DynamicQuantization
from edgemin.training.fit import Fit
from edgemin.training.stage import Stage

GROUPS = ("finetune", "distill", "prune", "quantize")
YAML = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((tiny.CONF / group).glob("*.yaml"))
    if not path.stem.startswith("_")
]


def small(group: str, name: str) -> dict[str, Any]:
    """A node with its budget cut to two steps."""
    node = tiny.node(group, name)
    cuts = {"epochs": None, "steps": 2, "batch_size": 4, "calibration_examples": 8, "training_steps": 2}
    cuts |= {"mask_epochs": None, "mask_steps": 2}
    if "prediction_share" in node:  # two fits, each of which must go beyond its first step, whose rate is 0
        cuts |= {"steps": 4, "prediction_share": 0.5}
    return node | {key: value for key, value in cuts.items() if key in node}


def teacher_for(stage: Stage) -> PreTrainedModel:
    """Deeper and wider than the student, or of its width where a method compares states themselves."""
    try:
        tiny.effect(stage, teachers=[tiny.outline("bert", 4, 64, 4)] * len(stage.teachers))
    except UserError:
        return tiny.model(layers=4, seed=5)
    return tiny.model(layers=4, hidden=64, seed=5)


def test_every_group_of_stages_has_a_yaml() -> None:
    assert {group for group, _ in YAML} == set(GROUPS)


@pytest.mark.parametrize(("group", "name"), YAML, ids=["/".join(pair) for pair in YAML])
def test_a_stage_goes_from_its_yaml_to_a_reloaded_artifact(group: str, name: str, tmp_path: Path) -> None:
    settings = small(group, name)
    stage = config.construct(settings, group)
    assert isinstance(stage, Stage)
    data, start = tiny.data(tmp_path), tiny.model()
    before = tiny.weights(start)
    teachers = [teacher_for(stage) for _ in stage.teachers]
    effect = tiny.plan(stage, start, teachers, head_trained=True)
    fitted = tiny.fit(stage, start, data if effect.reads_task else None, teachers, work=tmp_path / "work")
    trains = any(fit.trains for fit in stage.fits())
    assert fitted.steps == sum(fit.steps or 0 for fit in stage.fits()) and bool(fitted.steps) == trains
    assert not fitted.model.training and fitted.model.device.type == "cpu"
    if trains and group != "prune":
        assert any(not torch.equal(fitted.model.state_dict()[name], was) for name, was in before.items())

    if fitted.tokenizer is not None:
        data = data.read_by(fitted.tokenizer)
    (tmp_path / "artifact").mkdir()
    artifact.save(tmp_path / "artifact", fitted.model, data.tokenizer, {"stage": name})
    loaded, tokenizer = artifact.load(tmp_path / "artifact")
    batch = data.evaluation["validation"].batch([0, 1, 2, 3])
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(fitted.model, batch))
    assert building.outline(loaded) == building.outline(fitted.model)
    assert tokenizer is not None and tokenizer.get_vocab() == data.tokenizer.get_vocab()


@pytest.mark.parametrize("pair", YAML, ids=["/".join(pair) for pair in YAML])
def test_a_stage_of_no_steps_changes_no_kept_weight(pair: tuple[str, str], tmp_path: Path) -> None:
    settings = small(*pair)
    if "steps" not in settings:
        pytest.skip("trains nothing at all")
    nothing = {"steps": 0, "ratio": 0.0, "mask_steps": 0, "sparsity": 0.0}
    settings |= {key: value for key, value in nothing.items() if key in settings}
    stage, start = config.construct(settings, "s", Stage), tiny.model()
    if tiny.plan(stage, start, [start] * len(stage.teachers), head_trained=True).quantizes:
        pytest.skip("rounds all the same")
    before = tiny.weights(start)
    teachers = [teacher_for(stage) for _ in stage.teachers]
    data = tiny.data(tmp_path)
    fitted = tiny.fit(stage, start, data, teachers, work=tmp_path / "work")
    assert fitted.steps == 0
    if fitted.tokenizer is not None:  # the rows of the tokens that are left
        ids, words = data.tokenizer.get_vocab(), "bert.embeddings.word_embeddings.weight"
        before[words] = before[words][sorted(ids[token] for token in fitted.tokenizer.get_vocab())]
    assert all(torch.equal(fitted.model.state_dict()[name], was) for name, was in before.items())


# The settings of a fit


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({}, "epochs"),
        ({"epochs": 1.0, "steps": 1}, "epochs"),
        ({"epochs": -1.0}, "epochs"),
        ({"epochs": math.nan}, "epochs"),
        ({"steps": -1}, "steps"),
        ({"steps": 1, "batch_size": 0}, "batch_size"),
        ({"steps": 1, "accumulate": 0}, "accumulate"),
        ({"steps": 1, "learning_rate": 0.0}, "learning_rate"),
        ({"steps": 1, "learning_rate": math.inf}, "learning_rate"),
        ({"steps": 1, "warmup": 1.5}, "warmup"),
        ({"steps": 1, "weight_decay": -0.1}, "weight_decay"),
        ({"steps": 1, "gradient_clip": -1.0}, "gradient_clip"),
        ({"steps": 1, "patience": 0}, "patience"),
    ],
)
def test_a_fit_that_cannot_be_is_refused_in_one_line_that_begins_with_the_key(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: expected .* given [^\n]*$"):
        Fit(**settings)


def test_steps_are_optimizer_steps_and_a_last_incomplete_accumulation_is_one() -> None:
    assert Fit(steps=5, accumulate=4).batches(10) == 20
    assert Fit(steps=5, accumulate=4).optimizer_steps(10) == 5
    fit = Fit(epochs=1.5, batch_size=4, accumulate=4)  # 3 batches an epoch
    assert (fit.batches(10), fit.optimizer_steps(10)) == (5, 2)
    assert not Fit(epochs=0.0).trains and not Fit(steps=0).trains and Fit(steps=1).trains


def test_a_fraction_of_an_epoch_is_not_one_batch_longer_than_it_says() -> None:
    assert Fit(epochs=0.07, batch_size=1).batches(100) == 7


def test_weight_decay_leaves_biases_and_layernorms_alone_and_the_rate_warms_up_and_decays(tmp_path: Path) -> None:
    rates: list[float] = []
    groups: list[dict[str, Any]] = []

    class Watch(tiny.pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            groups[:] = trainer.optimizers[0].param_groups

    stage = tiny.stage(Finetune, steps=4, batch_size=4, warmup=0.5, weight_decay=0.3, learning_rate=1e-3)
    tiny.fit(stage, tiny.model(), tiny.data(tmp_path), work=tmp_path, callbacks=[Watch()])
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [{parameter.ndim for parameter in group["params"]} for group in groups] == [{2}, {1}]


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_a_fit_of_one_step_moves_the_weights(decay: str, tmp_path: Path) -> None:
    stage = tiny.stage(Finetune, steps=1, decay=decay, warmup=0.1, weight_decay=0.0, learning_rate=1e-3)
    model = tiny.model()
    before = model.get_submodule("classifier").weight.detach().clone()
    tiny.fit(stage, model, tiny.data(tmp_path), work=tmp_path)
    assert not torch.equal(model.get_submodule("classifier").weight, before)


# Loss and head


def test_a_head_of_the_tasks_labels_is_kept_and_another_is_replaced(tmp_path: Path) -> None:
    data = tiny.data(tmp_path)
    kept = tiny.model()
    before = kept.get_submodule("classifier").weight.clone()
    stage = tiny.stage(Finetune, steps=0)
    tiny.plan(stage, kept)
    stage.prepare(kept, data)
    assert torch.equal(kept.get_submodule("classifier").weight, before)
    other = tiny.model()
    building.attach_head(other, ["a", "b", "c"])
    tiny.fit(tiny.stage(Finetune, steps=0), other, data, work=tmp_path)
    assert label_names(other) == data.labels
    again = tiny.model()
    building.attach_head(again, ["a", "b", "c"])
    tiny.fit(tiny.stage(Finetune, steps=0), again, data, work=tmp_path / "again")
    assert torch.equal(again.get_submodule("classifier").weight, other.get_submodule("classifier").weight)


# Dynamic INT8


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_dynamically_quantized_model_is_saved_and_loaded_with_equal_logits(family: str, tmp_path: Path) -> None:
    data, start = tiny.data(tmp_path), tiny.model(family)
    slicing.slice_heads(start, 0, [0, 2])
    slicing.slice_heads(start, 2, [1])
    batch = data.evaluation["validation"].batch(range(8))
    full = tiny.logits(start, batch)
    fitted = tiny.fit(DynamicQuantization(), start, None, work=tmp_path)
    linears = [m for m in fitted.model.modules() if isinstance(m, torch.nn.Linear)]
    assert not linears and quantized.kind_of(fitted.model) == "torch_dynamic"
    expected = tiny.logits(fitted.model, batch)
    assert not torch.equal(expected, full)
    torch.testing.assert_close(expected, full, atol=0.3, rtol=0.1)
    (tmp_path / "artifact").mkdir()
    artifact.save(tmp_path / "artifact", fitted.model, data.tokenizer, {})
    loaded, _ = artifact.load(tmp_path / "artifact")
    assert torch.equal(tiny.logits(loaded, batch), expected)
    assert heads(loaded) == [2, 4, 1]


def test_a_quantized_weight_is_the_rounded_one_at_one_scale_per_tensor() -> None:
    model = tiny.model()
    weight = model.get_submodule("bert.encoder.layer.0.attention.self.query").weight.detach().double()
    torch_layers.quantize(model)
    layer = "bert.encoder.layer.0.attention.self.query."
    tensors = quantized.tensors(model)
    parts = {name.removeprefix(layer): tensor for name, tensor in tensors.items() if name.startswith(layer)}
    scale = parts["weight_scale"].item()
    assert parts["weight_int8"].dtype == torch.int8 and parts["weight_zero_point"].item() == 0
    assert scale == pytest.approx(2 * weight.abs().max().item() / 255, rel=1e-4)
    rounded = (weight / scale).round().clamp(-128, 127)
    assert (parts["weight_int8"].double() - rounded).abs().max() <= 1  # torch rounds in float32
    assert (parts["weight_int8"].double() != rounded).double().mean() < 0.01


@pytest.mark.parametrize("bits", [4, 16, 0])
def test_dynamic_quantization_knows_eight_bits_alone(bits: int) -> None:
    with pytest.raises(UserError, match=f"^quantize.bits: expected 8, .* given {bits}$"):
        config.construct(tiny.node("quantize", "dynamic") | {"bits": bits}, "quantize")


def test_what_is_dynamically_quantized_comes_last_and_needs_no_data() -> None:
    stage = DynamicQuantization()
    effect = tiny.effect(stage)
    assert not is_trainable(effect.outline.provider) and not effect.reads_task and not effect.trains_head
    assert is_trainable(tiny.effect(tiny.stage(Finetune, steps=1)).outline.provider)
    with pytest.raises(NotImplementedError):
        stage.loss({})
