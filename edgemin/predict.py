"""`python -m edgemin.predict`: what a compressed model, or its bundle, says of a text or of a file of texts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated

from pydantic import Field

from edgemin import cli
from edgemin.deploy import pipeline as pipelines
from edgemin.deploy import row_files
from edgemin.deploy.pipeline import Texts
from edgemin.deploy.served import Served, described
from edgemin.errors import UserError
from edgemin.plain_text import printable

ADDED = ("label", "score")


def predict(
    model: Annotated[Path, Field(title="directory", description="an artifact (outputs/store/<key>) or a bundle")],
    text: Annotated[str | None, Field(title="text", description="what to classify")] = None,
    text_pair: Annotated[str | None, Field(title="text", description="the second text of a pair")] = None,
    input: Annotated[
        Path | None, Field(title="file", description="rows to classify: .csv, .tsv, .jsonl or .parquet")
    ] = None,
    output: Annotated[Path | None, Field(title="file", description="the same rows with label and score: new")] = None,
    columns: Annotated[
        str | None, Field(title="names", description="of the text columns, with a comma between; else the task's")
    ] = None,
    threads: Annotated[
        int, Field(title="number", description="threads of one inference; 0: as the runtime chooses", ge=0)
    ] = 0,
) -> None:
    """Say the label and the score of a text, or add both to every row of a file.

    A score is the probability that the model gives to exactly this answer; in a regression label and score are the
    number. Where the rows have a column called label or score, what is added is predicted_label and predicted_score.
    """
    if (text is None) == (input is None):
        raise UserError("text: expected either a text or input=<file>, given " + ("both" if text else "neither"))
    served = described(model)
    if input is not None:
        if text_pair is not None:
            raise UserError("text_pair: expected text=<text> beside it, given input")
        _file(served, input, _new(output), columns, threads)
        return
    for key, value in (("output", output), ("columns", columns)):
        if value is not None:
            raise UserError(f"{key}: expected input=<file> beside it, given text")
    assert text is not None
    texts = (text,) if text_pair is None else (text, text_pair)
    pipelines.check_example(texts, served.texts)
    pipeline = pipelines.open_pipeline(served, threads)
    answers = pipeline.answers([texts])
    if answers.cut:
        _warn(f"text: it is longer than {pipeline.served.max_length} tokens and was cut")
    (label,), (score,) = answers.labels, answers.scores
    print(f"{score:.4f}" if isinstance(label, float) else f"{printable(label) or 'no label'}\t{score:.4f}")


def _new(output: Path | None) -> Path:
    if output is None:
        raise UserError("output: expected a file beside input, given nothing")
    row_files.check_format(output, "output")
    if output.exists():
        raise UserError(f"output: expected a new file, given {output}, which exists")
    if not output.parent.is_dir():
        raise UserError(f"output: expected a file in an existing directory, given {output}")
    return output


def _file(served: Served, source: Path, output: Path, asked: str | None, threads: int) -> None:
    chunks = row_files.read(source)
    first = next(chunks, None)
    if first is None:
        raise UserError(f"input: expected a file with rows, given {source} without any")
    there = list(dict.fromkeys(name for row in first for name in row))
    columns = _columns(served, source, there, asked)
    added = ADDED if not set(ADDED) & set(there) else tuple(f"predicted_{name}" for name in ADDED)
    if taken := set(added) & set(there):
        raise UserError(f"input: expected no column {sorted(taken)[0]}, which is to be added, given one in {source}")
    known = row_files.schema(source)
    types = {} if known is None else dict(zip(known.names, known.types, strict=True))
    pipeline = pipelines.open_pipeline(served, threads)
    done, cut, first_cut = 0, 0, 0
    with row_files.writer(output, [*there, *added], types) as file:
        for rows in chain([first], chunks):
            examples = [_texts(row, columns, done + number, source) for number, row in enumerate(rows, start=1)]
            if taken := {name for row in rows for name in added if name in row}:
                raise UserError(
                    f"input: expected a column {min(taken)} from the first rows on or not at all, as that is what is "
                    f"added, given one later in {source}"
                )
            labels, scores, places = pipeline.answers(examples)
            both = zip(labels, scores, strict=True)
            file.write([row | dict(zip(added, pair, strict=True)) for row, pair in zip(rows, both, strict=True)])
            first_cut = first_cut or (done + places[0] + 1 if places else 0)
            done, cut = done + len(rows), cut + len(places)
    if cut:
        found = f"{cut} of {done} rows are longer than {pipeline.served.max_length} tokens and were cut"
        _warn(f"input: {found}, the first is row {first_cut}")
    print(f"{output}: {done} rows with {' and '.join(added)}")


def _columns(served: Served, source: Path, there: Sequence[str], asked: str | None) -> tuple[str, ...]:
    """The columns that the texts stand in."""
    names = served.text_columns or ("text", "text_pair")[: served.texts or 1]
    if asked is not None:
        names = tuple(name.strip() for name in asked.strip("[]").split(","))
    for name in names:
        if name not in there:
            raise UserError(f"columns: expected columns of {source} ({', '.join(there)}), given {name or 'nothing'}")
    if len(names) > 2 or (served.texts is not None and len(names) != served.texts):
        expected = f"{served.texts} of them, as the model takes" if served.texts else "one or two"
        raise UserError(f"columns: expected {expected}, given {', '.join(names)}")
    return names


def _texts(row: row_files.Row, columns: Sequence[str], number: int, source: Path) -> Texts:
    """The texts of a row; a number is one."""
    texts = []
    for name in columns:
        cell = row.get(name)
        text = "" if cell is None else str(cell) if type(cell) in (int, float) else cell
        pipelines.check(name, text, f" in row {number} of {source}")
        texts.append(text)
    return tuple(texts)


def _warn(line: str) -> None:
    print(f"warning: {printable(line)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run("python -m edgemin.predict", predict, sys.argv[1:]))
