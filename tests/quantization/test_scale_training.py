"""Scales that learn: their gradient with fixed integers, whose they are, and how fast they move."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import studies
import tiny
import torch
from torch import nn

from edgemin.data.module import DataModule
from edgemin.errors import UserError
from edgemin.quantization import model as quantization
from edgemin.quantization.layers import QuantizedEmbedding, QuantizedLinear
from edgemin.quantization.post_training import PostTraining
from edgemin.quantization.qat import QuantizationAware
from edgemin.quantization.reconstruct import Reconstruction
from edgemin.quantization.settings import Quantization
from edgemin.quantization.weights import Spec

SETTINGS: dict[str, Any] = {"calibration_examples": 16, "granularity": "group", "group_size": 16, "bits": 4}
FIT: dict[str, Any] = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2}
PHASES = ("reconstruct", "qat")
QAT: dict[str, Any] = {"methods": {}, "task_weight": 1.0, **SETTINGS, **FIT}


def fixed(spec: Spec, kind: str = "linear") -> tuple[Any, torch.Tensor]:
    """A layer that computes with its integers whatever becomes of its scales, and something that it can read."""
    torch.manual_seed(0)
    layer: QuantizedLinear | QuantizedEmbedding
    if kind == "linear":
        layer, given = QuantizedLinear(nn.Linear(12, 6, bias=False), spec), torch.randn(5, 12)
    else:
        layer, given = QuantizedEmbedding(nn.Embedding(6, 12), spec), torch.tensor([0, 3, 5, 3])
    layer.fit_weights("mse")
    layer.follow("learned")
    layer.requires_grad_(False)
    layer.fix_integers()
    layer.weight_scale.requires_grad_(True)
    return layer.train(), given


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("spec", [Spec(8, "tensor"), Spec(4, "channel"), Spec(2, "channel")], ids=str)
def test_with_fixed_integers_the_gradient_of_a_scale_is_that_of_its_integers(spec: Spec, kind: str) -> None:
    layer, given = fixed(spec, kind)
    weights = torch.randn(layer(given).shape)

    def loss() -> torch.Tensor:
        return (layer(given).double() * weights).sum()

    loss().backward()
    found = layer.weight_scale.grad
    before, step = layer.weight_scale.detach().clone(), 0.25  # far beyond where a rounded weight would change
    for place in range(before.numel()):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                layer.weight_scale.copy_(before).view(-1)[place] += sign * step * float(before.view(-1)[place])
                ends.append(float(loss()))
        slope = (ends[0] - ends[1]) / (2 * step * float(before.view(-1)[place]))
        assert float(found.view(-1)[place]) == pytest.approx(slope, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("spec", [Spec(4, "channel"), Spec(3, "group", 4), Spec(2, "group", 5)], ids=str)
def test_its_gradient_for_a_weight_is_the_integer(spec: Spec) -> None:
    layer, _ = fixed(spec)
    chosen = torch.randn(6, 12)
    (layer.quantized_weight() * chosen).sum().backward()
    size = spec.group_size or 12
    expected = [(chosen * layer.integers())[:, at : at + size].sum(1) for at in range(0, 12, size)]
    torch.testing.assert_close(layer.weight_scale.grad, torch.stack(expected, dim=1))


def scales_and_integers(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The scales of weights and of inputs, and the integers, by path."""
    layers, static = quantization.quantized_layers(model), quantization.static_layers(model)
    return (
        {path: layer.weight_scale.clone() for path, layer in layers.items()},
        {path: layer.input_scale.clone() for path, layer in static.items()},
        {path: layer.integers() for path, layer in layers.items()},
    )


