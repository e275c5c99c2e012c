"""Two commits side by side: do both train the same weights and print the same tables, to the last digit?

    python -m benchmarks.same_results --old <commit> --glue <directory> --teacher <directory>

Each commit is checked out into a directory of its own and runs the same commands with this interpreter: fp32, one
thread, a store of its own. Nodes are matched by job and path, rows by model and stages. Of a row's cost only what
follows from the architecture is compared: nothing that was timed, and no file sizes, since bookkeeping files may grow.
Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

# What every run has: no clock decides anything, nothing is timed or sent.
EVERYWHERE = ("trainer=cpu", "trainer.threads=1", "measure=none", "logger=csv")
# All stages and orders on models that train in seconds.
TINY = (
    *("task=toy", "task.max_train_examples=96", "task.max_evaluation_examples=40"),
    *("teacher=shape", "teacher.tokenizer=toy", "teacher.layers=2", "teacher.hidden=32", "teacher.heads=4"),
    *("teacher.intermediate=48", "student=shape", "student.layers=2", "student.hidden=16", "student.heads=4"),
    *("student.intermediate=24", "finetune.epochs=null", "finetune.steps=12", "finetune.learning_rate=3e-3"),
    *("distill.steps=2", "distill.relation_heads=4", "prune.ratio=0.25", "prune.epochs=null", "prune.steps=2"),
    "prune.calibration_examples=16",
)
# Of run.json. What is compared lies at the same place in both.
SCHEMAS = (1, 2)
COMPARED_COST = ("params", "params_visible", "macs", "flops")


class Node(NamedTuple):
    """One artifact: its weights, and the job and path that it is known by."""

    job: str
    path: str
    weights: Path


def scenarios(glue: str | None, teacher: str | None) -> dict[str, list[str]]:
    """The commands that are run, by name; the nine jobs only where real data and weights are given."""
    found = {
        "demo": ["-m", "experiment=demo"],
        "permutations": ["order=permutations", *TINY],
        "permutations, qat": ["order=permutations", "quantize=qat", "quantize.epochs=null", "quantize.steps=4", *TINY],
    }
    if glue is not None and teacher is not None:
        found["nine jobs"] = [
            *("-m", "task=sst2,mnli,qqp", "prune.ratio=0.1,0.2,0.3", f"task.path={glue}", f"teacher.source={teacher}"),
            *("student=from_teacher", "student.layers=3", "task.max_train_examples=500"),
            *("task.max_evaluation_examples=500", "finetune.epochs=1", "distill.steps=30", "prune.epochs=1"),
        ]
    return found


def run(checkout: Path, words: list[str], out: Path) -> None:
    """Run one command with the code of a checkout; it prints into `out`."""
    out.mkdir(parents=True)
    command = [sys.executable, "-m", "edgemin.train", *words, *EVERYWHERE, f"paths.outputs={out}"]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    with (out / "printed.txt").open("w") as printed:
        ended = subprocess.run(
            command, cwd=checkout, env=environment, stdout=printed, stderr=subprocess.STDOUT, check=False
        )
    if ended.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {ended.returncode}: see {out / 'printed.txt'}")


def _runs(out: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(out.glob("*/*/*/run.json")):
        content = json.loads(file.read_text())
        if content["schema"] not in SCHEMAS:
            sys.exit(f"{file}: schema: expected one of {SCHEMAS}, given {content['schema']}")
        yield file.parent.name, content


def _renamed(path: str, names: Mapping[str, str]) -> str:
    return "/".join(names.get(part, part) for part in path.split("/"))


def nodes(out: Path, names: Mapping[str, str]) -> list[Node]:
    """Every artifact that the jobs below a directory made or used, each once a job."""
    return [
        Node(job, _renamed(node["path"], names), out / "store" / node["key"] / "model.safetensors")
        for job, content in _runs(out)
        for node in content["nodes"]
    ]


def rows(out: Path, names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The fields of each row that the tables print, except those that were timed."""
    return {
        f"job {job}: {row['model']}/{_renamed('/'.join(row['stages']), names)}": {
            "control": row["control"],
            "metrics": row["metrics"],
            "cost": {name: row["cost"][name] for name in COMPARED_COST},
        }
        for job, content in _runs(out)
        for row in content["rows"]
    }


