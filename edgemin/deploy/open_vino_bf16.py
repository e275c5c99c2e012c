"""OpenVINO on the CPU with bf16 for what is not integer: the same file as `openvino`, opened by another hint.

On a CPU with AMX a model in float gains much, one with weights of 4 bits too, as its products are in float; a model in
INT8 gains in attention alone (docs/targets.md has figures). Answers differ by what bf16 rounds.
"""

from __future__ import annotations

from pathlib import Path

from edgemin.deploy import open_vino
from edgemin.deploy.extras import extra
from edgemin.deploy.open_vino import OpenVINO, start
from edgemin.errors import UserError

__all__ = ["check", "open", "start"]


def open(path: Path, threads: int) -> OpenVINO:
    """Compile a model for latency, in bf16 where it is not integer."""
    return open_vino.open(path, threads, "bf16")


def check(key: str) -> None:
    """Refuse a CPU that does not multiply in bf16, where OpenVINO would go on in fp32.

    Raises:
        UserError: names the key and the CPU.
    """
    core = extra("openvino", "openvino").Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        name = core.get_property("CPU", "FULL_DEVICE_NAME")
        raise UserError(f"{key}: expected a CPU that multiplies in bf16 for openvino_bf16, given {name}")
