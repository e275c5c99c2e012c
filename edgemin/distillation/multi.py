"""Several distillation methods trained together, as a weighted sum of their losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgemin.errors import UserError
from edgemin.training.distillation import TaskWeight
from edgemin.training.fit import Fit
from edgemin.training.method_sum import MethodSum
from edgemin.training.teaching import Teaching


class Multi(MethodSum):
    """The weighted sum of several methods, from one reading of the teacher and one of the student.

    Args:
        methods: settings of each method by its name, at least one; see
            [`MethodSum`][edgemin.training.method_sum.MethodSum].
        task_weight: weight of the task loss beside them.
        fit: as for any [`Distillation`][edgemin.training.distillation.Distillation].
        teaching: likewise.
    """

    def __init__(
        self,
        *,
        methods: Mapping[str, dict[str, Any]],
        task_weight: TaskWeight = "auto",
        fit: Fit,
        teaching: Teaching,
    ) -> None:
        if not methods:
            raise UserError("methods: expected at least one method, given none")
        super().__init__(methods=methods, task_weight=task_weight, fit=fit, teaching=teaching)
