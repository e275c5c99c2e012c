"""Which rows an ablation makes of an order, and what becomes of those that cannot be planned."""

from __future__ import annotations

from typing import Any

import pytest
import studies

from edgemin.errors import UserError
from edgemin.study.order import Ablation, Interaction, RowSpec, ablation, row_specs
from edgemin.study.plan import build
from edgemin.study.reading import read_study

TEACHER = {"teacher": ["finetune"], "student": []}
STAGES = ["finetune", "distill", "quantize"]
FULL = ["finetune", "distill", "prune", "quantize"]
CLASSES = {
    "interaction": "Interaction",
    "leave_one_out": "LeaveOneOut",
    "orders": "Orders",
    "prefixes": "Prefixes",
    "single": "Single",
}


def node(kind: str, stages: list[str] | None = None) -> dict[str, Any]:
    return {"_target_": f"edgemin.study.order.{CLASSES[kind]}", "stages": stages}


CROSS = node("interaction", ["prune", "quantize"])


def order(**changes: Any) -> dict[str, Any]:
    return {"name": "mine", "stages": STAGES, "rows": None, "controls": []} | changes


def refusal(**changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        row_specs(order(**changes), None, TEACHER)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the rows of each kind --------------------------------------------------------------------------------


ROWS = {
    "leave_one_out": {
        "Student: finetune": "finetune",
        "Without distill": "finetune/prune/quantize",
        "Without prune": "finetune/distill/quantize",
        "Without quantize": "finetune/distill/prune",
        "All of distill, prune, quantize": "finetune/distill/prune/quantize",
    },
    "single": {
        "Student: finetune": "finetune",
        "Only distill": "finetune/distill",
        "Only prune": "finetune/prune",
        "Only quantize": "finetune/quantize",
        "All of distill, prune, quantize": "finetune/distill/prune/quantize",
    },
    "prefixes": {
        "Student: finetune": "finetune",
        "distill": "finetune/distill",
        "distill, prune": "finetune/distill/prune",
        "All of distill, prune, quantize": "finetune/distill/prune/quantize",
    },
    "orders": {
        "Student: finetune": "finetune",
        "distill, prune, quantize": "finetune/distill/prune/quantize",
        "distill, quantize, prune": "finetune/distill/quantize/prune",
        "prune, distill, quantize": "finetune/prune/distill/quantize",
        "prune, quantize, distill": "finetune/prune/quantize/distill",
        "quantize, distill, prune": "finetune/quantize/distill/prune",
        "quantize, prune, distill": "finetune/quantize/prune/distill",
    },
}


@pytest.mark.parametrize("kind", ROWS)
def test_an_ablation_of_all_stages_but_fine_tuning(kind: str) -> None:
    specs = row_specs(order(stages=FULL, ablate=node(kind)), None, TEACHER)
    assert specs[0].path == "teacher/finetune"
    assert {spec.name: spec.path.removeprefix("student/") for spec in specs[1:]} == ROWS[kind]
    whole = "student/finetune/distill/prune/quantize"
    assert {spec.path for spec in specs if not spec.optional} == {"teacher/finetune", whole}
    assert all(spec.named for spec in specs[1:])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("leave_one_out", ["distill/recover", "distill/quantize/recover", "prune/distill/recover"]),
        ("single", ["distill/recover", "prune/distill/recover", "distill/quantize/recover"]),
        ("prefixes", ["distill/recover", "prune/distill/recover"]),
        ("orders", ["distill/recover"]),
    ],
)
def test_the_other_stages_stay_in_place(kind: str, expected: list[str]) -> None:
    made = order(stages=["prune", "distill", "quantize", "recover"], ablate=node(kind, ["quantize", "prune"]))
    paths = [spec.path for spec in row_specs(made, None, TEACHER) if spec.model == "student"]
    exchanged = ["quantize/distill/prune/recover"] if kind == "orders" else []
    whole = ["prune/distill/quantize/recover"]
    assert paths == [f"student/{path}" for path in (*expected, *whole, *exchanged)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_kind_is_a_choice_of_the_configuration(kind: str) -> None:
    settings = studies.settings(f"ablate={kind}", "order=distill_prune_quantize", tiny=False)
    made = ablation(settings["order"])
    assert made is not None and made.described(FULL)["name"] == kind
    assert made.described(FULL)["stages"] == FULL[2 if kind == "interaction" else 1 :]
    names = [spec.name for spec in row_specs(settings["order"], None, TEACHER)]
    assert names[:2] == ["Teacher", "Student baseline"], "rows that have none of the stages keep their names"
    assert names[-2:] == ["Control: no teacher", "Control: random pruning"]


# --- two stages crossed -----------------------------------------------------------------------------------


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
    assert made is not None and made.described(FULL) == {"name": "interaction", "stages": ["prune", "quantize"]}
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


# --- rows that cannot be planned --------------------------------------------------------------------------

DYNAMIC = ("quantize=dynamic", "order=distill_prune_quantize")


def test_orders_that_cannot_work_are_named_with_the_reason_and_the_others_are_planned() -> None:
    plan = studies.plan("ablate=orders", *DYNAMIC)
    paths = [row.node.path for row in plan.rows if not row.spec.control]
    ends = ("", "/distill/prune/quantize", "/prune/distill/quantize")
    assert paths == ["teacher/finetune", *(f"student/finetune{end}" for end in ends)]
    left_out = [note for note in plan.notes if "left out" in note]
    reason = "stages: expected nothing after quantize, whose result (torch's dynamic INT8) can neither be trained nor "
    assert len(left_out) == 4 and not any("\n" in note for note in left_out)
    assert left_out[0] == f"row 'distill, quantize, prune' is left out: {reason}pruned, given prune"
    assert not any("quantize/" in node.path for node in plan.nodes), "nothing is made for a row that is left out"
    assert "student/finetune/quantize" not in {node.path for node in plan.nodes}


def test_without_the_stage_that_trains_the_head_a_row_is_left_out() -> None:
    plan = studies.plan(
        "ablate=leave_one_out", "ablate.stages=[finetune,dynamic_int8]", "stages=[finetune,dynamic_int8]"
    )
    assert [row.spec.name for row in plan.rows] == ["Teacher", "Without dynamic_int8", "Both finetune and dynamic_int8"]
    assert [note.partition(":")[0] for note in plan.notes] == [
        "row 'Neither finetune nor dynamic_int8' is left out",
        "row 'Without finetune' is left out",
    ]


def test_a_mistake_in_the_order_itself_is_refused_whatever_the_rows_before_it() -> None:
    with pytest.raises(UserError) as caught:
        build(read_study(studies.settings("ablate=single", "order=distill_prune_quantize", "prune.ratio=2.0")))
    assert str(caught.value).startswith("prune.ratio: ")


def test_an_interaction_has_all_its_rows_or_none() -> None:
    with pytest.raises(UserError) as caught:
        studies.plan("ablate=interaction", "ablate.stages=[finetune,prune]", "stages=[finetune,prune]")
    assert str(caught.value).startswith("stages: expected a stage that trains the head")


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("stages", [["finetune", "prune"], ["finetune", "quantize"], [*FULL, "prune"]])
def test_stages_that_the_order_has_not_once_each_are_refused(kind: str, stages: list[str]) -> None:
    message = refusal(stages=stages, ablate=node(kind, ["prune", "quantize"]))
    assert message.startswith("ablate.stages: expected stages that the order has once each, given ")
    assert f"{stages.count('prune')} times" in message or f"{stages.count('quantize')} times" in message
    assert message.endswith(f" in {stages}")


@pytest.mark.parametrize("kind", ROWS)
def test_an_order_with_nothing_to_compare_is_refused(kind: str) -> None:
    message = refusal(stages=["finetune", "prune"], ablate=node(kind))
    assert message == "ablate.stages: expected null only with two stages besides finetune, given ['finetune', 'prune']"
    for stages in (["prune"], ["prune", "prune"], []):
        message = refusal(stages=FULL, ablate=node(kind, stages))
        assert message == f"ablate.stages: expected two or more different stages, given {stages}"


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ({**CROSS, "stages": ["prune"]}, "ablate.stages: expected two different stages, given ['prune']"),
        ({**CROSS, "stages": ["prune", "prune"]}, "ablate.stages: expected two or more different stages"),
        ({**CROSS, "stages": "prune"}, "ablate.stages: expected a list"),
        ({**CROSS, "stagse": []}, "ablate.stagse: unknown key"),
        ({"_target_": "edgemin.study.order.RowSpec", "name": "a", "model": "b", "stages": ()}, "ablate."),
        ("interaction", "ablate: expected a choice of the group ablate, given 'interaction'"),
    ],
)
def test_an_ablation_of_another_form_is_refused_by_its_key(given: Any, start: str) -> None:
    assert refusal(ablate=given, stages=FULL).startswith(start)


def test_an_ablation_is_whatever_turns_rows_into_rows() -> None:
    assert issubclass(Interaction, Ablation)
    rows = [RowSpec("Teacher", "teacher", ())]
    assert Interaction(["b", "a"]).rows(["a", "b"], rows)[0] is rows[0]
