"""Which layer of a student learns from which of its teacher; layers count from 1 on both sides."""

from __future__ import annotations

from collections.abc import Mapping

from edgemin.errors import UserError


def layer_map(student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Which teacher layer each student layer learns from: l -> ⌈l L_T / L_S⌉.

    Equation 1 of the EdgeMIN paper. Layers count from 1 on both sides, and the last learns from the last. A
    student deeper than its teacher uses teacher layers more than once.
    """
    assert student_layers > 0 and teacher_layers > 0
    return {layer: -(-layer * teacher_layers // student_layers) for layer in range(1, student_layers + 1)}


def matched_layers(asked: Mapping[int, int] | None, student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Which teacher layer each student layer learns from, as the setting `layer_map` says.

    Args:
        asked: {student layer: teacher layer}; `None` spreads them evenly, as `layer_map` does, which is TinyBERT's
            l -> l L_T / L_S where L_S divides L_T.
        student_layers: L_S.
        teacher_layers: L_T.

    Raises:
        UserError: no pair, or a layer that one of the models does not have.
    """
    if asked is None:
        return layer_map(student_layers, teacher_layers)
    if not asked:
        raise UserError("layer_map: expected null or at least one {student layer: teacher layer}, given none")
    check_layers(asked, student_layers, teacher_layers, keys=("layer_map", "layer_map"))
    return dict(asked)


def check_layers(
    pairs: Mapping[int, int],
    student_layers: int,
    teacher_layers: int,
    keys: tuple[str, str] = ("student_layer", "teacher_layer"),
) -> None:
    """Refuse pairs with a layer that one of the models does not have.

    Args:
        pairs: {student layer: teacher layer}.
        student_layers: how many the student has.
        teacher_layers: how many the teacher has.
        keys: the settings to name, where the student's layer or the teacher's is not there.

    Raises:
        UserError: with the first such layer.
    """
    for pair in pairs.items():
        sides = zip(keys, ("student", "teacher"), pair, (student_layers, teacher_layers), strict=True)
        for key, side, layer, count in sides:
            if not 1 <= layer <= count:
                raise UserError(f"{key}: expected a {side} layer from 1 to {count}, given {layer}")
