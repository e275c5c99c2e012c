"""All studies of the project are built again from their run.json files and predictions, and nothing changes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import matplotlib
import pytest
import run_json

from edgemin.errors import UserError
from edgemin.report.studies import filled, rebuild_all, runs

REPOSITORY = Path(__file__).parents[2]
STUDIES = REPOSITORY / "experiments"
WITH_RUNS = [study.name for study in sorted(STUDIES.iterdir()) if study.is_dir() and runs(study)]
FAST = "deployment"
GENERATED = ("tables", "figures", "report.md")
PINNED = re.search(r"^matplotlib==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != FAST), id=name) for name in WITH_RUNS]
)
def test_a_study_is_built_again_byte_for_byte(name: str, tmp_path: Path) -> None:
    def generated(path: Path) -> bool:
        return any(part in GENERATED for part in path.parts)

    there = {path.relative_to(STUDIES / name): path for path in (STUDIES / name).rglob("*") if path.is_file()}
    for path, source in there.items():
        if not generated(path):
            copy = tmp_path / "studies" / name / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    page = (tmp_path / "studies" / name / "README.md").read_text()
    (tmp_path / "studies" / name / "README.md").write_text(re.sub(r"(<!-- result:.*?-->\n)[^<]*", r"\1", page))
    rebuild_all(str(tmp_path / "studies"))
    made = tmp_path / "studies" / name
    assert {path.relative_to(made) for path in made.rglob("*") if path.is_file()} == set(there)
    assert PINNED is not None
    same_drawing = matplotlib.__version__ == PINNED[1]
    for path, source in there.items():
        if same_drawing or path.suffix not in (".png", ".svg"):
            assert (made / path).read_bytes() == source.read_bytes(), f"{path}: run make tables"


def test_every_study_is_small_enough_to_be_kept() -> None:
    for study in STUDIES.iterdir():
        size = sum(path.stat().st_size for path in study.rglob("*") if path.is_file())
        assert size < 20 * 2**20, f"{study.name}: {size} bytes"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    run_json.save(tmp_path / "studies" / "mine" / "run", run_json.run())
    (tmp_path / "studies" / "later").mkdir()
    (tmp_path / "studies" / "later" / "README.md").write_text("# Later\n")
    return tmp_path / "studies" / "mine" / "README.md"


def ask(page: Path, asked: str, end: str = "<!-- end of result -->") -> None:
    page.write_text(f"# Mine\n\n<!-- result: {asked} -->\nwhat stood here\n{end}\n\nbelow\n")


def test_a_page_gets_the_columns_that_it_asks_for_and_keeps_the_rest(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(page, "run stages | name, size_bytes, accuracy_fraction")
    rebuild_all(str(page.parents[1]))
    text = page.read_text()
    assert text.startswith("# Mine\n\n<!-- result: run stages | name, size_bytes, accuracy_fraction -->\n**What each")
    assert (
        "| Model | Size (MiB) | Accuracy (%)<sup>a</sup> |\n" in text
        and text.count("| Teacher | 255.41 | 90.94 |") == 1
    )
    assert "what stood here" not in text and text.endswith("<!-- end of result -->\n\nbelow\n")
    rebuild_all(str(page.parents[1]))
    assert page.read_text() == text
    assert "no run.json yet, to be computed again: later" in capsys.readouterr().out
    assert (page.parent / "run" / "report.md").is_file()


def test_a_page_without_columns_gets_those_of_the_runs_own_page(page: Path) -> None:
    ask(page, "run table3_size")
    block = filled(page, {}).partition("-->\n")[2].partition("<!-- end")[0]
    rebuild_all(str(page.parents[1]))
    assert block == (page.parent / "run" / "tables" / "table3_size.md").read_text()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("run", "result: expected <run> <table>, given run"),
        ("run speed", "result: expected a table of run (stages, "),
        ("run stages | name, colour", "result: expected columns of stages (name, "),
        ("walk stages", "study: expected a directory with run.json in or below it"),
    ],
)
def test_a_page_that_asks_for_what_is_not_there_is_refused_in_a_line(page: Path, asked: str, said: str) -> None:
    ask(page, asked)
    with pytest.raises(UserError, match=re.escape(said)):
        filled(page, {})


def test_a_block_without_an_end_is_refused(page: Path) -> None:
    ask(page, "run stages", end="")
    with pytest.raises(UserError, match=r"expected <!-- end of result --> behind every <!-- result: \.\.\. -->"):
        filled(page, {})
    with pytest.raises(UserError, match=r"^folder: expected a directory of studies"):
        rebuild_all(str(page.parent / "nowhere"))


def test_jobs_of_a_sweep_are_kept_with_or_without_pages_of_their_own(page: Path) -> None:
    sweep = page.parent / "sweep"
    for number in range(2):
        run_json.save(sweep / str(number), run_json.run(number=number, seed=number, overrides=(f"seed={number}",)))
    rebuild_all(str(page.parents[1]))
    assert "- [0](0/run.json)\n- [1](1/run.json)\n" in (sweep / "report.md").read_text()
    assert not (sweep / "0" / "report.md").exists()
    (sweep / "0" / "report.md").write_text("old")
    rebuild_all(str(page.parents[1]))
    assert "- [0](0/report.md)\n- [1](1/report.md)\n" in (sweep / "report.md").read_text()
    assert "old" not in (sweep / "0" / "report.md").read_text() and (sweep / "1" / "report.md").is_file()
