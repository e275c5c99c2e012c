"""`python -m edgemin.export`: a compressed model as a bundle that a stock runtime serves."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from edgemin import cli
from edgemin.errors import UserError


def export(
    artifact: Annotated[Path, Field(title="directory", description="the artifact: outputs/store/<key>")],
    deploy: Annotated[
        Literal["onnxruntime", "openvino", "transformers"],
        Field(title="format (onnxruntime, openvino or transformers)", description="what will serve it"),
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
            description="sentences to compare with torch on, as .csv, .jsonl or .parquet; else the task's",
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
    if out.exists() and not out.is_dir():
        raise UserError(f"out: expected a new or empty directory, given {out}, which is a file")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"out: expected a new or empty directory, given {out}, which is not empty")
    if deploy == "transformers" and length is not None:
        raise UserError(f"length: expected none with deploy=transformers, which takes any length, given {length}")
    if deploy == "transformers" and study is not None:
        raise UserError(f"study: expected none with deploy=transformers, whose floats no run measures, given {study}")
    from edgemin.artifact import read_provenance
    from edgemin.deploy import bundle, interchange
    from edgemin.report.serving import measured

    table = None if study is None else measured(study, str(read_provenance(artifact).get("key", artifact.name)))
    out.parent.mkdir(parents=True, exist_ok=True)
    # Moved to its place when it is whole, so that a failure leaves nothing behind.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        written = Path(beside) / "bundle"
        written.mkdir()
        if deploy == "transformers":
            found = interchange.write(artifact, written, texts=texts)
        else:
            found = bundle.write(artifact, deploy, written, length=length, texts=texts, measured=table)
        written.replace(out)
    size = sum(file.stat().st_size for file in out.glob("model.*")) / 2**20
    print(f"{out}: {size:.1f} MiB, compared with torch {bundle.in_words(found)}")


if __name__ == "__main__":
    sys.exit(cli.run("python -m edgemin.export", export, sys.argv[1:]))
