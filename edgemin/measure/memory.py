"""The memory that the calling process uses."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil


def resident_bytes() -> int:
    """The resident set of this process now; pages of mapped files that are in memory count."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The largest resident set of this program so far.

    On Linux this is not the value of `getrusage`, which starts from the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
