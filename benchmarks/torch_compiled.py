"""Where compiled models gain over eager torch: fp32 and static INT8, torch's dynamic INT8 beside them, at batch 1.

    python -m benchmarks.torch_compiled --threads 2

A random BERT of 12 layers, hidden size 384 and 12 heads (`--layers`, `--hidden`), or `--artifact`, a float one. Torch's
dynamic INT8 cannot be compiled, so that it is timed in eager torch alone. Compiling takes minutes before anything is
timed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.nncf_int8 import batches, ratio, static
from benchmarks.rounds import machine, table
from edgemin import artifact
from edgemin.deploy.runtime import open_model
from edgemin.encoder import building, quantized, shapes
from edgemin.measure.runtime import Measure, Variant, measure
from edgemin.measure.worker import padded_input
from edgemin.quantization import torch_layers

REFERENCE = "torch, fp32"


def given(asked: argparse.Namespace) -> PreTrainedModel:
    """A float artifact, or random weights."""
    if asked.artifact is not None:
        return artifact.load(asked.artifact)[0]
    torch.manual_seed(0)
    size = {"hidden": asked.hidden, "heads": asked.hidden // 32, "intermediate": 4 * asked.hidden}
    model = building.build(shapes.configure("bert", layers=asked.layers, vocabulary=30522, **size))
    building.attach_head(model, ["negative", "positive"])
    model.eval()
    return model


def written(model: PreTrainedModel, root: Path) -> dict[str, Variant]:
    """All variants: three artifacts, two of which are opened in both runtimes."""
    vocabulary = quantized.outline(model).vocabulary
    assert vocabulary is not None, "the model is here"
    dynamic = cast(PreTrainedModel, torch_layers.quantize(copy.deepcopy(model)))
    models = {"fp32": model, "static INT8": static(model, batches(vocabulary)), "dynamic INT8": dynamic}
    found: dict[str, Variant] = {}
    for name, one in models.items():
        path = root / str(len(found))
        path.mkdir()
        artifact.save(path, one, None, {})
        for runtime in ("torch",) if one is dynamic else ("torch", "torch_compiled"):
            found[f"{runtime}, {name}"] = Variant(runtime, path, vocabulary)
    return found


def check(variants: dict[str, Variant], length: int, threads: int) -> None:
    """Both runtimes must answer alike; what inductor compiles here it finds again in the processes that are timed."""
    for name, variant in variants.items():
        if variant.runtime == "torch_compiled":
            both = [open_model(runtime, variant.path, threads) for runtime in ("torch", "torch_compiled")]
            one, other = (opened.answers(padded_input(variant.vocabulary, length)) for opened in both)
            assert np.abs(one - other).max() < 2e-2 * np.abs(one).max(), f"{name}: {one} in torch, compiled {other}"
            both[1].release()


def main() -> None:
    """Write the variants, time them in turns in processes of their own, and print the table."""
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--threads", type=int, default=2, help="of each inference")
    options.add_argument("--rounds", type=int, default=15, help="in each of which every variant is timed")
    options.add_argument("--runs", type=int, default=20, help="timed inferences of each variant in a round")
    options.add_argument("--length", type=int, default=128, help="tokens")
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--hidden", type=int, default=384, help="width, in heads of 32")
    options.add_argument("--artifact", type=Path, help="a float model, instead of random weights")
    asked = options.parse_args()
    settings = Measure(
        runtimes=("torch", "torch_compiled"),
        length=asked.length,
        rounds=asked.rounds,
        runs=asked.runs * asked.rounds,
        threads=asked.threads,
    )
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as directory:
        variants = written(given(asked), Path(directory))
        check(variants, asked.length, asked.threads)
        found = measure(variants, [], settings)
    rounds = {name: found[name]["latency_ms"]["padded"]["rounds"] for name in variants}
    rows = [
        [
            name,
            f"{statistics.median(times):.1f}",
            ratio(times, rounds[REFERENCE]),
            f"{sum(found[name]['cold_start_ms'].values()) / 1000:.1f}",
        ]
        for name, times in rounds.items()
    ]
    print(machine(), end="\n\n")
    print(table([f"1 x {asked.length}", "p50, ms", "of torch's fp32 (p10-p90)", "cold start, s (cache filled)"], rows))


if __name__ == "__main__":
    main()
