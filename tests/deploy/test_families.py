"""Every family, its heads and FFN units pruned unevenly, answers in both runtimes as in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from edgemin import artifact
from edgemin.deploy import model_files
from edgemin.deploy.runtime import open_model
from edgemin.encoder import quantized, slicing
from edgemin.quantization import model as quantization
from edgemin.quantization.settings import Quantization

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-4), (8, 2e-2)])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "electra"])
def test_an_unevenly_pruned_model_answers_alike_whatever_the_batch(
    family: str, bits: int, tolerance: float, tmp_path: Path
) -> None:
    model = tiny.model(family, hidden=64)
    if family != "mobilebert":
        slicing.slice_heads(model, 0, [0, 2, 3])
        slicing.slice_ffn(model, 1, range(23))
    data = tiny.data(tmp_path)
    if bits != 32:
        how = Quantization(bits=bits)
        quantization.quantize(model, how.specs(quantized.outline(model).matrices), how.weight_range, how.calibration)
        quantization.fit_inputs(model, data.calibration(32, 8, seed=0))
    saved = tmp_path / "artifact"
    saved.mkdir()
    artifact.save(saved, model, data.tokenizer, {})
    batches = [data.evaluation["validation"].batch(rows) for rows in ([0], [1, 2, 3, 4, 5], range(16))]
    for runtime in ("onnxruntime", "openvino"):
        out = tmp_path / runtime
        out.mkdir()
        model_files.write(artifact.load(saved)[0], runtime, out)
        opened = open_model(runtime, out, 1)
        for batch in batches:
            inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
            inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
            expected = tiny.logits(artifact.load(saved)[0], {name: torch.from_numpy(a) for name, a in inputs.items()})
            assert np.abs(opened.answers(inputs) - expected.numpy()).max() < tolerance * expected.abs().max(), runtime
        opened.release()
