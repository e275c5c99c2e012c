"""The grid of layers that another device times: written, timed without torch, read as a table; or a line why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import studies
import tiny
from bundles import bare, exported, mistake, saved

from edgemin.encoder import quantized
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.measure import layer_grid, layer_latency
from edgemin.measure.layer_latency import FULL, NARROW, SINGLE, shapes, widest
from edgemin.store.artifacts import Store
from edgemin.study.latency_tables import with_latency
from edgemin.study.plan import build
from edgemin.study.reading import read_study
from edgemin.study.starts import read_starts

SHAPE = tiny.outline("bert", 3, 32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tiny.model(layers=2, heads=2), tmp_path / "source")


def words(source: Path, out: Path, *more: str) -> list[str]:
    return [f"artifact={source}", f"out={out}", *more]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_grid_is_timed_where_there_is_no_torch_and_read_as_a_table(
    runtime: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(runtime)
    monkeypatch.setattr(layer_latency, "_SHARES", (1.0, 0.5))
    out = tmp_path / "grid"
    assert exported(*words(source, out, f"deploy={runtime}", "grid=int8")) == 0
    said = json.loads((out / layer_grid.GRID).read_text())
    assert set(said["models"]) == {FULL, SINGLE, NARROW, "1 heads", "24 FFN units", "8 FFN units"}
    without = ("torch", "edgemin", "transformers", "tokenizers")
    bare(out, ["bench.py", "threads=1", "rounds=2", "runs=2"], without, tmp_path / "site")
    outline = widest(quantized.outline(tiny.model(layers=2, heads=2)))
    found = layer_grid.read(out / layer_grid.TIMED, outline, runtime, "int8", 128)
    assert (found.runtime, found.precision, found.threads) == (runtime, "int8", 1)
    assert set(found.heads_ms) == {1, 2} and set(found.ffn_ms) == {8, 24, 48}


def timed(path: Path, outline: Outline, **other: Any) -> Path:
    rounds = {name: [float(number)] for number, name in enumerate(shapes(outline), start=10)}
    told = {"runtime": "openvino", "precision": "int8", "length": 128, "threads": 2, "device": "a phone"}
    told |= {"shape": layer_grid._shape(outline), "rounds": rounds} | other
    path.write_text(json.dumps(told))
    return path


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"runtime": "onnxruntime"}, "expected latencies of runtime openvino, given [^\n]*, which has onnxruntime$"),
        ({"precision": "fp32"}, "expected latencies of precision int8, given [^\n]*, which has fp32$"),
        ({"length": 64}, "expected latencies of length 128, given [^\n]*, which has 64$"),
        ({"shape": {}}, "expected latencies of shape the student's, given [^\n]*, which has another$"),
        ({"rounds": {FULL: [1.0]}}, "expected as many rounds of every model of the grid"),
        ({"rounds": 3}, "expected a file latencies.json that bench.py of a grid bundle wrote, given"),
        ({"threads": None}, "expected a file latencies.json that"),
    ],
)
def test_timings_of_something_else_are_refused(other: dict[str, Any], line: str, tmp_path: Path) -> None:
    path = timed(tmp_path / layer_grid.TIMED, SHAPE, **other)
    with pytest.raises(UserError, match=f"^{line}"):
        layer_grid.read(path, SHAPE, "openvino", "int8", 128)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^expected a file latencies\.json"):
        layer_grid.read(tmp_path / "none.json", SHAPE, "openvino", "int8", 128)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            ("deploy=transformers", "grid=int8"),
            "deploy: expected onnxruntime, openvino or openvino_bf16 with grid=int8, given transf",
        ),
        (("deploy=openvino", "grid=int8", "texts=a.csv"), "texts: expected none with grid=int8, whose weights are"),
        (
            ("deploy=openvino", "grid=int8", "length=513"),
            "length: expected a whole number from 2 to 512, what the model",
        ),
        (("deploy=openvino", "grid=int8", "length=0"), "length: expected a whole number from 2 to 512, what the model"),
        (("deploy=openvino", "grid=int3"), "grid: expected a precision (fp32, int8 or int4), given int3"),
    ],
)
def test_a_grid_that_cannot_be_is_one_line(
    more: tuple[str, ...], line: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mistake(words(source, tmp_path / "grid", *more), capsys).startswith(line)


def test_a_study_reads_the_table_of_another_device_in_the_place_of_measuring(tmp_path: Path) -> None:
    target = ("prune=heads_ffn", "prune.target.measure=latency_ms", "prune.target.factor=0.7")
    file = f"prune.target.table={tmp_path / layer_grid.TIMED}"
    study = read_study(studies.settings("stages=[finetune,prune]", *target, file))
    outline = widest(read_starts(study.roots, study.splits)["student"].outline)
    timed(tmp_path / layer_grid.TIMED, outline)
    found, notes = with_latency(study, build(study), Store(tmp_path / "store"), None, measured=False)
    assert found.latency is not None and found.latency.device == "a phone" and not notes
    timed(tmp_path / layer_grid.TIMED, outline, precision="int4")
    with pytest.raises(UserError, match=r"^prune\.target\.table: expected latencies of precision int8[^\n]*$"):
        with_latency(study, build(study), Store(tmp_path / "store"), None, measured=False)
