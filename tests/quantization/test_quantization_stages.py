"""Quantization as stages: saved and reloaded, in any order, trained on, refused."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import studies
import tiny
import torch
from safetensors import safe_open
from torch import nn

from edgemin import artifact, checkpoint
from edgemin.data.module import DataModule
from edgemin.distillation.logits import LogitsDistillation
from edgemin.encoder import parts, slicing
from edgemin.encoder import quantized as quantized_encoder
from edgemin.errors import UserError
from edgemin.finetune import Finetune
from edgemin.pruning.stage import Pruning
from edgemin.quantization import model as quantization
from edgemin.quantization.post_training import PostTraining
from edgemin.quantization.qat import QuantizationAware
from edgemin.quantization.reconstruct import Reconstruction
from edgemin.quantization.weights import Granularity, Spec
from edgemin.training.stage import Effect
from edgemin.training.teacher_outputs import fingerprint

WAYS: list[dict[str, Any]] = [
    {},
    {"activations": "dynamic", "bits": 4},
    {"activations": "none", "bits": 3, "granularity": "group", "group_size": 8, "embedding_bits": 4},
    {"bits": 2, "granularity": "group", "group_size": 16, "activation_range": "mse"},
    {"granularity": "tensor", "exempt": [], "activation_range": "moving_average"},
]
BUDGET: dict[str, Any] = {"steps": 2, "batch_size": 8, "learning_rate": 1e-3}
ANSWERS = {
    "_target_": "edgemin.distillation.logits.LogitsDistillation",
    "weight": 1.0,
    "temperature": 1.0,
    "alpha": 1.0,
}
RELATIONS = {
    "_target_": "edgemin.distillation.minilmv2.MiniLMv2",
    "weight": 1.0,
    "relation_heads": 4,
    "relations": {"qq": 1.0, "kk": 1.0, "vv": 1.0},
    "layer_map": "layer_to_layer",
}


def quantized(family: str, data: DataModule, work: Path, **settings: Any) -> Any:
    given = {"calibration_examples": 16} | settings
    stage = tiny.stage(PostTraining, **given)
    stage.planned = Effect(tiny.SMALL, (), quantizes="integers")  # groups that planning would refuse are tried too
    return tiny.fit(stage, tiny.model(family), data, work=work).model


def reloaded(model: Any, directory: Path) -> Any:
    directory.mkdir(parents=True)
    artifact.save(directory, model, None, {})
    return artifact.load(directory)[0]


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "electra"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_is_saved_comes_back_with_equal_logits(
    family: str, way: dict[str, Any], data: DataModule, batch: Any, tmp_path: Path
) -> None:
    model = quantized(family, data, tmp_path / "work", **way)
    found = reloaded(model, tmp_path / "saved")
    assert torch.equal(tiny.logits(found, batch), tiny.logits(model, batch))
    assert quantized_encoder.outline(found) == quantized_encoder.outline(model)
    with safe_open(tmp_path / "saved" / artifact.WEIGHTS, "pt") as file:
        for path, layer in quantization.quantized_layers(model).items():
            packed = file.get_tensor(f"{path}.weight_packed")
            rows, columns = layer.weight.shape
            assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-columns * layer.spec.bits // 8))
            assert f"{path}.weight" not in file.keys()  # noqa: SIM118 - it is no mapping


def test_thirty_two_bits_are_what_was(data: DataModule, batch: Any, tmp_path: Path) -> None:
    model = quantized("bert", data, tmp_path, bits=32)
    assert torch.equal(tiny.logits(model, batch), tiny.logits(tiny.model(), batch))
    assert not quantization.quantized_layers(model)
    tables = quantized("bert", data, tmp_path / "tables", bits=32, embedding_bits=4)
    assert {layer.spec.bits for layer in quantization.quantized_layers(tables).values()} == {4}
    assert len(quantization.quantized_layers(tables)) == 3


@pytest.mark.parametrize(
    ("asked", "tables"),
    [
        ({"embedding_bits": 4}, ("group", 8)),
        ({"embedding_bits": 8}, ("channel", None)),
        ({"embedding_bits": 4, "embedding_granularity": "channel"}, ("channel", None)),
        ({"embedding_bits": 8, "embedding_granularity": "group"}, ("group", 8)),
        ({"embedding_bits": 4, "granularity": "tensor"}, ("tensor", None)),
        ({"embedding_bits": 4, "group_size": 7}, ("channel", None)),  # divides no width
    ],
)
def test_tables_of_few_bits_have_scales_of_their_own(
    asked: dict[str, Any], tables: tuple[str, int | None], data: DataModule, batch: Any, tmp_path: Path
) -> None:
    model = quantized("bert", data, tmp_path, **{"group_size": 8} | asked)
    specs = {path: layer.spec for path, layer in quantization.quantized_layers(model).items()}
    found = {(spec.granularity, spec.group_size) for path, spec in specs.items() if "embeddings" in path}
    assert found == {tables}
    rest = {(spec.granularity, spec.group_size) for path, spec in specs.items() if "embeddings" not in path}
    assert rest == {(asked.get("granularity", "channel"), None)}
    assert torch.equal(tiny.logits(reloaded(model, tmp_path / "saved"), batch), tiny.logits(model, batch))


def test_one_scale_for_a_row_drowns_the_columns_beside_a_large_one() -> None:
    """Why tables of few bits have groups: the error of the other columns, by each sharing of scales."""
    torch.manual_seed(1)
    table = nn.Embedding(50, 16)
    with torch.no_grad():
        table.weight[:, 0] *= 30
    errors = {}
    ways: list[tuple[Granularity, int | None]] = [("channel", None), ("group", 8)]
    for granularity, size in ways:
        layer = quantization.quantized_layer(table, Spec(4, granularity, size, "none"), "mse")
        errors[granularity] = float((layer.quantized_weight() - table.weight).detach()[:, 8:].square().mean())
    assert errors["group"] < errors["channel"] / 10


def test_a_static_model_is_its_float64_reference(data: DataModule, batch: Any, tmp_path: Path) -> None:
    """One layer's output, by the equations, from what the file holds."""
    model = quantized("bert", data, tmp_path)
    path = "bert.encoder.layer.0.intermediate.dense"
    layer = model.get_submodule(path)
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _m, inputs, output: seen.extend([inputs[0], output]))
    tiny.logits(model, batch)
    handle.remove()
    given, found = seen[0].double().numpy(), seen[1].numpy()
    scale, zero = float(layer.input_scale), float(layer.input_zero_point)
    read = (np.clip(np.round(given / scale) + zero, 0, 255) - zero) * scale
    weight = layer.integers().double().numpy() * layer.weight_scale.double().numpy()
    assert np.abs(read @ weight.T + layer.bias.detach().double().numpy() - found).max() < 1e-5
    assert np.abs(layer.integers().numpy()).max() <= 127


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_heads_ffn_and_layers_are_cut_as_integers(
    granularity: Any, data: DataModule, batch: Any, tmp_path: Path
) -> None:
    """Groups of 8 are whole heads: nothing is chosen again."""
    model = quantized("bert", data, tmp_path, granularity=granularity, group_size=8, bits=4)
    before = {path: layer.integers() for path, layer in quantization.quantized_layers(model).items()}
    slicing.slice_heads(model, 1, [0, 3])
    slicing.slice_ffn(model, 1, range(16, 48))
    part = "bert.encoder.layer.1."
    after = {path: layer.integers() for path, layer in quantization.quantized_layers(model).items()}
    heads = [*range(8), *range(24, 32)]
    assert torch.equal(after[f"{part}attention.self.query"], before[f"{part}attention.self.query"][heads])
    assert torch.equal(after[f"{part}attention.output.dense"], before[f"{part}attention.output.dense"][:, heads])
    assert torch.equal(after[f"{part}output.dense"], before[f"{part}output.dense"][:, 16:48])
    slicing.slice_layers(model, [0, 1])
    slicing.slice_vocabulary(model, range(40))
    slicing.slice_hidden(model, range(16))
    words = "bert.embeddings.word_embeddings"
    assert torch.equal(model.get_submodule(words).integers(), before[words][:40, :16])
    assert sum(layer.rescaled for layer in quantization.quantized_layers(model).values()) == 0
    quantized_encoder.settle(model)
    found = reloaded(model, tmp_path / "cut")
    small = {name: tensor.clamp(max=39) if name == "input_ids" else tensor for name, tensor in batch.items()}
    assert torch.equal(tiny.logits(found, small), tiny.logits(model, small))


