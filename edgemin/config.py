"""From a resolved configuration node to an object: every name and type is checked at the door.

A node names its class by `_target_`; the class takes typed keyword arguments. What the constructor's annotations say is
what a user may write, so there is no second schema to keep. An argument that is a dataclass (`fit: Fit`) is flattened:
the user writes its fields beside the others. A range is part of the annotation (`Annotated[int, Ge(1)]`).
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, overload

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from edgemin.errors import UserError
from edgemin.plain_text import is_text

T = TypeVar("T")
# The ranges that recur.
Whole = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]
Margin = Annotated[float, Gt(0), Lt(1)]
Part = Annotated[float, Ge(0), Lt(1)]  # a share that leaves something
# Groups whose choices are stages.
STAGES = ("finetune", "distill", "prune", "quantize")
GROUPS = (*STAGES, "task", "teacher", "student", "order", "trainer", "evaluate", "measure", "logger", "ablate")
# What every study has (conf/train.yaml). Any further node is a stage or a model of its own.
KEYS = frozenset((*GROUPS, "seed", "stages", "plan", "study", "published", "paths", "paths.outputs", "paths.store"))

# Keys that another one says now.
REPLACED = {"task.regression": "task.kind=regression, or task.kind=classification"}


class UnknownKeyError(UserError):
    """A key was set that the class of its node does not have.

    Attributes:
        key: its full name, as in `finetune.epochs`.
        hint: the end of the message.
    """

    def __init__(self, key: str, hint: str) -> None:
        super().__init__(unknown(key, hint))
        self.key, self.hint = key, hint


def target(node: Mapping[str, Any], key: str) -> type[Any]:
    """The class that `node["_target_"]` names.

    Raises:
        UserError: `_target_` is missing or names nothing that can be imported.
    """
    path = node.get("_target_")
    if not isinstance(path, str) or "." not in path:
        raise UserError(f"{key}._target_: expected the dotted path of a class, given {path!r}")
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}._target_: expected the dotted path of a class, given {path!r} ({error})") from error
    if not isinstance(found, type):
        raise UserError(f"{key}._target_: expected the dotted path of a class, given {path!r}")
    return found


@dataclass(frozen=True)
class Checked:
    """Base of a dataclass of settings: its values are checked by their annotations however it is made."""

    def __post_init__(self) -> None:
        for name, (annotation, _) in _parameters(type(self)).items():
            if not _is_flattened(annotation):  # else it is checked where it is made
                check_type(getattr(self, name), annotation, name)


def _parameters(cls: type[Any]) -> dict[str, tuple[Any, bool]]:
    """The keyword arguments of a class: name -> (annotation, whether it must be given)."""
    hints = get_type_hints(cls if is_dataclass(cls) else cls.__init__, include_extras=True)
    parameters = inspect.signature(cls).parameters
    return {name: (hints[name], own.default is inspect.Parameter.empty) for name, own in parameters.items()}


def _is_flattened(annotation: Any) -> bool:
    return isinstance(annotation, type) and is_dataclass(annotation)


def accepted(cls: type[Any], *besides: str) -> dict[str, tuple[Any, bool]]:
    """The keys that a user may write for a class: name -> (annotation, whether it must be given).

    Args:
        cls: an argument of its constructor that is a dataclass stands for the fields of that dataclass.
        besides: arguments that do not come from the user.
    """
    found: dict[str, tuple[Any, bool]] = {}
    for name, parameter in _parameters(cls).items():
        if name not in besides:
            kind = parameter[0]
            keys = accepted(kind) if _is_flattened(kind) else {name: parameter}
            twice = found.keys() & keys.keys()
            assert not twice, f"{cls.__name__} has two settings called {twice}"
            found |= keys
    return found


@overload
def construct(node: Any, key: str) -> Any: ...
@overload
def construct(node: Any, key: str, kind: type[T], **ready: object) -> T: ...
def construct(node: Any, key: str, kind: type[Any] = object, **ready: object) -> Any:
    """Build the object that a configuration node describes.

    Args:
        node: a plain mapping (no `DictConfig`) with `_target_` and what [`build`][edgemin.config.build] is given.
        key: where the node stands in the configuration; it begins every message.
        kind: a class that it must be, or a subclass of; another is not even constructed.
        ready: arguments of the constructor that the node does not describe.

    Raises:
        UserError: no node, a class of another kind, or whatever `build` refuses.
    """
    if not isinstance(node, Mapping):
        raise UserError(f"{key}: expected a choice of the group {key}, given {node!r}")
    cls = target(node, key)
    if not issubclass(cls, kind):
        expected = f"{kind.__module__}.{kind.__qualname__}"
        raise UserError(f"{key}._target_: expected {expected} or a subclass of it, given {node['_target_']}")
    try:
        return build(cls, {name: value for name, value in node.items() if name != "_target_"}, **ready)
    except UnknownKeyError as error:
        raise UnknownKeyError(f"{key}.{error.key}", error.hint) from error
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(f"{key}.") else f"{key}.{message}") from error


def build(cls: type[T], given: Mapping[str, Any], **ready: object) -> T:
    """Build an object of a class from flat settings.

    Args:
        cls: the class.
        given: the settings by the keys that the class has ([`accepted`][edgemin.config.accepted]).
        ready: arguments of the constructor that are no settings.

    Raises:
        UserError: an unknown key ([`UnknownKeyError`][edgemin.config.UnknownKeyError]), a missing one, a value of the
            wrong type or out of range, or whatever the constructor refuses; the key comes first.
    """
    allowed = accepted(cls, *ready)
    for name, value in given.items():
        if name not in allowed:
            raise UnknownKeyError(name, hint(name, allowed))
        check_type(value, allowed[name][0], name)
    for name, (_, required) in allowed.items():
        if required and name not in given:
            raise UserError(f"{name}: expected a value, given none")
    return _build(cls, given, ready)


def _build(cls: type[T], given: Mapping[str, Any], ready: Mapping[str, object]) -> T:
    arguments = dict(ready)
    for name, (annotation, _) in _parameters(cls).items():
        if name not in ready and _is_flattened(annotation):
            arguments[name] = _build(annotation, given, {})
        elif name in given:
            arguments[name] = given[name]
    return cls(**arguments)


def check_type(value: Any, annotation: Any, key: str) -> None:
    """Raise a `UserError` that names `key` unless `value` is of the annotated type (an int passes as a float).

    Whatever the type, numbers are finite and whole ones of at most 64 bits, and text can be written in UTF-8.
    """
    try:
        found = _adapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        endless = [wrong["input"] for wrong in error.errors() if wrong["type"] == "finite_number"]
        if endless:
            raise UserError(f"{key}: expected a finite number, given {endless[0]}") from None
        raise UserError(f"{key}: expected {_words(annotation)}, given {_shown(value)}") from None
    for part, read in zip(_parts(value), _parts(found), strict=True):
        if isinstance(part, float | bool) and type(part) is not type(read):  # 8.0 passes as the 8 of a Literal
            raise UserError(f"{key}: expected {_words(annotation)}, given {_shown(value)}")
        if isinstance(part, int) and not -(2**63) <= part < 2**63:
            raise UserError(f"{key}: expected a whole number of at most 64 bits, given {_shown(part)}")
        if isinstance(part, str) and not is_text(part):
            raise UserError(f"{key}: expected text that can be written in UTF-8, given {part!r}")


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def _parts(value: Any) -> Iterator[Any]:
    """The value itself, or, one by one, all that a list or mapping holds, keys included."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from (key, *_parts(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _parts(inner)
    else:
        yield value


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is None:
        return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))
    if origin is Annotated:
        return _range(*arguments)
    if origin is Literal:
        *most, last = map(str, arguments)
        return f"{', '.join(most)} or {last}" if most else last
    if origin in (Union, UnionType):
        return " or ".join(map(_words, arguments))
    if issubclass(origin, Mapping):
        return f"a mapping from {_words(arguments[0])} to {_words(arguments[1])}"
    assert issubclass(origin, Sequence), annotation
    return f"a list, each entry {_words(arguments[0])}"


