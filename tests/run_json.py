"""Synthetic run.json files for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

PAPER = (
    # name, model, stages, accuracy, bytes, params, visible, flops, padded p50
    ("Teacher", "teacher", ["finetune"], 0.9094, 267_820_040, 66_955_010, 66_955_010, 11_174_000_000, 62.7),
    (
        "Student baseline",
        "student",
        ["finetune"],
        0.9209,
        133_460_000,
        33_360_770,
        33_360_770,
        5_738_000_000,
        40.9,
    ),
    (
        "+ Distillation",
        "student",
        ["finetune", "distill"],
        0.9209,
        133_460_100,
        33_360_770,
        33_360_770,
        5_738_000_000,
        39.4,
    ),
    (
        "+ Head pruning",
        "student",
        ["finetune", "distill", "prune"],
        0.9071,
        128_731_000,
        32_178_818,
        32_178_818,
        5_386_000_000,
        38.1,
    ),
    (
        "Quantized (not pruned)",
        "student",
        ["finetune", "distill", "quantize"],
        0.9002,
        69_437_000,
        33_360_770,
        11_937_024,
        5_738_000_000,
        25.5,
    ),
    (
        "Pruned + quantized",
        "student",
        ["finetune", "distill", "prune", "quantize"],
        0.8980,
        68_252_000,
        32_178_818,
        11_937_024,
        5_386_000_000,
        25.1,
    ),
)
MADE_FROM = {
    "+ Distillation": "Student baseline",
    "+ Head pruning": "+ Distillation",
    "Quantized (not pruned)": "+ Distillation",
    "Pruned + quantized": "+ Head pruning",
}


def row(paper: tuple[Any, ...], task: str, split: str, shift: float, measured: bool) -> dict[str, Any]:
    name, model, stages, accuracy, size, params, visible, flops, p50 = paper
    torch: dict[str, Any] = {"size_bytes": size}
    if measured:
        timing = {"p10": p50 * 0.97, "p50": p50, "p90": p50 * 1.05, "p95": p50 * 1.08, "mean": p50 * 1.01}
        torch["latency_ms"] = {
            "padded": {"length": 128, **timing, "n": 500, "unstable": False},
            "task": {"length": 25.2, **{k: v / 2.2 for k, v in timing.items()}, "n": 500, "unstable": False},
        }
        torch["throughput_per_s"] = {"padded": 1000 / timing["mean"], "task": 2200 / timing["mean"]}
        torch["peak_memory_bytes"] = size + 300_000_000
        torch["energy_mj"] = p50 * 15.0
        torch["power_w"] = 15.0
        torch["energy_source"] = "estimate"
        torch["threads"] = 2
    architecture = {"params": params, "params_visible": visible, "macs": flops // 2, "flops": flops}
    metrics = {"accuracy": accuracy + shift, "f1": accuracy + shift + 0.004, "loss": 0.3, "n": 872}
    return {
        "name": name,
        "model": model,
        "stages": stages,
        "control": False,
        "artifact": f"{'/'.join([model, *stages])}-{task}",
        "made_from": MADE_FROM.get(name),
        "metrics": {task: {split: metrics}},
        "transfer": [],
        "cost": {**architecture, "runtimes": {"torch": torch}},
        "delta": {},
        "predictions": "predictions/0.safetensors",
        "notes": [],
    }


def in_torch(row: dict[str, Any]) -> dict[str, Any]:
    """What a row costs in torch."""
    found: dict[str, Any] = row["cost"]["runtimes"]["torch"]
    return found


def fill_deltas(run: dict[str, Any]) -> None:
    """Ratios as the pipeline forms them, to the first row of each model."""
    task, split = run["task"]["name"], run["task"]["splits"][0]
    for one in run["rows"]:
        for model in ("teacher", "student"):
            reference = next(other for other in run["rows"] if other["model"] == model)
            ours, theirs = in_torch(one), in_torch(reference)
            ratios: dict[str, Any] = {"compression_ratio": theirs["size_bytes"] / ours["size_bytes"]}
            delta: dict[str, Any] = {
                "params_ratio": reference["cost"]["params"] / one["cost"]["params"],
                "flops_ratio": reference["cost"]["flops"] / one["cost"]["flops"],
                "runtimes": {"torch": ratios},
            }
            if one["metrics"]:
                mine = one["metrics"][task][split]["accuracy"]
                other = reference["metrics"][task][split]["accuracy"]
                delta |= {"metric": mine - other, "metric_retained": mine / other}
            if "latency_ms" in ours:
                ratios["speed_up"] = {
                    kind: theirs["latency_ms"][kind]["p50"] / ours["latency_ms"][kind]["p50"]
                    for kind in ("padded", "task")
                }
            one["delta"][model] = delta


def run(
    *,
    task: str = "sst2",
    split: str = "validation",
    seed: int = 42,
    number: int = 0,
    overrides: tuple[str, ...] = (),
    shift: float = 0.0,
    measured: bool = True,
) -> dict[str, Any]:
    """The paper's six rows as one run."""
    rows = [row(paper, task, split, shift, measured) for paper in PAPER]
    for one in rows:  # what a stage is told decides it and what comes after
        told = [override for override in overrides if override.partition(".")[0] in one["stages"]]
        one["artifact"] = "-".join([one["artifact"], str(seed), *told])
    made = {
        "schema": 2,
        "edgemin": "0.1.0",
        "study": "paper",
        "experiment": None,
        "job": {"number": number, "overrides": list(overrides), "command": "python -m edgemin.train"},
        "started": "2026-01-01T10:00:00+00:00",
        "ended": "2026-01-01T11:00:00+00:00",
        "seed": seed,
        "task": {
            "name": task,
            "path": "nyu-mll/glue",
            "labels": ["negative", "positive"],
            "metric": "accuracy",
            "splits": [split],
            "train_examples": 67349,
            "evaluation_examples": {split: 872},
            "max_length": 128,
        },
        "order": {"name": "paper", "stages": ["finetune", "distill", "prune", "quantize"], "ablation": None},
        "config": {"prune": {"ratio": 0.2}, "seed": seed, "task": {"name": task}},
        "host": {"cpu": "Some CPU", "cores": 2, "threads": 2},
        "versions": {"torch": "2.13.0"},
        "precision": "bf16-mixed",
        "device": "cpu",
        "threads": [2],
        "published": None,
        "nodes": [
            {
                "path": "/".join([one["model"], *one["stages"]]),
                "model": one["model"],
                "stages": one["stages"],
                "key": "k",
                "cached": False,
                "seconds": 1.0,
            }
            for one in rows
        ],
        "warnings": [],
        "rows": rows,
    }
    fill_deltas(made)
    return made


