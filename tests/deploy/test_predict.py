"""Texts answered by an artifact or a bundle, from Python and by the command line."""

from __future__ import annotations

import csv
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import transformers
from tokenizers import Tokenizer

import edgemin
from edgemin import artifact, cli, toy
from edgemin.deploy import bundle, open_vino, pipeline, row_files
from edgemin.deploy.runtime import Batch, Runtime
from edgemin.encoder import building
from edgemin.errors import UserError
from edgemin.predict import predict
from edgemin.tasks import multi_label
from edgemin.tasks.table import KINDS

LONGEST = 40
TASK = {"name": "toy", "text_columns": ["sentence"], "max_length": LONGEST}
TEXTS = toy.generate(20, seed=3)[0]
LABELS = {
    "classification": ("bad", "good", "odd"),
    "multi_label": ("bad", "good", "odd"),
    "regression": ("stars",),
}
Words = Callable[..., tuple[int, str, str]]


def saved(folder: Path, kind: str = "classification", **provenance: Any) -> Path:
    """An artifact of random weights, whose answers differ from text to text."""
    model = tiny.model()
    torch.manual_seed(1)
    building.attach_head(model, LABELS[kind], KINDS[kind].problem_type)
    batch = toy.tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():  # the mean answer is subtracted, so that texts are told apart
        model.classifier.weight.normal_(std=5)  # type: ignore[union-attr, operator]
        model.classifier.bias.sub_(tiny.logits(model, batch).mean(0))  # type: ignore[union-attr, operator, arg-type]
    folder.mkdir(parents=True)
    artifact.save(folder, model, toy.tokenizer(), {"head_trained": True, **provenance})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("artifact") / "model", task=TASK)


