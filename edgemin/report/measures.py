"""The numbers that tables show of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edgemin.report.fold import Study
from edgemin.report.grid import CORE, FULL, MAIN, PAGE, Column
from edgemin.report.measure import Measure
from edgemin.report.titles import metric_column, metric_title, split_title, task_title

MIB = 2.0**-20
TORCH = "torch"
"""The runtime of all tables but that of runtimes."""
FORMS = {"padded": "padded", "task": "own length"}
"""What is timed, and how titles call it: sentences padded to one length, or the task's own as they are."""
REFERENCES = ("teacher", "student")

_NOT_METRICS = ("loss", "n")


def primary_metrics(study: Study) -> list[Measure]:
    """The metric that each job's task lists first, on its first split."""
    return [own_metric(metric) for metric in dict.fromkeys(run.task.metric for run in study.runs) if metric]


def further_metrics(study: Study) -> list[Measure]:
    """The other metrics of each job's own task on its first split."""
    found: dict[str, None] = {}
    for run in study.runs:
        for row in run.rows:
            values = row.metrics.get(run.task.name or "", {}).get(run.first_split or "", {})
            found.update(dict.fromkeys(key for key in values if key not in _NOT_METRICS))
    primary = {run.task.metric for run in study.runs}
    return [own_metric(metric, MAIN) for metric in found if metric not in primary]


def own_metric(metric: str, level: int = CORE) -> Measure:
    """A metric of each job's own task on its first split."""
    return Measure("metrics", metric, metric_column(metric, metric, "", level))


def other_splits(study: Study) -> list[Measure]:
    """The primary metric on the reported splits after the first."""
    found: dict[tuple[str, str, str], None] = {}
    for run in study.runs:
        if run.task.name and run.task.metric:
            found.update(dict.fromkeys((run.task.name, split, run.task.metric) for split in run.splits[1:]))
    measures = []
    for task, split, metric in found:
        title = f"{metric_title(metric)} {split_title(split)}"
        column = metric_column(metric, f"{task}_{split}_{metric}", title, MAIN)
        measures.append(Measure("metrics", metric, column, task=task, split=split))
    return measures


PARAMS = Measure("cost", "params", Column("params", "Params", "M", 1e-6, 2, True, True, MAIN))
VISIBLE = Measure(
    "cost",
    "params_visible",
    Column("params_visible", "Visible params", "M", 1e-6, 2, True, True, PAGE),
    note="visible to parameters(), the paper's count: of a dynamically quantized model, embeddings and LayerNorms only",
)
FLOPS = Measure("cost", "flops", Column("flops", "FLOPs", "G", 1e-9, 3, True, True, MAIN))
MACS = Measure("cost", "macs", Column("macs", "MACs", "G", 1e-9, 3, True, True, PAGE))


def _in_torch(name: str, title: str, unit: str, factor: float, digits: int, **more: Any) -> Measure:
    return Measure("cost", name, Column(name, title, unit, factor, digits, **more), TORCH)


SIZE = _in_torch("size_bytes", "Size", "MiB", MIB, 2, fine=True, exact=True, level=CORE)
PEAK_MEMORY = _in_torch("peak_memory_bytes", "Peak memory", "MiB", MIB, 0, level=PAGE)
ENERGY = _in_torch("energy_mj", "Energy", "mJ", 1.0, 1, fine=True, level=PAGE)
POWER = _in_torch("power_w", "Power", "W", 1.0, 1)
MODEL_MEMORY = _in_torch("model_memory_bytes", "Model memory", "MiB", MIB, 0)
DETAILS = (
    _in_torch("runtime_memory_bytes", "Runtime memory", "MiB", MIB, 0),
    MODEL_MEMORY,
    POWER,
    _in_torch("threads", "Threads", "", 1.0, 0, exact=True),
)


COLD_START = tuple(
    replace(
        _in_torch("cold_start_ms", f"Cold start, {title}", "ms", 1.0, 0, level=FULL),
        column=Column(f"cold_start_{part}_ms", f"Cold start, {title}", "ms", 1.0, 0, level=FULL),
        statistic=part,
        note="in a fresh process, the runtime's library imported and the files in memory",
    )
    for part, title in (("load", "load"), ("first_answer", "first answer"))
)


def latency(form: str, statistic: str, level: int) -> Measure:
    """A statistic of the latency, or `n`, the number of timings it is formed of."""
    title = f"Latency {statistic}, {FORMS[form]}"
    if statistic == "n":
        column = Column(f"latency_{form}_timed_sentences", title, digits=0, level=level)
    else:
        column = Column(f"latency_{form}_{statistic}_ms", title, "ms", 1.0, 2, True, level=level)
    return Measure("cost", "latency_ms", column, TORCH, form, statistic)


def of_other_task(task: str, statistic: str, level: int) -> Measure:
    """As `latency`, on the sentences of a task that rows are scored on beside their own."""
    found = latency("task", statistic, level)
    column = found.column
    named = replace(column, key=f"{task}_{column.key}", title=f"{task_title(task)}: {column.title}")
    return replace(found, form="transfer", task=task, column=named)