@pytest.mark.parametrize("later", ["finetune", "prune", "prune ffn", "prune layers", "distill"])
def test_what_comes_later_leaves_a_quantized_model(later: str, data: DataModule, batch: Any, tmp_path: Path) -> None:
    start = quantized("bert", data, tmp_path / "first", granularity="group", group_size=16)
    fit: dict[str, Any] = {**BUDGET, "learning_rate": 3e-2}
    stages = {
        "finetune": tiny.stage(Finetune, **fit),
        "prune": tiny.stage(Pruning, ratio=0.25, calibration_examples=8, **fit),
        "prune ffn": tiny.stage(Pruning, structure="ffn", ratio=0.25, calibration_examples=8, **fit),
        "prune layers": tiny.stage(Pruning, structure="layers", scope="global", ratio=0.4, criterion="random", **fit),
        "distill": tiny.stage(LogitsDistillation, temperature=1.0, alpha=1.0, **fit),
    }
    done = tiny.fit(
        stages[later], start, data, [tiny.model(seed=7)] if later == "distill" else [], work=tmp_path / "then"
    )
    assert len(quantization.static_layers(done.model)) == (13 if later == "prune layers" else 19)
    assert done.findings["quantization"]["activations"] == "static"
    assert any("groups of weights again" in note for note in done.notes) == (later in ("prune", "prune ffn"))
    assert torch.equal(tiny.logits(reloaded(done.model, tmp_path / "saved"), batch), tiny.logits(done.model, batch))


