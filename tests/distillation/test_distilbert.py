"""DistilBERT: the cosine and the masked words against float64 loops, BERT's masking, the stage on task and corpus."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from edgemin import config, toy
from edgemin.data.module import DataModule
from edgemin.data.splits import load
from edgemin.distillation.distilbert import (
    IGNORED,
    DistilbertDistillation,
    MaskedLanguageHead,
    hidden_cosine,
    mask_tokens,
    masked_word_loss,
)
from edgemin.encoder import building
from edgemin.encoder.parts import head_prefixes
from edgemin.errors import UserError
from edgemin.store.cache import Cache
from edgemin.tasks.classification import soft_target_kl

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")
LENGTHS = [5, 7, 1, 3]  # of 7


def padding_mask(lengths: list[int], width: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


def sample(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(4, 7, 6, generator=generator, dtype=torch.float64)).to(dtype)


MASK = padding_mask(LENGTHS, 7)

# The cosine


def cosine_reference(teacher: Tensor, student: Tensor, mask: Tensor) -> float:
    """The equation, one number at a time, in Python's float64."""
    per_sequence = []
    for example, kept in enumerate(mask.tolist()):
        distances = []
        for token in [index for index, one in enumerate(kept) if one]:
            a, b = teacher[example, token].double().tolist(), student[example, token].double().tolist()
            product = sum(x * y for x, y in zip(a, b, strict=True))
            distances.append(1 - product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)))
        per_sequence.append(sum(distances) / len(distances))
    return sum(per_sequence) / len(per_sequence)


def test_the_cosine_equals_a_float64_loop_over_the_equation() -> None:
    teacher, student = sample(0), sample(1)
    expected = cosine_reference(teacher, student, MASK)
    assert hidden_cosine(teacher, student, MASK).item() == pytest.approx(expected, rel=1e-12)
    assert hidden_cosine(teacher.float(), student.float(), MASK).item() == pytest.approx(expected, rel=1e-5)


def test_the_cosine_is_the_published_loss_where_lengths_are_equal() -> None:
    teacher, student = sample(0), sample(1)
    published = F.cosine_embedding_loss(student.flatten(0, 1), teacher.flatten(0, 1), torch.ones(28))
    torch.testing.assert_close(hidden_cosine(teacher, student, torch.ones_like(MASK)), published)


def test_equal_states_have_no_cosine_loss_and_no_gradient() -> None:
    teacher = sample(0, torch.float32)
    student = teacher.clone().requires_grad_()
    loss = hidden_cosine(teacher, student, MASK)
    loss.backward()
    assert loss.item() == 0 and student.grad is not None and student.grad.abs().max() < 1e-6


def test_neither_padding_nor_neighbours_change_the_cosine() -> None:
    teacher, student = sample(0), sample(1).requires_grad_()
    loss = hidden_cosine(teacher, student, MASK)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[MASK == 0].eq(0).all() and gradient[MASK == 1].ne(0).any()
    padded = hidden_cosine(*(F.pad(x, (0, 0, 0, 3), value=9.0) for x in (teacher, student)), F.pad(MASK, (0, 3)))
    torch.testing.assert_close(padded, loss)
    alone = [hidden_cosine(teacher[[i], :n], student[[i], :n], MASK[[i], :n]) for i, n in enumerate(LENGTHS)]
    torch.testing.assert_close(torch.stack(alone).mean(), loss)
    without = torch.cat([MASK, torch.zeros_like(MASK[:1])])
    one_more = hidden_cosine(torch.cat([teacher, teacher[:1]]), torch.cat([student, 0 * student[:1]]), without)
    torch.testing.assert_close(one_more, loss)
    assert torch.autograd.grad(one_more, student)[0].isfinite().all()


