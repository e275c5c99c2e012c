"""The project's rules, checked by reading its files: who may import whom, names, lengths, versions."""

from __future__ import annotations

import ast
import functools
import graphlib
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import edgemin

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "edgemin"

# The lowest layer first: a module imports from its own and those above it here; `a.b` stands with `a` unless named.
LAYERS = (
    ("edgemin", "errors", "medians", "plain_text", "store", "tab_separated"),
    ("config", "progress", "toy"),
    ("processes",),
    ("cli",),
    ("encoder",),
    ("tasks",),
    ("data",),
    ("artifact", "checkpoint"),
    ("evaluate", "tracking", "weights_and_biases"),
    ("training",),
    ("distillation", "finetune", "pruning", "quantization"),
    ("deploy",),
    ("measure",),
    ("study",),
    ("study.collapse", "study.failures", "study.gate", "study.order", "study.own_process", "study.roots"),
    ("study.family", "study.settings", "study.starts"),
    ("study.ahead", "study.nodes"),
    ("study.achieved", "study.exports"),
    ("study.runtimes",),
    ("study.checks", "study.jobs", "study.latency_tables", "study.pipeline", "study.scoring", "study.timing"),
    ("study.plan", "study.predictions", "study.tree"),
    ("study.reading", "study.results"),
    ("study.job",),
    ("export", "predict", "train"),
)
# The report reads finished runs and needs none of the code that made them.
ALONE, ALONE_MAY_IMPORT = "report", ("cli", "errors", "medians", "plain_text", "report")
METHODS = next(number for number, layer in enumerate(LAYERS) if "finetune" in layer)
FROM_WHERE_ALONE_IS_SEEN = next(number for number, layer in enumerate(LAYERS) if "study" in layer)
# Where imports inside functions are the point: to answer without loading torch, or what one choice needs.
MAY_IMPORT_LATE = {
    "study.ahead": {"edgemin"},
    "edgemin": None,
    "study.own_process": {"edgemin"},
    "train": None,
    "export": None,
    "report.__main__": None,
    "study.jobs": {"edgemin"},
    "weights_and_biases": {"wandb"},
}
HEAVY = {"datasets", "pytorch_lightning", "torch", "torchmetrics", "transformers", "wandb"}


class Import(NamedTuple):
    module: str  # dotted, absolute
    late: bool  # inside a function
    typing_only: bool
    line: int


def name_of(path: Path) -> str:
    """`encoder.taps` for edgemin/encoder/taps.py; `edgemin` for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "edgemin"


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def is_typing_check(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@functools.cache
def imports_of(name: str) -> tuple[Import, ...]:
    return tuple(_imports(tree_of(name), late=False, typing_only=False))


def _imports(node: ast.AST, late: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, late, typing_only, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, f"line {child.lineno}: imports are absolute"
            for alias in child.names:
                below = f"{child.module}.{alias.name}"
                known = below.removeprefix("edgemin.") in MODULES
                yield Import(below if known else child.module, late, typing_only, child.lineno)
        else:
            inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, inside, typing_only or is_typing_check(child))


def inner_imports(name: str) -> dict[str, Import]:
    """The imports from EdgeMIN itself, by names such as `encoder.taps`."""
    found = (found for found in imports_of(name) if found.module.split(".")[0] == "edgemin")
    return {imported.module.removeprefix("edgemin."): imported for imported in found}


def layer_of(name: str) -> int:
    for number, layer in enumerate(LAYERS):
        if name in layer:
            return number
    parent = name.rpartition(".")[0]
    assert parent, f"edgemin/{name}.py: say in LAYERS where it stands"
    return layer_of(parent)


def group_of(name: str) -> str:
    """The folder that a module belongs to, or the file that stands by itself."""
    return name.split(".")[0]


def is_alone(name: str) -> bool:
    return group_of(name) == ALONE


@pytest.mark.parametrize("name", [name for name in MODULES if not is_alone(name)])
def test_imports_go_down_the_layers(name: str) -> None:
    for imported, found in inner_imports(name).items():
        if name == "edgemin":
            assert found.late or found.typing_only, f"{name}:{found.line} `import edgemin` must stay light"
        elif is_alone(imported):
            assert layer_of(name) >= FROM_WHERE_ALONE_IS_SEEN, f"{name}:{found.line} imports {imported}"
        else:
            late = found.late and "edgemin" in (MAY_IMPORT_LATE.get(name) or ())  # what answers before torch is loaded
            assert late or layer_of(imported) <= layer_of(name), f"{name}:{found.line} imports {imported} from above"
            if group_of(imported) == group_of(name) == "study" and not late:
                assert layer_of(imported) < layer_of(name), f"{name}:{found.line} imports {imported}, its neighbour"
            if layer_of(imported) == layer_of(name) == METHODS and group_of(imported) != group_of(name):
                pytest.fail(f"{name}:{found.line} imports {imported}: methods ignore each other")


@pytest.mark.parametrize("name", [name for name in MODULES if is_alone(name)])
def test_the_report_stands_alone(name: str) -> None:
    for imported, found in inner_imports(name).items():
        assert group_of(imported) in ALONE_MAY_IMPORT, f"{name}:{found.line} imports {imported}"
    assert not HEAVY & {found.module.split(".")[0] for found in imports_of(name)}


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {
        name: {m for m, found in inner_imports(name).items() if not found.late and not found.typing_only}
        for name in MODULES
    }
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_imports_stand_at_the_top_of_the_file(name: str) -> None:
    late = {found.module.split(".")[0]: found.line for found in imports_of(name) if found.late}
    allowed = MAY_IMPORT_LATE.get(name, set())
    if allowed is not None:
        assert not late.keys() - allowed, f"{name}: {late}"


@pytest.mark.parametrize(
    "entry", [name for name in ("edgemin", "train", "predict", "report.__main__") if name in MODULES]
)
def test_an_entry_point_starts_without_what_is_slow_to_load(entry: str) -> None:
    reached, waiting = set[str](), [entry]
    while waiting:
        name = waiting.pop()
        if name in reached or name not in MODULES:
            continue
        reached.add(name)
        # Importing a.b runs a's __init__ first.
        waiting.append(name.rpartition(".")[0])
        for found in imports_of(name):
            if found.late or found.typing_only:
                continue
            top = found.module.split(".")[0]
            assert top not in HEAVY, f"{entry} reaches {name}:{found.line}, which imports {found.module}"
            waiting.append(found.module.removeprefix("edgemin."))


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_short_and_so_is_a_function(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= 330, f"{lines} lines"
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= 66, f"{node.name}: {length} lines below its docstring"


def repository_files() -> list[Path]:
    """What is in the repository: nothing generated by runs, tools or editors."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        paths = [REPOSITORY / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
        return [path for path in paths if path.is_file()]
    folders = ("edgemin", "conf", "tests", "experiments", ".ci", ".github")
    return [
        p
        for folder in folders
        for p in (REPOSITORY / folder).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    ]


