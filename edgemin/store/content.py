"""SHA-256 of contents: of bytes, of files, and of descriptions, whose hash is the key that a result is kept under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgemin.store.memo import Memo

_files = Memo[str]()


def digest(content: bytes | str | Iterable[bytes | str]) -> str:
    """The SHA-256, 64 hex digits, of bytes or a text (in UTF-8), or of many of them one after the other."""
    found = hashlib.sha256()
    for part in [content] if isinstance(content, bytes | str) else content:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, read once in this process for as long as it stays as it is."""

    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return _files.of(path, [path], read)


def content_key(content: Any) -> str:
    """The key of anything that JSON can describe: 20 hex digits of the SHA-256 of its canonical form."""
    return digest(json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True))[:20]
