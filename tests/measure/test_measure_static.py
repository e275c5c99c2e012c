"""Parameters, bytes and operations: exact numbers, and torch's own counter for the Linear part."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from edgemin.encoder import building, slicing, taps
from edgemin.encoder.operations import operations
from edgemin.encoder.outline import LayerOutline, Outline
from edgemin.errors import UserError
from edgemin.measure.cost import static_cost
from edgemin.measure.params import count_parameters
from edgemin.measure.size import size_bytes

STUDENT = BertConfig(
    hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
)
TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**TINY, intermediate_size=48, num_labels=3),
    "electra": ElectraConfig(**TINY, intermediate_size=48, embedding_size=24),
    "distilbert": DistilBertConfig(vocab_size=101, dim=32, n_layers=3, n_heads=4, hidden_dim=48),
    "roberta": RobertaConfig(**TINY, intermediate_size=48, max_position_embeddings=64),
    "modernbert": ModernBertConfig(
        **TINY, intermediate_size=48, local_attention=8, global_attn_every_n_layers=2, pad_token_id=0
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def dynamic_int8(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)


def shape(layers: int, hidden: int, heads: int, ffn: int, pooler: bool = True, **changes: Any) -> Outline:
    layer = LayerOutline(**{"heads": heads, "head_size": 64, "ffn": ffn} | changes)
    head = ((hidden, hidden), (hidden, 2)) if pooler else ()
    return Outline("bert", hidden, 30522, 512, 2, hidden, 2, (layer,) * layers, head=head)


def test_the_student_has_33_36_million_weights_before_and_after_quantization() -> None:
    model = building.build(STUDENT)
    assert count_parameters(model) == {"params": 33_360_770, "params_visible": 33_360_770}
    assert count_parameters(dynamic_int8(model)) == {"params": 33_360_770, "params_visible": 11_937_024}


def test_the_teacher_has_66_96_million_weights() -> None:
    with torch.device("meta"):
        model = building.build(DistilBertConfig(num_labels=2))
    assert count_parameters(model)["params"] == 66_955_010


def test_a_shared_weight_counts_once_float_or_packed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(11, 8)
            self.output = nn.Linear(8, 11, bias=False)
            self.output.weight = self.words.weight
            self.first = nn.Linear(8, 8)
            self.again = self.first

    assert count_parameters(Tied())["params"] == 11 * 8 + 8 * 8 + 8
    packed = dynamic_int8(nn.Linear(8, 8))
    assert count_parameters(nn.Sequential(packed))["params"] == 8 * 8 + 8
    quantized = nn.ModuleDict({"first": dynamic_int8(nn.Sequential(nn.Linear(8, 8, bias=False)))[0]})
    quantized["again"] = quantized["first"]
    assert count_parameters(quantized) == {"params": 64, "params_visible": 0}


@pytest.mark.parametrize(
    ("outline", "giga_flops"),
    [
        (shape(6, 768, 12, 3072), 11.175),
        (shape(12, 384, 12, 1536, head_size=32), 5.738),
        (shape(12, 384, 10, 1536, head_size=32), 5.386),
        (shape(12, 768, 12, 3072), 22.348),
        (shape(24, 1024, 16, 4096), 78.922),
        (shape(6, 384, 12, 1536, head_size=32), 2.869),
    ],
    ids=["distilbert", "student", "minus 24 heads", "bert-base", "bert-large", "6x384"],
)
def test_operations_are_the_reference_numbers(outline: Outline, giga_flops: float) -> None:
    counted = operations(outline, 128)
    assert counted["flops"] == 2 * counted["macs"]
    assert counted["flops"] / 1e9 == pytest.approx(giga_flops, rel=1e-3)


def test_the_built_student_has_the_operations_of_the_formula_quantized_or_not() -> None:
    model = building.build(STUDENT)
    macs = 12 * (4 * 128 * 384**2 + 2 * 128**2 * 384 + 2 * 128 * 384 * 1536) + 384 * 384 + 384 * 2
    assert operations(building.outline(model))["macs"] == macs
    assert operations(building.outline(dynamic_int8(model)))["macs"] == macs  # type: ignore[arg-type]
    for layer in range(12):
        slicing.slice_heads(model, layer, range(2, 12))
    assert operations(building.outline(model))["flops"] / 1e9 == pytest.approx(5.386, rel=1e-3)


def test_a_gated_layer_with_a_window_takes_3nhi_and_the_window() -> None:
    hidden, ffn, length = 768, 1152, 512
    whole = operations(shape(1, hidden, 12, ffn, pooler=False, gated=True), length)["macs"]
    assert whole == 4 * length * hidden**2 + 2 * length**2 * hidden + 3 * length * hidden * ffn
    local = operations(shape(1, hidden, 12, ffn, pooler=False, gated=True, window=128), length)["macs"]
    assert whole - local == 2 * length * (length - 128) * hidden
    short = operations(shape(1, hidden, 12, ffn, pooler=False, gated=True, window=128), 100)
    assert short == operations(shape(1, hidden, 12, ffn, pooler=False, gated=True), 100)


def attention_macs(outline: Outline, length: int) -> int:
    """The two products of attention, written out query by query."""
    macs = 0
    for layer in outline.layers:
        assert layer.heads is not None
        for _query in range(length):
            for key in range(length):
                if layer.window is None or key < layer.window:
                    macs += 2 * layer.heads * layer.head_size
    return macs


@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_part_is_what_torch_counts(family: str, pruned: bool) -> None:
    length = 16
    model = building.build(FAMILIES[family]).eval()
    if pruned:
        slicing.slice_heads(model, 0, [0, 3])
        slicing.slice_ffn(model, 1, range(20))
    batch = {"input_ids": torch.arange(2, 2 + length)[None], "attention_mask": torch.ones(1, length).long()}
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        taps.logits(model, batch)
    counts = counter.get_flop_counts()["Global"]
    linear = sum(flops for operation, flops in counts.items() if "mm" in str(operation))
    outline = building.outline(model)
    assert linear == operations(outline, length)["flops"] - 2 * attention_macs(outline, length)


def test_size_adds_up_what_the_runtime_loads_and_nothing_else(tmp_path: Path) -> None:
    for name, count in {
        "model.safetensors": 1000,
        "config.json": 20,
        "structure.json": 3,
        "tokenizer.json": 500,
        "provenance.json": 70,
    }.items():
        (tmp_path / name).write_bytes(b"x" * count)
    assert size_bytes(tmp_path) == 1023
    model = building.build(FAMILIES["bert"])
    assert static_cost(model, tmp_path, length=16) == {
        **count_parameters(model),
        **operations(building.outline(model), 16),
        "runtimes": {"torch": {"size_bytes": 1023}},
    }


def test_an_artifact_without_its_weights_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"missing model\.safetensors, structure\.json") as caught:
        size_bytes(tmp_path)
    assert "\n" not in str(caught.value)
