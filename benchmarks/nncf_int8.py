"""EdgeMIN's static INT8 against NNCF's int8 of the same weights, and against torch's two ways, at batch 1.

    python -m benchmarks.nncf_int8 --threads 2

NNCF is no dependency of EdgeMIN: install it beside (`pip install nncf`). A random BERT of 12 layers, hidden size 384
and 12 heads, or `--artifact`, a float one. Both calibrate on the same random tokens, which is enough where speed is
what is compared. NNCF takes its preset for transformers and its defaults.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.rounds import machine, table
from edgemin import artifact
from edgemin.deploy import model_files
from edgemin.encoder import building, quantized, shapes, slicing
from edgemin.measure.runtime import Measure, Variant, measure
from edgemin.quantization import model as quantization
from edgemin.quantization import torch_layers
from edgemin.quantization.settings import Quantization

NNCF = "OpenVINO, INT8 by NNCF"
REFERENCES = ("torch, dynamic INT8", NNCF)
CALIBRATION, TOKENS, RUNS = 64, 128, 20  # sentences and their length; timed inferences of each variant in a round


def nncf() -> Any:
    """The package, or one line that says how to get it."""
    try:
        return importlib.import_module("nncf")
    except ImportError as error:
        sys.exit(f"nncf_int8: expected nncf to be installed (pip install nncf), given none ({error})")


def given(path: Path | None) -> PreTrainedModel:
    """A float artifact, or random weights of the shape that the paper deploys."""
    if path is not None:
        return artifact.load(path)[0]
    torch.manual_seed(0)
    shape = shapes.configure("bert", layers=12, hidden=384, heads=12, intermediate=1536, vocabulary=30522)
    model = building.build(shape)
    building.attach_head(model, ["negative", "positive"])
    model.eval()
    return model


def batches(vocabulary: int) -> list[dict[str, Tensor]]:
    """What both calibrate on, sentence by sentence."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocabulary, (1, TOKENS), generator=draw) for _ in range(CALIBRATION)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "token_type_ids": 0 * x} for x in ids]


def static(model: PreTrainedModel, sentences: Sequence[Mapping[str, Tensor]]) -> PreTrainedModel:
    """A copy, quantized as `quantize=static` does by default."""
    found, how = copy.deepcopy(model), Quantization()
    quantization.quantize(found, how.specs(quantized.outline(found).matrices), how.weight_range, how.calibration)
    quantization.fit_inputs(found, sentences)
    return found


def half_of_heads(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without every other head."""
    found = copy.deepcopy(model)
    for index, layer in enumerate(quantized.outline(found).layers):
        assert layer.heads is not None
        slicing.slice_heads(found, index, range(0, layer.heads, 2))
    return found


def by_nncf(fp32: Path, sentences: Sequence[Mapping[str, Tensor]], out: Path) -> None:
    """Quantize OpenVINO's fp32 file with NNCF."""
    openvino, library = importlib.import_module("openvino"), nncf()
    model = openvino.Core().read_model(fp32 / "model.xml")
    names = [one.any_name for one in model.inputs]
    data = library.Dataset([{name: sentence[name].numpy() for name in names} for sentence in sentences])
    found = library.quantize(model, data, model_type=library.ModelType.TRANSFORMER, subset_size=len(sentences))
    openvino.save_model(found, out / "model.xml", compress_to_fp16=False)


def written(model: PreTrainedModel, root: Path) -> dict[str, Variant]:
    """All variants, each in a directory of its own."""
    vocabulary = quantized.outline(model).vocabulary
    assert vocabulary is not None, "the model is here"
    sentences = batches(vocabulary)
    found: dict[str, Variant] = {}

    def place(name: str, runtime: str) -> Path:
        path = root / str(len(found))
        path.mkdir()
        found[name] = Variant(runtime, path, vocabulary)
        return path

    artifact.save(place("torch, fp32", "torch"), model, None, {})
    dynamic = cast(PreTrainedModel, torch_layers.quantize(copy.deepcopy(model)))
    artifact.save(place(REFERENCES[0], "torch"), dynamic, None, {})
    model_files.write(model, "openvino", place("OpenVINO, fp32", "openvino"))
    by_nncf(found["OpenVINO, fp32"].path, sentences, place(NNCF, "openvino"))
    for ending, pruned in (("", model), (", half of the heads", half_of_heads(model))):
        rounded = static(pruned, sentences)
        for title, runtime in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino")):
            model_files.write(rounded, runtime, place(f"{title}, INT8{ending}", runtime))
    return found


def ratio(times: Sequence[float], to: Sequence[float]) -> str:
    """Median, and p10 to p90, of the ratios of rounds."""
    low, middle, high = np.percentile([a / b for a, b in zip(times, to, strict=True)], (10, 50, 90))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    """Write the variants, time them in turns in processes of their own, and print the table."""
    options = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    options.add_argument("--threads", type=int, default=2, help="of each inference")
    options.add_argument("--rounds", type=int, default=15, help="in each of which every variant is timed")
    options.add_argument("--artifact", type=Path, help="a float model, instead of random weights")
    asked = options.parse_args()
    nncf()
    torch.set_num_threads(asked.threads)
    settings = Measure(
        runtimes=("torch", "onnxruntime", "openvino"),
        length=TOKENS,
        rounds=asked.rounds,
        runs=RUNS * asked.rounds,
        threads=asked.threads,
    )
    with tempfile.TemporaryDirectory() as directory:
        variants = written(given(asked.artifact), Path(directory))
        found = measure(variants, [], settings)
    rounds = {name: found[name]["latency_ms"]["padded"]["rounds"] for name in variants}
    rows = [
        [name, f"{statistics.median(times):.1f}", *(ratio(times, rounds[reference]) for reference in REFERENCES)]
        for name, times in rounds.items()
    ]
    print(machine(), end="\n\n")
    print(table(["1 x 128", "p50, ms", "of torch's dynamic INT8 (p10-p90)", "of NNCF (p10-p90)"], rows))


if __name__ == "__main__":
    main()
