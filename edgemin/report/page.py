"""The page of a job or a study: what ran, its tables, its figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import PurePosixPath

from edgemin.report.fields import Host
from edgemin.report.fold import Study
from edgemin.report.gate import gate_details
from edgemin.report.grid import Table
from edgemin.report.render import escape_markdown, markdown, markdown_paragraph

_FOLDED_AWAY_FROM = 40
"""Tables of more rows than this open on a click."""


def page(
    study: Study,
    tables: Sequence[Table],
    files: Sequence[str],
    remarks: Sequence[str],
    jobs: Sequence[str],
    failed: Sequence[str] = (),
) -> str:
    """Writes report.md.

    Args:
        study: the jobs.
        tables: the tables to show.
        files: the files beside the page, relative to it; its figures are taken from among them.
        remarks: what could not be shown, and why.
        jobs: the page of each job, or where it has none its run.json, relative to this page.
        failed: a line for each job that failed or is missing.
    """
    runs = study.runs
    lines = [f"# {escape_markdown(', '.join(dict.fromkeys(run.study for run in runs)))}", ""]
    lines += _facts(study)
    lines += _list(failed_jobs(len(runs), failed), failed)
    warnings = dict.fromkeys(warning for run in runs for warning in run.warnings)
    lines += _list("Warnings", [*warnings])
    lines += _list("Quality gates not passed", gate_details(study))
    lines += _list("Not shown", remarks)
    lines += ["## Tables", ""]
    for table in tables:
        stem = f"tables/{table.name}"
        links = f"[CSV]({stem}.csv), [LaTeX]({stem}.tex), [Markdown]({stem}.md)"
        if len(table.rows) > _FOLDED_AWAY_FROM:
            summary = f"<summary>{escape(table.title)} ({len(table.rows)} rows)</summary>"
            lines += ["<details>", summary, "", markdown(table), "</details>", "", links, ""]
        else:
            lines += [markdown(table), links, ""]
    lines += ["## Figures", ""]
    for stem in dict.fromkeys(file.rpartition(".")[0] for file in files if file.startswith("figures/")):
        kinds = [file for file in files if file.rpartition(".")[0] == stem]
        shown = next((file for file in kinds if file.endswith(".png")), kinds[0])
        name = PurePosixPath(stem).name.replace("_", " ")
        others = ", ".join(f"[{file.rpartition('.')[2].upper()}]({file})" for file in kinds)
        lines += [f"![{name}]({shown})", "", others, ""]
    if jobs:
        lines += ["## Jobs", ""]
        lines += [f"- [{PurePosixPath(job).parent}]({job})" for job in jobs]
        lines.append("")
    return "\n".join(lines)


def failed_jobs(finished: int, failed: Sequence[str]) -> str:
    """What stands above the list of jobs that the tables lack: `2 of 9 jobs have no result`."""
    jobs = finished + len(failed)
    return f"{len(failed)} of {jobs} job{'s' * (jobs > 1)} {'has' if len(failed) == 1 else 'have'} no result"


def _list(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    return [f"## {title}", "", *(f"- {markdown_paragraph(item)}" for item in items), ""]


def _facts(study: Study) -> list[str]:
    """What ran, where: one line each, all values of all jobs."""

    def each(*values: object) -> str:
        known = dict.fromkeys(str(value) for value in values if value not in (None, "", {}))
        return ", ".join(known)

    runs = study.runs
    facts = {
        "Jobs": str(len(runs)) if len(runs) > 1 else "",
        "Task": each(*(run.task.name for run in runs)),
        "Order": each(*(run.order.name for run in runs)),
        "Seed": each(*(run.seed for run in runs)),
        "Command": each(*(run.job.command for run in runs)),
        "Machine": each(*(_host(run.host) for run in runs)),
        "Device": each(*(run.device for run in runs)),
        "Precision of training": each(*(run.precision for run in runs)),
        "Versions": each(*(", ".join(f"{name} {number}" for name, number in run.versions.items()) for run in runs)),
        "Ended": each(*(run.ended for run in runs[-1:])),
    }
    return [*(f"- {name}: {escape_markdown(value)}" for name, value in facts.items() if value), ""]


def _host(host: Host) -> str:
    counts = {"cores": host.cores, "threads": host.threads}
    parts = [host.cpu] if host.cpu else []
    return ", ".join(parts + [f"{count} {name}" for name, count in counts.items() if count])
