"""A bundle: one directory that a device needs to serve a model, without torch and without EdgeMIN."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from edgemin import artifact
from edgemin.deploy import onnx_file, onnx_runtime, open_vino
from edgemin.deploy.runtime import RUNTIMES, Batch, open_model
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
    model, tokenizer = artifact.load(source)
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise UserError(f"artifact: expected one with a fast tokenizer (tokenizer.json), given {source} without")
    longest = _longest(model)
    if length is not None and not 2 <= length <= longest:
        raise UserError(f"length: expected a whole number from 2 to {longest}, what the model takes, given {length}")
    write_model(model, runtime, out, length=length)
    tokenizer.backend_tokenizer.save(str(out / TOKENIZER))
    provenance = artifact.read_provenance(source)
    task = provenance.get("task") or {}
    columns = list(task.get("text_columns", []))
    own = {
        "artifact": provenance.get("key", source.name),
        "runtime": runtime,
        "texts": len(columns) or 1,
        "text_columns": columns,
        "max_length": min(length or longest, task.get("max_length", longest)),
        "length": length,
    }
    config = model.config.to_diff_dict() | {
        "id2label": {str(index): label for index, label in enumerate(parts.label_names(model))},
        "problem_type": model.config.problem_type,
        "pad_token_id": model.config.pad_token_id,
        "vocab_size": quantized.outline(model).vocabulary,
        "edgemin": own,
    }
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
    start = (FILES / f"predict_{runtime}.py.txt").read_text()
    (out / "predict.py").write_text(start + (FILES / "predict_main.py.txt").read_text())
    (out / "bench.py").write_text((FILES / "bench.py.txt").read_text())
    found = compare(source, out, runtime, tried(model, length))
    (out / CARD).write_text(_card(model, own, provenance, task, found))
    return found


def write_model(model: PreTrainedModel, runtime: str, out: Path, *, length: int | None = None) -> None:
    """Write only the files that a runtime loads a model from."""
    form = RUNTIMES[runtime].form
    onnx = out / onnx_runtime.FILE
    onnx_file.write(model, onnx, length=length)
    if form == "openvino":
        open_vino.write(onnx, out)
        onnx.unlink()


def _longest(model: PreTrainedModel) -> int:
    longest = quantized.outline(model).max_tokens
    assert longest is not None, "known of every model that there is"
    return longest


def tried(model: PreTrainedModel, length: int | None) -> list[Batch]:
    """Inputs to compare on where no sentences are given: random tokens of many lengths, some padded."""
    draw = np.random.default_rng(0)
    vocabulary, longest = quantized.outline(model).vocabulary, length or _longest(model)
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
    """What an export answers beside what torch answers on the same inputs.

    Returns:
        `examples`, `largest_difference` of two logits, and `agreement`, the share of examples whose largest logit is
        the same one.
    """
    torch_model, other = open_model("torch", source, 1), open_model(runtime, exported, 1)
    pairs = [(torch_model.answers(batch), other.answers(batch)) for batch in batches]
    for opened in (torch_model, other):
        opened.release()
    mine, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return {
        "examples": len(mine),
        "largest_difference": float(np.abs(mine - theirs).max()),
        "agreement": float((mine.argmax(1) == theirs.argmax(1)).mean()),
    }


def _card(
    model: PreTrainedModel,
    own: Mapping[str, Any],
    provenance: Mapping[str, Any],
    task: Mapping[str, Any],
    found: Mapping[str, Any],
) -> str:
    labels = ", ".join(parts.label_names(model))
    outline = quantized.outline(model)
    summary = quantized.summary(model)
    rows = {
        "task": task.get("name", "not recorded"),
        "labels": labels,
        "inputs": f"{own['texts']} text(s), cut to {own['max_length']} tokens"
        + (f", padded to {own['length']}" if own["length"] else ""),
        "made by": provenance.get("path", "not recorded"),
        "architecture": f"{outline.family}, {len(outline.layers)} layers, hidden size {outline.hidden}, heads "
        + ", ".join(str(layer.heads) for layer in outline.layers),
        "weights": "fp32" if summary is None else f"quantized: {_bits(summary)}",
        "compared with torch": f"on {found['examples']} inputs of random tokens: logits differ by at most "
        f"{found['largest_difference']:.2g}, {100 * found['agreement']:.1f} % equal predictions",
        "artifact": own["artifact"],
        "seed": provenance.get("seed", "not recorded"),
        "git": provenance.get("git") or "not recorded",
        "versions": ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# {task.get("name", "A text classifier")}, exported by EdgeMIN for {own["runtime"]}

```
pip install {_NEEDS[own["runtime"]]}
python predict.py "a gripping story"
python bench.py threads=2          # latency on this device, into device.json
```

| | |
|---|---|
{table}
"""


def _bits(summary: Mapping[str, Any]) -> str:
    found = sorted({int(bits) for bits in summary["bits"].values()}, reverse=True)
    return f"{' and '.join(map(str, found))} bits, activations {summary['activations']}"
