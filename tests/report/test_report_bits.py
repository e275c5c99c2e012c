"""The metric against the bits of the weights: which rows are marks, and what the figure shows of them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import run_json
from report_tables import study

from edgemin.report import bits_figure


def job(
    bits: int, method: str, accuracy: float, seed: int = 1, granularity: str = "group", **more: Any
) -> dict[str, Any]:
    overrides = (f"quantize={method}", f"quantize.bits={bits}", f"seed={seed}")
    data = run_json.run(seed=seed, overrides=overrides)
    row = data["rows"][4]
    layers = {
        "bert.embeddings.word_embeddings": 8,
        "bert.encoder.layer.0.output.dense": bits,
        "bert.pooler.dense": bits,
    }
    row["findings"] = {"quantization": {**run_json.QUANTIZATION, "bits": layers, "granularity": "group"}, **more}
    task, split = data["task"]["name"], data["task"]["splits"][0]
    row["metrics"][task][split]["accuracy"] = accuracy
    row["gate"] = run_json.gate(data, 4, parent=3, passed=True)
    return data


def test_only_the_row_that_the_swept_stage_made_is_called_by_its_value() -> None:
    def methods(ends: str) -> set[str]:
        data = job(4, "qat", 0.9)
        data["rows"][5] |= {"findings": data["rows"][4]["findings"], "stages": [*data["rows"][3]["stages"], ends]}
        folded = study(data, job(4, "static", 0.9, seed=2))
        return {mark.method for mark in bits_figure._marks(folded, folded.groups[0])}

    assert methods("int4") == {"qat", "Pruned + quantized"}
    assert methods("quantize") == {"Quantized (not pruned), qat", "Pruned + quantized, qat"}


def texts(svg: bytes) -> set[str]:
    """What is drawn as outlines stands beside them as a comment."""
    return set(re.findall(r"<!-- (.*?) -->", svg.decode()))


def test_methods_are_lines_over_bits_and_seeds_are_folded() -> None:
    runs = [job(8, "static", 0.9), job(4, "static", 0.89), job(2, "static", 0.6)]
    runs += [job(2, "qat", 0.86, seed=1), job(2, "qat", 0.88, seed=2)]
    (group_marks,) = [
        [mark for group in folded.groups for mark in bits_figure._marks(folded, group)] for folded in [study(*runs)]
    ]
    found = {(mark.method, mark.bits): (mark.value.mean, mark.value.n) for mark in group_marks}
    assert found[("static", 8)] == (0.9, 1) and found[("qat", 2)] == (pytest.approx(0.87), 2)
    (drawing,) = bits_figure.bits_figures(study(*runs))
    assert drawing.name == "accuracy_bits" and drawing.files["png"].startswith(b"\x89PNG")
    shown = texts(drawing.files["svg"])
    assert {"static, group", "qat, group", "8", "4", "2", "before"} <= shown
    again = bits_figure.bits_figures(study(*runs))[0].files["svg"]
    assert len(again) == len(drawing.files["svg"])


def test_rows_of_one_width_or_of_mixed_bits_make_no_figure() -> None:
    assert bits_figure.bits_figures(study(run_json.run())) == []
    assert bits_figure.bits_figures(study(job(4, "static", 0.9), job(4, "qat", 0.91))) == []
    mixed = {"sensitivity": run_json.sensitivity()}
    assert bits_figure.bits_figures(study(job(4, "static", 0.9), job(2, "static", 0.8, **mixed))) == []


def test_only_what_a_quantized_row_was_made_from_is_the_line_before() -> None:
    data = job(4, "static", 0.9)
    data["rows"][3]["gate"] = run_json.gate(data, 3, parent=2, passed=True, parent_value=0.5)
    data["rows"][5]["findings"] = data["rows"][4]["findings"]
    data["rows"][5] |= {"gate": run_json.gate(data, 5, parent=4, passed=True, parent_value=0.4)}
    data["rows"][5]["made_from"] = data["rows"][4]["name"]
    (group,) = study(data).groups
    assert bits_figure._before(group) == [0.9071]
