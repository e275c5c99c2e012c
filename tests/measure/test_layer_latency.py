"""The table of layer latencies: what whole models come to, and the grid that another device times."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from edgemin import artifact
from edgemin.encoder import building, quantized
from edgemin.encoder.outline import Outline
from edgemin.measure import layer_latency
from edgemin.measure.layer_latency import FULL, SINGLE, assembled, ffn_widths, head_counts, shapes, widest
from edgemin.training.latency import LatencyTable

HEADS = {1: 0.11, 2: 0.2, 3: 0.33, 4: 0.4}
SHAPE = tiny.outline("bert", 3, 32)


def ms(outline: Outline, rest: float = 0.7) -> float:
    """A device on which layers cost what their widths do, by hand."""
    layers = outline.layers
    own = sum(HEADS[layer.heads or 0] + 0.001 * (layer.ffn or 0) ** 1.1 for layer in layers)
    return rest + own + sum(0.04 * (1 - (layer.heads or 0) / 4) * (1 - (layer.ffn or 0) / 128) for layer in layers)


def drifting(times: Mapping[str, float]) -> dict[str, list[float]]:
    """Rounds on a machine that is twice as slow in one of three, for all alike."""
    return {name: [2 * found, found, 1.01 * found] for name, found in times.items()}


def table(rounds: Mapping[str, list[float]]) -> LatencyTable:
    return assembled(SHAPE, rounds, runtime="openvino", precision="int8", threads=1, device="a phone")


def test_the_parts_add_up_to_every_model_that_was_timed_and_to_models_that_were_not() -> None:
    found = table(drifting({name: ms(shape) for name, shape in shapes(SHAPE).items()}))
    whole = ms(SHAPE) * 1.01  # the median round
    for shape in shapes(SHAPE).values():
        assert found.ms(shape) == pytest.approx(1.01 * ms(shape))
    uneven = SHAPE.with_heads([1, 4, 2]).with_ffn([32, 16, 128])
    assert found.ms(uneven) == pytest.approx(1.01 * ms(uneven))
    assert found.ms(SHAPE) == pytest.approx(whole)
    assert LatencyTable.read(json.loads(json.dumps(found.written()))) == found


def test_noise_makes_no_narrower_layer_dearer() -> None:
    times = {name: ms(shape) for name, shape in shapes(SHAPE).items()}
    times["2 heads"], times["32 FFN units"] = 1.05 * times["3 heads"], times[FULL]
    found = table({name: [each] for name, each in times.items()})
    for costs in (found.heads_ms, found.ffn_ms):
        assert [costs[width] for width in sorted(costs)] == sorted(costs.values())


def test_what_is_timed() -> None:
    assert head_counts(SHAPE) == [1, 2, 3, 4]
    assert ffn_widths(SHAPE) == [8, 16, 32, 64, 96, 128]
    assert ffn_widths(SHAPE.with_ffn([24] * 3)) == [1, 3, 6, 12, 18, 24]
    stacked = replace(SHAPE, layers=tuple(replace(layer, networks=2) for layer in SHAPE.layers))
    assert ffn_widths(stacked) == [128], "none of it can go"
    assert head_counts(tiny.outline("bert", 3, 96, 12)) == [1, 3, 5, 8, 10, 12]
    asked = shapes(SHAPE)
    assert list(asked)[:3] == [FULL, SINGLE, "1 heads"] and len(asked) == 2 + 3 + 5 + 1
    assert len(asked[SINGLE].layers) == 1
    assert SINGLE not in shapes(tiny.outline("bert", 1, 32))
    assert widest(SHAPE.with_heads([2, 3, 1]).with_ffn([8, 64, 16])) == SHAPE.with_heads([3] * 3).with_ffn([64] * 3)


def test_models_are_written_in_the_shape_and_precision_that_are_asked_for(tmp_path: Path) -> None:
    model = tiny.model(layers=2)
    shape = widest(building.outline(model)).with_heads([3, 3]).with_ffn([24, 24])
    layer_latency.write(model.config, shape, "torch", "int8", tmp_path)
    found, _ = artifact.load(tmp_path)
    assert [(layer.heads, layer.ffn) for layer in quantized.outline(found).layers] == [(3, 24)] * 2
    summary = quantized.summary(found)
    assert summary is not None and set(summary["bits"].values()) == {8} and summary["activations"] == "static"
