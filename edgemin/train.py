"""`python -m edgemin.train`: from one configuration to the stage table.

Only Hydra is loaded at the top, so that `--help` and `--cfg job` are answered at once; what needs torch is loaded when
jobs are planned, or when several processes start.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path

from edgemin.processes import stopping

if __name__ == "__main__":
    stopping.install()  # before all that takes time to load

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from edgemin import cli
from edgemin.processes import launch
from edgemin.study import jobs
from edgemin.study.settings import conf_directory


@hydra.main(version_base="1.3", config_path=conf_directory(), config_name="train")
def _job(cfg: DictConfig) -> None:
    with stopping.handled():  # in a launcher's process, which did not come through main()
        jobs.run(cfg)


def main() -> None:
    """Run the command line, and leave with an exit code as [`cli.guarded`][edgemin.cli.guarded] gives it.

    Of several processes, as torchrun or srun starts them, all run the jobs; the first has their directories and speaks.
    """
    sys.exit(cli.guarded(_all_jobs))


def _flags_first(words: list[str]) -> list[str]:
    """The same command line with its keys in one piece, which Hydra's parser asks for, wherever its flags stood."""
    keys: list[str] = get_args_parser().parse_intermixed_args(words).overrides
    flags, left = [], list(keys)
    for word in words:
        if left and word == left[0]:
            left.pop(0)
        else:
            flags.append(word)
    return [*flags, *keys]


def _all_jobs() -> int:
    sys.argv[1:] = _flags_first(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing several lines and leaving
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # Ray drops lines that differ from others in numbers alone
    here, mine = launch.place(), jobs.Jobs()
    if here.world == 1:
        mine.run(_job)
    else:
        # before torch is loaded: DDP warns where it looked for parameters without a gradient and found none
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from edgemin.processes import ranks

        ranks.start()
        with nullcontext() if here.rank == 0 else _aside():
            mine.run(_job)
        ranks.finish("; ".join(failure.line for failure in mine.failed) or None)
    return cli.exit_code(mine.failed)


@contextmanager
def _aside() -> Iterator[None]:
    """For a process that is not the first: a job's directory that is thrown away, and no voice."""
    with (
        tempfile.TemporaryDirectory(prefix="edgemin-") as directory,
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        warnings.catch_warnings(action="ignore"),
    ):
        sys.argv += [f"hydra.run.dir='{directory}'", f"hydra.sweep.dir='{directory}'", "hydra.output_subdir=null"]
        yield


if __name__ == "__main__":
    main()
