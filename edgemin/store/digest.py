"""A fingerprint of the code that decides a result, so that a store never serves what older code computed."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
#: What only tells how far a computation is decides no result.
_TELLS = ("edgemin.progress",)


@cache
def code_digest(*modules: str) -> str:
    """The SHA-256 of the syntax trees of modules and of all that they import from edgemin.

    Comments, docstrings and formatting do not count, nor does the code that shows progress.

    Args:
        modules: dotted names below ``edgemin``, such as ``edgemin.pruning.stage``; others stand for themselves by name.
    """
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found or name in _TELLS:
            continue
        path = _source(name)
        if path is None:
            found[name] = _foreign(name)
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


def _foreign(name: str) -> str:
    """A user's own class: its file counts as it is, what it imports is not followed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).read_text() if spec is not None and spec.origin is not None else name


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
    """Strings that stand alone say something and do nothing: docstrings, also those below an assignment."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                kept = [entry for entry in block if not _is_text(entry)]
                setattr(node, name, kept or [ast.Pass()] if block else block)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
