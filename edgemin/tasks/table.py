"""All kinds of task by the name that `task.kind` gives.

The table itself is in no key: `data/task.py` imports it by name, and what was trained or scored on a task has the
module of the task's kind in its key. So a new kind makes no earlier result again.
"""

from __future__ import annotations

from edgemin.tasks.base import Kind, refusal
from edgemin.tasks.classification import Classification
from edgemin.tasks.multi_label import MultiLabel
from edgemin.tasks.regression import Regression

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Classification(), Regression(), MultiLabel())}


def find(name: str) -> Kind:
    """The kind of this name.

    Raises:
        UserError: there is none; the line lists those that there are.
    """
    if name not in KINDS:
        raise refusal("kind", f"one of {', '.join(KINDS)}", name)
    return KINDS[name]
