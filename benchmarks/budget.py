"""What pruning to a latency comes to: asked, predicted by the table of layers, measured end to end; and what it costs.

    python -m benchmarks.budget --source <directory of a fine-tuned checkpoint> --threads 2

Heads and FFN units of the checkpoint, or of a random BERT of 6 layers and hidden size 384, are pruned to each factor of
its own latency by `criterion`, without fine-tuning, quantized to static INT8 and timed in OpenVINO, in turns with the
whole model: the ratio to that one is formed inside a round. Then what importance, table and search took for one factor
and for all of them. Importance is found on random tokens: how long that takes does not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from benchmarks.nncf_int8 import TOKENS, batches, static
from benchmarks.rounds import machine, table
from edgemin.checkpoint import load_checkpoint, read_facts
from edgemin.deploy import model_files
from edgemin.encoder import building, quantized, shapes
from edgemin.measure.layer_latency import latency_table, widest
from edgemin.measure.runtime import Measure, Variant, measure
from edgemin.pruning.by_target import ByTarget
from edgemin.pruning.criteria.base import Given
from edgemin.pruning.criteria.table import find
from edgemin.pruning.selection import others
from edgemin.pruning.several import Several
from edgemin.pruning.shares import structures
from edgemin.pruning.target import Target
from edgemin.training.latency import LatencyTable

RUNTIME, WHOLE = "openvino", "whole"


class Pruned(NamedTuple):
    """A model at one factor: what was asked and what the table says, in ms, and how long the search took."""

    model: PreTrainedModel
    asked: float
    predicted: float
    seconds: float


def given(source: str | None) -> PreTrainedModel:
    """A checkpoint, or random weights."""
    if source is not None:
        return cast(PreTrainedModel, load_checkpoint(read_facts(source, "--source"), 0).eval())
    torch.manual_seed(0)
    config = shapes.configure("bert", layers=6, hidden=384, heads=12, intermediate=1536, vocabulary=30522)
    model = building.build(config)
    building.attach_head(model, ["negative", "positive"])
    return cast(PreTrainedModel, model.eval())


def importance(model: PreTrainedModel, units: Several, name: str, examples: int) -> list[torch.Tensor]:
    """What the criterion finds on so many random sentences."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = quantized.outline(model).vocabulary
    assert vocabulary is not None
    found = []
    for start in range(0, examples, 16):
        ids = torch.randint(vocabulary, (min(16, examples - start), 16), generator=draw)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": 0 * ids}
        found.append({**inputs, "labels": ids[:, 0] % 2})

    def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    criterion = find(name, *(structure.name for structure in units.structures))
    return criterion.scores(Given(model, units, found, losses))


def pruned(
    model: PreTrainedModel, units: Several, name: str, scores: list[torch.Tensor], timed: LatencyTable, factor: float
) -> Pruned:
    """A copy with what the budget leaves."""
    began, outline = time.monotonic(), quantized.outline(model)
    amount = ByTarget(Target(measure="latency_ms", factor=factor), units.structures, 1, "linear")
    amount.after(outline, timed)
    weighed = amount.weighed(find(name, "heads", "ffn"), units.split(model, scores))
    removed = amount.removed(outline, weighed, 0)
    seconds, found = time.monotonic() - began, copy.deepcopy(model)
    keep = units.split(model, others(removed, [len(group) for group in scores]))
    for structure, kept in zip(units.structures, keep, strict=True):
        structure.cut(found, kept)
    return Pruned(found, factor * timed.ms(outline), timed.ms(quantized.outline(found)), seconds)


def rounds_of(models: dict[str, PreTrainedModel], settings: Measure, root: Path) -> dict[str, list[float]]:
    """The medians of the rounds of each model, quantized."""
    variants = {}
    for name, model in models.items():
        vocabulary = quantized.outline(model).vocabulary
        assert vocabulary is not None
        path = root / name
        path.mkdir()
        model_files.write(static(model, batches(vocabulary)), RUNTIME, path)
        variants[name] = Variant(RUNTIME, path, vocabulary)
    found = measure(variants, [], settings)
    return {name: found[name]["latency_ms"]["padded"]["rounds"] for name in variants}


def main() -> None:
    """Measure the table, prune to each factor, time, and print both tables."""
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--source", help="a fine-tuned checkpoint or artifact, instead of random weights")
    options.add_argument("--factors", nargs="+", type=float, default=[0.75, 0.5, 0.35])
    options.add_argument("--criterion", default="fisher", help="for heads and FFN units")
    options.add_argument("--examples", type=int, default=512, help="sentences that importance is found on")
    options.add_argument("--threads", type=int, default=2, help="of each inference")
    options.add_argument("--rounds", type=int, default=9, help="in each of which every model is timed")
    options.add_argument("--runs", type=int, default=20, help="timed inferences of each model in a round")
    asked = options.parse_args()
    settings = Measure(
        runtimes=(RUNTIME,),
        length=TOKENS,
        rounds=asked.rounds,
        runs=asked.runs * asked.rounds,
        max_rounds=max(15, asked.rounds),
        threads=asked.threads,
    )
    torch.set_num_threads(asked.threads)
    model, units = given(asked.source), Several(structures("heads_ffn", None))
    began = time.monotonic()
    shape = widest(quantized.outline(model))
    timed = latency_table(
        model.config, shape, RUNTIME, "int8", Measure(runtimes=(RUNTIME,), threads=asked.threads)
    ).table
    table_seconds = time.monotonic() - began
    began = time.monotonic()
    scores = importance(model, units, asked.criterion, asked.examples)
    importance_seconds = time.monotonic() - began
    found = {str(factor): pruned(model, units, asked.criterion, scores, timed, factor) for factor in asked.factors}
    with tempfile.TemporaryDirectory() as directory:
        models = {WHOLE: model, **{name: one.model for name, one in found.items()}}
        rounds = rounds_of(models, settings, Path(directory))
    rows = []
    for name, one in found.items():
        outline, ms = quantized.outline(one.model), statistics.median(rounds[name])
        ratio = statistics.median(mine / whole for mine, whole in zip(rounds[name], rounds[WHOLE], strict=True))
        kept = f"{[layer.heads for layer in outline.layers]} {[layer.ffn for layer in outline.layers]}"
        rows.append([name, f"{one.asked:.2f}", f"{one.predicted:.2f}", f"{ms:.2f}", f"{ratio:.3f}"])
        rows[-1] += [f"{100 * (ratio / float(name) - 1):+.1f}", kept]
    print(machine(), end="\n\n")
    print(f"whole model: {timed.ms(shape):.2f} ms by the table, {statistics.median(rounds[WHOLE]):.2f} measured\n")
    header = ["factor", "asked, ms", "predicted, ms", "measured, ms", "of the whole", "off by, %", "heads, FFN units"]
    print(table(header, rows), end="\n\n")
    seconds = [each.seconds for each in found.values()]
    first, every = seconds[0], sum(seconds)
    shared = importance_seconds + table_seconds
    print(
        f"importance {importance_seconds:.1f} s, table {table_seconds:.1f} s, search {first:.1f} s for one factor and"
    )
    print(
        f"{every:.1f} s for {len(found)}: in all {(shared + every) / (shared + first):.2f} times as long as one alone"
    )


if __name__ == "__main__":
    main()
