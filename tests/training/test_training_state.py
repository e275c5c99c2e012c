"""What a stage leaves beside its model: who goes on from it, and that nobody else reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import studies
import tiny
import torch
from torch import Tensor

import edgemin
from edgemin import artifact, config
from edgemin.data.module import DataModule
from edgemin.errors import UserError
from edgemin.measure.size import size_bytes
from edgemin.training.fitting import Fitted
from edgemin.training.stage import Stage

TINYBERT = {"_target_": "edgemin.distillation.tinybert.TinyBERT", "batch_size": 8, "prediction_share": 0.0}
HIDDEN = "TinyBERT.projections.hidden.weight"


def sum_of(*methods: str) -> dict[str, Any]:
    own = {key: TINYBERT[key] for key in ("_target_", "prediction_share")}
    return {
        "_target_": "edgemin.distillation.multi.Multi",
        "batch_size": 8,
        "task_weight": 0.0,
        "methods": {name: own | {"weight": 1.0} for name in methods},
    }


@pytest.fixture
def data(tmp_path: Path) -> DataModule:
    return tiny.data(tmp_path / "data")


def learnt(
    node: Mapping[str, Any],
    steps: int,
    data: DataModule,
    work: Path,
    inherited: Mapping[str, Tensor] | None = None,
    hidden: int = 32,
) -> Fitted:
    """Run a distillation from a wider teacher that goes on from some training state."""
    stage = config.construct({**node, "steps": steps}, "distill", Stage)
    student, teacher = tiny.model(hidden=hidden), tiny.model(hidden=64, seed=5)
    return tiny.fit(stage, student, data, [teacher], work=work, inherited=inherited or {})


@pytest.mark.parametrize(
    ("node", "name"),
    [(TINYBERT, HIDDEN), (sum_of("a", "b"), f"b.{HIDDEN}")],
    ids=["alone", "in a sum of methods"],
)
def test_a_later_stage_of_the_method_begins_with_what_the_earlier_one_has_learnt(
    node: dict[str, Any], name: str, data: DataModule, tmp_path: Path
) -> None:
    first = learnt(node, 3, data, tmp_path / "first")
    fresh = learnt(node, 0, data, tmp_path / "fresh")
    again = learnt(node, 0, data, tmp_path / "again", first.state)
    assert name in first.state and first.state.keys() == again.state.keys() == fresh.state.keys()
    assert all(torch.equal(again.state[key], tensor) for key, tensor in first.state.items())
    assert not torch.equal(fresh.state[name], first.state[name])
    further = learnt(node, 3, data, tmp_path / "further", first.state)
    assert not torch.equal(further.state[name], first.state[name])


def test_another_method_neither_takes_it_nor_keeps_it(data: DataModule, tmp_path: Path) -> None:
    first = learnt(TINYBERT, 1, data, tmp_path / "first")
    mlkd = {"_target_": "edgemin.distillation.mlkd.MLKD", "batch_size": 8, "relation_heads": 4}
    after = [learnt(mlkd, 1, data, tmp_path / str(number), given) for number, given in enumerate([first.state, {}])]
    assert after[0].state and not after[0].state.keys() & first.state.keys()
    assert all(torch.equal(tensor, after[1].state[key]) for key, tensor in after[0].state.items())


def test_what_no_longer_fits_is_learnt_anew_and_said(data: DataModule, tmp_path: Path) -> None:
    first = learnt(TINYBERT, 1, data, tmp_path / "first")
    narrow = learnt(TINYBERT, 0, data, tmp_path / "narrow", first.state, hidden=16)
    fresh = learnt(TINYBERT, 0, data, tmp_path / "fresh", hidden=16)
    assert narrow.notes and f"{HIDDEN} is [64, 32] in an earlier stage and [64, 16] here" in narrow.notes[0]
    assert all(torch.equal(tensor, fresh.state[key]) for key, tensor in narrow.state.items())


def test_killed_and_resumed_a_stage_ends_with_the_same_state(data: DataModule, tmp_path: Path) -> None:
    first = learnt(TINYBERT, 2, data, tmp_path / "first")

    def run(work: str, **how: Any) -> Fitted:
        stage = config.construct({**TINYBERT, "steps": 4}, "distill", Stage)
        student, teacher = tiny.model(), tiny.model(hidden=64, seed=5)
        return tiny.fit(stage, student, data, [teacher], work=tmp_path / work, seconds=0, inherited=first.state, **how)

    unbroken = run("a")
    with pytest.raises(tiny.KilledError):
        run("b", callbacks=[tiny.Kill(2)])
    resumed = run("b")
    assert all(torch.equal(tensor, unbroken.state[key]) for key, tensor in resumed.state.items())


def test_a_study_hands_it_on_and_a_stage_that_has_none_drops_it(tmp_path: Path) -> None:
    run = studies.run(
        tmp_path / "run",
        "+distill@first=tinybert",
        "first.steps=2",
        "first.prediction_share=0",
        "+distill@again=tinybert",
        "again.steps=0",
        "again.prediction_share=0",
        "stages=[first,again,finetune]",
    )
    folders = {node["path"]: tmp_path / "run" / "store" / node["key"] for node in run["nodes"]}
    first, again, last = (
        artifact.load_training_state(folders[f"student/{path}"])
        for path in ("first", "first/again", "first/again/finetune")
    )
    assert HIDDEN in first and not last
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_tinyberts_task_phase_goes_on_with_the_projections_of_its_general_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "TINY", tuple(word for word in studies.TINY if "relation_heads" not in word))
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the plot was good .\nthe cast was never dull .\n" * 40)
    run = studies.run(
        tmp_path / "run",
        "order=tinybert",
        f"general.corpus={corpus}",
        "general.corpus_subset=null",
        "general.corpus_length=16",
        "general.steps=4",
        "general.learning_rate=1e-2",
        "distill.steps=5",
        "distill.learning_rate=1e-12",  # what it ends with is what it began with
    )
    folders = {node["path"]: tmp_path / "run" / "store" / node["key"] for node in run["nodes"]}
    general, after, alone = (
        artifact.load_training_state(folders[f"student/{path}"]) for path in ("general", "general/distill", "distill")
    )
    torch.testing.assert_close(after[HIDDEN], general[HIDDEN])
    assert not torch.allclose(alone[HIDDEN], general[HIDDEN], atol=1e-3)
    names = [row["name"] for row in run["rows"]]
    assert names == ["Teacher", "Task distillation alone", "General and task distillation", "Control: no teacher"]


def test_it_is_neither_the_models_size_nor_read_with_it(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("without", "with")]
    for folder, state in zip(folders, ({}, {"a.weight": torch.ones(3, 5)}), strict=True):
        folder.mkdir()
        artifact.save(folder, tiny.model(), None, {}, state)
    assert size_bytes(folders[0]) == size_bytes(folders[1])
    assert artifact.load_training_state(folders[0]) == {}
    assert torch.equal(artifact.load_training_state(folders[1])["a.weight"], torch.ones(3, 5))
    (folders[1] / artifact.TRAINING_STATE).write_bytes(b"no tensors")
    model, _ = edgemin.load(folders[1])
    assert tiny.same_weights(model, edgemin.load(folders[0])[0])
    with pytest.raises(UserError, match=r"^artifact [^\n]*: training_state\.safetensors is damaged"):
        artifact.load_training_state(folders[1])
