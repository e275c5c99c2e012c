"""Mixed precision: the damage of each matrix alone, and bits within a size."""

from __future__ import annotations

import copy
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import studies
import tiny
import torch

from edgemin import artifact
from edgemin.data.module import DataModule
from edgemin.encoder import building
from edgemin.encoder import quantized as quantized_encoder
from edgemin.errors import UserError
from edgemin.quantization import model as quantization
from edgemin.quantization.post_training import PostTraining
from edgemin.quantization.ranges import Calibration
from edgemin.quantization.sensitivity import NOT_FINITE, assign, damage, matrix_bytes, sensitivity
from edgemin.quantization.settings import Quantization
from edgemin.quantization.weights import Spec
from edgemin.tasks.classification import Classification
from edgemin.tasks.regression import Regression

KIND = Classification()

SETTINGS: dict[str, Any] = {"bits": 4, "sensitivity": True, "calibration_examples": 16, "activations": "none"}


def test_damage_is_the_mean_divergence_of_the_answers() -> None:
    before, after = torch.randn(5, 3), torch.randn(5, 3)
    one, other = before.double().softmax(1), after.double().softmax(1)
    naive = sum(
        float(one[row, label] * (one[row, label] / other[row, label]).log()) for row in range(5) for label in range(3)
    )
    assert damage(before, after, KIND) == pytest.approx(naive / 5, rel=1e-9)
    assert damage(before, before, KIND) == 0.0
    assert damage(before, torch.full_like(after, torch.nan), KIND) == 1e6
    assert damage(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]]), Regression()) == 2.0


def test_a_matrix_is_blamed_for_what_it_does_alone(data: DataModule) -> None:
    model = tiny.model()
    batches = data.calibration(12, 5, seed=1)
    paths = ["bert.embeddings.word_embeddings", "bert.encoder.layer.1.output.dense"]
    modules = dict(model.named_modules())
    found = sensitivity(model, {path: [Spec(4, "channel"), Spec(2, "channel")] for path in paths}, "mse", batches, KIND)
    assert all(model.get_submodule(path) is modules[path] for path in paths)
    reference = torch.cat([tiny.logits(model, batch) for batch in batches])
    for path, bits in product(paths, (4, 2)):
        alone = copy.deepcopy(model)
        quantization.quantize(alone, {path: Spec(bits, "channel")}, "mse", Calibration())
        expected = damage(reference, torch.cat([tiny.logits(alone, batch) for batch in batches]), KIND)
        assert found[path][bits] == pytest.approx(expected, abs=1e-9)


def test_bits_are_the_best_of_all_that_fit() -> None:
    generator = torch.Generator().manual_seed(3)
    names, bits = ["a", "b", "c", "d", "e"], (8, 4, 2)
    damages = {
        name: dict(zip(bits, torch.rand(3, generator=generator).cumsum(0).tolist(), strict=True)) for name in names
    }
    sizes = {
        name: {many: int(torch.randint(10, 60, (), generator=generator)) * many for many in bits} for name in names
    }
    for budget in (700, 1000, 1400):
        every = [dict(zip(names, chosen, strict=True)) for chosen in product(bits, repeat=len(names))]
        fitting = [chosen for chosen in every if sum(sizes[name][chosen[name]] for name in names) <= budget]
        best = min(sum(damages[name][chosen[name]] for name in names) for chosen in fitting)
        found = assign(damages, sizes, budget)
        assert sum(sizes[name][found[name]] for name in names) <= budget
        assert sum(damages[name][found[name]] for name in names) == pytest.approx(best)
    with pytest.raises(UserError, match=r"^size_mib: expected room for"):
        assign(damages, sizes, sum(of[2] for of in sizes.values()) - 1)


@pytest.mark.parametrize("spec", [Spec(4, "channel"), Spec(3, "group", 8), Spec(8, "tensor")], ids=str)
def test_the_bytes_of_a_matrix_are_those_of_its_tensors(spec: Spec) -> None:
    model = tiny.model()
    path = "bert.encoder.layer.0.output.dense"
    size = matrix_bytes(building.outline(model).matrices[path], spec)
    quantization.quantize(model, {path: spec}, "minmax", Calibration())
    packed = quantization.quantized_layers(model)[path].packed().values()
    assert size == sum(tensor.numel() * tensor.element_size() for tensor in packed)


