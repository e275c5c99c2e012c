"""Scores of a model's units, computed once and kept: every ratio, target and factor of one model is chosen by them."""

from __future__ import annotations

from collections.abc import Iterator

from safetensors.torch import load_file, save_file
from torch import Tensor

from edgemin.data.module import DataModule
from edgemin.encoder import quantized
from edgemin.pruning.criteria.base import Batch, Criterion, Given
from edgemin.store.content import content_key, digest
from edgemin.store.digest import code_digest
from edgemin.store.provenance import releases
from edgemin.training.teacher_outputs import fingerprint

CODE = "edgemin.pruning.importance"  # and the criterion's own module, and whose layers and losses it meets


def importance_of(criterion: Criterion, given: Given, data: DataModule | None) -> list[Tensor]:
    """A criterion's scores, `[U_g]` of each group; read from the cache where the same were computed before.

    Args:
        criterion: gives the scores.
        given: what it looks at.
        data: the task's data, in whose cache scores are kept; `None` keeps none. Scores that need no data are quick to
            compute and not kept either.
    """
    if criterion.needs == "nothing" or data is None:
        return criterion.scores(given)
    batches = list(given.batches)
    content = {
        "model": fingerprint(given.model),
        "groups": [given.structure.what, given.structure.units(given.model)],
        "batches": digest(_contents(batches)),
        "device": given.model.device.type,
        "code": code_digest(
            CODE,
            type(criterion).__module__,
            data.kind.module,
            *quantized.modules(quantized.kind_of(given.model)),
        ),
        "criterion": type(criterion).__name__,
        "versions": releases("torch", "transformers"),
    }
    name = f"{data.train.key}/importance-{content_key(content)}.safetensors"
    path = data.cache.find(name)
    if path is None:
        found = criterion.scores(given)
        named = {f"{number:05}": group.contiguous() for number, group in enumerate(found)}
        path = data.cache.keep(name, lambda path: save_file(named, path))
    return [group for _, group in sorted(load_file(path).items())]


def _contents(batches: list[Batch]) -> Iterator[bytes | str]:
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype}"
            yield tensor.contiguous().numpy().tobytes()
