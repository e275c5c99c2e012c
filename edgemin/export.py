"""`python -m edgemin.export`: a compressed model as a bundle that a stock runtime serves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from edgemin import cli
from edgemin.errors import UserError


def export(
    artifact: Annotated[Path, Field(title="directory", description="the artifact: outputs/store/<key>")],
    deploy: Annotated[
        Literal["onnxruntime", "openvino"], Field(title="onnxruntime or openvino", description="what will serve it")
    ],
    out: Annotated[Path, Field(title="directory", description="where the bundle goes: new, or empty")],
    length: Annotated[
        int | None,
        Field(title="number of tokens", description="one length for all inputs, for accelerators that need it"),
    ] = None,
) -> None:
    """Write a model as a bundle: model, tokenizer, labels, a card, predict.py and bench.py, which need no torch.

    What the bundle answers is compared with torch before the command ends.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out: expected a new or empty directory, given {out}, which is not empty")
    from edgemin.deploy import bundle

    out.mkdir(parents=True, exist_ok=True)
    found = bundle.write(artifact, deploy, out, length=length)
    size = sum(file.stat().st_size for file in out.glob("model.*")) / 2**20
    print(
        f"{out}: {size:.1f} MiB, compared with torch on {found['examples']} inputs: logits differ by at most "
        f"{found['largest_difference']:.2g}, {100 * found['agreement']:.1f} % equal predictions"
    )


if __name__ == "__main__":
    sys.exit(cli.run("python -m edgemin.export", export, sys.argv[1:]))
