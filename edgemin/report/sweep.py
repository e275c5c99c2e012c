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


class SweepTables(Callback):
    """After a multirun: the sweep's tables, figures and page, and its main table on the terminal."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Writes and prints what the jobs in `hydra.sweep.dir` found and which failed; one line where all did."""
        # Loaded only now: Hydra makes its callbacks before it answers --help.
        from edgemin.report.write import print_study, write_study

        if config.get("plan"):
            return  # no job ran
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
