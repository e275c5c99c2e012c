"""From a resolved configuration node to an object: every name and type is checked at the door.

A node names its class by `_target_`; the class takes flat typed keyword arguments. What the constructor's annotations
say is what a user may write, so there is no second schema to keep.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar, Unpack, get_args, get_origin, get_type_hints, is_typeddict, overload

from pydantic import TypeAdapter, ValidationError

from edgemin.errors import UserError
from edgemin.plain_text import is_text

T = TypeVar("T")
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
    """

    def __init__(self, key: str, hint: str) -> None:
        super().__init__(unknown(key, hint))
        self.key = key


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


def accepted(cls: type[Any]) -> dict[str, tuple[Any, bool]]:
    """The keyword arguments of a class: name -> (annotation, whether it must be given).

    A trailing `**settings: Unpack[SomeTypedDict]` is opened into the keys of that `TypedDict`.
    """
    hints = get_type_hints(cls.__init__)
    found: dict[str, tuple[Any, bool]] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        annotation = hints[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            assert get_origin(annotation) is Unpack, f"{cls.__name__}: **{name} needs Unpack[TypedDict]"
            (settings,) = get_args(annotation)
            assert is_typeddict(settings)
            found |= {key: (hint, False) for key, hint in get_type_hints(settings).items()}
        else:
            found[name] = (annotation, parameter.default is inspect.Parameter.empty)
    return found


@overload
def construct(node: Any, key: str) -> Any: ...
@overload
def construct(node: Any, key: str, kind: type[T]) -> T: ...
def construct(node: Any, key: str, kind: type[Any] = object) -> Any:
    """Build the object that a configuration node describes.

    Args:
        node: a plain mapping (no `DictConfig`) with `_target_` and the constructor's keyword arguments.
        key: where the node stands in the configuration; it begins every message.
        kind: a class that it must be, or a subclass of; another is not even constructed.

    Raises:
        UserError: a class of another kind, an unknown key ([`UnknownKeyError`][edgemin.config.UnknownKeyError]), a
            missing one, a value of the wrong type, or whatever the constructor refuses.
    """
    if not isinstance(node, Mapping):
        raise UserError(f"{key}: expected a choice of the group {key}, given {node!r}")
    cls = target(node, key)
    if not issubclass(cls, kind):
        expected = f"{kind.__module__}.{kind.__qualname__}"
        raise UserError(f"{key}._target_: expected {expected} or a subclass of it, given {node['_target_']}")
    allowed = accepted(cls)
    given = {name: value for name, value in node.items() if name != "_target_"}
    for name, value in given.items():
        if name not in allowed:
            raise UnknownKeyError(f"{key}.{name}", hint(name, allowed))
        check_type(value, allowed[name][0], f"{key}.{name}")
    for name, (_, required) in allowed.items():
        if required and name not in given:
            raise UserError(f"{key}.{name}: expected a value, given none")
    try:
        return cls(**given)
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(f"{key}.") else f"{key}.{message}") from error


def check_type(value: Any, annotation: Any, key: str) -> None:
    """Raise a `UserError` that names `key` unless `value` is of the annotated type (an int passes as a float).

    Whatever the type, numbers are finite and whole ones of at most 64 bits, and text can be written in UTF-8.
    """
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        raise UserError(f"{key}: expected {_words(annotation)}, given {_shown(value)}") from None
    for part in _parts(value):
        if isinstance(part, float) and not math.isfinite(part):
            raise UserError(f"{key}: expected a finite number, given {part}")
        if isinstance(part, int) and not -(2**63) <= part < 2**63:
            raise UserError(f"{key}: expected a whole number of at most 64 bits, given {_shown(part)}")
        if isinstance(part, str) and not is_text(part):
            raise UserError(f"{key}: expected text that can be written in UTF-8, given {part!r}")


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
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return {
            "NoneType": "null",
            "str": "a string",
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
        }.get(annotation.__name__, annotation.__name__)
    arguments = get_args(annotation)
    if get_origin(annotation) is not None and str(get_origin(annotation)).endswith("Literal"):
        return " or ".join(str(choice) for choice in arguments)
    if get_origin(annotation) in (list, tuple) or "Sequence" in str(get_origin(annotation)):
        return f"a list, each entry {_words(arguments[0])}"
    if "Mapping" in str(get_origin(annotation)) or get_origin(annotation) is dict:
        return f"a mapping from {_words(arguments[0])} to {_words(arguments[1])}"
    if arguments:
        return " or ".join(_words(argument) for argument in arguments)
    return str(annotation)


def unknown(key: str, hint: str) -> str:
    """The message about an unknown key: what says it now, or whatever else there is to say."""
    return f"{key}: unknown key{f' (say {REPLACED[key]})' if key in REPLACED else hint}"


def hint(name: str, allowed: Collection[str]) -> str:
    """The end of a message about an unknown key: the key that was likely meant, or all that there are."""
    near = difflib.get_close_matches(name, allowed, n=1)
    return f", did you mean {near[0]!r}?" if near else f" (there are: {', '.join(sorted(allowed))})"
