"""Units of several structures, watched and scored together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.pruning.structures import Outputs, Structure, Units, Watch
from edgemin.pruning.unit_weights import UnitWeights

T = TypeVar("T")


class Several(Units):
    """Units of several structures, scored in the same pass: the groups of one structure after those of the other."""

    def __init__(self, structures: Sequence[Structure]) -> None:
        self.structures = list(structures)
        self.what = " and ".join(structure.what for structure in structures)

    def units(self, model: PreTrainedModel) -> list[int]:
        """How many units each group of each structure still has."""
        return [count for structure in self.structures for count in structure.units(model)]

    def weights(self, model: PreTrainedModel) -> list[UnitWeights] | None:
        """The weights of all groups; `None` where one structure has none by unit."""
        found = [structure.weights(model) for structure in self.structures]
        return None if None in found else [group for groups in found for group in groups or []]

    def readers(self, model: PreTrainedModel) -> list[nn.Linear]:
        """The Linear that reads each group's units, for the groups of all structures."""
        return [linear for structure in self.structures for linear in structure.readers(model)]

    def outputs(self, model: PreTrainedModel) -> Watch:
        """Watch what the units of all structures hand on."""
        return _together([structure.outputs(model) for structure in self.structures])

    def activity(self, model: PreTrainedModel) -> Watch:
        """Watch the activity of all structures."""
        return _together([structure.activity(model) for structure in self.structures])

    def split(self, model: PreTrainedModel, groups: Sequence[T]) -> list[list[T]]:
        """A list with one entry for each group of all structures, divided into one list per structure."""
        rest = iter(groups)
        return [[next(rest) for _ in structure.units(model)] for structure in self.structures]


@contextmanager
def _together(watches: Sequence[Watch]) -> Iterator[Outputs]:
    """Watch several structures in the same forward."""
    with ExitStack() as stack:
        found = [stack.enter_context(watch) for watch in watches]

        def gradients(at_points: Sequence[Tensor]) -> list[Tensor]:
            rest = iter(at_points)
            own = [(outputs, [next(rest) for _ in outputs.points()]) for outputs in found]
            return [group for outputs, points in own for group in outputs.gradients(points)]

        yield Outputs(
            lambda: [group for outputs in found for group in outputs.values()],
            lambda: [point for outputs in found for point in outputs.points()],
            gradients,
        )