def test_a_later_stage_that_changes_nothing_leaves_the_logits_as_they_are(
    data: DataModule, batch: Any, tmp_path: Path
) -> None:
    start = quantized("bert", data, tmp_path / "first")
    before = tiny.logits(start, batch)
    done = tiny.fit(tiny.stage(Pruning, ratio=0.0, epochs=0), start, data, work=tmp_path / "then")
    assert torch.equal(tiny.logits(done.model, batch), before)


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ("classifier", None, {"bits": 8, "granularity": "channel", "group_size": None, "activations": "none"}),
        ("bert.pooler", None, {"bits": 8, "granularity": "channel", "group_size": None, "activations": "none"}),
        ("bert.pooler.dense", "bits", 5),
        ("bert.pooler.dense", "bits", 4),
        ("bert.pooler.dense", "granularity", "group"),
        ("bert.pooler.dense", "activations", "learned"),
        ("bert.pooler.dense", "surprise", 1),
    ],
)
def test_a_structure_that_does_not_fit_its_file_is_refused_in_one_line(
    path: str, key: str | None, value: Any, data: DataModule, tmp_path: Path
) -> None:
    reloaded(quantized("bert", data, tmp_path / "work"), tmp_path / "saved")
    file = tmp_path / "saved" / artifact.STRUCTURE
    structure = json.loads(file.read_text())
    layers = structure["quantized"]["layers"]
    if key is None:
        layers[path] = value
    else:
        layers[path][key] = value
    file.write_text(json.dumps(structure))
    with pytest.raises(UserError, match=r"^artifact [^\n]*$"):
        artifact.load(tmp_path / "saved")


# Quantization-aware training


def test_no_steps_are_post_training_quantization(data: DataModule, batch: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"bits": 4, "calibration_examples": 16}
    plain = quantized("bert", data, tmp_path / "plain", **settings)
    trained = tiny.fit(
        tiny.stage(QuantizationAware, methods={}, steps=0, **settings), tiny.model(), data, work=tmp_path / "qat"
    ).model
    assert torch.equal(tiny.logits(plain, batch), tiny.logits(trained, batch))


@pytest.mark.parametrize("scales", ["fixed", "moving", "learned"])
def test_a_killed_training_goes_on_as_if_nothing_had_been(
    scales: Any, data: DataModule, batch: Any, tmp_path: Path
) -> None:
    def stage() -> QuantizationAware:
        fit: dict[str, Any] = {**BUDGET, "steps": 6, "calibration_examples": 16, "task_weight": 1.0}
        return tiny.stage(
            QuantizationAware, methods={}, scales=scales, granularity="group", group_size=16, bits=3, **fit
        )

    whole = tiny.fit(stage(), tiny.model(), data, work=tmp_path / "whole").model
    with pytest.raises(tiny.KilledError):
        tiny.fit(stage(), tiny.model(), data, work=tmp_path / "cut", seconds=0, callbacks=[tiny.Kill(4)])
    gone_on = tiny.fit(stage(), tiny.model(), data, work=tmp_path / "cut").model
    assert torch.equal(tiny.logits(whole, batch), tiny.logits(gone_on, batch))
    assert not any(name.endswith("_scale") for name, _ in whole.named_parameters())
    assert torch.equal(tiny.logits(reloaded(whole, tmp_path / "saved"), batch), tiny.logits(whole, batch))


