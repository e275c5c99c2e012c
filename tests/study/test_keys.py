"""What a key knows of the code: all that decides its result, and no more."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import studies

from edgemin.store import digest
from edgemin.study import exports, pipeline, plan, runtimes, scoring
from edgemin.study.nodes import Node
from edgemin.tasks.classification import Classification
from edgemin.training import teacher_outputs
from edgemin.training.stage import Stage

ENCODER = {f"encoder.{name}" for name in ("building", "config_file", "families", "outline", "parts", "quantized")}
ENCODER |= {"encoder.structure_file", "encoder.taps"}
TASK = {"tasks.base", "tasks.classification"}
DATA = {"data.batches", "data.encoding", "data.module"}
TRAINING = {f"training.{name}" for name in ("callbacks", "fit", "fitting", "rounding", "stage")}
# What every training stage depends on.
STAGE = {"artifact", "evaluate", "processes.launch", "processes.ranks"} | ENCODER | TASK | DATA | TRAINING
# What all distillations share, whatever the method.
TAUGHT = {f"training.{name}" for name in ("distillation", "teacher_outputs", "teaching", "projections")}
DISTILLATION = TAUGHT | {"training.averages", "training.layer_maps"}
DISTILLATION |= {f"distillation.{name}" for name in ("relation", "relation_blocks")}
LAYERS = {f"quantization.{name}" for name in ("affine", "base", "layers", "model", "packing", "ranges", "weights")}
# What runs beside a computation and tells of it (a log, curves), and examples, whose content is in the key.
BESIDE = {"edgemin.study.job", "edgemin.tracking", "edgemin.data.examples"}


KIND = Classification()


def modules(*names: str) -> set[str]:
    return {name.removeprefix("edgemin.") for name in digest.code_modules(*names)}


def step(node: Node) -> Stage:
    assert node.step is not None
    return node.step


def of_stage(name: str, *overrides: str) -> tuple[str, ...]:
    """The modules that the stage of a study names, as planning takes them."""
    node = next(node for node in studies.plan(*overrides).nodes if node.path.endswith(f"student/{name}"))
    assert node.parent is not None
    return plan.stage_code(step(node).planned, (node.parent, *node.teachers), KIND)


EVALUATION = (*scoring.EVALUATION_CODE, KIND.module)
# A distillation on a corpus.
CORPUS = ("distill.corpus_length=16", "distill.epochs=null", "stages=[distill,finetune]")
# The results of a study by the modules that they name.
RESULTS: dict[str, Callable[[], tuple[str, ...]]] = {
    "root": lambda: plan.ROOT_CODE,
    "fine-tuning": lambda: of_stage("finetune"),
    "distillation": lambda: of_stage("finetune/distill"),
    "pruning": lambda: of_stage("finetune/distill/prune"),
    "pruning by weights": lambda: of_stage("finetune/distill/prune", "prune.criterion=magnitude"),
    "pruning to a budget": lambda: of_stage(
        "finetune/distill/prune", "prune.target.measure=macs", "prune.target.factor=0.9"
    ),
    "pruning with a teacher": lambda: of_stage("finetune/distill/prune", "prune.teacher=teacher"),
    "quantization": lambda: of_stage("finetune/quantize", "stages=[finetune,quantize]", "quantize=static"),
    "fine-tuning of a quantized model": lambda: of_stage(
        "finetune/quantize/finetune", "stages=[finetune,quantize,finetune]", "quantize=static"
    ),
    "dynamic quantization": lambda: of_stage("finetune/quantize", "stages=[finetune,quantize]", "quantize=dynamic"),
    "evaluation": lambda: EVALUATION,
    "evaluation of a quantized model": lambda: (*EVALUATION, "edgemin.quantization.model"),
    "teacher outputs": lambda: (teacher_outputs.CODE,),
    "cost": lambda: ("edgemin.measure.cost",),
    "measurement": lambda: (*runtimes.MEASURE_CODE, "edgemin.deploy.torch_eager"),
}


def test_the_modules_in_a_key_are_these() -> None:
    """Whoever adds a module to a list here makes every result of that kind again, in every store."""
    found = {name: modules(*named()) for name, named in RESULTS.items()}
    assert found["fine-tuning"] == STAGE | {"finetune"} and len(found["fine-tuning"]) <= 23
    assert found["distillation"] == STAGE | DISTILLATION | {"distillation.minilmv2"}
    own = ("stage", "amount", "shares", "importance", "ranking", "several", "selection", "structures", "unit_weights")
    own += ("findings", "taught", "criteria.base")
    pruning = {f"pruning.{name}" for name in own} | STAGE | TAUGHT | {"training.method_sum"}
    pruning |= {f"encoder.{name}" for name in ("slicing", "truncation", "rotation", "stream", "magnitude")}
    assert found["pruning"] == pruning | {"pruning.criteria.gradients"}
    assert found["pruning by weights"] == pruning | {"pruning.criteria.weights"}
    search = {"pruning.by_target", "pruning.target", "pruning.budget", "encoder.operations", "training.latency"}
    assert found["pruning to a budget"] == found["pruning"] | search
    methods = DISTILLATION | {"distillation.logits", "distillation.minilmv2", "training.soft_targets"}
    assert found["pruning with a teacher"] == found["pruning"] | methods, "methods are in the key where one teaches"
    assert found["evaluation"] == ENCODER | TASK | (DATA - {"data.module"}) | {"artifact", "evaluate"}
    roots = {f"encoder.{name}" for name in ("magnitude", "rotation", "shapes", "slicing", "stream")}
    roots |= {"encoder.truncation", "encoder.weights_file"}
    assert found["root"] == ENCODER | roots | {"artifact", "checkpoint", "study.roots", "toy"}
    sliced = {"encoder.slicing", "processes.launch", "processes.ranks"}
    assert found["evaluation of a quantized model"] == found["evaluation"] | LAYERS | sliced
    assert found["fine-tuning of a quantized model"] == found["fine-tuning"] | LAYERS | sliced
    assert "quantization.torch_layers" in found["dynamic quantization"]
    assert not any(name.startswith("quantization.") for name in found["measurement"] | found["cost"])


def test_the_methods_of_a_pruning_are_in_its_key_where_one_teaches() -> None:
    for teacher, decides in (("null", False), ("teacher", True)):
        keys = [
            studies.plan(f"prune.teacher={teacher}", *more).nodes for more in ((), ("prune.methods.answers.weight=2",))
        ]
        assert keys[0][-1].path.endswith("/prune/dynamic_int8")
        before, after = ({node.path: node.key for node in nodes} for nodes in keys)
        changed = {path for path in before if before[path] != after[path]}
        assert changed == ({path for path in before if "/prune" in path} if decides else set())


def test_a_corpus_is_in_the_key_of_what_reads_it(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a good film\nand a bad one\n" * 20)
    reader = {"data.corpus", "data.mixture", "data.packing", "data.tokens"}
    on_corpus = modules(*of_stage("distill", f"distill.corpus={tmp_path}", *CORPUS))
    assert on_corpus >= reader
    assert not reader & modules(*of_stage("finetune/distill"))


IMPORTING = """
import os, sys
import datasets, pytorch_lightning, torch, transformers  # once for all
for line in sys.argv[1:]:
    if not os.fork():
        for module in line.split():
            __import__(module)
        print(line, "|", *(name for name in sys.modules if name.startswith("edgemin.")), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_whatever_is_imported_is_in_the_key() -> None:
    """Python itself says what modules load; a key may leave out what decides nothing."""
    named = {" ".join(of()): of() for of in RESULTS.values()}
    done = subprocess.run([sys.executable, "-c", IMPORTING, *named], check=True, capture_output=True, text=True)
    packages = {".".join(path.relative_to(Path(plan.__file__).parents[2]).parts[:-1]) for path in inits()}
    lines = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert lines.keys() == named.keys()
    for line, loaded in lines.items():
        unseen = set(loaded.split()) - packages - set(digest.code_modules(*named[line]))
        assert all(module.startswith(digest.DECIDES_NOTHING) for module in unseen), (line, unseen)


def inits() -> list[Path]:
    return list(Path(plan.__file__).parents[1].rglob("__init__.py"))


def test_packages_hold_nothing_but_their_docstring() -> None:
    """Their code would be in no key."""
    for path in inits():
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert path.parent.name == "edgemin" or ("".join(lines).count('"""') == 2 and lines[-1].endswith('"""')), path


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the package that the digest reads."""
    copy = tmp_path_factory.mktemp("copy") / "edgemin"
    source = Path(digest.__file__).parents[1]
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "_PACKAGE", copy)
        yield copy


def test_a_change_of_any_module_changes_the_keys_that_have_it_and_no_other(package: Path) -> None:
    """New code in each module of the package in turn."""
    named = {name: of() for name, of in RESULTS.items()}

    def digests() -> dict[str, str]:
        return {name: digest.code_digest.__wrapped__(*modules) for name, modules in named.items()}

    before = digests()
    holds = {name: modules(*of) for name, of in named.items()}
    changed_by: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        content = path.read_text()
        path.write_text(f"{content}\nEXTRA = 1\n")
        after = digests()
        path.write_text(content)
        changed_by[module] = {name for name in before if after[name] != before[name]}
        assert changed_by[module] == {name for name in holds if module in holds[name]}, module
    assert digests() == before
    trained = {"fine-tuning", "distillation", "pruning", "root", "evaluation", "teacher outputs"}
    for module in ("quantization.qat", "quantization.layers", "measure.runtime", "report.tables", "data.corpus"):
        assert not changed_by[module] & trained, module
    by_gradients = {"pruning", "pruning to a budget", "pruning with a teacher"}
    assert changed_by["pruning.criteria.gradients"] == by_gradients
    assert changed_by["pruning.selection"] == by_gradients | {"pruning by weights"}
    assert "pruning" not in changed_by["distillation.minilmv2"] | changed_by["distillation.logits"]
    assert changed_by["pruning.criteria.weights"] == {"pruning by weights"}
    assert not changed_by["pruning.criteria.table"], "a new criterion prunes no model again"
    assert not changed_by["tasks.table"] | changed_by["tasks.regression"], "another kind of task trains no model again"
    assert not changed_by["tasks.classification"] & {"root", "teacher outputs", "cost", "measurement"}
    assert changed_by["quantization.layers"] >= {"fine-tuning of a quantized model", "evaluation of a quantized model"}


# --- what runs ---------------------------------------------------------------------------------------------


class Trace:
    """The modules of this package whose code runs while a result is computed, by result."""

    def __init__(self) -> None:
        self.seen: dict[str, set[str]] = {}
        self._result: str | None = None

    def of(self, name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its calls recorded under the result that `name` gives for their arguments."""

        def watched(*given: Any, **named: Any) -> Any:
            self._result = name(*given, **named)
            self.seen.setdefault(self._result, set())
            sys.setprofile(self._call)
            threading.setprofile(self._call)
            try:
                return function(*given, **named)
            finally:
                sys.setprofile(None)
                threading.setprofile(None)
                self._result = None

        return watched

    def _call(self, frame: FrameType, event: str, argument: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and self._result is not None and module.startswith("edgemin."):
            self.seen[self._result].add(module)


@pytest.mark.parametrize(
    "overrides",
    [
        ("stages=[finetune,quantize,distill,prune]", "quantize=static", "distill.teacher_cache=true"),
        (
            *("stages=[finetune,prune,quantize]", "prune.criterion=weight_product"),
            *("quantize=qat_distill", "quantize.epochs=null", "quantize.steps=2"),
        ),
        ("stages=[finetune,quantize]", "quantize=dynamic"),
        ("distill.corpus={corpus}", *CORPUS),
    ],
    ids=["static first", "qat", "dynamic", "corpus"],
)
def test_whatever_runs_while_a_result_is_computed_is_in_its_key(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "text.txt").write_text("a good film\nand a bad one\n" * 50)
    overrides = tuple(word.format(corpus=corpus) for word in overrides)
    trace = Trace()
    fit = trace.of(lambda *given, **named: str(named["name"]), pipeline.fitting.run)
    monkeypatch.setattr(pipeline.fitting, "run", fit)
    monkeypatch.setattr(scoring, "evaluate", trace.of(lambda *given, **named: "evaluation", scoring.evaluate))
    studies.run(tmp_path / "run", *overrides)
    nodes = {node.path: node for node in studies.plan(*overrides).nodes}
    assert trace.seen.keys() == {path for path in nodes if "/" in path} | {"evaluation"}
    for path, ran in trace.seen.items():
        if path == "evaluation":
            held = set(digest.code_modules(*EVALUATION, *exports.providers(*nodes.values())))
        else:
            node = nodes[path]
            assert node.parent is not None
            held = set(digest.code_modules(*plan.stage_code(step(node).planned, (node.parent, *node.teachers), KIND)))
        unseen = {module for module in ran - held - BESIDE if not module.startswith(digest.DECIDES_NOTHING)}
        assert not unseen, path
