"""EdgeMIN: distil, prune and quantize BERT-family encoders, and see what each stage cost and bought."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemin.artifact import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Deferred, so that `import edgemin` (and with it `--help` and `--cfg job`) does not load torch.
    if name == "load":
        from edgemin.artifact import load

        return load
    raise AttributeError(f"module 'edgemin' has no attribute {name!r}")
