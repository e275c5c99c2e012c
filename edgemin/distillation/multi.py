"""Several distillation methods trained together, as a weighted sum of their losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from edgemin.errors import UserError
from edgemin.training.distillation import DistillSettings, TaskWeight
from edgemin.training.method_sum import MethodSum


class Multi(MethodSum):
    """The weighted sum of several methods, from one reading of the teacher and one of the student.

    Args:
        methods: settings of each method by its name, at least one; see
            [`MethodSum`][edgemin.training.method_sum.MethodSum].
        task_weight: weight of the task loss beside them.
        settings: see [`Distillation`][edgemin.training.distillation.Distillation].
    """

    def __init__(
        self,
        *,
        methods: Mapping[str, dict[str, Any]],
        task_weight: TaskWeight = "auto",
        **settings: Unpack[DistillSettings],
    ) -> None:
        if not methods:
            raise UserError("methods: expected at least one method, given none")
        super().__init__(methods=methods, task_weight=task_weight, settings=settings)
