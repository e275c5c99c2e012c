"""`python -m edgemin.export`: bundles that serve without torch and EdgeMIN; a line for what cannot be."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from bundles import SENTENCES, bare, exported, mistake, saved, to_integers, uneven

import edgemin
from edgemin import artifact
from edgemin.deploy import onnx_file
from edgemin.deploy.runtime import open_model
from edgemin.encoder import taps
from edgemin.errors import UserError
from edgemin.quantization import torch_layers

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

NOT_THERE = ("torch", "edgemin", "transformers")
RUNTIMES = ("onnxruntime", "openvino")
ANSWER = """
import json, sys
from predict import encode, load
answer = load(1)
print(json.dumps([answer(encode([text]))[0].tolist() for text in sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of uneven heads and FFN units, in static INT8."""
    model = uneven()
    to_integers(model)
    return saved(model, tmp_path_factory.mktemp("source") / "artifact")


@pytest.fixture(scope="module", params=[(name, length) for name in RUNTIMES for length in (None, 32)], ids=str)
def bundle(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An export of it: a directory, and the runtime's name."""
    name, length = request.param
    out = tmp_path_factory.mktemp("bundle") / "out"
    words = [f"artifact={source}", f"deploy={name}", f"out={out}", *([f"length={length}"] if length else [])]
    assert exported(*words) == 0
    return out, name


def test_a_bundle_serves_where_there_is_no_torch_and_no_edgemin(
    bundle: tuple[Path, str], source: Path, tmp_path: Path
) -> None:
    out, name = bundle
    logits = torch.tensor(json.loads(bare(out, ["-c", ANSWER, *SENTENCES], NOT_THERE, tmp_path / "site")))
    model, tokenizer = edgemin.load(source)
    assert tokenizer is not None
    given = [tokenizer([text], return_tensors="pt") for text in SENTENCES]
    with torch.no_grad():
        expected = torch.cat([taps.logits(model, batch) for batch in given])
    torch.testing.assert_close(logits, expected, atol=1e-2, rtol=0)
    assert torch.equal(logits.argmax(1), expected.argmax(1))

    printed = bare(out, ["predict.py", *SENTENCES], NOT_THERE, tmp_path / "site").splitlines()
    label, share, text = printed[0].split("\t")
    assert (label, text) == (model.config.id2label[int(expected[0].argmax())], SENTENCES[0])
    assert float(share) == pytest.approx(float(expected[0].softmax(0).max()), abs=1e-2)
    assert len(printed) == len(SENTENCES)

    bare(out, ["bench.py", "threads=1", "rounds=1", "runs=2"], NOT_THERE, tmp_path / "site")
    device = json.loads((out / "device.json").read_text())
    fixed = json.loads((out / "config.json").read_text())["edgemin"]["length"]
    assert device["runtime"].startswith(name) and device["threads"] == 1
    assert [cell["length"] for cell in device["latency"]] == ([32] if fixed else [16, 32, 64, 128] * 3)
    assert all(cell["p50_ms"] > 0 and cell["n"] == 2 for cell in device["latency"])


def test_the_wall_around_it_is_one(tmp_path: Path) -> None:
    found = "import importlib.util as u\ntry: u.find_spec('torch')\nexcept ModuleNotFoundError: print('none')"
    assert bare(tmp_path, ["-c", found], NOT_THERE, tmp_path / "site") == "none\n"


def test_a_truncated_model_file_is_one_line(bundle: tuple[Path, str], tmp_path: Path) -> None:
    out, name = bundle
    damaged = shutil.copytree(out, tmp_path / "damaged")
    file = damaged / ("model.onnx" if name == "onnxruntime" else "model.xml")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{file.name}: .* cannot open it"):
        open_model(name, damaged, 1)


def damaged(folder: Path) -> Path:
    source = saved(tiny.model(), folder)
    weights = source / artifact.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    return source


def dynamic(folder: Path) -> Path:
    model = tiny.model()
    torch_layers.quantize(model)
    return saved(model, folder)


@pytest.mark.parametrize("deploy", [*RUNTIMES, "transformers"])
def test_an_artifact_that_cannot_be_exported_is_one_line(
    deploy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {
        "none": (tmp_path / "none", "does not exist"),
        "damaged": (damaged(tmp_path / "damaged"), "model.safetensors is damaged"),
        "wordless": (saved(tiny.model(), tmp_path / "wordless", tokenizer=False), "tokenizer"),
        "dynamic": (dynamic(tmp_path / "dynamic"), "given torch's dynamic INT8 (bert.encoder.layer.0"),
    }
    for name, (source, said) in made.items():
        out = tmp_path / "exports" / name
        line = mistake([f"artifact={source}", f"deploy={deploy}", f"out={out}"], capsys)
        assert line.startswith("artifact") and said in line
        assert not list(out.parent.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_model_too_large_for_one_file_has_two(
    runtime: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "MOST", 1000)
    assert exported(f"artifact={source}", f"deploy={runtime}", f"out={tmp_path / 'out'}") == 0
    files = {path.name for path in open_model(runtime, tmp_path / "out", 1).files()}
    assert files == {path.name for path in (tmp_path / "out").glob("model.*")}
    assert files == ({"model.onnx", "model.onnx.data"} if runtime == "onnxruntime" else {"model.xml", "model.bin"})


def test_a_word_that_cannot_be_is_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    file.write_text("mine")
    given = {"artifact": str(source), "deploy": "onnxruntime", "out": str(tmp_path / "out")}
    (empty := tmp_path / "empty").mkdir()
    monkeypatch.chdir(empty)
    cases: list[tuple[dict[str, str], str]] = [
        ({"out": str(full)}, f"out: expected a new or empty directory, given {full}, which is not empty"),
        ({"out": str(file)}, f"out: expected a new or empty directory, given {file}, which is a file"),
        (
            {"deploy": "tflite"},
            "deploy: expected a format (onnxruntime, openvino, openvino_bf16 or transformers), "
            "given tflite (see --help)",
        ),
        ({"out": "."}, "out: expected a directory that can be replaced, given ., the one that this runs in"),
        ({"length": "short"}, "length: expected a number of tokens, given short (see --help)"),
        ({"length": "1"}, "length: expected a whole number from 2 to 512, what the model takes, given 1"),
        ({"length": "513"}, "length: expected a whole number from 2 to 512, what the model takes, given 513"),
        (
            {"length": "32", "deploy": "transformers"},
            "length: expected none with deploy=transformers, which takes any length, given 32",
        ),
    ]
    for words, said in cases:
        assert mistake([f"{key}={value}" for key, value in (given | words).items()], capsys) == said
    for name in RUNTIMES:
        monkeypatch.setitem(sys.modules, name, None)
        line = f"deploy: expected {name} to be installed (pip install 'edgemin[{name}]'), given none"
        assert mistake([f"{key}={value}" for key, value in (given | {"deploy": name}).items()], capsys) == line
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file", "empty"}
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
