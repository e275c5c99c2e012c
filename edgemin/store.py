"""The content-addressed store: what was computed once is never computed again, and what is there is whole.

Layout below ``paths.store``::

    <key>/            an artifact, committed: complete, checksummed, never changed again
    .work/<key>/      checkpoints of a stage that is running or was killed
    .locks/<key>      one per key: who holds it computes, the others wait
    .results/         evaluations and measurements, small JSON (and predictions)
    .tokens/          tokenised data sets

A commit writes into a temporary directory, syncs it and renames it: there is no moment at which a half-written
artifact has its name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edgemin.errors import UserError

MANIFEST = "manifest.json"


def content_key(content: Mapping[str, Any]) -> str:
    """The key of a JSON-able description: 20 hex digits of the SHA-256 of its canonical form."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """Artifacts and results under content keys.

    Args:
        root: ``paths.store``; made when missing.

    Raises:
        UserError: the directory cannot be made or written.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        try:
            for name in (".work", ".locks", ".results", ".tokens"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"paths.store: expected a directory that can be made, given {root} ({error.strerror})"
            ) from error

    def path(self, key: str) -> Path:
        """Where the artifact of a key lies, or would."""
        return self.root / key

    def has(self, key: str) -> bool:
        """Whether a key is committed (a directory with a manifest)."""
        return (self.path(key) / MANIFEST).is_file()

    def verify(self, key: str) -> None:
        """Compare an artifact with its manifest.

        Raises:
            UserError: a file is missing, changed or truncated: names it and says what to do.
        """
        directory = self.path(key)
        try:
            manifest = json.loads((directory / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"artifact {directory}: {MANIFEST} cannot be read; delete the directory to compute it again"
            ) from error
        for name, digest in manifest.items():
            file = directory / name
            if not file.is_file() or file_digest(file) != digest:
                state = "differs from its checksum" if file.is_file() else "is missing"
                raise UserError(
                    f"artifact {directory}: corrupted, {name} {state}; delete the directory to compute it again"
                )

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold a key: two runs that need the same node compute it once. A process that dies lets go."""
        lock = FileLock(self.root / ".locks" / key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting is not None:
                waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def work_path(self, key: str) -> Path:
        """Where an unfinished stage keeps its checkpoints, or would."""
        return self.root / ".work" / key

    def work(self, key: str) -> Path:
        """The directory in which an unfinished stage keeps its checkpoints."""
        directory = self.work_path(key)
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    @contextmanager
    def commit(self, key: str) -> Iterator[Path]:
        """Give a temporary directory to fill; left without an error it becomes the artifact of ``key``, all at once.

        Raises:
            UserError: the disk is full or cannot be written; nothing half-written stays, checkpoints do.
        """
        with disk_errors(self.root):
            for left_over in self.root.glob(f".{key}-*"):  # of a killed run; this one holds the key's lock
                shutil.rmtree(left_over)
            temporary = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=self.root))
            try:
                yield temporary
                files = sorted(file for file in temporary.rglob("*") if file.is_file())
                manifest = {str(file.relative_to(temporary)): file_digest(file) for file in files}
                (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
                for file in [*files, temporary / MANIFEST]:
                    _sync(file)
                _sync(temporary)
                temporary.chmod(0o755)  # mkdtemp's is 0700; a store may be shared
                if self.path(key).is_dir():  # without a manifest, or it would have been taken for computed
                    shutil.rmtree(self.path(key))
                temporary.rename(self.path(key))
                _sync(self.root)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        shutil.rmtree(self.work_path(key), ignore_errors=True)

    def result(self, kind: str, key: str) -> dict[str, Any] | None:
        """A result kept earlier, or ``None``. A damaged one counts as absent: it is cheap to make again."""
        path = self._result_path(kind, key)
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def keep_result(self, kind: str, key: str, content: Mapping[str, Any]) -> None:
        """Keep a result, atomically."""
        path = self._result_path(kind, key)
        with disk_errors(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())

    def _result_path(self, kind: str, key: str) -> Path:
        return self.root / ".results" / kind / f"{key}.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or not there."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def disk_errors(where: Path, key: str = "paths.store") -> Iterator[None]:
    """Turn what the file system refuses (full, read-only, forbidden) into one line; all else passes unchanged."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "no permission to write",
        errno.ENOTDIR: "a file stands where a directory is needed",
        errno.EEXIST: "a file stands where a directory is needed",
    }
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number is None or number not in reasons:
            raise
        raise UserError(
            f"{key}: {reasons[number]} ({where}); what was already computed is kept, run again to go on"
        ) from error


def _errno(error: Exception) -> int | None:
    """The system's number of an error; safetensors and tokenizers (Rust) have it in their message alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
