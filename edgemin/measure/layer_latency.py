"""What a layer costs by the heads and the neurons that it keeps, measured in the runtime that will serve the model.

Whole models are timed, each with the same width in all of its layers, in turns in one measurement; a layer's cost is
the difference divided by their number. So a layer is timed between its neighbours, as it will be served, and what
lies outside the layers drops out.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from edgemin import artifact
from edgemin.deploy import model_files
from edgemin.deploy.runtime import ARTIFACT, RUNTIMES
from edgemin.encoder import building
from edgemin.encoder.operations import operations
from edgemin.encoder.outline import Outline
from edgemin.measure.machine import available_cores, host
from edgemin.measure.runtime import BESIDE, Measure, Variant, measure
from edgemin.quantization import model as quantization
from edgemin.quantization.settings import Quantization
from edgemin.training.latency import LatencyTable, Precision

SETTINGS: dict[Precision, Quantization | None] = {
    "fp32": None,
    "int8": Quantization(weight_range="minmax"),
    "int4": Quantization(bits=4, granularity="group", activations="none", weight_range="minmax"),
}
"""How a model is quantized for timing. Its numbers are random: how long integers take does not depend on them."""
FULL, SINGLE, NARROW = "full", "single layer", "narrowest"
_SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)
_MULTIPLE = 8
_MOST_HEADS = 6  # at most this many head counts are timed, evenly spaced
_ROWS = 1024  # of word embeddings: a look-up takes as long among many rows, but exporting them takes longer
_CALIBRATION = 4  # random sentences that choose the ranges of activations


def head_counts(outline: Outline) -> list[int]:
    """The head counts that are timed, ascending: all where there are at most six, else six evenly spaced."""
    heads = outline.layers[0].heads
    assert heads is not None, "the shape is known"
    return sorted({round(count) for count in np.linspace(1, heads, min(heads, _MOST_HEADS))})


def ffn_widths(outline: Outline) -> list[int]:
    """The widths that are timed, ascending: shares of the whole, and next to nothing, in multiples of 8."""
    units, stacked = outline.layers[0].ffn, outline.layers[0].networks > 1
    assert units is not None, "the shape is known"
    if stacked:  # no unit of it can go
        return [units]
    step = _MULTIPLE if units >= _MULTIPLE * len(_SHARES) else 1
    return sorted({max(step, int(units * share) // step * step) for share in _SHARES} | {step, units})


def widest(outline: Outline) -> Outline:
    """The shape that a model's layers are timed in: all as wide as the widest, in full precision, with few words.

    The position embeddings are as they are, since they say how long an input may be.
    """
    assert outline.vocabulary is not None, "a model that starts is known"
    heads, ffn = (max(getattr(layer, key) for layer in outline.layers) for key in ("heads", "ffn"))
    layers = tuple(replace(layer, heads=heads, ffn=ffn) for layer in outline.layers)
    words = min(outline.vocabulary, _ROWS)
    return replace(outline.with_labels(2), layers=layers, vocabulary=words, quantized=None, tokenizer=None)


def shapes(outline: Outline) -> dict[str, Outline]:
    """The models that are timed, by name: the whole, a single layer of it, each width in all layers, the narrowest."""
    layers = len(outline.layers)
    found = {FULL: outline}
    if layers > 1:
        found[SINGLE] = outline.with_layers(1)
    found |= {_heads(count): outline.with_heads([count] * layers) for count in head_counts(outline)[:-1]}
    found |= {_ffn(units): outline.with_ffn([units] * layers) for units in ffn_widths(outline)[:-1]}
    fewest = head_counts(outline)[0], ffn_widths(outline)[0]
    if _heads(fewest[0]) in found and _ffn(fewest[1]) in found:
        found[NARROW] = outline.with_heads([fewest[0]] * layers).with_ffn([fewest[1]] * layers)
    return found


class Timed(NamedTuple):
    """A table of latencies, and how far its timings can be trusted.

    Attributes:
        table: the costs, smoothed so that they never fall as a layer keeps more.
        alone: whether nothing else ran beside.
        unstable: shapes whose rounds differ by more than `max_spread` from one another.
        shapes: how many were timed.
    """

    table: LatencyTable
    alone: bool
    unstable: int
    shapes: int


def latency_table(
    config: PretrainedConfig,
    outline: Outline,
    runtime: str,
    precision: Precision,
    settings: Measure,
    *,
    progress: Callable[[int, int, str], None] | None = None,
    waiting: Callable[[str], None] | None = None,
    lock_directory: Path | None = None,
) -> Timed:
    """Time a model's layers at each width; what its weights are does not matter.

    Args:
        config: that of the model to be pruned.
        outline: its shape, all layers alike, as `widest` gives it.
        runtime: that in which it will be served.
        precision: likewise.
        settings: how to measure: length, threads, rounds.
        progress: called after each step with (steps done, steps in all, what was done).
        waiting: called once with a line if something else uses the machine.
        lock_directory: of the machine's lock, if not the usual one.

    Raises:
        UserError: the runtime is not installed, or the model cannot be exported.
    """
    asked = shapes(outline)
    with tempfile.TemporaryDirectory() as directory:
        variants = {}
        for number, (name, shape) in enumerate(asked.items(), start=1):
            path = Path(directory) / str(number)
            path.mkdir()
            write(config, shape, runtime, precision, path)
            assert shape.vocabulary is not None
            variants[name] = Variant(runtime, path, shape.vocabulary, None, shape.max_tokens)
            if progress is not None:
                progress(number, len(asked), f"exporting {name}")
        found = measure(variants, [], settings, progress=progress, waiting=waiting, lock_directory=lock_directory)
    table = assembled(
        outline,
        {name: found[name]["latency_ms"]["padded"]["rounds"] for name in variants},
        runtime=runtime,
        precision=precision,
        threads=settings.threads or available_cores(),
        device=host()["cpu"],
    )
    unstable = sum(found[name]["latency_ms"]["padded"]["unstable"] for name in variants)
    return Timed(table, not any(BESIDE in one for one in found.values()), unstable, len(variants))


def assembled(
    outline: Outline, rounds: Mapping[str, list[float]], *, runtime: str, precision: str, threads: int, device: str
) -> LatencyTable:
    r"""The costs of parts, from the medians of rounds of whole models.

    With t(x) the latency of the model whose L layers all have the width x, formed as the median over rounds of its
    ratio to the full model's, times that one's median, a layer's attention with h heads costs

    $$ a(h) = a(A) + (t(h) - t(A)) / L $$

    and its feed-forward network likewise; a(A) + f(I) = (t(full) - t(one layer)) / (L - 1), divided by operations. What
    the narrowest heads and the narrowest network save together is less than the sum: the difference is `joint_ms`.
    """
    layers = len(outline.layers)
    whole = statistics.median(rounds[FULL])

    def ms(name: str) -> float:
        ratios = [mine / full for mine, full in zip(rounds[name], rounds[FULL], strict=True)]
        return whole * statistics.median(ratios)

    each = (whole - ms(SINGLE)) / (layers - 1) if layers > 1 else whole
    without = outline.with_heads([0] * layers)
    attention = each * (1 - operations(without)["macs"] / operations(outline)["macs"])
    *fewer, most = head_counts(outline)
    *narrower, widest = ffn_widths(outline)
    heads = {count: attention + (ms(_heads(count)) - whole) / layers for count in fewer}
    ffn = {units: each - attention + (ms(_ffn(units)) - whole) / layers for units in narrower}
    joint = 0.0
    if NARROW in rounds:
        less = ms(NARROW) - ms(_heads(fewer[0])) - ms(_ffn(narrower[0])) + whole
        joint = max(less, 0.0) / layers / ((1 - fewer[0] / most) * (1 - narrower[0] / widest))
    return LatencyTable(
        heads_ms=_rising({**heads, most: attention}),
        ffn_ms=_rising({**ffn, widest: each - attention}),
        rest_ms=whole - layers * each,
        runtime=runtime,
        precision=precision,
        threads=threads,
        device=device,
        family=outline.family,
        hidden=outline.hidden,
        joint_ms=joint,
    )


def _rising(costs: Mapping[int, float]) -> dict[int, float]:
    """The costs nearest to these that never fall as more is kept: noise alone makes fewer units slower."""
    widths = sorted(costs)
    fitted = isotonic_regression([costs[width] for width in widths]).x
    return dict(zip(widths, map(float, fitted), strict=True))


def _heads(count: int) -> str:
    return f"{count} heads"


def _ffn(units: int) -> str:
    return f"{units} FFN units"


def write(
    config: PretrainedConfig,
    outline: Outline,
    runtime: str,
    precision: Precision,
    path: Path,
    length: int | None = None,
) -> None:
    """Write a model of random weights in a runtime's format, quantized as it will be served.

    Args:
        config: that of the model to be pruned.
        outline: the shape to write.
        runtime: the runtime that will open it.
        precision: that in which it will be served.
        path: an empty directory.
        length: fixed length of all inputs; `None`: any.
    """
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.pad_token_id = 0  # its own may be none of the few words
    model: PreTrainedModel = building.build(config, outline).eval()
    how = SETTINGS[precision]
    if how is not None:
        quantization.quantize(model, how.specs(building.outline(model).matrices), how.weight_range, how.calibration)
        if quantization.needs_ranges(model):
            quantization.fit_inputs(model, _sentences(outline))
    if RUNTIMES[runtime].form == ARTIFACT:
        artifact.save(path, model, None, {})
    else:
        model_files.write(model, runtime, path, length=length)


def _sentences(outline: Outline) -> list[dict[str, Tensor]]:
    assert outline.vocabulary is not None
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(outline.vocabulary, (_CALIBRATION, 32), generator=draw)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}]
