"""A killed fit goes on from its last checkpoint and ends with the weights of an unbroken one; early stopping."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from edgemin.data.batches import TrainBatches
from edgemin.data.module import DataModule
from edgemin.distillation.minilmv2 import MiniLMv2
from edgemin.encoder import building
from edgemin.errors import UserError
from edgemin.evaluate import Evaluation
from edgemin.finetune import Finetune
from edgemin.pruning.stage import Pruning
from edgemin.training import callbacks, fitting
from edgemin.training.fit import Fit
from edgemin.training.stage import Stage

FIT: dict[str, Any] = {"batch_size": 8, "learning_rate": 1e-3, "warmup": 0.3}
QKV = {"qq": 1.0, "kk": 1.0, "vv": 1.0}
STAGES: dict[str, Callable[[], Stage]] = {
    "finetune": lambda: tiny.stage(Finetune, steps=5, **FIT),
    "finetune, two epochs": lambda: tiny.stage(Finetune, epochs=2, **FIT | {"batch_size": 16}),
    "finetune, accumulated": lambda: tiny.stage(Finetune, steps=4, accumulate=3, **FIT),
    "finetune, last accumulation incomplete": lambda: tiny.stage(Finetune, epochs=1, accumulate=4, **FIT),
    "distill with the task": lambda: tiny.stage(
        MiniLMv2, steps=5, relations=QKV, task_weight=0.5, layer_map="layer_to_layer", **FIT
    ),
    "prune on calibration": lambda: tiny.stage(
        Pruning, ratio=0.5, scope="global", rounds=2, calibration_examples=16, steps=3, **FIT
    ),
    "prune during training": lambda: tiny.stage(
        Pruning, ratio=0.5, scope="global", rounds=2, importance="training", training_steps=3, steps=3, **FIT
    ),
    "prune by Michel's criterion, accumulated": lambda: tiny.stage(
        Pruning,
        criterion="taylor",
        ratio=0.5,
        rounds=2,
        importance="training",
        training_steps=2,
        steps=2,
        accumulate=2,
        **FIT,
    ),
}
# (stage, phase, batch after which the process dies, where it goes on)
DEATHS = [
    ("finetune", 0, 1, 0),  # before the first checkpoint
    ("finetune, two epochs", 0, 4, 3),  # at the border of two epochs
    ("finetune, accumulated", 0, 8, 6),
    ("finetune, accumulated", 0, 12, 9),
    ("finetune, last accumulation incomplete", 0, 6, 4),
    ("distill with the task", 0, 3, 2),
    ("prune on calibration", 1, 1, None),  # heads went, no checkpoint since
    ("prune on calibration", 1, 3, 2),
    ("prune during training", 0, 3, 2),  # sums of the ranking so far
    ("prune during training", 1, 1, None),
    ("prune during training", 3, 3, 2),
    ("prune by Michel's criterion, accumulated", 2, 3, 2),
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], fitting.Fitted]:
    """What a stage ends with when nothing breaks its fit; each is run once."""
    done: dict[str, fitting.Fitted] = {}

    def run(name: str) -> fitting.Fitted:
        if name not in done:
            folder = tmp_path_factory.mktemp("unbroken")
            done[name] = one_run(name, folder / "work", tiny.data(folder))
        return done[name]

    return run


def one_run(name: str, work: Path, data: DataModule, callbacks: Any = ()) -> fitting.Fitted:
    stage = STAGES[name]()
    teachers = [tiny.model(layers=4, hidden=64, seed=5) for _ in stage.teachers]
    return tiny.fit(stage, tiny.model(), data, teachers, work=work, seconds=0, callbacks=callbacks)


class Start(tiny.pl.Callback):
    """Which batches of which phase were run."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((pl_module.phase, batch_idx))


