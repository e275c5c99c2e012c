"""What a layer costs by the heads and the neurons that it keeps, measured in the runtime that will serve the model.

Whole models are timed, each with the same width in all of its layers, in turns in one measurement; a layer's cost is
the difference divided by their number. So a layer is timed between its neighbours, as it will be served, and what
lies outside the layers drops out.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor
from transformers import PreTrainedModel

from edgemin import artifact
from edgemin.deploy import model_files
from edgemin.deploy.runtime import ARTIFACT, RUNTIMES
from edgemin.encoder import building, slicing
from edgemin.encoder.operations import operations
from edgemin.encoder.outline import Outline
from edgemin.measure.machine import available_cores
from edgemin.measure.runtime import Measure, Variant, measure
from edgemin.quantization import model as quantization
from edgemin.quantization.settings import Quantization
from edgemin.training.latency import LatencyTable

Precision = Literal["fp32", "int8", "int4"]
SETTINGS: dict[Precision, Quantization | None] = {
    "fp32": None,
    "int8": Quantization(weight_range="minmax"),
    "int4": Quantization(bits=4, granularity="group", activations="none", weight_range="minmax"),
}
"""How a model is quantized for timing. Its numbers are random: how long integers take does not depend on them."""
FULL, SINGLE = "full", "single layer"
_SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
_MULTIPLE = 8
_MOST_HEADS = 12  # head counts that are timed one by one; of more, as many, evenly spaced
_CALIBRATION = 4


def head_counts(heads: int) -> list[int]:
    """The head counts that are timed, ascending: all of up to twelve."""
    return sorted({round(count) for count in np.linspace(1, heads, min(heads, _MOST_HEADS))})


def ffn_widths(units: int) -> list[int]:
    """The widths that are timed, ascending: eighths of the whole, in multiples of 8 where that leaves any."""
    step = _MULTIPLE if units >= _MULTIPLE * len(_SHARES) else 1
    return sorted({max(step, int(units * share) // step * step) for share in _SHARES} | {units})


def latency_table(
    model: PreTrainedModel,
    runtime: str,
    precision: Precision,
    settings: Measure,
    *,
    progress: Callable[[int, int, str], None] | None = None,
    lock_directory: Path | None = None,
) -> LatencyTable:
    """Time a model's layers at each width.

    Args:
        model: of the shape that is to be pruned, all layers alike, on the CPU; its weights do not matter.
        runtime: in which it will be served.
        precision: in which it will be served.
        settings: how to measure: length, threads, rounds.
        progress: called after each step with (steps done, steps in all, what was done).
        lock_directory: of the machine's lock, if not the usual one.

    Returns:
        Costs that never fall as a layer keeps more, from single timings that may.

    Raises:
        UserError: the runtime is not installed, or the model cannot be exported.
    """
    outline = building.outline(model)
    with tempfile.TemporaryDirectory() as directory:
        variants = {}
        for name, shape in _shapes(model, outline):
            path = Path(directory) / name.replace(" ", "_")
            path.mkdir()
            _write(shape, runtime, precision, path, outline.vocabulary)
            variants[name] = Variant(runtime, path, outline.vocabulary, None, outline.max_tokens)
            if progress is not None:
                progress(len(variants), 0, f"exporting {name}")
        found = measure(variants, [], settings, progress=progress, lock_directory=lock_directory)
    rounds = {name: found[name]["latency_ms"]["padded"]["rounds"] for name in variants}
    return assembled(
        outline, rounds, runtime=runtime, precision=precision, threads=settings.threads or available_cores()
    )


def assembled(
    outline: Outline, rounds: Mapping[str, list[float]], *, runtime: str, precision: str, threads: int
) -> LatencyTable:
    r"""The costs of parts, from the medians of rounds of whole models.

    With t(x) the latency of the model whose L layers all have the width x, formed as the median over rounds of its
    ratio to the full model's, times that one's median, a layer's attention with h heads costs

    $$ a(h) = a(A) + (t(h) - t(A)) / L $$

    and its feed-forward network likewise; a(A) + f(I) = (t(full) - t(one layer)) / (L - 1), divided by operations.
    """
    layers = len(outline.layers)
    whole = statistics.median(rounds[FULL])

    def ms(name: str) -> float:
        ratios = [mine / full for mine, full in zip(rounds[name], rounds[FULL], strict=True)]
        return whole * statistics.median(ratios)

    each = (whole - ms(SINGLE)) / (layers - 1) if layers > 1 else whole
    first = outline.layers[0]
    assert first.heads is not None
    without = outline.with_heads([0] * layers)
    share = 1 - operations(without)["macs"] / operations(outline)["macs"]
    attention = each * share
    heads = {count: attention + (ms(_heads(count)) - whole) / layers for count in head_counts(first.heads)[:-1]}
    ffn = {units: each - attention + (ms(_ffn(units)) - whole) / layers for units in ffn_widths(first.ffn)[:-1]}
    return LatencyTable(
        heads_ms=_rising({**heads, first.heads: attention}),
        ffn_ms=_rising({**ffn, first.ffn: each - attention}),
        rest_ms=whole - layers * each,
        runtime=runtime,
        precision=precision,
        threads=threads,
    )


def _rising(costs: Mapping[int, float]) -> dict[int, float]:
    """The costs nearest to these that never fall as more is kept: noise alone makes fewer units slower."""
    widths = sorted(costs)
    fitted = isotonic_regression([costs[width] for width in widths]).x
    return dict(zip(widths, map(float, fitted), strict=True))


def _heads(count: int) -> str:
    return f"{count} heads"


def _ffn(units: int) -> str:
    return f"{units} neurons"


def _shapes(model: PreTrainedModel, outline: Outline) -> Iterator[tuple[str, PreTrainedModel]]:
    """The models that are timed, by name, each made when it is asked for."""
    first, layers = outline.layers[0], range(len(outline.layers))
    assert first.heads is not None
    yield FULL, copy.deepcopy(model)
    if len(layers) > 1:
        single = copy.deepcopy(model)
        slicing.slice_layers(single, [0])
        yield SINGLE, single
    for count in head_counts(first.heads)[:-1]:
        narrow = copy.deepcopy(model)
        for index in layers:
            slicing.slice_heads(narrow, index, range(count))
        yield _heads(count), narrow
    for units in ffn_widths(first.ffn)[:-1]:
        narrow = copy.deepcopy(model)
        for index in layers:
            slicing.slice_ffn(narrow, index, range(units))
        yield _ffn(units), narrow


def _write(model: PreTrainedModel, runtime: str, precision: Precision, path: Path, vocabulary: int) -> None:
    how = SETTINGS[precision]
    if how is not None:
        quantization.quantize(model, how.specs(building.outline(model).matrices), how.weight_range, how.calibration)
        if quantization.needs_ranges(model):
            quantization.fit_inputs(model, _sentences(vocabulary))
    if RUNTIMES[runtime].form == ARTIFACT:
        artifact.save(path, model, None, {})
    else:
        model_files.write(model, runtime, path)


def _sentences(vocabulary: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (_CALIBRATION, 32), generator=draw)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}]
