"""The table of comparisons, and the marks that it leaves on other tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgemin.report.comparisons import EQUIVALENT, Comparison
from edgemin.report.fold import Statistic, Study
from edgemin.report.grid import CORE, FULL, MAIN, PAGE, Cell, Column, Footnotes, Table
from edgemin.report.paired import BOOTSTRAP, MCNEMAR, OVER_SEEDS
from edgemin.report.titles import metric_word

_POINTS = Column("difference_fraction", "Difference", "points", 100.0, 2, level=CORE)
_SHARE = Column("share_of_examples_fraction", "Share of examples", "%", 100.0, 0, level=MAIN)
_INTERVALS = {
    MCNEMAR: "one pair of models: McNemar's mid-p, and Bonett and Price's interval, for other examples",
    BOOTSTRAP: "one pair of models: a bootstrap over examples, both models on the same ones, for other examples",
    OVER_SEEDS: "t test and t interval of the differences seed by seed, for other seeds and other examples",
}


def table(study: Study, found: Sequence[Comparison]) -> Table | None:
    """Every comparison with its interval, its p and its verdict; None where there is none."""
    if not found:
        return None
    footnotes = Footnotes(general=_notes(found))
    several = any(len(one.differences) > 1 for one in found)
    corrected = footnotes.mark([_family(found)])
    columns = [
        *(Column(key, key, level=CORE, text=True) for key in study.keys),
        Column("name", "Model", level=CORE, text=True),
        Column("against", "Against", level=CORE, text=True),
        _POINTS,
        Column("interval", "95 %", level=CORE, text=True, in_csv=False),
        replace(_POINTS, key="low_fraction", title="95 % from", level=FULL),
        replace(_POINTS, key="high_fraction", title="95 % to", level=FULL),
        Column("p", "p", digits=3, level=FULL),
        Column("p_corrected", "p, corrected", digits=3, level=CORE, marks=corrected),
        *([replace(_SHARE, marks=footnotes.mark([_SHARE_NOTE]))] if several else []),
        Column("p_equivalent", f"p, less than {_points(found)}", digits=3, level=PAGE),
        Column("verdict", "Verdict", level=CORE, text=True),
        Column("role", "Role", level=FULL, text=True),
        Column("metric", "Metric", level=FULL, text=True),
        Column("test", "Test", level=FULL, text=True),
        Column("examples", "Examples", digits=0, level=FULL),
        Column("seeds", "Seeds", digits=0, level=FULL),
        Column("margin_fraction", "Margin", level=FULL),
    ]
    rows = [_cells(one, several) for one in found]
    names = [(one.labels, one.row) for one in found]
    sections = tuple(place for place in range(1, len(found)) if names[place] != names[place - 1])
    metrics = " and ".join(dict.fromkeys(metric_word(one.metric) for one in found))
    title = f"Which differences of {metrics} are more than noise"
    return Table("comparisons", title, tuple(columns), tuple(rows), sections, footnotes.listed())


Doubts = Mapping[tuple[tuple[str, ...], str], str]
"""A footnote for the main metric of some rows, by their labels and names."""
NO_DOUBTS: Doubts = {}


def noise_notes(found: Sequence[Comparison]) -> Doubts:
    """The footnote of each row that differs from its parent by no more than noise, by its labels and its name."""
    return {
        (one.labels, one.row): "no more than noise away from the row it was made from: "
        f"{one.test}, p above 0.05{'' if one.corrected is None else ' after correction'}, {_counted([one])}"
        for one in found
        if one.role == "parent" and one.is_noise
    }


_SHARE_NOTE = "of the variance of the difference, what more examples would make smaller; more seeds the rest"


def _cells(one: Comparison, several: bool) -> tuple[Cell, ...]:
    def number(value: float | None) -> Cell:
        return Cell(None if value is None else Statistic(float(value), None, 1))

    named = one.role in ("parent", "control") and one.role not in one.other.lower()
    return (
        *map(Cell, (*one.labels, one.row, f"{one.other} ({one.role})" if named else one.other)),
        number(one.estimate),
        Cell(f"{100 * one.low:z.2f}, {100 * one.high:z.2f}"),
        *map(number, (one.low, one.high, one.p, one.corrected)),
        *([number(one.share)] if several else []),
        number(one.p_equivalent),
        *map(Cell, (one.verdict, one.role, one.metric, one.test)),
        *map(number, (one.examples, len(one.differences), one.margin)),
    )


def _points(found: Sequence[Comparison]) -> str:
    """The margin in points."""
    points = 100 * found[0].margin
    return f"{points:g} point{'' if points == 1 else 's'}"


def _counted(found: Sequence[Comparison]) -> str:
    """How many examples and seeds there were."""
    examples, seeds = ({one.examples for one in found}, {len(one.differences) for one in found})
    said = f"{_span(examples)} examples"
    return said if seeds == {1} else f"{said}, {_span(seeds)} seeds"


def _span(counts: set[int]) -> str:
    return " to ".join(str(count) for count in sorted({min(counts), max(counts)}))


def _family(found: Sequence[Comparison]) -> str:
    count = sum(one.corrected is not None for one in found)
    return f"by Holm's method over the {count} comparison{'s' * (count != 1)} of the family; the others keep their p"


def _notes(found: Sequence[Comparison]) -> list[str]:
    notes = [
        "a row less the one it is compared with, and the ends of the 95 % interval; better, worse: p below 0.05, "
        "corrected where there is a correction"
    ]
    for test, words in _INTERVALS.items():
        of_test = [one for one in found if one.test == test]
        notes += [f"{words} ({_counted(of_test)})"] if of_test else []
    within = f"less than {_points(found)}"
    notes.append(
        f"{EQUIVALENT}: shown to differ by {within} (two one-sided tests); too few to tell: too few to show "
        f"that even if there were no difference"
    )
    return notes
