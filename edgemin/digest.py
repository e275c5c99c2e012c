"""A fingerprint of the code that decides a result, so that a store never serves what older code computed."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent


@cache
def code_digest(*modules: str) -> str:
    """The SHA-256 of the syntax trees of modules and of all that they import from edgemin.

    Comments, docstrings and formatting do not count.

    Args:
        modules: dotted names below ``edgemin``, such as ``edgemin.stages.prune``; others stand for themselves by name.
    """
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = _source(name)
        if path is None:
            found[name] = name  # a user's own class: its file is not ours to follow
            continue
        tree = ast.parse(path.read_text())
        waiting += _imports(tree)
        _drop_docstrings(tree)
        found[name] = ast.dump(tree)
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{name}\0{found[name]}\0".encode())
    return digest.hexdigest()[:20]


def _source(name: str) -> Path | None:
    if name != "edgemin" and not name.startswith("edgemin."):
        return None
    base = _PACKAGE.joinpath(*name.split(".")[1:])
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _imports(tree: ast.Module) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.startswith("edgemin.")]
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module is not None
            and node.level == 0
            and node.module.startswith("edgemin")
        ):
            # `from edgemin import encoder` names a module, `from edgemin.encoder import read` something in one
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name for name in inner if _source(name) is not None]
            if node.module != "edgemin":
                names.append(node.module)
    return names


def _drop_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
