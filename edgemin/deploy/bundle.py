"""A bundle: one directory that a device needs to serve a model, without torch and without EdgeMIN."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from edgemin import artifact
from edgemin.deploy import onnx_file, onnx_runtime, open_vino, torch_eager
from edgemin.deploy.extras import extra
from edgemin.deploy.runtime import RUNTIMES, Batch, Runtime, open_model
from edgemin.encoder import parts, quantized
from edgemin.errors import UserError

FILES = Path(__file__).parent / "files"
TOKENIZER, CARD = "tokenizer.json", "README.md"
_NEEDS = {"onnxruntime": "onnxruntime tokenizers", "openvino": "openvino tokenizers"}
# Sentences for the comparison with torch where no others are given: of every length, with rare pieces too.
_TRIED = 32


def write(source: Path, runtime: str, out: Path, *, length: int | None = None) -> dict[str, Any]:
    """Export an artifact as a bundle, and compare what it answers with torch.

    Args:
        source: the artifact's directory; it has a tokenizer.
        runtime: `onnxruntime` or `openvino`.
        out: an empty directory.
        length: fixed length of all inputs; `None`: any.

    Returns:
        The comparison: `examples`, `largest_difference` of two logits, `agreement` (share of equal predictions).

    Raises:
        UserError: no tokenizer, a layer that cannot be exported, a length that the model does not take.
    """
    extra(runtime, runtime)
    model, tokenizer = artifact.load(source)
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise UserError(f"artifact: expected one with a fast tokenizer (tokenizer.json), given {source} without")
    longest = torch_eager.longest(model)
    if length is not None and not 2 <= length <= longest:
        raise UserError(f"length: expected a whole number from 2 to {longest}, what the model takes, given {length}")
    facts, provenance = own(source, model, runtime, length)
    write_model(model, runtime, out, length=length)
    tokenizer.backend_tokenizer.save(str(out / TOKENIZER))
    config = model.config.to_diff_dict() | {
        "id2label": {str(index): label for index, label in enumerate(parts.label_names(model))},
        "problem_type": model.config.problem_type,
        "pad_token_id": model.config.pad_token_id,
        "vocab_size": quantized.outline(model).vocabulary,
        "edgemin": facts,
    }
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
    start = (FILES / f"predict_{runtime}.py.txt").read_text()
    (out / "predict.py").write_text(start + (FILES / "predict_main.py.txt").read_text())
    (out / "bench.py").write_text((FILES / "bench.py.txt").read_text())
    found = compare(source, out, runtime, tried(model, length))
    (out / CARD).write_text(_card(model, facts, provenance, found))
    return found


def own(
    source: Path, model: PreTrainedModel, runtime: str, length: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an export says of itself, and the provenance of its artifact."""
    provenance, longest = artifact.read_provenance(source), torch_eager.longest(model)
    task = provenance.get("task") or {}
    columns = list(task.get("text_columns", []))
    found = {
        "artifact": provenance.get("key", source.name),
        "runtime": runtime,
        "texts": len(columns) or 1,
        "text_columns": columns,
        "max_length": min(length or longest, task.get("max_length", longest)),
        "length": length,
    }
    return found, provenance


def write_model(model: PreTrainedModel, runtime: str, out: Path, *, length: int | None = None) -> None:
    """Write only the files that a runtime loads a model from."""
    form = RUNTIMES[runtime].form
    onnx = out / onnx_runtime.FILE
    onnx_file.write(model, onnx, length=length)
    if form == "openvino":
        open_vino.write(onnx, out)
        onnx.unlink()


def tried(model: PreTrainedModel, length: int | None) -> list[Batch]:
    """Inputs to compare on where no sentences are given: random tokens of many lengths, some padded."""
    draw = np.random.default_rng(0)
    vocabulary, longest = quantized.outline(model).vocabulary, length or torch_eager.longest(model)
    batches: list[Batch] = []
    for number in range(_TRIED):
        tokens = length or int(draw.integers(2, min(longest, 128) + 1))
        ids = draw.integers(0, vocabulary, (1, tokens))
        mask = np.ones_like(ids)
        if number % 2:
            mask[:, (tokens + 1) // 2 :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)})
    return batches


def compare(source: Path, exported: Path, runtime: str, batches: list[Batch]) -> dict[str, Any]:
    """What an export answers beside what torch answers on the same inputs."""
    return differences(open_model("torch", source, 1), open_model(runtime, exported, 1), batches)


def differences(one: Runtime, other: Runtime, batches: list[Batch]) -> dict[str, Any]:
    """How far apart two opened models answer; both are released.

    Returns:
        `examples`, `largest_difference` of two logits, and `agreement`, the share of examples whose largest logit is
        the same one.
    """
    pairs = [(one.answers(batch), other.answers(batch)) for batch in batches]
    for opened in (one, other):
        opened.release()
    mine, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return {
        "examples": len(mine),
        "largest_difference": float(np.abs(mine - theirs).max()),
        "agreement": float((mine.argmax(1) == theirs.argmax(1)).mean()),
    }


def _card(
    model: PreTrainedModel, facts: Mapping[str, Any], provenance: Mapping[str, Any], found: Mapping[str, Any]
) -> str:
    return f"""# {title(provenance)}, exported by EdgeMIN for {facts["runtime"]}

```
pip install {_NEEDS[facts["runtime"]]}
python predict.py "a gripping story"
python bench.py threads=2          # latency on this device, into device.json
```

{markdown(card_rows(model, facts, provenance, found))}
"""


def title(provenance: Mapping[str, Any]) -> str:
    """What a card calls the model."""
    return str((provenance.get("task") or {}).get("name", "A text classifier"))


def card_rows(
    model: PreTrainedModel, facts: Mapping[str, Any], provenance: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, str]:
    """What a card tells of a model, how it was made and how it was compared with torch."""
    outline = quantized.outline(model)
    summary = quantized.summary(model)
    return {
        "task": (provenance.get("task") or {}).get("name", "not recorded"),
        "labels": ", ".join(parts.label_names(model)),
        "inputs": f"{facts['texts']} text(s), cut to {facts['max_length']} tokens"
        + (f", padded to {facts['length']}" if facts["length"] else ""),
        "made by": provenance.get("path", "not recorded"),
        "architecture": f"{outline.family}, {len(outline.layers)} layers, hidden size {outline.hidden}, heads "
        + ", ".join(str(layer.heads) for layer in outline.layers),
        "weights": "fp32" if summary is None else f"quantized: {bits(summary)}",
        "compared with torch": f"on {found['examples']} inputs of random tokens: logits differ by at most "
        f"{found['largest_difference']:.2g}, {100 * found['agreement']:.1f} % equal predictions",
        "artifact": facts["artifact"],
        "seed": provenance.get("seed", "not recorded"),
        "git": provenance.get("git") or "not recorded",
        "versions": ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items()),
    }


def markdown(rows: Mapping[str, str]) -> str:
    """The table of a card."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def bits(summary: Mapping[str, Any]) -> str:
    """How a model is quantized, in words."""
    found = sorted({int(bits) for bits in summary["bits"].values()}, reverse=True)
    return f"{' and '.join(map(str, found))} bits, activations {summary['activations']}"
