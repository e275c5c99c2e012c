"""Runs of stages that one process and several are to end alike; as a script, what torchrun starts for test_ranks.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import tiny
import torch

from edgemin import toy
from edgemin.data.module import DataModule
from edgemin.distillation.minilmv2 import MiniLMv2
from edgemin.encoder import building
from edgemin.errors import SharedError, UserError
from edgemin.finetune import Finetune
from edgemin.processes import ranks
from edgemin.pruning.stage import Pruning
from edgemin.training import fitting
from edgemin.training.stage import Stage

FIT: dict[str, Any] = {"learning_rate": 1e-3, "warmup": 0.3}
QKV = {"qq": 1.0, "kk": 1.0, "vv": 1.0}
KILLED_AT = 21  # batches, of 50


def finetune(**settings: Any) -> Finetune:
    return tiny.stage(Finetune, **{"steps": 50, "batch_size": 8, **FIT, **settings})


def distill(folder: Path, **settings: Any) -> MiniLMv2:
    given = {"steps": 50, "batch_size": 8, "relations": QKV, "task_weight": 0.0, **FIT, **settings}
    return tiny.stage(MiniLMv2, **given)


def on_text(folder: Path) -> MiniLMv2:
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    (text / "train.txt").write_text("\n".join(toy.generate(400, 3)[0]))
    return distill(folder, steps=6, batch_size=5, corpus=str(text), corpus_length=16)


CASES: dict[str, Callable[[Path], Stage]] = {
    "finetune": lambda folder: finetune(),
    "odd batches, accumulated": lambda folder: finetune(batch_size=7, accumulate=2, steps=10),
    "a last batch of one": lambda folder: finetune(batch_size=47, steps=6),
    "early stopping": lambda folder: finetune(steps=None, epochs=6, batch_size=12, patience=2),
    "a student that stops below its end": distill,
    "two weighted terms": lambda folder: distill(folder, task_weight=0.5, steps=6, batch_size=7),
    "a corpus": on_text,
    "heads ranked while training": lambda folder: tiny.stage(
        Pruning, ratio=0.5, importance="training", training_steps=4, steps=3, batch_size=7, accumulate=2, **FIT
    ),
    "heads ranked before": lambda folder: tiny.stage(
        Pruning, ratio=0.5, calibration_examples=16, steps=3, batch_size=7, **FIT
    ),
}


@dataclass
class Ended:
    """The result of a run: the loss terms of every step, and the weights at the end."""

    terms: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    steps: int = 0
    structure: str = ""


class Watch(pl.Callback):
    """Keeps what is logged, batch by batch."""

    def __init__(self, into: list[dict[str, float]]) -> None:
        self.into = into

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        seen = {name: float(read()) for name, read in pl_module.recorded.items()}
        self.into.append(seen | {"phase": pl_module.phase, "batch": batch_idx})


def data(folder: Path) -> DataModule:
    return tiny.data(folder, max_train_examples=64, holdout=0.25)  # 48 to train on


def run(name: str, folder: Path, *deaths: pl.Callback, seconds: float = 1e9) -> Ended:
    """One case, in as many processes as there are; where `folder` holds its checkpoint, from there on."""
    stage, ended = CASES[name](folder), Ended()
    teachers = [tiny.model(layers=4, hidden=64, seed=5) for _ in stage.teachers]
    work = folder / name
    work.mkdir(parents=True, exist_ok=True)
    trainer = fitting.Trainer(accelerator="cpu", precision=32, checkpoint_seconds=seconds, processes=None)
    start = tiny.model(dropout=0.0)
    tiny.plan(stage, start, teachers)
    fitted = fitting.run(
        stage,
        start,
        data(folder),
        teachers,
        seed=1,
        trainer=trainer,
        work=work,
        callbacks=[Watch(ended.terms), *deaths],
    )
    ended.weights, ended.steps = tiny.weights(fitted.model), fitted.steps
    ended.structure = repr(building.outline(fitted.model))
    return ended


def killed(folder: Path) -> None:
    """The first half of a run, with a checkpoint at every step."""
    try:
        run("finetune", folder, tiny.Kill(KILLED_AT), seconds=0)
    except tiny.KilledError:
        return
    raise AssertionError("it was to die")


def told() -> list[str]:
    """What a process is told of the mistakes of process 0, of the last one, and of its own alone."""

    def refuse(which: int) -> None:
        if ranks.rank() == which:
            raise UserError(f"key: refused by {which}")

    found = []
    for action in (
        lambda: ranks.from_main(lambda: refuse(0)),
        lambda: ranks.together(lambda: refuse(0)),
        lambda: ranks.together(lambda: refuse(ranks.world() - 1)),
        lambda: ranks.agree(f"key: refused by {ranks.rank()}"),
    ):
        try:
            action()
            found.append("nothing")
        except SharedError as error:
            found.append(str(error))
    return [*found, str(ranks.from_main(ranks.rank)), str(ranks.together(ranks.rank))]


def main(folder: Path, names: list[str]) -> None:
    """These cases in all processes, or with none named all that there is; process 0 keeps what they came to."""
    torch.set_num_threads(1)
    ranks.start()
    ended = {name: run(name, folder) for name in names or CASES}
    if not names:
        killed(folder / "broken by several")
        ended["resumed"] = run("finetune", folder / "broken by one")
        torch.save(told(), folder / f"told{ranks.rank()}.pt")
    if ranks.is_main():
        torch.save({name: vars(one) for name, one in ended.items()}, folder / "ended.pt")
    ranks.finish()


def kept(folder: Path) -> dict[str, Ended]:
    """The results that all processes kept."""
    return {name: Ended(**found) for name, found in torch.load(folder / "ended.pt").items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
