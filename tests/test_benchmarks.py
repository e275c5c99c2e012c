"""What the benchmarks compare computes the same; what they print follows from what they timed."""

from __future__ import annotations

import time
from functools import partial

import torch

from benchmarks import distillation_step, relation_loss, rounds


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
