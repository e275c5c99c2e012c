"""The models of a latency table as a bundle, to be timed on another device, and what comes back from there."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgemin import artifact
from edgemin.deploy.extras import extra
from edgemin.deploy.runtime import RUNTIMES
from edgemin.deploy.torch_eager import check_length, longest
from edgemin.encoder import quantized
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.measure.layer_latency import assembled, shapes, widest, write
from edgemin.store.json_file import read_object
from edgemin.training.latency import LatencyTable, Precision

FILES = Path(__file__).parents[1] / "deploy" / "files"
GRID, TIMED = "grid.json", "latencies.json"
LENGTH = 128


def write_grid(source: Path, runtime: str, precision: Precision, out: Path, length: int | None = None) -> int:
    """Write the models of a latency table, each with one width in all of its layers, and `bench.py`, which times them.

    Args:
        source: the artifact whose shape they have; of a pruned one the widest layer stands for all.
        runtime: `onnxruntime`, `openvino` or `openvino_bf16`.
        precision: that in which the pruned model will be served.
        out: an empty directory.
        length: fixed length of all inputs; `None`: any, timed at 128 tokens, or as many as the model takes.

    Returns:
        How many models it holds.

    Raises:
        UserError: the runtime is not installed, a layer cannot be exported, or a length that the model does not take.
    """
    extra(package := RUNTIMES[runtime].package, package)
    model, _ = artifact.load(source)
    check_length(model, length)
    outline = widest(quantized.outline(model))
    models = {}
    for number, (name, shape) in enumerate(shapes(outline).items(), start=1):
        (out / str(number)).mkdir()
        write(model.config, shape, runtime, precision, out / str(number), length)
        models[name] = str(number)
    timed = length or min(LENGTH, longest(model))
    told = {"runtime": runtime, "precision": precision, "length": timed, "vocabulary": outline.vocabulary}
    (out / GRID).write_text(json.dumps({"schema": 1, **told, "shape": _shape(outline), "models": models}, indent=1))
    (out / "bench.py").write_text((FILES / "bench_layers.py.txt").read_text())
    return len(models)


def read(path: Path, outline: Outline, runtime: str, precision: Precision, length: int) -> LatencyTable:
    """The latency table made from a device's timings.

    Args:
        path: the file that `bench.py` wrote there.
        outline: the shape that is to be pruned.
        runtime: the runtime that must have been timed.
        precision: likewise the precision of the models.
        length: likewise the tokens of their input.

    Raises:
        UserError: no such file, or one with timings of something else.
    """
    try:
        found = read_object(path)
        of = {name: found[name] for name in ("runtime", "precision", "length", "shape")}
        threads, device = int(found["threads"]), str(found["device"])
        rounds = {str(name): [float(ms) for ms in own] for name, own in found["rounds"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"expected a file {TIMED} that bench.py of a grid bundle wrote, given {path}") from error
    wanted = {"runtime": runtime, "precision": precision, "length": length, "shape": _shape(outline)}
    for name, value in wanted.items():
        if of[name] != value:
            given = ("another" if name == "shape" else of[name], "the student's" if name == "shape" else value)
            raise UserError(f"expected latencies of {name} {given[1]}, given {path}, which has {given[0]}")
    if set(rounds) != set(shapes(outline)) or not all(rounds.values()) or len({*map(len, rounds.values())}) > 1:
        raise UserError(f"expected as many rounds of every model of the grid, given {path}, where some are missing")
    return assembled(outline, rounds, runtime=runtime, precision=precision, threads=threads, device=device)


def _shape(outline: Outline) -> dict[str, Any]:
    """What decides how long a model takes, as JSON has it."""
    kept = ("family", "hidden", "embedding", "projection", "trigram")
    layers = [asdict(layer) for layer in outline.layers]
    return {**{name: getattr(outline, name) for name in kept}, "layers": layers}
