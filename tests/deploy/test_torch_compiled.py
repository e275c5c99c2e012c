"""Artifacts compiled by torch: the answers of eager torch, what cannot be compiled, rows measured beside eager ones."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import studies
import tiny
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from edgemin import artifact
from edgemin.deploy import torch_compiled
from edgemin.deploy.runtime import Batch, open_model
from edgemin.encoder import quantized, slicing
from edgemin.errors import UserError
from edgemin.measure.runtime import Measure, Variant
from edgemin.quantization import model as quantization
from edgemin.quantization import torch_layers
from edgemin.quantization.settings import Quantization
from edgemin.study import runtimes

SHAPES = ((1, 5), (1, 9), (3, 11), (2, 7))
ASKED = (
    "measure=default",
    "measure.runtimes=[torch,torch_compiled]",
    *("measure.length=16", "measure.warmup=1", "measure.runs=4", "measure.rounds=2", "measure.max_rounds=2"),
    *("measure.sentences=4", "measure.threads=1", "measure.wait_minutes=0"),
)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch traces the model as a whole, and runs what it traced without compiling it: seconds, not a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def batch(sentences: int, tokens: int) -> Batch:
    """A part of a wider array, as a batch of a data set is; padded where there are several sentences."""
    draw = np.random.default_rng(tokens)
    ids, mask = draw.integers(5, 60, (4, 16)), np.ones((4, 16), dtype=np.int64)
    mask[1, 4:] = 0
    return {
        name: values[:sentences, :tokens]
        for name, values in {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}.items()
    }


def saved(path: Path, model: PreTrainedModel) -> Path:
    path.mkdir()
    artifact.save(path, model, None, {})
    return path


def uneven(family: str, how: Quantization | None) -> PreTrainedModel:
    model = tiny.model(family, hidden=64, layers=2)
    if family != "mobilebert":
        slicing.slice_heads(model, 0, [0, 2, 3])
        slicing.slice_ffn(model, 1, range(23))
    if how is not None:
        quantization.quantize(model, how.specs(quantized.outline(model).matrices), how.weight_range, how.calibration)
        if how.activations == "static":
            inputs = {name: torch.from_numpy(values) for name, values in batch(3, 11).items()}
            quantization.fit_inputs(model, [inputs])
    return model


def answers_as_eager_torch(path: Path, tolerance: float) -> None:
    """On batches of several sizes and lengths, by two graphs: one for a single sentence, one for more."""
    counters.clear()
    compiled, eager = open_model("torch_compiled", path, 1), open_model("torch", path, 1)
    for shape in SHAPES:
        expected = eager.answers(batch(*shape))
        assert np.abs(compiled.answers(batch(*shape)) - expected).max() <= tolerance * np.abs(expected).max()
    assert compiled.files() == eager.files()
    compiled.release()
    assert counters["stats"]["unique_graphs"] == 2


CASES = [
    *(pytest.param(family, None, 1e-5, id=family) for family in (*tiny.FAMILIES, "electra")),
    pytest.param("bert", Quantization(), 1e-2, id="int8"),
    pytest.param(
        "bert", Quantization(bits=4, granularity="group", group_size=16, activations="dynamic"), 1e-2, id="int4"
    ),
]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("family", "how", "tolerance"), CASES)
def test_a_model_is_one_graph_whatever_the_length(
    family: str, how: Quantization | None, tolerance: float, tmp_path: Path
) -> None:
    answers_as_eager_torch(saved(tmp_path / "artifact", uneven(family, how)), 1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the C++ compiler takes minutes, more where something else runs
@pytest.mark.parametrize(("family", "how", "tolerance"), CASES)
def test_compiled_code_answers_as_eager_torch(
    family: str, how: Quantization | None, tolerance: float, tmp_path: Path
) -> None:
    answers_as_eager_torch(saved(tmp_path / "artifact", uneven(family, how)), tolerance)


def test_what_cannot_be_compiled_is_told_in_one_line(tmp_path: Path) -> None:
    path = saved(tmp_path / "dynamic", torch_layers.quantize(tiny.model()))  # type: ignore[arg-type]
    with pytest.raises(UserError) as told:
        open_model("torch_compiled", path, 1)
    assert str(told.value).startswith(f"{path}: torch.compile cannot compile it (") and "\n" not in str(told.value)


def test_no_cpp_compiler_is_told_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(UserError, match=r"^runtimes: expected a C\+\+ compiler for torch_compiled \(g\+\+, or"):
        Measure(runtimes=("torch", "torch_compiled"))
    Measure(runtimes=("torch",))


@pytest.mark.usefixtures("traced")
def test_threads_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    opened = torch_compiled.open(saved(tmp_path / "artifact", tiny.model(layers=1)), before + 1)
    assert torch.get_num_threads() == before + 1
    opened.release()
    assert torch.get_num_threads() == before


def scored_alike(row: dict[str, Any]) -> None:
    own, eager = row["cost"]["runtimes"]["torch_compiled"], row["cost"]["runtimes"]["torch"]
    assert own["size_bytes"] == eager["size_bytes"]
    assert own["metrics"]["toy"]["validation"] == pytest.approx(row["metrics"]["toy"]["validation"], abs=1e-4)
    assert own["agreement"] == 1 and own["largest_difference"] < 1e-4


@pytest.mark.usefixtures("traced")
def test_rows_are_scored_and_dynamic_int8_stays_in_eager_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def stand_in(variants: dict[str, Variant], *_given: object, **_named: object) -> dict[str, Any]:
        measured.extend(variants)
        assert len({variant.path for variant in variants.values()}) == 3  # both open the artifact
        return {name: {"latency_ms": {"padded": {"p50": 1.0, "mean": 1.0}}} for name in variants}

    monkeypatch.setattr(runtimes, "measure", stand_in)
    run = studies.run(tmp_path / "run", *ASKED, "stages=[finetune,quantize]", "quantize=dynamic")
    *floats, dynamic = run["rows"]
    for row in floats:
        scored_alike(row)
    assert list(dynamic["cost"]["runtimes"]) == ["torch"]
    assert dynamic["notes"][-1] == "not in torch_compiled: torch's dynamic INT8 runs in torch alone"
    assert measured == [
        *("teacher/finetune (torch)", "teacher/finetune (torch_compiled)"),
        *("student/finetune (torch)", "student/finetune (torch_compiled)", "student/finetune/quantize (torch)"),
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the C++ compiler takes minutes, more where something else runs
def test_compiled_rows_are_measured_beside_eager_ones(tmp_path: Path) -> None:
    run = studies.run(tmp_path / "run", *ASKED, "stages=[finetune,quantize]", "quantize=static")
    for row in run["rows"]:
        scored_alike(row)
        own, eager = row["cost"]["runtimes"]["torch_compiled"], row["cost"]["runtimes"]["torch"]
        assert set(own) - set(eager) == {"metrics", "agreement", "largest_difference"}
        assert own["latency_ms"]["padded"]["n"] == own["latency_ms"]["task"]["n"] == 4
    lines = (tmp_path / "run" / "tables" / "runtimes.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines[1:]] == ["torch", "torch_compiled"] * 3