def test_training_of_scales_moves_nothing_else(data: DataModule, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**BUDGET, "learning_rate": 1e-2, "calibration_examples": 16, "task_weight": 1.0}
    start = tiny.model()
    biases = {name: tensor.clone() for name, tensor in start.state_dict().items() if name.endswith("bias")}
    trained = tiny.fit(
        tiny.stage(QuantizationAware, methods={}, train="scales", **settings), start, data, work=tmp_path / "qat"
    ).model
    for name, tensor in biases.items():
        assert torch.equal(trained.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_training_on_the_calibration_sentences_sees_no_other(data: DataModule, tmp_path: Path) -> None:
    stage = tiny.stage(
        QuantizationAware,
        methods={},
        train_on="calibration",
        calibration_examples=5,
        task_weight=1.0,
        epochs=3,
        batch_size=2,
    )
    stage.seed = 4
    tiny.plan(stage, tiny.model())
    stage.prepare(tiny.model(), data)
    seen = [int(index) for batch in stage.batches(stage.settings) for index in batch["index"]]
    assert sorted(set(seen)) == sorted(data.drawn(5, 4).tolist()) and len(seen) == 15


def test_scales_do_not_decay(data: DataModule, tmp_path: Path) -> None:
    decays: dict[str, float] = {}

    class Look(QuantizationAware):
        def configure_optimizers(self) -> Any:
            self.other_scale = nn.Parameter(torch.ones(2, 2))  # the name makes no scale
            made = super().configure_optimizers()
            names = {id(parameter): name for name, parameter in self.named_parameters()}
            for group in made["optimizer"].param_groups:
                decays.update({names[id(parameter)]: group["weight_decay"] for parameter in group["params"]})
            return made

    fit: dict[str, Any] = {**BUDGET, "weight_decay": 0.1, "task_weight": 1.0, "calibration_examples": 8}
    tiny.fit(tiny.stage(Look, methods={}, granularity="group", group_size=8, **fit), tiny.model(), data, work=tmp_path)
    scales = {name: decay for name, decay in decays.items() if name.endswith("_scale")}
    assert scales.pop("other_scale") == 0.1
    assert len(scales) == 22 + 19 and set(scales.values()) == {0.0}
    assert decays["model.bert.encoder.layer.0.output.dense.weight"] == 0.1


@pytest.mark.parametrize("methods", [{"answers": ANSWERS}, {"answers": ANSWERS, "relations": RELATIONS}], ids=len)
def test_distillation_brings_the_quantized_model_nearer_to_its_teacher(
    methods: Any, data: DataModule, batch: Any, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"bits": 2, "calibration_examples": 16, "activations": "none", "granularity": "tensor"}
    stage = tiny.stage(
        QuantizationAware,
        methods=methods,
        task_weight=0.0,
        **{**BUDGET, "steps": 40, "learning_rate": 3e-4},
        **settings,
    )
    assert stage.teachers == ("parent",)
    teacher = tiny.model(dropout=0.0)
    trained = tiny.fit(stage, tiny.model(dropout=0.0), data, [teacher], work=tmp_path / "qat").model
    plain = quantized("bert", data, tmp_path / "plain", **settings)
    wanted = tiny.logits(tiny.model(), batch)
    before, after = ((tiny.logits(model, batch) - wanted).square().mean() for model in (plain, trained))
    assert float(after) < 0.3 * float(before)


# In the pipeline


@pytest.mark.parametrize("how", ["static", "qat"])
@pytest.mark.parametrize("order", list(permutations(["distill", "prune", "quantize"])), ids="-".join)
def test_every_order_runs_is_scored_and_reloads(order: tuple[str, ...], how: str, tmp_path: Path) -> None:
    asked = ["finetune", *order]
    extra = ["quantize.steps=2"] if how == "qat" else []
    found = studies.run(
        tmp_path / "0",
        f"quantize={how}",
        *extra,
        "quantize.calibration_examples=16",
        "quantize.granularity=group",
        "quantize.group_size=8",
        "evaluate.max_drop=1",
        f"stages=[{','.join(asked)}]",
    )
    last = found["rows"][-1]
    assert last["stages"] == asked and 0 <= last["metrics"]["toy"]["validation"]["accuracy"] <= 1
    assert last["findings"]["quantization"]["bits"]
    structure = json.loads((tmp_path / "0/store" / last["artifact"] / artifact.STRUCTURE).read_text())
    assert structure["quantized"]["layers"] and structure["layers"][0]["heads"] == 3
    gated = [row for row in found["rows"] if "gate" in row]
    assert [row["name"] for row in gated] == [row["name"] for row in found["rows"] if row["made_from"]]
    assert all(row["gate"]["passed"] != row["gate"]["collapsed"] for row in gated)  # so few steps may end in one answer


def test_a_quantized_artifact_is_a_source_that_is_cut_and_trained(data: DataModule, tmp_path: Path) -> None:
    model = quantized("bert", data, tmp_path / "work", granularity="group", group_size=16)
    folder = tmp_path / "saved"
    folder.mkdir()
    artifact.save(folder, model, data.tokenizer, {"head_trained": True})
    whole = [f"student.{width}=null" for width in ("hidden", "heads", "intermediate")]
    plan = studies.plan(
        "student=from_teacher", f"student.source={folder}", "student.layers=2", *whole, "stages=[finetune,distill]"
    )
    assert plan.rows[-1].node.outline.quantized
    order = list(reversed(parts.label_names(model)))
    batch = data.train.batch([0, 1, 2])
    before = tiny.logits(model, batch)
    assert checkpoint.align_head(model, order, "single_label_classification")
    assert torch.equal(tiny.logits(model, batch), before.flip(1))


# Refusals


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["quantize.bits=5"], r"^quantize\.bits: expected 2, 3, 4, 8 or 32, given 5$"),
        (["quantize.embedding_bits=1"], r"^quantize\.embedding_bits: expected auto, 2, 3, 4, 8 or 32, given 1$"),
        (["quantize.granularity=row"], r"^quantize\.granularity: expected .*tensor.*channel.*group.*, given 'row'$"),
        (
            ["quantize.granularity=group", "quantize.group_size=7"],
            r"^quantize\.group_size: expected a divisor of 16, the width of bert\.embeddings\.\w+, given 7$",
        ),
        (
            ["quantize.exempt=[decoder]"],
            r"^quantize\.exempt\[0\]: expected embeddings, first.*'decoder', which matches none$",
        ),
        (
            ["quantize.calibration_examples=0"],
            r"^quantize\.calibration_examples: expected a whole number of at least 1",
        ),
        (
            ["quantize=qat", "quantize.corpus=texts", "quantize.epochs=null", "quantize.steps=2"],
            r"^quantize\.methods: expected at least one with a corpus, which has no labels to learn, given none$",
        ),
        (["evaluate.max_drop=2"], r"^evaluate\.max_drop: expected a share in \[0, 1\] or null, given 2$"),
        (["quantize.percentile=10"], r"^quantize\.percentile: expected a number in \(50, 100\], given 10$"),
        (
            ["quantize.size_mib=3"],
            r"^quantize\.size_mib: expected null with sensitivity=false, given 3$",
        ),
        (
            ["quantize.candidates=[6]"],
            r"^quantize\.candidates: expected a list, each entry 2, 3, 4 or 8, given \[6\]$",
        ),
        (["quantize.candidates=[4,4]"], r"^quantize\.candidates: expected different bits out of 2, 3, 4, 8, given"),
        (["quantize=qat", "quantize.train=scales", "quantize.scales=fixed"], r"^quantize\.scales: expected learned"),
        (["quantize=reconstruct", "quantize.patience=2"], r"^quantize\.patience: expected null"),
        (["quantize=reconstruct", "quantize.teacher_forcing=2"], r"^quantize\.teacher_forcing: expected a share"),
        (["quantize=dynamic", "quantize.bits=4"], r"^quantize\.bits: expected 8, all that torch's dynamic"),
    ],
)
def test_bad_settings_are_refused_in_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        studies.plan("order=distill_prune_quantize", *overrides)


