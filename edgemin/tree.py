"""A plan as a person reads it: the tree of nodes, what is stored and what is to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

from edgemin.nodes import Plan
from edgemin.stages.fitting import CHECKPOINT
from edgemin.store import Store


class State(TypedDict):
    """One node: its path, its key and whether it is ``cached``, ``resumes`` or is ``to run``."""

    path: str
    key: str
    state: str


def states(plan: Plan, store: Store) -> list[State]:
    """Every node of a plan, in the order in which they run."""
    return [{"path": node.path, "key": node.key, "state": _state(node.key, store)} for node in plan.nodes]


def lines(nodes: Sequence[State]) -> list[str]:
    """The tree as text, a line per node, and the counts."""
    tree = [
        f"{'  ' * node['path'].count('/')}{node['path'].rpartition('/')[2]:<24} {node['state']:<8} {node['key']}"
        for node in nodes
    ]
    return [*tree, summary(nodes)]


def summary(nodes: Sequence[State]) -> str:
    """How many different nodes of each kind there are, over one plan or many; a key that comes twice counts once."""
    distinct = {node["key"]: node for node in nodes}.values()
    kinds = Counter(_kind(node["path"]) for node in distinct)
    found = Counter(node["state"] for node in distinct)
    by_state = ", ".join(f"{count} {state}" for state, count in found.items())
    return f"{len(distinct)} nodes ({by_state}): {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"


def _kind(path: str) -> str:
    return f"{path.partition('/')[0]} {path.rpartition('/')[2] if '/' in path else 'weights'}"


def _state(key: str, store: Store) -> str:
    if store.has(key):
        return "cached"
    return "resumes" if (store.work_path(key) / CHECKPOINT).is_file() else "to run"
