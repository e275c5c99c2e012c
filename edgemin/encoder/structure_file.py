"""An artifact's ``structure.json``: that it has the form which :func:`edgemin.encoder.structure` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgemin.encoder.shapes import LARGEST
from edgemin.errors import UserError
from edgemin.store.json_file import read_object

Width = Annotated[int, Field(ge=1, le=max(LARGEST["hidden"], LARGEST["intermediate"]))]
Rows = Annotated[int, Field(ge=0, le=LARGEST["vocabulary"])]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Bottleneck(_Form):
    size: Width
    shared: bool
    attention: bool


class _Layer(_Form):
    heads: Width
    head_size: Width
    ffn: Width
    gated: bool = False
    window: Width | None = None
    attention_norm: bool = True
    networks: Width = 1
    bottleneck: _Bottleneck | None = None


class _Structure(_Form):
    family: str
    hidden: Width
    vocabulary: Annotated[int, Field(ge=1, le=LARGEST["vocabulary"])]
    positions: Rows
    token_types: Rows
    embedding: Width
    projection: bool = False
    trigram: bool = False
    labels: Width
    head: list[Annotated[list[Width], Field(min_length=2, max_length=2)]] = []
    layers: Annotated[list[_Layer], Field(min_length=1, max_length=LARGEST["layers"])]
    quantized: dict[str, Any] = {}  # read where quantized layers are built


def read_structure(path: Path) -> dict[str, Any]:
    """Read a ``structure.json``.

    Raises:
        UserError: it cannot be read, or the field that the message names is missing, unknown, of the wrong type or
            out of range.
    """
    try:
        content = read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} is damaged ({error})") from error
    try:
        _Structure.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        given = "" if first["type"] == "missing" else f", given {str(first['input'])[:80]!r}"
        raise UserError(f"{path.name}: {place}: {first['msg'].lower()}{given}") from error
    return content
