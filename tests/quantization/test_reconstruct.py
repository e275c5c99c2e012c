"""Reconstruction, block by block: what learns, on what input, and how near it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from edgemin import artifact
from edgemin.data.module import DataModule
from edgemin.encoder import taps
from edgemin.quantization import model as quantization
from edgemin.quantization.post_training import PostTraining
from edgemin.quantization.reconstruct import Reconstruction

SETTINGS: dict[str, Any] = {"bits": 2, "calibration_examples": 24, "activations": "none", "granularity": "tensor"}
FIT: dict[str, Any] = {"steps": 40, "batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.0}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_answers_come_nearer_to_the_full_precision_models_than_by_rounding(
    family: str, data: DataModule, batch: Any, tmp_path: Path
) -> None:
    wanted = tiny.logits(tiny.model(family), batch)
    rounded = tiny.fit(tiny.stage(PostTraining, **SETTINGS), tiny.model(family), data, work=tmp_path / "rounded").model
    fitted = tiny.fit(tiny.stage(Reconstruction, **SETTINGS, **FIT), tiny.model(family), data, work=tmp_path / "learnt")
    learnt = fitted.model
    before, after = (float((tiny.logits(model, batch) - wanted).square().mean()) for model in (rounded, learnt))
    assert after < 0.5 * before
    blocks = fitted.findings["reconstruction"]
    assert [block["block"] for block in blocks] == [1, 2, 3, "head"]
    assert all(block["after"] < block["before"] for block in blocks)
    (tmp_path / "saved").mkdir()
    artifact.save(tmp_path / "saved", learnt, None, {})
    assert torch.equal(tiny.logits(artifact.load(tmp_path / "saved")[0], batch), tiny.logits(learnt, batch))


def test_no_steps_are_post_training_quantization(data: DataModule, batch: Any, tmp_path: Path) -> None:
    rounded = tiny.fit(tiny.stage(PostTraining, **SETTINGS), tiny.model(), data, work=tmp_path / "rounded").model
    same = tiny.fit(
        tiny.stage(Reconstruction, **SETTINGS, **FIT | {"steps": 0}), tiny.model(), data, work=tmp_path / "same"
    ).model
    assert torch.equal(tiny.logits(rounded, batch), tiny.logits(same, batch))


def test_weights_begin_where_they_were_and_are_rounded_to_the_same_integers(data: DataModule, batch: Any) -> None:
    start, rounded, stage = (
        tiny.model(),
        tiny.stage(PostTraining, **SETTINGS),
        tiny.stage(Reconstruction, **SETTINGS, **FIT),
    )
    for one in (rounded, stage):
        tiny.plan(one, start)
        one.prepare(tiny.model(), data)
    assert quantization.quantized_layers(stage.model)
    for path, layer in quantization.quantized_layers(stage.model).items():
        assert torch.equal(layer.weight, start.get_submodule(path).weight)
        assert torch.equal(layer.integers(), quantization.quantized_layers(rounded.model)[path].integers())
    assert torch.equal(tiny.logits(stage.model, batch), tiny.logits(rounded.model, batch))


def test_one_block_learns_at_a_time_and_embeddings_never(data: DataModule, tmp_path: Path) -> None:
    moved: list[set[str]] = []

    class Look(Reconstruction):
        def on_fit_start(self) -> None:
            super().on_fit_start()
            self.before = tiny.weights(self.model)

        def on_fit_end(self) -> None:
            now = self.model.state_dict()
            changed = [name for name in now if not torch.equal(now[name], self.before[name])]
            moved.append({".".join(name.split(".")[:4]) if "layer." in name else "rest" for name in changed})
            assert not any("embeddings" in name for name in changed)

    tiny.fit(tiny.stage(Look, **SETTINGS, **FIT | {"steps": 2}), tiny.model(), data, work=tmp_path)
    assert moved == [{f"bert.encoder.layer.{index}"} for index in range(3)] + [{"rest"}]


def test_what_it_found_is_the_error_of_each_block_on_the_sentences_kept_aside(data: DataModule, tmp_path: Path) -> None:
    stage = tiny.stage(Reconstruction, **SETTINGS, **FIT)
    fitted = tiny.fit(stage, tiny.model(), data, work=tmp_path)
    rounded = tiny.fit(tiny.stage(PostTraining, **SETTINGS), tiny.model(), data, work=tmp_path / "rounded").model
    drawn = data.drawn(24, seed=1)
    learnt = {int(row) for batch in stage.batches(stage.settings) for row in batch["index"]}
    assert learnt <= set(drawn[:18].tolist())
    errors: dict[str, list[list[float]]] = {"before": [], "after": []}
    for row in drawn[18:]:  # one by one
        padded = data.train.batch([int(row)])
        length = int(padded["attention_mask"].sum())
        batch = {name: tensor[:, :length] for name, tensor in padded.items() if name != "labels"}
        wanted = taps.read(tiny.model(), batch, hidden=[1, 2, 3], logits=True)
        for name, model in (("before", rounded), ("after", fitted.model)):
            found = taps.read(model, batch, hidden=[1, 2, 3], logits=True)
            pairs = [(wanted.hidden[n], found.hidden[n]) for n in (1, 2, 3)] + [(wanted.logits, found.logits)]
            errors[name].append([float((theirs - own).detach().square().mean()) for theirs, own in pairs])
    for name, of_rows in errors.items():
        means = torch.tensor(of_rows).mean(0).tolist()
        assert [block[name] for block in fitted.findings["reconstruction"]] == pytest.approx(means, rel=1e-3)


@pytest.mark.parametrize("looked", [1, 2, 4, 7, 10])
def test_the_looks_are_spread_over_a_fit(looked: int, data: DataModule, tmp_path: Path) -> None:
    seen: list[int] = []

    class Look(Reconstruction):
        def _look(self) -> None:
            seen.append(self.trainer.global_step)
            super()._look()

    tiny.fit(tiny.stage(Look, **SETTINGS, **FIT | {"steps": looked}), tiny.model(), data, work=tmp_path)
    each = [seen[at : at + len(seen) // 4] for at in range(0, len(seen), len(seen) // 4)]
    assert each[0][0] == 0 and each[0][-1] == looked and len(each[0]) == min(5, looked) + 1
    assert [[step - own[0] for step in own] for own in each] == [each[0]] * 4


def test_a_block_keeps_its_best_state_on_the_sentences_kept_aside(data: DataModule, tmp_path: Path) -> None:
    """A learning rate that destroys whatever it trains: nothing is better than the start."""
    fit = FIT | {"learning_rate": 10.0, "warmup": 0.0, "steps": 5}
    ruined = tiny.stage(Reconstruction, **SETTINGS, **fit)
    fitted = tiny.fit(ruined, tiny.model(), data, work=tmp_path / "ruined")
    rounded = tiny.fit(tiny.stage(PostTraining, **SETTINGS), tiny.model(), data, work=tmp_path / "rounded").model
    assert tiny.same_weights(fitted.model, rounded)
    assert all(block["after"] == block["before"] for block in fitted.findings["reconstruction"])


def test_scales_may_rest_while_weights_are_reconstructed(data: DataModule, tmp_path: Path) -> None:
    fitted = tiny.fit(tiny.stage(Reconstruction, **SETTINGS, **FIT, scales="fixed"), tiny.model(), data, work=tmp_path)
    rounded = tiny.fit(tiny.stage(PostTraining, **SETTINGS), tiny.model(), data, work=tmp_path / "rounded").model
    pairs = zip(*(quantization.quantized_layers(model).values() for model in (fitted.model, rounded)), strict=True)
    assert all(torch.equal(one.weight_scale, other.weight_scale) for one, other in pairs)
    assert any(block["after"] < 0.9 * block["before"] for block in fitted.findings["reconstruction"])


def test_a_small_train_split_is_warned_of_and_not_at_every_step(
    data: DataModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = SETTINGS | {"calibration_examples": 1000}
    tiny.fit(tiny.stage(Reconstruction, **settings, **FIT), tiny.model(), data, work=tmp_path)
    assert 1 <= caplog.text.count("1000 examples asked for") <= 3


@pytest.mark.parametrize("forced", [1.0, 0.25, 0.0])
def test_the_input_of_a_block_is_mixed_as_the_equation_says(
    forced: float, data: DataModule, batch: Any, tmp_path: Path
) -> None:
    stage = tiny.stage(Reconstruction, **SETTINGS, **FIT)
    tiny.plan(stage, tiny.model())
    stage.prepare(tiny.model(dropout=0.5), data)
    stage.phase, stage.forced = 1, forced
    stage.train()
    loss = stage.loss(batch).detach()
    model, full = stage.model, stage._float[0]
    with torch.no_grad():
        own = taps.read(model, batch, hidden=[1], logits=False).hidden[1]
        theirs = taps.read(full, batch, hidden=[1, 2], logits=False).hidden
        given = forced * theirs[1] + (1 - forced) * own
        hidden = torch.zeros_like(given)
        layer = model.get_submodule("bert.encoder.layer.1")
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            found = layer(given[row : row + 1, :length])
            hidden[row, :length] = (found[0] if isinstance(found, tuple) else found).reshape(length, -1)
        lengths = batch["attention_mask"].sum(1)
        errors = [(hidden[row, :n] - theirs[2][row, :n]).square().mean() for row, n in enumerate(lengths)]
        expected = sum(errors) / len(errors)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_forcing_is_annealed_to_nothing_over_its_share_of_the_steps(data: DataModule, tmp_path: Path) -> None:
    seen: list[float] = []

    class Look(Reconstruction):
        def loss(self, batch: Any) -> Any:
            seen.append(self.forced)
            return super().loss(batch)

    tiny.fit(tiny.stage(Look, **SETTINGS, **FIT | {"steps": 8}, teacher_forcing=0.5), tiny.model(), data, work=tmp_path)
    assert seen[:8] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0] and len(seen) == 4 * 8


@pytest.mark.parametrize("death", [(4, 1), (1, 2), (3, 3)])  # inside a block, between two, at the head
def test_a_killed_reconstruction_goes_on_as_if_nothing_had_been(
    death: tuple[int, int], data: DataModule, tmp_path: Path
) -> None:
    fit = FIT | {"steps": 5, "accumulate": 2}
    settings: dict[str, Any] = SETTINGS | {"activations": "static"}
    whole = tiny.fit(tiny.stage(Reconstruction, **settings, **fit), tiny.model(), data, work=tmp_path / "whole")
    with pytest.raises(tiny.KilledError):
        dying = tiny.stage(Reconstruction, **settings, **fit)
        kill = tiny.Kill(death[0], phase=death[1])
        tiny.fit(dying, tiny.model(), data, work=tmp_path / "cut", seconds=0, callbacks=[kill])
    gone_on = tiny.fit(tiny.stage(Reconstruction, **settings, **fit), tiny.model(), data, work=tmp_path / "cut")
    assert tiny.same_weights(whole.model, gone_on.model) and whole.findings == gone_on.findings
    assert whole.steps == gone_on.steps == 4 * 5
