"""The Hydra callback that writes and prints one table over all jobs of a sweep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback

from edgemin.errors import UserError
from edgemin.report import failures

if TYPE_CHECKING:
    from omegaconf import DictConfig


#: What was asked for, between a sweep's begin and its end.
running: list[DictConfig] = []


def finish() -> None:
    """What comes at the end of a sweep, where Hydra does not come to it because the launcher gave up."""
    for config in list(running):
        SweepTables().on_multirun_end(config)
        print("Run the same command again for the rest. Of jobs that still run on a cluster, this makes the tables:")
        print(f"  python -m edgemin.report study={config.hydra.sweep.dir}")


class SweepTables(Callback):
    """After a multirun: the sweep's tables, figures and page, and its main table on the terminal."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Keeps what is asked for when the launcher gives up."""
        running[:] = [config]

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Writes and prints what the jobs in `hydra.sweep.dir` found and which failed; one line where all did."""
        # Loaded only now: Hydra makes its callbacks before it answers --help.
        from edgemin.report.write import print_study, write_study

        if config.get("plan"):
            return  # no job ran
        running.clear()
        directory = str(config.hydra.sweep.dir)
        failed = failures.below(Path(directory))
        failures.seen.extend(failure for failure in failed if failure not in failures.seen)  # of other processes
        lines = [failure.line for failure in failed]
        try:
            written = write_study(directory, lines)
            print_study(directory, failed=lines)
        except UserError as error:
            print(f"No table over the sweep: {error}", file=sys.stderr)
            return
        print("The sweep's page, tables and figures:")
        for name in ("report.md", *(name for name in written if name.endswith(".png"))):
            print(f"  {written[name]}")
