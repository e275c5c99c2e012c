"""Markdown, CSV, LaTeX and the terminal."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import run_json

from edgemin.report import published, render, tables, terminal, write
from edgemin.report.fold import Statistic, fold
from edgemin.report.grid import CORE, Cell, Column, Table
from edgemin.report.schema import parse

PAPER = Path(__file__).parents[2] / "experiments" / "paper" / "published.yaml"
NASTY = r"50% & more_less #1 ~ ^ {x} \ $5 | <b> [link](x)"


class Screen(io.StringIO):
    """A text stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def stages(*runs: dict[str, Any]) -> Table:
    given = runs or (run_json.run(),)
    table = tables.stage_table(fold([parse(Path(f"{n}/run.json"), data) for n, data in enumerate(given)]))
    assert table is not None
    return table


def nasty() -> Table:
    columns = (Column("name", "Model", text=True), Column("x_ms", NASTY, "%", level=CORE))
    rows = ((Cell(NASTY), Cell(Statistic(1.5, None, 1), ("a",))),)
    return Table("nasty", NASTY, columns, rows, (), (("a", NASTY),))


def test_csv_holds_the_raw_numbers_to_the_last_digit() -> None:
    data = run_json.run(shift=0.0123456789)
    rows = list(csv.DictReader(io.StringIO(render.comma_separated(stages(data)))))
    assert [row["name"].removeprefix("'") for row in rows] == [row["name"] for row in data["rows"]]
    for row, written in zip(data["rows"], rows, strict=True):
        assert float(written["accuracy_fraction"]) == row["metrics"]["sst2"]["validation"]["accuracy"]
        assert written["size_bytes"] == str(run_json.in_torch(row)["size_bytes"])
        assert float(written["latency_padded_p50_ms"]) == run_json.in_torch(row)["latency_ms"]["padded"]["p50"]
        assert (
            float(written["speed_up_padded_to_teacher"])
            == row["delta"]["teacher"]["runtimes"]["torch"]["speed_up"]["padded"]
        )


def test_csv_of_folded_seeds_holds_mean_deviation_and_count() -> None:
    runs = [run_json.run(seed=n, overrides=(f"seed={n}",), shift=0.01 * n) for n in range(3)]
    row = next(csv.DictReader(io.StringIO(render.comma_separated(stages(*runs)))))
    assert float(row["accuracy_fraction"]) == pytest.approx(0.9194)
    assert float(row["accuracy_fraction_sd"]) == pytest.approx(0.01)
    assert row["accuracy_fraction_n"] == row["seeds"] == "3"


def test_every_csv_column_of_a_cost_names_its_unit() -> None:
    header = next(csv.reader(io.StringIO(render.comma_separated(stages()))))
    units = ("_bytes", "_ms", "_mj", "_w", "_per_s", "_fraction")
    counts = ("params", "flops", "macs", "threads", "name", "ratio", "speed_up")
    assert not [key for key in header if not key.endswith(units) and not any(word in key for word in counts)]


def test_latex_escapes_whatever_a_name_holds() -> None:
    text = render.latex(nasty())
    body = "\n".join(line for line in text.splitlines() if not line.startswith("% needs"))
    body = body.replace(r"\resizebox{\textwidth}{!}{%", "")
    assert not re.search(r"(?<!\\)[%#_$]|(?<!\\)~|<|>|\|", body.replace("\\textasciitilde{}", ""))
    assert r"50\% \& more\_less \#1 \textasciitilde{} \textasciicircum{} \{x\} \textbackslash{} \$5" in body
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    rows = [line for line in body.splitlines() if line.endswith(r"\\") and "shortstack" not in line]
    assert all(len(re.findall(r"(?<!\\)&", line)) == 1 for line in rows)


def test_latex_rows_have_as_many_cells_as_columns() -> None:
    text = render.latex(stages())
    count = len(re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)[1])  # type: ignore[index]
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert rows and all(len(re.findall(r"(?<!\\)&", line)) == count - 1 for line in rows)
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1


def test_markdown_keeps_its_columns_whatever_a_name_holds() -> None:
    lines = [line for line in render.markdown(nasty()).splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [3, 3, 3]
    assert r"\[link\]" in lines[2] and r"\<b\>" in lines[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("+ Pruning and - tokens", r"\+ Pruning and - tokens"),
        ("- Unused tokens", r"\- Unused tokens"),
        ("## 2", r"#\# 2"),
        ("1. of 3", r"1\. of 3"),
        ("12) x", r"12\) x"),
        ("-1 point", "-1 point"),
        ("1.5 x", "1.5 x"),
        ("#1 of 2", "#1 of 2"),
        ("± is half", "± is half"),
    ],
)
def test_no_sign_at_the_beginning_of_a_text_makes_it_an_item_or_a_heading(text: str, said: str) -> None:
    table = replace(nasty(), footnotes=(("a", NASTY), ("", text)))
    assert render.markdown(table).splitlines()[-1] == said


