"""How long a stage will take, estimated from stages of the same kind that the store holds.

Only stages that were trained on a machine like this one, with as many threads, are compared.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from edgemin.artifact import STRUCTURE, read_provenance
from edgemin.encoder.structure_file import read_outline
from edgemin.measure.machine import host
from edgemin.store.artifacts import Store
from edgemin.study.nodes import Node

# Number of layers and hidden size of a model.
Size = tuple[int, int]


def signature(node: Node) -> str:
    """A text that is equal for stages whose steps should take equally long.

    It holds the method, the batch size, the longest input, the precision, and the sizes of the model and its teachers.
    """
    assert node.parent is not None
    sizes = [(len(model.outline.layers), model.outline.hidden) for model in (node.parent, *node.teachers)]
    return _signature(node.content, sizes)


def _signature(content: Mapping[str, Any], sizes: Sequence[Size]) -> str:
    stage, data = content["stage"], content["data"] or {}
    method = {name: stage.get(name) for name in ("_target_", "methods", "batch_size", "accumulate", "corpus_length")}
    training = {name: content.get(name) for name in ("device", "precision", "processes")}
    return json.dumps([method, training, data.get("max_length"), sizes], sort_keys=True)


class Timings:
    """How long the stages in a store took to train.

    Args:
        store: its artifacts are read when the first estimate is asked for; a damaged one is passed over.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def estimate(self, signature: str, steps: int) -> float | None:
        """Seconds for a stage, or `None` where no stage of its kind was trained on such a machine.

        Args:
            signature: of the stage, from `signature`.
            steps: how many it trains; 0 for a stage that trains nothing, which is compared with such stages only.
        """
        found = [(done, seconds) for done, seconds in self._found.get(signature, []) if bool(done) == bool(steps)]
        if not found:
            return None
        return statistics.median(seconds / done * steps if done else seconds for done, seconds in found)

    @cached_property
    def _found(self) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {}
        here = host()["id"], torch.get_num_threads()
        for file in self._store.root.glob("*/provenance.json"):
            try:
                told = read_provenance(file.parent)
                if "stage" not in told["content"] or (told["host"]["id"], told["threads"]) != here:
                    continue
                sizes = [self._size(key) for key in (told["parent"], *told["teachers"])]
                done = int(told["steps"]), float(told["seconds"])
                found.setdefault(_signature(told["content"], sizes), []).append(done)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
                continue
        return found

    def _size(self, key: str) -> Size:
        outline = read_outline(self._store.path(key) / STRUCTURE)
        return len(outline.layers), outline.hidden
