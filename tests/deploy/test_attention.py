"""Attention as it is exported: the answers of torch's own, of operators that runtimes fuse."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch

from edgemin.deploy import attention, onnx_file

TOKENS = 24
WINDOW = 4  # tokens that a local layer looks at on either side


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_answers_as_with_the_attention_it_came_with(family: str) -> None:
    model = tiny.model(family)
    if family == "modernbert":
        model.config.sliding_window = WINDOW
    direct = copy.deepcopy(model)
    attention.direct(direct)
    mask = torch.ones(3, TOKENS, dtype=torch.int64)
    mask[1, 5:], mask[2, 3:20] = 0, 0  # a padding token may have nothing but padding in its window
    batch = {"input_ids": torch.randint(5, 60, mask.shape), "attention_mask": mask, "token_type_ids": 0 * mask}
    torch.testing.assert_close(tiny.logits(direct, batch), tiny.logits(model, batch), atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_in_the_file_has_no_operator_that_keeps_its_attention_from_being_fused(tmp_path: Path) -> None:
    onnx_ir = pytest.importorskip("onnx_ir")
    pytest.importorskip("onnxscript")
    counts = []
    for layers in (1, 2):
        onnx_file.write(tiny.model(layers=layers), tmp_path / "model.onnx")
        counts.append(Counter(node.op_type for node in onnx_ir.load(tmp_path / "model.onnx").graph))
    found = counts[1] - counts[0]
    # queries, keys, values and their result change places; a number of heads is brought in and taken out again
    assert (found["Transpose"], found["Reshape"], found["Softmax"]) == (4, 4, 1), found
    assert not found["Where"] and not found["Shape"], found
    assert not {"GatherND", "GreaterEqual", "Range"} & counts[0].keys(), "a mask of [T, T] where one of [T] says it"
