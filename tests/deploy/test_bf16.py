"""OpenVINO in bf16: a runtime of its own, of the same file, and only where the CPU multiplies in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import studies
import tiny
import torch
from bundles import SENTENCES, bare, exported, saved, to_integers, tokens, uneven

from edgemin.deploy import open_vino, open_vino_bf16
from edgemin.deploy.runtime import open_model
from edgemin.encoder import taps
from edgemin.errors import UserError
from edgemin.measure.runtime import Measure

openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

needs_bf16 = pytest.mark.skipif(
    "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"), reason="a CPU without bf16"
)
ANSWER = """
import json, sys
from predict import RUNTIME, encode, load
answer = load(1)
print(json.dumps([RUNTIME, *(answer(encode([text]))[0].tolist() for text in sys.argv[1:])]))
"""


def bundle(folder: Path, *, integers: bool) -> Path:
    model = uneven()
    if integers:
        to_integers(model)
    source = saved(model, folder / "artifact")
    assert exported(f"artifact={source}", "deploy=openvino_bf16", f"out={folder / 'bundle'}") == 0
    return folder / "bundle"


def answers(runtime: str, path: Path) -> np.ndarray:
    opened = open_model(runtime, path, 1)
    batches = [{name: values.numpy() for name, values in tokens([text]).items()} for text in SENTENCES]
    found = np.concatenate([opened.answers(batch) for batch in batches])
    opened.release()
    return found


@needs_bf16
def test_it_answers_as_far_from_fp32_as_torch_does_in_bf16(tmp_path: Path) -> None:
    out = bundle(tmp_path, integers=False)
    mine = np.abs(answers("openvino_bf16", out) - answers("openvino", out)).max()
    model = uneven().eval()
    with torch.no_grad():
        exact, rounded = taps.logits(model, tokens(SENTENCES)), taps.logits(model.bfloat16(), tokens(SENTENCES))
    theirs = (exact - rounded.float()).abs().max().item()
    assert theirs / 10 < mine < 10 * theirs


@needs_bf16
@pytest.mark.parametrize("integers", [False, True])
def test_its_bundle_answers_as_the_runtime_does_without_torch(integers: bool, tmp_path: Path) -> None:
    out = bundle(tmp_path, integers=integers)
    said = bare(out, ["-c", ANSWER, *SENTENCES], ("torch", "edgemin", "transformers"), tmp_path / "site")
    runtime, *found = json.loads(said)
    assert runtime == f"openvino_bf16 {openvino.__version__}"
    np.testing.assert_allclose(found, answers("openvino_bf16", out), atol=1e-6)
    assert "pip install openvino tokenizers" in (out / "README.md").read_text()


@needs_bf16
def test_both_precisions_are_scored_of_one_exported_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    write: Callable[[Path, Path], None] = open_vino.write

    def counted(onnx_file: Path, directory: Path) -> None:
        written.append(directory)
        write(onnx_file, directory)

    monkeypatch.setattr(open_vino, "write", counted)
    asked = ("measure=default", "measure.runtimes=[torch,openvino,openvino_bf16]", "measure.length=16")
    few = ("measure.runs=4", "measure.rounds=2", "measure.max_rounds=2", "measure.sentences=0", "measure.threads=1")
    run = studies.run(
        tmp_path / "run", *asked, *few, "measure.wait_minutes=0", "stages=[finetune]", store=tmp_path / "store"
    )
    assert len(written) == len(run["rows"])
    for row in run["rows"]:
        exact, rounded = (row["cost"]["runtimes"][name] for name in ("openvino", "openvino_bf16"))
        assert exact["size_bytes"] == rounded["size_bytes"]
        assert exact["largest_difference"] < min(1e-5, rounded["largest_difference"])
        assert exact["latency_ms"]["padded"]["p50"] > 0 and rounded["latency_ms"]["padded"]["p50"] > 0


def test_a_cpu_without_bf16_is_refused_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"OPTIMIZATION_CAPABILITIES": ["FP32", "INT8"], "FULL_DEVICE_NAME": "a processor of 2017"}
    core = SimpleNamespace(get_property=lambda _device, name: told[name])
    monkeypatch.setattr(open_vino_bf16, "extra", lambda *_: SimpleNamespace(Core=lambda: core))
    said = "runtimes: expected a CPU that multiplies in bf16 for openvino_bf16, given a processor of 2017"
    with pytest.raises(UserError, match=said):
        Measure(runtimes=("torch", "openvino_bf16"))


@needs_bf16
def test_its_latency_table_is_made_for_it(tmp_path: Path) -> None:
    out = tmp_path / "grid"
    source = saved(tiny.model(), tmp_path / "artifact")
    assert exported(f"artifact={source}", "deploy=openvino_bf16", "grid=int8", f"out={out}") == 0
    bare(out, ["bench.py", "threads=1", "rounds=1", "runs=2"], ("torch", "edgemin"), tmp_path / "site")
    timed = json.loads((out / "latencies.json").read_text())
    assert timed["runtime"] == "openvino_bf16"
