"""An artifact's structure.json: what an [`Outline`][edgemin.encoder.outline.Outline] has that no other file tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from edgemin.encoder.families import BY_NAME
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.store.json_file import read_object

FORMAT = 2  # of artifacts; 1 did not name the provider of quantized layers
# What follows from the configuration and the tokenizer, which lie beside it.
_BESIDE = ("max_tokens", "tokenizer")
_OUTLINE = TypeAdapter(Outline)


def written(outline: Outline) -> dict[str, Any]:
    """What the file holds of a model whose numbers are all known."""
    content = {name: value for name, value in asdict(outline).items() if name not in (*_BESIDE, "quantized")}
    if BY_NAME[outline.family].bottleneck is None:  # these are MobileBERT's alone
        del content["trigram"]
        for layer in content["layers"]:
            del layer["networks"], layer["bottleneck"]
    if (held := outline.quantized) is not None:
        content["quantized"] = {"provider": held.provider, **held.shared, "layers": held.layers}
    return {"format": FORMAT, **content}


def read_outline(path: Path) -> Outline:
    """Read a `structure.json`.

    Raises:
        UserError: it cannot be read, is of another format, or the field that the message names is missing, unknown, of
            the wrong type or out of range.
    """
    try:
        content = read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} is damaged ({error})") from error
    return parsed(content, path.name)


def parsed(content: Mapping[str, Any], name: str) -> Outline:
    """The outline of which `written` made this content.

    Args:
        content: of a file.
        name: of the file, for the message.

    Raises:
        UserError: as `read_outline`.
    """
    fields = dict(content)
    if (found := fields.pop("format", 1)) != FORMAT:
        raise UserError(
            f"{name}: expected an artifact of format {FORMAT}, given format {str(found)[:20]} of another version of "
            "EdgeMIN; make it again with this one"
        )
    if beside := [key for key in _BESIDE if key in fields]:
        raise UserError(f"{name}: {beside[0]}: expected no such key, given {str(fields[beside[0]])[:80]!r}")
    if isinstance(held := fields.get("quantized"), dict):
        own = {key: held[key] for key in ("provider", "layers") if key in held}
        fields["quantized"] = {"layers": {}, **own, "shared": {key: held[key] for key in held if key not in own}}
    try:
        outline = _OUTLINE.validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        given = "" if first["type"].startswith("missing") else f", given {str(first['input'])[:80]!r}"
        raise UserError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}{given}") from error
    numbers = [(f"layers.{at}", layer) for at, layer in enumerate(outline.layers)]
    unknown = [f"{at}.{key}" for at, layer in numbers for key in ("heads", "ffn") if getattr(layer, key) is None]
    unknown += [key for key in ("vocabulary", "labels") if getattr(outline, key) is None]
    if unknown:
        raise UserError(f"{name}: {unknown[0]}: expected a whole number of at least 1, given null")
    return outline
