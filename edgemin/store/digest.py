"""A fingerprint of the code that decides a result, so that a store never serves what older code computed."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

_PACKAGE = Path(__file__).parents[1]
# What decides no result: how settings (which are in the key) are checked, how errors read, how progress is shown, how a
# run is stopped, and the store, which gives back what was put into it or nothing.
DECIDES_NOTHING = (
    "edgemin.config",
    "edgemin.errors",
    "edgemin.plain_text",
    "edgemin.processes.stopping",
    "edgemin.progress",
    "edgemin.store",
)


@cache
def code_digest(*modules: str) -> str:
    """The SHA-256 of the syntax trees of modules and of all that they import from edgemin.

    Comments, docstrings and formatting do not count, nor does what decides no result.

    Args:
        modules: dotted names below `edgemin`, such as `edgemin.pruning.stage`; others are those of a user's own
            classes, whose file counts as it is.

    Raises:
        AssertionError: a module takes anything but a submodule from a package, so that what it uses could not be seen.
    """
    digest = hashlib.sha256()
    for name, path in code_modules(*modules).items():
        content = _foreign(name) if path is None else _read(name, path, path.stat().st_mtime_ns).content
        digest.update(f"{name}\0{content}\0".encode())
    return digest.hexdigest()[:20]


def code_modules(*modules: str) -> dict[str, Path | None]:
    """All modules whose code enters `code_digest`, sorted, with their files; `None` for a user's own."""
    found: dict[str, Path | None] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found or name.startswith(DECIDES_NOTHING):
            continue
        found[name] = path = _source(name)
        if path is not None:
            waiting += _read(name, path, path.stat().st_mtime_ns).imports
    return dict(sorted(found.items()))


class _Module(NamedTuple):
    content: str  # of its syntax tree
    imports: list[str]


@cache
def _read(name: str, path: Path, _modified: int) -> _Module:
    """A module of this package; most enter many digests."""
    tree = ast.parse(path.read_text())
    imports = _imports(name, tree)
    _drop_docstrings(tree)
    return _Module(ast.dump(tree), imports)


def _source(name: str) -> Path | None:
    """The file of a module of this package; `None` for any other."""
    if not name.startswith("edgemin."):
        return None
    path = _PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py")
    assert path.is_file(), f"expected a module, given {name}"
    return path


def _foreign(name: str) -> str:
    """A user's own class: its file counts as it is, what it imports is not followed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).read_text() if spec is not None and spec.origin is not None else name


def _imports(importer: str, tree: ast.Module) -> list[str]:
    """The modules of this package that one imports, but for types alone."""
    names: list[str] = []
    for node in _run(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.partition(".")[0] != "edgemin", _refusal(importer, f"import {alias.name}")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, _refusal(importer, "a relative import")
            if (node.module or "").partition(".")[0] == "edgemin":
                names += _taken(importer, str(node.module), [alias.name for alias in node.names])
    return names


def _taken(importer: str, module: str, names: Sequence[str]) -> list[str]:
    """The modules of `from module import names`, where `module` may be a package and the names its submodules."""
    inside = _PACKAGE.joinpath(*module.split(".")[1:])
    if not inside.is_dir():
        return [module]
    for name in names:
        assert (inside / f"{name}.py").is_file(), _refusal(importer, f"from {module} import {name}")
    return [f"{module}.{name}" for name in names]


def _refusal(importer: str, found: str) -> str:
    return f"{importer}: expected submodules imported from packages, given {found}"


def _run(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from _run(node)


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
