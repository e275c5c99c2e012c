"""How far learned scales move from where they were calibrated, and what that does to the error.

    python -m benchmarks.scale_drift --artifact <a fine-tuned model's artifact> --set task=sst2 task.path=<GLUE>

Quantizes the model by `quantize=qat` and `quantize=reconstruct` at several bits, with scales that learn at shares of
the weights' learning rate: 1 (as if they were weights), the default (`auto`) and 0 (frozen). Drift is |s / s0 - 1| over
all scales of Linears' weights, s0 their calibrated values. The error of QAT is the loss on `task.holdout`; that of
reconstruction the squared error of each layer's output, and of the logits, on the calibration sentences kept aside.
Ratios are to the first variant of the same bits and seed.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from benchmarks.rounds import table
from edgemin import artifact, config
from edgemin.data.module import DataModule
from edgemin.data.splits import load
from edgemin.data.task import Task
from edgemin.encoder import quantized
from edgemin.errors import UserError
from edgemin.evaluate import evaluate
from edgemin.quantization.layers import QuantizedLinear
from edgemin.quantization.model import quantized_layers
from edgemin.store.cache import Cache
from edgemin.study.settings import conf_directory
from edgemin.training import fitting
from edgemin.training.fitting import Trainer
from edgemin.training.stage import Place, Stage

METHODS = {"qat": ["quantize.epochs=null", "quantize.steps=200"], "reconstruct": []}
Settings = Mapping[str, Any]


def composed(method: str, overrides: list[str]) -> dict[str, Any]:
    """The configuration of a method, as the command line composes it."""
    with hydra.initialize_config_dir(conf_directory(), version_base="1.3"):
        cfg = hydra.compose("train", [f"quantize={method}", *METHODS[method], *overrides])
    found = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def with_share(node: Settings, share: str) -> dict[str, Any]:
    """The settings of a stage whose scales learn at a share of the weights' rate; 0: not at all."""
    if share == "auto":
        return dict(node)
    if float(share) == 0:
        return {**node, "scales": "fixed"}
    return {**node, "scale_learning_rate": float(share) * node["learning_rate"]}


def trained(node: Settings, model: Any, data: DataModule, seed: int, trainer: Trainer) -> fitting.Fitted:
    """The result of a stage on a copy of a model."""
    stage = config.construct(node, "quantize", Stage)
    outline = quantized.outline(model)
    place = Place(head_trained=True, examples=len(data.train))
    stage.planned = stage.effect(outline, [outline] * len(stage.teachers), place)
    teachers = [copy.deepcopy(model) for _ in stage.teachers]
    with tempfile.TemporaryDirectory() as work:
        return fitting.run(
            stage, copy.deepcopy(model), data, teachers, seed=seed, trainer=trainer, work=Path(work), name="quantize"
        )


def scales(model: Any) -> list[Any]:
    """The scales of all weights of quantized Linears."""
    layers = quantized_layers(model).values()
    return [layer.packed()["weight_scale"].double() for layer in layers if isinstance(layer, QuantizedLinear)]


def drift(start: list[Any], end: list[Any]) -> tuple[float, float]:
    """The mean and the largest |s / s0 - 1|."""
    moved = [(after / before - 1).abs().flatten() for before, after in zip(start, end, strict=True)]
    total = sum(float(each.sum()) for each in moved)
    return total / sum(each.numel() for each in moved), max(float(each.max()) for each in moved)


def errors(fitted: fitting.Fitted, data: DataModule, device: str) -> dict[str, float]:
    """The errors of a result, by name: of blocks, and of the answers on the hold-out."""
    blocks = fitted.findings.get("reconstruction", [])
    found = {str(block["block"]): float(block["after"]) for block in blocks}
    if data.holdout is not None:
        metrics = data.splits.metrics[:1]
        scored = evaluate(fitted.model, data.holdout, data.kind, len(data.labels), metrics, device=device).metrics
        found |= {"hold-out loss": scored["loss"], f"hold-out {metrics[0]}": scored[metrics[0]]}
    return found


def compare(method: str, given: argparse.Namespace) -> None:
    """Print drift and errors of one method at all bits, seeds and shares."""
    settings = composed(method, given.set)
    model, tokenizer = artifact.load(given.artifact)
    if tokenizer is None:
        raise UserError(f"--artifact: expected one with a tokenizer, given {given.artifact}")
    data = DataModule(load(config.construct(settings["task"], "task", Task)), tokenizer, Cache(Path(given.cache)))
    if method == "qat" and data.holdout is None:
        raise UserError("--set: expected task.holdout above 0, on which qat is scored, given 0")
    trainer = config.construct(settings["trainer"], "trainer", Trainer)
    fitting.use_threads(trainer.threads)
    rows: list[list[str]] = []
    ratios: dict[tuple[int, str], list[list[float]]] = {}
    for bits in given.bits:
        node = {**settings["quantize"], "bits": bits}
        for seed in given.seeds if bits == 4 else given.seeds[:1]:
            start = scales(trained({**node, "epochs": None, "steps": 0}, model, data, seed, trainer).model)
            first: dict[str, float] = {}
            for share in given.shares:
                fitted = trained(with_share(node, share), model, data, seed, trainer)
                found = errors(fitted, data, trainer.device)
                first = first or found
                of_first = [found[name] / first[name] if first[name] else math.nan for name in found]
                ratios.setdefault((bits, share), []).append(of_first)
                mean, most = drift(start, scales(fitted.model))
                cells = [f"{value:.4g} ({of:.3f})" for value, of in zip(found.values(), of_first, strict=True)]
                rows.append([str(bits), str(seed), share, f"{mean:.2%}", f"{most:.1%}", *cells])
                print(method, *rows[-1], flush=True)
    print(f"\n{method}, {settings['quantize']['granularity']}: value (ratio to share {given.shares[0]})\n")
    print(table(["bits", "seed", "share", "drift", "largest", *found], rows))
    print("\nratios at several seeds, mean ± standard deviation:")
    for (bits, share), of_seeds in ratios.items():
        if len(of_seeds) > 1:
            spread = [f"{statistics.mean(of):.3f} ± {statistics.stdev(of):.3f}" for of in zip(*of_seeds, strict=True)]
            print(f"{bits} bits, share {share}: " + ", ".join(map(" ".join, zip(found, spread, strict=True))))


def main() -> None:
    """Compare what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", required=True, help="directory of a fine-tuned model in full precision")
    parser.add_argument("--set", nargs="*", default=[], help="settings as of edgemin.train; task.holdout scores QAT")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="all at 4 bits, else the first")
    parser.add_argument("--shares", nargs="+", default=["1", "auto", "0"], help="of the weights' learning rate")
    parser.add_argument("--cache", default=str(Path(tempfile.gettempdir()) / "edgemin_tokens"), help="of token ids")
    given = parser.parse_args()
    for method in given.methods:
        compare(method, given)


if __name__ == "__main__":
    main()
