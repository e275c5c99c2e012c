"""What learnt maps to the teacher's width begin with: the identity, or the best map for the student as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from edgemin.data.module import DataModule
from edgemin.distillation.mlkd import MLKD
from edgemin.distillation.multi import Multi
from edgemin.distillation.tinybert import TinyBERT
from edgemin.encoder import taps
from edgemin.encoder.taps import Reading
from edgemin.training.distillation import Distillation
from edgemin.training.projections import Projection, asked, start

MASK = (torch.arange(7) < torch.tensor([5, 7, 1, 3])[:, None]).long()
FIT: dict[str, Any] = {"steps": 0, "batch_size": 8, "prediction_share": 0.0}
TINYBERT = {"_target_": "edgemin.distillation.tinybert.TinyBERT", "prediction_share": 0.0, "weight": 1.0}
METHODS: dict[str, Callable[..., Distillation]] = {
    "tinybert": lambda **more: tiny.stage(TinyBERT, **FIT, **more),
    "mlkd": lambda **more: tiny.stage(MLKD, **FIT, relation_heads=4, **more),
    "in a sum": lambda **more: tiny.stage(
        Multi, steps=0, batch_size=8, task_weight=0.0, methods={"a": dict(TINYBERT)}, **more
    ),
}


def states(width: int, seed: int) -> dict[int, Tensor]:
    """Hidden states after 0 to 3 layers, padding included."""
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(4, 7, width, generator=generator) for layer in range(4)}


def reading(hidden: dict[int, Tensor]) -> Reading:
    return Reading(None, {}, hidden)


def test_between_equal_widths_it_is_the_identity_and_nothing_is_read() -> None:
    def nothing() -> Iterator[Any]:
        raise AssertionError("no text is needed")
        yield

    found = Projection(nn.Linear(6, 6, bias=False), ((1, 2),))
    start([found], nothing())
    assert torch.equal(found.linear.weight, torch.eye(6))
    assert asked([found, Projection(nn.Linear(4, 6), ((2, 3), (0, 0)))]) == ((0, 2), (0, 3))


def test_between_others_it_is_that_of_ridge_regression_on_all_its_states() -> None:
    mine, theirs = states(4, 0), states(6, 1)
    pairs = ((1, 2), (2, 3))
    found = [Projection(nn.Linear(4, 6, bias=False), pairs), Projection(nn.Linear(4, 6, bias=False), ((0, 0),))]
    halves = [slice(0, 1), slice(1, 4)]  # more than one batch
    start(
        found,
        [
            (
                reading({layer: state[rows] for layer, state in mine.items()}),
                reading({layer: state[rows] for layer, state in theirs.items()}),
                MASK[rows],
            )
            for rows in halves
        ],
    )
    for linear, served in found:
        inputs = np.concatenate([mine[one][MASK.bool()].double().numpy() for one, _ in served])
        targets = np.concatenate([theirs[two][MASK.bool()].double().numpy() for _, two in served])
        penalty = 1e-3 * (inputs**2).sum(0).mean()
        # Ridge is least squares with the penalty's root as further rows.
        rows = np.concatenate([inputs, penalty**0.5 * np.eye(4)]), np.concatenate([targets, np.zeros((4, 6))])
        expected = np.linalg.lstsq(*rows, rcond=None)[0].T
        np.testing.assert_allclose(linear.weight.detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def weights(stage: Distillation) -> list[Tensor]:
    return [projection.linear.weight.detach() for projection in stage.projected()]


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_begins_with_the_identity_where_widths_are_equal(method: str, data: DataModule, batch: Any) -> None:
    stage = tiny.prepared(METHODS[method](), tiny.model(), tiny.model(), data)
    assert weights(stage) and all(torch.equal(weight, torch.eye(32)) for weight in weights(stage))
    assert stage.loss(batch).item() == pytest.approx(0, abs=1e-6), "a student that is its teacher has no loss"


@pytest.mark.parametrize("method", METHODS)
def test_a_stage_begins_with_the_best_map_where_they_are_not(method: str, data: DataModule) -> None:
    student, teacher = tiny.model(dropout=0.3), tiny.model(hidden=64, seed=5)
    stage = tiny.prepared(METHODS[method](), student, teacher, data)
    batch = data.train.batch(range(48))
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        mine = taps.read(student, batch, hidden=[1, 2, 3], logits=False).hidden
        theirs = taps.read(teacher, batch, hidden=[1, 2, 3], logits=False).hidden
    inputs, targets = (torch.cat([side[layer][mask] for layer in (1, 2, 3)]) for side in (mine, theirs))
    best = torch.linalg.lstsq(inputs.double(), targets.double()).solution
    least = (inputs.double() @ best - targets).square().mean()
    found = (inputs @ weights(stage)[-1].T - targets).square().mean()
    assert least <= found <= 1.02 * least
    again = tiny.prepared(METHODS[method](), tiny.model(dropout=0.3), tiny.model(hidden=64, seed=5), data)
    assert all(torch.equal(one, two) for one, two in zip(weights(stage), weights(again), strict=True))


def test_what_an_earlier_stage_has_learnt_comes_first(data: DataModule) -> None:
    learnt = {"TinyBERT.projections.hidden.weight": torch.full((32, 32), 0.5)}
    stage = METHODS["tinybert"]()
    stage.inherited = learnt
    tiny.prepared(stage, tiny.model(), tiny.model(seed=5), data)
    embedding, hidden = weights(stage)
    assert torch.equal(embedding, torch.eye(32)) and torch.equal(hidden, learnt["TinyBERT.projections.hidden.weight"])


def test_on_a_corpus_it_is_found_on_its_text(data: DataModule, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(text for (text,) in data.splits.train.texts))
    stage = METHODS["tinybert"](corpus=str(corpus), corpus_length=24)
    tiny.prepared(stage, tiny.model(), tiny.model(hidden=64, seed=5), DataModule(None, data.tokenizer, data.cache))
    fitted = stage.loss(data.train.batch(range(16))).item()
    for projection in stage.projected():
        projection.linear.reset_parameters()
    assert fitted < 0.9 * stage.loss(data.train.batch(range(16))).item()