def test_mixed_bits_take_no_more_than_uniform_ones_and_do_less_damage(
    data: DataModule, batch: Any, tmp_path: Path
) -> None:
    done = tiny.fit(tiny.stage(PostTraining, **SETTINGS), tiny.model(), data, work=tmp_path / "mixed")
    plain = tiny.fit(
        tiny.stage(PostTraining, **SETTINGS | {"sensitivity": False}), tiny.model(), data, work=tmp_path / "plain"
    )
    found = done.findings["sensitivity"]
    bits = {layer["name"]: layer["bits"] for layer in found["layers"]}
    assert bits == done.findings["quantization"]["bits"] and set(bits.values()) <= {8, 4, 2}
    assert found["size_mib"] <= found["budget_mib"] and found["examples"] == 16
    sizes = {}
    for name, model in (("mixed", done.model), ("plain", plain.model)):
        folder = tmp_path / f"{name}_saved"
        folder.mkdir()
        artifact.save(folder, model, None, {})
        sizes[name] = sum(
            tensor.numel() * tensor.element_size() for tensor in quantized_encoder.tensors(model).values()
        )
        assert torch.equal(tiny.logits(artifact.load(folder)[0], batch), tiny.logits(model, batch))
    assert found["size_mib"] * 2**20 == pytest.approx(sizes["mixed"], abs=64)
    assert sizes["mixed"] <= sizes["plain"]
    smaller = tiny.stage(PostTraining, **SETTINGS, size_mib=found["size_mib"] * 0.8)
    assert tiny.fit(smaller, tiny.model(), data, work=tmp_path / "s").findings["sensitivity"]["size_mib"] <= (
        0.8 * found["size_mib"]
    )


def test_tables_with_bits_of_their_own_keep_them(data: DataModule, tmp_path: Path) -> None:
    done = tiny.fit(tiny.stage(PostTraining, **SETTINGS, embedding_bits=3), tiny.model(), data, work=tmp_path)
    bits = done.findings["quantization"]["bits"]
    assert {bits[name] for name in bits if "embeddings" in name} == {3}
    assert not any("embeddings" in layer["name"] for layer in done.findings["sensitivity"]["layers"])


@pytest.mark.parametrize("chosen", [8, 4, 2])
def test_a_matrix_of_so_many_bits_is_quantized_as_by_uniform_settings_of_so_many(chosen: int, data: DataModule) -> None:
    model, settings = tiny.model(), SETTINGS | {"bits": 8, "group_size": 8}
    Quantization(**settings, candidates=[chosen]).apply(model, data, 1)
    uniform = Quantization(**settings | {"bits": chosen, "embedding_bits": chosen, "sensitivity": False})
    found = {path: layer.spec for path, layer in quantization.quantized_layers(model).items()}
    assert found == uniform.specs(building.outline(model).matrices)
    assert found["bert.embeddings.word_embeddings"].granularity == ("channel" if chosen == 8 else "group")


def test_a_size_that_cannot_be_reached_is_refused(data: DataModule, tmp_path: Path) -> None:
    stage, start = tiny.stage(PostTraining, **SETTINGS, size_mib=0.001), tiny.model()
    tiny.effect(stage, building.outline(start).with_heads([None] * 3))  # widths are not known in planning
    with pytest.raises(
        UserError, match=r"^size_mib: expected room for .* MiB, what the matrices take at the fewest bits"
    ):
        tiny.fit(stage, start, data, work=tmp_path)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_only_weights_are_blamed(activations: Any, data: DataModule) -> None:
    path = "bert.encoder.layer.1.output.dense"
    batches = data.calibration(12, 5, seed=1)
    found = [
        sensitivity(tiny.model(), {path: [Spec(2, "channel", None, how)]}, "mse", batches, KIND)
        for how in (activations, "none")
    ]
    assert found[0] == found[1] and 0 < found[0][path][2] < 1


