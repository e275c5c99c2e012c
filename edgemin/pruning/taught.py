"""What the fine-tuning of a pruned model learns from: labels, or by a sum of methods from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemin.errors import UserError
from edgemin.training.distillation import TaskWeight
from edgemin.training.teaching import Teaching


def taught(
    methods: Mapping[str, dict[str, Any]] | None, task_weight: TaskWeight, teaching: Teaching, trains: bool
) -> Mapping[str, dict[str, Any]]:
    """The distillation methods of the fine-tuning: none without a teacher, or where nothing is trained.

    Raises:
        UserError: a teacher without a method, or a setting that only a fine-tuning with a teacher has.
    """
    if teaching.teacher is None:
        _check_untaught(teaching, task_weight)
        return {}
    if not methods:
        raise UserError(f"methods: expected at least one with a teacher, given none with {teaching.teacher}")
    return methods if trains else {}


def idle(teaching: Teaching, learnt: Mapping[str, dict[str, Any]]) -> tuple[str, ...]:
    """Settings that decide nothing, as nothing is learnt from a teacher: there is none, or nothing is trained."""
    if learnt:
        return ()
    return ("methods",) if teaching.teacher is None else ("teacher", "teacher_cache", "methods", "task_weight")


def _check_untaught(teaching: Teaching, task_weight: TaskWeight) -> None:
    """Refuse what only a fine-tuning with a teacher has."""
    alone = {
        "corpus": (teaching.corpus, None, "null"),
        "teacher_cache": (teaching.teacher_cache, False, "false"),
        "task_weight": (task_weight, "auto", "auto"),
    }
    for key, (given, expected, said) in alone.items():
        if given != expected:
            raise UserError(f"{key}: expected {said} without a teacher, given {given}")
