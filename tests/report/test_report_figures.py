"""The figures: names that do not cover one another, well-formed SVG; and pages rebuilt byte for byte."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import run_json
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from edgemin.report import drawing, figures, labels, measures, order_figure, write
from edgemin.report.fold import Study, fold
from edgemin.report.grid import CORE
from edgemin.report.points import Point, points
from edgemin.report.schema import parse


def study(*runs: dict[str, Any]) -> Study:
    return fold([parse(Path(f"{number}/run.json"), data) for number, data in enumerate(runs)])


def sweep() -> list[dict[str, Any]]:
    """Three prune ratios: the rows before pruning are the same artifacts in all jobs."""
    runs = []
    for number, ratio in enumerate((0.1, 0.2, 0.3)):
        data = run_json.run(number=number, overrides=(f"prune.ratio={ratio}",))
        for row in data["rows"]:
            if "prune" in row["stages"]:
                row["artifact"] += str(ratio)
                row["metrics"]["sst2"]["validation"]["accuracy"] -= ratio / 50
                run_json.in_torch(row)["size_bytes"] -= int(ratio * 1e7)
        run_json.fill_deltas(data)
        runs.append(data)
    return runs


def drawn(shown: list[Point]) -> Figure:
    with drawing.style():
        figure = figures.draw(shown, "T", "Accuracy (%)", measures.SIZE)
        drawing.saved(figure, "png")
    return figure


def names(figure: Figure) -> list[Annotation]:
    texts = figure.axes[0].texts
    return [text for text in texts if isinstance(text, Annotation) and text.get_gid() == "label"]


def test_figure_3_has_the_times_of_the_stage_table() -> None:
    for runtimes, heading in (({"openvino": 0.25}, "padded, openvino (ms)"), ({}, "padded (ms)")):
        data = run_json.with_runtimes(run_json.run(), runtimes)
        drawn = {one.name: one.files["svg"].decode() for one in figures.figures(study(data))[0]}
        assert f"<!-- Latency p50, {heading} -->" in drawn["accuracy_latency"]


@pytest.mark.parametrize(
    "runs",
    [
        [run_json.run()],
        sweep(),
        [run_json.run(seed=n, overrides=(f"seed={n}",), shift=0.003 * n) for n in range(3)],
    ],
    ids=["one job", "a sweep", "seeds"],
)
def test_every_point_has_its_name_and_no_name_covers_another(runs: list[dict[str, Any]]) -> None:
    folded = study(*runs)
    for cost in (measures.SIZE, measures.latency("padded", "p50", CORE)):
        shown = points(folded, "sst2", cost)
        figure = drawn(shown)
        assert sorted(text.get_text() for text in names(figure)) == sorted(point.name for point in shown)
        boxes = [text.get_window_extent() for text in names(figure)]
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        window = figure.axes[0].get_window_extent()
        assert all(window.x0 <= box.x0 and box.x1 <= window.x1 for box in boxes)


def test_labels_are_kept_apart_even_where_all_points_are_one() -> None:
    spots = [(500.0, 300.0)] * 12
    sizes = [(140.0, 20.0)] * 12
    bounds = labels.Box(0, 0, 1000, 600)
    centres = labels.place(spots, sizes, [], bounds, 8)
    boxes = [labels.around(centre, size) for centre, size in zip(centres, sizes, strict=True)]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlap(pair[1])]
    assert all(box.within(bounds) for box in boxes)
    assert centres == labels.place(spots, sizes, [], bounds, 8)


def test_one_artifact_in_several_jobs_is_one_point_and_others_name_what_was_swept() -> None:
    shown = points(study(*sweep()), "sst2", measures.SIZE)
    assert [point.name for point in shown] == [
        "Teacher",
        "Student baseline",
        "+ Distillation",
        "+ Head pruning (ratio=0.1)",
        "Quantized (not pruned)",
        "Pruned + quantized (ratio=0.1)",
        "+ Head pruning (ratio=0.2)",
        "Pruned + quantized (ratio=0.2)",
        "+ Head pruning (ratio=0.3)",
        "Pruned + quantized (ratio=0.3)",
    ]
    assert [point.origin for point in shown] == [None, None, 1, 2, 2, 3, 2, 6, 2, 8]


def test_folded_seeds_have_error_bars() -> None:
    runs = [run_json.run(seed=n, overrides=(f"seed={n}",), shift=0.01 * n) for n in range(3)]
    figure = drawn(points(study(*runs), "sst2", measures.SIZE))
    assert all(container.has_yerr for container in figure.axes[0].containers)
    assert any("95 % intervals" in text.get_text() for text in figure.texts)


def test_equal_figures_are_equal_bytes() -> None:
    first, second = (figures.figures(study(run_json.run()))[0] for _ in range(2))
    assert [one.files for one in first] == [one.files for one in second]
    for one in first:
        assert one.files["png"].startswith(b"\x89PNG")
        assert ElementTree.fromstring(one.files["svg"]).tag.endswith("svg")


def test_names_are_not_taken_for_mathematics() -> None:
    data = run_json.run()
    data["rows"][0]["name"] = "cost $5 and $6_x"
    assert figures.figures(study(data))[0]


def test_the_pipeline_is_well_formed_and_names_every_row_and_stage() -> None:
    data = run_json.run()
    control = {
        **data["rows"][2],
        "name": 'No teacher <&> "x"',
        "stages": ["finetune", "none"],
        "control": True,
    }
    data["rows"].append(control)
    data["nodes"][2]["teachers"] = ["teacher/finetune"]
    svg = order_figure.pipeline(parse(Path("run.json"), data))
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{space}text")]
    assert set(texts) > {row["name"] for row in data["rows"]} | {"teacher", "student", "none", "prune"}
    assert texts.count("distill") == 1, "a shared prefix is one box"
    boxes = [box for box in root.iter(f"{space}rect") if box.get("x")]
    assert len([box for box in boxes if box.get("stroke-dasharray")]) == 1
    assert len([line for line in root.iter(f"{space}path") if line.find(f"{space}title") is not None]) == 1


def test_boxes_of_the_pipeline_do_not_overlap() -> None:
    root = ElementTree.fromstring(order_figure.pipeline(parse(Path("run.json"), run_json.run())))
    boxes = []
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        if box.get("x"):
            left, bottom, width, height = (float(box.get(key, 0)) for key in ("x", "y", "width", "height"))
            boxes.append(labels.Box(left, bottom, left + width, bottom + height))
    assert len(boxes) == 8
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlap(pair[1])]


def test_everything_is_rebuilt_byte_for_byte_from_run_json_alone(tmp_path: Path) -> None:
    for number, data in enumerate(sweep()):
        run_json.save(tmp_path / str(number), data)
    first = {name: path.read_bytes() for name, path in write.rebuild(tmp_path)[0].items()}
    for name in first:
        (tmp_path / name).unlink()
    again = {name: path.read_bytes() for name, path in write.rebuild(tmp_path)[0].items()}
    assert again == first
    assert {"report.md", "tables/stages.md", "0/tables/table3_size.tex", "2/figures/pipeline.svg"} < set(first)


def test_links_of_the_page_lead_to_files(tmp_path: Path) -> None:
    written = write.of_job(run_json.save(tmp_path, run_json.run())).write()
    page = written["report.md"].read_text(encoding="utf-8")
    for name in written:
        assert name == "report.md" or f"]({name})" in page
    assert "Warnings" not in page


def test_published_figures_are_found_from_the_run_and_their_absence_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {**run_json.run(), "published": "papers/published.yaml"}
    job = run_json.save(tmp_path / "outputs" / "0", data)
    write.of_job(job).write()
    assert "papers/published.yaml was not found" in (job / "report.md").read_text(encoding="utf-8")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "published.yaml").write_text("rows: {Teacher: {size_mib: 255.41}}")
    assert "tables/published.md" in write.of_job(job).write()
    write.of_job(job).show()
    assert "Published figures and ours" in capsys.readouterr().out
    (tmp_path / "papers" / "published.yaml").write_text("rows: 7")
    assert "tables/stages.md" in write.of_job(job).write()
    assert "rows: expected an object" in (job / "report.md").read_text(encoding="utf-8")


def test_published_figures_are_the_jobs_own_wherever_the_report_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "published.yaml").write_text("rows: {Teacher: {size_mib: 777}}")
    for number, size in enumerate((255.41, 255.41)):
        job = run_json.save(
            tmp_path / "x" / str(number),
            {**run_json.run(number=number, seed=number), "published": "published.yaml"},
        )
        (job / "published.yaml").write_text(f"rows: {{Teacher: {{size_mib: {size}}}}}")
    found = write.of_study(tmp_path / "x").write()["tables/published.md"].read_text()
    assert "255.41" in found and "777" not in found
    (job / "published.yaml").write_text("rows: {Teacher: {size_mib: 99}}")
    made = write.of_study(tmp_path / "x").write()
    assert "tables/published.md" not in made and "not all jobs name the same" in made["report.md"].read_text()


def test_runs_of_architectures_alone_print_size_and_operations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(json.dumps(run_json.run(measured=False)))
    data["task"] = None
    for row in data["rows"]:
        row["metrics"] = {}
    job = run_json.save(tmp_path, data)
    write.of_job(job).write()
    write.of_job(job).show()
    printed = capsys.readouterr().out
    assert "Table III" in printed and "Table IV" in printed and "Table II:" not in printed


def test_a_figure_that_is_missing_says_why_and_what_to_do() -> None:
    data = run_json.run(measured=False)
    data["config"]["measure"] = None
    made, (said,) = figures.figures(study(data))
    assert [one.name for one in made] == ["accuracy_size"]
    assert said.startswith("Figure 3: accuracy against latency, SST-2: not drawn, as measure=none took no latencies: ")
    assert "run the same command without it" in said
    data["config"]["measure"] = {"runs": 10}
    assert figures.figures(study(data))[1] == [
        "Figure 3: accuracy against latency, SST-2: not drawn, as no row has a latency p50"
    ]


def test_no_file_is_written_outside_by_a_name(tmp_path: Path) -> None:
    for number, task in enumerate(("../../a", "/b")):
        run_json.save(tmp_path / "s" / str(number), run_json.run(task=task, number=number, overrides=(f"task={task}",)))
    for path in write.of_study(tmp_path / "s").write().values():
        assert path.resolve().is_relative_to(tmp_path / "s")
    assert not (tmp_path / "a.png").exists()
