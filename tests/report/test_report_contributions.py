"""What each stage contributed: differences to the row a row was made from, and their share of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import run_json
from report_tables import cell, column_keys, mean, notes, study

from edgemin.report import render, tables
from edgemin.report.contributions import WHOLE

MILLISECONDS, SHARE = "latency_padded_p50_ms_change", "latency_padded_p50_ms_change_of_whole_fraction"


def paper() -> dict[str, Any]:
    """The paper's rows, with its own latencies of SST-2 in Table II."""
    data = run_json.run()
    for row, p50 in zip(data["rows"], (62.7, 41.17, 36.48, 32.69, 23.05, 25.90), strict=True):
        run_json.in_torch(row)["latency_ms"]["padded"]["p50"] = p50
        parent = next((one for one in data["rows"] if one["name"] == row["made_from"]), None)
        if parent is not None:
            scores = [one["metrics"]["sst2"]["validation"]["accuracy"] for one in (row, parent)]
            row["delta"]["parent"] = {"metric": scores[0] - scores[1]}
    return data


def test_contributions_are_what_the_papers_section_v_a_says_of_its_tables() -> None:
    table = tables.contributed(study(paper()))
    assert [row[0].value for row in table.rows] == [name for name in run_json.MADE_FROM] if table else False
    assert [row[1].value for row in table.rows] == [*run_json.MADE_FROM.values()] if table else False
    pruned, quantized = "+ Head pruning", "Quantized (not pruned)"
    assert mean(table, pruned, "metric_less_parent_fraction") == pytest.approx(0.9071 - 0.9209)
    assert mean(table, pruned, MILLISECONDS) == pytest.approx(32.69 - 36.48)
    assert mean(table, quantized, MILLISECONDS) == pytest.approx(23.05 - 36.48)
    assert mean(table, "+ Distillation", SHARE) == pytest.approx(-0.1139, abs=1e-4)
    assert mean(table, pruned, "size_bytes_change") == 128_731_000 - 133_460_100
    assert mean(table, pruned, "size_bytes_change_of_whole_fraction") == pytest.approx(-4_729_100 / 133_460_000)
    assert mean(table, pruned, "params_change") == -24 * 49_248
    shares = [mean(table, name, SHARE) for name in ("+ Distillation", pruned, "Pruned + quantized")]
    assert sum(shares) == pytest.approx(25.90 / 41.17 - 1), "along a path the shares add up"
    shown = render.markdown(table) if table is not None else ""
    assert "| + Head pruning | + Distillation | -1.38 | -3.79" in shown and WHOLE in shown


def test_a_change_of_latency_within_the_noise_floor_is_no_speed_up() -> None:
    table = tables.contributed(study(paper()))
    said = notes(table, cell(table, "+ Distillation", MILLISECONDS).marks)
    assert said == ["within the noise floor of 12.9 %: no speed-up"]
    assert notes(table, cell(table, "+ Distillation", SHARE).marks) == said
    assert not cell(table, "Quantized (not pruned)", MILLISECONDS).marks


def test_what_was_not_measured_has_no_column_and_first_rows_no_line() -> None:
    table = tables.contributed(study(run_json.run(measured=False)))
    assert not [key for key in column_keys(table) if "latency" in key] and "size_bytes_change" in column_keys(table)
    alone = run_json.run()
    alone["rows"] = alone["rows"][:2]
    assert tables.contributed(study(alone)) is None
