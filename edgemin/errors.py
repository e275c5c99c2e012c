"""The one kind of error that is meant for the user."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot work: one line that says what was expected, what was given, and which key.

    The command line prints it without a traceback and exits with code 2. A programmer's mistake is an ``assert``.
    """
