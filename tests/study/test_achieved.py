"""The latency that was asked for beside the one that was measured, where both are of the same runtime and precision."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import tiny

from edgemin.encoder import building
from edgemin.quantization import model as quantization
from edgemin.quantization import torch_layers
from edgemin.quantization.settings import Quantization
from edgemin.study import achieved

TARGET = {"runtime": "openvino", "precision": "int8", "threads": 2, "asked": 4.0, "predicted": 3.95}


def costs(threads: int = 2, **more: Any) -> Mapping[str, Any]:
    return {"openvino": {"threads": threads, "latency_ms": {"padded": {"p50": 4.2}}, **more}, "torch": {}}


def test_a_row_has_both_in_a_note_and_in_numbers() -> None:
    found = achieved.beside(TARGET, costs())
    assert found is not None
    note, numbers = found
    assert note == "latency in openvino, int8: 4.20 ms measured, 4.00 asked (+5.0 %), 3.95 predicted"
    assert (numbers["asked_ms"], numbers["predicted_ms"], numbers["measured_ms"]) == (4.0, 3.95, 4.2)


def test_nothing_is_said_of_what_was_not_measured_so() -> None:
    assert achieved.beside(TARGET, costs(threads=1)) is None
    assert achieved.beside({**TARGET, "runtime": "onnxruntime"}, costs()) is None
    assert achieved.beside({**TARGET, "runtime": "torch"}, costs()) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "int8"),
        ({"bits": 4, "granularity": "group", "group_size": 8, "activations": "none"}, "int4"),
        ({"bits": 4}, None),
        ({"bits": 8, "activations": "none"}, None),
        ({"bits": 32, "embedding_bits": 8, "activations": "none"}, None),
    ],
)
def test_the_precision_of_a_quantized_model(settings: Mapping[str, Any], expected: str | None) -> None:
    model, how = tiny.model(), Quantization(weight_range="minmax", **settings)
    assert achieved.precision(model) == "fp32"
    made = copy.deepcopy(model)
    quantization.quantize(made, how.specs(building.outline(made).matrices), how.weight_range, how.calibration)
    assert achieved.precision(made) == expected


def test_torchs_dynamic_int8_is_not_full_precision() -> None:
    assert achieved.precision(torch_layers.quantize(tiny.model())) is None
