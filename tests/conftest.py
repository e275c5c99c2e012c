"""What many tests begin with: the toy task in tokens, and a batch of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from edgemin.data import DataModule


@pytest.fixture
def data(tmp_path: Path) -> DataModule:
    import tiny  # here, so that tests which need no torch do not wait for it

    return tiny.data(tmp_path)


@pytest.fixture
def batch(data: DataModule) -> dict[str, Tensor]:
    return data.train.batch(range(6))
