"""Tasks, metrics and splits as papers print them."""

from __future__ import annotations

from edgemin.report.grid import Column

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
    "micro_f1": ("Micro-F1", "%"),
    "matthews": ("Matthews", "x100"),
    "pearson": ("Pearson", "x100"),
    "spearman": ("Spearman", "x100"),
}


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
