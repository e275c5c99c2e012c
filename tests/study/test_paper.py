"""`experiment=paper`: what it trains is the paper's equation, and its tables stand beside every published figure."""

from __future__ import annotations

from pathlib import Path

import pytest
import studies
import tiny
import torch
from torch import Tensor

from edgemin import config
from edgemin.distillation.minilmv2 import MiniLMv2
from edgemin.encoder.taps import Reading


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
    found = studies.run(tmp_path, *asked, f"order.rows={rows}", "order.controls=[]")
    said = {row["name"]: [note for note in row["notes"] if "head" in note] for row in found["rows"]}
    assert said == {"Before": [], "Stale": ["scored with a head from before its encoder was trained on"], "All": []}
    assert said["Stale"][0] in (tmp_path / "tables/stages.md").read_text()