@pytest.fixture(scope="module")
def bundles(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One bundle for each runtime; that for OpenVINO is made of the other, as the export would make it."""
    for needed in ("onnxruntime", "openvino", "onnxscript"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("bundles")
    made = {name: folder / name for name in ("onnxruntime", "openvino")}
    for path in made.values():
        path.mkdir()
    bundle.write(model, "onnxruntime", made["onnxruntime"])
    open_vino.write(made["onnxruntime"] / "model.onnx", made["openvino"])
    config = json.loads((made["onnxruntime"] / "config.json").read_text())
    config["edgemin"]["runtime"] = "openvino"
    (made["openvino"] / "config.json").write_text(json.dumps(config))
    (made["openvino"] / "tokenizer.json").write_bytes((made["onnxruntime"] / "tokenizer.json").read_bytes())
    return made


@pytest.fixture
def words(capsys: pytest.CaptureFixture[str]) -> Iterator[Words]:
    """The command line in this process."""

    def run(*given: str) -> tuple[int, str, str]:
        code = cli.run("predict", predict, given)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    yield run


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            made = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            made.writeheader()
            made.writerows(rows)
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return found
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def same(mine: Any, theirs: Any) -> None:
    """Equal in form and labels, scores to 1e-5."""
    if isinstance(theirs, list):
        assert isinstance(mine, list) and len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            same(one, other)
    else:
        assert mine == {"label": theirs["label"], "score": pytest.approx(theirs["score"], abs=1e-5)}


PAIR = {"text": TEXTS[0], "text_pair": TEXTS[1]}


@pytest.mark.parametrize("top_k", [{}, {"top_k": 1}, {"top_k": 2}, {"top_k": None}], ids=str)
@pytest.mark.parametrize("kind", LABELS)
def test_answers_are_those_of_transformers_own_pipeline(kind: str, top_k: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", kind)
    encoder, tokenizer = edgemin.load(folder)
    stock = transformers.pipeline("text-classification", model=encoder, tokenizer=tokenizer)
    mine = edgemin.pipeline(folder)
    for inputs in (TEXTS[0], TEXTS, PAIR, [PAIR, TEXTS[2]], [TEXTS[0]]):
        same(mine(inputs, **top_k), stock(inputs, **top_k))
    assert len({answer["label"] for answer in mine(TEXTS)}) > 1 or kind == "regression"
    assert mine([]) == []


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_bundle_answers_as_its_artifact(runtime: str, model: Path, bundles: dict[str, Path]) -> None:
    same(edgemin.pipeline(bundles[runtime], threads=1)(TEXTS, top_k=None), edgemin.pipeline(model)(TEXTS, top_k=None))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_bundle_is_answered_without_torch(runtime: str, bundles: dict[str, Path]) -> None:
    program = (
        "import sys, edgemin; from edgemin import cli, predict; cli.run('x', predict.predict, ['--help'])\n"
        "words = [f'model={sys.argv[1]}', f'text={sys.argv[2]}']\n"
        "assert cli.run('x', predict.predict, words) == 0 and edgemin.pipeline(sys.argv[1])(sys.argv[2])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pytorch_lightning', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(bundles[runtime]), TEXTS[0]], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "model=<directory>" in ran.stdout and ran.stdout.splitlines()[-1].split("\t")[0] in LABELS["classification"]


def test_a_model_of_one_length_gets_that_length_one_by_one(model: Path) -> None:
    free = edgemin.pipeline(model)
    seen: list[tuple[int, ...]] = []

    class Watched:
        def answers(self, batch: Batch) -> Any:
            seen.append(batch["input_ids"].shape)
            return free._runtime.answers(batch)

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    fixed = pipeline.Pipeline(replace(free.served, length=LONGEST), cast(Runtime, Watched()), tokenizer)
    same(fixed(TEXTS[:3], top_k=None), free(TEXTS[:3], top_k=None))
    assert seen == [(1, LONGEST)] * 3


@pytest.mark.parametrize("kind", LABELS)
def test_rows_are_answered_as_the_kind_of_task_has_it(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", kind)
    opened = edgemin.pipeline(folder)
    found = opened.answers([(text,) for text in TEXTS])
    logits = torch.from_numpy(opened._logits([(text,) for text in TEXTS])[0])
    answered = KINDS[kind].answers(logits)
    shown = [KINDS[kind].shown(answer, LABELS[kind]) for answer in answered]
    if kind == "regression":
        assert found.labels == pytest.approx(shown) and found.scores == found.labels
        return
    assert [label or "no label" for label in found.labels] == shown and len(set(shown)) > 1
    if kind == "classification":
        expected = logits.softmax(1).amax(1)
    else:
        assert pipeline.DELIMITER == multi_label.DELIMITER
        yes = logits.sigmoid()
        expected = torch.where(answered > 0, yes, 1 - yes).prod(1)
    assert np.allclose(found.scores, expected)


@pytest.mark.parametrize("target", row_files.FORMATS)
@pytest.mark.parametrize("source", row_files.FORMATS)
def test_every_row_of_a_file_is_answered_in_its_order(
    source: str, target: str, model: Path, tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "CHUNK", 6)  # 20 rows: the last chunk is shorter
    rows = [{"id": f"0{place}", "sentence": text, "note": 'a "b"\nc, d'} for place, text in enumerate(TEXTS)]
    given, made = write_rows(tmp_path / f"in{source}", rows), tmp_path / f"out{target}"
    assert [len(chunk) for chunk in row_files.read(given)] == [6, 6, 6, 2]
    assert words(f"model={model}", f"input={given}", f"output={made}") == (
        0,
        f"{made}: 20 rows with label and score\n",
        "",
    )
    found = read_rows(made)
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    assert list(found[0]) == ["id", "sentence", "note", "label", "score"]
    same([{"label": row["label"], "score": float(row["score"])} for row in found], edgemin.pipeline(model)(TEXTS))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({given.name, made.name})


def test_parquet_keeps_its_types_and_columns_that_are_there_stay(model: Path, tmp_path: Path, words: Words) -> None:
    table = pa.table({"text": TEXTS[:2], "label": pa.array([1, 0], pa.int8()), "tags": [["x"], []]})
    pq.write_table(table, tmp_path / "in.parquet")
    code, out, _ = words(
        f"model={model}", f"input={tmp_path / 'in.parquet'}", f"output={tmp_path / 'out.parquet'}", "columns=text"
    )
    assert (code, "predicted_label and predicted_score" in out) == (0, True)
    made = pq.read_table(tmp_path / "out.parquet")
    assert made.select(table.column_names).equals(table)
    assert made.schema.types[3:] == [pa.string(), pa.float64()]
    code, _, err = words(
        f"model={model}", f"input={tmp_path / 'out.parquet'}", f"output={tmp_path / 'x.csv'}", "columns=text"
    )
    assert (code, "no column predicted_label" in err) == (2, True)


def test_half_a_character_stays_what_it_was(model: Path, tmp_path: Path, words: Words) -> None:
    given, made = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text('{"sentence": "the plot", "user": "\\ud83d"}\n')
    assert words(f"model={model}", f"input={given}", f"output={made}")[0] == 0
    assert [row["user"] for row in read_rows(made)] == ["\ud83d"]


def test_pairs_are_read_from_two_columns(tmp_path: Path, words: Words) -> None:
    folder = saved(tmp_path / "pairs", task={**TASK, "text_columns": ["one", "two"], "max_length": 80})
    rows = [{"one": first, "two": second} for first, second in zip(TEXTS[:4], TEXTS[4:8], strict=True)]
    given = write_rows(tmp_path / "in.csv", rows)
    assert words(f"model={folder}", f"input={given}", f"output={tmp_path / 'out.jsonl'}")[0] == 0
    expected = edgemin.pipeline(folder)([{"text": row["one"], "text_pair": row["two"]} for row in rows])
    same([{name: row[name] for name in ("label", "score")} for row in read_rows(tmp_path / "out.jsonl")], expected)
    code, out, _ = words(f"model={folder}", f"text={TEXTS[0]}", f"text_pair={TEXTS[4]}")
    assert (code, out) == (0, f"{expected[0]['label']}\t{expected[0]['score']:.4f}\n")
    wanted = "text_pair: expected a second text, as the model takes pairs, given none"
    assert words(f"model={folder}", f"text={TEXTS[0]}") == (2, "", f"error: {wanted}\n")


def test_what_is_too_long_is_cut_with_a_warning(
    model: Path, tmp_path: Path, words: Words, caplog: pytest.LogCaptureFixture
) -> None:
    long = " ".join([TEXTS[0]] * 500)
    code, out, err = words(f"model={model}", f"text={long}")
    assert (code, err) == (0, f"warning: text: it is longer than {LONGEST} tokens and was cut\n")
    cropped = " ".join(long.split()[: LONGEST - 2])
    assert out == words(f"model={model}", f"text={cropped}")[1]
    given = write_rows(tmp_path / "in.csv", [{"sentence": "the plot was good"}, {"sentence": long}])
    _, _, err = words(f"model={model}", f"input={given}", f"output={tmp_path / 'out.csv'}")
    assert err == f"warning: input: 1 of 2 rows are longer than {LONGEST} tokens and were cut, the first is row 2\n"
    with caplog.at_level(logging.WARNING):
        edgemin.pipeline(model)(["the plot was good", long])
    assert caplog.messages == [f"a text is longer than {LONGEST} tokens and is cut (input 2)"]


def test_a_pair_of_very_long_texts_is_cut_as_a_shorter_one_is(tmp_path: Path) -> None:
    opened = edgemin.pipeline(saved(tmp_path / "pairs", task={**TASK, "text_columns": ["one", "two"]}))
    words, others = " ".join(TEXTS[:8]).split(), " ".join(TEXTS[8:16]).split()
    assert min(len(words), len(others)) > LONGEST
    long = " ".join(words * 500), " ".join(others * 500)  # some 50,000 words: all pairs of their parts fill no memory
    found = opened.answers([long, (" ".join(words[:LONGEST]), " ".join(others[:LONGEST]))])
    assert found.cut == [0, 1] and found.scores[0] == pytest.approx(found.scores[1])


TEXT = f"text={TEXTS[0]}"
FILES = {
    "in.csv": b"sentence,note\nthe plot was good,x\n",
    "blank.csv": b"sentence\nthe plot\n \n",
    "ragged.csv": b"sentence,a\nthe plot\n",
    "none.csv": b"sentence\n",
    "garbage.csv": bytes(range(256)),
    "garbage.jsonl": bytes(range(255, 0, -1)),
    "garbage.parquet": bytes(range(256)),
    "bad.jsonl": b'{"sentence": "the plot"}\n{"sentence": \n',
    "list.jsonl": b'["the plot"]\n',
    "object.jsonl": b'{"sentence": {"a": 1}}\n',
    "uneven.jsonl": b'{"sentence": "the plot"}\n' * 1024 + b'{"sentence": "the plot", "more": 1}\n',
    "mixed.jsonl": b'{"sentence": "the plot", "a": 1}\n{"sentence": "the plot", "a": "x"}\n',
    "late.jsonl": b'{"sentence": "the plot"}\n' * 1024 + b'{"sentence": "the plot", "label": "mine"}\n',
    "half.jsonl": b'{"sentence": "the plot", "user": "\\ud83d"}\n',
    "there.csv": b"x\n",
}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["text= "], "text: expected a text, given an empty one"),
        ([f"{TEXT}\udce4"], "text: expected a text in UTF-8, given half a character (a lone surrogate)"),
        ([], "text: expected either a text or input=<file>, given neither"),
        ([TEXT, "input=in.csv", "output=out.csv"], "text: expected either a text or input=<file>, given both"),
        ([TEXT, "text_pair=x"], "text_pair: expected nothing, as the model takes one text, given one"),
        ([TEXT, "output=out.csv"], "output: expected input=<file> beside it, given text"),
        ([TEXT, "threads=-1"], "threads: expected a number, given -1 (see --help)"),
        (["input=in.csv"], "output: expected a file beside input, given nothing"),
        (["input=in.csv", "output=there.csv"], "output: expected a new file, given there.csv, which exists"),
        (["input=in.csv", "output=no/out.csv"], "output: expected a file in an existing directory, given no/out.csv"),
        (["input=in.csv", "output=out.xlsx"], "output: expected a file that ends in .csv, .tsv, .jsonl, .parquet"),
        (["input=in.pdf", "output=out.csv"], "input: expected a file that ends in .csv, .tsv, .jsonl, .parquet"),
        (["input=no.csv", "output=out.csv"], "input: expected a file, given no.csv, which does not exist"),
        (["input=none.csv", "output=out.csv"], "input: expected a file with rows, given none.csv without any"),
        (
            ["input=in.csv", "output=out.csv", "columns=text"],
            "columns: expected columns of in.csv (sentence, note), given text",
        ),
        (
            ["input=in.csv", "output=out.csv", "columns=[sentence,note]"],
            "columns: expected 1 of them, as the model takes, given sentence, note",
        ),
        (["input=blank.csv", "output=out.csv"], "sentence: expected a text, given an empty one in row 2 of blank.csv"),
        (["input=ragged.csv", "output=out.csv"], "input: expected 2 cells in row 1 of ragged.csv, given 1"),
        (["input=garbage.csv", "output=out.csv"], "input: expected a .csv file in UTF-8, given garbage.csv ("),
        (["input=garbage.jsonl", "output=out.csv"], "input: expected a .jsonl file in UTF-8, given garbage.jsonl ("),
        (["input=garbage.parquet", "output=out.csv"], "input: expected a .parquet file, given garbage.parquet ("),
        (["input=bad.jsonl", "output=out.csv"], "input: expected JSON in row 2 of bad.jsonl, given"),
        (["input=list.jsonl", "output=out.csv"], "input: expected an object in row 1 of list.jsonl, given"),
        (["input=object.jsonl", "output=out.csv"], "sentence: expected a text, given a dict in row 1 of object.jsonl"),
        (
            ["input=uneven.jsonl", "output=out.csv"],
            "output: expected .jsonl, as not all rows have the same columns (more only later), given out.csv",
        ),
        (
            ["input=late.jsonl", "output=out.jsonl"],
            "input: expected a column label from the first rows on or not at all, as that is what is added, given one",
        ),
        (
            ["input=half.jsonl", "output=out.csv"],
            "output: expected .jsonl, as a cell has half a character (a lone surrogate), given out.csv",
        ),
        (
            ["input=mixed.jsonl", "output=out.parquet"],
            "output: expected .jsonl, as the columns do not have one type each (",
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_no_file(
    given: list[str], line: str, model: Path, tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    code, out, err = words(f"model={model}", *given)
    assert (code, out) == (2, "") and err.startswith(f"error: {line}") and err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {*FILES}


def test_a_model_that_is_none_or_damaged_is_one_line(
    model: Path, bundles: dict[str, Path], tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line(path: Path) -> str:
        code, out, err = words(f"model={path}", TEXT)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        return err.removeprefix("error: ").replace(str(path), "<path>").rstrip("\n")

    def copied(source: Path, name: str, content: bytes | None = None, *, half: bool = False) -> Path:
        folder = tmp_path / f"{source.name}-{name}-{half}"
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if content is None and not half:
            (folder / name).unlink()
        else:
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
        return folder

    (tmp_path / "empty").mkdir()
    onnx, openvino = bundles["onnxruntime"], bundles["openvino"]
    given = "model: expected an artifact or a bundle of EdgeMIN, given <path> without "
    assert line(tmp_path / "no") == (
        "model: expected the directory of an artifact or a bundle, given <path>, which is none"
    )
    assert line(tmp_path / "empty") == f"{given}config.json"
    assert line(copied(model, "structure.json")) == (
        f"{given}structure.json (an artifact) and no runtime in config.json (a bundle)"
    )
    assert line(copied(model, "tokenizer.json")) == "model: expected a file tokenizer.json in <path>, found none"
    assert line(copied(onnx, "tokenizer.json")) == "model: expected a file tokenizer.json in <path>, found none"
    assert line(copied(onnx, "tokenizer.json", half=True)).startswith("model: <path>/tokenizer.json is damaged (")
    assert line(copied(onnx, "config.json", half=True)).startswith("model: <path>/config.json cannot be read (")
    foreign = (onnx / "config.json").read_bytes().replace(b'"onnxruntime"', b'"tflite"')
    assert line(copied(onnx, "config.json", foreign)) == (
        "model: expected an artifact, or a bundle for onnxruntime, openvino or openvino_bf16, "
        "given <path>, made for tflite"
    )
    negative = (openvino / "config.json").read_bytes().replace(b'"max_length": 40', b'"max_length": -1')
    assert line(copied(openvino, "config.json", negative)).startswith(
        "model: <path>/config.json is damaged (edgemin.max_length: "
    )
    assert "model.safetensors is damaged (" in line(copied(model, "model.safetensors", half=True))
    assert line(copied(onnx, "model.onnx", half=True)).startswith("<path>/model.onnx: ONNX Runtime cannot open it (")
    for name in ("model.xml", "model.bin"):
        assert line(copied(openvino, name, half=True)).startswith("<path>/model.xml: OpenVINO cannot open it (")
        assert line(copied(openvino, name)).startswith("<path>/model.xml: OpenVINO cannot open it (")
    untrained = saved(tmp_path / "untrained", head_trained=False, path="student/distill")
    assert "model: expected one whose head was trained" in words(f"model={untrained}", TEXT)[2]
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
        expected = f"deploy: expected {name} to be installed (pip install 'edgemin[{name}]'), given none"
        assert line(bundles[name]) == expected


@pytest.mark.parametrize(
    ("inputs", "asked", "line"),
    [
        ("", {}, "text: expected a text, given an empty one"),
        (["good", " "], {}, r"text: expected a text, given an empty one \(input 2\)"),
        ([["a", "b"]], {}, r"text: expected a text, given a list \(input 1\)"),
        (7, {}, "text: expected a text, given a int"),
        ({"txt": "good"}, {}, "text: expected the keys text and text_pair, given txt"),
        ({"text": "good", "text_pair": "bad"}, {}, "text_pair: expected nothing, as the model takes one text"),
        ("good", {"top_k": 0}, "top_k: expected a whole number of at least 1, or None, given 0"),
    ],
)
def test_a_mistake_in_python_is_one_line_too(inputs: Any, asked: dict[str, Any], line: str, model: Path) -> None:
    with pytest.raises(UserError, match=line):
        edgemin.pipeline(model)(inputs, **asked)
