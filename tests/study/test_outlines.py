"""What planning knows of every model of a study is what comes out when it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import studies
import tiny

from edgemin import artifact
from edgemin.encoder import quantized
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.study.nodes import Node
from edgemin.study.plan import build
from edgemin.study.reading import read_study


def node(path: str, *overrides: str) -> Node:
    return next(node for node in studies.plan(*overrides).nodes if node.path == path)


def heads(outline: Outline) -> list[int | None]:
    return [layer.heads for layer in outline.layers]


def loaded(outline: Outline, planned: Outline) -> Outline:
    """The outline of an artifact, as far as planning may know it."""
    known = [
        count if wanted is not None else None for count, wanted in zip(heads(outline), heads(planned), strict=True)
    ]
    return replace(
        outline.with_heads(known),
        tokenizer=planned.tokenizer,  # which is another file
        max_tokens=planned.max_tokens,
        quantized=planned.quantized if outline.provider == planned.provider else outline.quantized,
    )


# A student of a layer of the teacher as its own stages leave it.
CUT = ("student=from_teacher", "student.source=teacher", "student.layers=1", "student.hidden=null")
CUT += ("student.heads=null", "student.intermediate=null", "teacher.stages=[finetune,prune]", "stages=[finetune]")


@pytest.mark.parametrize(
    ("overrides", "unknown"),
    [
        (("stages=[finetune,distill,prune,quantize]", "quantize=static"), ()),
        (("stages=[finetune,prune]", "prune.rounds=2", "prune.importance=training", "prune.training_steps=2"), ()),
        (("stages=[prune,finetune]", "prune.criterion=magnitude", "prune.scope=global"), ("student/prune",)),
        (
            ("prune=ffn", "prune.ratio=0.5", "prune.multiple=4", "stages=[finetune,prune,quantize]", "quantize=static"),
            (),
        ),
        (("prune=layers", "prune.ratio=0.5", "stages=[finetune,prune]"), ()),
        (("prune=hidden", "prune.ratio=0.5", "stages=[finetune,prune]"), ()),
        (CUT, ()),
        ((*CUT, "prune.scope=global"), ("teacher/finetune/prune", "student")),
    ],
    ids=[
        "layer",
        "rounds",
        "global",
        "ffn",
        "layers",
        "hidden",
        "cut from a pruned teacher",
        "cut from a teacher pruned globally",
    ],
)
def test_planning_knows_the_outline_of_every_result(
    overrides: tuple[str, ...], unknown: tuple[str, ...], tmp_path: Path
) -> None:
    studies.run(tmp_path, *overrides)
    for planned in studies.plan(*overrides).nodes:
        found = quantized.outline(artifact.load(tmp_path / "store" / planned.key)[0])
        assert planned.outline == loaded(found, planned.outline), planned.path
        assert (None in heads(planned.outline)) == planned.path.startswith(unknown), planned.path


@pytest.mark.parametrize(("ratio", "left"), [(0.25, [3, 3]), (0.2, [4, 4])])
def test_heads_that_a_ratio_removes_of_every_layer_are_known_in_planning(ratio: float, left: list[int]) -> None:
    found = node("student/finetune/prune", "stages=[finetune,prune]", f"prune.ratio={ratio}").outline
    assert heads(found) == left
    assert found.matrices["bert.encoder.layer.1.attention.output.dense"].size == (16, 4 * left[1])


def test_layers_that_no_longer_match_after_pruning_are_refused_before_anything_is_trained() -> None:
    asked = studies.settings("stages=[finetune,prune,distill]") | {"distill": tiny.node("distill", "minilm")}
    line = r"^distill\.student_layer: expected [^\n]* given 3 heads in the student and 4 in the teacher$"
    with pytest.raises(UserError, match=line):
        build(read_study(asked))
    asked["prune"] |= {"scope": "global"}  # which layer loses heads is seen when it runs
    build(read_study(asked))


def test_groups_are_compared_with_widths_that_pruning_has_left_alone() -> None:
    settings = ("stages=[finetune,prune,quantize]", "quantize=static", "quantize.granularity=group")
    studies.plan(*settings, "quantize.group_size=8")
    studies.plan(*settings, "quantize.group_size=8", "prune.scope=global")
    with pytest.raises(UserError, match=r"^quantize\.group_size: expected a divisor of 16, the width of bert\.emb"):
        studies.plan(*settings, "quantize.group_size=5")


def test_a_head_is_the_tasks_where_a_stage_that_reads_the_task_attaches_it(tmp_path: Path) -> None:
    data: Any = f"task.path={studies.glue(tmp_path)}"
    nodes = {found.path: found for found in studies.plan("task=mnli", data, "stages=[finetune]").nodes}
    assert nodes["student"].outline.labels == 2, "as it was drawn"
    assert nodes["student/finetune"].outline.labels == nodes["teacher/finetune"].outline.labels == 3
    assert nodes["student/finetune"].outline.matrices["classifier"].size == (3, 16)


def test_tokenizers_are_known_by_what_they_cut() -> None:
    found = {planned.outline.tokenizer for planned in studies.plan().nodes}
    assert len(found) == 1 and None not in found
