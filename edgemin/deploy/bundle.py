"""A bundle: one directory that a device needs to serve a model, without torch and without EdgeMIN."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from edgemin import artifact
from edgemin.deploy import inputs, model_files, torch_eager
from edgemin.deploy.extras import extra
from edgemin.deploy.inputs import Inputs
from edgemin.deploy.runtime import RUNTIMES, Runtime, open_model
from edgemin.deploy.served import text_settings
from edgemin.encoder import parts, quantized
from edgemin.errors import UserError

FILES = Path(__file__).parent / "files"
TOKENIZER, CARD = "tokenizer.json", "README.md"
_HOW_TO_MEASURE = (
    "Not here: `python bench.py threads=2` measures latency, throughput, memory and cold start on the device that it "
    "runs on, and writes `device.json`."
)


def write(
    source: Path,
    runtime: str,
    out: Path,
    *,
    length: int | None = None,
    texts: Path | None = None,
    measured: str | None = None,
) -> dict[str, Any]:
    """Export an artifact as a bundle, and compare what it answers with torch.

    Args:
        source: the artifact's directory; it has a tokenizer.
        runtime: `onnxruntime`, `openvino` or `openvino_bf16`.
        out: an empty directory.
        length: fixed length of all inputs; `None`: any.
        texts: a file of sentences to compare on; `None`: those of the artifact's task where they can be read.
        measured: the table of the card that says what was measured; `None`: it says how to measure.

    Returns:
        The comparison, as [`Inputs.compared`][edgemin.deploy.inputs.Inputs.compared] gives it.

    Raises:
        UserError: no tokenizer, a layer that cannot be exported, a length that the model does not take, a file of
            sentences that cannot be used.
    """
    package = RUNTIMES[runtime].package
    extra(package, package)
    model, tokenizer = artifact.load(source)
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise UserError(f"artifact: expected one with a fast tokenizer (tokenizer.json), given {source} without")
    torch_eager.check_length(model, length)
    facts, provenance = own(source, model, runtime, length)
    facts |= text_settings(tokenizer)
    tried = inputs.find(model, copy.deepcopy(tokenizer), provenance, texts, length)
    model_files.write(model, runtime, out, length=length)
    tokenizer.backend_tokenizer.save(str(out / TOKENIZER))
    config = model.config.to_diff_dict() | {
        "id2label": {str(index): label for index, label in enumerate(parts.label_names(model))},
        "problem_type": model.config.problem_type,
        "pad_token_id": model.config.pad_token_id,
        "vocab_size": quantized.outline(model).vocabulary,
        "edgemin": facts,
    }
    (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True, default=str) + "\n")
    start = (FILES / f"predict_{package}.py.txt").read_text()
    (out / "predict.py").write_text(start + (FILES / "predict_main.py.txt").read_text())
    (out / "bench.py").write_text((FILES / "bench.py.txt").read_text())
    found = compare(open_model("torch", source, 1), open_model(runtime, out, 1), tried, len(parts.label_names(model)))
    (out / CARD).write_text(_card(model, facts, provenance, found, measured))
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


def compare(one: Runtime, other: Runtime, inputs: Inputs, outputs: int) -> dict[str, Any]:
    """What two opened models answer to the same inputs, as [`Inputs.compared`][edgemin.deploy.inputs.Inputs.compared].

    Both are released.
    """
    pairs = [(one.answers(batch), other.answers(batch)) for batch in inputs.batches]
    for opened in (one, other):
        opened.release()
    mine, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return inputs.compared(mine, theirs, outputs)


def in_words(found: Mapping[str, Any]) -> str:
    """The comparison of an export with torch, as one line of the card."""
    said = f"on {found['examples']} {found['inputs']}: logits differ by at most {found['largest_difference']:.2g}"
    if found["agreement"] is not None:
        said += f", {100 * found['agreement']:.1f} % equal predictions"
    if found["metrics"]:
        said += f", in the runtime {_scores(found['metrics'])}"
    return said


def _card(
    model: PreTrainedModel,
    facts: Mapping[str, Any],
    provenance: Mapping[str, Any],
    found: Mapping[str, Any],
    measured: str | None,
) -> str:
    return f"""# {title(provenance)}, exported by EdgeMIN for {facts["runtime"]}

```
pip install {RUNTIMES[facts["runtime"]].package} tokenizers
python predict.py "the plot was good"
python bench.py threads=2          # latency on this device, into device.json
```

{markdown(card_rows(model, facts, provenance, found))}

## Measured

{measured or _HOW_TO_MEASURE}
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
        "compared with torch": in_words(found),
        "artifact": facts["artifact"],
        "seed": provenance.get("seed", "not recorded"),
        "git": provenance.get("git") or "not recorded",
        "versions": ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items()),
    }


def _scores(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def markdown(rows: Mapping[str, str]) -> str:
    """The rows of a card as a Markdown table of two columns."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def bits(summary: Mapping[str, Any]) -> str:
    """How a model is quantized, in words."""
    found = sorted({int(bits) for bits in summary["bits"].values()}, reverse=True)
    return f"{' and '.join(map(str, found))} bits, activations {summary['activations']}"
