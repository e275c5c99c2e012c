"""The command line in this process, on a tiny study: what a command printed, and how it ended."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
import studies
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from edgemin import progress, train
from edgemin.report import write
from edgemin.study import tree


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line that a mistake is answered with, without its `error: `."""
        assert self.code == 2, self
        lines = self.err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")


Command = Callable[..., Outcome]


def in_process(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Give `edgemin.train` in this process, on a tiny study in `directory`, without figures."""
    root, threads = logging.getLogger(), torch.get_num_threads()
    level, handlers = root.level, root.handlers[:]
    torch.set_num_threads(1)
    monkeypatch.chdir(directory)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(write, "figures", lambda study: ([], []))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", directory / "datasets")
    # a process of its own would begin now to count; this one may have been silent for long, and would say something
    monkeypatch.setattr(progress, "EVERY_SECONDS", 1e6)

    def call(*overrides: str, flags: tuple[str, ...] = ()) -> Outcome:
        GlobalHydra.instance().clear()
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.setattr(tree, "told", set())
        monkeypatch.setattr(sys, "argv", ["edgemin.train", *flags, *studies.TINY, *overrides])
        capsys.readouterr()
        code = 0
        try:
            train.main()
        except SystemExit as left:
            code = int(left.code or 0)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    yield call
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    os.environ.pop("HYDRA_FULL_ERROR", None)
    root.setLevel(level)
    root.handlers[:] = handlers
    torch.set_num_threads(threads)
