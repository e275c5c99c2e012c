"""Several processes that train together: who decides, who is told.

All run the same job. Process 0 alone locks, decides by clock and disk, writes, scores and prints; the others train
along and otherwise wait to be told. By itself a process is process 0 of 1, and nothing here costs anything.

What can go wrong in one process alone runs inside [`from_main`][edgemin.processes.ranks.from_main] or
[`together`][edgemin.processes.ranks.together], which end in the same way in all processes: a mistake of the user's is
then a [`SharedError`][edgemin.errors.SharedError], after which all go on to the next job of a sweep. A process in which
anything else goes wrong must end; its launcher ends the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from edgemin.errors import SharedError, UserError
from edgemin.processes import launch

T = TypeVar("T")

# Who waits for process 0 may wait for all that it scores and measures; by itself gloo gives up after half an hour.
_PATIENCE = timedelta(days=30)
_patient: list[dist.ProcessGroup] = []


def start() -> None:
    """Meet the other processes that torchrun or srun started, once; nothing for a process by itself.

    Tensors on the CPU go by gloo, those on GPUs by NCCL. The GPU of a process is the one with its local rank.
    """
    here = launch.place()
    if here.world == 1 or dist.is_initialized():
        return
    os.environ.update(launch.variables())  # under srun, what Lightning and torch look for
    backend = "gloo"
    if torch.cuda.is_available() and here.local_world <= torch.cuda.device_count():
        torch.cuda.set_device(here.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    _patient.append(dist.new_group(backend="gloo", timeout=_PATIENCE))


def finish(mistake: str | None = None) -> None:
    """Part from the other processes, once each has come here or to [`agree`][edgemin.processes.ranks.agree].

    Args:
        mistake: what went wrong in this process; those in `agree` end with it.
    """
    if dist.is_initialized():
        _gather(mistake)
        _patient.clear()
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is process 0."""
    return rank() == 0


def is_first_here() -> bool:
    """Whether this is the first process on its machine."""
    return world() == 1 or launch.place().local_rank == 0


def from_main(action: Callable[[], T]) -> T:
    """Process 0 does it and tells the others what came of it (anything that can be pickled), or what went wrong.

    The others wait meanwhile, so it must not need them.

    Raises:
        SharedError: the user's mistake that process 0 found, in every process.
    """
    if world() == 1:
        return action()
    told: list[Any] = [None, None]
    cause = None
    if is_main():
        try:
            told[0] = action()
        except UserError as error:
            told[1], cause = error.args, error
    dist.broadcast_object_list(told, src=0, group=_patient[0], device=torch.device("cpu"))
    if told[1] is not None:
        raise SharedError(*told[1]) from cause
    return cast(T, told[0])


def together(action: Callable[[], T]) -> T:
    """Every process does it: process 0 first, so that the others find what it downloads or computes and keeps.

    Returns:
        What it came to in this process.

    Raises:
        SharedError: a user's mistake that any process found, in every process.
    """
    if world() == 1:
        return action()
    made: list[T] = []
    from_main(lambda: made.append(action()))
    mistake = None
    if not is_main():
        try:
            made.append(action())
        except UserError as error:
            mistake = f"{error} (process {rank()})"
    agree(mistake)
    return made[0]


def agree(mistake: str | None = None) -> None:
    """All say whether they can go on; where one cannot, none does.

    Args:
        mistake: why this process cannot; None if it can.

    Raises:
        SharedError: the first mistake of any, in every process.
    """
    if found := next((line for line in _gather(mistake) if line is not None), None):
        raise SharedError(found)


def _gather(mistake: str | None) -> list[str | None]:
    mistakes = [mistake] * world()
    if world() > 1:
        dist.all_gather_object(mistakes, mistake, group=_patient[0])
    return mistakes


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, without a gradient where there are several."""
    return total(value) / world() if world() > 1 else value


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without a gradient where there are several."""
    if world() == 1:
        return value
    summed = value.detach().clone()
    dist.all_reduce(summed)
    return summed