@pytest.mark.parametrize(("name", "phase", "batch", "again_from"), DEATHS)
def test_a_killed_stage_ends_with_the_weights_of_an_unbroken_one(
    name: str,
    phase: int,
    batch: int,
    again_from: int | None,
    tmp_path: Path,
    unbroken: Callable[[str], fitting.Fitted],
) -> None:
    expected, data = unbroken(name), tiny.data(tmp_path)
    with pytest.raises(tiny.KilledError):
        one_run(name, tmp_path / "work", data, [tiny.Kill(batch, phase)])
    torch.manual_seed(12345)  # nothing may hang on what the process drew before
    watch = Start()
    resumed = one_run(name, tmp_path / "work", data, [watch])
    assert watch.seen[0] == (phase, again_from or 0)
    assert building.outline(resumed.model) == building.outline(expected.model)
    assert tiny.same_weights(resumed.model, expected.model)
    assert resumed.notes == expected.notes
    assert resumed.steps == expected.steps
    assert resumed.points == expected.points, "no step is missing, none stands twice"


def test_a_stage_killed_three_times_still_ends_with_the_same_weights(
    tmp_path: Path, unbroken: Callable[[str], fitting.Fitted]
) -> None:
    name, data = "prune during training", tiny.data(tmp_path)
    for phase, batch in ((0, 2), (1, 2), (3, 3)):
        with pytest.raises(tiny.KilledError):
            one_run(name, tmp_path / "work", data, [tiny.Kill(batch, phase)])
    resumed = one_run(name, tmp_path / "work", data)
    assert tiny.same_weights(resumed.model, unbroken(name).model)
    assert resumed.steps == unbroken(name).steps


class Clock(tiny.pl.Callback):
    """A second for every batch that is begun, on a clock that reads anything when a process starts."""

    def __init__(self, reading: float) -> None:
        self.reading = reading

    def monotonic(self) -> float:
        return self.reading

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.reading += 1


def test_the_seconds_of_a_resumed_stage_are_those_of_all_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(folder: Path, reading: float, *deaths: tiny.pl.Callback) -> fitting.Fitted:
        clock = Clock(reading)
        for module in (fitting, callbacks):
            monkeypatch.setattr(module, "time", clock)
        return one_run("prune during training", folder, data, [clock, *deaths])

    data = tiny.data(tmp_path)
    whole = timed(tmp_path / "whole", 100)
    assert whole.seconds == sum(fit.batches(48) for fit in STAGES["prune during training"]().fits()) == 12
    for number, (phase, batch) in enumerate(((0, 2), (1, 2), (1, 3), (3, 1))):
        with pytest.raises(tiny.KilledError):
            timed(tmp_path / "killed", 1000 * number, tiny.Kill(batch, phase))
    assert timed(tmp_path / "killed", 7).seconds == whole.seconds, "what came after a checkpoint is run again"
    assert timed(tmp_path / "whole", 3).seconds == whole.seconds, "trained, but not committed"


def test_a_stage_that_was_trained_but_not_committed_trains_no_further(
    tmp_path: Path, unbroken: Callable[[str], fitting.Fitted]
) -> None:
    for name in ("finetune", "prune during training"):
        data = tiny.data(tmp_path)
        one_run(name, tmp_path / name, data)
        again = one_run(name, tmp_path / name, data, [tiny.Kill(1, phase) for phase in range(4)])
        assert tiny.same_weights(again.model, unbroken(name).model)
        assert (again.steps, again.notes) == (unbroken(name).steps, unbroken(name).notes)


def test_the_same_seed_gives_the_same_weights_and_another_other_ones(tmp_path: Path) -> None:
    data = tiny.data(tmp_path)
    runs = [
        tiny.fit(tiny.stage(Finetune, steps=2, **FIT), tiny.model(), data, work=tmp_path / str(n), seed=seed).model
        for n, seed in enumerate((3, 3, 4))
    ]
    assert tiny.same_weights(runs[0], runs[1]) and not tiny.same_weights(runs[0], runs[2])


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    """Without dropout and with batches of one size, the mean of gradients is the gradient of the mean."""
    data = tiny.data(tmp_path)
    done = [
        tiny.fit(
            tiny.stage(
                Finetune,
                steps=1,
                batch_size=48 // parts,
                accumulate=parts,
                learning_rate=1e-3,
                warmup=0.0,
                gradient_clip=0.0,
            ),
            tiny.model(dropout=0.0),
            data,
            work=tmp_path / str(parts),
        ).model
        for parts in (1, 3)
    ]
    before = tiny.model(dropout=0.0).state_dict()
    moved = 0.0
    for name, whole in done[0].state_dict().items():
        # AdamW's first step is a sign where the gradient is far above eps; rounding decides only near zero.
        difference = (done[1].state_dict()[name] - whole).abs()
        assert (difference < 1e-4).double().mean() > 0.98, name
        moved = max(moved, float((whole - before[name]).abs().max()))
    assert moved > 5e-4


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / fitting.CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"^checkpoint .*last\.ckpt: damaged .*delete its directory[^\n]*$"):
        one_run("finetune", tmp_path / "work", tiny.data(tmp_path))


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("this must never run",)


