"""EdgeMIN: distil, prune and quantize BERT-family encoders, and see what each stage cost and bought."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemin.artifact import load
    from edgemin.deploy.pipeline import pipeline

__version__ = "0.1.0"
__all__ = ["load", "pipeline"]


def __getattr__(name: str) -> Any:
    # Deferred, so that `import edgemin` (and with it `--help` and `--cfg job`) does not load torch.
    if name == "load":
        from edgemin.artifact import load

        return load
    if name == "pipeline":  # loads torch for an artifact alone, which a bundle does without
        from edgemin.deploy.pipeline import pipeline

        return pipeline
    raise AttributeError(f"module 'edgemin' has no attribute {name!r}")
