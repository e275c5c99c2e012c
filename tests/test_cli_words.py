"""What all command lines share, on commands that are made up: words, mistakes, `--help`, exit codes, signals."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from edgemin import cli
from edgemin.cli import Failure
from edgemin.errors import UserError

asked: list[dict[str, Any]] = []


def pack(
    model: Annotated[Path, Field(title="directory", description="what to pack")],
    bits: Annotated[int, Field(title="number above 0", description="of each weight", gt=0)] = 8,
    rounding: Annotated[Literal["up", "down"], Field(title="up or down", description="of halves")] = "up",
    share: Annotated[
        float | None, Field(title="fraction", description="of the weights; all of them if left out")
    ] = None,
) -> None:
    """Pack a model.

    Two lines that
    stay two lines.
    """
    asked.append({"model": model, "bits": bits, "rounding": rounding, "share": share})


def unpack(archive: Annotated[str, Field(title="archive", description="what was packed")]) -> None:
    """Unpack a model again."""
    asked.append({"archive": archive})


VERBS = {"pack": pack, "unpack": unpack}


@pytest.fixture(autouse=True)
def nothing_asked() -> None:
    asked.clear()


def test_words_become_arguments_of_the_types_that_the_command_asks_for() -> None:
    assert cli.run("x", pack, ["share=2.5e-1", "model='a=b c'", "rounding=down", "bits=4"]) == 0
    assert cli.run("x", pack, ["model=7"]) == 0
    assert cli.run("x", unpack, ["archive=it's 'this'"]) == 0
    given = {"model": Path("a=b c"), "bits": 4, "rounding": "down", "share": 0.25}
    assert asked[:2] == [given, {"model": Path("7"), "bits": 8, "rounding": "up", "share": None}]
    assert asked[2:] == [{"archive": "it's 'this'"}]


FORMS = "model=<directory> or bits=<number above 0> or rounding=<up or down> or share=<fraction>"


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["bitz=4"], [f"expected {FORMS}, given bitz=4"]),
        (
            ["bits", "=4", "model="],
            [
                f"expected {FORMS}, given bits",
                f"expected {FORMS}, given =4",
                "model: expected a directory, given nothing",
            ],
        ),
        ([], ["model: expected a directory, given nothing"]),
        (["model=''"], ["model: expected a directory, given nothing"]),
        (["model=a", "share="], ["share: expected a fraction, given nothing"]),
        (["model=a", "model=b"], ["model: expected one directory, given a and b"]),
        (
            ["bits=0", "rounding=left"],
            [
                "model: expected a directory, given nothing",
                "bits: expected a number above 0, given 0",
                "rounding: expected an up or down, given left",
            ],
        ),
        (["model=a", "bits=8.5"], ["bits: expected a number above 0, given 8.5"]),
        (["model=a", "share=nan"], ["share: expected a fraction, given nan"]),
        (["model=a", "x\x1b[31m=1"], [rf"expected {FORMS}, given x\x1b[31m=1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_each_mistake_is_one_line(words: list[str], lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("x", pack, words) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {line} (see --help)" for line in lines]
    assert not asked


@pytest.mark.parametrize("words", [["--help"], ["model=a", "-h"]])
def test_help_is_made_of_the_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("python -m x", pack, words) == 0 and not asked
    assert capsys.readouterr().out == (
        "python -m x model=<directory> [bits=<number above 0>] [rounding=<up or down>] [share=<fraction>]\n\n"
        "Pack a model.\n\n"
        "  model=<directory>       what to pack\n"
        "  bits=<number above 0>   of each weight\n"
        "  rounding=<up or down>   of halves\n"
        "  share=<fraction>        of the weights; all of them if left out\n\n"
        "Two lines that\nstay two lines.\n"
    )


def test_a_verb_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("x", VERBS, ["unpack", "archive=a"]) == 0 and asked == [{"archive": "a"}]
    assert cli.run("x", VERBS, ["--help"]) == 0
    assert capsys.readouterr().out == "x <verb>\n\n  pack     Pack a model.\n  unpack   Unpack a model again.\n"
    assert cli.run("x", VERBS, ["unpack", "--help"]) == 0
    assert capsys.readouterr().out.startswith("x unpack archive=<archive>\n\nUnpack a model again.\n")
    assert [cli.run("x", VERBS, words) for words in ([], ["archive=a"], ["unpack"])] == [2, 2, 2]
    assert capsys.readouterr().err.splitlines() == [
        "error: expected pack or unpack, given nothing (see --help)",
        "error: expected pack or unpack, given archive=a (see --help)",
        "error: archive: expected an archive, given nothing (see --help)",
    ]


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UserError("seed: too\nodd"), 2, ["seed: too odd"]),
        (UserError("a: wrong", "b: wrong"), 2, ["a: wrong", "b: wrong"]),
        (OSError(errno.ENOSPC, "No space left", "/full"), 2, ["/full: No space left"]),
        (OSError(errno.EPIPE, "Broken pipe"), 2, ["Broken pipe"]),
        (
            OSError("of a kind of its own"),
            1,
            ["OSError: of a kind of its own (not foreseen; EDGEMIN_TRACEBACK=1 shows where)"],
        ),
        (KeyError("x"), 1, ["KeyError: 'x' (not foreseen; EDGEMIN_TRACEBACK=1 shows where)"]),
    ],
    ids=repr,
)
def test_whatever_goes_wrong_is_a_line_and_an_exit_code(
    error: Exception, code: int, lines: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise error

    assert cli.guarded(fail) == code
    assert capsys.readouterr().err.splitlines() == [f"error: {line}" for line in lines]
    monkeypatch.setenv("EDGEMIN_TRACEBACK", "1")
    assert cli.guarded(fail) == code and "in fail" in capsys.readouterr().err


def test_the_exit_code_says_whether_all_was_foreseen() -> None:
    foreseen, not_foreseen = Failure("a"), Failure("b", foreseen=False)
    assert [cli.exit_code(found) for found in ([], [foreseen], [foreseen, not_foreseen])] == [0, 2, 1]
    assert cli.guarded(lambda: None) == 0 and cli.guarded(lambda: 2) == 2


def test_a_signal_ends_a_command_without_advice_on_checkpoints(capfd: pytest.CaptureFixture[str]) -> None:
    def stop(archive: Annotated[str, Field(title="archive", description="")]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        cli.run("x", {"stop": stop}, ["stop", "archive=a"])
    assert left.value.code == 143 and capfd.readouterr().err == "stopped by SIGTERM\n"


def test_nothing_slow_is_loaded() -> None:
    program = "import sys, edgemin.cli; print(sorted({'torch', 'transformers', 'hydra', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
