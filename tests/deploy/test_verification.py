"""What an export is compared with torch on, and that the card and the line say which it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from bundles import SENTENCES, exported, mistake

from edgemin import artifact, toy

pytest.importorskip("onnxruntime")

TOY = {
    "name": "toy",
    "text_columns": ["sentence"],
    "labels": list(toy.LABELS),
    "evaluation_splits": ["validation"],
    "max_train_examples": 8,
    "max_evaluation_examples": 40,
    "max_length": 16,
}


def made(folder: Path, task: dict[str, Any], key: str = "some-key") -> Path:
    folder.mkdir()
    artifact.save(folder, tiny.model(), toy.tokenizer(), {"seed": 7, "task": task, "key": key})
    return folder


def export(source: Path, out: Path, *words: str) -> str:
    """Export it for ONNX Runtime; gives what the card says of the comparison."""
    assert exported(f"artifact={source}", "deploy=onnxruntime", f"out={out}", *words) == 0
    card = (out / "README.md").read_text()
    (line,) = (line for line in card.splitlines() if line.startswith("| compared with torch |"))
    return line.removeprefix("| compared with torch | ").removesuffix(" |")


@pytest.mark.parametrize("length", [None, 24])
def test_the_sentences_of_the_artifacts_own_task_where_they_can_be_read(
    tmp_path: Path, length: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made(tmp_path / "artifact", TOY)
    said = export(source, tmp_path / "out", *([f"length={length}"] if length else []))
    assert said.startswith("on 40 sentences of toy (validation): logits differ by at most ")
    assert "100.0 % equal predictions, in the runtime accuracy 0." in said
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ({"name": "mine"}, "the artifact records no data; texts=<file> gives some"),
        (TOY | {"name": "mine", "path": "moved/away/for/good"}, "the data of mine cannot be read: task.path: expected"),
        (TOY | {"labels": ["positive", "negative"]}, "the data of toy has other labels than the model by now"),
    ],
)
def test_random_tokens_where_the_data_is_out_of_reach_and_why(tmp_path: Path, task: dict[str, Any], why: str) -> None:
    said = export(made(tmp_path / "artifact", task), tmp_path / "out")
    assert said.startswith(f"on 32 inputs of random tokens ({why}") and "runtime" not in said


def test_the_sentences_of_a_file_scored_where_it_has_labels(tmp_path: Path) -> None:
    source, file = made(tmp_path / "artifact", TOY), tmp_path / "own.jsonl"
    rows = [{"sentence": text} for text in SENTENCES]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    said = export(source, tmp_path / "unlabelled", f"texts={file}")
    assert said.startswith("on 3 sentences of own.jsonl: ") and "accuracy" not in said
    file.write_text("\n".join(json.dumps(row | {"label": "positive"}) for row in rows))
    assert "in the runtime accuracy " in export(source, tmp_path / "labelled", f"texts={file}")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("sentence\n", "texts: expected a file with rows, given {file} without any"),
        ("words\ngood\n", "texts: expected a column sentence, as the model was trained on, given words"),
        ('sentence\n""\n', "texts: expected a text, given an empty one in row 1 of {file}"),
        ("sentence,label\ngood,odd\n", "texts: task.label_column: "),
        ("sentence,label\ngood\n", "texts: expected 2 cells in row 1 of {file}, given 1"),
        (None, "texts: expected a file, given {file}, which does not exist"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_nothing_is_written(
    tmp_path: Path, content: str | None, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, file, out = made(tmp_path / "artifact", TOY), tmp_path / "own.csv", tmp_path / "out"
    if content is not None:
        file.write_text(content)
    words = [f"artifact={source}", "deploy=onnxruntime", f"out={out}", f"texts={file}"]
    assert mistake(words, capsys).startswith(line.format(file=file))
    assert not out.exists()


def test_the_card_has_what_a_run_measured_or_says_how_to_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"name": "Mine", "model": "student", "stages": [], "artifact": "some-key"}
    runtimes = {"onnxruntime": {"size_bytes": 2**20, "latency_ms": {"padded": {"length": 128, "p50": 1.5}}}}
    run = {"schema": 2, "study": "s", "job": {}, "seed": 1, "rows": [row | {"cost": {"runtimes": runtimes}}]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    source = made(tmp_path / "artifact", TOY)
    export(source, tmp_path / "with", f"study={tmp_path / 'run.json'}".removesuffix("/run.json"))
    assert "| onnxruntime |  | 1.0 | 1.50 |  |  |  |" in (tmp_path / "with" / "README.md").read_text()
    export(source, tmp_path / "without")
    assert "bench.py threads=2` measures" in (tmp_path / "without" / "README.md").read_text()

    other = made(tmp_path / "other", TOY, key="another")
    words = ["deploy=onnxruntime", f"out={tmp_path / 'none'}", f"study={tmp_path}"]
    assert "a row of the artifact another" in mistake([f"artifact={other}", *words], capsys)
    words[0] = "deploy=transformers"
    assert mistake([f"artifact={source}", *words], capsys).startswith("study: expected none with deploy=transformers")
