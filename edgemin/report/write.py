"""Writes and prints the tables, figures and pages of jobs and studies, from their run.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from edgemin.errors import UserError
from edgemin.plain_text import printable
from edgemin.report import published as literature
from edgemin.report.against_figure import against
from edgemin.report.bits_figure import bits_figures
from edgemin.report.comparisons import comparisons
from edgemin.report.devices import Measured, merged
from edgemin.report.figures import figures
from edgemin.report.fold import Study, fold
from edgemin.report.grid import Table
from edgemin.report.order_figure import pipeline
from edgemin.report.page import failed_jobs, page
from edgemin.report.paired import missing
from edgemin.report.pruning_figure import prunings
from edgemin.report.render import FORMATS, terminal
from edgemin.report.runtimes_figure import latencies
from edgemin.report.schema import Run, find, read
from edgemin.report.sensitivity_figure import sensitivities
from edgemin.report.tables import tables


def write_job(run_dir: Path | str, devices: Sequence[Measured] = (), margin: float | None = None) -> dict[str, Path]:
    """Writes the tables, figures and page of one job beside its run.json.

    Args:
        run_dir: the job's directory.
        devices: what was measured on other devices; those of artifacts that the job does not have are left to others.
        margin: a difference of the main metric below it counts as none, a fraction; None: as the job says.

    Returns:
        The files written, by their path relative to the directory: `tables/stages.md`, `report.md` ...

    Raises:
        UserError: its run.json, or the published figures it names, cannot be used.
    """
    run = read(Path(run_dir))
    own = {row.artifact for row in run.rows}
    here = [one for one in devices if one.content.artifact in own]
    return _write(Path(run_dir), [run], [], devices=here, margin=margin)


def write_study(
    study_dir: Path | str,
    failed: Sequence[str] = (),
    devices: Sequence[Measured] = (),
    margin: float | None = None,
) -> dict[str, Path]:
    """Writes the tables, figures and page over all jobs below a directory.

    Args:
        study_dir: the sweep's directory.
        failed: a line for each job that failed or is missing, for the page.
        devices: what was measured on other devices.
        margin: a difference of the main metric below it counts as none, a fraction; None: as the jobs say.

    Returns:
        The files written, by their path relative to the directory.

    Raises:
        UserError: there is no run.json below it, or one cannot be used.
    """
    top = Path(study_dir)
    files = find(top)
    jobs = [file.parent for file in files if file.parent != top]
    return _write(top, [read(file) for file in files], jobs, failed, devices, margin)


def rebuild(directory: Path | str, devices: Sequence[Measured] = (), margin: float | None = None) -> dict[str, Path]:
    """Writes everything again: each job's, and the study's where the directory is not itself a job's.

    Args:
        directory: the job's or the study's.
        devices: what was measured on other devices.
        margin: a difference of the main metric below it counts as none, a fraction; None: as the jobs say.

    Returns:
        The files written, by their path relative to the directory.

    Raises:
        UserError: a run.json cannot be used, a device's artifact is in none, or a margin is none.
    """
    top = Path(directory)
    files = find(top)
    merged([read(file) for file in files], devices)  # refused before anything is written
    written: dict[str, Path] = {}
    for file in files:
        job = file.parent.relative_to(top)
        written |= {(job / name).as_posix(): path for name, path in write_job(file.parent, devices, margin).items()}
    if files[0].parent != top:
        written |= write_study(top, devices=devices, margin=margin)
    return written


def study_tables(directory: Path | str) -> list[Table]:
    """The tables of a job, or over all jobs below a directory, as `rebuild` writes them.

    Raises:
        UserError: there is no run.json, or one cannot be used.
    """
    study = fold([read(file) for file in find(directory)])
    return _tables(study, study)[0]


def print_job(run_dir: Path | str, file: TextIO | None = None) -> None:
    """Prints a job's main tables.

    They are the stage table, or Tables III and IV where no task was run; then the published figures
    beside ours.

    Args:
        run_dir: the job's directory.
        file: where to; standard output by default.
    """
    _print([read(Path(run_dir))], file)


def print_study(
    study_dir: Path | str,
    file: TextIO | None = None,
    failed: Sequence[str] = (),
    devices: Sequence[Measured] = (),
    margin: float | None = None,
) -> None:
    """Prints the main tables over all jobs below a directory.

    Args:
        study_dir: the sweep's directory.
        file: where to; standard output by default.
        failed: a line for each job that failed or is missing, to be printed below the tables.
        devices: what was measured on other devices.
        margin: a difference of the main metric below it counts as none, a fraction; None: as the jobs say.
    """
    runs = [read(path) for path in find(study_dir)]
    _print(runs, file, devices, margin)
    if failed:
        said = [f"{failed_jobs(len(runs), failed)}:", *(f"  {printable(line)}" for line in failed)]
        print("\n".join(said), file=file)


def _print(
    runs: Sequence[Run], file: TextIO | None, devices: Sequence[Measured] = (), margin: float | None = None
) -> None:
    study = fold(runs)
    built, remarks = _tables(study, fold(merged(runs, devices)), margin)
    main = ("stages",) if study.tasks else ("table3_size", "table4_flops")
    for table in built:
        if table.name in (*main, "comparisons", "broken", "runtimes", "grid", "profile", "published"):
            terminal(table, file)
    for remark in remarks:
        print(remark, file=file)


def _tables(study: Study, with_devices: Study, margin: float | None = None) -> tuple[list[Table], list[str]]:
    """The tables, the published figures beside ours last; and why something is missing where it is."""
    built, published_remarks = _with_published(study, tables(study, with_devices, margin))
    return built, [*_without_predictions(study), *published_remarks]


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
    names = [*dict.fromkeys(run.published for run in study.runs if run.published)]
    if not names:
        return built, []
    if len(names) > 1:
        return built, ["Published figures: the jobs name different ones, see their own pages"]
    path = _locate(names[0], study.runs)
    if path is None:
        return built, [f"Published figures: {names[0]} was not found"]
    try:
        table = literature.compare(study, literature.read(path))
    except UserError as error:
        # Our own numbers must not be lost over somebody else's.
        return built, [f"Published figures: {error}"]
    return built + ([table] if table is not None else []), []


def _locate(name: str, runs: Sequence[Run]) -> Path | None:
    """A file that run.json names: as it stands, or seen from a directory above the run, as a clone is."""
    above = [folder / name for run in runs for folder in run.file.resolve().parents]
    return next((path for path in (Path(name), *above) if path.is_file()), None)


def _write(
    top: Path,
    runs: Sequence[Run],
    jobs: Sequence[Path],
    failed: Sequence[str] = (),
    devices: Sequence[Measured] = (),
    margin: float | None = None,
) -> dict[str, Path]:
    if not any(run.rows for run in runs):
        raise UserError(f"{runs[0].file}: rows: expected at least one row, given none")
    study = fold(runs)
    with_devices = fold(merged(runs, devices))
    built, remarks = _tables(study, with_devices, margin)
    drawn, skipped = figures(study)
    drawn += against(comparisons(study, margin))
    drawn += latencies(with_devices) + bits_figures(study) + sensitivities(study) + prunings(study)
    contents: dict[str, bytes] = {}
    for table in built:
        for suffix, form in FORMATS.items():
            contents[f"tables/{table.name}.{suffix}"] = form(table).encode()
    orders = {pipeline(run): None for run in study.runs}
    for number, order in enumerate(orders, 1):
        stem = "pipeline" if len(orders) == 1 else f"pipeline_{number}"
        contents[f"figures/{stem}.svg"] = order.encode()
    for drawing in drawn:
        for suffix, data in drawing.files.items():
            contents[f"figures/{drawing.name}.{suffix}"] = data
    links = [job.relative_to(top).as_posix() for job in jobs]
    contents["report.md"] = page(study, built, list(contents), remarks + skipped, links, failed).encode()
    written = {}
    for name, data in contents.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        written[name] = path
    return written
