"""Latencies that a pruning was asked to reach, beside those measured end to end in the finished model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from torch import nn

from edgemin import artifact
from edgemin.encoder import quantized
from edgemin.measure.machine import host
from edgemin.store.artifacts import Store
from edgemin.study.nodes import Node
from edgemin.training.latency import Precision


def asked(node: Node, store: Store) -> Mapping[str, Any] | None:
    """The latency that the last pruning on a node's path was to reach, as its findings have it.

    Returns:
        `None` where it had none to reach, or one on another device.
    """
    while node.parent is not None and node.step is not None:
        findings = artifact.read_provenance(store.path(node.key))["findings"]
        if "pruning" in findings:
            target = findings.get("target", {})
            here = target.get("measure") == "latency_ms" and target["device"] == host()["cpu"]
            return target if here else None
        node = node.parent
    return None


def precision(model: nn.Module) -> Precision | None:
    """The precision in which a model is served; `None` where it is none that a latency can be asked for."""
    if quantized.kind_of(model) is None:
        return "fp32"
    summary = quantized.summary(model)
    if summary is None:  # torch's dynamic INT8
        return None
    bits = summary["bits"]
    linears = [bits[name] for name, part in model.named_modules() if isinstance(part, nn.Linear) and name in bits]
    if not linears:  # the tables alone are quantized
        return None
    served: dict[tuple[int, bool], Precision] = {(8, True): "int8", (4, False): "int4"}
    return served.get((statistics.mode(linears), summary["activations"] != "none"))


def beside(target: Mapping[str, Any], costs: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """The latency asked for beside the measured one: a note for the row, and the numbers for run.json.

    Args:
        target: what was asked, as [`asked`][edgemin.study.achieved.asked] gives it.
        costs: the row's costs, by runtime.

    Returns:
        `None` where the row was not measured in that runtime with as many threads.
    """
    measured = costs.get(target["runtime"], {})
    if "latency_ms" not in measured or measured["threads"] != target["threads"]:
        return None
    ms = measured["latency_ms"]["padded"]["p50"]
    more = ms / target["asked"] - 1
    note = (
        f"latency in {target['runtime']}, {target['precision']}: {ms:.2f} ms measured, {target['asked']:.2f} asked "
        f"({100 * more:+.1f} %), {target['predicted']:.2f} predicted"
    )
    numbers = {"asked_ms": target["asked"], "predicted_ms": target["predicted"], "measured_ms": ms}
    return note, {**numbers, "runtime": target["runtime"], "precision": target["precision"]}
