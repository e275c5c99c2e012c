"""Criteria by the weights that are a unit's alone: no data is seen."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from edgemin.encoder import magnitude
from edgemin.pruning.criteria.base import Criterion, Given
from edgemin.pruning.structures import StructureName
from edgemin.pruning.unit_weights import UnitWeights


class Magnitude(Criterion):
    """I_u = √(‖R_u‖² + ‖W_u‖²): the weights that the unit reads and writes with, biases apart.

    Of a head, R_u is its rows of W_V and W_u its columns of W_O; of an FFN unit its row of W_1, with that of its gate,
    and its column of W_2; of a hidden unit all that writes to it and all that reads it. The filter norm of Li et al.
    2017 (arXiv 1608.08710), l2 where theirs is l1. A rescaling between the two, which changes nothing that the model
    computes, changes it.
    """

    structures: ClassVar[tuple[StructureName, ...]] = ("heads", "ffn", "hidden")

    def scores(self, given: Given) -> list[Tensor]:
        """The norm of each unit's weights."""
        return [_norms(own) for own in _weights(given)]


class WeightProduct(Criterion):
    """I_u = ‖W_u [R_u b_u]‖²: the map from what the unit reads to what it writes, bias included.

    `student.truncate` chooses units by it too. For a gated FFN unit it is multiplied by the squared norm of the gate's
    weights. No rescaling between the two changes it.
    """

    structures: ClassVar[tuple[StructureName, ...]] = ("heads", "ffn", "hidden")

    def scores(self, given: Given) -> list[Tensor]:
        """The squared norm of each unit's map."""
        return [_product(own) for own in _weights(given)]


def _weights(given: Given) -> list[UnitWeights]:
    found = given.structure.weights(given.model)
    assert found is not None, "the criterion does not exist for this structure"
    return found


def _norms(own: UnitWeights) -> Tensor:
    read = own.read if own.gate is None else torch.cat([own.read, own.gate], dim=2)
    return magnitude.norms(read.cpu(), own.write.cpu())


def _product(own: UnitWeights) -> Tensor:
    found = magnitude.products(_with_bias(own.read, own.bias).cpu(), own.write.cpu())
    if own.gate is None:
        return found
    return found * _with_bias(own.gate, own.gate_bias).cpu().double().square().sum((1, 2))


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight if bias is None else torch.cat([weight, bias[..., None]], dim=2)