@pytest.mark.parametrize(
    ("asked", "move"),
    [
        ("auto", {"weights"}),
        (["inputs"], {"inputs"}),
        (["embeddings", "weights"], {"weights", "embeddings"}),
    ],
)
def test_training_of_scales_alone_changes_no_integer_and_no_scale_that_is_not_asked_for(
    asked: Any, move: set[str], data: DataModule, tmp_path: Path
) -> None:
    plain = tiny.fit(tiny.stage(PostTraining, **SETTINGS), tiny.model(), data, work=tmp_path / "plain").model
    stage = tiny.stage(QuantizationAware, train="scales", learned_scales=asked, scale_learning_rate=1e-2, **QAT)
    fitted = tiny.fit(stage, tiny.model(), data, work=tmp_path / "qat")
    before, after = scales_and_integers(plain), scales_and_integers(fitted.model)
    assert all(torch.equal(after[2][path], integers) for path, integers in before[2].items())
    moved = {
        ("embeddings" if "embeddings" in path else "weights")
        for path, scale in before[0].items()
        if not torch.equal(after[0][path], scale)
    }
    moved |= {"inputs"} if any(not torch.equal(after[1][path], scale) for path, scale in before[1].items()) else set()
    assert moved == move
    state = fitted.state
    for path, layer in quantization.quantized_layers(fitted.model).items():
        assert torch.equal(state[f"latent/{path}.weight"], layer.weight)  # what the integers stand for


def test_a_second_phase_trains_the_scales_of_the_first_ones_integers(data: DataModule, tmp_path: Path) -> None:
    """EfficientQAT: block by block, then the scales alone end to end; each calibrates on as many as its file says."""
    own, theirs = ({"calibration_examples": tiny.node("quantize", name)["calibration_examples"]} for name in PHASES)
    assert own != theirs
    settings = SETTINGS | FIT | own | {"learning_rate": 1e-4}
    first = tiny.fit(tiny.stage(Reconstruction, **settings), tiny.model(), data, work=tmp_path / "first")
    before, calibrated = scales_and_integers(first.model), copy.deepcopy(first.model)
    quantization.fit_inputs(calibrated, data.calibration(48, 32, seed=1))
    assert any(not torch.equal(one, before[1][path]) for path, one in scales_and_integers(calibrated)[1].items())
    stage = tiny.stage(QuantizationAware, train="scales", **QAT | {"steps": 0} | theirs)
    second = tiny.fit(stage, first.model, data, work=tmp_path / "second", inherited=first.state)
    for one, other in zip(before, scales_and_integers(second.model), strict=True):
        assert all(torch.equal(other[path], tensor) for path, tensor in one.items())
    assert "22 layers were quantized in this way already: they keep their scales" in second.notes


def test_ranges_that_are_to_be_chosen_in_another_way_are_and_a_note_says_so(data: DataModule) -> None:
    model = tiny.model()
    Quantization(**SETTINGS).apply(model, data, seed=1)
    before = scales_and_integers(model)
    notes = Quantization(**SETTINGS, activation_range="mse").apply(model, data, seed=1).notes
    after = scales_and_integers(model)
    assert all(torch.equal(after[0][path], scale) for path, scale in before[0].items())
    assert any(not torch.equal(after[1][path], scale) for path, scale in before[1].items())
    kept = "they keep the scales of their weights, ranges of activations are chosen here"
    assert notes == [f"22 layers were quantized in this way already: {kept}"]


@pytest.mark.parametrize(
    ("cls", "settings", "shares"),
    [(QuantizationAware, QAT, (0.1, 0.1, 0.1)), (Reconstruction, SETTINGS | FIT, (0.1, 1.0))],
    ids=["qat", "reconstruct"],
)
@pytest.mark.parametrize("rate", ["auto", 3e-4])
def test_scales_have_a_rate_of_their_own_on_the_same_course_and_do_not_decay(
    cls: Any, settings: dict[str, Any], shares: tuple[float, ...], rate: Any, data: DataModule, tmp_path: Path
) -> None:
    seen: list[list[tuple[float, float, set[str]]]] = []

    class Look(cls):  # type: ignore[misc]
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            names = {id(parameter): name for name, parameter in self.named_parameters()}
            groups = [({names[id(own)] for own in group["params"]}, group) for group in optimizer.param_groups]
            seen.append([(group["lr"], group["weight_decay"], of) for of, group in groups])

    given = settings | {"weight_decay": 0.1, "warmup": 0.5}
    tiny.fit(tiny.stage(Look, scale_learning_rate=rate, **given), tiny.model(), data, work=tmp_path)
    for weights, vectors, *scales in seen:
        for share, of, ending in zip(shares, scales, ("weight_scale", "input_scale", "weight_scale"), strict=False):
            expected = share if rate == "auto" else rate / 1e-2
            assert of[0] == pytest.approx(expected * weights[0]) and of[1] == 0.0
            assert of[2] and all(name.endswith(ending) for name in of[2])
        assert not any(name.endswith("_scale") for name in weights[2] | vectors[2])
    assert len({round(each[0][0], 9) for each in seen}) > 2  # it has a course