def test_the_gradient_of_the_cosine_passes_gradcheck_and_the_teacher_gets_none() -> None:
    teacher, student = sample(0).requires_grad_(), sample(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda learnt: hidden_cosine(teacher.detach(), learnt, MASK), (student,))
    hidden_cosine(teacher, student, MASK).backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_arithmetic_is_float32_for_16_bits_and_under_autocast(dtype: torch.dtype) -> None:
    teacher, student = sample(0, dtype), sample(1, dtype)
    targets = torch.where(MASK.bool(), 3, IGNORED)
    logits = student[MASK.bool()]
    with torch.autocast("cpu", dtype=dtype):
        losses = hidden_cosine(teacher, student, MASK), masked_word_loss(logits, targets)
    expected = hidden_cosine(teacher.float(), student.float(), MASK), masked_word_loss(logits.float(), targets)
    assert all(torch.equal(*pair) and pair[0].dtype == torch.float32 for pair in zip(losses, expected, strict=True))


# Masked words


def test_a_fixed_share_of_each_sequences_words_is_chosen_and_no_other_token_touched() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 1000, (40, 200), generator=generator)
    maskable = padding_mask([1, 2, 10, 200] * 10, 200)
    maskable[:, 0] = 0
    maskable[0] = 0
    torch.manual_seed(1)
    hidden, targets = mask_tokens(ids, maskable, mask_id=4, vocabulary=1000)
    chosen = targets != IGNORED
    assert not (chosen & (maskable == 0)).any()
    assert torch.equal(hidden[~chosen], ids[~chosen]) and torch.equal(targets[chosen], ids[chosen])
    available = maskable.sum(-1)
    expected = [0 if n == 0 else max(1, round(0.15 * n)) for n in available.tolist()]
    assert chosen.sum(-1).tolist() == expected and {0, 1, 30} <= set(expected)


def test_of_the_chosen_words_80_percent_are_masked_10_replaced_and_10_kept() -> None:
    ids = torch.randint(5, 1000, (100, 500), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    hidden, targets = mask_tokens(ids, torch.ones_like(ids), mask_id=4, vocabulary=1000)
    read, words = hidden[targets != IGNORED], targets[targets != IGNORED]
    assert len(words) == 100 * 75
    replaced = (read != 4) & (read != words)
    for found, share in ((read == 4, 0.8), (replaced, 0.1), (read == words, 0.1)):
        assert found.float().mean().item() == pytest.approx(share, abs=0.015)
    assert read[replaced].unique().numel() > 300 and read.min() >= 0 and read.max() < 1000
    positions = (targets != IGNORED).float().mean(0)
    assert positions.min() > 0.02 and positions.max() < 0.35, "every position is chosen about as often"


def test_the_mask_is_drawn_from_torchs_generator() -> None:
    ids = torch.randint(5, 1000, (4, 50), generator=torch.Generator().manual_seed(0))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(mask_tokens(ids, torch.ones_like(ids), mask_id=4, vocabulary=1000))
    assert all(torch.equal(*pair) for pair in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][1], drawn[2][1])


def test_the_word_loss_equals_a_float64_loop_and_a_sequence_without_masked_words_adds_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.full((3, 5), IGNORED)
    targets[0, 1], targets[0, 3], targets[2, 4] = 2, 0, 5
    logits = torch.randn(3, 6, generator=generator, dtype=torch.float64).requires_grad_()
    losses = []
    for row, word in zip(logits.tolist(), (2, 0, 5), strict=True):
        losses.append(math.log(sum(math.exp(value) for value in row)) - row[word])
    expected = ((losses[0] + losses[1]) / 2 + losses[2]) / 2
    assert masked_word_loss(logits, targets).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda given: masked_word_loss(given, targets), (logits,))
    nothing = masked_word_loss(logits[:0], torch.full((3, 5), IGNORED))
    assert nothing.item() == 0
    nothing.backward()


def test_the_head_is_that_of_hugging_faces_bert() -> None:
    settings = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    published = BertForMaskedLM(settings).eval()
    mine = MaskedLanguageHead(16, 16, 50)
    parts = dict(published.cls.predictions.named_parameters())
    with torch.no_grad():
        for parameter in parts.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        mine.transform.load_state_dict(published.cls.predictions.transform.dense.state_dict())
        mine.norm.load_state_dict(published.cls.predictions.transform.LayerNorm.state_dict())
        mine.bias.copy_(parts["bias"])
        states = torch.randn(7, 16)
        words = published.get_input_embeddings().weight
        torch.testing.assert_close(mine(states, words), published.cls(states), atol=1e-6, rtol=1e-5)


