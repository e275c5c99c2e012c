"""What was read from files, remembered in this process for as long as the files stay as they are.

All jobs of a sweep share a process, and all ask for the same checkpoints, data and artifacts. A file is taken for
unchanged while its size, its times and its inode are; so a rewritten or replaced one is read again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
State = tuple[str, int, int, int, int] | None

# A file may change twice within one tick of its file system's clock, which is up to two seconds long (FAT), and show
# the same time after both. What was read of so fresh a file is therefore not remembered yet.
_TICK_NS = 2_000_000_000


class Memo(Generic[T]):
    """Results of reading files, by whatever names them; one of other files than before takes the old one's place.

    Args:
        most: how many are kept, those that were asked for last; all where `None`.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._known: dict[Hashable, tuple[tuple[State, ...], T]] = {}

    def of(self, key: Hashable, files: Iterable[Path], make: Callable[[], T]) -> T:
        """What `make` returns, or returned before for this key and these files in the state in which they are now.

        Args:
            key: what is asked for, with all that decides it besides the contents of the files.
            files: that it is made from; a missing one has a state too. None at all: it stays as it is.
            make: reads them. What it raises is not remembered.
        """
        files = tuple(files)
        before = tuple(map(_state, files))
        known = self._known.pop(key, None)
        if known is not None and known[0] == before:
            self._known[key] = known  # the last again
            return known[1]
        made = make()
        if _has_settled(before) and before == tuple(map(_state, files)):
            self._known[key] = before, made
            while self._most is not None and len(self._known) > self._most:
                del self._known[next(iter(self._known))]
        return made


def _state(path: Path) -> State:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _has_settled(states: Iterable[State]) -> bool:
    return all(state is None or state[2] < time.time_ns() - _TICK_NS for state in states)