_NAMES: dict[Any, str] = {
    type(None): "null",
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def _range(kind: type[Any], *bounds: Any) -> str:
    """The words for a number between bounds, at least a lower one."""
    low, *high = bounds
    least = low.ge if isinstance(low, Ge) else low.gt
    if not high:
        return f"{_NAMES[kind]} of at least {least}" if isinstance(low, Ge) else f"{_NAMES[kind]} above {least}"
    most = high[0].le if isinstance(high[0], Le) else high[0].lt
    if kind is int:
        return f"a whole number from {least} to {most}"
    left, right = "[" if isinstance(low, Ge) else "(", "]" if isinstance(high[0], Le) else ")"
    return f"a {'share' if (least, most) == (0, 1) else 'number'} in {left}{least}, {most}{right}"


def unknown(key: str, hint: str) -> str:
    """The message about an unknown key: what says it now, or whatever else there is to say."""
    return f"{key}: unknown key{f' (say {REPLACED[key]})' if key in REPLACED else hint}"


def hint(name: str, allowed: Collection[str]) -> str:
    """The end of a message about an unknown key: the key that was likely meant, or all that there are."""
    near = difflib.get_close_matches(name, allowed, n=1)
    return f", did you mean {near[0]!r}?" if near else f" (there are: {', '.join(sorted(allowed))})"
