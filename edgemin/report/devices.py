"""Measurements that bundles made of themselves on other devices: device.json, set beside the row of its artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from edgemin.errors import UserError
from edgemin.report.fields import (
    Batch,
    Costs,
    Delta,
    Difference,
    Latencies,
    Latency,
    PerForm,
    Ratios,
    Row,
    Runtime,
)
from edgemin.report.findings import Fields, Findings
from edgemin.report.schema import Run, load, wrong
from edgemin.report.values import Cost, Count, Text, Time

FILE = "device.json"
_SCHEMA = 1
_LENGTH = 128
"""The padded length of the tables; a device that was not measured at it stands with the nearest length that it has."""


class _Device(Fields):
    """What a device says of itself."""

    name: str
    cpu: Text = None
    system: Text = None


class _Cell(Fields):
    """The timings of batches of one size and length."""

    batch: Count
    length: Count
    p10_ms: Time = None
    p50_ms: Time = None
    p90_ms: Time = None
    n: Cost = None
    sentences_per_s: Cost = None


class _Content(Fields):
    """What is shown of a device.json."""

    artifact: str
    runtime: str
    device: _Device
    threads: Count
    peak_memory_bytes: Cost = None
    latency: list[_Cell]


class _Where(NamedTuple):
    """What two measurements share that may be compared."""

    device: str
    runtime: str


@dataclass(frozen=True)
class Measured:
    """What one device.json says.

    Args:
        file: where it was read from.
        content: what it says.
        cell: its timings of single sentences, of the length nearest to that of the tables.
    """

    file: Path
    content: _Content
    cell: _Cell

    @property
    def where(self) -> _Where:
        """The device, the threads it was given, and the runtime."""
        threads = self.content.threads
        device = f"{self.content.device.name}, {threads} thread{'s' * (threads > 1)}"
        return _Where(device, self.content.runtime)


def find(words: str) -> list[Path]:
    """The device.json files that a user named.

    Args:
        words: files, or directories that hold them or have them below, with commas between; in brackets or not.

    Raises:
        UserError: a directory without any.
    """
    found: dict[Path, None] = {}
    for word in words.strip("[]").split(","):
        path = Path(word.strip().strip("'\""))
        files = sorted(path.rglob(FILE)) if path.is_dir() else [path]
        if not files or not word.strip():
            raise UserError(
                f"devices: expected files {FILE} or directories with some, given {word.strip() or 'nothing'}"
            )
        found |= dict.fromkeys(files)
    return list(found)


def read(file: Path) -> Measured:
    """Reads one device.json.

    Raises:
        UserError: there is no such file, it is not JSON, not this schema, or a field has the wrong type.
    """
    data = load(file, f"a bundle's {FILE}")
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected a JSON object, given another value")
    schema = data.get("schema")
    if schema != _SCHEMA or isinstance(schema, bool):
        raise UserError(f"{file}: schema: expected {_SCHEMA}, given {str(schema)[:40]}")
    try:
        content = _Content.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{file}: {wrong(error)}") from None
    single = [cell for cell in content.latency if cell.batch == 1 and cell.p50_ms is not None]
    if not single:
        raise UserError(f"{file}: latency: expected timings of batch 1, given none")
    return Measured(file, content, min(single, key=lambda cell: (abs(cell.length - _LENGTH), cell.length)))


def merged(runs: Sequence[Run], measured: Sequence[Measured]) -> list[Run]:
    """The runs with a further row, `<row> on <device>`, behind each row that a device has measured.

    Raises:
        UserError: the artifact of a device.json is in no run, or two are of the same artifact, device and runtime.
    """
    artifacts = {row.artifact for run in runs for row in run.rows}
    seen: dict[tuple[str, _Where], Path] = {}
    for one in measured:
        if one.content.artifact not in artifacts:
            raise UserError(
                f"{one.file}: artifact: expected that of a row of the study, given {one.content.artifact[:80]}"
            )
        other = seen.setdefault((one.content.artifact, one.where), one.file)
        if other != one.file:
            raise UserError(f"{one.file}: expected one file of each artifact, device and runtime, given {other} too")
    return [run.model_copy(update={"rows": _rows(run, measured)}) for run in runs]


def _rows(run: Run, measured: Sequence[Measured]) -> list[Row]:
    rows = []
    for row in run.rows:
        own = [one for one in measured if one.content.artifact == row.artifact]
        devices = dict.fromkeys(one.where.device for one in own)
        rows.append(row)
        for device in devices:
            there = [one for one in own if one.where.device == device]
            rows.append(_row(run, row, device, there, measured))
    return rows


def _row(run: Run, row: Row, device: str, own: Sequence[Measured], measured: Sequence[Measured]) -> Row:
    """A row as a device has measured it, in each of its runtimes."""
    teacher = run.reference("teacher", row)
    ratios = {}
    for one in own:
        theirs = next((other for other in measured if teacher is not None and _comparable(one, other, teacher)), None)
        if theirs is not None and theirs.cell.p50_ms is not None and one.cell.p50_ms is not None:
            ratios[one.where.runtime] = Ratios(speed_up=PerForm(padded=theirs.cell.p50_ms / one.cell.p50_ms))
    counted = {name: getattr(row.cost, name) for name in ("params", "params_visible", "macs", "flops")}
    return Row(
        name=f"{row.name} on {device}",
        model=row.model,
        stages=row.stages,
        control=row.control,
        artifact=row.artifact,
        cost=Costs(**counted, runtimes={one.where.runtime: _cost(row, one) for one in own}),
        delta=Delta(teacher=Difference(runtimes=ratios)),
        notes=list(dict.fromkeys(_note(one) for one in own)),
        findings=Findings(quantization=row.findings.quantization),
        device=device,
    )


def _comparable(one: Measured, other: Measured, teacher: Row) -> bool:
    return (
        other.content.artifact == teacher.artifact and other.where == one.where and other.cell.length == one.cell.length
    )


def _cost(row: Row, one: Measured) -> Runtime:
    """What the device measured, and the size, which is that of the same export."""
    here, cell, content = row.cost.runtimes.get(one.where.runtime, Runtime()), one.cell, one.content
    padded = Latency(length=cell.length, p10=cell.p10_ms, p50=cell.p50_ms, p90=cell.p90_ms, n=cell.n)
    return Runtime(
        size_bytes=here.size_bytes,
        latency_ms=Latencies(padded=padded),
        throughput_per_s=PerForm(padded=cell.sentences_per_s),
        peak_memory_bytes=content.peak_memory_bytes,
        threads=content.threads,
        grid=[
            Batch(
                batch=found.batch,
                length=found.length,
                p10=found.p10_ms,
                p50=found.p50_ms,
                p90=found.p90_ms,
                n=found.n,
                sentences_per_s=found.sentences_per_s,
            )
            for found in content.latency
        ],
    )


def _note(one: Measured) -> str:
    device = one.content.device
    what = ", ".join(part for part in (device.cpu, device.system) if part)
    return (
        f"measured there{f' ({what})' if what else ''} by the bundle's bench.py: batch 1, {one.cell.length} tokens, "
        "half of them padding; not in turns with other rows"
    )