def gate(run: dict[str, Any], number: int, *, parent: int, passed: bool, **changes: Any) -> dict[str, Any]:
    """The gate of one row against another, as the pipeline writes it."""
    row, other = run["rows"][number], run["rows"][parent]
    task, split = run["task"]["name"], run["task"]["splits"][0]
    value, theirs = (one["metrics"][task][split]["accuracy"] for one in (row, other))
    worst = ["bert.encoder.layer.1.output.dense", "bert.pooler.dense", "classifier", "bert.embeddings.word_embeddings"]
    return {
        "parent": f"{other['model']}/{'/'.join(other['stages'])}",
        "parent_artifact": other["artifact"],
        "task": task,
        "split": split,
        "metric": "accuracy",
        "parent_value": theirs,
        "value": value,
        "drop": theirs - value,
        "interval": [changes.get("drop", theirs - value) + end for end in (-0.012, 0.013)],
        "max_drop": 0.01,
        "chance": None if passed else 0.001,
        "collapsed": False,
        "agreement": 1 - 41 / 872,
        "flips": 41,
        "examples": 872,
        "passed": passed,
        "worst": [] if passed else [{"layer": name, "damage": 0.4 / 2**place} for place, name in enumerate(worst)],
        **changes,
    }


QUANTIZATION = {"bits": {"classifier": 8}, "activations": "static", "granularity": "channel", "group_size": None}
_MODULES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def sensitivity(layers: int = 12, factor: float = 1.0, budget: float | None = 14.0) -> dict[str, Any]:
    """What a BERT of so many layers could find, its matrices in the order of the forward pass."""
    names = ["bert.embeddings.word_embeddings", "bert.embeddings.position_embeddings"]
    names += [f"bert.encoder.layer.{layer}.{module}" for layer in range(layers) for module in _MODULES]
    names += ["bert.pooler.dense", "classifier"]
    entries = []
    for place, name in enumerate(names):
        wobble = factor * (1 + 0.8 * math.sin(2.4 * place))
        damage = {"8": 2e-6 * wobble, "4": 7e-4 * wobble, "2": 0.09 * wobble}
        bits = 8 if place % 5 == 0 else 2 if place % 7 == 3 else 4
        entries.append({"name": name, "weights": 384 * 384, "damage": damage, "bits": bits})
    return {"examples": 256, "candidates": [8, 4, 2], "budget_mib": budget, "size_mib": 13.7, "layers": entries}


