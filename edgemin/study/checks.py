"""Stages that cannot work where their path has them, refused before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from edgemin.errors import UserError
from edgemin.study.nodes import Node, Study
from edgemin.study.starts import check_same_tokens
from edgemin.training.stage import Stage


def stages_key(model: str) -> str:
    """The configuration key that lists the stages of a model: `stages` is the student's."""
    return "stages" if model == "student" else f"{model}.stages"


def check_stage(study: Study, path: str, stage: Stage, parent: Node, teachers: Sequence[Node]) -> list[str]:
    """Refuse a stage that cannot work where its path has it.

    Args:
        study: the study that it belongs to.
        path: the node's path, which ends with the stage's name.
        stage: the stage, all its settings decided.
        parent: the node whose model it is given.
        teachers: the nodes that it learns from.

    Returns:
        What is worth knowing although it works.

    Raises:
        UserError: the first thing that cannot work, its key first.
    """
    name = path.rpartition("/")[2]
    try:
        stage.check(parent.shape, [teacher.shape for teacher in teachers])
        stage.check_data()
    except UserError as error:
        raise UserError(f"{name}.{error}") from error
    _check_data(study, path, stage)
    _check_inputs(name, stage, [parent, *teachers])
    for teacher in teachers:
        if stage.same_tokens:
            check_same_tokens(name, parent.start, teacher.start, study.splits if stage.needs_task else None)
        if stage.needs_trained_teacher and not teacher.head_trained:
            raise UserError(
                f"{name}.teacher: expected a model whose head was trained on {study.task.name}, as its logits are "
                f"learnt from, given {teacher.path}"
            )
    if stage.reads_head and not parent.head_trained:
        return [f"{path} ranks by the loss of a head that no stage before it trained"]
    return []


def _check_data(study: Study, path: str, stage: Stage) -> None:
    model, name = path.partition("/")[0], path.rpartition("/")[2]
    if stage.needs_task and study.splits is None:
        raise UserError(f"{stages_key(model)}: expected only stages that need no data with task=none, given {name}")
    if not stage.stops_early:
        return
    if study.splits is not None and study.splits.holdout is None:
        raise UserError(
            f"{name}.patience: expected null, or task.holdout above 0 to stop early on, given a patience alone"
        )
    if not stage.trains_head:
        raise UserError(f"{name}.patience: expected null, as no head is trained that could be scored, given a number")


def _check_inputs(name: str, stage: Stage, readers: Sequence[Node]) -> None:
    if stage.input_length is not None and readers[0].start.tokenizer is None:
        raise UserError(f"{name}.corpus: expected null for a model without a tokenizer, given a corpus")
    for reader in readers:
        if stage.input_length is not None and stage.input_length > reader.start.max_tokens:
            raise UserError(
                f"{name}.corpus_length: expected at most {reader.start.max_tokens} tokens, what {reader.path} takes, "
                f"given {stage.input_length}"
            )
