"""`experiment=paper`: what it trains is the paper's equation, and its tables stand beside every published figure."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import studies
import tiny
import torch
from torch import Tensor

from edgemin import config
from edgemin.distillation.minilmv2 import MiniLMv2
from edgemin.encoder.taps import Reading
from edgemin.measure import machine
from edgemin.report import published

FIGURES = Path(__file__).parents[2] / "experiments/paper/published.yaml"
UNIT = (
    *("experiment=paper", "task=sst2", "task.max_length=24", f"published={FIGURES}", "prune.training_steps=2"),
    *("measure=default", "measure.length=16", "measure.warmup=1", "measure.runs=4", "measure.rounds=2"),
    *("measure.max_rounds=2", "measure.sentences=4", "measure.threads=1", "measure.wait_minutes=0"),
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The paper's study on three tasks, with models of two layers and a few steps of training."""
    place = tmp_path_factory.mktemp("paper")
    glue = (f"task.path={studies.glue(place / 'glue')}", "task.max_length=24")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "LOCK_DIRECTORY", place)  # the tests' own: other work does not keep it waiting
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        others = {name: studies.settings(f"task={name}", *glue)["task"] for name in ("mnli", "qqp")}
        studies.run(place / "run", *UNIT, *glue, transfer=others)
        yield place / "run"


def layer_by_layer(teacher: list[list[Tensor]], student: list[list[Tensor]], mask: Tensor, heads: int) -> float:
    """Equation 1 with the teacher's layer ceil(l L_T / L_S), one layer, relation and head after the other, in float64.

    Args:
        teacher: by layer, its queries, keys and values `[B, T, Ht]`.
        student: likewise, `[B, T, Hs]`.
        mask: `[B, T]`, non-zero where there is a token.
        heads: of the models, and of the relations.
    """
    total = 0.0
    for place, projections in enumerate(student, 1):
        theirs = teacher[-(-place * len(teacher) // len(student)) - 1]
        for of_teacher, of_student in zip(theirs, projections, strict=True):
            for example, kept in enumerate(mask.bool()):
                relations = []
                for side in (of_teacher, of_student):
                    split = side[example, kept].double().chunk(heads, dim=-1)
                    relations.append([torch.softmax(x @ x.T / x.shape[-1] ** 0.5, dim=-1) for x in split])
                found = [(p * (p.log() - q.log())).sum() for p, q in zip(*relations, strict=True)]
                total += float(sum(found)) / (heads * int(kept.sum()) * len(mask))
    return total


def test_the_distillation_is_the_papers_equation_summed_over_layers_and_heads_of_the_models() -> None:
    stage = config.construct(studies.settings("experiment=paper", tiny=False)["distill"], "distill", MiniLMv2)
    stage.match(tiny.outline("bert", 12, 384, 12), [tiny.outline("distilbert", 6, 768, 12)])
    assert [*stage.pairs(12, tiny.outline("distilbert", 6, 768, 12)).values()] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    drawn = torch.Generator().manual_seed(0)
    teacher, student = (
        [[torch.randn(2, 5, width, generator=drawn) for _ in range(3)] for _ in range(layers)]
        for layers, width in ((6, 768), (12, 384))
    )
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    read = [
        Reading(logits=torch.zeros(2, 2), projections={n: (a, b, c) for n, (a, b, c) in enumerate(side, 1)}, hidden={})
        for side in (teacher, student)
    ]
    (found,) = stage.terms(read[1], [read[0]], {"attention_mask": mask}).values()
    assert found.item() == pytest.approx(layer_by_layer(teacher, student, mask, 12), rel=1e-5)


def test_no_row_of_the_proposals_order_has_a_stale_head_and_every_row_has_a_judged_parent() -> None:
    plan = studies.plan("order=distill_qat_prune_finetune")
    assert not [row.spec.name for row in plan.rows if row.node.head_stale or not row.node.head_trained]
    assert next(node for node in plan.nodes if node.stage == "quantize").parent in [row.node for row in plan.rows]
    assert plan.notes == []


def test_a_row_with_a_stale_head_has_a_footnote(tmp_path: Path) -> None:
    rows = "[{name: Before, stages: [finetune]}, {name: Stale, stages: [finetune, distill]}, {name: All, stages: ALL}]"
    rows = rows.replace("ALL}", "[finetune, distill, again]}")
    asked = ("+finetune@again=short", "again.epochs=null", "again.steps=2", "order.stages=[finetune,distill,again]")
    found = studies.run(tmp_path, *asked, f"order.rows={rows}", "order.controls=[]", "evaluate.max_drop=null")
    said = {row["name"]: [note for note in row["notes"] if "head" in note] for row in found["rows"]}
    assert said == {"Before": [], "Stale": ["scored with a head from before its encoder was trained on"], "All": []}
    assert said["Stale"][0] in (tmp_path / "tables/stages.md").read_text()


def table(run_dir: Path, name: str) -> dict[str, dict[str, str]]:
    """A table's rows by the name of the model."""
    with (run_dir / f"tables/{name}.csv").open(newline="") as file:
        return {row["name"].removeprefix("'"): row for row in csv.DictReader(file)}  # as spreadsheets are told a text


def test_the_papers_four_tables_are_there_for_three_tasks(run_dir: Path) -> None:
    accuracy, latency = table(run_dir, "table1_accuracy"), table(run_dir, "table2_latency")
    rows = [*published.read(FIGURES).rows]
    assert len(rows) == 6
    for found in (accuracy, latency, table(run_dir, "table3_size"), table(run_dir, "table4_flops")):
        assert [*found] == rows
    of_tasks = {"sst2_validation_accuracy_fraction", "qqp_validation_f1_zero_shot_from_sst2_fraction"}
    of_tasks |= {"mnli_validation_matched_accuracy_zero_shot_from_sst2_fraction"}
    for name in rows:
        assert all(accuracy[name][column] for column in of_tasks)
        assert latency[name]["latency_padded_p50_ms"] and latency[name]["latency_task_p50_ms"]
        assert latency[name]["mnli_latency_task_p50_ms"] and latency[name]["qqp_latency_task_p50_ms"]
    assert [*table(run_dir, "contributions")] == rows[2:]
    page = (run_dir / "report.md").read_text()
    assert all(f"Table {number}: " in page for number in ("I", "II", "III", "IV"))


def test_every_published_figure_stands_beside_ours(run_dir: Path) -> None:
    read, found = published.read(FIGURES), table(run_dir, "published")
    known = 0
    for name, figures in read.rows.items():
        columns = [*found[name]]
        for (kind, task), figure in figures.items():
            column = f"{kind}_{task}_published" if task else f"{kind}_published"
            ours = columns[columns.index(column) + 1]
            assert found[name][column] == ("" if figure.value is None else f"{figure.value:g}"), (name, column)
            assert found[name][ours] != "", (name, ours)
            known += 1
    assert known == 64
