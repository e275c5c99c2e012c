"""Tiny studies for the tests: configurations composed as the command line does it, local data, checkpoints."""

from __future__ import annotations

import copy
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import hydra
import numpy as np
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from safetensors.numpy import load_file

from edgemin import toy
from edgemin.encoder import building, shapes
from edgemin.study.job import run_job
from edgemin.study.nodes import Plan
from edgemin.study.plan import build
from edgemin.study.reading import read_study
from edgemin.study.results import FILE
from edgemin.study.settings import conf_directory, resolved

Settings = dict[str, Any]

# A study whose every stage takes a few steps on a few dozen sentences.
TINY = (
    "task=toy",
    "task.max_train_examples=96",
    "task.max_evaluation_examples=40",
    "teacher=shape",
    "teacher.tokenizer=toy",
    "teacher.layers=2",
    "teacher.hidden=32",
    "teacher.heads=4",
    "teacher.intermediate=48",
    "student=shape",
    "student.layers=2",
    "student.hidden=16",
    "student.heads=4",
    "student.intermediate=24",
    "finetune.epochs=null",
    "finetune.steps=12",
    "finetune.learning_rate=3e-3",
    "distill.steps=2",
    "distill.relation_heads=4",
    "prune.ratio=0.25",
    "prune.epochs=null",
    "prune.steps=2",
    "prune.calibration_examples=16",
    "trainer=cpu",
    "logger=csv",
    "measure=none",
)
GROUPS = {path.name for path in Path(conf_directory()).iterdir() if path.is_dir()}
_LABELS = {
    "sst2": ["negative", "positive"],
    "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"],
}
_COLUMNS = {"sst2": ["sentence"], "qqp": ["question1", "question2"], "mnli": ["premise", "hypothesis"]}
_EVALUATION = {"mnli": ["validation_matched", "validation_mismatched"]}


def compose(*overrides: str) -> Any:
    """The configuration of a command line, with Hydra's own node."""
    with hydra.initialize_config_dir(conf_directory(), version_base="1.3"):
        return hydra.compose("train", list(overrides), return_hydra_config=True)


@cache
def _chosen(choices: tuple[str, ...]) -> DictConfig:
    with hydra.initialize_config_dir(conf_directory(), version_base="1.3"):
        return hydra.compose("train", list(choices))


def settings(*overrides: str, tiny: bool = True) -> Settings:
    """The resolved configuration as `edgemin.train` hands it on; `TINY` comes first unless told otherwise.

    Composing takes Hydra longest: each choice of files is composed once, single values are set in a copy, as Hydra does
    in its last step.
    """
    parsed = OverridesParser.create().parse_overrides([*(TINY if tiny else ()), *overrides])
    files = [entry for entry in parsed if entry.package or entry.key_or_group in GROUPS]
    cfg = copy.deepcopy(_chosen(tuple(str(entry.input_line) for entry in files)))
    for entry in parsed:
        if entry not in files:
            OmegaConf.update(cfg, entry.key_or_group, entry.value(), merge=True, force_add=entry.is_add())
    return resolved(cfg)


def plan(*overrides: str) -> Plan:
    """The plan of a tiny study."""
    return build(read_study(settings(*overrides)))


def run(
    run_dir: Path,
    *overrides: str,
    store: Path | None = None,
    transfer: Mapping[str, Settings] | None = None,
    number: int = 0,
) -> dict[str, Any]:
    """Run a tiny study in this process and return its run.json.

    Args:
        run_dir: of the job; made.
        overrides: after `TINY`.
        store: where results are kept; beside the job where not given.
        transfer: settings of the other tasks to score on.
        number: of the job.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    asked = settings(*overrides, f"paths.store={store or run_dir / 'store'}")
    run_job(asked, job(run_dir, number, overrides), transfer or {})
    found = json.loads((run_dir / FILE).read_text())
    assert isinstance(found, dict)
    return found


def job(run_dir: Path, number: int = 0, overrides: Sequence[str] = ()) -> Settings:
    """What Hydra says of a job."""
    said = {"number": number, "overrides": list(overrides), "run_dir": run_dir, "command": "python -m edgemin.train"}
    return {**said, "experiment": None, "given": {}, "set_by": {}, "group": "main/now"}


def is_installed(distribution: str) -> bool:
    """Whether a package is there, by the name that pip has for it."""
    try:
        return bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


def glue(directory: Path, train: int = 48, evaluation: int = 24) -> Path:
    """Write sst2, mnli and qqp in the layout of the Hub's repository, in the toy task's words."""
    lines = ["---", "configs:"]
    for seed, (name, labels) in enumerate(_LABELS.items()):
        lines += [f"- config_name: {name}", "  data_files:"]
        for number, split in enumerate(["train", *_EVALUATION.get(name, ["validation"])]):
            count = train if split == "train" else evaluation
            texts = toy.generate(2 * count, 100 * seed + number)[0]
            columns = {column: texts[index::2][:count] for index, column in enumerate(_COLUMNS[name])}
            columns |= {"label": [row % len(labels) for row in range(count)], "idx": list(range(count))}
            rows = datasets.Dataset.from_dict(columns).cast_column("label", datasets.ClassLabel(names=labels))
            (directory / name).mkdir(parents=True, exist_ok=True)
            rows.to_parquet(directory / name / f"{split}.parquet")
            lines.append(f"  - {{split: {split}, path: {name}/{split}.parquet}}")
    (directory / "README.md").write_text("\n".join([*lines, "---", ""]))
    return directory


def checkpoint(directory: Path, labels: Sequence[str] | None = None, *, layers: int = 3) -> Path:
    """Write a BERT as the Hub has them: with a trained head for `labels`, or without any head."""
    torch.manual_seed(7)
    config = shapes.configure(
        "bert", layers=layers, hidden=32, heads=4, intermediate=48, vocabulary=len(toy.vocabulary()), padding_id=0
    )
    model = building.build(config)
    if labels is None:
        model.base_model.save_pretrained(directory)
    else:
        building.attach_head(model, labels)
        model.save_pretrained(directory)
    toy.tokenizer().save_pretrained(directory)
    return directory


def tokenizer(directory: Path) -> Path:
    """Write a tokenizer with the toy task's words, two of which have changed places."""
    made = toy.tokenizer()
    made.save_pretrained(directory)
    content = json.loads(made.backend_tokenizer.to_str())
    words = content["model"]["vocab"]
    words["good"], words["bad"] = words["bad"], words["good"]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


def predictions(directory: Path, row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The logits that a job keeps of a row, in single precision, with what its rows share: labels, rows and tokens.

    Args:
        directory: the job's.
        row: of its run.json.
        name: `<task>.<split>`, or `<task>.<split>.<runtime>`.
    """
    shared = load_file(directory / "predictions" / f"examples.{'.'.join(name.split('.')[:2])}.safetensors")
    kept = load_file(directory / row["predictions"] / f"{name}.safetensors")
    return {"logits": kept["logits"].astype(np.float32), **shared}
