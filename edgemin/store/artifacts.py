"""The content-addressed store: what was computed once is never computed again, and what is there is whole.

Layout below `paths.store`:

    .format           the format of all that lies beside it: made before anything else, see `FORMAT`
    <key>/            an artifact with its training curves, committed: complete, checksummed, never changed again
    .work/<key>/      checkpoints of a stage that is running or was killed
    .locks/<key>      one per key: who holds it computes, the others wait
    .results/         evaluations and measurements: small JSON and predictions, each with its checksum
    .tokens/          tokenized data sets and teachers' outputs, each with its checksum

A commit writes into a temporary directory, syncs it and renames it: there is no moment at which a half-written
artifact has its name. Reading makes nothing and locks nothing, so that a store may belong to another user: what is
new and can be made again goes below `paths.outputs` then (`.results` and `.tokens` there).
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgemin.errors import UserError
from edgemin.store.cache import Cache
from edgemin.store.content import content_key, file_digest
from edgemin.store.disk import disk_errors, is_allowed, refusal, sync, write_atomically
from edgemin.store.json_file import read_object
from edgemin.store.lock import Lock

MANIFEST = "manifest.json"
MARK = ".format"
# Raised whenever code of today would misread what code of before has stored.
FORMAT = "2"
_OWN = (".work", ".locks", ".results", ".tokens")


class Store:
    """Artifacts and results under content keys.

    Args:
        root: `paths.store`; made when something is written into it.
        outputs: `paths.outputs`, where new results go that may not be written into the store.

    Attributes:
        tokens: token ids and what teachers say of them.
        results: evaluations and measurements, by kind and key.

    Raises:
        UserError: the directory cannot be read, or is missing and cannot be made, or holds results in another format.
    """

    def __init__(self, root: str | Path, outputs: str | Path | None = None) -> None:
        self.root = Path(root).expanduser()
        reason = None if self.root.is_dir() else refusal(self.root)
        if reason is not None:
            raise UserError(f"paths.store: expected a directory that can be made, given {root} ({reason})")
        if self.root.is_dir() and not is_allowed(self.root, os.R_OK | os.X_OK):
            raise UserError(f"paths.store: expected a directory that can be read, given {root} (Permission denied)")
        self._check_format()
        spare = None if outputs is None else Path(outputs).expanduser()
        self.tokens, self.results = (
            Cache(self.root / name, None if spare is None else spare / name, self._begin)
            for name in (".tokens", ".results")
        )

    def _check_format(self) -> None:
        """Refuse a store with another mark, or with results and no mark, as all had before there was one."""
        try:
            found = (self.root / MARK).read_text(errors="replace").strip()
            given = f"one of format {found[:20]!r}"
        except FileNotFoundError:
            artifact = next(self.root.glob(f"*/{MANIFEST}"), None)
            if artifact is None and not any((self.root / name).exists() for name in _OWN):
                return  # nothing was stored yet
            found, given = "", "one of an older version"
        except OSError as error:
            found, given = "", f"one whose {MARK} cannot be read ({error.strerror})"
        if found != FORMAT:
            raise UserError(
                f"paths.store: expected a new store or one of format {FORMAT!r}, given {given} in {self.root}; name "
                "another directory, or delete that one, to compute its results again"
            )

    def _begin(self) -> None:
        """Make the directory and its mark, before anything else is written there."""
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            if not (self.root / MARK).exists():
                write_atomically(self.root / MARK, f"{FORMAT}\n".encode())

    def path(self, key: str) -> Path:
        """Where the artifact of a key lies, or would."""
        return self.root / key

    def has(self, key: str) -> bool:
        """Whether a key is committed (a directory with a manifest)."""
        try:
            return (self.path(key) / MANIFEST).is_file()
        except PermissionError as error:
            raise UserError(f"artifact {self.path(key)}: expected one that can be read, given no permission") from error

    def verify(self, key: str) -> None:
        """Compare an artifact with its manifest.

        Raises:
            UserError: a file is missing, changed or truncated: names it and says what to do.
        """
        directory = self.path(key)
        again = "delete the directory to compute it again"
        for name, digest in _read_manifest(directory / MANIFEST, again).items():
            file = directory / name
            try:
                if file.is_file() and file_digest(file) == digest:
                    continue
                state = "differs from its checksum" if file.is_file() else "is missing"
            except PermissionError as error:
                raise UserError(f"artifact {directory}: no permission to read {name}") from error
            raise UserError(f"artifact {directory}: corrupted, {name} {state}; {again}")

    def check_writable(self, keys: Mapping[str, str]) -> None:
        """Refuse to compute what cannot be kept.

        Args:
            keys: of all that is needed, with a name of each for the message; what is stored already is only read.

        Raises:
            UserError: something is not stored, and the store cannot be written.
        """
        missing = {key: name for key, name in keys.items() if not self.has(key)}
        for key, name in missing.items():
            needed = [self.root, self.root / ".locks", self.work_path(key)]
            if self.path(key).is_dir() and not self.path(key).is_symlink():  # without a manifest: makes way
                needed.append(self.path(key))
            for directory in needed:
                if reason := refusal(directory):
                    raise UserError(
                        f"paths.store: expected a store that can be written, as {len(missing)} of {len(keys)} results "
                        f"are not in it (such as {name}), given {directory} ({reason})"
                    )

    @contextmanager
    def lock(self, key: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold a key: two runs that need the same node compute it once. A process that dies lets go."""
        lock = Lock(self.root / ".locks" / key)
        with disk_errors(self.root):
            self._begin()
            lock.path.parent.mkdir(exist_ok=True)
            lock.acquire(wait=lambda _: waiting() if waiting is not None else None)
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
        self._begin()
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    @contextmanager
    def commit(self, key: str) -> Iterator[Path]:
        """Give a temporary directory to fill; left without an error it becomes the artifact of `key`, all at once.

        Raises:
            UserError: the disk is full or cannot be written; nothing half-written stays, checkpoints do.
        """
        with disk_errors(self.root):
            self._begin()
            for left_over in self.root.glob(f".{key}-*"):  # of a killed run; this one holds the key's lock
                shutil.rmtree(left_over)
            temporary = self.root / f".{key}-{uuid.uuid4().hex}"
            try:
                temporary.mkdir()
                yield temporary
                _seal(temporary)
                _make_way(self.path(key))
                temporary.rename(self.path(key))
                sync(self.root)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        shutil.rmtree(self.work_path(key), ignore_errors=True)

    def result(self, kind: str, key: str) -> dict[str, Any] | None:
        """A result kept earlier, or `None`. A damaged one counts as absent: it is cheap to make again."""
        path = self.results.find(f"{kind}/{key}.json")
        return None if path is None else read_object(path)

    def keep_result(self, kind: str, key: str, content: Mapping[str, Any]) -> None:
        """Keep a result, atomically."""
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        self.results.keep(f"{kind}/{key}.json", lambda path: path.write_text(text))


def _seal(directory: Path) -> None:
    """Give all files of an artifact the permissions of new ones, list them with their checksums, bring all to disk."""
    mode = directory.stat().st_mode & 0o666  # what the umask leaves; safetensors writes files for their owner alone
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    for file in files:
        file.chmod(mode)
    digests = {str(file.relative_to(directory)): file_digest(file) for file in files}
    manifest = {"files": digests, "sha256": content_key(digests)}  # its own checksum: an empty list is no artifact
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*files, directory / MANIFEST, directory]:
        sync(path)


def _read_manifest(path: Path, again: str) -> dict[str, str]:
    try:
        manifest = read_object(path)
        files: dict[str, str] = manifest["files"]
        whole = manifest["sha256"] == content_key(files)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"artifact {path.parent}: {path.name} cannot be read; {again}") from error
    if not whole:
        raise UserError(f"artifact {path.parent}: corrupted, {path.name} differs from its checksum; {again}")
    return files


def _make_way(path: Path) -> None:
    """Remove what stands in a key's place: a file, a link, or a directory without a manifest."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
