"""Writes and prints the tables, figures and pages of jobs and studies, from their run.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TextIO

from edgemin.errors import UserError
from edgemin.plain_text import printable
from edgemin.report import published as literature
from edgemin.report import terminal
from edgemin.report.against_figure import against
from edgemin.report.bits_figure import bits_figures
from edgemin.report.comparisons import Comparison, comparisons
from edgemin.report.devices import Measured, merged
from edgemin.report.figures import figures
from edgemin.report.fold import Study, fold
from edgemin.report.grid import Table
from edgemin.report.order_figure import pipeline
from edgemin.report.page import failed_jobs, page
from edgemin.report.paired import missing
from edgemin.report.pruning_figure import prunings
from edgemin.report.render import FORMATS
from edgemin.report.runtimes_figure import latencies
from edgemin.report.schema import Run, find, read
from edgemin.report.sensitivity_figure import sensitivities
from edgemin.report.tables import explained, tables

PAGE = "report.md"


@dataclass(frozen=True)
class Report:
    """What is written and shown of one job, or over the jobs of a study; what both need is computed once.

    Args:
        directory: where its files are written.
        runs: the jobs.
        links: the files of a study's jobs that its page links to.
        failed: a line for each job that failed or is missing.
        devices: what was measured on other devices.
        margin: a difference of the main metric below it counts as none, a fraction; None: as the jobs say.
    """

    directory: Path
    runs: Sequence[Run]
    links: Sequence[Path] = ()
    failed: Sequence[str] = ()
    devices: Sequence[Measured] = ()
    margin: float | None = None

    def write(self) -> dict[str, Path]:
        """Writes the tables, figures and page.

        Returns:
            The files written, by their path relative to the directory: `tables/stages.md`, `report.md` ...

        Raises:
            UserError: a job has no rows, or its predictions or the published figures it names cannot be used.
        """
        if not any(run.rows for run in self.runs):
            raise UserError(f"{self.runs[0].file}: rows: expected at least one row, given none")
        written = {}
        for name, data in self._contents().items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            written[name] = path
        return written

    def show(self, file: TextIO | None = None) -> None:
        """Prints the main tables, and which jobs have no result.

        They are the stage table, or Tables III and IV where no task was run; then, among others, the published figures
        beside ours.

        Args:
            file: where to; standard output by default.
        """
        main = ("stages",) if self._study.tasks else ("table3_size", "table4_flops")
        for table in self.tables:
            if table.name in (*main, "comparisons", "broken", "runtimes", "grid", "profile", "published"):
                terminal.show(table, file)
        said = list(self._remarks)
        if self.failed:
            said.append(f"{failed_jobs(len(self.runs), self.failed)}:")
            said += [f"  {printable(line)}" for line in self.failed]
        for line in said:
            print(line, file=file)

    @property
    def tables(self) -> list[Table]:
        """All tables, the published figures beside ours last."""
        return self._built[0]

    @property
    def _remarks(self) -> list[str]:
        """Why something is missing where it is."""
        return self._built[1]

    @cached_property
    def _built(self) -> tuple[list[Table], list[str]]:
        own = tables(self._study, self._compared, self._with_devices)
        built, published_remarks = _with_published(self._study, own)
        return built, [*_without_predictions(self._study), *published_remarks]

    @cached_property
    def _study(self) -> Study:
        return fold(self.runs)

    @cached_property
    def _with_devices(self) -> Study:
        return fold(merged(self.runs, self.devices))

    @cached_property
    def _compared(self) -> list[Comparison]:
        return comparisons(self._study, self.margin)

    def _contents(self) -> dict[str, bytes]:
        study, with_devices = self._study, self._with_devices
        drawn, skipped = figures(study)
        drawn += against(self._compared)
        drawn += latencies(with_devices) + bits_figures(study) + sensitivities(study) + prunings(study)
        contents: dict[str, bytes] = {}
        for table in self.tables:
            for suffix, form in FORMATS.items():
                contents[f"tables/{table.name}.{suffix}"] = form(table).encode()
        orders = {pipeline(run): None for run in study.runs}
        for number, order in enumerate(orders, 1):
            stem = "pipeline" if len(orders) == 1 else f"pipeline_{number}"
            contents[f"figures/{stem}.svg"] = order.encode()
        for drawing in drawn:
            for suffix, data in drawing.files.items():
                contents[f"figures/{drawing.name}.{suffix}"] = data
        links = [file.relative_to(self.directory).as_posix() for file in self.links]
        remarks = self._remarks + skipped
        contents[PAGE] = page(study, self.tables, list(contents), remarks, links, self.failed).encode()
        return contents


def of_job(run_dir: Path | str, devices: Sequence[Measured] = (), margin: float | None = None) -> Report:
    """The report of one job, whose files stand beside its run.json.

    Args:
        run_dir: the job's directory.
        devices: what was measured on other devices; those of artifacts that the job does not have are left to others.
        margin: a difference of the main metric below it counts as none, a fraction; None: as the job says.

    Raises:
        UserError: its run.json cannot be used.
    """
    run = read(Path(run_dir))
    own = {row.artifact for row in run.rows}
    here = [one for one in devices if one.content.artifact in own]
    return Report(Path(run_dir), [run], devices=here, margin=margin)


def of_study(
    study_dir: Path | str,
    failed: Sequence[str] = (),
    devices: Sequence[Measured] = (),
    margin: float | None = None,
    with_pages: bool = True,
) -> Report:
    """The report over all jobs below a directory.

    Args:
        study_dir: the sweep's directory.
        failed: a line for each job that failed or is missing.
        devices: what was measured on other devices.
        margin: a difference of the main metric below it counts as none, a fraction; None: as the jobs say.
        with_pages: whether the jobs have pages of their own.

    Raises:
        UserError: there is no run.json below it, or one cannot be used.
    """
    top = Path(study_dir)
    files = find(top)
    jobs = [file.parent / PAGE if with_pages else file for file in files if file.parent != top]
    return Report(top, [read(file) for file in files], jobs, failed, devices, margin)


def rebuild(
    directory: Path | str, devices: Sequence[Measured] = (), margin: float | None = None
) -> tuple[dict[str, Path], Report]:
    """Writes everything again: each job's, and the study's where the directory is not itself a job's.

    Args:
        directory: the job's or the study's.
        devices: what was measured on other devices.
        margin: a difference of the main metric below it counts as none, a fraction; None: as the jobs say.

    Returns:
        The files written, by their path relative to the directory, and the report of the directory itself.

    Raises:
        UserError: a run.json cannot be used, a device's artifact is in none, or a margin is none.
    """
    top = Path(directory)
    files = find(top)
    merged([read(file) for file in files], devices)  # refused before anything is written
    written: dict[str, Path] = {}
    for file in files:
        job, report = file.parent.relative_to(top), of_job(file.parent, devices, margin)
        written |= {(job / name).as_posix(): path for name, path in report.write().items()}
    if files[0].parent != top:
        report = of_study(top, devices=devices, margin=margin)
        written |= report.write()
    return written, report


def _without_predictions(study: Study) -> list[str]:
    """Which rows have no predictions, although run.json names some."""
    lost = {run.file.parent / "predictions": names for run in study.runs if (names := missing(run))}
    if not lost:
        return []
    where, names = next(iter(lost.items()))
    more = f" and of {len(lost) - 1} other jobs" if len(lost) > 1 else ""
    return [
        f"Comparisons, and intervals over examples: no predictions in {where} of {', '.join(names)}{more}; expected "
        "those that run.json names"
    ]


def _with_published(study: Study, built: list[Table]) -> tuple[list[Table], list[str]]:
    """The tables and the published figures beside ours; and why these are missing where they are."""
    named = [run for run in study.runs if run.published]
    if not named:
        return built, []
    found = []
    for run in named:
        if (file := _locate(run)) is None:
            return built, [f"Published figures: {run.published} was not found"]
        found.append(file)
    if len(named) < len(study.runs) or len({file.read_bytes() for file in found}) > 1:
        return built, ["Published figures: not all jobs name the same, see their own pages"]
    try:
        table = literature.compare(study, literature.read(found[0]))
    except UserError as error:
        # Our own numbers must not be lost over somebody else's.
        return built, [f"Published figures: {error}"]
    return built + ([explained(table)] if table is not None else []), []


def _locate(run: Run) -> Path | None:
    """The file that a run.json names: beside it, seen from a directory above it, as a clone is, or from here."""
    assert run.published is not None
    folders = (run.file.parent, *run.file.resolve().parents, Path())
    return next((path for folder in folders if (path := folder / run.published).is_file()), None)