def test_scales_drift_less_at_their_own_rate_than_at_the_weights(data: DataModule, tmp_path: Path) -> None:
    start = tiny.fit(tiny.stage(PostTraining, **SETTINGS), tiny.model(), data, work=tmp_path / "start").model

    def drift(name: str, rate: Any) -> float:
        stage = tiny.stage(QuantizationAware, scale_learning_rate=rate, **QAT)
        end = tiny.fit(stage, tiny.model(), data, work=tmp_path / name).model
        pairs = zip(*(quantization.quantized_layers(model).values() for model in (start, end)), strict=True)
        moved = [(after.weight_scale / before.weight_scale - 1).abs().flatten() for before, after in pairs]
        return float(torch.cat(moved).mean())

    assert drift("own", "auto") < 0.2 * drift("weights", QAT["learning_rate"])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["quantize=reconstruct", "quantize.learned_scales=[weights,embeddings]"],
            r"^quantize\.learned_scales: expected scales that this stage can train, of weights, inputs, given \['weigh",
        ),
        (
            ["quantize=qat", "quantize.activations=dynamic", "quantize.learned_scales=[inputs]"],
            r"^quantize\.learned_scales: expected scales that this stage can train, of weights, embeddings, given",
        ),
        (
            ["quantize=qat", "quantize.scales=fixed", "quantize.scale_learning_rate=0.1"],
            r"^quantize\.scale_learning_rate: expected auto, as no scale learns \(scales=fixed\), given 0\.1$",
        ),
        (
            ["quantize=reconstruct", "quantize.scales=fixed", "quantize.learned_scales=[inputs]"],
            r"^quantize\.learned_scales: expected auto, as no scale learns \(scales=fixed\), given \['inputs'\]$",
        ),
        (
            ["quantize=qat", "quantize.learned_scales=[]"],
            r"^quantize\.learned_scales: expected auto or at least one of",
        ),
        (["quantize=qat", "quantize.learned_scales=[heads]"], r"^quantize\.learned_scales: expected auto or a list"),
        (["quantize=qat", "quantize.scale_learning_rate=0"], r"^quantize\.scale_learning_rate: expected auto or a num"),
        (
            ["quantize=reconstruct", "quantize.scales=moving"],
            r"^quantize\.scales: expected fixed or learned, given mov",
        ),
        (["quantize=reconstruct", "quantize.aside=0"], r"^quantize\.aside: expected a share in \(0, 1\), given 0$"),
        (
            ["quantize=reconstruct", "quantize.calibration_examples=1"],
            r"^quantize\.calibration_examples: expected at least 2, one of them to be kept aside, given 1$",
        ),
    ],
)
def test_bad_settings_are_refused_in_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        studies.plan("order=distill_prune_quantize", *overrides)


def test_scales_alone_are_trained_under_a_head_that_was_trained_before() -> None:
    asked = ("quantize=qat", "quantize.train=scales")
    node = studies.plan(*asked, "stages=[finetune,quantize]").rows[-1].node
    assert node.head_trained and not node.head_stale
    with pytest.raises(UserError, match=r"^stages: expected a stage that trains the head"):
        studies.plan(*asked, "stages=[quantize]")


def test_the_share_is_of_the_learning_rate_given() -> None:
    rates = tiny.stage(QuantizationAware, **QAT | {"learning_rate": 5e-5}).scale_learning_rates
    assert math.isclose(rates["weights"], 5e-6)
