"""Files that are either whole or not there, and what a file system refuses, said in one line."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgemin.errors import UserError

STORE, OUTPUTS = "paths.store", "paths.outputs"  # the settings that a refusal names
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)  # what another place may still allow
_IN_THE_WAY = "a file stands where a directory is needed"
_NO_LOCKS = "the file system gives no locks (on NFS: a mount without them)"
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than the limit for files (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.EBADF: _NO_LOCKS,
    errno.ENOLCK: _NO_LOCKS,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: "a directory stands where a file is needed",
    errno.ELOOP: "a symbolic link that leads nowhere stands where a file or directory is needed",
}


def sync(path: Path) -> None:
    """Wait until a file, or the list of a directory's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file to write; left without an error it becomes `path`, all at once.

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
    """Whether the effective user may read (`os.R_OK`), write or enter a path; on a read-only disk nobody writes."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)