def test_quantization_after_torchs_dynamic_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^stages: expected nothing after quantize, whose result .* given qat$"):
        studies.plan("quantize=dynamic", "+quantize@qat=qat", "stages=[finetune,quantize,qat]")
    with pytest.raises(UserError, match=r"^dynamic\._target_: expected a float model for torch's dynamic INT8"):
        studies.plan("quantize=static", "+quantize@dynamic=dynamic", "stages=[finetune,quantize,dynamic]")


BLOCKS = ("+quantize@blocks=reconstruct", "stages=[finetune,first,blocks]")
QAT = ("quantize=qat_distill", "stages=[finetune,first,quantize]")
TO_BLOCKS = r"^blocks\._target_: expected a model in full precision or quantized in another way[^\n]*$"
TO_QAT = r"^quantize\.teacher: expected another model than parent, [^\n]*, given parent$"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ((*BLOCKS, "+quantize@first=static"), TO_BLOCKS),
        ((*BLOCKS, "+quantize@first=static", "stages=[finetune,first,prune,blocks]"), TO_BLOCKS),
        ((*BLOCKS, "+quantize@first=static", "blocks.bits=2"), None),
        ((*BLOCKS, "+quantize@first=weight_only"), None),
        ((*BLOCKS, "+quantize@first=static", "first.exempt=[classifier,first]"), None),
        ((*BLOCKS, "+quantize@first=static", "first.sensitivity=true"), None),
        ((*BLOCKS, "+quantize@first=static", "first.bits=32", "blocks.bits=32"), None),
        ((*QAT, "+quantize@first=reconstruct"), TO_QAT),
        ((*QAT, "+quantize@first=reconstruct", "quantize.train=scales"), TO_QAT),
        ((*QAT, "+quantize@first=reconstruct", "quantize.teacher=teacher"), None),
        ((*QAT, "+quantize@first=reconstruct", "quantize.task_weight=1"), None),
        ((*QAT, "+quantize@first=reconstruct", "quantize.embedding_bits=4"), None),
        ((*QAT, "+quantize@first=reconstruct", "quantize=qat", "quantize.train=scales"), None),  # EfficientQAT
    ],
)
def test_nothing_learns_from_a_model_that_is_quantized_in_the_same_way(
    overrides: tuple[str, ...], line: str | None
) -> None:
    if line is None:
        assert studies.plan(*overrides).rows[-1].node.outline.quantized
        return
    with pytest.raises(UserError, match=line):
        studies.plan(*overrides)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("quantize.task_weight=0",),
            r"^quantize\.task_weight: expected auto or a number above 0 [^\n]* given 0[^\n]*$",
        ),
        (("quantize.teacher=teacher",), r"^quantize\.teacher: expected null without methods [^\n]* given teacher$"),
        (("quantize.teacher_cache=true",), r"^quantize\.teacher_cache: expected false without methods, given true$"),
    ],
)
def test_training_on_labels_alone_takes_no_teacher_and_has_something_to_learn(
    overrides: tuple[str, ...], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        studies.plan("quantize=qat", "quantize.steps=2", "stages=[finetune,quantize]", *overrides)


def test_nor_from_one_that_was_so_when_it_came(data: DataModule, tmp_path: Path) -> None:
    start = reloaded(quantized("bert", data, tmp_path / "work"), tmp_path / "saved")
    with pytest.raises(UserError, match=r"^_target_: expected a model in full precision or quantized in another way"):
        tiny.plan(tiny.stage(Reconstruction, **BUDGET), start)
    tiny.plan(tiny.stage(Reconstruction, **BUDGET, bits=4), start)


def test_what_activations_are_rounded_to_is_part_of_a_fingerprint(data: DataModule, tmp_path: Path) -> None:
    """Neither way has tensors of its own, and the logits differ."""
    ways = ("none", "dynamic")
    models = [quantized("bert", data, tmp_path / way, activations=way, bits=4) for way in ways]
    assert tiny.same_weights(*models)
    assert fingerprint(models[0]) != fingerprint(models[1])


def test_static_activations_need_a_task() -> None:
    with pytest.raises(
        UserError, match=r"^stages: expected only stages that need no data with task=none, given quantize$"
    ):
        studies.plan(
            "task=none",
            "teacher.tokenizer=null",
            "teacher.vocabulary=50",
            "student.vocabulary=50",
            "teacher.stages=[]",
            "quantize=static",
            "stages=[quantize]",
        )


def test_activations_that_are_not_finite_name_the_layer(data: DataModule, tmp_path: Path) -> None:
    model = tiny.model()
    with torch.no_grad():
        model.get_submodule("bert.encoder.layer.1.intermediate.dense").weight[0, 0] = float("inf")
    line = r"^calibration: expected finite activations, given .* in what bert\.encoder\.layer\.1\.output\.dense reads$"
    with pytest.raises(UserError, match=line):
        tiny.fit(
            tiny.stage(PostTraining, bits=8, weight_range="minmax", exempt=["*layer.1.intermediate*"]),
            model,
            data,
            work=tmp_path,
        )
