"""Errors that are meant for the user: what was given cannot work, and why; and what errors of others say."""

from __future__ import annotations

from typing import Any


class UserError(ValueError):
    """Something the user gave cannot work: one line that says what was expected, what was given, and which key.

    The command line prints it without a traceback and exits with code 2. A programmer's mistake is an `assert`.

    Args:
        lines: the mistake; or several, each of which is told in a line of its own.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class SharedError(UserError):
    """A mistake of the user's that every process of several knows of: none waits for another in vain."""


def first_line(error: Exception) -> str:
    """What an error of a library says, as part of a line: its first line, at most 200 characters, or else its kind."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def check_name(value: Any, key: str) -> None:
    """Raise a `UserError` that names `key` unless `value` can be the name of a file or directory, and no more."""
    if not isinstance(value, str) or not value.strip() or value in (".", "..") or "/" in value or "\\" in value:
        raise UserError(f"{key}: expected a name, without / and no path, given {value!r}")
    if not value.isprintable() or len(value.encode()) > 100:
        raise UserError(f"{key}: expected a name of at most 100 printable characters, given {value!r}")
