"""A lock that several processes, of several users, may want: one file under `flock`.

The kernel releases it when its holder dies, even by `kill -9`, and knows who holds it. The right to read the file is
enough on a local disk; on NFS, whose locks are those of `fcntl`, it takes the right to write it, so that is asked for
first.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_POLL_S = 0.2


class Lock:
    """One file, to be held alone or shared. Its holder's end, however it comes, lets go of it.

    Args:
        path: made where it is missing, in a directory that exists; left there afterwards.
        mode: permissions that a new file gets whatever the umask says; `None` leaves them to it.
    """

    def __init__(self, path: Path, mode: int | None = None) -> None:
        self.path, self._mode = path, mode
        self.descriptor: int | None = None

    def acquire(
        self, *, shared: bool = False, wait: Callable[[Path], None] | None = None, deadline: float | None = None
    ) -> bool:
        """Take it.

        Args:
            shared: beside others that take it so, else alone.
            wait: told of the file before it is waited for.
            deadline: on the monotonic clock; `None` waits for as long as it takes.

        Returns:
            Whether it was had before the deadline.

        Raises:
            OSError: the file can neither be opened nor made.
        """
        while True:
            self.descriptor = _open(self.path, self._mode)
            try:
                had = _flock(self.descriptor, shared, lambda: wait and wait(self.path), deadline)
                if had and self._is_current():
                    return True
            except BaseException:  # a signal while it waits
                self.release()
                raise
            self.release()
            if not had:
                return False
            # else the file was deleted meanwhile, and a lock on it keeps nobody out

    def release(self) -> None:
        """Let go of it, if it is held."""
        if self.descriptor is not None:
            # Said aloud, because a forked child may hold the descriptor open.
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
            self.descriptor = None

    def _is_current(self) -> bool:
        assert self.descriptor is not None
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False


def holders(path: Path, table: Path = Path("/proc/locks")) -> list[int]:
    """The processes that hold a file under `flock`, where the system says so (Linux), but for this one."""
    try:
        inode, lines = path.stat().st_ino, table.read_text().splitlines()
    except OSError:
        return []
    # "4: FLOCK  ADVISORY  READ 9792 fe:00:2146378 0 EOF"; who waits has "->" for the second word
    held = (words for line in lines if (words := line.split())[1:2] == ["FLOCK"])
    pids = {int(words[4]) for words in held if int(words[5].rpartition(":")[2]) == inode}
    return sorted(pid for pid in pids if pid > 0 and pid != os.getpid())


def _flock(descriptor: int, shared: bool, wait: Callable[[], object], deadline: float | None) -> bool:
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        return True
    if deadline is None:
        wait()
        fcntl.flock(descriptor, operation)
        return True
    if time.monotonic() < deadline:
        wait()
    while time.monotonic() < deadline:  # flock itself knows no deadline
        time.sleep(_POLL_S)
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
            return True
    return False


def _open(path: Path, mode: int | None) -> int:
    """Open a file that every user may lock. Never `O_CREAT` on an existing one: Linux forbids that in `/tmp`."""
    while True:
        with suppress(FileNotFoundError):
            descriptor = _open_existing(path)
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            return descriptor
        with suppress(FileExistsError):  # another process was faster
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
            if mode is not None:
                os.fchmod(descriptor, mode)
            return descriptor


def _open_existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
            raise
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