def differences(old: Path, new: Path, names: Mapping[str, str]) -> tuple[str, list[str]]:
    """Compare what two runs of one command left: what was compared in a few words, and a line for each difference."""
    found: list[str] = []
    before, after = nodes(old, names), nodes(new, {})
    weights = {(node.job, node.path): node.weights for node in after}
    if {(node.job, node.path) for node in before} != set(weights):
        found.append(f"nodes: {sorted({node.path for node in before} ^ {node.path for node in after})}")
    tensors = 0
    seen = set()
    for node in before:
        other = weights.get((node.job, node.path))
        if other is None or (node.weights, other) in seen:
            continue
        seen.add((node.weights, other))
        mine, theirs = load_file(node.weights), load_file(other)
        tensors += len(mine)
        unequal = sorted(
            name
            for name in mine.keys() | theirs.keys()
            if name not in mine or name not in theirs or not _same_bits(mine[name], theirs[name])
        )
        if unequal:
            found.append(f"job {node.job}, {node.path}: {len(unequal)} tensors differ, first {unequal[0]}")
    table, other_table = rows(old, names), rows(new, {})
    for name in table | other_table:
        mine, theirs = (dict(_fields(found.get(name))) for found in (table, other_table))
        found += [
            f"row {name}{field}: {mine.get(field)} != {theirs.get(field)}"
            for field in mine | theirs
            if mine.get(field) != theirs.get(field)
        ]
    return f"{len(seen)} artifacts, {tensors} tensors, {len(table)} rows", found


def _fields(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested mapping, each with the keys that lead to it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _fields(inner, f"{place}, {key}")
    else:
        yield place, value


def _same_bits(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (
        mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.numpy().tobytes() == theirs.numpy().tobytes()
    )


def checkout(revision: str, directory: Path) -> Path:
    """The files of a commit in a directory of their own."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(directory), revision], check=True)
    return directory


def main() -> None:
    """Run all scenarios with both commits, print the differences and end with exit code 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, help="a commit")
    parser.add_argument("--new", default="HEAD", help="another commit")
    parser.add_argument("--glue", help="a directory laid out like the Hub's GLUE, for the nine jobs")
    parser.add_argument("--teacher", help="a directory with a teacher's weights, for the nine jobs")
    parser.add_argument("--only", nargs="*", help="names of the scenarios to run")
    parser.add_argument("--renamed", nargs="*", default=[], metavar="OLD=NEW", help="stages that have another name now")
    given = parser.parse_args()
    names = dict(entry.split("=", 1) for entry in given.renamed)
    asked = {
        name: words
        for name, words in scenarios(given.glue, given.teacher).items()
        if not given.only or name in given.only
    }
    differ = False
    with tempfile.TemporaryDirectory(prefix="edgemin-same-results-") as scratch:
        commits = {"old": given.old, "new": given.new}
        try:
            places = {side: checkout(commit, Path(scratch, side)) for side, commit in commits.items()}
            for name, words in asked.items():
                outputs = {side: Path(scratch, f"{side}-{name.replace(' ', '-').replace(',', '')}") for side in places}
                for side, place in places.items():
                    run(place, words, outputs[side])
                compared, found = differences(outputs["old"], outputs["new"], names)
                print(f"{name}: {compared}: {'equal to the last digit' if not found else f'{len(found)} differences'}")
                print("".join(f"  {line[:300]}\n" for line in found), end="", flush=True)
                differ = differ or bool(found)
        finally:
            for side in commits:
                subprocess.run(["git", "worktree", "remove", "--force", str(Path(scratch, side))], check=False)
    sys.exit(int(differ))


if __name__ == "__main__":
    main()