def test_a_model_is_put_back_when_measuring_fails(data: DataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = tiny.model(), "bert.encoder.layer.1.output.dense"
    own = model.get_submodule(path)

    def interrupted(*answers: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgemin.quantization.sensitivity.damage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, {path: [Spec(2, "channel")]}, "mse", data.calibration(4, 4, seed=1), KIND)
    assert model.get_submodule(path) is own


@pytest.mark.parametrize("magnitude", [1e-9, 1e-6, 1.0])
def test_bits_are_the_best_whatever_the_size_of_damages(magnitude: float) -> None:
    generator = random.Random(5)
    bits = (8, 4, 2)
    for trial in range(10):
        damages = {name: {many: generator.random() * 10**-many * magnitude for many in bits} for name in "abcdef"}
        if trial % 2:
            damages["a"][2] = NOT_FINITE
        sizes = {name: {many: generator.randint(10**4, 10**6) * many for many in bits} for name in "abcdef"}
        every = [dict(zip("abcdef", chosen, strict=True)) for chosen in product(bits, repeat=6)]
        totals = [sum(sizes[name][chosen[name]] for name in chosen) for chosen in every]
        budget = generator.choice(sorted(totals)[len(totals) // 8 :]) - 1  # one byte short of a choice
        best = min(
            sum(damages[name][chosen[name]] for name in chosen)
            for chosen, total in zip(every, totals, strict=True)
            if total <= budget
        )
        found = assign(damages, sizes, budget)
        assert sum(sizes[name][found[name]] for name in found) <= budget
        assert sum(damages[name][found[name]] for name in found) == pytest.approx(best, rel=1e-9, abs=0)


def test_a_larger_budget_never_does_more_damage() -> None:
    generator = random.Random(7)
    damages = {name: {many: generator.random() / many for many in (8, 4, 2)} for name in "abcde"}
    sizes = {name: {many: generator.randint(1, 99) * many for many in (8, 4, 2)} for name in "abcde"}
    least = sum(min(of.values()) for of in sizes.values())
    chosen = [assign(damages, sizes, least + more) for more in range(0, 2000, 100)]
    sums = [sum(damages[name][found[name]] for name in found) for found in chosen]
    assert sums == sorted(sums, reverse=True) and sums[0] > sums[-1]


def _bytes(model: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in quantized_encoder.tensors(model).values())


@pytest.mark.parametrize("activations", ["static", "none"])
@pytest.mark.parametrize("again", [False, True], ids=["float", "quantized_before"])
def test_the_size_said_is_that_of_the_file(activations: Any, again: bool, data: DataModule) -> None:
    model, uniform = tiny.model(), tiny.model()
    settings = SETTINGS | {"activations": activations, "exempt": ["first", "classifier"]}
    if again:
        for each in (model, uniform):
            Quantization(bits=8, activations="static", calibration_examples=8).apply(each, data, 1)
    found = Quantization(**settings).apply(model, data, 1).findings["sensitivity"]
    Quantization(**settings | {"sensitivity": False, "embedding_bits": 8}).apply(uniform, data, 1)
    assert round(found["size_mib"] * 2**20) == _bytes(model)
    assert round(found["budget_mib"] * 2**20) == _bytes(uniform)
    assert all(0 <= value < 1 for layer in found["layers"] for value in layer["damage"].values())


def test_static_mixed_bits_come_back_from_disk(data: DataModule, batch: Any, tmp_path: Path) -> None:
    done = tiny.fit(
        tiny.stage(PostTraining, **SETTINGS | {"activations": "static"}), tiny.model(), data, work=tmp_path / "work"
    )
    assert len(set(done.findings["quantization"]["bits"].values())) > 1
    (tmp_path / "saved").mkdir()
    artifact.save(tmp_path / "saved", done.model, None, {})
    assert torch.equal(tiny.logits(artifact.load(tmp_path / "saved")[0], batch), tiny.logits(done.model, batch))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["quantize.exempt=['*']"], r"^quantize\.sensitivity: expected matrices to choose bits for, given none"),
        (
            ["quantize.exempt=['*.layer.*',head]", "quantize.embedding_bits=8"],
            r"^quantize\.sensitivity: expected matrices to choose bits for, given none",
        ),
        (
            ["quantize.bits=2", "quantize.embedding_bits=2", "quantize.candidates=[8,4]"],
            r"^quantize\.candidates: expected some that take no more than uniform bits \(2\).*given \[8, 4\]$",
        ),
        (["quantize.size_mib=0.0001"], r"^quantize\.size_mib: expected more than .* MiB, .* given 0\.0001$"),
    ],
)
def test_what_cannot_be_reached_is_refused_in_planning(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        studies.plan("stages=[finetune,quantize]", "quantize=static", "quantize.sensitivity=true", *overrides)
