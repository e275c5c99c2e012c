"""The loss of every distillation method on one batch, beside a reference in numpy that knows only the equations.

The references read the models through transformers' own outputs and plain hooks, sequence by sequence without padding,
in float64. Student and teacher have equal widths, so that every method applies, and 3 and 6 layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from numpy.typing import NDArray
from torch import nn

from edgemin import config
from edgemin.data.module import DataModule
from edgemin.training.distillation import Distillation

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

Array = NDArray[np.float64]
HEADS = 4
PAIRS = {1: 2, 2: 4, 3: 6}


class Side(NamedTuple):
    """One model's inside: hidden states by depth, projections by layer from 1, logits; by example, unpadded."""

    hidden: list[list[Array]]
    projections: list[dict[int, dict[str, Array]]]
    logits: Array


class Both(NamedTuple):
    student: Side
    teacher: Side
    labels: NDArray[np.int64]
    maps: Mapping[str, Array]  # learnt matrices [Hs, Ht] of a method, by their names

    def mean(self, of: Callable[[int], float]) -> float:
        """The mean over the examples."""
        return sum(of(example) for example in range(len(self.labels))) / len(self.labels)


# What the equations are made of


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def kl(target: Array, learnt: Array) -> float:
    """Of distributions in the last dimension, averaged over all others."""
    return float((target * (np.log(target) - np.log(learnt))).sum(-1).mean())


def split(matrix: Array, parts: int) -> Array:
    """`[T, H]` to `[parts, T, H / parts]`."""
    return matrix.reshape(len(matrix), parts, -1).transpose(1, 0, 2)


def scores(left: Array, right: Array, heads: int) -> Array:
    one, two = split(left, heads), split(right, heads)
    return one @ two.transpose(0, 2, 1) / math.sqrt(one.shape[-1])


def relation(matrix: Array, heads: int) -> Array:
    return softmax(scores(matrix, matrix, heads))


def attention(side: dict[str, Array]) -> Array:
    return softmax(scores(side["query"], side["key"], HEADS))


def outputs(side: dict[str, Array]) -> Array:
    """What all heads hand on, side by side."""
    return np.concatenate(list(attention(side) @ split(side["value"], HEADS)), axis=-1)


def task(both: Both) -> float:
    return -float(np.log(softmax(both.student.logits))[np.arange(len(both.labels)), both.labels].mean())


def soft(both: Both, temperature: float, *, entropy: bool = False) -> float:
    target, learnt = (softmax(side.logits / temperature) for side in (both.teacher, both.student))
    found = float(-(target * np.log(learnt)).sum(-1).mean()) if entropy else kl(target, learnt)
    return temperature**2 * found


def over_layers(both: Both, of: Callable[[int, int, int], float], pairs: Mapping[int, int] = PAIRS) -> float:
    """The sum over the matched layers of the mean over the examples."""
    return sum(both.mean(lambda example, one=one, two=two: of(example, one, two)) for one, two in pairs.items())  # type: ignore[misc]


# The methods


def minilmv2(both: Both) -> float:
    def of(example: int, mine: int, theirs: int) -> float:
        one, two = both.student.projections[example][mine], both.teacher.projections[example][theirs]
        weights = {"query": 1.0, "key": 0.5, "value": 2.0}
        return sum(weight * kl(relation(two[part], 8), relation(one[part], 8)) for part, weight in weights.items())

    return over_layers(both, of, {3: 6})


def minilm(both: Both) -> float:
    def of(example: int, mine: int, theirs: int) -> float:
        one, two = both.student.projections[example][mine], both.teacher.projections[example][theirs]
        values = kl(relation(two["value"], HEADS), relation(one["value"], HEADS))
        return kl(attention(two), attention(one)) + 0.5 * values

    return over_layers(both, of, {3: 6}) + 0.3 * task(both)


def logits(both: Both) -> float:
    return 0.25 * task(both) + 0.75 * soft(both, 3.0)


def distilbert(both: Both) -> float:
    def of(example: int) -> float:
        one, two = both.student.hidden[example][3], both.teacher.hidden[example][6]
        lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
        return float((1 - (one * two).sum(-1) / lengths).mean())

    return 5.0 * soft(both, 2.0) + 1.0 * both.mean(of) + 2.0 * task(both)


def pkd(both: Both) -> float:
    def of(example: int, mine: int, theirs: int) -> float:
        ends = both.student.hidden[example][mine][0], both.teacher.hidden[example][theirs][0]
        one, two = (end / np.linalg.norm(end) for end in ends)
        return float(((one - two) ** 2).sum()) / 2  # two pairs

    patience = over_layers(both, of, {1: 2, 2: 4})
    return 0.3 * task(both) + 0.7 * soft(both, 10.0) + 0.65 * patience