def throughput(form: str, level: int) -> Measure:
    """How many sentences per second a model answers, one after the other."""
    column = Column(f"throughput_{form}_per_s", f"Throughput, {FORMS[form]}", "1/s", 1.0, 1, True, level=level)
    return Measure("cost", "throughput_per_s", column, TORCH, form)


def ratio(kind: str, reference: str, level: int) -> Measure:
    """`compression`, `params` or `flops`: the reference's divided by the row's own."""
    title = {"compression": "Compression", "params": "Params ratio", "flops": "FLOPs ratio"}[kind]
    column = Column(f"{kind}_ratio_to_{reference}", f"{title} vs {reference}", "x", 1.0, 2, exact=True, level=level)
    return Measure("delta", f"{kind}_ratio", column, TORCH if kind == "compression" else None, reference=reference)


def speed_up(form: str, reference: str, level: int, statistic: str | None = None) -> Measure:
    """The reference's median latency divided by the row's own; or `p10` or `p90` of that ratio over the rounds."""
    title, key = f"Speed-up vs {reference}, {FORMS[form]}", f"speed_up_{form}_to_{reference}"
    if statistic is not None:
        title, key = f"{title}, {statistic}", f"{key}_{statistic}"
    return Measure(
        "delta", "speed_up", Column(key, title, "x", 1.0, 2, level=level), TORCH, form, statistic, reference=reference
    )


def speed_ups_over_rounds(references: Sequence[str] = REFERENCES) -> list[Measure]:
    """The p10 and the p90 over rounds of every speed-up, for CSV only."""
    return [
        speed_up(form, reference, FULL, statistic)
        for reference in references
        for form in FORMS
        for statistic in ("p10", "p90")
    ]


def less(of: Measure, level: int, reference: str = "teacher") -> Measure:
    """How much less of a cost a row needs, as a share of the reference's in the same runtime."""
    stem, title = of.name.rpartition("_")[0], of.column.title.removeprefix("Model ").lower()
    column = Column(f"{stem}_less_than_{reference}_fraction", f"Less {title} than {reference}", "%", 100.0, 1)
    return replace(of, part="less", column=replace(column, level=level), reference=reference)


def retained(reference: str, level: int) -> Measure:
    """The primary metric as a share of the reference's."""
    key, title = f"metric_retained_of_{reference}_fraction", f"Retained vs {reference}"
    return Measure("delta", "metric_retained", Column(key, title, "%", 100.0, 1, level=level), reference=reference)


def difference(reference: str, level: int) -> Measure:
    """The primary metric less the reference's."""
    key, title = f"metric_less_{reference}_fraction", f"Metric minus {reference}"
    return Measure("delta", "metric", Column(key, title, "pp", 100.0, 2, level=level), reference=reference)


_AGREEMENT = Column("agreement_with_torch_fraction", "Same answers as torch", "%", 100.0, 2, level=CORE, exact=True)
AGREEMENT = Measure("cost", "agreement", _AGREEMENT, TORCH)
_DIFFERENCE = Column("largest_logit_difference", "Largest logit difference", "", 1.0, 4, level=MAIN, exact=True)
LARGEST_DIFFERENCE = Measure("cost", "largest_difference", _DIFFERENCE, TORCH)


def in_runtime(measure: Measure, runtime: str) -> Measure:
    """The same measure in another runtime; torch's metrics are the row's own."""
    return replace(measure, runtime=None if measure.is_metric and runtime == TORCH else runtime)


def served(measures: Sequence[Measure], study: Study) -> list[Measure]:
    """Times in the runtime that serves the rows, where that is one beside torch; then torch's are in the CSV alone.

    It is where every row was timed in torch and in one other runtime.
    """
    beside = {frozenset(row.cost.runtimes) - {TORCH} for run in study.runs for row in run.rows}
    if len(beside) != 1 or len(names := beside.pop()) != 1:
        return list(measures)
    (runtime,) = names
    found = []
    for measure in measures:
        if measure.form is not None and measure.runtime == TORCH and measure.column.level < FULL:
            key, title = f"{runtime}_{measure.column.key}", f"{measure.column.title}, {runtime}"
            found.append(replace(in_runtime(measure, runtime), column=replace(measure.column, key=key, title=title)))
            measure = replace(measure, column=replace(measure.column, level=FULL))
        found.append(measure)
    return found


def for_task(measure: Measure, task: str, several: bool) -> Measure:
    """A measure of one task's job; its heading names the task where there are several."""
    if not several:
        return measure
    column = measure.column
    named = replace(column, key=f"{task}_{column.key}", title=f"{task_title(task)}: {column.title}")
    return replace(measure, job_task=task, column=named)


def full(measures: Sequence[Measure]) -> list[Measure]:
    """The same measures, for CSV only."""
    return [replace(measure, column=replace(measure.column, level=FULL)) for measure in measures]
