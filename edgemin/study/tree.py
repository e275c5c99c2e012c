"""A plan as a person reads it: the tree of nodes, what is stored, what is to do, and how long it may take."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from edgemin.progress import duration
from edgemin.store.artifacts import Store
from edgemin.study.nodes import Node, Plan
from edgemin.study.timing import Timings, signature
from edgemin.training.fitting import CHECKPOINT


class State(NamedTuple):
    """How one node stands: stored, begun or still to run, and what it takes; for one job or for several."""

    path: str
    key: str
    state: str  # `cached`, `resumes` or `to run`
    parent: str | None  # key of the node above it; `None` for the model that a path starts at
    steps: int = 0  # how many it trains
    seconds: float | None = None  # how long it may take; `None` where no like stage was timed
    jobs: tuple[int, ...] = (0,)  # the numbers of the jobs that need it


class Planned(NamedTuple):
    """What a job would do: its nodes as [`states`][edgemin.study.tree.states] has them, and what is worth knowing."""

    nodes: list[State]
    notes: list[str]


# Notes of a sweep's jobs, which were printed once for all of them.
told: set[str] = set()


def states(plan: Plan, store: Store, timed: bool = False) -> list[State]:
    """Every node of a plan, in the order in which they run.

    Args:
        plan: what the job needs.
        store: what is there already.
        timed: look in the store for how long like stages took here.
    """
    timings = Timings(store) if timed else None
    return [_state(node, store, timings) for node in plan.nodes]


def _state(node: Node, store: Store, timings: Timings | None) -> State:
    found = "to run"
    if store.has(node.key):
        found = "cached"
    elif (store.work_path(node.key) / CHECKPOINT).is_file():
        found = "resumes"
    parent = node.parent.key if node.parent is not None and "/" in node.path else None
    if found == "cached" or "/" not in node.path:
        return State(node.path, node.key, found, parent)
    assert node.step is not None
    steps = node.step.planned.steps
    seconds = timings.estimate(signature(node), steps) if timings is not None else None
    return State(node.path, node.key, found, parent, steps, seconds)


def merged(jobs: Sequence[Sequence[State]]) -> list[State]:
    """The nodes of several jobs, each once, with the numbers of the jobs that need it."""
    found: dict[tuple[str, str], State] = {}
    for number, nodes in enumerate(jobs):
        for node in nodes:
            before = found.get((node.path, node.key))
            found[node.path, node.key] = node._replace(jobs=(*(before.jobs if before else ()), number))
    return list(found.values())


def lines(nodes: Sequence[State], jobs: int = 1) -> list[str]:
    """The tree as text, a line per node below its parent, and the counts.

    Args:
        nodes: of one job, or of several as [`merged`][edgemin.study.tree.merged] has them.
        jobs: how many there are.
    """
    below: dict[tuple[str, str | None], list[State]] = {}
    for node in nodes:
        below.setdefault((node.path.rpartition("/")[0], node.parent), []).append(node)

    def drawn(above: tuple[str, str | None]) -> Iterable[str]:
        for node in below.get(above, []):
            yield _line(node, jobs)
            yield from drawn((node.path, node.key))

    return [*drawn(("", None)), summary(nodes), *_effort(nodes)]


def _line(node: State, jobs: int) -> str:
    depth = node.path.count("/")
    parts = [f"{'  ' * depth}{node.path.rpartition('/')[2]:<24} {node.state:<8} {node.key}"]
    if node.steps:
        parts.append(f"{node.steps:,} steps")
    if node.seconds is not None:
        parts.append(f"about {duration(node.seconds)}")
    if len(node.jobs) < jobs:
        parts.append(job_numbers(node.jobs))
    return "  ".join(parts)


def job_numbers(jobs: Sequence[int]) -> str:
    """The numbers as a person writes them, as in `jobs 0-2, 5`."""
    starts = [jobs[0], *(second for first, second in pairwise(jobs) if second != first + 1)]
    ends = [*(first for first, second in pairwise(jobs) if second != first + 1), jobs[-1]]
    runs = (f"{start}" if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))
    return f"job{'s' * (len(jobs) > 1)} {', '.join(runs)}"


def summary(nodes: Sequence[State]) -> str:
    """How many different nodes of each kind there are, over one plan or many; a key that comes twice counts once."""
    distinct = {node.key: node for node in nodes}.values()
    kinds = Counter(_kind(node.path) for node in distinct)
    found = Counter(node.state for node in distinct)
    by_state = ", ".join(f"{count} {state}" for state, count in found.items())
    return f"{len(distinct)} nodes ({by_state}): {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"


def _effort(nodes: Sequence[State]) -> list[str]:
    """A line with the steps of all that is to do, and its time as far as that is known."""
    to_do = [node for node in {node.key: node for node in nodes}.values() if node.parent and node.state != "cached"]
    if not to_do:
        return []
    line = f"{sum(node.steps for node in to_do):,} steps to train"
    timed = [node.seconds for node in to_do if node.seconds is not None]
    if timed:
        which = "" if len(timed) == len(to_do) else f" for the {len(timed)} of {len(to_do)} stages whose like was timed"
        line += f", about {duration(sum(timed))}{which}, scoring and measuring apart"
    return [line]


def _kind(path: str) -> str:
    return f"{path.partition('/')[0]} {path.rpartition('/')[2] if '/' in path else 'weights'}"


def print_plans(names: Sequence[str], planned: Sequence[Planned], *, whole: bool) -> None:
    """Print the plans of all jobs of a run or sweep as one tree.

    Args:
        names: the jobs' names; a run alone has an empty one.
        planned: their plans, in the order of their numbers.
        whole: whether the tree is printed; else a line that counts what there is to do.
    """
    nodes = merged([plan.nodes for plan in planned])
    if whole:
        print("\n".join([*filter(None, names), *lines(nodes, len(planned))]))
    else:
        print(f"{len(planned)} jobs planned: {summary(nodes)}")
        told.update(_by_note(planned))
    for note, jobs in _by_note(planned).items():
        print(f"note: {note}{f' ({job_numbers(jobs)})' if len(jobs) < len(planned) else ''}")
    sys.stdout.flush()


def _by_note(planned: Sequence[Planned]) -> dict[str, list[int]]:
    """Each different note, with the numbers of the jobs that have it."""
    found: dict[str, list[int]] = {}
    for number, plan in enumerate(planned):
        for note in dict.fromkeys(plan.notes):
            found.setdefault(note, []).append(number)
    return found
