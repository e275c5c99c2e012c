"""One training step of MiniLMv2 distillation: ours, as published codes are written, and the floor under both.

    python -m benchmarks.distillation_step --threads 2

Teacher 12 x 768, student 6 x 384 (random weights), 48 relation heads, Q-Q, K-K and V-V of the last layers, no padding,
the student in training mode with its dropout. A step ends with the student's gradients; an optimizer would add the
same to all.

- ours: `edgemin.encoder.taps.read` of both sides up to the queries, keys and values of the last layer, attention fused,
  then `relations_loss`; in fp32, and in bf16 under autocast where the CPU has it (`precision=auto`).
- published: eager attention, all attentions and hidden states put out, both models run to their end, the projections
  computed again from the hidden states below, then sequence by sequence over its unpadded length.
- floor: the teacher's forward and the student's forward and backward, nothing read, no loss but a mean of the logits.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from benchmarks.rounds import Seconds, interleave, machine, milliseconds, parser, ratio, table
from edgemin.distillation.relation import relations_loss
from edgemin.encoder import building, shapes, taps
from edgemin.encoder.parts import num_layers
from edgemin.training.fitting import cpu_has_bf16

HEADS = 48
WEIGHTS = {"qq": 1.0, "kk": 1.0, "vv": 1.0}
VOCABULARY = 30522
Batch = Mapping[str, Tensor]


def models(layers: int, hidden: int, dropout: float) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random BERT twice, with fused and with eager attention."""
    config = shapes.configure(
        "bert", layers=layers, hidden=hidden, heads=12, intermediate=4 * hidden, vocabulary=VOCABULARY
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    torch.manual_seed(layers)
    fused = building.build(config)
    eager = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    eager.load_state_dict(fused.state_dict())
    return fused, eager


def ours(teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch, *, bf16: bool = False) -> Tensor:
    """What `distill=minilmv2` computes in a step."""
    of, by = num_layers(teacher) - 1, num_layers(student) - 1
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            target = taps.read(teacher, batch, projections=[of], logits=False).projections[of]
        learnt = taps.read(student, batch, projections=[by], logits=False).projections[by]
        return relations_loss(target, learnt, batch["attention_mask"], HEADS, WEIGHTS)


def published(teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch) -> Tensor:
    """The same loss in the form in which published codes write it: sequence by sequence, all attentions put out."""
    put_out = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        target = _projections(teacher, teacher(**batch, **put_out))
    learnt = _projections(student, student(**batch, **put_out))
    losses = []
    for index, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        for of, by in zip(target, learnt, strict=True):
            relations = [
                _relation(side[index, :length].unflatten(-1, (HEADS, -1)).transpose(0, 1)) for side in (of, by)
            ]
            divergence = F.kl_div(relations[1].log_softmax(-1), relations[0].softmax(-1), reduction="sum")
            losses.append(divergence / (HEADS * length))
    return torch.stack(losses).sum() / len(batch["input_ids"])


def _projections(model: PreTrainedModel, outputs: Any) -> list[Tensor]:
    attention = f"bert.encoder.layer.{model.config.num_hidden_layers - 1}.attention.self"
    linears = [model.get_submodule(f"{attention}.{name}") for name in ("query", "key", "value")]
    return [linear(outputs.hidden_states[-2]) for linear in linears]


def _relation(heads: Tensor) -> Tensor:
    return heads @ heads.transpose(-1, -2) / math.sqrt(heads.shape[-1])


def floor(teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch) -> Tensor:
    """Both models run and nothing is read of them; the mean of the student's logits stands for the loss."""
    with torch.no_grad():
        teacher(**batch)
    logits: Tensor = student(**batch).logits
    return logits.mean()


def step(loss: Callable[[], Tensor], student: nn.Module) -> Tensor:
    """One forward and backward pass, starting without gradients."""
    student.zero_grad()
    value = loss()
    value.backward()
    return value.detach()


def breakdown(teacher: PreTrainedModel, student: PreTrainedModel, batch: Batch, rounds: int) -> Seconds:
    """Where our step goes, each part timed alone; the student's backward is what remains of the whole."""
    of, by = num_layers(teacher) - 1, num_layers(student) - 1
    read = partial(taps.read, batch=batch, logits=False)
    with torch.no_grad():
        target = read(teacher, projections=[of]).projections[of]
        learnt = [x.clone().requires_grad_() for x in read(student, projections=[by]).projections[by]]

    def teacher_forward() -> None:
        with torch.no_grad():
            read(teacher, projections=[of])

    def loss() -> None:
        relations_loss(target, (learnt[0], learnt[1], learnt[2]), batch["attention_mask"], HEADS, WEIGHTS).backward()

    return interleave(
        {
            "teacher": teacher_forward,
            "student forward": lambda: read(student, projections=[by]),
            "loss and its gradient": loss,
        },
        rounds,
    )


def check_equal(teachers: tuple[PreTrainedModel, ...], students: tuple[PreTrainedModel, ...], batch: Batch) -> None:
    """Both forms give one loss and one gradient where dropout is off."""
    found = []
    for form, teacher, student in zip((ours, published), teachers, students, strict=True):
        loss = step(partial(form, teacher, student.eval(), batch), student)
        gradient = student.get_input_embeddings().weight.grad
        assert isinstance(gradient, Tensor)
        found.append((loss, gradient.norm()))
        student.train()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def main() -> None:
    """Time the training steps and print the tables of times and memory."""
    options = parser(str(__doc__).splitlines()[0], rounds=3)
    options.add_argument("--dropout", type=float, default=0.1, help="of the student, in hidden states and attention")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    print(machine(), end="\n\n")
    teachers = models(12, 768, 0.0)
    students = models(6, 384, given.dropout)
    for model in teachers:
        model.eval().requires_grad_(False)
    rows, parts = [], []
    for sequences, tokens in given.shapes:
        generator = torch.Generator().manual_seed(0)
        batch = {
            "input_ids": torch.randint(5, VOCABULARY, (sequences, tokens), generator=generator),
            "attention_mask": torch.ones(sequences, tokens, dtype=torch.long),
        }
        check_equal(teachers, students, batch)
        fused, eager = (teachers[0], students[0], batch), (teachers[1], students[1], batch)
        losses = {
            "floor": partial(floor, *fused),
            "ours": partial(ours, *fused),
            "published": partial(published, *eager),
        }
        if cpu_has_bf16():
            losses["ours, bf16"] = partial(ours, *fused, bf16=True)
        steps = {name: partial(step, loss, loss.args[1]) for name, loss in losses.items()}
        seconds = interleave(steps, given.rounds)
        shape = f"{sequences} x {tokens}"
        for name in seconds:
            ratios = ratio(seconds, name, "floor"), ratio(seconds, "published", name)
            rows.append([f"{shape}, {name}", milliseconds(seconds[name]), *(f"{x:.2f}" for x in ratios)])
        of_ours = breakdown(*fused, given.rounds)
        whole = statistics.median(seconds["ours"])
        shares = {name: statistics.median(part) / whole for name, part in of_ours.items()}
        shares["student backward"] = 1 - sum(shares.values())
        parts.append([shape, *(f"{share:.0%}" for share in shares.values())])
    print(table(["B x T", "step, ms", "of the floor", "faster than published"], rows))
    print("\nWhere our fp32 step goes:\n")
    print(table(["B x T", *shares], parts))


if __name__ == "__main__":
    main()
