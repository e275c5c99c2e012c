"""From a configuration node to an object: names, types and ranges are checked, each mistake is one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

import pytest

from edgemin import config
from edgemin.errors import UserError


class Settings(TypedDict, total=False):
    steps: int | None
    rate: float


class Thing:
    """Every kind of argument that the project's classes take."""

    def __init__(
        self,
        *,
        name: str,
        ratio: float = 0.5,
        scope: Literal["layer", "global"] = "layer",
        weights: Mapping[str, float] | None = None,
        columns: Sequence[str] = (),
        layers: int | list[int] | None = None,
        on: bool = False,
        **settings: Unpack[Settings],
    ) -> None:
        if ratio > 1:
            raise UserError(f"ratio: expected at most 1, given {ratio}")
        if name == "full":
            raise UserError("thing.name: expected something else, given full")
        self.given = {"name": name, "ratio": ratio, "scope": scope, "weights": weights, "columns": columns}
        self.given |= {"layers": layers, "on": on, **settings}


NODE: dict[str, Any] = {"_target_": f"{__name__}.Thing", "name": "a"}


def test_a_node_becomes_its_object() -> None:
    given = {
        "ratio": 1,
        "scope": "global",
        "weights": {"qq": 1, "kk": 0.5},
        "columns": ["sentence"],
        "layers": [1, 2],
        "on": True,
        "steps": None,
        "rate": 1e-3,
    }
    thing = config.construct(NODE | given, "thing")
    assert isinstance(thing, Thing) and thing.given == {"name": "a"} | given


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("name", 3, "a string, given 3"),
        ("name", None, "a string, given None"),
        ("ratio", "0.2", "a number, given '0.2'"),
        ("ratio", True, "a number, given True"),
        ("scope", "layers", "layer or global, given 'layers'"),
        ("weights", {"qq": "1"}, "a mapping from a string to a number or null, given {'qq': '1'}"),
        ("columns", "sentence", "a list, each entry a string, given 'sentence'"),
        ("columns", [1], "a list, each entry a string, given [1]"),
        ("layers", 2.5, "a whole number or a list, each entry a whole number or null, given 2.5"),
        ("layers", [1.5], "a whole number or a list, each entry a whole number or null, given [1.5]"),
        ("on", "yes", "true or false, given 'yes'"),
        ("on", 1, "true or false, given 1"),
        ("steps", 1.5, "a whole number or null, given 1.5"),
        ("rate", None, "a number, given None"),
        ("rate", "3e-5", "a number, given '3e-5'"),
        ("rate", float("nan"), "a finite number, given nan"),
        ("ratio", float("-inf"), "a finite number, given -inf"),
        ("weights", {"qq": float("inf")}, "a finite number, given inf"),
        ("steps", 2**63, f"a whole number of at most 64 bits, given {2**63}"),
        ("layers", [1, -(2**64)], f"a whole number of at most 64 bits, given {-(2**64)}"),
        ("name", "a\ud800", "text that can be written in UTF-8, given 'a\\ud800'"),
        ("columns", ["a", "\udcff"], "text that can be written in UTF-8, given '\\udcff'"),
    ],
)
def test_a_value_of_the_wrong_type_says_key_expected_and_given(key: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as refused:
        config.construct(NODE | {key: value}, "thing")
    assert str(refused.value) == f"thing.{key}: expected {expected}"


@pytest.mark.parametrize(
    ("misspelt", "meant"), [("ration", "ratio"), ("scop", "scope"), ("step", "steps"), ("colums", "columns")]
)
def test_a_misspelt_key_is_told_what_was_meant(misspelt: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"^thing.{misspelt}: unknown key, did you mean '{meant}'\\?$"):
        config.construct(NODE | {misspelt: 1}, "thing")


def test_a_key_like_no_other_is_told_what_there_is() -> None:
    with pytest.raises(UserError) as refused:
        config.construct(NODE | {"zzzz": 1}, "thing")
    line = "thing.zzzz: unknown key (there are: columns, layers, name, on, rate, ratio, scope, steps, weights)"
    assert str(refused.value) == line


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match=r"^thing\.name: expected a value, given none$"):
        config.construct({"_target_": NODE["_target_"]}, "thing")


def test_what_the_constructor_refuses_is_told_with_the_node_once() -> None:
    with pytest.raises(UserError, match=r"^prune\.ratio: expected at most 1, given 1\.5$"):
        config.construct(NODE | {"ratio": 1.5}, "prune")
    with pytest.raises(UserError, match=r"^thing\.name: expected something else, given full$"):
        config.construct(NODE | {"name": "full"}, "thing")


@pytest.mark.parametrize(
    "path",
    [
        None,
        3,
        "",
        "Thing",
        "edgemin.nowhere.Thing",
        "edgemin.study.roots.Nothing",
        "no_such.module.X",
        "edgemin.study.roots.outline",
    ],
)
def test_a_target_that_is_no_class_is_refused_in_one_line(path: Any) -> None:
    with pytest.raises(UserError, match=r"^thing\._target_: expected the dotted path of a class, given [^\n]*$"):
        config.construct({"_target_": path}, "thing")


@pytest.mark.parametrize("node", ["wandb", 3, None, ["a"]])
def test_a_value_where_a_group_belongs_is_refused_with_what_was_given(node: Any) -> None:
    with pytest.raises(UserError) as refused:
        config.construct(node, "thing")
    assert str(refused.value) == f"thing: expected a choice of the group thing, given {node!r}"


def test_a_node_without_a_target_is_refused() -> None:
    with pytest.raises(UserError, match=r"^thing\._target_: expected"):
        config.target({}, "thing")


def test_settings_shared_by_many_classes_are_opened_into_keys() -> None:
    accepted = config.accepted(Thing)
    assert accepted["steps"] == (int | None, False) and accepted["rate"] == (float, False)
    assert accepted["name"] == (str, True) and "settings" not in accepted


def test_a_check_of_one_value_begins_with_its_key() -> None:
    config.check_type([1, 2], list[int], "seeds")
    with pytest.raises(UserError, match=r"^seeds: expected a list, each entry a whole number, given \['a'\]$"):
        config.check_type(["a"], list[int], "seeds")
