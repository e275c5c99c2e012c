"""What the tables show of a row: where it lies in run.json, its unit, and how it is displayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgemin.report.fold import Line, Statistic, Study
from edgemin.report.grid import CORE, FULL, MAIN, PAGE, Column
from edgemin.report.schema import Row, Run

MIB = 2.0**-20
REFERENCES = ("teacher", "student")
REFERENCE_TITLES = {"teacher": "teacher", "student": "student baseline", "parent": "the row it was made from"}

_TASK_TITLES = {
    "sst2": "SST-2",
    "mnli": "MNLI",
    "qqp": "QQP",
    "cola": "CoLA",
    "mrpc": "MRPC",
    "qnli": "QNLI",
    "rte": "RTE",
    "stsb": "STS-B",
    "wnli": "WNLI",
}
_METRIC_TITLES = {
    "accuracy": ("Accuracy", "%"),
    "f1": ("F1", "%"),
    "macro_f1": ("Macro-F1", "%"),
    "matthews": ("Matthews", "x100"),
    "pearson": ("Pearson", "x100"),
    "spearman": ("Spearman", "x100"),
}
_NOT_METRICS = ("loss", "n")


@dataclass(frozen=True)
class Measure:
    """A number of a row.

    Args:
        path: the keys below the row; `{task}` stands for the job's task, `{split}` for its first split.
        column: how it is displayed.
        task: of which task's job, where tasks stand side by side.
        note: a footnote on the column.
        transfer: whether it is a zero-shot score (None: both kinds).
    """

    path: tuple[str, ...]
    column: Column
    task: str | None = None
    note: str = ""
    transfer: bool | None = None

    def read(self, run: Run, row: Row) -> float | None:
        """The number in one row; None where it is missing."""
        if self.transfer is not None and (self.path[1] in row.transfer) != self.transfer:
            return None
        names = {"{task}": run.task, "{split}": run.splits[0] if run.splits else None}
        path = [names.get(key, key) for key in self.path]
        return None if None in path else row.number(*(key for key in path if key is not None))

    def fold(self, line: Line) -> Statistic | None:
        """The number over the seeds of a row; None where it is missing.

        A row that several jobs share has no difference to a row that they do not share.
        """
        if self.path[0] == "delta":
            for jobs in line.seeds.values():
                found = {_artifact_of(self.path[1], run, row) for run, row in zip(jobs.runs, jobs.rows, strict=True)}
                if len(found) > 1:
                    return None
        return line.fold(self.read)


def _artifact_of(reference: str, run: Run, row: Row) -> str | None:
    """What a difference to the teacher, the student baseline or the parent is formed against."""
    if reference in REFERENCES:
        other = run.reference(reference)
    else:
        other = next((one for one in run.rows if one.name == row.made_from), None)
    return other.artifact if other is not None else None


def task_title(task: str) -> str:
    """A task's name as papers print it."""
    return _TASK_TITLES.get(task, task)


def metric_title(metric: str) -> str:
    """A metric's name as papers print it."""
    return _METRIC_TITLES.get(metric, (metric, ""))[0]


def metric_word(metric: str) -> str:
    """A metric's name inside a sentence: all but the accuracy are proper names."""
    return metric if metric == "accuracy" else metric_title(metric)


def split_title(split: str) -> str:
    """A split's name without what all validation splits share."""
    return split.removeprefix("validation_")


def metric_column(metric: str, key: str, title: str, level: int) -> Column:
    """The column of a metric: a fraction in CSV, times a hundred on the page."""
    known, unit = _METRIC_TITLES.get(metric, (metric, ""))
    suffix = "_fraction" if unit == "%" else ""
    factor, digits = (100.0, 2) if unit else (1.0, 4)
    return Column(key + suffix, title or known, unit, factor, digits, level=level)


def primary_metrics(study: Study) -> list[Measure]:
    """The metric that each job's task lists first, on its first split."""
    return [_own_metric(metric, CORE) for metric in dict.fromkeys(run.metric for run in study.runs) if metric]


def further_metrics(study: Study) -> list[Measure]:
    """The other metrics of each job's own task on its first split."""
    found: dict[str, None] = {}
    for run in study.runs:
        for row in run.rows:
            values = row.metrics.get(run.task or "", {}).get(run.splits[0] if run.splits else "", {})
            found.update(dict.fromkeys(key for key in values if key not in _NOT_METRICS))
    primary = {run.metric for run in study.runs}
    return [_own_metric(metric, MAIN) for metric in found if metric not in primary]


def _own_metric(metric: str, level: int) -> Measure:
    return Measure(("metrics", "{task}", "{split}", metric), metric_column(metric, metric, "", level))


