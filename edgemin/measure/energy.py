"""The energy of a stretch of work: read from the processor, else estimated from CPU time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

POWERCAP = Path("/sys/class/powercap")


class Energy(NamedTuple):
    """The energy and the time that a stretch of work took."""

    joules: float
    seconds: float


@dataclass(frozen=True)
class Domain:
    """One RAPL energy counter in microjoules that starts again from 0 after `range_uj`."""

    path: Path
    range_uj: int

    def read_uj(self) -> int:
        """Reads the counter's present value in microjoules."""
        return int((self.path / "energy_uj").read_text())

    def used_uj(self, before: int, after: int) -> int:
        """The difference of two readings less than one turn of the counter (tens of minutes) apart."""
        return after - before if after >= before else after - before + self.range_uj + 1


def rapl_domains(root: Path = POWERCAP) -> list[Domain]:
    """Finds the counters of whole processor packages that this user may read.

    Packages contain the counters of their cores and memory controllers, and "psys" contains the packages:
    adding those would count the same joules twice.

    Args:
        root: Linux's powercap tree.

    Returns:
        One domain per package; none unless all packages are readable (most systems reserve them for root).
    """
    packages = [path for path in sorted(root.glob("intel-rapl:*")) if _is_package(path)]
    try:
        domains = [Domain(path, int((path / "max_energy_range_uj").read_text())) for path in packages]
        for domain in domains:
            domain.read_uj()
    except OSError:
        return []
    return domains


def _is_package(path: Path) -> bool:
    name = path / "name"
    return name.is_file() and name.read_text().startswith("package")


class EnergyMeter:
    """Measures stretches of this process's work.

    With RAPL a stretch's energy is what all packages used, idle cores and other processes included. Without,
    it is an estimate: the CPU time of this process, all threads, times `watts`.

    Args:
        watts: Power of one busy core in the estimate.
        root: Linux's powercap tree.
    """

    def __init__(self, watts: float, root: Path = POWERCAP) -> None:
        self.watts = watts
        self.domains = rapl_domains(root)
        self.source = "rapl" if self.domains else "estimate"
        self.start()

    def start(self) -> None:
        """Begins a stretch: reads the clocks and counters that `stop` compares with."""
        self._readings = [domain.read_uj() for domain in self.domains]
        self._cpu = time.process_time()
        self._wall = time.perf_counter()

    def stop(self) -> Energy:
        """Ends the stretch that `start` began.

        Returns:
            Joules used and seconds passed since `start`.
        """
        seconds = time.perf_counter() - self._wall
        if not self.domains:
            return Energy((time.process_time() - self._cpu) * self.watts, seconds)
        pairs = zip(self.domains, self._readings, strict=True)
        return Energy(sum(domain.used_uj(before, domain.read_uj()) for domain, before in pairs) / 1e6, seconds)