# The stage


def distillation(**settings: Any) -> DistilbertDistillation:
    given: dict[str, Any] = {"temperature": 2.0, "cosine_weight": 1.0, "hard_weight": 2.0, "steps": 2, "batch_size": 8}
    return tiny.stage(DistilbertDistillation, **(given | settings))


@pytest.fixture
def masking(tmp_path: Path) -> DataModule:
    """The toy task under a tokenizer that has a mask token."""
    tokenizer = toy.tokenizer()
    tokenizer.mask_token = "[UNK]"
    return DataModule(load(tiny.task()), tokenizer, Cache(tmp_path / "tokens"))


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "some.txt").write_text("the plot was good .\n\nthe cast was never dull .\n" * 50)
    return str(tmp_path / "corpus")


def last_states(of: Any, batch: Any) -> Tensor:
    """What Hugging Face returns as a BERT's last hidden states."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    with torch.no_grad():
        states = of.eval().base_model(**inputs).last_hidden_state
    assert isinstance(states, Tensor)
    return states


@pytest.mark.parametrize(
    ("settings", "soft", "cosine", "hard"),
    [
        ({}, 5.0, 1.0, 2.0),
        ({"soft_weight": 0.5, "cosine_weight": 0.25, "hard_weight": 0.0}, 0.5, 0.25, 0.0),
        ({"soft_weight": 0.0}, 0.0, 1.0, 2.0),
    ],
)
def test_on_a_task_the_loss_is_the_equation_on_what_both_sides_hold(
    settings: Any, soft: float, cosine: float, hard: float, data: DataModule, batch: dict[str, Tensor]
) -> None:
    student, teacher = tiny.model(dropout=0.0), tiny.model(layers=6, seed=5)
    stage = distillation(**settings)
    tiny.prepared(stage, student, teacher, data)
    learnt = tiny.logits(student, batch)
    expected = soft * soft_target_kl(tiny.logits(teacher, batch), learnt, 2.0)
    expected += hard * F.cross_entropy(learnt, batch["labels"])
    of_teacher, of_student = last_states(teacher, batch), last_states(student, batch)
    expected += cosine * cosine_reference(of_teacher, of_student, batch["attention_mask"])
    loss = stage.loss(batch)
    torch.testing.assert_close(loss.detach(), expected, atol=1e-6, rtol=1e-5)
    loss.backward()
    without = {name for name, parameter in student.named_parameters() if parameter.grad is None}
    assert not without, "the head learns as well"
    assert len(list(stage.parameters())) == len(list(student.parameters())), "and nothing else"


def test_on_a_corpus_it_is_cosine_and_masked_words_on_the_same_masked_text(
    masking: DataModule, batch: dict[str, Tensor], corpus: str
) -> None:
    student, teacher = tiny.model(dropout=0.0), tiny.model(layers=6, seed=5)
    stage = distillation(corpus=corpus, cosine_weight=0.5)
    tiny.prepared(stage, student, teacher, masking)
    assert stage.word_head is not None
    text = {name: tensor for name, tensor in batch.items() if name != "labels"}

    torch.manual_seed(3)
    loss = stage.loss(text)
    torch.manual_seed(3)
    read = stage.inputs(text)
    chosen = read["masked_words"] != IGNORED
    assert not torch.equal(read["input_ids"], text["input_ids"]) and chosen.any()
    special = torch.isin(text["input_ids"], torch.tensor(stage.special_ids)) | (text["attention_mask"] == 0)
    assert special.any() and not (chosen & special).any()

    learnt = last_states(student, read)
    expected = 0.5 * cosine_reference(last_states(teacher, read), learnt, text["attention_mask"])
    words = student.get_submodule("bert.embeddings.word_embeddings").weight
    predicted = stage.word_head(learnt[chosen], words)
    expected += 2.0 * masked_word_loss(predicted, read["masked_words"]).detach()
    torch.testing.assert_close(loss.detach(), expected, atol=1e-6, rtol=1e-5)

    loss.backward()
    without = {name for name, parameter in stage.named_parameters() if parameter.grad is None}
    head = {f"model.{name}" for name, _ in student.named_parameters() if name.startswith(head_prefixes(student))}
    assert without == head, "all but the classification head, which has no labels to learn from"
    assert words.grad is not None and words.grad.abs().sum(-1).count_nonzero() == len(words), "the decoder is tied"


def test_without_the_cosine_a_corpus_teaches_masked_words_alone_without_a_teacher(
    masking: DataModule, batch: dict[str, Tensor], corpus: str
) -> None:
    student = tiny.model(dropout=0.0)
    stage = distillation(corpus=corpus, cosine_weight=0.0)
    assert stage.teachers == () and distillation(corpus=corpus).teachers == ("teacher.source",)
    tiny.plan(stage, student)
    assert not stage.planned.same_tokens and stage.planned.idle == ("teacher",)
    stage.prepare(student, masking)
    torch.manual_seed(3)
    loss = stage.loss(batch)
    torch.manual_seed(3)
    read = stage.inputs(batch)
    assert stage.word_head is not None
    words = student.get_submodule("bert.embeddings.word_embeddings").weight
    predicted = stage.word_head(last_states(student, read)[read["masked_words"] != IGNORED], words)
    torch.testing.assert_close(loss, 2.0 * masked_word_loss(predicted, read["masked_words"]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_learns_masked_words(
    family: str, masking: DataModule, batch: dict[str, Tensor], corpus: str
) -> None:
    student, teacher = tiny.model(family), tiny.model(layers=2, seed=5)
    stage = distillation(corpus=corpus, cosine_weight=1.0)
    tiny.prepared(stage, student, teacher, masking)
    loss = stage.loss(batch)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.get_input_embeddings().weight.grad is not None


def test_the_word_head_is_checkpointed_with_the_stage_and_left_behind_at_its_end(
    masking: DataModule, corpus: str
) -> None:
    student = tiny.model()
    before = set(student.state_dict())
    stage = distillation(corpus=corpus)
    tiny.prepared(stage, student, tiny.model(seed=5), masking)
    assert {name for name in stage.state_dict() if not name.startswith("model.")} == {
        f"word_head.{name}" for name in ("transform.weight", "transform.bias", "norm.weight", "norm.bias", "bias")
    }
    assert set(stage.finish().state_dict()) == before


def test_a_killed_fit_on_a_corpus_ends_as_an_unbroken_one_and_learns_both(
    masking: DataModule, corpus: str, tmp_path: Path
) -> None:
    teacher = tiny.model(layers=2, seed=5)

    def run(work: str, *callbacks: Any) -> tuple[Any, list[float]]:
        stage = distillation(corpus=corpus, corpus_length=16, steps=40, learning_rate=3e-3, decay="constant")
        losses: list[float] = []
        original = stage.loss

        def watched(batch: Any) -> Tensor:
            losses.append((loss := original(batch)).item())
            return loss

        stage.loss = watched  # type: ignore[method-assign]
        fitted = tiny.fit(stage, tiny.model(), masking, [teacher], work=tmp_path / work, seconds=0, callbacks=callbacks)
        return fitted.model, losses

    unbroken, losses = run("unbroken")
    assert len(losses) == 40 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    with pytest.raises(tiny.KilledError):
        run("killed", tiny.Kill(7))
    resumed, rest = run("killed")
    assert len(rest) == 34, "the killed batch and those after it"
    assert tiny.same_weights(unbroken, resumed)


def test_replacements_are_words_that_both_sides_know(masking: DataModule, corpus: str) -> None:
    stage = distillation(corpus=corpus)
    teacher = building.outline(tiny.model())
    student = replace(teacher, vocabulary=200)
    stage.mask_id = 1
    stage.match(student, [teacher])
    stage.equip(student, [teacher])
    assert stage._vocabulary == teacher.vocabulary == 132
    assert stage.word_head is not None and stage.word_head.bias.shape == (200,)


def test_without_a_mask_token_masked_words_are_refused_and_the_cosine_alone_is_not(
    data: DataModule, batch: dict[str, Tensor], corpus: str
) -> None:
    with pytest.raises(UserError, match=r"^hard_weight: expected 0 with a corpus, [^\n]* mask token, given 2\.0$"):
        tiny.prepared(distillation(corpus=corpus), tiny.model(), tiny.model(seed=5), data)
    student, teacher = tiny.model(dropout=0.0), tiny.model(seed=5)
    stage = distillation(corpus=corpus, hard_weight=0.0)
    tiny.prepared(stage, student, teacher, data)
    expected = cosine_reference(last_states(teacher, batch), last_states(student, batch), batch["attention_mask"])
    assert stage.loss(batch).item() == pytest.approx(expected, rel=1e-5)


def test_the_head_is_trained_on_a_task_and_goes_stale_on_a_corpus(corpus: str) -> None:
    on_task, on_corpus = distillation(), distillation(corpus=corpus)
    assert tiny.effect(on_task).trains_head and tiny.effect(on_task).reads_task and on_task.teachers == ("teacher",)
    assert tiny.effect(distillation(hard_weight=0.0)).trains_head, "by soft targets"
    assert not tiny.effect(distillation(soft_weight=0.0, hard_weight=0.0)).trains_head
    assert (
        tiny.effect(on_corpus).leaves_head_stale
        and not tiny.effect(on_corpus).trains_head
        and not tiny.effect(on_corpus).reads_task
    )
    assert on_corpus.teachers == ("teacher.source",)
    assert (on_task.soft_weight, on_corpus.soft_weight) == (5.0, 0.0)
    assert tiny.effect(on_task).reads_answers and not tiny.effect(on_corpus).reads_answers


def test_widths_that_differ_are_refused_unless_no_states_are_compared(data: DataModule) -> None:
    shapes = tiny.outline("bert", 6, 384, 12), [tiny.outline("bert", 12, 768, 12)]
    with pytest.raises(UserError, match=r"^cosine_weight: expected 0 [^\n]* 384 [^\n]* 768, [^\n]* given 1\.0$"):
        distillation().match(*shapes)
    with pytest.raises(UserError, match=r"^cosine_weight: expected 0 [^\n]* 32 [^\n]* 64, [^\n]* given 1\.0$"):
        tiny.prepared(distillation(), tiny.model(), tiny.model(hidden=64), data)
    distillation(cosine_weight=0.0).match(*shapes)
    tiny.prepared(distillation(cosine_weight=0.0), tiny.model(), tiny.model(hidden=64), data)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"soft_weight": -1.0}, "soft_weight"),
        ({"soft_weight": math.inf}, "soft_weight"),
        ({"soft_weight": "some"}, "soft_weight"),
        ({"soft_weight": 5.0, "corpus": "some/text"}, "soft_weight"),
        ({"cosine_weight": -1.0}, "cosine_weight"),
        ({"cosine_weight": math.nan}, "cosine_weight"),
        ({"cosine_weight": 0.0, "soft_weight": 0.0}, "cosine_weight"),
        ({"cosine_weight": 0.0, "hard_weight": 0.0, "corpus": "some/text"}, "cosine_weight"),
        ({"hard_weight": -1.0}, "hard_weight"),
        ({"teacher": ["teacher", "second"]}, "teacher"),
    ],
)
def test_settings_that_cannot_be_answer_one_line_that_begins_with_the_key(settings: Any, key: str) -> None:
    with pytest.raises(UserError, match=rf"^distill\.{key}: expected [^\n]* given [^\n]*$"):
        config.construct(tiny.node("distill", "distilbert") | settings, "distill")
