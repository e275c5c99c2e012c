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
    """How many units of some structures go, and with them which ones: always those of least importance in a group.

    It is asked in the order of its methods: `after` in planning, `start` with the model, `removed` once a round, `says`
    at the end.

    Attributes:
        structures: of which units go.
        idle: settings of the stage that decide nothing.
        decided: settings as they were decided, of those that may be given in several ways.
        reads_latency: whether it needs a table of latencies.
    """

    structures: Sequence[Structure]
    idle: tuple[str, ...]
    decided: Mapping[str, Any] = MappingProxyType({})
    reads_latency: bool = False

    @abstractmethod
    def after(self, model: Outline, latency: LatencyTable | None) -> Outline:
        """What is left of a model, as far as planning can tell.

        Raises:
            UserError: that cannot be; its key first.
        """

    @abstractmethod
    def start(self, model: Outline) -> list[str]:
        """Remember the model before anything of it goes; what is worth knowing of that.

        Raises:
            UserError: as `after`, where it could not tell.
        """

    @abstractmethod
    def weighed(self, criterion: Criterion, scores: Scores) -> list[list[Tensor]]:
        """A criterion's scores, as units of different groups are compared by."""

    @abstractmethod
    def removed(self, model: Outline, weighed: Scores, completed_rounds: int) -> list[list[int]]:
        """The units of each group that go in this round, those of one structure after those of the other.

        Args:
            model: as it is now.
            weighed: of the units that are there now.
            completed_rounds: rounds done before this one.
        """

    @abstractmethod
    def says(self, model: Outline, rounds_gone: Scores) -> list[str]:
        """How much is gone, a note for each structure and one for the whole.

        Args:
            model: as it is at the end.
            rounds_gone: of each unit at the start the round in which it went, or 0.
        """

    def found(self) -> dict[str, Any]:
        """What run.json has of it; asked for after `says`."""
        return {}


def went(structure: Structure, rounds_gone: Sequence[Tensor], asked: int = 0) -> str:
    """How much of a structure is gone.

    Args:
        structure: whose groups these are.
        rounds_gone: of each unit of each group the round in which it went, or 0.
        asked: how many were to go, where that is known: fewer did where units are kept in multiples.
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
