"""A teacher's outputs on a whole training set: computed once, kept in one memory-mapped file, read batch by batch."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from edgemin.data.batches import evaluation_batches
from edgemin.data.encoding import Encoded
from edgemin.encoder import quantized, taps
from edgemin.encoder.taps import Projections, Reading
from edgemin.errors import UserError
from edgemin.progress import counted
from edgemin.store.cache import Cache
from edgemin.store.content import content_key, digest
from edgemin.store.digest import code_digest
from edgemin.store.provenance import releases

CODE = "edgemin.training.teacher_outputs"  # what decides them, the provider of a quantized teacher apart
LIMIT_BYTES = 8 * 2**30
_BATCH = 64
_PARTS = ("query", "key", "value")


@dataclass(frozen=True, eq=False)
class TeacherOutputs:
    """A teacher's outputs on every example of a split.

    Attributes:
        encoded: the split in the teacher's tokens.
        tensors: `logits` [N, C]; and per token, in the order of `encoded.ids`: `hidden.<l>` [tokens, H],
            `query.<l>`, `key.<l>`, `value.<l>` [tokens, A*D], layers counted from 0; float32, memory-mapped.
    """

    encoded: Encoded
    tensors: dict[str, Tensor]

    def batch(self, indices: Tensor, width: int, device: torch.device) -> Reading:
        """The teacher's outputs on some examples. Layers count from 1, as the stages count.

        Args:
            indices: positions in the split, int64 [B].
            width: T that token outputs are padded to; what is padding holds zeros.
            device: where the tensors are put.
        """
        rows = indices.cpu()
        lengths = torch.from_numpy(self.encoded.lengths)[rows].unsqueeze(1)
        offsets = torch.arange(width)
        positions = torch.from_numpy(self.encoded.starts)[rows].unsqueeze(1) + torch.minimum(offsets, lengths - 1)
        mask = (offsets < lengths).unsqueeze(-1)

        def tokens(name: str) -> Tensor:
            return (self.tensors[name][positions] * mask).to(device)

        names = {name.partition(".")[::2] for name in self.tensors if "." in name}
        layers = sorted({int(layer) for part, layer in names if part == _PARTS[0]})
        streams = sorted(int(layer) for part, layer in names if part == "hidden")
        logits = self.tensors.get("logits")
        return Reading(
            logits[rows].to(device) if logits is not None else None,
            {layer + 1: Projections(*(tokens(f"{part}.{layer}") for part in _PARTS)) for layer in layers},
            {layer: tokens(f"hidden.{layer}") for layer in streams},
        )


def teacher_outputs(
    teacher: PreTrainedModel,
    encoded: Encoded,
    *,
    projections: Sequence[int] = (),
    hidden: Collection[int] = (),
    logits: bool,
    cache: Cache,
) -> TeacherOutputs:
    """Compute a teacher's outputs on a split, or find them computed.

    They are computed in float32 without dropout, whatever precision the student is trained in.

    Args:
        teacher: in eval mode; it runs on the device it is on.
        encoded: the split in its tokens.
        projections: layers whose queries, keys and values are kept, counted from 0.
        hidden: where the residual stream is kept: 0 before the first layer, l after l layers.
        logits: whether logits are kept.
        cache: of token ids; the file lies beside those of the split.

    Raises:
        UserError: the outputs would take more than 8 GiB.
    """
    content = {
        "teacher": fingerprint(teacher),
        "asked": {"projections": sorted(projections), "hidden": sorted(hidden), "logits": logits},
        "device": teacher.device.type,
        "code": code_digest(CODE, *quantized.modules(quantized.kind_of(teacher))),
        "versions": releases("torch", "transformers"),
    }
    file = f"{encoded.key}/teacher-{content_key(content)}.safetensors"
    path = cache.find(file)
    if path is None:
        made = _compute(teacher, encoded, projections, hidden, logits)
        path = cache.keep(file, lambda path: save_file(made, path))
    return TeacherOutputs(encoded, load_file(path))


def _compute(
    teacher: PreTrainedModel, encoded: Encoded, projections: Sequence[int], hidden: Collection[int], logits: bool
) -> dict[str, Tensor]:
    total = int(encoded.lengths.sum())
    kept: dict[str, Tensor] = {}
    batches = counted(evaluation_batches(encoded, _BATCH), "keeping teacher outputs", -(-len(encoded) // _BATCH))
    for indices, batch in batches:
        batch = {name: tensor.to(teacher.device) for name, tensor in batch.items()}
        with torch.no_grad(), torch.autocast(teacher.device.type, enabled=False):
            found = taps.read(teacher, batch, projections=projections, hidden=hidden, logits=logits)
        mask = batch["attention_mask"].bool().cpu()
        starts, lengths = encoded.starts[indices], encoded.lengths[indices]
        rows = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
        parts = {f"hidden.{layer}": tensor for layer, tensor in found.hidden.items()}
        for layer, read in found.projections.items():
            parts |= {f"{part}.{layer}": tensor for part, tensor in zip(_PARTS, read, strict=True)}
        if not kept:
            _check_size(len(encoded), total, found.logits, parts)
            kept = {name: torch.empty(total, tensor.shape[-1]) for name, tensor in parts.items()}
            if found.logits is not None:
                kept["logits"] = torch.empty(len(encoded), found.logits.shape[-1])
        for name, tensor in parts.items():
            kept[name][rows] = tensor.float().cpu()[mask]
        if found.logits is not None:
            kept["logits"][torch.from_numpy(indices)] = found.logits.float().cpu()
    return kept


def _check_size(examples: int, tokens: int, logits: Tensor | None, parts: dict[str, Tensor]) -> None:
    needed = 4 * tokens * sum(tensor.shape[-1] for tensor in parts.values())
    needed += 4 * examples * (logits.shape[-1] if logits is not None else 0)
    if needed > LIMIT_BYTES:
        raise UserError(
            f"teacher_cache: expected outputs of at most {LIMIT_BYTES / 2**30:.0f} GiB, given {needed / 2**30:.1f} GiB "
            f"for {tokens} tokens; take false, or fewer layers or examples"
        )


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of weights, configuration and quantization: two models with one fingerprint give the same outputs."""
    return digest(_contents(model))


def _contents(model: PreTrainedModel) -> Iterator[bytes | str]:
    yield model.config.to_json_string()
    if (held := quantized.outline(model).quantized) is not None:  # no tensor tells how activations are
        yield json.dumps(asdict(held), sort_keys=True)
    for name, value in sorted(model.state_dict().items()):
        yield name
        for tensor in value if isinstance(value, tuple) else (value,):  # torch's packed Linears: weight and bias
            if isinstance(tensor, Tensor):
                yield _content(tensor.detach().cpu())


def _content(tensor: Tensor) -> bytes:
    if tensor.is_quantized:
        return f"{tensor.q_scale()} {tensor.q_zero_point()}".encode() + _content(tensor.int_repr())
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
