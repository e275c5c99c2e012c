"""What the benchmarks compare computes the same; what they print follows from what they timed."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from benchmarks import distillation_step, nncf_int8, relation_loss, rounds, same_results, scale_drift
from edgemin import artifact, toy
from edgemin.encoder import quantized
from edgemin.quantization.model import static_layers


def test_the_step_written_as_published_has_our_loss_and_gradient_padding_included() -> None:
    teachers, students = (distillation_step.models(layers, 48, 0.1) for layers in (3, 2))
    for teacher in teachers:
        teacher.eval().requires_grad_(False)
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    batch = {"input_ids": torch.arange(27).view(3, 9), "attention_mask": mask.long()}
    distillation_step.check_equal(teachers, students, batch)
    loss = partial(distillation_step.ours, teachers[0], students[0].eval(), batch, bf16=True)
    exact = distillation_step.ours(teachers[0], students[0], batch)
    torch.testing.assert_close(distillation_step.step(loss, students[0]), exact.detach(), rtol=0.05, atol=1e-3)


def test_both_forms_of_the_relation_loss_benchmark_agree() -> None:
    values = [relation_loss.step(form, 2, 8, 3)() for form in relation_loss.FORMS]
    torch.testing.assert_close(*values)


def test_every_variant_is_timed_in_every_round_and_ratios_are_formed_inside_a_round() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        time.sleep(0.001)

    seconds = rounds.interleave({name: partial(call, name) for name in "ab"}, rounds=3, at_least_s=0)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert rounds.ratio({"a": [2.0, 40.0, 6.0], "b": [1.0, 10.0, 2.0]}, "a", "b") == 3.0


def test_a_table_has_columns_as_wide_as_their_content() -> None:
    assert rounds.table(["B", "ms"], [["8 x 128", "1.5"]]).splitlines() == [
        "| B       |  ms |",
        "| ------- | --: |",
        "| 8 x 128 | 1.5 |",
    ]


def test_shapes_are_sequences_by_tokens() -> None:
    assert rounds.parser("", 3).parse_args(["--shapes", "8x128", "4x512"]).shapes == [(8, 128), (4, 512)]


def test_int8_variants_are_calibrated_copies_and_pruning_takes_half_of_the_heads() -> None:
    model = tiny.model(heads=4)
    half = nncf_int8.half_of_heads(model)
    rounded = nncf_int8.static(half, nncf_int8.batches(quantized.outline(model).vocabulary)[:2])
    assert [layer.heads for layer in quantized.outline(rounded).layers] == [2, 2, 2]
    assert all(torch.isfinite(layer.input_scale) for layer in static_layers(rounded).values())
    assert static_layers(rounded) and not static_layers(half)
    assert [layer.heads for layer in quantized.outline(model).layers] == [4, 4, 4]


def test_ratios_to_nncf_are_formed_inside_a_round() -> None:
    assert nncf_int8.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == "3.00 (2.20-3.80)"


def test_without_nncf_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(SystemExit, match="nncf_int8: expected nncf to be installed"):
        nncf_int8.nncf()


def _leave(out: Path, weight: float, accuracy: float, stage: str = "prune", schema: int = 2) -> Path:
    """What a run of one job with one stage leaves."""
    (out / "store" / "key").mkdir(parents=True)
    save_file({"w": torch.tensor([weight, 2.0])}, out / "store" / "key" / "model.safetensors")
    job = out / "study" / "today" / "0"
    job.mkdir(parents=True)
    timed = {"latency_ms": out.name}
    cost = {name: 1 for name in same_results.COMPARED_COST} | (timed if schema == 1 else {"runtimes": {"torch": timed}})
    row = {"model": "student", "stages": [stage], "control": False, "metrics": {"toy": accuracy}, "cost": cost}
    content = {"schema": schema, "nodes": [{"path": f"student/{stage}", "key": "key"}], "rows": [row]}
    (job / "run.json").write_text(json.dumps(content))
    return out


def test_two_commits_are_compared_to_the_bit_by_path_and_timed_columns_are_not(tmp_path: Path) -> None:
    old = _leave(tmp_path / "old", 1.0, 0.5)
    same = same_results.differences(old, _leave(tmp_path / "same", 1.0, 0.5), {})
    assert same == ("1 artifacts, 1 tensors, 1 rows", [])
    _, last_bit = same_results.differences(old, _leave(tmp_path / "bit", 1.0 + 2**-23, 0.5), {})
    assert last_bit == ["job 0, student/prune: 1 tensors differ, first w"]
    _, table = same_results.differences(old, _leave(tmp_path / "table", 1.0, 0.25), {})
    assert table == ["row job 0: student/prune, metrics, toy: 0.5 != 0.25"]
    renamed = _leave(tmp_path / "renamed", 1.0, 0.5, stage="cut")
    assert same_results.differences(old, renamed, {"prune": "cut"})[1] == []
    assert any(line.startswith("nodes: ") for line in same_results.differences(old, renamed, {})[1])


def test_a_commit_that_wrote_the_schema_before_is_compared_and_one_of_an_unknown_schema_is_not(tmp_path: Path) -> None:
    new = _leave(tmp_path / "new", 1.0, 0.5)
    before = _leave(tmp_path / "before", 1.0, 0.5, schema=1)
    assert same_results.differences(before, new, {}) == ("1 artifacts, 1 tensors, 1 rows", [])
    with pytest.raises(SystemExit, match=r"run\.json: schema: expected one of \(1, 2\), given 3"):
        same_results.differences(new, _leave(tmp_path / "later", 1.0, 0.5, schema=3), {})


def test_drift_is_of_a_scale_relative_to_where_it_began() -> None:
    start, end = [torch.tensor([1.0, 2.0]), torch.tensor([4.0])], [torch.tensor([1.5, 2.0]), torch.tensor([3.0])]
    assert scale_drift.drift(start, end) == (0.25, 0.5)


def test_scales_learn_at_a_share_of_the_rate_or_rest() -> None:
    node = {"learning_rate": 0.25, "scale_learning_rate": "auto", "scales": "learned"}
    assert scale_drift.with_share(node, "auto") == node
    assert scale_drift.with_share(node, "0.5")["scale_learning_rate"] == 0.125
    assert scale_drift.with_share(node, "0") == node | {"scales": "fixed"}


def test_drift_and_errors_of_both_methods_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact.save(tmp_path, tiny.model(), toy.tokenizer(), {"head_trained": True})
    small = ["task=toy", "task.max_train_examples=48", "task.holdout=0.25", "trainer=cpu", "quantize.steps=2"]
    small += ["quantize.calibration_examples=8", "quantize.batch_size=8", "quantize.learning_rate=0.01"]
    monkeypatch.setattr(
        "sys.argv",
        [
            *("scale_drift", "--artifact", str(tmp_path), "--cache", str(tmp_path / "tokens")),
            *("--bits", "4", "2", "--seeds", "1", "2", "--set", *small),
        ],
    )
    scale_drift.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[: len(lines) // 2]]
    assert header == ["bits", "seed", "share", "drift", "largest", "hold-out loss", "hold-out accuracy"]
    assert [row[:3] for row in rows] == [
        [bits, seed, share] for bits, seed in (("4", "1"), ("4", "2"), ("2", "1")) for share in ("1", "auto", "0")
    ]
    assert all(float(row[3].strip("%")) == 0 for row in rows if row[2] == "0")
    assert all(float(rows[at][3].strip("%")) > float(rows[at + 1][3].strip("%")) > 0 for at in (0, 3, 6))
