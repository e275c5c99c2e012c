"""Which process this is among those that torchrun or srun started. Loads nothing, so that a command line can ask."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from edgemin.errors import UserError

_FIRST_PORT, _PORTS = 15000, 20000  # a job of srun's takes one of these ports, which follows from its number


class Place(NamedTuple):
    """One process among all. Ranks count from 0; on each machine `local_world` processes run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def variables(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What torchrun sets for a process, also where srun started it; empty for a process by itself.

    `MASTER_ADDR` and `MASTER_PORT` are kept where they are set. Else, under srun, the processes meet at the first
    machine of the step, on a port that follows from the job's number.

    Args:
        environment: the environment's variables; those of this process if None.

    Raises:
        UserError: srun started more processes on one machine than on another.
    """
    given = os.environ if environment is None else environment
    if "RANK" in given and "WORLD_SIZE" in given:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        return {name: given[name] for name in names if name in given}
    # the number of tasks of the step, not of the job: a batch script sees the job's, but is one process
    if int(given.get("SLURM_STEP_NUM_TASKS", "1")) == 1 or "SLURM_PROCID" not in given:
        return {}
    world, machines = int(given["SLURM_STEP_NUM_TASKS"]), int(given["SLURM_STEP_NUM_NODES"])
    if not re.fullmatch(r"\d+(\(x\d+\))?", given["SLURM_STEP_TASKS_PER_NODE"]):
        raise UserError(
            "srun: expected equally many processes on every machine (--ntasks-per-node), given "
            f"{given['SLURM_STEP_TASKS_PER_NODE']}"
        )
    return {
        "RANK": given["SLURM_PROCID"],
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": given["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(world // machines),
        "MASTER_ADDR": given.get("MASTER_ADDR") or _first_machine(given["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": given.get("MASTER_PORT") or str(_FIRST_PORT + int(given["SLURM_JOB_ID"]) % _PORTS),
    }


def place(environment: Mapping[str, str] | None = None) -> Place:
    """Which of the processes this is, and how many there are.

    Args:
        environment: the environment's variables; those of this process if None.
    """
    found = variables(environment)
    if not found:
        return Place()
    rank, world = int(found["RANK"]), int(found["WORLD_SIZE"])
    return Place(rank, world, int(found.get("LOCAL_RANK", rank)), int(found.get("LOCAL_WORLD_SIZE", world)))


def _first_machine(listed: str) -> str:
    """The first of a list as SLURM writes it: `gpu[05-08,11],cpu1` begins with `gpu05`."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", listed)
    assert found is not None, listed
    return found[1] + (found[2] or "") + (found[3] or "")