def foreign(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        torch.save(change(saved) or saved, path)

    return write


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: torch.save(Malicious(), path), "damaged"),
        (lambda path: torch.save([1, 2], path), "damaged"),
        (lambda path: torch.save({}, path), "of another stage"),
        (lambda path: torch.save(tiny.model().state_dict(), path), "of another stage"),
        (foreign(lambda saved: saved["edgemin"].update(key="0123456789abcdef0123")), "of another stage"),
        (foreign(lambda saved: saved["edgemin"].update(batch="3")), "of another stage"),
        (foreign(lambda saved: saved["edgemin"].pop("phase")), "of another stage"),
        (foreign(lambda saved: saved.update(state_dict=tiny.model(hidden=16).state_dict())), "does not fit"),
        (foreign(lambda saved: saved["state_dict"].update({"model.classifier.bias": torch.ones(7)})), "does not fit"),
        (foreign(lambda saved: saved.update(state_dict=None)), "does not fit"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_in_one_line(
    change: Callable[[Path], None], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(tiny.KilledError):
        one_run("finetune", tmp_path / "work", tiny.data(tmp_path), [tiny.Kill(4)])
    change(tmp_path / "work" / fitting.CHECKPOINT)
    with pytest.raises(
        UserError, match=rf"^checkpoint [^\n]*last\.ckpt: {says}[^\n]*; delete its directory to train [^\n]*$"
    ):
        one_run("finetune", tmp_path / "work", tiny.data(tmp_path))
    assert "never run" not in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_fit_in_one_line(tmp_path: Path) -> None:
    start = tiny.model()
    with torch.no_grad():
        start.get_submodule("classifier").weight.fill_(torch.nan)
    with pytest.raises(
        UserError,
        match=r"^finetune\.learning_rate: the loss of student/finetune became nan at step 1, batch 1; [^\n]*$",
    ):
        tiny.fit(
            tiny.stage(Finetune, steps=1, **FIT), start, tiny.data(tmp_path), work=tmp_path, name="student/finetune"
        )


class Breaks(Finetune):
    """Fine-tuning whose loss is not finite in some batches, counted from 1; its weights stay as they are."""

    def __init__(self, batches: Sequence[int], value: float = torch.nan, **settings: Any) -> None:
        super().__init__(fit=Fit(**FIT | settings))
        self.wrong, self.value, self.batch = batches, value, 0

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self.batch += 1
        loss = super().loss(batch)
        return loss * 0 + self.value if self.batch in self.wrong else loss


@pytest.mark.parametrize(
    ("batches", "settings", "says", "saved"),
    [
        ([2], {"steps": 4}, "nan at step 2, batch 2;", 1),
        ([4, 5, 9], {"steps": 30}, "nan at step 4, batch 4;", 3),
        ([15], {"steps": 30, "value": -torch.inf}, "-inf at step 15, batch 15;", 14),
        ([8], {"steps": 30, "accumulate": 3}, "nan at step 3, batch 8;", 6),
        ([30], {"steps": 10, "accumulate": 3}, "nan at step 10, batch 30;", 27),
    ],
)
def test_no_checkpoint_follows_a_loss_that_is_not_finite(
    batches: list[int], settings: dict[str, Any], says: str, saved: int, tmp_path: Path
) -> None:
    """Whenever it was looked at: here a checkpoint is due after every step."""
    with pytest.raises(UserError, match=rf"the loss of student/finetune became {re.escape(says)}"):
        tiny.fit(
            Breaks(batches, **settings),
            tiny.model(),
            tiny.data(tmp_path),
            work=tmp_path,
            seconds=0,
            name="student/finetune",
        )
    assert torch.load(tmp_path / fitting.CHECKPOINT, weights_only=True)["edgemin"]["batch"] == saved


@pytest.mark.parametrize("batch", [3, 12, 20])
def test_a_loss_that_is_not_finite_is_neither_recorded_nor_scored(batch: int, tmp_path: Path) -> None:
    sent: list[dict[str, float]] = []
    trainer = fitting.Trainer(accelerator="cpu", precision=32)
    with pytest.raises(UserError, match=f"became inf at step {batch}, batch {batch};"):
        fitting.run(
            tiny.planned(Breaks([batch], torch.inf, epochs=5, steps=None, patience=5)),
            tiny.model(),
            holdout_data(tmp_path),  # six batches an epoch
            [],
            seed=1,
            trainer=trainer,
            work=tmp_path,
            send=lambda stage, values, step: sent.append(dict(values)),
        )
    assert all(math.isfinite(value) for values in sent for value in values.values())
    assert (tmp_path / "best.ckpt").exists() == (batch > 6)
    assert not (tmp_path / fitting.CHECKPOINT).exists()


def test_losses_are_looked_at_where_the_fit_waits_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[list[int]] = []

    def look(stage: Stage) -> None:
        if stage.losses:
            looked.append(list(stage.losses))
        check(stage)

    check = callbacks.check_losses
    monkeypatch.setattr(callbacks, "check_losses", look)
    tiny.fit(tiny.stage(Finetune, steps=25, **FIT), tiny.model(), tiny.data(tmp_path), work=tmp_path)
    assert looked == [[0], [*range(1, 10)], [*range(10, 20)], [*range(20, 25)]]


@pytest.mark.parametrize(("world", "votes"), [(1, 11), (2, 2)])
def test_several_processes_vote_every_few_steps_and_one_looks_at_every_step(
    world: int, votes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def from_main(action: Callable[[], Any]) -> Any:
        asked.append(checkpoint.batch)
        return action()

    monkeypatch.setattr(callbacks.ranks, "world", lambda: world)
    monkeypatch.setattr(callbacks.ranks, "from_main", from_main)
    checkpoint = callbacks.Checkpoint(tmp_path / "last.ckpt", 1e9, range(24), callbacks.Spent(0.0), [])  # type: ignore[arg-type]
    trainer = SimpleNamespace(accumulate_grad_batches=2)
    for batch in range(24):
        checkpoint.on_train_batch_end(trainer, tiny.stage(Finetune, steps=1), None, None, batch)  # type: ignore[arg-type]
    assert len(asked) == votes
    assert asked[-1] == (22 if world == 1 else 2 * 2 * callbacks.VOTE_STEPS)


# Early stopping


class NothingReported(DataModule):
    """Data whose evaluation splits must not be looked at."""

    @property
    def evaluation(self) -> Any:  # type: ignore[override]
        raise AssertionError("the reported splits select nothing")


def holdout_data(folder: Path) -> DataModule:
    data = tiny.data(folder, max_train_examples=64, holdout=0.25)
    return NothingReported(data.splits, data.tokenizer, data.cache)


class Scores:
    """Stands for `evaluate`: gives scores, keeps the weights they were given for."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = iter(scores)
        self.weights: list[dict[str, torch.Tensor]] = []
        self.on: list[Any] = []

    def __call__(self, model: Any, encoded: Any, *of_task: Any, **settings: Any) -> Evaluation:
        self.weights.append(tiny.weights(model))
        self.on.append(encoded)
        return Evaluation({"accuracy": next(self.scores)}, None)  # type: ignore[arg-type]


def stopping(epochs: int = 10, patience: int = 2) -> Finetune:
    return tiny.stage(Finetune, epochs=epochs, patience=patience, **FIT | {"batch_size": 16})  # 3 batches an epoch


def test_early_stopping_keeps_the_best_weights_and_looks_at_the_hold_out_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = holdout_data(tmp_path)
    scores = Scores([0.5, 0.8, 0.7, 0.8, 0.9])
    monkeypatch.setattr(callbacks, "evaluate", scores)
    fitted = tiny.fit(stopping(), tiny.model(), data, work=tmp_path / "work")
    assert len(scores.weights) == 4, "two epochs without a better score"
    assert fitted.steps == 12
    assert all(encoded is data.holdout for encoded in scores.on)
    assert all(torch.equal(tensor, scores.weights[1][name]) for name, tensor in fitted.model.state_dict().items())


@pytest.mark.parametrize(
    ("steps", "scores", "best"),
    [(5, [0.5, 0.8], 1), (5, [0.8, 0.5], 0), (6, [0.5, 0.8], 1), (2, [0.5], 0)],
    ids=["the last is best", "the last is worse", "no epoch is cut short", "less than one epoch"],
)
def test_a_last_epoch_that_is_cut_short_is_scored_too(
    steps: int, scores: list[float], best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Scores(scores)
    monkeypatch.setattr(callbacks, "evaluate", given)
    stage = tiny.stage(Finetune, steps=steps, patience=2, **FIT | {"batch_size": 16})
    fitted = tiny.fit(stage, tiny.model(), holdout_data(tmp_path), work=tmp_path / "work")
    assert len(given.weights) == len(scores) and fitted.steps == steps
    assert all(torch.equal(tensor, given.weights[best][name]) for name, tensor in fitted.model.state_dict().items())
    assert [step for _, step, values in fitted.points if "holdout_accuracy" in values][-1] == steps


def test_early_stopping_by_the_real_scores_never_sees_what_is_reported(tmp_path: Path) -> None:
    data = holdout_data(tmp_path)
    fitted = tiny.fit(stopping(epochs=3, patience=3), tiny.model(), data, work=tmp_path / "work")
    assert fitted.steps == 9


def test_the_hold_out_is_no_part_of_what_is_trained_on(tmp_path: Path) -> None:
    data = holdout_data(tmp_path)
    assert data.splits.holdout is not None
    assert not set(data.splits.holdout.texts) & set(data.splits.train.texts)
    assert len(data.train) == 48 and TrainBatches(data.train, 16, seed=0, epochs=1).batches_per_epoch == 3


def test_patience_without_a_hold_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^patience: expected task\.holdout above 0"):
        tiny.fit(stopping(), tiny.model(), tiny.data(tmp_path), work=tmp_path / "work")


def stopped_early(
    folder: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], deaths: Sequence[tiny.pl.Callback]
) -> fitting.Fitted:
    """Early stopping with these scores of epochs 1, 2, ..., each given to the weights of that epoch, through deaths."""
    known: dict[str, float] = {}
    fresh = iter(scores)

    def evaluate(model: Any, encoded: Any, *of_task: Any, **settings: Any) -> Evaluation:
        content = repr([tensor.double().sum().item() for tensor in model.state_dict().values()])
        if content not in known:
            known[content] = next(fresh)
        return Evaluation({"accuracy": known[content]}, None)  # type: ignore[arg-type]

    monkeypatch.setattr(callbacks, "evaluate", evaluate)
    data = holdout_data(folder)
    for death in deaths:
        with pytest.raises(tiny.KilledError):
            tiny.fit(stopping(), tiny.model(), data, work=folder / "w", seconds=0, callbacks=[death])
    return tiny.fit(stopping(), tiny.model(), data, work=folder / "w", seconds=0)


def test_early_stopping_remembers_its_best_through_a_death_inside_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [0.5, 0.8, 0.7, 0.6, 0.9]
    expected = stopped_early(tmp_path / "whole", monkeypatch, scores, [])
    resumed = stopped_early(tmp_path / "killed", monkeypatch, scores, [tiny.Kill(batch) for batch in (2, 5, 9)])
    assert tiny.same_weights(resumed.model, expected.model) and resumed.steps == expected.steps == 12


class KillAtTheEnd(tiny.pl.Callback):
    """Dies when the last batch is done and nothing of what follows."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        raise tiny.KilledError


@pytest.mark.parametrize("deaths", [[4, 7, 10], []], ids=["every", "end"])
def test_early_stopping_remembers_its_best_through_a_death_after_an_epochs_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: list[int]
) -> None:
    scores = [0.5, 0.8, 0.7, 0.75, 0.9 if not deaths else 0.78, 0.77, 0.76, 0.9, 0.91, 0.92]
    expected = stopped_early(tmp_path / "whole", monkeypatch, scores, [])
    killers = [tiny.Kill(batch) for batch in deaths] or [KillAtTheEnd()]
    resumed = stopped_early(tmp_path / "killed", monkeypatch, scores, killers)
    assert tiny.same_weights(resumed.model, expected.model) and resumed.steps == expected.steps


# The trainer


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"precision": 16, "accelerator": "cpu"}, "precision"),
        ({"threads": 0}, "threads"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds"),
    ],
)
def test_a_trainer_that_cannot_be_is_refused(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: expected .* given [^\n]*$"):
        fitting.Trainer(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_gpu_is_not_asked_of_a_machine_without_one() -> None:
    with pytest.raises(UserError, match=r"^accelerator: expected cpu or auto"):
        fitting.Trainer(accelerator="gpu")
    assert fitting.Trainer().device == "cpu"


@pytest.mark.parametrize("has", [True, False])
def test_auto_precision_is_bf16_only_where_the_cpu_has_it(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "cpu_has_bf16", lambda: has)
    assert fitting.Trainer(accelerator="cpu").lightning_precision == ("bf16-mixed" if has else "32-true")
    assert fitting.Trainer(accelerator="cpu", precision=32).lightning_precision == "32-true"
    assert fitting.Trainer(accelerator="cpu", precision="bf16").lightning_precision == "bf16-mixed"


def test_a_checkpoint_is_written_between_optimizer_steps_only(tmp_path: Path) -> None:
    """After batch 7 of accumulations of 3 the last checkpoint is the one after batch 6."""
    for death, expected in itertools.zip_longest((2, 4, 8), (None, 3, 6)):
        work = tmp_path / str(death)
        with pytest.raises(tiny.KilledError):
            one_run("finetune, accumulated", work, tiny.data(tmp_path), [tiny.Kill(death)])
        path = work / fitting.CHECKPOINT
        found = torch.load(path, weights_only=True)["edgemin"]["batch"] if path.exists() else None
        assert found == expected
    assert not list(tmp_path.rglob(".writing-*"))


class Norms(tiny.pl.Callback):
    """The norm of every optimizer step's gradient, in plain float64, and the learning rate."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        squares = sum(float(p.grad.double().square().sum()) for p in pl_module.parameters() if p.grad is not None)
        self.seen.append((squares**0.5, optimizer.param_groups[0]["lr"]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_curves_have_rate_and_gradient_norm_before_clipping_once_a_step(accumulate: int, tmp_path: Path) -> None:
    norms, sent = Norms(), list[Any]()
    stage = tiny.planned(tiny.stage(Finetune, steps=20, accumulate=accumulate, learning_rate=1e-3, gradient_clip=1e-3))
    trainer = fitting.Trainer(accelerator="cpu", precision=32)
    fitted = fitting.run(
        stage,
        tiny.model(),
        tiny.data(tmp_path),
        [],
        seed=1,
        trainer=trainer,
        work=tmp_path,
        name="student/finetune",
        callbacks=[norms],
        send=lambda *point: sent.append(point),
    )
    assert [(name, step) for name, step, _ in fitted.points] == [("student/finetune", step) for step in (1, 10, 20)]
    assert sent == [(name, values, step) for name, step, values in fitted.points]
    for _, step, values in fitted.points:
        assert values.keys() == {"loss", "gradient_norm", "learning_rate"}
        norm, rate = norms.seen[step - 1]
        assert values["gradient_norm"] == pytest.approx(norm, rel=1e-5) and values["learning_rate"] == rate
        assert norm > 1e-2, "clipped to less"


def test_the_holdout_is_scored_every_epoch_and_changes_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> fitting.Fitted:
        data = tiny.data(tmp_path, holdout=0.25)
        (tmp_path / name).mkdir()
        return tiny.fit(tiny.stage(Finetune, epochs=2, learning_rate=1e-3), tiny.model(), data, work=tmp_path / name)

    fitted = run("scored")
    assert fitted.steps % 2 == 0
    scored = [step for _, step, values in fitted.points if "holdout_accuracy" in values]
    assert scored == [fitted.steps // 2, fitted.steps]
    monkeypatch.setattr(fitting.EarlyStop, "on_train_batch_end", lambda *args: None)
    monkeypatch.setattr(fitting.Record, "on_before_optimizer_step", lambda *args: None)
    assert tiny.same_weights(run("unscored").model, fitted.model)