def other_splits(study: Study) -> list[Measure]:
    """The primary metric on the reported splits after the first."""
    found: dict[tuple[str, str, str], None] = {}
    for run in study.runs:
        if run.task and run.metric:
            found.update(dict.fromkeys((run.task, split, run.metric) for split in run.splits[1:]))
    return [
        Measure(
            ("metrics", task, split, metric),
            metric_column(metric, f"{task}_{split}_{metric}", f"{metric_title(metric)} {split_title(split)}", MAIN),
        )
        for task, split, metric in found
    ]


SIZE = Measure(("cost", "size_bytes"), Column("size_bytes", "Size", "MiB", MIB, 2, True, True, CORE))
PARAMS = Measure(("cost", "params"), Column("params", "Params", "M", 1e-6, 2, True, True, MAIN))
VISIBLE = Measure(
    ("cost", "params_visible"),
    Column("params_visible", "Visible params", "M", 1e-6, 2, True, True, PAGE),
    note="visible to parameters(), the paper's count: of a dynamically quantized model, embeddings and LayerNorms only",
)
FLOPS = Measure(("cost", "flops"), Column("flops", "FLOPs", "G", 1e-9, 3, True, True, MAIN))
MACS = Measure(("cost", "macs"), Column("macs", "MACs", "G", 1e-9, 3, True, True, PAGE))
PEAK_MEMORY = Measure(
    ("cost", "peak_memory_bytes"), Column("peak_memory_bytes", "Peak memory", "MiB", MIB, 0, level=PAGE)
)
ENERGY = Measure(("cost", "energy_mj"), Column("energy_mj", "Energy", "mJ", 1.0, 1, True, level=PAGE))
DETAILS = (
    Measure(("cost", "runtime_memory_bytes"), Column("runtime_memory_bytes", "Runtime memory", "MiB", MIB, 0)),
    Measure(("cost", "model_memory_bytes"), Column("model_memory_bytes", "Model memory", "MiB", MIB, 0)),
    Measure(("cost", "power_w"), Column("power_w", "Power", "W", 1.0, 1)),
    Measure(("cost", "threads"), Column("threads", "Threads", "", 1.0, 0, exact=True)),
)


def latency(variant: str, statistic: str, level: int) -> Measure:
    """A statistic of the latency: `variant` is `padded` or `task`."""
    place = "padded" if variant == "padded" else "own length"
    title = f"Latency {statistic}, {place}"
    column = Column(f"latency_{variant}_{statistic}_ms", title, "ms", 1.0, 2, True, level=level)
    return Measure(("cost", "latency_ms", variant, statistic), column)


def throughput(variant: str, level: int) -> Measure:
    """Sentences per second."""
    place = "padded" if variant == "padded" else "own length"
    column = Column(f"throughput_{variant}_per_s", f"Throughput, {place}", "1/s", 1.0, 1, True, level=level)
    return Measure(("cost", "throughput_per_s", variant), column)


def ratio(kind: str, reference: str, level: int) -> Measure:
    """`compression`, `params` or `flops`: the reference's divided by the row's own."""
    title = {"compression": "Compression", "params": "Params ratio", "flops": "FLOPs ratio"}[kind]
    column = Column(f"{kind}_ratio_to_{reference}", f"{title} vs {reference}", "x", 1.0, 2, exact=True, level=level)
    return Measure(("delta", reference, f"{kind}_ratio"), column)


def speed_up(variant: str, reference: str, level: int) -> Measure:
    """The reference's median latency divided by the row's own."""
    place = "padded" if variant == "padded" else "own length"
    column = Column(
        f"speed_up_{variant}_to_{reference}",
        f"Speed-up vs {reference}, {place}",
        "x",
        1.0,
        2,
        level=level,
    )
    return Measure(("delta", reference, "speed_up", variant), column)


def retained(reference: str, level: int) -> Measure:
    """The primary metric as a share of the reference's."""
    column = Column(f"metric_retained_of_{reference}_fraction", f"Retained vs {reference}", "%", 100.0, 1)
    return Measure(("delta", reference, "metric_retained"), replace(column, level=level))


def difference(reference: str, level: int) -> Measure:
    """The primary metric less the reference's."""
    column = Column(f"metric_less_{reference}_fraction", f"Metric minus {reference}", "pp", 100.0, 2)
    return Measure(("delta", reference, "metric"), replace(column, level=level))


def for_task(measure: Measure, task: str, several: bool) -> Measure:
    """A measure of one task's job; its heading names the task where there are several."""
    if not several:
        return measure
    column = measure.column
    named = replace(column, key=f"{task}_{column.key}", title=f"{task_title(task)}: {column.title}")
    return replace(measure, task=task, column=named)


def full(measures: Sequence[Measure]) -> list[Measure]:
    """The same measures, for CSV only."""
    return [replace(measure, column=replace(measure.column, level=FULL)) for measure in measures]
