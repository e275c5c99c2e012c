"""From a configuration node to an object: names, types and ranges are checked, each mistake is one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le

from edgemin import config
from edgemin.errors import UserError


@dataclass(frozen=True)
class Inner(config.Checked):
    rate: float = 0.1
    warmup: config.Share = 0.0


@dataclass(frozen=True)
class Settings(config.Checked):
    inner: Inner
    steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps == 13:
            raise UserError("steps: expected any other number, given 13")


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
        bits: Literal[2, 4, 8] = 8,
        chosen: Sequence[Literal[2, 4, 8]] = (),
        examples: config.Count = 1,
        threads: Annotated[int, Ge(1), Le(64)] | None = None,
        percentile: Annotated[float, Gt(50), Le(100)] = 99.0,
        part: config.Part = 0.0,
        weight: Literal["auto"] | config.NonNegative = "auto",
        settings: Settings,
    ) -> None:
        if ratio > 1:
            raise UserError(f"ratio: expected at most 1, given {ratio}")
        if name == "full":
            raise UserError("thing.name: expected something else, given full")
        self.given = {"name": name, "ratio": ratio, "scope": scope, "weights": weights, "columns": columns}
        self.given |= {"layers": layers, "on": on, "steps": settings.steps, "rate": settings.inner.rate}


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
        ("bits", 3, "2, 4 or 8, given 3"),
        ("bits", 8.0, "2, 4 or 8, given 8.0"),
        ("chosen", [8, 4.0], "a list, each entry 2, 4 or 8, given [8, 4.0]"),
        ("examples", 0, "a whole number of at least 1, given 0"),
        ("examples", 1.5, "a whole number of at least 1, given 1.5"),
        ("threads", 65, "a whole number from 1 to 64 or null, given 65"),
        ("warmup", 1.5, "a share in [0, 1], given 1.5"),
        ("part", 1, "a share in [0, 1), given 1"),
        ("part", float("nan"), "a finite number, given nan"),
        ("percentile", 50, "a number in (50, 100], given 50"),
        ("weight", -0.5, "auto or a number of at least 0, given -0.5"),
        ("weight", "none", "auto or a number of at least 0, given 'none'"),
        ("steps", 13, "any other number, given 13"),
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
    assert str(refused.value) == (
        "thing.zzzz: unknown key (there are: bits, chosen, columns, examples, layers, name, on, part, percentile, "
        "rate, ratio, scope, steps, threads, warmup, weight, weights)"
    )


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


def test_the_fields_of_a_dataclass_are_keys_of_their_own() -> None:
    accepted = config.accepted(Thing)
    assert accepted["steps"] == (int | None, False) and accepted["rate"] == (float, False)
    assert accepted["name"] == (str, True) and not {"settings", "inner"} & accepted.keys()


def test_two_settings_of_one_name_are_a_programmers_mistake() -> None:
    class Twice:
        def __init__(self, *, rate: float, settings: Settings) -> None: ...

    with pytest.raises(AssertionError, match=r"Twice has two settings called {'rate'}"):
        config.accepted(Twice)


def test_what_is_ready_is_handed_over_and_is_no_key() -> None:
    ready = Settings(Inner(rate=0.3), steps=4)
    thing = config.construct(NODE, "thing", Thing, settings=ready)
    assert (thing.given["steps"], thing.given["rate"]) == (4, 0.3)
    with pytest.raises(UserError, match=r"^thing\.steps: unknown key"):
        config.construct(NODE | {"steps": 5}, "thing", Thing, settings=ready)


def test_a_dataclass_made_in_python_is_checked_alike() -> None:
    assert config.build(Settings, {"rate": 0.2, "steps": 1}) == Settings(Inner(rate=0.2), steps=1)
    with pytest.raises(UserError, match=r"^warmup: expected a share in \[0, 1\], given 2$"):
        Inner(warmup=2)
    with pytest.raises(UserError, match=r"^rate: expected a number, given '1'$"):
        replace(Inner(), rate="1")  # type: ignore[arg-type]


def test_a_check_of_one_value_begins_with_its_key() -> None:
    config.check_type([1, 2], list[int], "seeds")
    with pytest.raises(UserError, match=r"^seeds: expected a list, each entry a whole number, given \['a'\]$"):
        config.check_type(["a"], list[int], "seeds")
