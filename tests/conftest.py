"""What many tests begin with: the toy task in tokens, a batch of it, and the command line in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from commands import Command
    from torch import Tensor

    from edgemin.data.module import DataModule


@pytest.fixture
def data(tmp_path: Path) -> DataModule:
    import tiny  # here, so that tests which need no torch do not wait for it

    return tiny.data(tmp_path)


@pytest.fixture
def batch(data: DataModule) -> dict[str, Tensor]:
    return data.train.batch(range(6))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    import commands

    yield from commands.in_process(tmp_path, monkeypatch, capsys)
