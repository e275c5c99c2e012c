"""A table of latencies is handed to the stage that reads one, and is in the key of no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import studies
import tiny

from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.store.digest import code_modules
from edgemin.study.nodes import Node
from edgemin.study.plan import build, stage_code
from edgemin.study.reading import read_study
from edgemin.training.latency import LatencyTable
from edgemin.training.stage import Effect, Place, Stage

TABLE = LatencyTable({0: 0.0, 2: 1.0, 4: 3.0}, {0: 0.0, 128: 2.0}, 0.5, "torch", "fp32", 1, "a processor", "bert", 32)


class Hurried(Stage):
    """Refuses a model that takes longer than it may."""

    def __init__(self, *, latency_ms: float) -> None:
        super().__init__()
        self.latency_ms = latency_ms

    def effect(self, model: Outline, teachers: Sequence[Outline], place: Place) -> Effect:
        if place.latency is None:
            raise UserError(f"latency_ms: expected null without a table of latencies, given {self.latency_ms}")
        if (found := place.latency.ms(model)) > self.latency_ms:
            raise UserError(f"latency_ms: expected at least {found} for this model, given {self.latency_ms}")
        return replace(super().effect(model, teachers, place), reads_latency=True, reads_task=False)


def hurried(table: LatencyTable | None, latency_ms: float = 99.0) -> dict[str, Node]:
    asked = studies.settings("stages=[finetune,prune]", "order.controls=[]")
    asked["prune"] = {"_target_": f"{__name__}.Hurried", "latency_ms": latency_ms}
    return {node.path: node for node in build(replace(read_study(asked), latency=table)).nodes}


def test_a_model_takes_what_its_parts_take() -> None:
    whole = tiny.outline("bert", 3, 32, 4)
    assert TABLE.ms(whole) == 0.5 + 3 * (3.0 + 2.0)
    assert TABLE.ms(whole.with_heads([4, 3, 1])) == 0.5 + (3.0 + 2.0 + 0.5) + 3 * 2.0, "between widths, on the line"
    for heads in ([4, 4, None], [4, 4, 5]):
        with pytest.raises(AssertionError, match="outside of what was measured"):
            TABLE.ms(whole.with_heads(heads))


def test_the_stage_that_reads_the_table_is_handed_it_and_has_it_in_its_key() -> None:
    first, same = hurried(TABLE), hurried(replace(TABLE))
    faster = hurried(replace(TABLE, rest_ms=0.1))
    path = "student/finetune/prune"
    assert first[path].key == same[path].key != faster[path].key
    assert {key for key in first if first[key].key != faster[key].key} == {path}
    assert first[path].content["latency"]["heads_ms"] == TABLE.heads_ms
    step, parent = first[path].step, first[path].parent
    assert step is not None and parent is not None
    assert "edgemin.training.latency" in code_modules(*stage_code(step.planned, (parent,), None))
    with pytest.raises(UserError, match=r"^prune\.latency_ms: expected at least \d"):
        hurried(TABLE, latency_ms=1.0)
    with pytest.raises(UserError, match=r"^prune\.latency_ms: expected null without a table"):
        hurried(None)


def test_other_stages_do_not_know_the_table() -> None:
    study = read_study(studies.settings())
    plans = [{node.path: node.key for node in build(replace(study, latency=table)).nodes} for table in (None, TABLE)]
    assert plans[0] == plans[1]
