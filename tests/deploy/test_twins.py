"""Twins of quantized layers, exported side by side in one small graph: what each runtime answers is what torch does."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgemin.deploy import onnx_file, open_vino, twins
from edgemin.deploy.onnx_runtime import OnnxRuntime
from edgemin.deploy.open_vino import OpenVINO
from edgemin.deploy.runtime import open_model
from edgemin.quantization.layers import QuantizedEmbedding, QuantizedLinear
from edgemin.quantization.weights import Spec

onnx_ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

GRANULARITY: list[tuple[Any, int | None]] = [("tensor", None), ("channel", None), ("group", 16)]
FORMS = [
    Spec(bits, granularity, size, activations)
    for bits, (granularity, size), activations in product((8, 4, 3, 2), GRANULARITY, ("static", "dynamic", "none"))
]
WIDTH = 40  # the last group of 16 columns is shorter, as a slice may leave it


def linear(spec: Spec, seed: int) -> QuantizedLinear:
    torch.manual_seed(seed)
    made = QuantizedLinear(nn.Linear(WIDTH, 24), spec)
    made.fit_weights("minmax")
    if spec.activations == "static":
        made.fit_inputs(torch.tensor(-2.5), torch.tensor(3.5))
    made.settle()
    return made.eval()


def table(spec: Spec, seed: int) -> QuantizedEmbedding:
    torch.manual_seed(seed)
    made = QuantizedEmbedding(nn.Embedding(50, WIDTH), spec)
    made.fit_weights("minmax")
    made.settle()
    return made.eval()


class Side(nn.Module):
    """Every layer on its own, the outputs side by side: `[F, B, T, 24]` and `[F', B, T, WIDTH]`."""

    def __init__(self, linears: list[nn.Module], tables: list[nn.Module]) -> None:
        super().__init__()
        self.linears, self.tables = nn.ModuleList(linears), nn.ModuleList(tables)

    def forward(self, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """All outputs."""
        return torch.stack([layer(values) for layer in self.linears]), torch.stack([one(ids) for one in self.tables])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Side]:
    """All forms in one ONNX file and its IR, and the layers that they stand for."""
    forms = [Spec(spec.bits, spec.granularity, spec.group_size) for spec in FORMS if spec.activations == "none"]
    layers = Side(
        [linear(spec, seed) for seed, spec in enumerate(FORMS)], [table(spec, seed) for seed, spec in enumerate(forms)]
    )
    twin = twins.with_twins(layers)
    folder = tmp_path_factory.mktemp("twins")
    sample = torch.randn(2, 7, WIDTH), torch.zeros(2, 7, dtype=torch.int64)
    shapes = [{0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}] * 2
    program = torch.onnx.export(
        twin, sample, input_names=["values", "ids"], dynamic_shapes=shapes, opset_version=twins.OPSET, verbose=False
    )
    assert program is not None
    onnx_file.narrow(program.model, twin)
    onnx_ir.save(program.model, str(folder / "model.onnx"))
    open_vino.write(folder / "model.onnx", folder)
    return folder, layers


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_every_form_answers_as_the_layer_does_whatever_the_batch(runtime: str, exported: tuple[Path, Side]) -> None:
    folder, layers = exported
    opened = open_model(runtime, folder, 1)
    torch.manual_seed(1)
    values, ids = torch.randn(3, 5, WIDTH), torch.randint(50, (3, 5))
    with torch.no_grad():
        linears, tables = layers(values, ids)
    given = {"values": values.numpy(), "ids": ids.numpy()}
    if isinstance(opened, OnnxRuntime):
        found = opened.session.run(None, given)
    else:
        assert isinstance(opened, OpenVINO)
        found = list(opened.request.infer(given).values())
    np.testing.assert_allclose(found[1], tables.numpy(), atol=1e-6)
    for spec, mine, theirs in zip(FORMS, linears.numpy(), found[0], strict=True):
        # Where weights alone are integers both runtimes round the activations too, to 8 bits of each token.
        exact = spec.activations == "static" and spec.granularity != "group" and (spec.bits == 8)
        assert np.abs(mine - theirs).max() < (1e-5 if exact else 0.02) * np.abs(mine).max(), spec
    opened.release()


def test_the_file_holds_integers_of_as_few_bits_as_there_are(exported: tuple[Path, Side]) -> None:
    graph = onnx_ir.load(exported[0] / "model.onnx").graph
    for number, spec in enumerate(FORMS):
        found = graph.initializers[f"linears.{number}.weight"].dtype
        assert found == (onnx_ir.DataType.INT8 if spec.bits == 8 else onnx_ir.DataType.INT4)
    widths = [graph.initializers[f"tables.{number}.weight"].shape[1] for number in range(4 * len(GRANULARITY))]
    assert widths == [WIDTH] * 3 + [WIDTH // 2] * 6 + [WIDTH // 4] * 3
