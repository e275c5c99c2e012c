"""What the operators of torch take of an inference, and the trace that shows each call."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

_INFERENCES = 5
_COSTLIEST = 10
_OF_THE_PLACE = ("host_name", "traceName")  # in a trace: the computer's name, and a temporary path


def profile(infer: Callable[[], object], trace: Path) -> list[dict[str, Any]]:
    """Look into a model that has been warmed up.

    Args:
        infer: Runs it once.
        trace: The file to write, `.json.gz`: for Perfetto or chrome://tracing.

    Returns:
        The operators with the most time of their own, at most ten, the costliest first. For each, per inference:
        `name`, `self_ms` (without what it calls), `share` (of that in all operators), `memory_bytes` (what it and what
        it calls allocate, less what they free) and `calls`.
    """
    with torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        for _ in range(_INFERENCES):
            infer()
    with TemporaryDirectory() as directory:
        raw = Path(directory) / "trace.json"
        seen.export_chrome_trace(str(raw))
        content = json.loads(raw.read_bytes())
    kept = {name: value for name, value in content.items() if name not in _OF_THE_PLACE}
    trace.write_bytes(gzip.compress(json.dumps(kept).encode(), mtime=0))
    operators = sorted(seen.key_averages(), key=lambda operator: -operator.self_cpu_time_total)
    total = sum(operator.self_cpu_time_total for operator in operators)
    return [
        {
            "name": operator.key,
            "self_ms": operator.self_cpu_time_total / 1000 / _INFERENCES,
            "share": operator.self_cpu_time_total / total,
            "memory_bytes": operator.cpu_memory_usage / _INFERENCES,
            "calls": operator.count / _INFERENCES,
        }
        for operator in operators[:_COSTLIEST]
        if operator.self_cpu_time_total > 0
    ]
