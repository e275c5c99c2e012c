"""`python -m edgemin.export`: a compressed model as a bundle that a stock runtime serves."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from edgemin import cli
from edgemin.errors import UserError


def export(
    artifact: Annotated[Path, Field(title="directory", description="the artifact: outputs/store/<key>")],
    deploy: Annotated[
        Literal["onnxruntime", "openvino", "openvino_bf16", "transformers"],
        Field(title="format (onnxruntime, openvino, openvino_bf16 or transformers)", description="what will serve it"),
    ],
    out: Annotated[Path, Field(title="directory", description="where the bundle goes: new, or empty")],
    length: Annotated[
        int | None,
        Field(title="number of tokens", description="one length for all inputs, for accelerators that need it"),
    ] = None,
    texts: Annotated[
        Path | None,
        Field(
            title="file",
            description="sentences to compare with torch on, as .csv, .tsv, .jsonl or .parquet; else the task's",
        ),
    ] = None,
    grid: Annotated[
        Literal["fp32", "int8", "int4"] | None,
        Field(
            title="precision (fp32, int8 or int4)",
            description="not the model but ones of its shape, each with one width in all layers, to time on a device "
            "for prune.target.table",
        ),
    ] = None,
    study: Annotated[
        Path | None, Field(title="directory", description="the run whose measurements of this artifact the card shows")
    ] = None,
) -> None:
    """Write a model as a bundle: model, tokenizer, labels, a card, predict.py and bench.py, which need no torch.

    With deploy=transformers it is a checkpoint that transformers loads by itself, in float. What was written is
    compared with torch before the command ends: on the sentences of texts=<file>, on up to 1000 of the data that the
    artifact was made with where that can still be read, else on random tokens.
    """
    _check_place(out)
    _check_settings(deploy, grid, length, texts, study)
    from edgemin.artifact import read_provenance
    from edgemin.deploy import bundle, interchange
    from edgemin.measure import layer_grid
    from edgemin.report.serving import measured

    table = None if study is None else measured(study, str(read_provenance(artifact).get("key", artifact.name)))
    out.parent.mkdir(parents=True, exist_ok=True)
    # Moved to its place when it is whole, so that a failure leaves nothing behind.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        written = Path(beside) / "bundle"
        written.mkdir()
        if grid is not None:
            models = layer_grid.write_grid(artifact, deploy, grid, written, length)
            said = f"{models} models of the grid; on the device: python bench.py threads=2"
        elif deploy == "transformers":
            said = _compared(written, interchange.write(artifact, written, texts=texts))
        else:
            found = bundle.write(artifact, deploy, written, length=length, texts=texts, measured=table)
            said = _compared(written, found)
        written.replace(out)
    print(f"{out}: {said}")


def _compared(written: Path, found: Mapping[str, Any]) -> str:
    from edgemin.deploy import bundle

    size = sum(file.stat().st_size for file in written.glob("model.*")) / 2**20
    return f"{size:.1f} MiB, compared with torch {bundle.in_words(found)}"


def _check_place(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"out: expected a new or empty directory, given {out}, which is a file")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"out: expected a new or empty directory, given {out}, which is not empty")
    if out.resolve() == Path.cwd():
        raise UserError(f"out: expected a directory that can be replaced, given {out}, the one that this runs in")


def _check_settings(deploy: str, grid: str | None, length: int | None, texts: Path | None, study: Path | None) -> None:
    """Refuse settings that contradict each other."""
    if deploy == "transformers" and length is not None:
        raise UserError(f"length: expected none with deploy=transformers, which takes any length, given {length}")
    if deploy == "transformers" and study is not None:
        raise UserError(f"study: expected none with deploy=transformers, whose floats no run measures, given {study}")
    for name, value in {"texts": texts, "study": study}.items():
        if grid is not None and value is not None:
            raise UserError(f"{name}: expected none with grid={grid}, whose weights are random, given {value}")
    if grid is not None and deploy == "transformers":
        raise UserError(f"deploy: expected onnxruntime, openvino or openvino_bf16 with grid={grid}, given transformers")


if __name__ == "__main__":
    sys.exit(cli.run("python -m edgemin.export", export, sys.argv[1:]))
