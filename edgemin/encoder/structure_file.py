"""An artifact's structure.json: an encoder as [`quantized.structure`][edgemin.encoder.quantized.structure] has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgemin.encoder.families import LARGEST
from edgemin.encoder.quantized import Kind
from edgemin.errors import UserError
from edgemin.store.json_file import read_object

FORMAT = 2  # of artifacts; 1 did not name the provider of quantized layers
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


class _Quantized(BaseModel):
    """How layers are quantized is read by the provider that is named."""

    model_config = ConfigDict(strict=True, extra="allow")

    provider: Kind
    layers: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


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
    quantized: _Quantized | None = None


def written(structure: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds of a structure."""
    return {"format": FORMAT, **structure}


def read_structure(path: Path) -> dict[str, Any]:
    """Read a `structure.json`: what `written` was given.

    Raises:
        UserError: it cannot be read, is of another format, or the field that the message names is missing, unknown, of
            the wrong type or out of range.
    """
    try:
        content = read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} is damaged ({error})") from error
    if (found := content.pop("format", 1)) != FORMAT:
        raise UserError(
            f"{path.name}: expected an artifact of format {FORMAT}, given format {str(found)[:20]} of another version "
            "of EdgeMIN; make it again with this one"
        )
    try:
        _Structure.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        given = "" if first["type"] == "missing" else f", given {str(first['input'])[:80]!r}"
        raise UserError(f"{path.name}: {place}: {first['msg'].lower()}{given}") from error
    return content
