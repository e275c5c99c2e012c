"""The safetensors of a checkpoint, one file or several with an index: which tensors they hold by their headers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from edgemin.errors import UserError
from edgemin.store.json_file import read_object

_INDEX = "model.safetensors.index.json"  # which of several files has which tensor


def tensor_names(directory: Path, whole: str) -> list[str]:
    """The names of all tensors in a checkpoint's safetensors; nothing is known of other files before they are loaded.

    Args:
        directory: of the checkpoint.
        whole: the name of the file that holds all tensors, where there is one; no index counts beside it.

    Raises:
        UserError: a file cannot be read, holds a weight that is no float, or is not what an index says.
    """
    names: dict[str, list[str]] = {}
    for path in sorted(directory.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names[path.name] = list(file.keys())
                kinds = {name: file.get_slice(name).get_dtype() for name in names[path.name] if name.endswith("weight")}
        except (SafetensorError, OSError) as error:
            raise UserError(f"the weights in {path} cannot be read ({error})") from error
        if integers := [name for name, kind in kinds.items() if not kind.startswith(("F", "BF"))]:
            raise UserError(f"expected weights in {path} as numbers with a fraction, given integers for {integers[0]}")
    if (index := directory / _INDEX).is_file() and not (directory / whole).is_file():
        _check_index(index, names)
    return [name for held in names.values() for name in held]


def _check_index(path: Path, held: Mapping[str, list[str]]) -> None:
    """Refuse an index that names a file other than the shards beside it, or not what is in them.

    Args:
        path: of the index.
        held: the names of the tensors in each shard.
    """
    try:
        named = read_object(path).get("weight_map")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    if not isinstance(named, dict):
        raise UserError(f"weight_map in {path}: expected the file of each tensor, given {str(named)[:80]!r}")
    for tensor, file in named.items():
        if not isinstance(file, str) or file not in held:
            raise UserError(
                f"weight_map in {path}: expected files beside it ({', '.join(held) or 'there is none'}), given "
                f"{str(file)[:80]!r} for {tensor}"
            )
        if tensor not in held[file]:
            raise UserError(f"weight_map in {path}: expected tensors of {file}, given {tensor}, which it does not hold")
    if missing := [tensor for names in held.values() for tensor in names if tensor not in named]:
        raise UserError(f"weight_map in {path}: expected all tensors of the files, given none for {missing[0]}")
