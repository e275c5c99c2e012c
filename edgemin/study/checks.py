"""Stages that cannot work where their path has them, refused before anything is trained; controls that are none."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgemin.errors import UserError
from edgemin.study.family import FAMILY
from edgemin.study.nodes import Node, Study
from edgemin.study.order import RowSpec
from edgemin.study.starts import check_same_tokens
from edgemin.training.stage import Effect, Place, Stage


def stages_key(model: str) -> str:
    """The configuration key that lists the stages of a model: `stages` is the student's."""
    return "stages" if model == "student" else f"{model}.stages"


def plan_stage(
    study: Study, path: str, stage: Stage, place: Place, parent: Node, teachers: Sequence[Node]
) -> tuple[Effect, list[str]]:
    """Ask a stage what it does in its place, and refuse it where it cannot work there.

    Args:
        study: whose stage it is.
        path: path of the node; its last part is the stage's name.
        stage: the stage; what it says is kept in it too.
        place: what comes before and after it.
        parent: the node that the stage is given.
        teachers: the nodes that the stage learns from.

    Returns:
        Its effect, and what is worth knowing although it works.

    Raises:
        UserError: the first thing that cannot work, its key first.
    """
    name = path.rpartition("/")[2].partition(FAMILY)[0]
    try:
        effect = stage.planned = stage.effect(parent.outline, [teacher.outline for teacher in teachers], place)
    except UserError as error:
        raise UserError(f"{name}.{error}") from error
    if effect.reads_task and study.splits is not None:  # it attaches the task's head where there is another
        outline = effect.outline.with_labels(len(study.splits.labels))
        effect = stage.planned = replace(effect, outline=outline)
    _check_data(study, path, effect)
    _check_inputs(name, effect, [parent, *teachers])
    for teacher in teachers:
        if effect.same_tokens and parent.outline.tokenizer != teacher.outline.tokenizer:
            _check_same_tokens(study, name, effect, parent, teacher)
        if effect.reads_answers and not teacher.head_trained:
            raise UserError(
                f"{name}.teacher: expected a model whose head was trained on {study.task.name}, as its logits are "
                f"learnt from, given {teacher.path}"
            )
    if effect.reads_head and not parent.head_trained:
        return effect, [f"{path} ranks by the loss of a head that no stage before it trained"]
    return effect, []


def _check_same_tokens(study: Study, name: str, effect: Effect, parent: Node, teacher: Node) -> None:
    if (maker := parent.tokens or teacher.tokens) is not None:
        raise UserError(
            f"{name}.teacher: expected one that reads the student's tokens, as it is compared token by token, given "
            f"{teacher.path} after {maker.path} has pruned the vocabulary; distill=logits and distill=rkd compare only "
            "sentences"
        )
    check_same_tokens(name, parent.start, teacher.start, study.splits if effect.reads_task else None)


def _check_data(study: Study, path: str, effect: Effect) -> None:
    model, name = path.partition("/")[0], path.rpartition("/")[2]
    if effect.reads_task and study.splits is None:
        raise UserError(f"{stages_key(model)}: expected only stages that need no data with task=none, given {name}")
    if not effect.reads_holdout:
        return
    if study.splits is not None and study.splits.holdout is None:
        raise UserError(
            f"{name}.patience: expected null, or task.holdout above 0 to stop early on, given a patience alone"
        )
    if not effect.trains_head:
        raise UserError(f"{name}.patience: expected null, as no head is trained that could be scored, given a number")


def _check_inputs(name: str, effect: Effect, readers: Sequence[Node]) -> None:
    if effect.corpus is None:
        return
    if readers[0].start.tokenizer is None:
        raise UserError(f"{name}.corpus: expected null for a model without a tokenizer, given a corpus")
    for reader in readers:
        limit = reader.outline.max_tokens
        if limit is not None and effect.corpus.length > limit:
            raise UserError(
                f"{name}.corpus_length: expected at most {limit} tokens, what {reader.path} takes, given "
                f"{effect.corpus.length}"
            )


_INSTEAD = {"edgemin.finetune": "edgemin.distillation"}


def _kind(stage: Stage) -> str:
    """The package that the stage's class is of: `edgemin.pruning`, `edgemin.distillation` ..."""
    return ".".join(type(stage).__module__.split(".")[:2])


def unequal_controls(rows: Sequence[RowSpec], nodes: Mapping[str, Node]) -> list[str]:
    """Notes on controls that are not trained for as many steps as the stage in whose place they have another.

    Args:
        rows: those that are printed.
        nodes: what their paths stand for, by path.
    """

    def stage(row: RowSpec, place: int) -> Stage:
        step = nodes["/".join((row.model, *row.stages[: place + 1]))].step
        assert step is not None, "only a root has none"
        return step

    controls, others = ([row for row in rows if row.control is wanted] for wanted in (True, False))
    found = []
    for control, row in itertools.product(controls, others):
        if row.model != control.model or len(row.stages) != len(control.stages):
            continue
        pairs = zip(control.stages, row.stages, strict=True)
        places = [place for place, (own, theirs) in enumerate(pairs) if own != theirs]
        if len(places) != 1:
            continue
        instead, replaced = stage(control, places[0]), stage(row, places[0])
        # as `edgemin.report.controls` has it: another of the same kind, or further training instead of a distillation
        if _kind(replaced) != _INSTEAD.get(_kind(instead), _kind(instead)):
            continue
        if (own := instead.planned.steps) != (theirs := replaced.planned.steps):
            found.append(
                f"row {control.name!r} trains for {own:,} steps where {row.name!r} trains for {theirs:,}, so it is no "
                "control of equal length; give both the same steps: epochs are of labelled examples where labels are "
                "read, else of all texts"
            )
    return found
