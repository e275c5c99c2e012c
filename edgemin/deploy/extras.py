"""Packages that only some users need, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from edgemin.errors import UserError


def extra(module: str, name: str) -> Any:
    """Import a package that `pip install 'edgemin[<name>]'` brings.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package and package != "transformers":
            raise  # it is there, and broken
        needed = error.name or package
        raise UserError(
            f"deploy: expected {needed} to be installed (pip install 'edgemin[{name}]'), given none"
        ) from error