PAGES = sorted(path for folder in ("docs", "experiments", "benchmarks") for path in (REPOSITORY / folder).rglob("*.md"))


def test_every_link_of_a_page_leads_somewhere() -> None:
    dead = []
    for page in (REPOSITORY / "README.md", *PAGES):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            file = link.partition("#")[0]
            if file and "://" not in link and not (page.parent / file).exists():
                dead.append(f"{page.relative_to(REPOSITORY)}: {link}")
    assert not dead


def test_no_file_is_called_by_what_it_is_not_about() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [path for path in repository_files() if vague & {part.split(".")[0].lower() for part in path.parts[-2:]}]


def test_no_file_knows_a_machine_or_a_registry() -> None:
    # In pieces, so that this file does not find itself.
    folders = "|".join(["work", "root", "opt", "home/[a-z]", "Users/[A-Za-z]"])
    hosts = "|".join(["python" + r"hosted\.org", "pypi" + r"\.org", "download" + r"\.pytorch"])
    pattern = re.compile(rf"(?<![\w.}}>-])/(?:{folders})(?=/|\b)/[\w.]|{hosts}")
    found = []
    for path in repository_files():
        if path.suffix in {".png", ".svg", ".parquet", ".safetensors", ".gz"} or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number} {match[0]}")
    assert not found


@functools.cache
def project() -> dict[str, object]:
    content: dict[str, object] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return content


def constraints() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pinned}


def test_what_is_tested_lies_inside_the_ranges_that_are_promised() -> None:
    pinned = constraints()
    extras = project()["optional-dependencies"]
    assert isinstance(extras, dict)
    lines = [*project()["dependencies"], *(line for extra in extras.values() for line in extra)]  # type: ignore[misc]
    for requirement in [Requirement(line) for line in lines if not line.startswith("edgemin[")]:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} but {version}"
    assert not [version for version in pinned.values() if "+" in version], "a local build is on no index"


def test_every_outside_import_is_a_declared_dependency() -> None:
    names = {"hydra": "hydra-core", "yaml": "pyyaml", "pytorch_lightning": "pytorch-lightning"}
    declared = {canonicalize_name(Requirement(line).name) for line in project()["dependencies"]}  # type: ignore[attr-defined]
    used = {found.module.split(".")[0] for name in MODULES for found in imports_of(name)}
    outside = used - sys.stdlib_module_names - {"edgemin"}
    assert not {name for name in outside if canonicalize_name(names.get(name, name)) not in declared}


def test_the_version_is_written_once() -> None:
    assert project()["dynamic"] == ["version"]
    assert f"## [{edgemin.__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_make_alone_lists_every_target() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    documented = re.findall(r"^([a-z-]+):.*## \S", makefile, flags=re.MULTILINE)
    assert sorted(phony.split()) == sorted(documented)
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[1] for line in shown.splitlines()] == documented


def test_continuous_integration_runs_the_one_script() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    assert [step["run"] for step in workflow["jobs"]["ci"]["steps"] if "run" in step] == [".ci/run"]


@pytest.mark.slow
def test_the_wheel_holds_the_configuration(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            str(tmp_path),
            str(REPOSITORY),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("edgemin-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    asked = {f"edgemin/{path.relative_to(REPOSITORY).as_posix()}" for path in (REPOSITORY / "conf").rglob("*.yaml")}
    asked |= {path.relative_to(REPOSITORY).as_posix() for path in MODULES.values()}
    studies = [yaml.safe_load(path.read_text()) for path in (REPOSITORY / "conf" / "experiment").glob("*.yaml")]
    asked |= {f"edgemin/{study['published']}" for study in studies if study.get("published")}
    assert asked <= packed
    assert {name.split("/")[0] for name in packed} == {"edgemin", f"edgemin-{edgemin.__version__}.dist-info"}
