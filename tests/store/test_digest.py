"""The code's fingerprint: what decides a result changes it, what only explains does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgemin.store import digest

STAGE = "edgemin.pruning.stage"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that the digest reads."""
    copy = tmp_path / "edgemin"
    shutil.copytree(Path(digest.__file__).parents[1], copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(digest, "_PACKAGE", copy)
    return copy


def fresh(*modules: str) -> str:
    """The digest of modules, computed without the cache of an earlier call."""
    return digest.code_digest.__wrapped__(*modules)


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content, "the test edits what is no longer there"
    path.write_text(content.replace(old, new, 1))


def test_the_same_code_has_the_same_digest_anywhere(package: Path) -> None:
    assert fresh(STAGE) == digest.code_digest(STAGE)
    assert len(fresh(STAGE)) == 20


def test_comments_docstrings_and_formatting_change_nothing(package: Path) -> None:
    before = fresh(STAGE)
    path = package / "pruning" / "stage.py"
    edit(path, '"""', '"""Other words. ')
    edit(path, "class Pruning(MethodSum):\n", "# a comment\n\n\nclass Pruning(MethodSum):  # and one here\n")
    edit(path, "    def finish(self)", "\n\n    def finish(self)")
    source = path.read_text()
    begin = source.index('"""', source.index("def begin("))
    end = source.index('"""', begin + 3) + 3
    path.write_text(source[:begin] + '"""Said\n        otherwise."""' + source[end:])
    assert fresh(STAGE) == before


def test_a_docstring_that_is_added_or_taken_away_changes_nothing(package: Path) -> None:
    path = package / "mine.py"
    path.write_text("def f(x):\n    return x + 1\n\n\nclass A:\n    def g(self):\n        return 2\n")
    before = fresh("edgemin.mine")
    class_a = 'class A:\n    """A."""\n\n    def g(self):\n        """G."""\n        return 2\n'
    path.write_text('"""M."""\n\ndef f(x):\n    """F."""\n    return x + 1\n\n\n' + class_a)
    assert fresh("edgemin.mine") == before


def test_a_docstring_of_an_attribute_changes_nothing(package: Path) -> None:
    path = package / "mine.py"
    path.write_text('RATE = 1.0\n"""Per second."""\n')
    before = fresh("edgemin.mine")
    path.write_text('RATE = 1.0\n"""Per second, always."""\n')
    assert fresh("edgemin.mine") == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("pruning/stage.py", "self.initial = self.units.units(model)", "self.initial = list(self.units.units(model))"),
        ("training/stage.py", "998_244_353", "998_244_351"),  # imported
        ("pruning/selection.py", "_ROUNDING = 1e-9", "_ROUNDING = 1e-8"),  # imported
        ("encoder/slicing.py", "import torch\n", "import torch\n\nEXTRA = 1\n"),  # imported
        ("data/batches.py", "BUCKET_BATCHES = 50", "BUCKET_BATCHES = 51"),  # two imports away
    ],
)
def test_a_change_of_the_module_or_of_what_it_imports_changes_the_digest(
    file: str, old: str, new: str, package: Path
) -> None:
    before = fresh(STAGE)
    edit(package / file, old, new)
    assert fresh(STAGE) != before


@pytest.mark.parametrize(
    "file", ["distillation/minilmv2.py", "report/tables.py", "measure/size.py", "train.py", "progress.py", "errors.py"]
)
def test_a_change_of_what_it_does_not_import_changes_nothing(file: str, package: Path) -> None:
    before = fresh(STAGE)
    path = package / file
    path.write_text(path.read_text() + "\nEXTRA = 1\n")
    assert fresh(STAGE) == before


def test_several_modules_are_one_digest_in_any_order(package: Path) -> None:
    assert fresh("edgemin.pruning.stage", "edgemin.artifact") == fresh("edgemin.artifact", "edgemin.pruning.stage")
    assert fresh("edgemin.pruning.stage", "edgemin.artifact") != fresh("edgemin.pruning.stage")


def test_a_users_own_class_counts_by_its_file_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_stages", "your_stages", "edgemines"):
        (tmp_path / f"{name}.py").write_text("RATE = 1\n")
    before = fresh("my_stages", STAGE)
    assert before == fresh("my_stages", STAGE)
    assert len({before, fresh("your_stages", STAGE), fresh("edgemines", STAGE), fresh(STAGE)}) == 4
    (tmp_path / "my_stages.py").write_text("RATE = 2\n")
    assert fresh("my_stages", STAGE) != before


def test_a_users_own_class_in_a_package_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "stages.py").write_text("RATE = 1\n")
    before = fresh("my_package.stages")
    (tmp_path / "my_package" / "stages.py").write_text("RATE = 2\n")
    assert fresh("my_package.stages") != before


def test_imports_that_go_in_a_circle_end(package: Path) -> None:
    (package / "one.py").write_text("from edgemin import two\n")
    (package / "two.py").write_text("from edgemin import one\n")
    before = fresh("edgemin.one")
    (package / "two.py").write_text("from edgemin import one\nX = 1\n")
    assert fresh("edgemin.one") != before


@pytest.mark.parametrize(
    "line",
    [
        "import edgemin.encoder.taps",
        "from edgemin import encoder",
        "from edgemin import __version__",
        "from edgemin.encoder import read",
        "from edgemin.encoder import taps, read",
        "from . import two",
        "def f():\n    import edgemin",
    ],
)
def test_what_could_not_be_seen_is_refused(line: str, package: Path) -> None:
    (package / "one.py").write_text(f"{line}\n")
    with pytest.raises(AssertionError, match=r"^edgemin\.one: expected submodules imported from packages, given "):
        fresh("edgemin.one")


def test_imports_for_types_alone_do_not_count(package: Path) -> None:
    (package / "one.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from edgemin import two\n"
    )
    (package / "two.py").write_text("")
    assert list(digest.code_modules("edgemin.one")) == ["edgemin.one"]
