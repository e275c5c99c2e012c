"""What the tests of exports share: small compressed artifacts, the command, and a Python that lacks packages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgemin import artifact, cli, export, toy
from edgemin.encoder import building, quantized, slicing
from edgemin.quantization.model import fit_inputs, quantize
from edgemin.quantization.ranges import Calibration
from edgemin.quantization.weights import Activations, Spec

SENTENCES = ("the plot was not very good .", "although the cast was dull , the music was superb", "awful")
_LACKING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def uneven(family: str = "bert") -> PreTrainedModel:
    """Three layers of 1 to 4 heads and, where they can be cut, 11 to 48 FFN units."""
    model = tiny.model(family)
    slicing.slice_heads(model, 0, [1, 3])
    slicing.slice_heads(model, 2, [0])
    if family != "mobilebert":
        slicing.slice_ffn(model, 1, range(11))
    return model


def to_integers(model: PreTrainedModel, bits: int = 8, activations: Activations = "static") -> None:
    """Quantize all Linears and tables, in place."""
    specs = {
        path: Spec(bits, "channel", activations="none" if matrix.is_table else activations)
        for path, matrix in building.outline(model).matrices.items()
    }
    quantize(model, specs, "minmax", Calibration(activation_range="minmax"))
    if activations == "static":
        fit_inputs(model, [tokens(SENTENCES)])
    quantized.settle(model)


def tokens(texts: Sequence[str]) -> dict[str, Tensor]:
    """A padded batch."""
    found = toy.tokenizer()(list(texts), padding=True, return_tensors="pt")
    return {name: torch.as_tensor(found[name]) for name in ("input_ids", "attention_mask", "token_type_ids")}


def saved(model: PreTrainedModel, folder: Path, *, tokenizer: bool = True) -> Path:
    """The model as an artifact."""
    folder.mkdir(parents=True)
    artifact.save(folder, model, toy.tokenizer() if tokenizer else None, {"seed": 7, "task": {"name": "toy"}})
    return folder


def exported(*words: str) -> int:
    """`python -m edgemin.export`, in this process; gives its exit code."""
    return cli.run("python -m edgemin.export", export.export, words)


def bare(folder: Path, arguments: Sequence[str], without: Sequence[str], site: Path) -> str:
    """Run Python in a folder as if these packages were not installed; gives what it printed.

    Args:
        folder: the working directory.
        arguments: of the interpreter.
        without: packages that cannot be imported.
        site: a directory for what Python imports when it starts.
    """
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(_LACKING.format(names=tuple(without)))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def mistake(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake is answered with, exit code 2."""
    capsys.readouterr()
    assert exported(*words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0].removeprefix("error: ")
