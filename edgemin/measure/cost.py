"""The part of a row's cost that needs no clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from edgemin.encoder import building
from edgemin.encoder.operations import operations
from edgemin.measure.params import count_parameters
from edgemin.measure.size import size_bytes

# The runtime that artifacts are evaluated and measured in.
RUNTIME = "torch"


def static_cost(model: PreTrainedModel, artifact: Path, length: int = 128) -> dict[str, Any]:
    """Everything about a model's cost that follows from its architecture and its files.

    Args:
        model: The encoder as loaded from `artifact`.
        artifact: Its directory.
        length: Tokens of the sentence whose operations are counted.

    Returns:
        `params`, `params_visible`, `macs`, `flops` and, in `runtimes`, `size_bytes` of what torch loads: `cost` as
        run.json has it, without what [`measure`][edgemin.measure.runtime.measure] adds to that runtime.

    Raises:
        UserError: The artifact is not complete.
    """
    return {
        **count_parameters(model),
        **operations(building.outline(model), length),
        "runtimes": {RUNTIME: {"size_bytes": size_bytes(artifact)}},
    }