def save(directory: Path, data: dict[str, Any]) -> Path:
    """Write a run.json into the directory that a job would use."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text(json.dumps(data), encoding="utf-8")
    return directory


def with_runtimes(run: dict[str, Any], factors: dict[str, float], rounds: int = 5) -> dict[str, Any]:
    """Adds what further runtimes measured, with everything that may be there: rounds, a grid, a cold start, a profile.

    Args:
        run: the run, which is changed.
        factors: by runtime, its latency as a share of torch's.
        rounds: how many there were.
    """
    for number, one in enumerate(run["rows"]):
        for place, (runtime, factor) in enumerate({"torch": 1.0, **factors}.items()):
            cost = json.loads(json.dumps(in_torch(one)))
            for form, timed in cost["latency_ms"].items():
                for name in ("p10", "p50", "p90", "p95", "mean"):
                    timed[name] *= factor
                wobble = [1 + 0.02 * math.sin(1.7 * turn + number + 2 * place + len(form)) for turn in range(rounds)]
                timed["rounds"] = [timed["p50"] * one for one in wobble]
            p50 = cost["latency_ms"]["padded"]["p50"]
            cost["model_memory_bytes"] = 1.2 * cost["size_bytes"] + 5e6
            cost["energy_mj"] = 15.0 * p50
            cost["cold_start_ms"] = {"load": 200.0 * factor + 10 * number, "first_answer": 2 * p50}
            cost["grid"] = [grid_cell(batch, length, p50) for batch in (1, 8, 32) for length in (16, 32, 64, 128)]
            if runtime == "torch":
                cost["profile"] = profile(number, p50)
            else:
                scores = {name: value - 0.001 for name, value in one["metrics"]["sst2"]["validation"].items()}
                cost |= {"metrics": {"sst2": {"validation": scores}}, "agreement": 0.9977, "largest_difference": 0.0125}
            one["cost"]["runtimes"][runtime] = cost
    for one in run["rows"]:
        for model in ("teacher", "student"):
            other = next(other for other in run["rows"] if other["model"] == model)["cost"]["runtimes"]
            one["delta"][model]["runtimes"] = {
                runtime: {
                    "compression_ratio": other[runtime]["size_bytes"] / cost["size_bytes"],
                    "speed_up": {
                        form: other[runtime]["latency_ms"][form]["p50"] / timed["p50"]
                        for form, timed in cost["latency_ms"].items()
                    },
                }
                for runtime, cost in one["cost"]["runtimes"].items()
            }
    return run


def grid_cell(batch: int, length: int, p50: float) -> dict[str, Any]:
    """The timings of one batch, where one sentence of 128 tokens takes `p50` milliseconds."""
    time = p50 * (length / 128) * batch**0.9
    return {
        "batch": batch,
        "length": length,
        "p10": 0.97 * time,
        "p50": time,
        "p90": 1.04 * time,
        "n": 50,
        "sentences_per_s": 1000 * batch / time,
    }


def profile(number: int, p50: float) -> dict[str, Any]:
    """The costliest operators of a row."""
    names = (
        "aten::addmm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::gelu",
        "aten::native_layer_norm",
    )
    operators = [
        {
            "name": name,
            "self_ms": 0.6 * p50 / 3**place,
            "share": 0.6 / 3**place,
            "memory_bytes": 3_000_000 // (place + 1),
            "calls": 36 // (place + 1),
        }
        for place, name in enumerate(names)
    ]
    return {"trace": f"profile/{number}.json.gz", "operators": operators}


def device(artifact: str, p50: float) -> dict[str, Any]:
    """A device.json, as a bundle's bench.py writes it."""
    cells = [grid_cell(batch, length, p50) for batch in (1, 8) for length in (32, 128)]
    return {
        "schema": 1,
        "artifact": artifact,
        "runtime": "onnxruntime",
        "device": {"name": "pi5", "cpu": "Cortex-A76", "machine": "aarch64", "system": "Linux-6.12"},
        "threads": 4,
        "cold_start_ms": {"import": 300.0, "load_and_first_answer": 900.0},
        "peak_memory_bytes": 150_000_000,
        "latency": [
            {{"p10": "p10_ms", "p50": "p50_ms", "p90": "p90_ms"}.get(key, key): value for key, value in cell.items()}
            for cell in cells
        ],
    }
