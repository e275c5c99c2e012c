"""What all command lines share: words `key=value`, a line for each mistake, exit codes, and what a signal does.

A command is a function: its arguments are the keys that a user may write, its docstring is what `--help` says. An
argument is annotated with its type, what stands behind `=` in a word or two, and what it means:

    def report(study: Annotated[str, Field(title="directory", description="a job's directory, or any above it")]): ...

Nothing that is slow to load is loaded here, so that `--help` and mistakes are answered at once; for that, a command
imports what it needs inside its function.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_type_hints

from pydantic import BaseModel, ValidationError, create_model

from edgemin.errors import UserError
from edgemin.plain_text import printable
from edgemin.processes import stopping

Command = Callable[..., None]
_HELP = {"-h", "--help"}


class Failure(NamedTuple):
    """What is said of something that went wrong, and whether it was foreseen: then it is a mistake of the user's."""

    line: str
    foreseen: bool = True


def run(program: str, command: Command | Mapping[str, Command], words: Sequence[str]) -> int:
    """Run a command as its command line asks; gives the exit code as [`guarded`][edgemin.cli.guarded] does.

    Args:
        program: how the user calls it, such as `python -m edgemin.report`.
        command: the function; or several, by the verb that the user writes first.
        words: what stands behind the program.
    """
    with stopping.handled(advice=""):
        return guarded(lambda: _run(program, command, words))


def guarded(action: Callable[[], int | None]) -> int:
    """Do something, and say what goes wrong in a line; with a traceback too where `EDGEMIN_TRACEBACK` is set.

    Returns:
        The exit code: that of the action, 0 for None; 2 after a mistake of the user's, 1 after what nobody foresaw. A
        signal ends the process with 143 (SIGTERM) or 130 (SIGINT), see [`stopping`][edgemin.processes.stopping].
    """
    with stopping.handled():
        try:
            return action() or 0
        except Exception as error:
            found = failures(error)
            tell(found, error)
            return exit_code(found)


def failures(error: Exception) -> list[Failure]:
    """What is said of an exception. What a file system refuses (no permission, a full disk) counts as foreseen."""
    if isinstance(error, UserError):
        return [Failure(printable(str(line))) for line in error.args]
    if isinstance(error, OSError) and error.strerror:
        return [Failure(printable(": ".join(str(part) for part in (error.filename, error.strerror) if part)))]
    line = f"{type(error).__name__}: {error} (not foreseen; EDGEMIN_TRACEBACK=1 shows where)"
    return [Failure(printable(line), foreseen=False)]


def tell(found: Iterable[Failure], error: Exception, *, with_traceback: bool = False) -> None:
    """Print failures on standard error, and the traceback of their exception if it is asked for."""
    for failure in found:
        print(f"error: {failure.line}", file=sys.stderr, flush=True)
    if with_traceback or os.environ.get("EDGEMIN_TRACEBACK"):
        traceback.print_exception(error)


def exit_code(found: Iterable[Failure]) -> int:
    """0 if nothing went wrong, 2 if all that did was foreseen, else 1."""
    return min((2 if failure.foreseen else 1 for failure in found), default=0)


def _run(program: str, command: Command | Mapping[str, Command], words: Sequence[str]) -> None:
    if not isinstance(command, Mapping):
        model = _model(command)
        if _HELP & {*words}:
            print(_help(program, command, model))
        else:
            command(**_values(model, words))
    elif words and words[0] in command:
        _run(f"{program} {words[0]}", command[words[0]], words[1:])
    elif words and words[0] in _HELP:
        print(f"{program} <verb>\n\n{_table({verb: _doc(one)[0] for verb, one in command.items()})}")
    else:
        raise UserError(f"expected {' or '.join(command)}, given {words[0] if words else 'nothing'} (see --help)")


def _model(command: Command) -> type[BaseModel]:
    """The keys of a command as the fields of a model, by which pydantic checks what is written for them."""
    hints, parameters = get_type_hints(command, include_extras=True), inspect.signature(command).parameters
    fields: dict[str, Any] = {
        name: (hints[name], ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in parameters.items()
    }
    return create_model(command.__name__, __config__={"allow_inf_nan": False}, **fields)


def _forms(model: type[BaseModel]) -> dict[str, str]:
    return {name: f"{name}=<{field.title}>" for name, field in model.model_fields.items()}


def _values(model: type[BaseModel], words: Sequence[str]) -> dict[str, Any]:
    """What the words give a command.

    Raises:
        UserError: a line for each word or key that cannot be.
    """
    fields, pairs = model.model_fields, [word.partition("=") for word in words]
    given = {name: [_unquoted(text) for key, equals, text in pairs if equals and key == name] for name in fields}
    known = " or ".join(_forms(model).values())
    mistakes = [f"expected {known}, given {''.join(pair)}" for pair in pairs if not (pair[1] and pair[0] in fields)]
    wrong = [name for name, texts in given.items() if len(texts) > 1 or texts == [""]]
    if not (mistakes or wrong):
        try:
            return dict(model.model_validate({name: texts[0] for name, texts in given.items() if texts}))
        except ValidationError as error:
            wrong = [*dict.fromkeys(str(found["loc"][0]) for found in error.errors())]
    for name in wrong:
        title, texts = str(fields[name].title), given[name]
        count = "one" if len(texts) > 1 else "an" if title[0] in "aeiou" else "a"
        mistakes.append(f"{name}: expected {count} {title}, given {' and '.join(texts) or 'nothing'}")
    raise UserError(*(f"{line} (see --help)" for line in mistakes))


def _unquoted(text: str) -> str:
    """A value without the quotes around it; those inside, and one at an end alone, are the user's own."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _help(program: str, command: Command, model: type[BaseModel]) -> str:
    forms, fields = _forms(model), model.model_fields
    usage = [form if fields[name].is_required() else f"[{form}]" for name, form in forms.items()]
    first, more = _doc(command)
    table = _table({form: str(fields[name].description) for name, form in forms.items()})
    return "\n\n".join(filter(None, (" ".join([program, *usage]), first, table, more)))


def _doc(command: Command) -> tuple[str, str]:
    """The first paragraph of a docstring, and the rest."""
    first, _, more = (inspect.getdoc(command) or "").partition("\n\n")
    return first, more


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}   {meaning}" for name, meaning in rows.items())
