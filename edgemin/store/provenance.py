"""What made a result, as far as it can be looked up again: versions and the commit."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from functools import cache
from pathlib import Path

from edgemin import __version__

_PACKAGES = ("torch", "transformers", "pytorch-lightning", "datasets", "tokenizers", "torchmetrics")


@cache
def versions() -> dict[str, str]:
    """Versions of what decides results and times, with what tells builds of one release apart (`2.13.0+cpu`)."""
    return {"edgemin": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def releases(*names: str) -> dict[str, str]:
    """Some of `versions` as they enter a key: without the build, as all builds of a release compute the same."""
    return {name: versions()[name].partition("+")[0] for name in names}


@cache
def git_revision() -> str | None:
    """The commit of the clone that the code runs from, with `-dirty` where it was changed; `None` outside one."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
