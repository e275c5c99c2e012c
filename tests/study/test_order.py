"""Which rows a study prints follows from its order and stages alone."""

from __future__ import annotations

import re
from typing import Any

import pytest

from edgemin.errors import UserError
from edgemin.study.order import RowSpec, compared, order_name, row_specs, student_stages

TEACHER = {"teacher": ["finetune"], "student": []}
STAGES = ["finetune", "distill", "quantize"]


def order(**changes: Any) -> dict[str, Any]:
    return {"name": "mine", "stages": STAGES, "rows": None, "controls": []} | changes


def refusal(**changes: Any) -> str:
    made = order(**changes)
    with pytest.raises(UserError) as caught:
        row_specs(made, None, TEACHER)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_rows_there_are_the_teacher_and_every_prefix() -> None:
    specs = row_specs(order(), None, TEACHER)
    assert [spec.path for spec in specs] == [
        "teacher/finetune",
        "student/finetune",
        "student/finetune/distill",
        "student/finetune/distill/quantize",
    ]
    assert not any(spec.named or spec.control for spec in specs)


def test_a_repeated_stage_gives_rows_of_different_names() -> None:
    specs = row_specs(order(), ["finetune", "prune", "finetune"], TEACHER)
    assert [spec.name for spec in specs] == ["Teacher", "Student: finetune", "+ prune", "+ finetune (2)"]


def test_no_stages_at_all_is_the_student_as_it_comes() -> None:
    assert [spec.path for spec in row_specs(order(), [], {"teacher": [], "student": []})] == ["teacher", "student"]


def test_rows_and_controls_come_as_they_are_named() -> None:
    rows = [{"name": "Teacher", "model": "teacher"}, {"name": "All", "stages": STAGES}]
    controls = [{"name": "Longer", "stages": ["finetune", "longer"]}]
    own = {"teacher": ["finetune", "longer"], "student": []}
    specs = row_specs(order(rows=rows, controls=controls), None, own)
    assert specs == [
        RowSpec("Teacher", "teacher", ("finetune", "longer")),
        RowSpec("All", "student", tuple(STAGES)),
        RowSpec("Longer", "student", ("finetune", "longer"), control=True),
    ]


def test_an_order_declares_which_rows_are_compared() -> None:
    specs = row_specs(order(), None, TEACHER)
    pair = [specs[2].name, specs[0].name]
    made = order(comparisons=[pair])
    assert row_specs(made, None, TEACHER) == specs
    assert compared(made, None, specs) == [pair]
    assert compared(order(), None, specs) == compared(made, STAGES, specs) == []
    for wrong, said in (
        (["one"], "expected the names of two rows"),
        ([pair[0], pair[0]], "expected the names of two rows"),
        ([pair[0], "x"], "expected rows of the order (Teacher, "),
    ):
        with pytest.raises(UserError, match=re.escape(f"order.comparisons[0]: {said}")):
            compared(order(comparisons=[wrong]), None, specs)


@pytest.mark.parametrize("stages", [STAGES, ["finetune", "quantize"]], ids=["the order's own", "others"])
def test_stages_by_hand_leave_the_orders_rows_and_controls_out(stages: list[str]) -> None:
    rows = [{"name": "All", "stages": STAGES}]
    controls = [{"name": "Longer", "stages": ["finetune", "longer"]}]
    made = order(rows=rows, controls=controls)
    specs = row_specs(made, stages, TEACHER)
    prefixes = ["/".join(("student", *stages[:end])) for end in range(1, len(stages) + 1)]
    assert [spec.path for spec in specs] == ["teacher/finetune", *prefixes]
    assert (order_name(made, stages), order_name(made, None)) == ("by hand", "mine")
    assert (student_stages(made, stages), student_stages(made, None)) == (stages, STAGES)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rows": [{"name": "a", "stages": STAGES}, {"name": "a", "stages": []}]}, "order.rows: "),
        ({"rows": []}, "order.rows: "),
        ({"rows": [{"name": "a", "stages": ["finetune"]}]}, "order.stages: "),
        ({"rows": [{"name": "a", "stagse": []}]}, "order.rows[0].stagse: "),
        ({"rows": [{"name": "a", "stages": [], "model": "assistant"}]}, "order.rows[0].model: "),
        ({"rows": [{"name": "a", "stages": [], "model": ["teacher"]}]}, "order.rows[0].model: "),
        ({"rows": [{"name": "a"}]}, "order.rows[0].stages: "),
        ({"rows": [{"stages": []}]}, "order.rows[0].name: "),
        ({"rows": ["finetune"]}, "order.rows[0]: "),
        ({"rows": [{"name": "a", "stages": "finetune"}]}, "order.rows[0].stages: "),
        ({"controls": [{"name": "a", "stages": [], "control": True}]}, "order.controls[0].control: "),
        ({"contrlos": []}, "order.contrlos: "),
        ({"stages": "finetune"}, "order.stages: "),
        ({"name": None}, "order.name: "),
    ],
)
def test_a_row_of_another_form_is_refused_by_its_key(changes: dict[str, Any], key: str) -> None:
    assert refusal(**changes).startswith(key)


@pytest.mark.parametrize("key", ["rows", "controls"])
def test_rows_that_are_no_list_are_refused(key: str) -> None:
    assert refusal(**{key: 7}).startswith(f"order.{key}: ")
