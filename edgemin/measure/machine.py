"""The machine that is measured on: what it is, and who may use it when."""

from __future__ import annotations

import functools
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil

from edgemin.store.content import digest
from edgemin.store.lock import Lock, holders

# Instruction sets that decide how fast integer and low-precision products are (x86 and ARM names).
# fmt: off
_FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)
# fmt: on
# The same for every user and every setting of TMPDIR, where the system has it: the lock is the machine's.
LOCK_DIRECTORY = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())

WAIT_MINUTES = 10.0
_MODE = 0o644  # of the lock's files: every user may take it

_held = threading.local()


def host() -> dict[str, Any]:
    """Describes the machine as far as speed depends on it, without names of hosts, users or networks.

    Returns:
        `id` (16 hex digits over everything below but Python's version, memory rounded to GiB: equal
        machines have equal ids, and a measurement is only reused under the same one), `cpu`, `cores`
        (physical) and `threads` (logical) this process may use, `flags` that matter, `memory_bytes`,
        `os`, `python`.
    """
    cpu, flags = _processor()
    memory_bytes = int(psutil.virtual_memory().total)
    system = f"{platform.system()} {platform.machine()}"
    cores, threads = available_cores(), len(_available_cpus())
    identity = "|".join(map(str, (cpu, cores, threads, flags, round(memory_bytes / 2**30), system)))
    return {
        "id": digest(identity)[:16],
        "cpu": cpu,
        "cores": cores,
        "threads": threads,
        "flags": flags,
        "memory_bytes": memory_bytes,
        "os": system,
        "python": platform.python_version(),
    }


def available_cores(
    topology: Path = Path("/sys/devices/system/cpu"), quota: Path = Path("/sys/fs/cgroup/cpu.max")
) -> int:
    """Counts the physical cores this process may use: affinity, hyper-threads once, a container's quota.

    Args:
        topology: Linux's description of the CPUs; a CPU without one counts as a core.
        quota: The control group's limit, "<microseconds or max> <period>".

    Returns:
        At least 1.
    """
    cores = {_core(topology / f"cpu{cpu}" / "topology", cpu) for cpu in _available_cpus()}
    limit = len(cores)
    if quota.is_file():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            limit = min(limit, math.ceil(int(allowed) / int(period)))
    return max(limit, 1)


def _available_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(psutil.cpu_count(logical=False) or os.cpu_count() or 1))


def _core(topology: Path, cpu: int) -> tuple[str, str]:
    package, core = topology / "physical_package_id", topology / "core_id"
    if not (package.is_file() and core.is_file()):
        return ("cpu", str(cpu))
    return (package.read_text().strip(), core.read_text().strip())


@functools.cache
def _processor() -> tuple[str, list[str]]:
    """The CPU's name and its flags that matter, from /proc where there is one."""
    description = Path("/proc/cpuinfo")
    lines = description.read_text().splitlines() if description.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    known = set((fields.get("flags") or fields.get("Features") or "").split())
    return name, [flag for flag in _FLAGS if flag in known]


@contextmanager
def machine_lock(
    kind: Literal["training", "measuring"],
    waiting: Callable[[str], None] | None = None,
    directory: Path | None = None,
    wait_minutes: float = WAIT_MINUTES,
) -> Iterator[Callable[[], bool]]:
    """Holds the machine for training (shared with other training) or for measuring (alone, if it can be had).

    A lock for readers and writers, of files that every user may lock (`edgemin.store.lock`).

    Plain `flock` lets new readers pass a waiting writer for ever. Therefore everyone first takes the *gate*
    alone, then the lock itself, and then lets the gate go: a measurement waits for the training that ran when it
    came, and training that comes later queues behind it. Nobody does so for longer than `wait_minutes`: training
    then passes the gate (a measurement that runs is waited for, one that waits is not), and a measurement goes on
    beside whatever runs. It says so to the others by a third file, *beside*, which a measurement that has the
    machine looks at. The machine is what shares one `/tmp`: containers with a `/tmp` of their own do not see
    one another.

    Args:
        kind: "training" or "measuring".
        waiting: Called once with a line to show if the lock is not free at once.
        directory: Where the files lie; `LOCK_DIRECTORY` by default.
        wait_minutes: How long a measurement waits for the machine, and training for one that waits.

    Yields:
        A function that says whether nothing else of EdgeMIN runs beside the block at that moment, as far as the
        locks tell; for measuring. The lock must not be taken twice in one thread, which would wait for itself.
    """
    assert not getattr(_held, "kind", None), f"machine_lock({kind!r}) inside machine_lock({_held.kind!r})"
    directory = directory or LOCK_DIRECTORY
    gate, machine, beside = (Lock(directory / f"edgemin.{name}.lock", _MODE) for name in ("gate", "machine", "beside"))
    deadline = time.monotonic() + 60 * wait_minutes
    tell = _Once(waiting, kind, wait_minutes)
    alone = False
    try:
        passed = gate.acquire(wait=tell, deadline=deadline)
        if kind == "training":
            machine.acquire(shared=True, wait=tell)
        else:
            alone = passed and machine.acquire(wait=tell, deadline=deadline)
            if not alone:
                beside.acquire(shared=True)
                machine.acquire(shared=True, deadline=0)  # where it is free: keeps the next measurement waiting
        gate.release()
        _held.kind = kind
        yield lambda: alone and _is_free(beside)
    finally:
        _held.kind = None
        for lock in (beside, machine, gate):
            lock.release()


class _Once:
    """Tells the user once, in one line, what is waited for, who holds it and what helps."""

    def __init__(self, say: Callable[[str], None] | None, kind: str, wait_minutes: float) -> None:
        self.say, self.kind, self.minutes = say, kind, wait_minutes

    def __call__(self, path: Path) -> None:
        if self.say is None:
            return
        pids = ", ".join(map(str, holders(path)))
        who = f" (process {pids})" if pids else ""
        if self.kind == "training":
            what = f"a measurement is running on it, or waits to run{who}; a run with measure=none keeps nobody waiting"
        else:
            what = (
                f"training or another measurement is running on it{who}; waited for at most {self.minutes:g} min; "
                "measure=none leaves measuring out"
            )
        self.say(f"for the machine: {what}")
        self.say = None


def _is_free(lock: Lock) -> bool:
    other = Lock(lock.path, _MODE)
    free = other.acquire(deadline=0)
    other.release()
    return free