def mapped(both: Both, name: str, depths: Mapping[int, int]) -> float:
    def of(example: int, mine: int, theirs: int) -> float:
        learnt = both.student.hidden[example][mine] @ both.maps[name]
        return float(((learnt - both.teacher.hidden[example][theirs]) ** 2).mean())

    return over_layers(both, of, depths)


def tinybert(both: Both) -> float:
    def of(example: int, mine: int, theirs: int) -> float:
        one, two = both.student.projections[example][mine], both.teacher.projections[example][theirs]
        difference = scores(one["query"], one["key"], HEADS) - scores(two["query"], two["key"], HEADS)
        return float((difference**2).mean())

    return mapped(both, "embedding", {0: 0}) + 2.0 * mapped(both, "hidden", PAIRS) + 0.5 * over_layers(both, of)


def tinybert_predictions(both: Both) -> float:
    return soft(both, 2.0, entropy=True)


def mlkd(both: Both) -> float:
    def embedded(example: int) -> float:
        return kl(relation(both.teacher.hidden[example][0], 1), relation(both.student.hidden[example][0], 1))

    def of(example: int, mine: int, theirs: int) -> float:
        one, two = both.student.projections[example][mine], both.teacher.projections[example][theirs]
        return kl(relation(outputs(two), HEADS), relation(outputs(one), HEADS))

    return both.mean(embedded) + 0.5 * over_layers(both, of) + 2.0 * mapped(both, "projection", PAIRS)


def first_tokens(both: Both) -> tuple[Array, Array]:
    """[CLS] after the last layer, `[B, H]` of student and teacher."""
    sides = (both.student.hidden, 3), (both.teacher.hidden, 6)
    one, two = (np.stack([hidden[depth][0] for hidden in states]) for states, depth in sides)
    return one, two


def mlkd_predictions(both: Both) -> float:
    one, two = first_tokens(both)
    samples = kl(relation(two, 1), relation(one, 1))
    vectors = np.concatenate([two, one @ both.maps["projection"]])
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    labels, contrast = [*both.labels, *both.labels], 0.0
    for here, anchor in enumerate(vectors):
        others = [other for other in range(len(vectors)) if other != here]
        likeness = {other: float(np.exp(anchor @ vectors[other] / 0.1)) for other in others}
        alike = [other for other in others if labels[other] == labels[here]]
        contrast -= sum(math.log(likeness[other] / sum(likeness.values())) for other in alike) / len(alike)
    return samples + 0.5 * contrast / len(vectors) + 2.0 * soft(both, 1.0)


def mobilebert_layer(layer: int) -> Callable[[Both], float]:
    def of(both: Both) -> float:
        def one_example(example: int, mine: int, theirs: int) -> float:
            one, two = both.student.hidden[example][mine], both.teacher.hidden[example][theirs]
            normal = [(side - side.mean(-1, keepdims=True)) / side.std(-1, keepdims=True) for side in (one, two)]
            maps = ((normal[0] - normal[1]) ** 2).mean()
            means = ((one.mean(-1) - two.mean(-1)) ** 2).mean()
            variances = np.abs(one.var(-1) - two.var(-1)).mean()
            sides = (both.teacher.projections[example][theirs], both.student.projections[example][mine])
            return float(100 * maps + 5000 * means + 5 * variances) + kl(*map(attention, sides))

        return over_layers(both, one_example, {layer: PAIRS[layer]}) / len(PAIRS)

    return of


def mobilebert_task(both: Both) -> float:
    return 0.3 * (0.5 * task(both) + 0.5 * soft(both, 1.0))


def rkd(both: Both) -> float:
    def huber(difference: float) -> float:
        return difference**2 / 2 if abs(difference) <= 1 else abs(difference) - 0.5

    def distances(of: Array) -> list[float]:
        found = [float(np.linalg.norm(of[i] - of[j])) for i, j in permutations(range(len(of)), 2)]
        return [distance / (sum(found) / len(found)) for distance in found]

    def angles(of: Array) -> list[float]:
        unit = [[(one - other) / max(float(np.linalg.norm(one - other)), 1e-300) for one in of] for other in of]
        return [float(unit[j][i] @ unit[j][k]) for i, j, k in permutations(range(len(of)), 3)]

    def mean(one: list[float], two: list[float]) -> float:
        return sum(huber(a - b) for a, b in zip(one, two, strict=True)) / len(one)

    student, teacher = first_tokens(both)
    return mean(distances(student), distances(teacher)) + 2 * mean(angles(student), angles(teacher)) + 0.3 * task(both)