def test_a_row_in_a_list_of_the_page_keeps_its_sign(tmp_path: Path) -> None:
    data = run_json.run()
    data["rows"][2] |= {"made_from": "Student baseline", "gate": run_json.gate(data, 2, parent=1, passed=False)}
    page = write.of_job(run_json.save(tmp_path, data)).write()["report.md"].read_text(encoding="utf-8")
    assert "\n- \\+ Distillation: quality gate not passed" in page


def test_markdown_shows_folded_numbers_with_their_interval() -> None:
    runs = [run_json.run(seed=n, overrides=(f"seed={n}",), shift=0.01 * n) for n in range(3)]
    text = render.markdown(stages(*runs))
    assert "| 91.94 ± 2.48 |" in text
    assert "| 255.41 |" in text, "what follows from the architecture has no interval to show"


def test_small_models_keep_their_digits_and_nothing_becomes_minus_zero() -> None:
    columns = (Column("size", "Size", fine=True), Column("x", "X"))
    rows = ((Cell(Statistic(0.0123, None, 1)), Cell(Statistic(-0.001, None, 1))),)
    text = render.markdown(Table("t", "T", columns, rows))
    assert "| 0.012 | 0.00 |" in text


def test_output_that_is_no_terminal_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    file = io.StringIO()
    table = stages()
    terminal.show(table, file)
    text = file.getvalue()
    assert "…" not in text and "\x1b" not in text
    line = next(line for line in text.splitlines() if line.strip().startswith("Pruned + quantized"))
    shown = [column for column in table.for_people().columns if not column.text]
    assert len(line.replace("Pruned + quantized", "").split()) == len(shown) == 7


