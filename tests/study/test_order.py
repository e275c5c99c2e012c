"""Which rows a study prints follows from its order and stages alone."""

from __future__ import annotations

import re
from typing import Any

import pytest

from edgemin.errors import UserError
from edgemin.study.order import (
    Ablation,
    Interaction,
    RowSpec,
    ablation,
    compared,
    order_name,
    row_specs,
    student_stages,
)

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


CROSS = {"_target_": "edgemin.study.order.Interaction", "stages": ["prune", "quantize"]}
FULL = ["finetune", "distill", "prune", "quantize"]


def crossed(stages: list[str], **changes: Any) -> list[tuple[str, str, bool]]:
    made = order(stages=stages, ablate=CROSS, **changes)
    specs = row_specs(made, None, TEACHER)
    return [(spec.name, spec.path, spec.named) for spec in specs]


def test_an_interaction_crosses_two_stages_and_leaves_the_others_in_place() -> None:
    assert crossed(["finetune", "prune", "distill", "quantize", "recover"]) == [
        ("Teacher", "teacher/finetune", False),
        ("Student: finetune", "student/finetune", False),
        ("Neither prune nor quantize", "student/finetune/distill/recover", True),
        ("Only prune", "student/finetune/prune/distill/recover", True),
        ("Only quantize", "student/finetune/distill/quantize/recover", True),
        ("Both prune and quantize", "student/finetune/prune/distill/quantize/recover", True),
    ]


def test_an_ablation_is_described_by_a_name_and_not_by_its_class() -> None:
    made = ablation(order(ablate=CROSS))
    assert made is not None and made.described == {"name": "interaction", "stages": ["prune", "quantize"]}
    assert ablation(order()) is None and ablation(order(ablate=None)) is None


def test_an_interaction_keeps_the_teacher_the_baselines_and_the_controls() -> None:
    rows = [
        {"name": "Teacher", "model": "teacher"},
        {"name": "Student baseline", "stages": ["finetune"]},
        {"name": "+ Distillation", "stages": ["finetune", "distill"]},
        {"name": "+ Head pruning", "stages": ["finetune", "distill", "prune"]},
        {"name": "+ Quantization", "stages": FULL},
    ]
    controls = [{"name": "Control", "stages": ["finetune", "no_teacher"]}]
    found = crossed(FULL, rows=rows, controls=controls)
    assert [(name, path) for name, path, _ in found] == [
        ("Teacher", "teacher/finetune"),
        ("Student baseline", "student/finetune"),
        ("+ Distillation", "student/finetune/distill"),
        ("Only prune", "student/finetune/distill/prune"),
        ("Only quantize", "student/finetune/distill/quantize"),
        ("Both prune and quantize", "student/finetune/distill/prune/quantize"),
        ("Control", "student/finetune/no_teacher"),
    ]


def test_a_prefix_that_has_neither_stage_is_of_the_group_and_not_left_out() -> None:
    names = {name: named for name, _, named in crossed(FULL)}
    assert names["+ distill"] and not names["Student: finetune"]
    assert "Neither prune nor quantize" not in names


def test_an_interaction_holds_for_stages_given_by_hand() -> None:
    made = order(ablate=CROSS, rows=[{"name": "All", "stages": STAGES}])
    specs = row_specs(made, ["finetune", "prune", "quantize"], TEACHER)
    assert [spec.name for spec in specs][2:] == ["Only prune", "Only quantize", "Both prune and quantize"]


@pytest.mark.parametrize("stages", [["finetune", "prune"], ["finetune", "quantize"], [*FULL, "prune"]])
def test_an_order_without_both_stages_once_is_refused(stages: list[str]) -> None:
    message = refusal(stages=stages, ablate=CROSS)
    assert message.startswith("ablate.stages: expected two stages that the order has once each, given prune ")
    assert message.endswith(f" in {stages}")


@pytest.mark.parametrize(
    ("node", "start"),
    [
        ({**CROSS, "stages": ["prune"]}, "ablate.stages: expected two different stages, given ['prune']"),
        ({**CROSS, "stages": ["prune", "prune"]}, "ablate.stages: expected two different stages"),
        ({**CROSS, "stages": "prune"}, "ablate.stages: expected a list"),
        ({**CROSS, "stagse": []}, "ablate.stagse: unknown key"),
        ({"_target_": "edgemin.study.order.RowSpec", "name": "a", "model": "b", "stages": ()}, "ablate."),
        ("interaction", "ablate: expected a choice of the group ablate, given 'interaction'"),
    ],
)
def test_an_ablation_of_another_form_is_refused_by_its_key(node: Any, start: str) -> None:
    assert refusal(ablate=node, stages=FULL).startswith(start)


def test_an_ablation_is_whatever_turns_rows_into_rows() -> None:
    assert issubclass(Interaction, Ablation)
    rows = [RowSpec("Teacher", "teacher", ())]
    assert Interaction(["b", "a"]).rows(["a", "b"], rows)[0] is rows[0]
