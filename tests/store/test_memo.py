"""What was read from files is remembered while they stay as they are, and never longer."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from edgemin.store.content import content_key, digest, file_digest
from edgemin.store.memo import Memo

HOUR_NS = 3600 * 10**9


def settle(path: Path, hours: int = 1) -> None:
    """As if it had been written hours ago."""
    then = time.time_ns() - hours * HOUR_NS
    os.utime(path, ns=(then, then))


class Reader:
    """Reads files and counts how often."""

    def __init__(self, memo: Memo[str], *files: Path) -> None:
        self.memo, self.files, self.reads = memo, files, 0

    def __call__(self, key: str = "key") -> str:
        return self.memo.of(key, self.files, self.read)

    def read(self) -> str:
        self.reads += 1
        return "".join(file.read_text() for file in self.files if file.exists())


def test_files_that_stay_as_they_are_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    settle(tmp_path / "a")
    reader = Reader(Memo(), tmp_path / "a", tmp_path / "missing")
    assert [reader(), reader(), reader()] == ["1", "1", "1"] and reader.reads == 1
    assert reader("another") == "1" and reader.reads == 2
    (tmp_path / "missing").write_text("2")
    settle(tmp_path / "missing")
    assert [reader(), reader()] == ["12", "12"] and reader.reads == 3


def same_size(path: Path) -> None:
    path.write_text("2")


def same_size_and_time(path: Path) -> None:
    times = path.stat()
    path.write_text("2")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replaced(path: Path) -> None:
    times = path.stat()
    path.with_name("new").write_text("2")
    os.utime(path.with_name("new"), ns=(times.st_atime_ns, times.st_mtime_ns))
    path.with_name("new").replace(path)


@pytest.mark.parametrize("change", [same_size, same_size_and_time, replaced])
def test_a_changed_file_is_read_again(tmp_path: Path, change: object) -> None:
    assert callable(change)
    path = tmp_path / "a"
    path.write_text("1")
    settle(path)
    reader = Reader(Memo(), path)
    assert [reader(), reader()] == ["1", "1"] and reader.reads == 1
    change(path)
    assert reader() == "2"
    path.unlink()
    assert reader() == ""


def test_what_is_fresh_or_changes_while_it_is_read_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("1")
    fresh = Reader(Memo(), path)
    assert [fresh(), fresh()] == ["1", "1"] and fresh.reads == 2  # it may change again within a tick of the clock
    settle(path)
    memo = Memo[str]()

    def disturbed() -> str:
        found = path.read_text()
        path.write_text("2")
        settle(path)
        return found

    assert memo.of("key", [path], disturbed) == "1"
    assert memo.of("key", [path], path.read_text) == "2"


def test_an_error_is_not_remembered_and_the_oldest_makes_room(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("1")
    settle(path)
    reader = Reader(Memo(most=2), path)
    with pytest.raises(ZeroDivisionError):
        reader.memo.of("first", [path], lambda: str(1 / 0))
    for key in ("first", "second", "first", "third", "first"):
        reader(key)
    assert reader.reads == 3
    reader("second")
    assert reader.reads == 4


def test_a_digest_is_that_of_all_parts_together(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest("abc") == digest(b"abc") == digest(["a", b"bc"]) == file_digest(tmp_path / "a")
    assert digest("abc").startswith("ba7816bf8f01cfea")  # FIPS 180-2
    assert content_key("abc") == digest('"abc"')[:20]