@pytest.mark.parametrize("width", [20, 60, 80, 100, 140, 250])
def test_a_narrow_terminal_gets_fewer_columns_and_whole_numbers(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    file = Screen()
    terminal.show(stages(), file)
    text = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert "…" not in text
    table_lines = [line for line in text.splitlines() if line.strip().startswith("Pruned + quantized")]
    assert len(table_lines) == 1 and "89.80" in table_lines[0]
    assert width < 40 or len(table_lines[0]) <= width
    assert ("Left out for lack" in text) == (width < 100)


def swept(metric: str, seeds: tuple[int, ...] = (42,)) -> list[dict[str, Any]]:
    """A sweep over prune ratios of a task whose first metric is this one."""
    runs = []
    for number, (ratio, seed) in enumerate((ratio, seed) for ratio in ("0.1", "0.3") for seed in seeds):
        overrides = (f"prune.ratio={ratio}", *[f"seed={seed}"] * (len(seeds) > 1))
        data = run_json.run(number=number, seed=seed, overrides=overrides, shift=0.002 * (seed % 4))
        data["task"]["metric"] = metric
        for row in data["rows"]:
            row["metrics"]["sst2"]["validation"]["matthews"] = 0.7 + run_json.in_torch(row)["size_bytes"] / 1e10
        runs.append(data)
    return runs


@pytest.mark.parametrize("seeds", [(42,), (1, 2, 3)])
@pytest.mark.parametrize(("metric", "title"), [("f1", "F1"), ("matthews", "Matthews"), ("accuracy", "Accuracy")])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_what_matters_is_shown_at_every_width_also_in_a_pipe(
    width: int, metric: str, title: str, seeds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    file = io.StringIO()
    terminal.show(stages(*swept(metric, seeds)), file)
    text = file.getvalue()
    drawn = text.partition("[a]")[0] if width > 100 else text
    table, _, left_out = text.partition("Left out for lack of width:")
    rows = [line for line in table.splitlines() if line.startswith((" all", " 0.1", " 0.3", " prune", " ratio"))]
    assert all(len(line) <= width for line in rows) and "…" not in drawn
    assert title not in left_out
    if width >= 80:
        for needed in ("Retained vs teacher", "Size", "Latency p50, padded"):
            assert f" {needed}" not in left_out, needed
    if width == 120:
        assert "Params" not in table or text.index("Retained") < text.index("Params")


def test_what_belongs_together_is_not_torn_apart_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = io.StringIO()
    compared = all_tables()[-1]
    terminal.show(compared, file)
    lines = file.getvalue().splitlines()
    assert "Left out" not in file.getvalue() and max(map(len, lines)) <= 80
    shown = compared.for_people()
    headings = " ".join(lines)
    for kind in ("published", "ours", "difference"):
        wanted = sum(column.title.endswith(f", {kind}") for column in shown.columns)
        assert headings.count(f"{kind} ") >= wanted > 1


def test_footnotes_are_broken_between_words_and_stand_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = io.StringIO()
    table = stages()
    long = " ".join(["word-with-hyphens"] * 12)
    terminal.show(replace(table, footnotes=(*table.footnotes, ("", long))), file)
    lines = file.getvalue().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("word-with-hyphens"))
    assert lines[first + 1].startswith("    word-with-hyphens") and lines[first].endswith("word-with-hyphens")


def test_a_pipe_of_unknown_width_gets_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (None, "", "wide", "0"):
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns is not None:
            monkeypatch.setenv("COLUMNS", columns)
        file = io.StringIO()
        terminal.show(stages(), file)
        assert "Left out" not in file.getvalue(), columns


@pytest.mark.parametrize("form", [render.markdown, render.latex])
def test_no_file_for_people_has_more_than_eight_columns(form: Any) -> None:
    everything = [stages(), stages(*swept("f1", (1, 2, 3))), *all_tables()]
    for table in everything:
        shown = form(table)
        widths = [len(spec) for spec in re.findall(r"begin\{tabular\}\{([lr]+)\}", shown)]
        widths += [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in shown.splitlines() if line.startswith("|")]
        assert widths and max(widths) <= 8, (table.name, widths)
    full = next(csv.reader(io.StringIO(render.comma_separated(everything[0]))))
    assert len(full) == 32


def all_tables() -> list[Table]:
    folded = fold([parse(Path("run.json"), run_json.run())])
    compared = published.compare(folded, published.read(PAPER))
    assert compared is not None
    return [*tables.tables(folded), compared]


def test_a_page_has_all_that_was_published_in_tables_below_one_another() -> None:
    text = render.markdown(all_tables()[-1])
    headings = [line for line in text.splitlines() if line.startswith("| Model")]
    assert len(headings) > 1
    for heading in headings:
        kinds = [kind for kind in re.findall(r", (published|ours|difference) ", heading)]
        assert kinds == ["published", "ours", "difference"] * (len(kinds) // 3) or "FLOPs" in heading


def test_a_page_leaves_out_first_what_is_the_same_in_all_rows() -> None:
    data = run_json.run()
    for row in data["rows"]:
        row["delta"]["teacher"]["runtimes"]["torch"]["compression_ratio"] = 1.0
    heading = next(line for line in render.markdown(stages(data)).splitlines() if line.startswith("| Model"))
    assert "Compression" not in heading and "Params" in heading


def test_a_text_that_a_spreadsheet_would_compute_is_none() -> None:
    data = run_json.run(overrides=("x=-0.5",))
    other = run_json.run(overrides=("x==cmd|' /C calc'!A0",))
    for run in (data, other):
        run["rows"][0]["name"] = "@SUM(1,2)"
    text = render.comma_separated(stages(data, other))
    rows = list(csv.reader(io.StringIO(text)))
    assert {row[1] for row in rows[1:]} >= {"'@SUM(1,2)", "'+ Distillation", "Student baseline"}
    assert {row[0] for row in rows[1:]} <= {"-0.5", "'=cmd|' /C calc'!A0", "all"}


def test_an_ascii_stream_gets_ascii() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    runs = [run_json.run(seed=n, overrides=(f"seed={n}",), shift=0.01 * n) for n in range(2)]
    terminal.show(stages(*runs), file)
    file.flush()
    assert b"91.44 +/- 6.35" in raw.getvalue()


def test_a_name_is_not_taken_for_markup_on_the_terminal() -> None:
    file = io.StringIO()
    terminal.show(nasty(), file)
    assert "[link](x)" in file.getvalue()


def test_the_tables_of_a_sweep_say_which_jobs_have_no_result(tmp_path: Path) -> None:
    for number, ratio in enumerate(("0.1", "0.2")):
        run_json.save(tmp_path / str(number), run_json.run(number=number, overrides=(f"prune.ratio={ratio}",)))
    failed = ["job 2 (prune.ratio=2): prune.ratio: expected less than 1,\ngiven \x1b[31m2"]
    said = r"job 2 (prune.ratio=2): prune.ratio: expected less than 1, given \x1b[31m2"
    shown = io.StringIO()
    write.of_study(tmp_path, failed).show(shown)
    assert shown.getvalue().endswith(f"\n1 of 3 jobs has no result:\n  {said}\n")
    page = write.of_study(tmp_path, failed).write()["report.md"].read_text(encoding="utf-8")
    assert f"## 1 of 3 jobs has no result\n\n- {render.escape_markdown(said)}\n" in page
    assert "no result" not in write.of_study(tmp_path).write()["report.md"].read_text(encoding="utf-8")
