"""Every file under conf/ composes, resolves and builds what it names."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import studies
import yaml
from hydra.utils import get_class
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from edgemin import config
from edgemin.study.order import row_specs
from edgemin.study.roots import Root
from edgemin.study.settings import conf_directory, one_line
from edgemin.training.stage import Stage

CONF = Path(conf_directory())
LAUNCHERS = {"joblib": "joblib", "slurm": "submitit", "ray": "ray"}
CHOICES = sorted(path for path in CONF.glob("*/*.yaml") if not path.stem.startswith("_"))
FILES = [path for path in CHOICES if path.parent.name != "launcher"]  # which need plugins
ORDERS = [path.stem for path in FILES if path.parent.name == "order"]
ASKING = {
    "student/checkpoint",
    "experiment/pruning",
    "experiment/shrink",
}  # for a checkpoint, which they have no default for
EXPERIMENTS = [path.stem for path in FILES if path.parent.name == "experiment"]


def name(path: Path) -> str:
    return path.relative_to(CONF).with_suffix("").as_posix()


def nodes(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The configuration nodes with a `_target_`, by their keys."""
    return {key: value for key, value in settings.items() if isinstance(value, dict) and "_target_" in value}


def stage_names(settings: dict[str, Any]) -> set[str]:
    own = {key: node["_target_"] for key, node in nodes(settings).items()}
    return {key for key, path in own.items() if issubclass(get_class(path), Stage)}


def own_stages(settings: dict[str, Any]) -> dict[str, list[str]]:
    """The stages of every model of a study that has a path of its own."""
    models = [key for key, node in nodes(settings).items() if node["_target_"] == "edgemin.study.roots.Root"]
    return {key: settings[key].get("stages", []) for key in models}


@cache
def composed(path: Path) -> dict[str, Any]:
    required = ["student.source=checkpoint"] if name(path) in ASKING else []
    return studies.settings(f"{path.parent.name}={path.stem}", *required, tiny=False)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_file_composes_and_its_nodes_construct(path: Path) -> None:
    for key, node in nodes(composed(path)).items():
        assert isinstance(config.construct(node, key), config.target(node, key))


