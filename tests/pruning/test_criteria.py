"""Pruning criteria against a loop over single unpadded examples in float64, on every family."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, DistilBertConfig, ModernBertConfig, PreTrainedModel, RobertaConfig

from edgemin.encoder import building, magnitude, parts, slicing, taps, truncation
from edgemin.errors import UserError
from edgemin.pruning import structures
from edgemin.pruning.criteria.activations import activation
from edgemin.pruning.criteria.base import Accumulator, ByExample, Criterion, Given
from edgemin.pruning.criteria.gradients import gradient_norm, taylor
from edgemin.pruning.criteria.random import random
from edgemin.pruning.criteria.table import CRITERIA, find
from edgemin.tasks.classification import Classification

HEADS, SIZE, HIDDEN, PAD = 4, 8, 32, 1
SHAPE = {"vocab_size": 60, "num_labels": 3, "pad_token_id": PAD}
BERT_SHAPE = SHAPE | {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
CONFIGS: dict[str, Callable[[], object]] = {
    "bert": lambda: BertConfig(**BERT_SHAPE),
    "roberta": lambda: RobertaConfig(**BERT_SHAPE),
    "distilbert": lambda: DistilBertConfig(
        **SHAPE, dim=HIDDEN, n_layers=2, n_heads=HEADS, hidden_dim=48, max_position_embeddings=24
    ),
    "modernbert": lambda: ModernBertConfig(
        **BERT_SHAPE, local_attention=4, bos_token_id=2, cls_token_id=2, sep_token_id=3
    ),
}
OUTPUTS = {
    "bert": "bert.encoder.layer.{}.attention.output.dense",
    "roberta": "roberta.encoder.layer.{}.attention.output.dense",
    "distilbert": "distilbert.transformer.layer.{}.attention.out_lin",
    "modernbert": "model.layers.{}.attn.Wo",
}
VALUES = {
    "bert": "bert.encoder.layer.{}.attention.self.value",
    "roberta": "roberta.encoder.layer.{}.attention.self.value",
    "distilbert": "distilbert.transformer.layer.{}.attention.v_lin",
    "modernbert": "model.layers.{}.attn.Wqkv",  # values come last
}
BY_GRADIENT = ("gradient_norm", "taylor")
BY_EXAMPLE = (*BY_GRADIENT, "activation")
Example = tuple[list[int], int]


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = building.build(CONFIGS[family]())
    with torch.no_grad():  # far from the uniform attention of fresh weights
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.double()


def examples(count: int = 10) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return [
        (torch.randint(5, 60, (length,), generator=generator).tolist(), index % 3)
        for index, length in enumerate(lengths)
    ]


def batched(data: Sequence[Example], size: int, *, width: int = 12) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(data), size):
        part = data[start : start + size]
        yield {
            "input_ids": torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in part]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part]),
            "labels": torch.tensor([label for _, label in part]),
        }


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return Classification().loss(logits, labels, "none")


def scores(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], name: str, **given: Any) -> list[Tensor]:
    return find(name, "heads").scores(Given(model, structures.HEADS, batches, **{"losses": example_losses, **given}))


def accumulator_of(name: str) -> Accumulator:
    criterion = find(name, "heads")
    assert isinstance(criterion, ByExample)
    return Accumulator(criterion)


def contexts_and_gradients(model: PreTrainedModel, family: str, example: Example) -> list[tuple[Tensor, Tensor]]:
    """One example alone, without padding: what the output projections are given, and the gradients there."""
    captured: list[Tensor] = []
    handles = [
        model.get_submodule(OUTPUTS[family].format(layer)).register_forward_pre_hook(
            lambda _module, inputs: captured.append(inputs[0])
        )
        for layer in range(2)
    ]
    ids, label = example
    batch = torch.tensor([ids])
    loss = F.cross_entropy(model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits, torch.tensor([label]))
    for handle in handles:
        handle.remove()
    return list(zip(captured, torch.autograd.grad(loss, captured), strict=True))


def reference(model: PreTrainedModel, family: str, data: Sequence[Example], criterion: str) -> list[list[float]]:
    model = copy.deepcopy(model).double().eval()
    result = [[0.0] * HEADS for _ in range(2)]
    for example in data:
        for layer, (context, gradient) in enumerate(contexts_and_gradients(model, family, example)):
            for head in range(HEADS):
                total = 0.0
                own = range(head * SIZE, (head + 1) * SIZE)
                if criterion == "activation":
                    norms = [sum(row[unit] ** 2 for unit in own) ** 0.5 for row in context[0].tolist()]
                    result[layer][head] += sum(norms) / len(norms) / len(data)
                    continue
                for token in range(context.shape[1]):
                    for unit in own:
                        slope = gradient[0, token, unit].item()
                        total += slope * (slope if criterion == "gradient_norm" else context[0, token, unit].item())
                result[layer][head] += (total**0.5 if criterion == "gradient_norm" else abs(total)) / len(data)
    return result


def close(found: Sequence[Tensor], expected: Sequence[object], rtol: float = 1e-8) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, torch.as_tensor(other, dtype=torch.float64), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("criterion", BY_EXAMPLE)
@pytest.mark.parametrize("family", CONFIGS)
def test_importance_equals_a_loop_over_single_examples_whatever_the_batch_size(family: str, criterion: str) -> None:
    model, data = tiny(family), examples()
    expected = reference(model, family, data, criterion)
    assert min(map(min, expected)) > 0
    for size in (1, 2, 5):
        close(scores(model, batched(data, size), criterion), expected)


@pytest.mark.parametrize("criterion", BY_EXAMPLE)
def test_importance_of_a_float32_model_keeps_its_precision(criterion: str) -> None:
    model, data = tiny("bert"), examples()
    expected = reference(model, "bert", data, criterion)
    close(scores(model.float(), batched(data, 5), criterion), expected, rtol=1e-3)


@pytest.mark.parametrize("criterion", BY_EXAMPLE)
def test_neither_the_order_of_examples_nor_more_padding_matters(criterion: str) -> None:
    model, data = tiny("bert"), examples()
    expected = scores(model, batched(data, 5), criterion)
    close(scores(model, batched(data[::-1], 4), criterion), expected)
    close(scores(model, batched(data, 5, width=20), criterion), expected)


def test_absolute_value_by_token_or_batch_would_give_other_numbers() -> None:
    model, data = tiny("bert").eval(), examples()
    pairs = [contexts_and_gradients(model, "bert", example)[0] for example in data]
    products = [(context * gradient).unflatten(-1, (HEADS, SIZE)).sum(-1)[0] for context, gradient in pairs]  # [T, A]
    by_token, by_example, by_batch = (
        torch.stack([product.abs().sum(0) for product in products]).mean(0),
        torch.stack([product.sum(0).abs() for product in products]).mean(0),
        torch.stack([product.sum(0) for product in products]).mean(0).abs(),
    )
    close(scores(model, batched(data, 5), "taylor")[:1], [by_example])
    assert not torch.allclose(by_example, by_token, rtol=0.01) and not torch.allclose(by_example, by_batch, rtol=0.01)


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_rescaling_values_against_outputs_changes_the_gradient_norm_alone(factor: float) -> None:
    model, data = tiny("bert"), examples()
    before = {name: scores(model, batched(data, 5), name) for name in BY_GRADIENT}
    batch = next(batched(data, 5))
    logits = taps.logits(model.eval(), batch)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.value.weight *= factor
            layer.attention.self.value.bias *= factor
            layer.attention.output.dense.weight /= factor
    torch.testing.assert_close(taps.logits(model, batch), logits)
    close(scores(model, batched(data, 5), "taylor"), before["taylor"])
    close(
        scores(model, batched(data, 5), "gradient_norm"),
        [layer / factor for layer in before["gradient_norm"]],
    )


def test_padding_contributes_nothing_even_where_it_has_a_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    context, gradient = torch.randn(2, 3, 5, 8, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    clean = gradient * mask[..., None]
    assert torch.equal(gradient_norm(gradient, mask, 2), gradient_norm(clean, torch.ones_like(mask), 2))
    assert torch.equal(taylor(context, gradient, mask, 2), taylor(context, clean, torch.ones_like(mask), 2))
    for row, tokens in enumerate((5, 2, 1)):
        alone = activation(context[row : row + 1, :tokens], torch.ones(1, tokens), 2)
        torch.testing.assert_close(activation(context, mask, 2)[row : row + 1], alone)


def test_activation_needs_no_labels_and_sees_no_dropout() -> None:
    model, data = tiny("bert"), examples()
    unlabelled = [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batched(data, 5)]
    expected = scores(model, batched(data, 5), "activation")
    close(scores(model.train(), unlabelled, "activation"), expected, rtol=0)
    assert model.training


def test_heads_of_uneven_layers_have_their_own_importance() -> None:
    model, data = tiny("bert"), examples()
    slicing.slice_heads(model, 0, [0, 3])
    for criterion in CRITERIA:
        found = scores(model, batched(data, 5), criterion)
        assert [tuple(layer.shape) for layer in found] == [(2,), (4,)]
        assert all(layer.dtype == torch.float64 and layer.device.type == "cpu" for layer in found)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was_and_runs_without_dropout(training: bool) -> None:
    model, data = tiny("bert"), examples()
    model.train(training)
    weights = copy.deepcopy(model.state_dict())
    first = scores(model, batched(data, 5), "gradient_norm")
    close(scores(model, batched(data, 5), "gradient_norm"), first, rtol=0)
    assert model.training is training and all(parameter.grad is None for parameter in model.parameters())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    model.requires_grad_(False)
    with torch.no_grad():
        close(scores(model, batched(data, 5), "gradient_norm"), first)


@pytest.mark.parametrize("criterion", [*BY_GRADIENT, "fisher"])
def test_the_accumulator_divides_out_how_the_training_loss_weighs_its_examples(criterion: str) -> None:
    """Batches of 4 and of 2, so that a mean weighs the examples of one twice those of the other."""
    model, data = tiny("bert").eval(), examples(6)
    expected = scores(model, batched(data, 6), criterion)
    weights = torch.linspace(0.5, 2.0, 4)

    def by_mean(losses: Tensor) -> tuple[Tensor, float | Tensor]:
        return losses.mean() / 4 * 1024, 1024 / (4 * len(losses))

    def by_weight(losses: Tensor) -> tuple[Tensor, float | Tensor]:
        own = weights[: len(losses)]
        return (losses * own).sum(), own

    for reduce in (by_mean, by_weight):
        accumulator = accumulator_of(criterion)
        with taps.head_contexts(model) as contexts:
            for batch in batched(data, 4):
                loss, weight = reduce(example_losses(taps.logits(model, batch), batch["labels"]))
                loss.backward()
                gradients = [context.grad for context in contexts]
                accumulator.update(contexts, gradients, batch["attention_mask"], parts.heads(model), weight)
        close(accumulator.scores(), expected)


@pytest.mark.parametrize("criterion", BY_EXAMPLE)
def test_a_broken_accumulation_goes_on_where_it_stood(criterion: str) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [
        ([torch.randn(3, 4, 8, generator=generator)], [torch.randn(3, 4, 8, generator=generator)]) for _ in range(4)
    ]
    mask = torch.ones(3, 4)
    whole, broken = accumulator_of(criterion), accumulator_of(criterion)
    for index, (contexts, gradients) in enumerate(steps):
        whole.update(contexts, gradients, mask, [2])
        if index == 2:
            state = broken.state_dict()
            broken.update(contexts, gradients, mask, [2])  # lost with the process: must not leak into the state
            broken = accumulator_of(criterion)
            broken.load_state_dict(state)
        broken.update(contexts, gradients, mask, [2])
    assert broken.examples == whole.examples == 12
    close(broken.scores(), whole.scores(), rtol=0)


def test_taylor_ranks_by_each_layer_over_its_norm_and_one_without_any_gradient_by_zeros() -> None:
    scores = [torch.tensor([3.0, 4.0]), torch.zeros(2)]
    ranked = find("taylor").ranked(scores)
    assert [group.tolist() for group in ranked] == [pytest.approx([0.6, 0.8]), [0.0, 0.0]]
    assert find("fisher").ranked(scores) is scores, "others as they are"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_gradients_are_summed_in_float32(dtype: torch.dtype) -> None:
    gradient = torch.full((1, 64, 16), 300.0, dtype=dtype)  # its square alone is beyond float16
    found = gradient_norm(gradient, torch.ones(1, 64), 2)
    torch.testing.assert_close(found, torch.full((1, 2), 300.0 * (64 * 8) ** 0.5))


def test_a_loss_scale_is_divided_out_in_float32() -> None:
    accumulator = accumulator_of("gradient_norm")
    gradient = torch.ones(1, 4, 8, dtype=torch.float16)
    accumulator.update([gradient], [gradient], torch.ones(1, 4), [2], 2.0**30)  # float16 would come to 0
    close(accumulator.scores(), [[4 / 2**30] * 2])


def test_losses_can_be_given_and_a_reduced_one_is_refused() -> None:
    model, data = tiny("bert"), examples()

    def doubled(logits: Tensor, labels: Tensor) -> Tensor:
        return 2 * F.cross_entropy(logits, labels, reduction="none")

    expected = scores(model, batched(data, 5), "gradient_norm")
    close(scores(model, batched(data, 5), "gradient_norm", losses=doubled), [2 * layer for layer in expected])
    with pytest.raises(AssertionError, match="one loss per example"):
        scores(model, batched(data, 5), "taylor", losses=F.cross_entropy)


@pytest.mark.parametrize("family", CONFIGS)
def test_magnitude_is_the_norm_of_a_heads_own_weights(family: str) -> None:
    model = tiny(family)
    found = scores(model, [], "magnitude")
    for layer in range(2):
        output = model.get_submodule(OUTPUTS[family].format(layer)).weight
        value = model.get_submodule(VALUES[family].format(layer)).weight[-HIDDEN:]
        for head in range(HEADS):
            part = slice(head * SIZE, (head + 1) * SIZE)
            expected = (value[part].square().sum() + output[:, part].square().sum()).sqrt()
            assert found[layer][head].item() == pytest.approx(expected.item(), rel=1e-10)
    assert torch.equal(
        magnitude.norms(torch.eye(4)[:, None], 2 * torch.eye(4)[:, None]),
        torch.full((4,), 5.0, dtype=torch.float64).sqrt(),
    )


def test_random_importance_depends_on_the_seed_alone() -> None:
    model = tiny("bert")
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = scores(model, [], "random", seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    close(first, random([HEADS, HEADS], 7), rtol=0)
    assert not torch.equal(torch.stack(first), torch.stack(scores(model, [], "random", seed=8)))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("family", CONFIGS)
def test_weight_product_is_the_norm_of_the_map_that_a_head_writes(family: str) -> None:
    model = tiny(family)
    found = scores(model, [], "weight_product")
    for index, layer in enumerate(parts.layers(model)):
        value, bias = layer.projections[-1].weight[-HIDDEN:], layer.projections[-1].bias
        for head in range(HEADS):
            own = range(head * SIZE, (head + 1) * SIZE)
            expected = 0.0
            for row in layer.output.weight.tolist():
                for column in range(HIDDEN):
                    expected += sum(row[unit] * value[unit, column].item() for unit in own) ** 2
                if bias is not None:
                    expected += sum(row[unit] * bias[-HIDDEN:][unit].item() for unit in own) ** 2
            assert found[index][head].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_student_keeps_the_heads_that_the_criterion_ranks_first(family: str) -> None:
    model = tiny(family)
    expected = [truncation.head_importance(layer) for layer in parts.layers(model)]
    close(scores(model, [], "weight_product"), expected)


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_rescaling_values_against_outputs_changes_the_magnitude_and_not_the_product(factor: float) -> None:
    model = tiny("bert")
    before = {name: scores(model, [], name) for name in ("magnitude", "weight_product")}
    with torch.no_grad():
        for layer in parts.layers(model):
            layer.projections[-1].weight *= factor
            layer.projections[-1].bias *= factor
            layer.output.weight /= factor
    close(scores(model, [], "weight_product"), before["weight_product"])
    assert not torch.allclose(scores(model, [], "magnitude")[0], before["magnitude"][0], rtol=0.01)


def test_an_unknown_criterion_is_refused_with_those_that_the_structure_has(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ", ".join(CRITERIA)
    with pytest.raises(UserError, match=rf"^criterion: expected one of {known} for heads, given 'gradient'$"):
        find("gradient", "heads")

    class OfNothing(Criterion):
        structures = ()

    monkeypatch.setitem(CRITERIA, "nothing", OfNothing)
    with pytest.raises(UserError, match=rf"^criterion: expected one of {known} for heads, given 'nothing'$"):
        find("nothing", "heads")


def test_the_documents_name_every_criterion() -> None:
    documents = (Path(__file__).parents[2] / "docs/pruning.md").read_text()
    table = documents.partition("## Criteria")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(CRITERIA)
