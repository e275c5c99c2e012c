"""Files that can be made again, each beside its checksum."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from edgemin.errors import UserError
from edgemin.store.content import file_digest
from edgemin.store.disk import FORBIDDEN, OUTPUTS, STORE, disk_errors, error_number, replacing, write_atomically

log = logging.getLogger(__name__)


class Cache:
    """Files that can be made again, each with its SHA-256 in `<name>.sha256` beside it.

    A file that is damaged, or whose checksum is missing, counts as absent, so that whoever needs it makes it again.

    Args:
        first: directory, part of `paths.store`, where files are looked for and made.
        spare: directory, part of `paths.outputs`, for files that may not be written into the first.
        begin: called before anything is written into the first, to make the store that it is a part of.
    """

    def __init__(self, first: Path, spare: Path | None = None, begin: Callable[[], object] = lambda: None) -> None:
        self.first, self._spare, self._begin = first, spare, begin

    def find(self, name: str) -> Path | None:
        """A whole file, by its path below the directory."""
        places = [self.first] if self._spare is None else [self.first, self._spare]
        return next((found for place in places if _is_whole(found := place / name)), None)

    def keep(self, name: str, write: Callable[[Path], object]) -> Path:
        """Make a file, atomically, by a function that is given the path to write.

        Returns:
            Where it lies.

        Raises:
            UserError: no directory takes it.
        """
        try:
            with disk_errors(self.first, STORE):
                self._begin()
                return _keep(self.first / name, write)
        except UserError as error:
            cause = error.__cause__
            if self._spare is None or not isinstance(cause, Exception) or error_number(cause) not in FORBIDDEN:
                raise
        with disk_errors(self._spare, OUTPUTS):
            return _keep(self._spare / name, write)


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