def test_every_file_begins_by_saying_what_it_is() -> None:
    for path in CONF.rglob("*.yaml"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
        assert lines[0].startswith("# "), path


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_shows_every_setting_its_class_has(path: Path) -> None:
    for key, node in nodes(composed(path)).items():
        hidden = set(config.accepted(config.target(node, key))) - set(node)
        assert hidden == ({"stages"} if key == "student" else set()), key


def test_the_bare_command_is_the_papers_setup() -> None:
    settings = studies.settings(tiny=False)
    assert (settings["task"]["name"], settings["teacher"]["name"], settings["student"]["name"]) == (
        "sst2",
        "distilbert",
        "minilm_l12",
    )
    assert settings["stages"] is None and settings["dynamic_int8"]["_target_"].endswith(".DynamicQuantization")
    assert settings["quantize"]["_target_"].endswith(".PostTraining"), "the group is what train.yaml says"
    assert (settings["prune"]["ratio"], settings["prune"]["scope"]) == (0.2, "layer")
    specs = row_specs(settings["order"], settings["stages"], own_stages(settings))
    assert [(spec.model, spec.stages) for spec in specs] == [
        ("teacher", ("finetune",)),
        ("student", ("finetune",)),
        ("student", ("finetune", "distill")),
        ("student", ("finetune", "distill", "prune")),
        ("student", ("finetune", "distill", "dynamic_int8")),
        ("student", ("finetune", "distill", "prune", "dynamic_int8")),
    ]
    assert not any(spec.control for spec in specs)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_and_controls_of_an_order_name_stages_that_exist(order: str) -> None:
    settings = composed(CONF / f"order/{order}.yaml")
    specs = row_specs(settings["order"], settings["stages"], own_stages(settings))
    assert settings["order"]["name"] == order
    assert {stage for spec in specs for stage in spec.stages} <= stage_names(settings)
    assert tuple(settings["order"]["stages"]) in {spec.stages for spec in specs if not spec.control}
    assert specs[0].model == ("student" if order == "quantize" else "teacher")


@pytest.mark.parametrize(
    "order", [order for order in ORDERS if composed(CONF / f"order/{order}.yaml")["order"]["controls"]]
)
def test_controls_follow_the_budget_of_what_they_control(order: str) -> None:
    changed = ["distill.steps=7", "distill.batch_size=3", "prune.ratio=0.4", "prune.epochs=9", "prune.rounds=2"]
    settings = studies.settings(f"order={order}", *changed, tiny=False)
    assert (settings["no_teacher"]["steps"], settings["no_teacher"]["batch_size"]) == (7, 3)
    assert ("random_prune" in settings) == ("prune" in settings["order"]["stages"])
    if "random_prune" in settings:
        control = settings["random_prune"]
        assert (control["ratio"], control["epochs"], control["rounds"], control["criterion"]) == (0.4, 9, 2, "random")


def test_what_follows_another_stage_can_be_set_by_itself() -> None:
    own = ("no_teacher.epochs=1", "no_teacher.steps=null", "random_prune.ratio=0.3")
    settings = studies.settings(
        "order=distill_prune_quantize", "distill.warmup=0.4", "prune.rounds=2", *own, tiny=False
    )
    control, drawn = settings["no_teacher"], settings["random_prune"]
    assert (control["epochs"], control["steps"], control["warmup"]) == (1, None, 0.4)
    assert (drawn["ratio"], drawn["rounds"], settings["prune"]["ratio"]) == (0.3, 2, 0.2)


@pytest.mark.parametrize(("order", "teacher"), [("methods", "assistant"), ("assistant", None)])
def test_all_distillations_of_an_order_have_one_budget_and_corpus(order: str, teacher: str | None) -> None:
    changed = ("distill.teacher=assistant", "distill.teacher_cache=true", "distill.corpus_length=99", "distill.steps=7")
    settings = studies.settings(f"order={order}", *changed, tiny=False)
    specs = row_specs(settings["order"], settings["stages"], own_stages(settings))
    of_order = {stage for spec in specs for stage in spec.stages} - {"distill"}
    beside = [node for name, node in nodes(settings).items() if name in of_order and "corpus" in node]
    assert len(beside) == (10 if order == "methods" else 2)
    for node in beside:
        assert (node["teacher"], node["teacher_cache"], node["corpus_length"], node["steps"]) == (teacher, True, 99, 7)


def test_the_teacher_of_an_orders_distillation_is_not_that_of_a_pruning() -> None:
    changed = ("distill.teacher=assistant", "distill.teacher_cache=true")
    alone = studies.settings("order=assistant", *changed, tiny=False)["prune"]
    assert (alone["teacher"], alone["teacher_cache"]) == (None, False), "it learns from labels unless told otherwise"
    drawn = studies.settings("order=distill_prune_quantize", "prune.teacher=parent", tiny=False)["random_prune"]
    assert drawn["teacher"] == "parent", "a control recovers as what it controls"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_has_rows_and_sweeps_over_keys_that_exist(experiment: str) -> None:
    cfg = studies.compose(f"experiment={experiment}")
    for key in cfg.hydra.sweeper.get("params") or {}:
        assert OmegaConf.select(cfg, key, default=missing) is not missing, key
    settings = composed(CONF / f"experiment/{experiment}.yaml")
    assert settings["study"] == experiment
    specs = row_specs(settings["order"], settings["stages"], own_stages(settings))
    assert {stage for spec in specs for stage in spec.stages} <= stage_names(settings)
    if settings["published"] is not None:
        assert (CONF.parent / settings["published"]).is_file()


missing = object()


PUBLISHED: dict[str, dict[str, Any]] = {
    "minilmv2": {"steps": 400_000, "batch_size": 256, "learning_rate": 6e-4, "warmup": 0.01, "corpus_length": 512},
    "pkd": {"epochs": 4, "batch_size": 32, "learning_rate": 1e-5, "temperature": 10.0, "alpha": 0.7, "beta": 0.65},
    "tinybert": {"epochs": 13, "batch_size": 32, "learning_rate": 5e-5, "prediction_learning_rate": 3e-5},
    "mobilebert": {"steps": 240_000, "batch_size": 2048, "lower_rate": 0.1, "corpus_length": 512, "alpha": 0.5},
}


def test_published_budgets_are_those_of_a_method_and_say_where_from() -> None:
    assert {path.stem.removesuffix("_published") for path in CONF.glob("distill/*_published.yaml")} == set(PUBLISHED)
    for method, values in PUBLISHED.items():
        path = CONF / f"distill/{method}_published.yaml"
        node, usual = (composed(CONF / f"distill/{stem}.yaml")["distill"] for stem in (path.stem, method))
        assert {key: node[key] for key in values} == values
        assert node["_target_"] == usual["_target_"] and node.keys() == usual.keys()
        assert "/" in path.read_text().splitlines()[0], "the repository of its code"


def test_tinyberts_published_epochs_are_ten_and_three() -> None:
    stage = config.construct(composed(CONF / "distill/tinybert_published.yaml")["distill"], "distill", Stage)
    assert [fit.batches(32 * 1000) for fit in stage.fits()] == [10_000, 3_000]


def test_paper_is_the_papers_protocol() -> None:
    settings = composed(CONF / "experiment/paper.yaml")
    finetune, distill, prune = settings["finetune"], settings["distill"], settings["prune"]
    assert (finetune["epochs"], finetune["batch_size"], finetune["learning_rate"]) == (3, 16, 3e-5)
    assert (distill["steps"], distill["batch_size"], distill["learning_rate"]) == (500, 8, 5e-5)
    assert (distill["layer_map"], distill["relation_heads"], distill["task_weight"]) == ("layer_to_layer", 12, 1.0)
    assert (prune["epochs"], prune["learning_rate"], prune["ratio"], prune["importance"]) == (2, 2e-5, 0.2, "training")
    assert (settings["seed"], settings["task"]["max_length"]) == (42, 128)
    assert settings["evaluate"]["transfer"] == ["mnli", "qqp"]


def test_shrinking_asks_for_a_checkpoint_in_one_line_and_trains_nothing() -> None:
    with pytest.raises(OmegaConfBaseException) as asked:
        studies.settings("experiment=shrink", tiny=False)
    assert one_line(asked.value) == "student.source: expected a value, as there is no default, given none"
    settings = composed(CONF / "experiment/shrink.yaml")
    assert settings["teacher"]["source"] == settings["student"]["source"] and settings["teacher"]["stages"] == []
    assert settings["evaluate"]["max_drop"] == 0.01 and "openvino" in settings["measure"]["runtimes"]
    specs = row_specs(settings["order"], settings["stages"], own_stages(settings))
    assert [spec.stages for spec in specs] == [(), ("int8",), ("int4",), ("dynamic_int8",)]


@pytest.mark.parametrize("choice", ["joint", "movement", "vocab", "unstructured"])
def test_a_control_of_what_the_chosen_pruning_lacks_says_so(choice: str) -> None:
    with pytest.raises(OmegaConfBaseException) as asked:
        studies.settings("order=prune_distill_quantize", f"prune={choice}", tiny=False)
    line = r"prune: expected a choice with the setting \w+, which random_prune takes from it, given one without"
    assert re.fullmatch(line, one_line(asked.value))


def test_every_launcher_has_a_plugin() -> None:
    assert {path.stem for path in CONF.glob("launcher/*.yaml")} == set(LAUNCHERS)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_sets_what_its_plugin_has_and_nothing_of_a_study(launcher: str) -> None:
    plugin = f"hydra_{LAUNCHERS[launcher]}_launcher"
    if not studies.is_installed(plugin):
        pytest.skip(f"{plugin} is not installed")
    assert studies.compose(f"launcher={launcher}").hydra.launcher._target_.startswith(f"hydra_plugins.{plugin}.")
    assert studies.settings(f"launcher={launcher}", tiny=False) == studies.settings(tiny=False)


def test_teachers_and_students_of_one_name_are_one_model() -> None:
    shared = {path.stem for path in FILES if path.parent.name == "teacher"} - {"shape"}
    assert shared == {path.stem for path in FILES if path.parent.name == "student"} - {
        "shape",
        "from_teacher",
        "checkpoint",
    }
    for model in sorted(shared):
        settings = studies.settings(f"teacher={model}", f"student={model}", tiny=False)
        teacher, student = (config.construct(settings[key], key) for key in ("teacher", "student"))
        assert isinstance(teacher, Root) and isinstance(student, Root)
        assert (teacher.name, teacher.source) == (student.name, student.source) == (model, teacher.source)


def test_no_file_repeats_a_key() -> None:
    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: Strict, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = ["<<" if key.value == "<<" else loader.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), node.start_mark
        loader.flatten_mapping(node)
        return dict(loader.construct_pairs(node, deep=True))

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for path in [*CONF.rglob("*.yaml")]:
        yaml.load(path.read_text(), Strict)
