"""A folder that transformers loads without EdgeMIN: float weights in its own classes, for whatever builds on those."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from edgemin import artifact
from edgemin.deploy import bundle, inputs, twins
from edgemin.deploy.torch_eager import TorchEager
from edgemin.encoder import padding, parts, quantized
from edgemin.errors import UserError

# Logits of the same float model, in matrices of another shape: sums in another order. Of the largest logit, or of 1.
ROUNDING = 1e-4


def write(source: Path, out: Path, *, texts: Path | None = None) -> dict[str, Any]:
    """Write an artifact as a checkpoint of transformers, and compare what transformers makes of it with the artifact.

    Args:
        source: the artifact's directory; it has a tokenizer.
        out: an empty directory.
        texts: a file of sentences to compare on; `None`: those of the artifact's task where they can be read.

    Returns:
        The comparison, as [`bundle.write`][edgemin.deploy.bundle.write] gives it.

    Raises:
        UserError: no tokenizer, torch's dynamic INT8, or a shape that transformers has no configuration for.
    """
    model, tokenizer = artifact.load(source)
    if tokenizer is None:
        raise UserError(f"artifact: expected one with a tokenizer, given {source} without")
    twins.check(model)
    facts, provenance = bundle.own(source, model, "transformers", None)
    tried = inputs.find(model, copy.deepcopy(tokenizer), provenance, texts)
    stock, notes = padding.padded(model)
    transformers.utils.logging.disable_progress_bar()
    stock.save_pretrained(out)
    tokenizer.save_pretrained(out)
    reloaded = AutoModelForSequenceClassification.from_pretrained(out, local_files_only=True)
    # Copied: weights that are read where they lie in the file are not aligned, and products then add in another order.
    reloaded = copy.deepcopy(reloaded).eval()
    outputs = len(parts.label_names(model))
    found = bundle.compare(TorchEager(source, model), TorchEager(out, reloaded), tried, outputs)
    summary = quantized.summary(model)
    is_rounded = summary is not None and summary["activations"] != "none"
    bound = ROUNDING * max(1.0, found["largest_logit"])
    assert is_rounded or found["largest_difference"] < bound, f"{found} where nothing was lost: {notes}"
    rows = bundle.card_rows(model, facts, provenance, found)
    (out / bundle.CARD).write_text(_card(model, rows, found, notes, bundle.title(provenance)))
    return found


def _card(model: PreTrainedModel, rows: dict[str, str], found: dict[str, Any], notes: list[str], title: str) -> str:
    rows["filled up with zeros"] = "; ".join(notes) or "nothing"
    summary = quantized.summary(model)
    if summary is not None:
        rows["weights"] = f"fp32, the values of the quantized model's weights ({bundle.bits(summary)})"
        if summary["activations"] != "none":
            rows["weights"] += (
                ". Activations are not rounded here, so that logits differ from that model's by up to "
                f"{found['largest_difference']:.2g}"
            )
    return f"""---
library_name: transformers
pipeline_tag: text-classification
---

# {title}, exported by EdgeMIN for transformers

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("<this directory>")
tokenizer = AutoTokenizer.from_pretrained("<this directory>")
```

Plain float weights, for tools that know transformers alone. What pruning of heads and FFN units and quantization have
saved in size and time is not seen here, but in the other formats: `python -m edgemin.export artifact=<the artifact>
deploy=onnxruntime out=<directory>`, or `deploy=openvino`.

{bundle.markdown(rows)}
"""
