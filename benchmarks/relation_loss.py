"""The relation loss alone, forward and backward: in blocks, as training has it, against plain autograd.

    python -m benchmarks.relation_loss --threads 2

Teacher width 768, student width 384, 48 relation heads, fp32, no padding. Times are medians over interleaved rounds.
Memory is what the peak of the resident set (Linux: VmHWM) grows by over what the process held before, inputs and
libraries loaded, each form in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rounds import interleave, machine, milliseconds, parser, ratio, table
from edgemin.distillation.relation import plain_relation_kl, relation_kl
from edgemin.measure.memory import peak_bytes, resident_bytes

HEADS, TEACHER, STUDENT = 48, 768, 384
FORMS = {"plain": plain_relation_kl, "blocked": relation_kl}


def step(form: str, sequences: int, tokens: int, relations: int) -> Callable[[], Tensor]:
    """The sum of some self-relation losses and its gradient in the student's projections."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        [torch.randn(sequences, tokens, width, generator=generator) for _ in range(relations)]
        for width in (TEACHER, STUDENT)
    )
    mask = torch.ones(sequences, tokens, dtype=torch.bool)
    for side in student:
        side.requires_grad_()

    def run() -> Tensor:
        for side in student:
            side.grad = None
        losses = [FORMS[form](of, by, mask, HEADS) for of, by in zip(teacher, student, strict=True)]
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss.detach()

    return run


def grown_bytes(form: str, sequences: int, tokens: int, relations: int) -> int:
    """How much higher one step raises the peak of this process; to be asked once in a process."""
    step(form, 1, 2, 1)()  # loads what is loaded at a first call
    run = step(form, sequences, tokens, relations)
    before = resident_bytes()
    run()
    return peak_bytes() - before


def grown_in_a_process(threads: int, *arguments: str | int) -> int:
    """`grown_bytes` in a process of its own."""
    code = (
        "import torch; from benchmarks.relation_loss import grown_bytes; "
        f"torch.set_num_threads({threads}); print(grown_bytes(*{arguments!r}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE, text=True
    )
    return int(found.stdout)


def main() -> None:
    """Time the loss and print the table of times and memory."""
    options = parser(str(__doc__).splitlines()[0], rounds=5).parse_args()
    torch.set_num_threads(options.threads)
    print(machine(), end="\n\n")
    rows = []
    for sequences, tokens in options.shapes:
        for relations in (1, 3):
            shape = sequences, tokens, relations
            variants = {form: step(form, *shape) for form in FORMS}
            losses = [float(run()) for run in variants.values()]
            assert abs(losses[0] - losses[1]) < 1e-5 * abs(losses[0]), losses
            seconds = interleave(variants, options.rounds)
            mebibytes = {form: grown_in_a_process(options.threads, form, *shape) / 2**20 for form in FORMS}
            rows.append(
                [f"{sequences} x {tokens}", str(relations)]
                + [milliseconds(seconds[form]) for form in FORMS]
                + [f"{ratio(seconds, 'plain', 'blocked'):.1f}"]
                + [f"{mebibytes[form]:.0f}" for form in FORMS]
                + [f"{mebibytes['plain'] / mebibytes['blocked']:.0f}"]
            )
    header = ["B x T", "relations", "plain, ms", "blocked, ms", "times faster"]
    print(table([*header, "plain, MiB", "blocked, MiB", "times less"], rows))


if __name__ == "__main__":
    main()
