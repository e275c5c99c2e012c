"""Every bad input is answered by the line beside it in the table: exit code 2, nothing trained, no traceback."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

import pytest
import pytorch_lightning as pl
import studies
from cases import CASES, CHECKPOINT, DATA, Case
from commands import Command
from making import checkpoint, make, saved, sharded, words


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which `stages=[finetune]` is done."""
    directory = tmp_path_factory.mktemp("filled")
    studies.run(directory / "run", "stages=[finetune]", "finetune.steps=1", store=directory / "store")
    return directory / "store"


def held(store: Path) -> set[str]:
    """Artifacts and checkpoints; token ids and locks may be made on the way to a mistake."""
    return {path.name for pattern in ("[!.]*", ".work/*/*") for path in store.glob(pattern)}


def pattern(line: str, here: Path) -> re.Pattern[str]:
    """A regular expression for an expected line, in which `...` stands for any text."""
    return re.compile(".*".join(re.escape(part) for part in line.replace("{here}", str(here)).split("...")))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_is_answered_by_its_line(
    case: Case, command: Command, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*arguments: object, **named: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(pl.Trainer, "fit", fit)
    store = tmp_path / "outputs" / "store"
    if case.damage is not None:
        shutil.copytree(filled, store)
        case.damage(store)
    before = held(store)
    make(case.files, tmp_path)
    outcome = command(*(word.replace("{here}", str(tmp_path)) for word in case.command), flags=case.flags)
    lines = [line.removeprefix("error: ") for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.code == 2, outcome
    assert any(pattern(case.line, tmp_path).match(line) for line in lines), outcome.err
    assert case.flags or len(outcome.err.splitlines()) == 1, outcome.err
    assert "Traceback" not in outcome.out + outcome.err
    assert held(store) == before


def test_names_are_distinct_and_there_are_many() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) >= 60


def test_whole_files_are_accepted(command: Command, tmp_path: Path) -> None:
    """The whole files that the cases damage are accepted when nothing is changed."""
    make({"m": checkpoint, "m/model.safetensors": sharded()}, tmp_path)
    assert command(*(word.replace("{here}", str(tmp_path)) for word in CHECKPOINT), "plan=true").code == 0
    make({"a": saved, **DATA}, tmp_path)
    given = [word.replace("{here}/m", str(tmp_path / "a")) for word in CHECKPOINT]
    assert command(*given, "plan=true").code == 0


def test_a_pruning_of_nothing_is_no_mistake_and_says_so(command: Command) -> None:
    done = command("stages=[finetune,prune]", "prune=heads_ffn", "prune.ratio=0")
    assert done.code == 0 and "removed 0 of 8 heads" in done.out and "removed 0 of 48 FFN units" in done.out, done


def test_a_tokenizer_that_knows_few_words_is_warned_of(command: Command, tmp_path: Path) -> None:
    known = itertools.cycle((True, False))
    make({"m": checkpoint, "m/tokenizer.json": words(lambda word: word if next(known) else f"x{word}")}, tmp_path)
    done = command(*(word.replace("{here}", str(tmp_path)) for word in CHECKPOINT), "plan=true")
    assert done.code == 0 and re.search(r"teacher: to its tokenizer \d\d % of the words are unknown", done.out), done


def test_a_head_of_other_labels_is_warned_of_before_a_new_one_is_trained(command: Command, tmp_path: Path) -> None:
    texts = "text,label\n" + "a good film,x\na bad film,y\n"
    make({"m": checkpoint, "d/train.csv": texts, "d/validation.csv": texts}, tmp_path)
    asked = [
        word.replace("{here}", str(tmp_path)) for word in (*CHECKPOINT, "task.path={here}/d", "task.max_length=16")
    ]
    done = command(*asked, "task=custom", "teacher.stages=[finetune]", "plan=true")
    line = "teacher: its head has labels that are not the task's, negative, positive: a new one is drawn"
    assert done.code == 0 and line in done.out, done
    assert line not in command(*asked[:-2], "teacher.stages=[finetune]", "plan=true").out, "the toy task's own"
