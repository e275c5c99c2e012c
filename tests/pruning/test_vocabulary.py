"""Vocabulary pruning: which rows go, that logits stay, and that everything after it reads the tokens that are left."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import studies
import test_pieces
import tiny
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import edgemin
from edgemin import artifact, toy
from edgemin.data.module import DataModule
from edgemin.data.splits import load
from edgemin.encoder import building, parts, quantized, shapes
from edgemin.errors import UserError
from edgemin.finetune import Finetune
from edgemin.pruning.vocabulary import VocabularyPruning
from edgemin.quantization.post_training import PostTraining
from edgemin.store.cache import Cache
from edgemin.study.job import run_job
from edgemin.study.nodes import Plan
from edgemin.study.plan import build
from edgemin.study.reading import read_study

FEW = {"max_train_examples": 6, "max_evaluation_examples": 40}
OF_FAMILY = {
    "bert": "wordpiece",
    "electra": "wordpiece",
    "distilbert": "words",
    "roberta": "bpe",
    "modernbert": "bpe",
    "mobilebert": "wordpiece",
}
PRUNE = "+prune@vocab=vocab"
Run = dict[str, Any]


def reading(cache: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> DataModule:
    """The toy task with few training sentences, so that many words of the validation split are not in them."""
    return DataModule(load(tiny.task(**{**FEW, **settings})), tokenizer, Cache(cache / "tokens"))


def pruning(**settings: Any) -> VocabularyPruning:
    return tiny.stage(VocabularyPruning, **{"epochs": 0, "learning_rate": 1e-3, "batch_size": 4, **settings})


def model_for(tokenizer: PreTrainedTokenizerBase, family: str = "bert", spare: int = 0) -> PreTrainedModel:
    """A model that embeds the tokens of a tokenizer, and some rows more."""
    width = {"layers": 2, "hidden": 32, "heads": 4, "intermediate": 48}
    padding = tokenizer.pad_token_id
    assert isinstance(padding, int)
    config = shapes.configure(family, **width, vocabulary=len(tokenizer) + spare, padding_id=padding)
    torch.manual_seed(0)
    made = building.build(config)
    building.attach_head(made, list(toy.LABELS))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    building.silence_padding(made)
    return made.eval()


def run(start: PreTrainedModel, data: DataModule, work: Path, **settings: Any) -> tuple[Any, DataModule]:
    """What is left of a model, and the same data in its tokens."""
    fitted = tiny.fit(pruning(**settings), start, data, work=work)
    assert fitted.tokenizer is not None
    return fitted, data.read_by(fitted.tokenizer)


def kept(before: DataModule, after: DataModule) -> dict[int, int]:
    """New ids by old ones."""
    new = after.tokenizer.get_vocab()
    return {index: new[token] for token, index in before.tokenizer.get_vocab().items() if token in new}


@pytest.mark.parametrize(("family", "kind"), OF_FAMILY.items())
def test_a_sentence_that_lost_no_token_has_the_logits_it_had(family: str, kind: str, tmp_path: Path) -> None:
    tokenizer = test_pieces.made(kind)
    before = reading(tmp_path, tokenizer)
    start = model_for(tokenizer, family, spare=3)
    first = copy.deepcopy(start)
    fitted, after = run(start, before, tmp_path / "work")
    new = kept(before, after)
    assert parts.vocabulary_size(fitted.model) == len(new) == len(after.tokenizer) < len(tokenizer)
    whole, split = 0, before.evaluation["validation"]
    for row in range(len(split)):
        mine = after.evaluation["validation"].batch([row])
        assert mine["input_ids"].max() < len(new)
        if all(token in new for token in split.sentence(row)):
            whole += 1
            theirs = split.batch([row])
            assert [new[token] for token in split.sentence(row)] == after.evaluation["validation"].sentence(row)
            torch.testing.assert_close(tiny.logits(fitted.model, mine), tiny.logits(first, theirs), rtol=0, atol=1e-6)
    assert whole or kind == "words"
    assert whole < len(split), "some sentences lost a word"


def test_the_note_says_what_went_and_how_sentences_changed(tmp_path: Path) -> None:
    before = reading(tmp_path, toy.tokenizer(), max_train_examples=24, holdout=0.5)
    rows = len(before.tokenizer)
    fitted, after = run(model_for(before.tokenizer), before, tmp_path / "work")
    assert before.holdout is not None
    unknown = float((after.holdout.ids == after.tokenizer.unk_token_id).float().mean())  # type: ignore[union-attr]
    assert 0 < unknown < 1
    mean = before.train.lengths.mean()
    assert fitted.notes == [
        f"removed {rows - len(after.tokenizer)} of {rows} rows of the word embeddings, with their tokens",
        f"on train {mean:.2f} tokens a sentence became {mean:.2f}, 0.00% unknown ones 0.00%; on the hold-out "
        f"{before.holdout.lengths.mean():.2f} tokens a sentence became {after.holdout.lengths.mean():.2f}, "  # type: ignore[union-attr]
        f"0.00% unknown ones {unknown:.2%}",
    ]


def test_a_token_stays_that_occurs_often_enough(tmp_path: Path) -> None:
    before = reading(tmp_path, toy.tokenizer())
    counts = np.bincount(before.train.ids.numpy())
    for least in (1, 2, 4):
        _, after = run(model_for(before.tokenizer), before, tmp_path / f"{least}", min_count=least)
        words = set(after.tokenizer.get_vocab().values())
        assert len(words) == len({*np.flatnonzero(counts >= least), *range(4)} | singles(before))


def singles(data: DataModule) -> set[int]:
    return {index for token, index in data.tokenizer.get_vocab().items() if len(token) == 1}


def test_a_corpus_says_what_stays_and_no_task_is_needed(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("the plot was good\n\nthe cast was good\n")
    stage = pruning(corpus=str(tmp_path / "corpus"), min_count=2)
    data = DataModule(None, toy.tokenizer(), Cache(tmp_path / "tokens"))
    fitted = tiny.fit(stage, model_for(data.tokenizer), data, work=tmp_path / "work")
    assert fitted.tokenizer is not None and not stage.planned.reads_task
    assert {token for token in fitted.tokenizer.get_vocab() if len(token) > 1} == {
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        *("the", "was", "good"),
    } & data.tokenizer.get_vocab().keys()


def test_fine_tuning_goes_on_in_the_new_tokens(tmp_path: Path) -> None:
    before = reading(tmp_path, toy.tokenizer())
    start = model_for(before.tokenizer)
    alone, after = run(copy.deepcopy(start), before, tmp_path / "alone")
    trained, _ = run(start, before, tmp_path / "both", epochs=2)
    assert trained.steps == 4
    # a fine-tuning of what is left, in its own tokens, ends at the same weights
    tuned = tiny.fit(
        tiny.stage(Finetune, epochs=2, learning_rate=1e-3, batch_size=4), alone.model, after, work=tmp_path / "then"
    )
    assert tiny.same_weights(trained.model, tuned.model)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_tables_keep_their_integers(bits: int, tmp_path: Path) -> None:
    before = reading(tmp_path, toy.tokenizer())
    start = model_for(before.tokenizer)
    settings = {**tiny.node("quantize", "weight_only"), "bits": bits, "embedding_bits": bits}
    small = tiny.stage(PostTraining, **{key: value for key, value in settings.items() if key != "_target_"})
    start = tiny.fit(small, start, before, work=tmp_path / "quantize").model
    table = start.get_input_embeddings()
    packed = quantized.tensors(start)
    fitted, after = run(start, before, tmp_path / "prune")
    assert isinstance(table, nn.Module) and table is fitted.model.get_input_embeddings()
    found, rows = quantized.tensors(fitted.model), sorted(kept(before, after))
    words = "bert.embeddings.word_embeddings"
    for name in ("weight_packed", "weight_scale"):
        assert torch.equal(found[f"{words}.{name}"], packed[f"{words}.{name}"][rows])


# In a study


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def study(place: Path) -> Run:
    """A fine-tuned student, pruned, quantized, pruned again by a higher count, taught by logits."""
    return studies.run(
        place / "run",
        *(PRUNE, "+prune@again=vocab", "again.min_count=3", "+distill@answers=logits", "answers.epochs=null"),
        *("answers.steps=2", "+quantize@int4=weight_only", "int4.bits=4", "task.max_train_examples=24"),
        "stages=[finetune,vocab,int4,again,answers]",
        store=place / "store",
    )


def of(study: Run, place: Path, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Run]:
    row = next(row for row in study["rows"] if row["stages"] and row["stages"][-1] == name)
    model, tokenizer = edgemin.load(place / "store" / row["artifact"])
    return model, tokenizer, row


def test_every_row_is_scored_in_the_tokens_of_its_own_artifact(study: Run, place: Path) -> None:
    sizes = []
    for name in ("finetune", "vocab", "int4", "again", "answers"):
        model, tokenizer, row = of(study, place, name)
        assert parts.vocabulary_size(model) == len(tokenizer) == tokenizer.backend_tokenizer.get_vocab_size()
        sizes.append(len(tokenizer))
        task = artifact.read_provenance(place / "store" / row["artifact"])["task"]
        data = DataModule(load(tiny.task(**{k: task[k] for k in ("seed", *FEW)})), tokenizer, Cache(place / "own"))
        split = data.evaluation["validation"]
        answers = torch.cat([tiny.logits(model, split.batch([row])) for row in range(len(split))]).argmax(1)
        score = float((answers.numpy() == split.labels).mean())
        assert row["metrics"]["toy"]["validation"]["accuracy"] == pytest.approx(score)
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3] == sizes[4]
    before, after = (row["cost"]["runtimes"]["torch"]["size_bytes"] for row in study["rows"][1:3])
    assert before - after >= 4 * 16 * (sizes[0] - sizes[1])


def plan(*overrides: str) -> Plan:
    return studies.plan(PRUNE, *overrides)


def test_what_compares_tokens_with_the_teachers_is_refused_after_it() -> None:
    line = (
        r"^distill\.teacher: expected one that reads the student's tokens, [^\n]+ given teacher/finetune after "
        r"student/finetune/vocab has pruned the vocabulary; [^\n]+$"
    )
    with pytest.raises(UserError, match=line):
        plan("stages=[finetune,vocab,distill]")
    with pytest.raises(
        UserError, match=r"^distill\.teacher: expected one that [^\n]+ after teacher/finetune/vocab has"
    ):
        plan("teacher.stages=[finetune,vocab]", "stages=[finetune,distill]")
    plan("stages=[finetune,distill,vocab]")
    for method in ("logits", "rkd"):
        plan(f"+distill@sentences={method}", "stages=[finetune,vocab,sentences]")


def test_a_recovery_that_learns_answers_alone_compares_no_tokens(tmp_path: Path) -> None:
    heads = ("+prune@heads=heads", "heads.ratio=0.25", "heads.epochs=null", "heads.steps=2", "heads.teacher=teacher")
    given = (*heads, "heads.calibration_examples=8", "task.max_train_examples=24", "stages=[finetune,vocab,heads]")
    with pytest.raises(UserError, match=r"^heads\.teacher: expected one that reads the student's tokens"):
        plan(*given)
    asked = studies.settings(PRUNE, *given, f"paths.store={tmp_path / 'store'}")
    del asked["heads"]["methods"]["relations"]
    run_job(asked, studies.job(tmp_path), {})
    assert json.loads((tmp_path / "run.json").read_text())["rows"][-1]["stages"] == ["finetune", "vocab", "heads"]


def test_an_order_that_distills_after_it_is_refused() -> None:
    others = [word for word in studies.TINY if not word.startswith("prune.")]
    settings = studies.settings(*others, "prune=vocab", "order=permutations", tiny=False)
    with pytest.raises(
        UserError, match=r"^distill\.teacher: expected one that reads [^\n]+/prune has pruned the vocab"
    ):
        build(read_study(settings))


def test_a_teacher_that_was_pruned_alike_or_is_the_model_itself_may_be_compared_with() -> None:
    plan("stages=[finetune,vocab,distill]", "teacher.stages=[finetune,vocab]")
    plan("stages=[finetune,vocab,distill]", "distill.teacher=parent", "student.hidden=32")
    with pytest.raises(UserError, match=r"^distill\.teacher: "):
        plan(
            "stages=[finetune,again,distill]",
            "teacher.stages=[finetune,vocab]",
            "+prune@again=vocab",
            "again.min_count=2",
        )


def test_a_student_cut_from_a_pruned_teacher_takes_its_tokenizer(place: Path) -> None:
    cut = ("teacher.stages=[finetune,vocab]", "student=from_teacher", "student.source=teacher", "student.layers=1")
    cut += ("student.hidden=null", "student.heads=null", "student.intermediate=null")
    found = studies.run(
        place / "cut", PRUNE, *cut, "task.max_train_examples=24", "stages=[finetune]", store=place / "store"
    )
    teacher, student = (edgemin.load(place / "store" / row["artifact"])[1] for row in found["rows"])
    assert student.get_vocab() == teacher.get_vocab() and len(student) < len(toy.tokenizer())
    with pytest.raises(UserError, match=r"^student\.tokenizer: expected null, as teacher/finetune/vocab has pruned "):
        plan(*cut, "stages=[finetune]", "student.tokenizer=toy")


def test_without_a_task_or_a_corpus_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^stages: expected only stages that need no data with task=none, given vocab$"
    ):
        plan("task=none", "teacher.stages=[]", "stages=[vocab]")


def test_where_a_corpus_lies_decides_nothing_without_one() -> None:
    keys = {plan("stages=[finetune,vocab]", f"vocab.corpus_column={name}").nodes[-1].key for name in ("text", "body")}
    assert len(keys) == 1
    (stage,) = [node.step for node in plan("stages=[finetune,vocab]").nodes if node.path.endswith("/vocab")]
    assert stage is not None and "corpus_column" in stage.planned.idle


def test_the_corpus_is_in_the_key_by_its_content(tmp_path: Path) -> None:
    keys = []
    for name, text in (("one", "good\n"), ("two", "good\n"), ("three", "bad\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text(text)
        keys.append(plan("stages=[finetune,vocab]", f"vocab.corpus={tmp_path / name}").nodes[-1].key)
    assert keys[0] == keys[1] != keys[2]
