"""Rows exported to another runtime, scored and measured there beside torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import studies
from tokenizers import Tokenizer

import edgemin
from edgemin import toy
from edgemin.deploy import bundle, model_files, onnx_runtime
from edgemin.measure.runtime import Measure, Variant
from edgemin.study import runtimes

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ASKED = (
    "measure=default",
    "measure.runtimes=[torch,onnxruntime]",
    *("measure.length=16", "measure.warmup=1", "measure.runs=4", "measure.rounds=2", "measure.max_rounds=2"),
    *("measure.sentences=4", "measure.threads=1", "measure.wait_minutes=0"),
    "stages=[finetune,quantize]",
)
Run = dict[str, Any]


def cost(row: Run, runtime: str = "onnxruntime") -> Run:
    found: Run = row["cost"]["runtimes"][runtime]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtimes")


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    """The teacher, the student and the student in INT8, in torch and in ONNX Runtime."""
    return studies.run(place / "run", *ASKED, "quantize=static", store=place / "store")


def test_a_runtime_has_all_that_torch_has_and_its_own_scores(run: Run) -> None:
    own = {"metrics", "agreement", "largest_difference"}
    for row in run["rows"]:
        assert set(cost(row)) - own == set(cost(row, "torch"))
        assert cost(row)["latency_ms"]["padded"]["n"] == cost(row)["latency_ms"]["task"]["n"] == 4
        assert cost(row)["threads"] == 1
        assert cost(row)["peak_memory_bytes"] < cost(row, "torch")["peak_memory_bytes"]


def test_what_a_runtime_answers_scores_as_torch_does(run: Run, place: Path) -> None:
    *floats, quantized = run["rows"]
    for row in floats:
        assert cost(row)["metrics"]["toy"]["validation"] == pytest.approx(row["metrics"]["toy"]["validation"], abs=1e-4)
        assert cost(row)["agreement"] == 1
        assert cost(row)["largest_difference"] < 1e-4
    assert cost(quantized)["agreement"] >= 0.95
    assert cost(quantized)["largest_difference"] < 0.1
    mine, theirs = (
        studies.predictions(place / "run", quantized, f"toy.validation{runtime}")["logits"]
        for runtime in ("", ".onnxruntime")
    )
    assert abs(mine - theirs).max() == pytest.approx(cost(quantized)["largest_difference"], abs=1e-3)


def test_ratios_are_formed_inside_each_runtime(run: Run) -> None:
    teacher, _, quantized = run["rows"]
    ratios = quantized["delta"]["teacher"]["runtimes"]
    assert set(ratios) == {"torch", "onnxruntime"}
    for name, found in ratios.items():
        mine, theirs = cost(quantized, name), cost(teacher, name)
        assert found["compression_ratio"] == theirs["size_bytes"] / mine["size_bytes"]
        for form, speed_up in found["speed_up"].items():
            assert speed_up == theirs["latency_ms"][form]["p50"] / mine["latency_ms"][form]["p50"]


def test_the_size_is_that_of_the_files_which_the_runtime_opens(run: Run, place: Path) -> None:
    files = list((place / "store" / ".results" / "export").glob(f"*/{onnx_runtime.FILE}"))
    sizes = {sum(file.stat().st_size for file in onnx_runtime.open(path.parent, 1).files()) for path in files}
    assert {cost(row)["size_bytes"] for row in run["rows"]} == sizes


def test_the_report_has_a_line_for_each_row_and_runtime(run: Run, place: Path) -> None:
    lines = (place / "run" / "tables" / "runtimes.csv").read_text().splitlines()
    found = [line.split(",")[:2] for line in lines[1:]]
    assert [runtime for _, runtime in found] == ["torch", "onnxruntime"] * 3
    assert "Every row in every runtime" in (place / "run" / "report.md").read_text()


def test_exports_and_scores_are_kept_and_dynamic_int8_stays_in_torch(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def refuse(*_given: object, **_named: object) -> None:
        pytest.fail("computed again")

    def stand_in(variants: dict[str, Variant], _s: object, settings: Measure, **_named: object) -> Run:
        assert all(variant.tokenizer is not None for variant in variants.values() if variant.runtime != "torch")
        measured.extend(variants)
        return {name: {"latency_ms": {"padded": {"p50": 1.0, "mean": 1.0}}} for name in variants}

    monkeypatch.setattr(model_files, "write", refuse)
    monkeypatch.setattr(runtimes, "score", refuse)
    monkeypatch.setattr(runtimes, "measure", stand_in)
    again = studies.run(place / "again", *ASKED, "quantize=dynamic", store=place / "store")
    dynamic = again["rows"][-1]
    assert list(dynamic["cost"]["runtimes"]) == ["torch"]
    assert dynamic["notes"][-1] == "not in onnxruntime: torch's dynamic INT8 runs in torch alone"
    assert measured == [
        *("teacher/finetune (torch)", "teacher/finetune (onnxruntime)"),
        *("student/finetune (torch)", "student/finetune (onnxruntime)", "student/finetune/quantize (torch)"),
    ]
    for before, after in zip(run["rows"][:2], again["rows"][:2], strict=True):
        assert cost(before)["metrics"] == cost(after)["metrics"]


def test_a_pruned_vocabulary_is_exported_scored_and_timed_in_its_own_tokens(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: dict[str, Variant] = {}

    def stand_in(variants: dict[str, Variant], sentences: list[list[int]], *_: object, **_named: object) -> Run:
        timed.update(variants)
        common.extend(sentences)
        return {name: {"latency_ms": {"padded": {"p50": 1.0, "mean": 1.0}}} for name in variants}

    common: list[list[int]] = []
    monkeypatch.setattr(runtimes, "measure", stand_in)
    few = ("+prune@vocab=vocab", "task.max_train_examples=16", "stages=[finetune,vocab]")
    found = studies.run(place / "vocabulary", *ASKED, *few, store=place / "store")
    *_, whole, pruned = found["rows"]
    assert cost(pruned)["agreement"] == 1 and cost(pruned)["largest_difference"] < 1e-4
    assert cost(pruned)["size_bytes"] < cost(whole)["size_bytes"]
    _, tokenizer = edgemin.load(place / "store" / pruned["artifact"])
    for runtime in ("torch", "onnxruntime"):
        before, after = (timed[f"student/finetune{stage} ({runtime})"] for stage in ("", "/vocab"))
        assert before.sentences is None and before.vocabulary == len(toy.vocabulary()) > after.vocabulary
        assert after.vocabulary == len(tokenizer)
        words = [toy.tokenizer().decode(ids, skip_special_tokens=True).split() for ids in common]
        assert after.sentences is not None
        assert [list(ids) for ids in after.sentences] == [tokenizer(" ".join(text))["input_ids"] for text in words]
    held = timed["student/finetune/vocab (onnxruntime)"].tokenizer
    assert held is not None and Tokenizer.from_file(str(held)).get_vocab() == tokenizer.get_vocab()
    out = place / "bundle"
    out.mkdir()
    compared = bundle.write(place / "store" / pruned["artifact"], "onnxruntime", out)
    assert compared["agreement"] == 1 and "sentences of toy" in compared["inputs"]
    assert Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab() == tokenizer.get_vocab()
