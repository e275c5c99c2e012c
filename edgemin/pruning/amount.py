"""How much of a model goes: the contract of what a ratio and a budget each make of the counts of its units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from edgemin.encoder.outline import Outline
from edgemin.pruning.criteria.base import Criterion
from edgemin.pruning.structures import Structure

if TYPE_CHECKING:
    from edgemin.training.latency import LatencyTable

Scores = Sequence[Sequence[Tensor]]  # of each structure `[U_g]` for each of its groups


class Amount(ABC):
    """How many units of some structures are removed, and thus which ones: always the least important of a group.

    The stage calls `after` in planning, `start` with the model, `weighed` and `removed` once a round, `says` and
    `found` at the end.

    Attributes:
        structures: those whose units are removed.
        idle: names of the stage's settings that this amount does not read.
        decided: settings that can be written in several ways, in the one form that enters the result's key.
        reads_latency: whether it needs a table of latencies.
    """

    structures: Sequence[Structure]
    idle: tuple[str, ...]
    decided: Mapping[str, Any] = MappingProxyType({})
    reads_latency: bool = False

    @abstractmethod
    def after(self, model: Outline, latency: LatencyTable | None) -> Outline:
        """What is left of a model, as far as planning can tell.

        Args:
            model: before pruning.
            latency: the table of latencies; `None` where nobody measured.

        Raises:
            UserError: what is asked for cannot be reached; its key first.
        """

    @abstractmethod
    def start(self, model: Outline) -> list[str]:
        """Remember the model before anything of it is removed.

        Returns:
            Notes for the user, such as that nothing will be removed.

        Raises:
            UserError: as `after`, for what planning could not know.
        """

    @abstractmethod
    def weighed(self, criterion: Criterion, scores: Scores) -> list[list[Tensor]]:
        """A criterion's scores in the form in which units of different groups are compared."""

    @abstractmethod
    def removed(self, model: Outline, weighed: Scores, completed_rounds: int) -> list[list[int]]:
        """The units to remove from each group in this round, the groups of one structure after those of the other.

        Args:
            model: as it is now.
            weighed: what `weighed` gave for the units that are there now.
            completed_rounds: rounds done before this one.
        """

    @abstractmethod
    def says(self, model: Outline, rounds_gone: Scores) -> list[str]:
        """Notes that say how much is gone.

        Args:
            model: as it is at the end.
            rounds_gone: for each unit at the start the round in which it was removed, or 0.
        """

    def found(self) -> dict[str, Any]:
        """What run.json shows of it, by field; called after `says`."""
        return {}


def went(structure: Structure, rounds_gone: Sequence[Tensor], asked: int = 0) -> str:
    """A note that says how much of a structure is gone.

    Args:
        structure: whose groups these are.
        rounds_gone: for each unit of each group the round in which it was removed, or 0.
        asked: how many were to be removed, 0 where that is not known; fewer are where units are kept in multiples.
    """
    counts = [len(group) for group in rounds_gone]
    left = [int((group == 0).sum()) for group in rounds_gone]
    gone, total = sum(counts) - sum(left), sum(counts)
    if structure.name == "layers":
        kept = ", ".join(str(number) for number, when in enumerate(rounds_gone[0].tolist(), start=1) if not when)
        return f"removed {gone} of {total} layers; left: {kept}"
    fewer = f" (not {asked}: {structure.multiple} are kept at a time)" if gone < asked else ""
    where = f"; left: {left[0]}" if structure.one_group else f"; left per layer: {left}"
    return f"removed {gone} of {total} {structure.what}{fewer}{where}"
