"""The size of an artifact: the bytes of the files that a runtime loads."""

from __future__ import annotations

from pathlib import Path

from edgemin.artifact import MODEL_FILES
from edgemin.errors import UserError


def size_bytes(artifact: Path) -> int:
    """Adds up the files that the runtime loads the model from, tokenizer apart.

    Args:
        artifact: The directory of one saved encoder.

    Returns:
        The bytes of `model.safetensors`, `config.json` and `structure.json` together. Tables show MiB
        (2^20).

    Raises:
        UserError: One of the files is missing.
    """
    missing = [name for name in MODEL_FILES if not (artifact / name).is_file()]
    if missing:
        raise UserError(f"artifact: expected {', '.join(MODEL_FILES)} in {artifact}, missing {', '.join(missing)}")
    return sum((artifact / name).stat().st_size for name in MODEL_FILES)
