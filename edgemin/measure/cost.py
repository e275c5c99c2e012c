"""The part of a row's cost that needs no clock."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from edgemin.encoder import building
from edgemin.measure.operations import operations
from edgemin.measure.params import count_parameters
from edgemin.measure.size import size_bytes


def static_cost(model: PreTrainedModel, artifact: Path, length: int = 128) -> dict[str, int]:
    """Everything about a model's cost that follows from its architecture and its files.

    Args:
        model: The encoder as loaded from `artifact`.
        artifact: Its directory.
        length: Tokens of the sentence whose operations are counted.

    Returns:
        `params`, `params_visible`, `size_bytes`, `macs` and `flops`: the first half of `cost` in
        run.json. [`measure`][edgemin.measure.runtime.measure] returns the other half under the same names as there.

    Raises:
        UserError: The artifact is not complete.
    """
    return {
        **count_parameters(model),
        "size_bytes": size_bytes(artifact),
        **operations(building.structure(model), length),
    }