def multi(both: Both) -> float:
    return minilmv2(both) + 2.0 * logits(both) + 0.3 * task(both)


RELATIONS = {"relation_heads": 8, "relations": {"qq": 1.0, "kk": 0.5, "vv": 2.0}}
TARGETS = "edgemin.distillation"
# By the name of its yaml: settings that are not the yaml's, and what the loss of each fit should be.
METHODS: dict[str, tuple[dict[str, Any], list[Callable[[Both], float]]]] = {
    "minilmv2": ({**RELATIONS, "task_weight": 0.0}, [minilmv2]),
    "minilm": ({"value_weight": 0.5, "task_weight": 0.3}, [minilm]),
    "logits": ({"temperature": 3.0, "alpha": 0.75}, [logits]),
    "distilbert": ({}, [distilbert]),
    "pkd": ({}, [pkd]),
    "tinybert": (
        {"hidden_weight": 2.0, "attention_weight": 0.5, "temperature": 2.0},
        [tinybert, tinybert_predictions],
    ),
    "mlkd": (
        {"attention_weight": 0.5, "hidden_weight": 2.0, "contrastive_weight": 0.5, "soft_weight": 2.0},
        [mlkd, mlkd_predictions],
    ),
    "mobilebert": ({"task_weight": 0.3}, [*(mobilebert_layer(layer) for layer in PAIRS), mobilebert_task]),
    "rkd": ({"task_weight": 0.3}, [rkd]),
    "multi": (
        {
            "methods": {
                "relations": {"_target_": f"{TARGETS}.minilmv2.MiniLMv2", "weight": 1.0, **RELATIONS},
                "answers": {
                    "_target_": f"{TARGETS}.logits.LogitsDistillation",
                    "weight": 2.0,
                    "temperature": 3.0,
                    "alpha": 0.75,
                },
            },
            "task_weight": 0.3,
        },
        [multi],
    ),
}


def inside(model: Any, batch: Mapping[str, torch.Tensor]) -> Side:
    """Run a BERT and keep what transformers gives and what its query, key and value Linears give."""
    kept: dict[tuple[int, str], torch.Tensor] = {}
    for name, module in model.named_modules():
        layer, _, part = name.removeprefix("bert.encoder.layer.").partition(".attention.self.")
        if part in ("query", "key", "value"):
            module.register_forward_hook(lambda *of, at=(int(layer) + 1, part): kept.__setitem__(at, of[2]))
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        found = model(**{name: batch[name] for name in names}, output_hidden_states=True)
    lengths = batch["attention_mask"].sum(-1).tolist()
    return Side(
        [[state[row, :length].numpy() for state in found.hidden_states] for row, length in enumerate(lengths)],
        [
            {
                layer: {part: kept[layer, part][row, :length].numpy() for part in ("query", "key", "value")}
                for layer, _ in kept
            }
            for row, length in enumerate(lengths)
        ],
        found.logits.numpy(),
    )


def learnt_maps(stage: Distillation) -> dict[str, Array]:
    """Give the learnt matrices other values than they begin with, and return them."""
    torch.manual_seed(3)
    linears = {name.rpartition(".")[2]: of for name, of in stage.named_modules() if name.startswith("projection")}
    found = {}
    for name, linear in linears.items():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=0.3)
            found[name] = linear.weight.detach().numpy().T
    return found


def test_every_method_is_in_the_table() -> None:
    files = {path.stem for path in (tiny.CONF / "distill").glob("[!_]*.yaml")}
    assert METHODS.keys() == {name for name in files if not name.endswith("_published")} - {"none"}


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_each_fit_is_what_the_equations_say(method: str, data: DataModule) -> None:
    settings, references = METHODS[method]
    node = tiny.node("distill", method) | {"steps": 10 * len(references)} | settings
    stage = config.construct(node, "distill", Distillation)
    student, teacher = tiny.model(layers=3).double(), tiny.model(layers=6, seed=5).double()
    tiny.prepared(stage, student, teacher, data)
    stage.double()
    batch = data.train.batch(range(6))
    lengths = batch["attention_mask"].sum(-1)
    assert lengths.unique().numel() > 2 and len(batch["labels"].unique()) == 2, "padding, and both classes"
    maps = learnt_maps(stage)
    both = Both(inside(student, batch), inside(teacher, batch), batch["labels"].numpy(), maps)
    assert len(stage.fits()) == len(references)
    for stage.phase, reference in enumerate(references):
        stage.setup("fit")
        found = stage.loss(batch)
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(reference(both), rel=1e-9), f"fit {stage.phase + 1}"
        assert abs(reference(both)) > 1e-3, "a loss to be wrong about"
