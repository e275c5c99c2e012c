"""Criteria by the weights that are a unit's alone: no data is seen."""

from __future__ import annotations

import torch
from torch import Tensor

from edgemin.encoder import magnitude
from edgemin.pruning.criteria.base import Criterion, Given


class Magnitude(Criterion):
    """I_u = √(‖R_u‖² + ‖W_u‖²): the weights that the unit reads and writes with, biases apart.

    Of a head, R_u is its rows of W_V and W_u its columns of W_O. The filter norm of Li et al. 2017 (arXiv 1608.08710),
    l2 where theirs is l1. A rescaling between the two, which changes nothing that the model computes, changes it.
    """

    def scores(self, given: Given) -> list[Tensor]:
        """The norm of each unit's weights."""
        return [magnitude.norms(own.read.cpu(), own.write.cpu()) for own in given.structure.weights(given.model)]


class WeightProduct(Criterion):
    """I_u = ‖W_u [R_u b_u]‖²: the map from what the unit reads to what it writes, bias included.

    What `student.truncate` keeps heads by. No rescaling between the two changes it.
    """

    def scores(self, given: Given) -> list[Tensor]:
        """The squared norm of each unit's map."""
        found = []
        for read, bias, write in given.structure.weights(given.model):
            with_bias = read if bias is None else torch.cat([read, bias[..., None]], dim=2)
            found.append(magnitude.products(with_bias.cpu(), write.cpu()))
        return found
