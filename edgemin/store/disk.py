"""Files that are either whole or not there, and what a file system refuses, said in one line."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgemin.errors import UserError

log = logging.getLogger(__name__)

STORE, OUTPUTS = "paths.store", "paths.outputs"  #: the settings that a refusal names
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = "a file stands where a directory is needed"
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than the limit for files (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: "a directory stands where a file is needed",
    errno.ELOOP: "a symbolic link that leads nowhere stands where a file or directory is needed",
}


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the list of a directory's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file to write; left without an error it becomes ``path``, all at once.

    Its permissions are those of a new file, whatever the writer made of them (safetensors makes files that their owner
    alone may read).
    """
    temporary = path.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or not there."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def disk_errors(where: Path, key: str = STORE) -> Iterator[None]:
    """Turn what the file system refuses (full, read-only, forbidden) into one line; all else passes unchanged.

    Args:
        where: the directory that is worked in.
        key: the setting that names it. A file that is known to lie elsewhere is named without it.
    """
    try:
        yield
    except Exception as error:
        number = error_number(error)
        if number is None or number not in _REASONS:
            raise
        file = getattr(error, "filename", None)
        place = Path(os.fsdecode(file)) if isinstance(file, str | bytes | os.PathLike) else where
        inside = place.absolute().is_relative_to(where.absolute())
        if inside and any(part.startswith(".writing-") for part in place.parts):
            place = place.parent  # the name of a temporary file says nothing
        raise UserError(
            f"{f'{key}: ' if inside else ''}{_REASONS[number]} ({place}); what was already computed is kept, run again "
            "to go on"
        ) from error


def error_number(error: Exception) -> int | None:
    """The system's number of an error; safetensors and tokenizers (Rust) have it in their message alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def refusal(path: Path) -> str | None:
    """Why the effective user cannot write into a directory, or make it, if so; nothing is made to find out."""
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        return os.strerror(errno.ENOTDIR)
    return None if is_allowed(there, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


def is_allowed(path: Path, mode: int) -> bool:
    """Whether the effective user may read (``os.R_OK``), write or enter a path; on a read-only disk nobody writes."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


class Cache:
    """Files that can be made again, each with its SHA-256 in ``<name>.sha256`` beside it.

    A file that is damaged, or whose checksum is missing, counts as absent, so that whoever needs it makes it again.

    Args:
        first: directory, part of ``paths.store``, where files are looked for and made.
        spare: directory, part of ``paths.outputs``, for files that may not be written into the first.
    """

    def __init__(self, first: Path, spare: Path | None = None) -> None:
        self.first = first
        self._places = {first: STORE} if spare is None else {first: STORE, spare: OUTPUTS}

    def find(self, name: str) -> Path | None:
        """A whole file, by its path below the directory."""
        return next((found for place in self._places if _is_whole(found := place / name)), None)

    def keep(self, name: str, write: Callable[[Path], object]) -> Path:
        """Make a file, atomically, by a function that is given the path to write.

        Returns:
            Where it lies.

        Raises:
            UserError: no directory takes it.
        """
        *preferred, last = self._places
        for place in preferred:
            try:
                with disk_errors(place, self._places[place]):
                    return _keep(place / name, write)
            except UserError as error:
                if not isinstance(cause := error.__cause__, Exception) or error_number(cause) not in _FORBIDDEN:
                    raise
        with disk_errors(last, self._places[last]):
            return _keep(last / name, write)


def _checksum(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _keep(path: Path, write: Callable[[Path], object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write(temporary)
        digest = file_digest(temporary)
    write_atomically(_checksum(path), f"{digest}\n".encode())
    return path


def _is_whole(path: Path) -> bool:
    try:
        wanted = _checksum(path).read_bytes().decode("ascii", errors="replace").strip()
        if file_digest(path) == wanted:
            return True
        state = "differs from its checksum"
    except FileNotFoundError:
        return False
    except OSError as error:
        state = f"cannot be read ({error.strerror})"
    log.warning("%s %s and is made again", path, state)
    return False
