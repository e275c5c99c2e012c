"""Tiny models, the toy task and one training run, for the tests of what is built on them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from edgemin import config, toy
from edgemin.data.module import DataModule
from edgemin.data.splits import load
from edgemin.data.task import Task
from edgemin.encoder import building, quantized, shapes, taps
from edgemin.encoder.outline import Bottleneck, LayerOutline, Outline
from edgemin.store.cache import Cache
from edgemin.tasks.base import Kind
from edgemin.training import fitting
from edgemin.training.stage import Effect, Place, Stage

CONF = Path(__file__).parents[1] / "conf"
FAMILIES = ("bert", "distilbert", "roberta", "modernbert", "mobilebert")
CUTTABLE = FAMILIES[:-1]  # also across FFN units and hidden size
AnyStage = TypeVar("AnyStage", bound=Stage)
TRAINER = {"accelerator": "cpu", "precision": 32}


class KilledError(Exception):
    """Ends a fit in a test as kill -9 would: nothing catches it."""


class Kill(pl.Callback):
    """Ends a fit right after a batch (counted from 1) of a phase, before that batch can be checkpointed."""

    def __init__(self, batch: int, phase: int = 0) -> None:
        self.batch, self.phase = batch, phase

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.phase == self.phase and batch_idx + 1 == self.batch:
            raise KilledError


def model(
    family: str = "bert",
    *,
    layers: int = 3,
    hidden: int = 32,
    heads: int = 4,
    seed: int = 0,
    dropout: float | None = None,
) -> PreTrainedModel:
    """Random weights, large enough for every part to matter, with a trained-looking head for the toy task."""
    config = shapes.configure(
        family, layers=layers, hidden=hidden, heads=heads, intermediate=48, vocabulary=len(toy.vocabulary())
    )
    if dropout is not None:
        for name in [name for name in vars(config) if "dropout" in name and isinstance(getattr(config, name), float)]:
            setattr(config, name, dropout)
    torch.manual_seed(seed)
    made = building.build(config)
    building.attach_head(made, list(toy.LABELS))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    building.silence_padding(made)
    return made.eval()


def stage(cls: type[AnyStage], **settings: Any) -> AnyStage:
    """A stage of flat settings, as a configuration has them."""
    return config.build(cls, settings)


def task(**settings: Any) -> Task:
    """The toy task, 48 training examples."""
    given: dict[str, Any] = {
        "text_columns": ["sentence"],
        "evaluation_splits": ["validation"],
        "labels": list(toy.LABELS),
        "max_length": 24,
        "max_train_examples": 48,
        "max_evaluation_examples": 16,
    }
    return Task(name="toy", **(given | settings))


def data(cache: Path, **settings: Any) -> DataModule:
    """The toy task in tokens."""
    return DataModule(load(task(**settings)), toy.tokenizer(), Cache(cache / "tokens"))


def of_kind(kind: Kind) -> DataModule:
    """What a stage asks the data of a task of this kind for, where nothing is read."""
    return cast(DataModule, SimpleNamespace(kind=kind))


def outline(family: str = "bert", layers: int = 3, hidden: int = 32, heads: int | None = 4) -> Outline:
    """What planning knows of an encoder; `heads` is `None` where it does not know how many are left."""
    width, bottleneck = hidden, None
    if family == "mobilebert":
        width, bottleneck = hidden // 4, Bottleneck(hidden // 4, shared=True, attention=False)
    layer = LayerOutline(heads, width // (heads or 4), 4 * width, bottleneck=bottleneck)
    head = ((hidden, hidden), (hidden, len(toy.LABELS)))
    return Outline(family, hidden, 1000, 512, 2, width, len(toy.LABELS), (layer,) * layers, head=head, max_tokens=512)


#: A small encoder, as planning knows it.
SMALL = outline()


def effect(stage: Stage, given: Outline = SMALL, teachers: Sequence[Outline] | None = None, **place: Any) -> Effect:
    """What a stage does that is given an encoder like this, and teachers like it; with 48 training examples."""
    learnt_from = [given] * len(stage.teachers) if teachers is None else teachers
    stage.planned = stage.effect(given, learnt_from, Place(**{"examples": 48, "texts": 48, **place}))
    return stage.planned


def planned(stage: AnyStage, start: PreTrainedModel | None = None) -> AnyStage:
    """A stage that knows what it is to be given: a small encoder, or one like this."""
    effect(stage, SMALL if start is None else quantized.outline(start))
    return stage


def plan(stage: Stage, start: PreTrainedModel, teachers: Sequence[PreTrainedModel] = (), **place: Any) -> Effect:
    """What a stage does that is given this model."""
    return effect(stage, quantized.outline(start), [quantized.outline(teacher) for teacher in teachers], **place)


def prepared(stage: AnyStage, student: PreTrainedModel, teacher: PreTrainedModel, examples: DataModule) -> AnyStage:
    """A stage that has been given its student and its one teacher."""
    plan(stage, student, [teacher])
    stage.prepare(student, examples, [teacher])
    return stage


def fit(
    stage: Stage,
    start: PreTrainedModel,
    examples: DataModule | None,
    teachers: Sequence[PreTrainedModel] = (),
    *,
    work: Path,
    seed: int = 1,
    seconds: float = 1e9,
    callbacks: Sequence[pl.Callback] = (),
    name: str | None = None,
    inherited: Mapping[str, Tensor] | None = None,
) -> fitting.Fitted:
    """Run a stage on the CPU in fp32."""
    work.mkdir(parents=True, exist_ok=True)
    if not hasattr(stage, "planned"):
        plan(stage, start, teachers)
    trainer = fitting.Trainer(accelerator="cpu", precision=32, checkpoint_seconds=seconds)
    return fitting.run(
        stage,
        start,
        examples,
        teachers,
        seed=seed,
        trainer=trainer,
        work=work,
        callbacks=callbacks,
        name=name,
        inherited=inherited or {},
    )


def logits(of: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The logits of a batch, without dropout or gradients."""
    of.eval()
    with torch.no_grad():
        return taps.logits(of, batch)


def weights(of: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: tensor.clone() for name, tensor in of.state_dict().items()}


def same_weights(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    """Equal to the last bit, name by name."""
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def node(group: str, name: str) -> dict[str, Any]:
    """conf/<group>/<name>.yaml as a run would see it."""
    with initialize_config_dir(str(CONF), version_base="1.3"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing `_self_`.*")  # asked of primary configurations only
        composed = OmegaConf.to_container(compose(f"{group}/{name}")[group])
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}
