"""Unstructured pruning: how many weights are zero, that they stay zero, and that nothing gets smaller by it."""

from __future__ import annotations

import copy
import zlib
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgemin.encoder import building, parts
from edgemin.errors import UserError
from edgemin.pruning.unstructured import UnstructuredPruning, smallest


def pruning(**settings: Any) -> UnstructuredPruning:
    given = {"ratio": 0.5, "learning_rate": 1e-3, "batch_size": 8, **settings}
    return tiny.stage(UnstructuredPruning, **({"epochs": 0} if "steps" not in given else {}), **given)


def linears(model: PreTrainedModel) -> dict[str, Tensor]:
    """The matrices of the Linears that belong to layers, by name."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: modules[name].weight for name in parts.in_layers(model, modules)}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_smallest_weights_of_the_layers_are_zero_and_all_else_is_as_it_was(
    scope: Literal["layer", "global"], family: str, tmp_path: Path
) -> None:
    start = tiny.model(family)
    before = copy.deepcopy(start)
    outline = building.outline(start)
    found = tiny.fit(pruning(ratio=0.3, scope=scope), start, None, work=tmp_path).model
    assert building.outline(found) == outline
    old, new = linears(before), linears(found)
    groups = [[name] for name in old] if scope == "layer" else [list(old)]
    for group in groups:
        was, now = (torch.cat([side[name].detach().flatten() for name in group]) for side in (old, new))
        assert int((now == 0).sum()) == int(0.3 * len(was))
        assert torch.equal(now[now != 0], was[now != 0])
        assert was[now == 0].abs().max() <= was[now != 0].abs().min()
    rest = tiny.weights(before).keys() - {f"{name}.weight" for name in old}
    for name in rest:
        assert torch.equal(tiny.weights(found)[name], tiny.weights(before)[name]), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_zeros_stay_zeros_while_the_others_learn_also_when_killed(weight_decay: float, tmp_path: Path) -> None:
    data = tiny.data(tmp_path / "data")
    settings: dict[str, Any] = {"steps": 6, "ratio": 0.6, "weight_decay": weight_decay}
    whole = tiny.fit(pruning(**settings), tiny.model(), data, work=tmp_path / "whole")
    cut = tiny.fit(pruning(ratio=0.6), tiny.model(), None, work=tmp_path / "cut").model
    for name, weight in linears(whole.model).items():
        zero = linears(cut)[name] == 0
        assert torch.equal(weight == 0, zero), name
        assert not torch.equal(weight, linears(cut)[name])
    with pytest.raises(tiny.KilledError):
        work, kill = tmp_path / "killed", [tiny.Kill(4)]
        tiny.fit(pruning(**settings), tiny.model(), data, work=work, seconds=0, callbacks=kill)
    resumed = tiny.fit(pruning(**settings), tiny.model(), data, work=work)
    assert tiny.same_weights(resumed.model, whole.model)


def test_zeros_count_in_no_norm_that_gradients_are_clipped_by(tmp_path: Path) -> None:
    stage = pruning()
    stage = tiny.planned(stage, tiny.model())
    stage.prepare(tiny.model(), None)
    for weight in linears(stage.model).values():
        weight.grad = torch.ones_like(weight)
    stage.on_before_optimizer_step(torch.optim.SGD(stage.parameters(), lr=1.0))
    for weight in linears(stage.model).values():
        assert weight.grad is not None and torch.equal(weight.grad != 0, weight != 0)


def test_of_equal_weights_the_first_go() -> None:
    assert smallest(torch.tensor([1.0, -1.0, 0.5, 1.0]), 0.5).tolist() == [2, 0]
    assert smallest(torch.tensor([1.0, 2.0]), 0.4).tolist() == []


def test_the_note_has_the_size_and_what_gzip_makes_of_it(tmp_path: Path) -> None:
    fitted = tiny.fit(pruning(ratio=0.75), tiny.model(), None, work=tmp_path)
    weights = linears(fitted.model)
    zeros, count = sum(int((w == 0).sum()) for w in weights.values()), sum(w.numel() for w in weights.values())
    tensors = [tensor.numpy().tobytes() for tensor in fitted.model.state_dict().values()]
    size, packed = sum(map(len, tensors)) / 2**20, sum(len(zlib.compress(content)) for content in tensors) / 2**20
    assert packed < size
    assert fitted.notes == [
        f"{zeros} of {count} weights of the layers' Linears are zero; its weights take {size:.1f} MiB as before and no "
        f"runtime skips the zeros; gzip would bring them to {packed:.1f} MiB"
    ]


def test_a_ratio_of_zero_changes_nothing_and_says_so(tmp_path: Path) -> None:
    fitted = tiny.fit(pruning(ratio=0.0), tiny.model(), None, work=tmp_path)
    assert tiny.same_weights(fitted.model, tiny.model())
    assert fitted.notes[0].startswith("ratio 0.0 sets no weight to zero")


@pytest.mark.parametrize(("key", "value"), [("ratio", 1.0), ("ratio", -0.1), ("scope", "row")])
def test_a_setting_out_of_range_is_one_line(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^{key}: expected [^\n]+$"):
        pruning(**{key: value})
