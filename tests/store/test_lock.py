"""The lock that artifacts and the machine share: whose it is, and what stands in its file's place."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from edgemin.store.lock import Lock, holders


def test_who_holds_a_lock_is_unknown_where_the_system_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    assert holders(tmp_path / "lock", tmp_path / "no table") == []
    inode = (tmp_path / "lock").stat().st_ino
    lines = [
        f"1: FLOCK  ADVISORY  READ 4711 fe:00:{inode} 0 EOF",
        f"1: -> FLOCK  ADVISORY  WRITE 4712 fe:00:{inode} 0 EOF",
        f"2: POSIX  ADVISORY  WRITE 4713 fe:00:{inode} 0 EOF",
        f"3: FLOCK  ADVISORY  READ 0 fe:00:{inode} 0 EOF",  # in another container
        f"4: FLOCK  ADVISORY  READ 4714 fe:00:{inode + 1} 0 EOF",
    ]
    (tmp_path / "table").write_text("\n".join(lines) + "\n")
    assert holders(tmp_path / "lock", tmp_path / "table") == [4711]


def test_a_lock_on_a_deleted_file_does_not_count(tmp_path: Path) -> None:
    held, told = threading.Event(), threading.Event()

    def wait(path: Path) -> None:
        told.set()

    lock = Lock(tmp_path / "lock")
    lock.acquire(wait=wait)
    other = Lock(tmp_path / "lock")

    def take() -> None:
        other.acquire(wait=wait)
        held.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert told.wait(30)
    (tmp_path / "lock").unlink()
    lock.release()
    assert held.wait(30)
    thread.join()
    assert other.descriptor is not None
    assert os.path.samestat(os.fstat(other.descriptor), os.stat(tmp_path / "lock"))
    other.release()


def test_a_directory_is_no_lock(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        Lock(tmp_path).acquire()


def test_what_is_shared_keeps_out_who_wants_it_alone(tmp_path: Path) -> None:
    first, second, alone = (Lock(tmp_path / "lock") for _ in range(3))
    assert first.acquire(shared=True) and second.acquire(shared=True, deadline=0)
    assert not alone.acquire(deadline=0) and alone.descriptor is None
    first.release()
    second.release()
    assert alone.acquire(deadline=0)
    alone.release()


def test_a_lock_asks_to_write_as_nfs_needs_it_and_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, opened = Lock(tmp_path / "lock"), os.open
    for _ in range(2):  # made, then found
        lock.acquire()
        assert lock.descriptor is not None and fcntl.fcntl(lock.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        lock.release()

    def read_only(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    assert lock.acquire()
    lock.release()
