"""Metrics equal closed forms, and neither padding nor batch size changes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from edgemin import toy
from edgemin.data.encoding import Encoded, encode
from edgemin.data.examples import Examples
from edgemin.data.splits import load
from edgemin.data.task import Task
from edgemin.encoder import taps
from edgemin.errors import UserError
from edgemin.evaluate import evaluate
from edgemin.store.cache import Cache
from edgemin.tasks.base import Kind
from edgemin.tasks.classification import Classification, matthews
from edgemin.tasks.regression import Regression

KIND, NUMBERS = Classification(), Regression()


class Oracle(nn.Module):
    """Answers with the logits it was given, in the order it is asked."""

    def __init__(self, logits: Tensor, encoded: Encoded) -> None:
        super().__init__()
        self.answers = {tuple(encoded.batch([i])["input_ids"][0].tolist()): logits[i] for i in range(len(encoded))}


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> type[Oracle]:
    def answer(model: Oracle, batch: dict[str, Tensor]) -> Tensor:
        width = {True: 8, False: 16}
        rows = []
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            rows.append(model.answers[tuple(ids[: width[int(mask.sum()) <= 8]].tolist())])
        return torch.stack(rows)

    monkeypatch.setattr(taps, "logits", answer)
    return Oracle


def scored(model: Any, encoded: Encoded, kind: Kind, outputs: int, **settings: Any) -> dict[str, float]:
    return evaluate(model, encoded, kind, outputs, kind.metrics(outputs), **settings).metrics


def split(labels: np.ndarray, cache: Path) -> Encoded:
    # Every text is another number of two digits in words of the toy task, so that an input names its example.
    words = toy.vocabulary()[10:110]
    texts = [(f"{words[i]} " * (1 + 9 * (i % 2)),) for i in range(len(labels))]
    return encode(Examples(texts, labels), toy.tokenizer(), 16, Cache(cache))


def f1(truth: np.ndarray, guess: np.ndarray, positive: int) -> float:
    hit = np.sum((truth == positive) & (guess == positive))
    return float(2 * hit / (np.sum(truth == positive) + np.sum(guess == positive)))


def test_two_classes_have_accuracy_f1_and_matthews(tmp_path: Path, oracle: type[Oracle]) -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(2, size=60)
    encoded = split(truth, tmp_path)
    logits = torch.from_numpy(generator.normal(size=(60, 2)).astype(np.float32))
    found = evaluate(oracle(logits, encoded), encoded, KIND, 2, KIND.metrics(2), batch_size=7)
    guess = logits.numpy().argmax(1)
    tp, tn = np.sum((truth == 1) & (guess == 1)), np.sum((truth == 0) & (guess == 0))
    fp, fn = np.sum((truth == 0) & (guess == 1)), np.sum((truth == 1) & (guess == 0))
    correlation = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    exact = logits.double().numpy()
    entropy = np.mean(np.log(np.exp(exact).sum(1)) - exact[np.arange(60), truth])
    expected = {"accuracy": np.mean(truth == guess), "f1": f1(truth, guess, 1), "matthews": correlation}
    assert list(found.metrics) == ["accuracy", "f1", "matthews", "loss", "n"]
    assert found.metrics == pytest.approx({**expected, "loss": entropy, "n": 60}, abs=1e-6)
    assert np.array_equal(found.logits, logits.numpy()) and found.logits.dtype == np.float32


def test_more_classes_have_accuracy_macro_f1_and_matthews(tmp_path: Path, oracle: type[Oracle]) -> None:
    generator = np.random.default_rng(1)
    truth = generator.integers(3, size=60)
    encoded = split(truth, tmp_path)
    logits = torch.from_numpy(generator.normal(size=(60, 3)).astype(np.float32))
    metrics = evaluate(oracle(logits, encoded), encoded, KIND, 3, KIND.metrics(3)).metrics
    guess = logits.numpy().argmax(1)
    assert list(metrics) == ["accuracy", "macro_f1", "matthews", "loss", "n"]
    assert metrics["matthews"] == pytest.approx(reference_matthews(counts(truth, guess, 3)), abs=1e-12)
    assert metrics["accuracy"] == pytest.approx(np.mean(truth == guess))
    assert metrics["macro_f1"] == pytest.approx(np.mean([f1(truth, guess, c) for c in range(3)]))


def test_a_regression_has_pearson_and_spearman(tmp_path: Path, oracle: type[Oracle]) -> None:
    generator = np.random.default_rng(2)
    truth = generator.normal(size=50).astype(np.float32)
    encoded = split(truth, tmp_path)
    guess = (truth + generator.normal(size=50)).astype(np.float32)
    metrics = scored(oracle(torch.from_numpy(guess)[:, None], encoded), encoded, NUMBERS, 1)
    ranks = [np.argsort(np.argsort(values)) for values in (truth, guess)]
    expected = {
        "pearson": np.corrcoef(truth, guess)[0, 1],
        "spearman": np.corrcoef(*ranks)[0, 1],
        "loss": np.mean((truth - guess) ** 2),
        "n": 50,
    }
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_a_correlation_with_constant_predictions_is_zero(tmp_path: Path, oracle: type[Oracle]) -> None:
    encoded = split(np.arange(10, dtype=np.float32), tmp_path)
    metrics = scored(oracle(torch.ones(10, 1), encoded), encoded, NUMBERS, 1)
    assert (metrics["pearson"], metrics["spearman"]) == (0.0, 0.0)


@pytest.mark.parametrize("level", [0.3, -7.0, 1000.0])
def test_predictions_that_differ_by_rounding_alone_have_no_correlation(level: float) -> None:
    labels = torch.arange(40, dtype=torch.float32)
    rising = torch.full((40,), level).nextafter(torch.tensor(1e9)).where(labels > 20, torch.tensor(level))
    found = NUMBERS.score(rising[:, None], labels, ["pearson", "spearman"], 1)
    assert found == {"pearson": 0.0, "spearman": 0.0}


def test_small_or_shifted_predictions_correlate_as_others_do() -> None:
    drawn = np.random.default_rng(3)
    labels = drawn.normal(size=500).astype(np.float32)
    guess = labels + drawn.normal(size=500).astype(np.float32)
    for shift, scale in ((0.0, 1e-25), (3.0, 1e-4), (1000.0, 1.0)):
        moved = (shift + scale * guess.astype(np.float64)).astype(np.float32)
        found = NUMBERS.score(torch.from_numpy(moved)[:, None], torch.from_numpy(labels), ["pearson"], 1)
        expected = np.corrcoef(moved.astype(np.float64), labels.astype(np.float64))[0, 1]
        assert found["pearson"] == pytest.approx(expected, abs=1e-9)


def counts(truth: np.ndarray, guess: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix: a row for each class, a column for each prediction."""
    found = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(found, (truth, guess), 1)
    return found


def reference_matthews(confusion: np.ndarray) -> float:
    """As scikit-learn defines it, in float64: covariances of indicators, and 0 where a variance is 0."""
    share = confusion.astype(np.float64) / confusion.sum()
    true, predicted = share.sum(1), share.sum(0)
    if true.max() == 1 or predicted.max() == 1:
        return 0.0
    covariance = np.trace(share) - true @ predicted
    return float(covariance / np.sqrt((1 - true @ true) * (1 - predicted @ predicted)))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_matthews_is_scikit_learns_on_random_confusion_matrices(classes: int) -> None:
    drawn = np.random.default_rng(classes)
    for _ in range(50):
        confusion = drawn.integers(0, 10 ** drawn.integers(1, 5), size=(classes, classes))
        confusion *= drawn.integers(0, 2, size=confusion.shape)  # with holes
        if confusion.sum():
            found = matthews(torch.from_numpy(confusion))
            assert found == pytest.approx(reference_matthews(confusion), abs=1e-9) and abs(found) <= 1


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("wrong", [0, 1, 200, 400])
def test_matthews_of_a_constant_classifier_is_zero(classes: int, wrong: int) -> None:
    for answer in range(classes):
        truth = np.array([answer] * (400 - wrong) + [(answer + 1) % classes] * wrong)
        guess = np.full(400, answer)
        for rows, columns in ((truth, guess), (guess, truth)):  # all predictions equal, or all labels
            assert matthews(torch.from_numpy(counts(rows, columns, classes))) == 0.0
            logits = torch.nn.functional.one_hot(torch.from_numpy(columns), classes).float()
            found = KIND.score(logits, torch.from_numpy(rows), ["matthews"], classes)
            assert found == {"matthews": 0.0}


def test_matthews_of_one_rare_example_among_many_is_exact() -> None:
    confusion = np.array([[1, 0], [1, 362_998]])
    assert matthews(torch.from_numpy(confusion)) == pytest.approx(math.sqrt(0.5), abs=1e-5)


def test_f1_of_what_is_neither_there_nor_predicted_is_zero_or_left_out() -> None:
    truth, logits = torch.zeros(9, dtype=torch.int64), torch.eye(3)[[0] * 9]
    assert KIND.score(logits[:, :2], truth, ["f1"], 2) == {"f1": 0.0}
    truth[:3] = 1
    found = KIND.score(logits, truth, ["macro_f1"], 3)
    assert found["macro_f1"] == pytest.approx(
        np.mean([2 * 6 / (6 + 9), 0.0])
    )  # without the third class, as scikit-learn


def test_a_class_the_head_does_not_have_is_never_predicted(tmp_path: Path, oracle: type[Oracle]) -> None:
    truth = np.array([0, 1, 2, 2, 1, 0])
    encoded = split(truth, tmp_path)
    guess = np.array([0, 1, 0, 1, 0, 0])
    logits = torch.nn.functional.one_hot(torch.from_numpy(guess), 2).float()
    metrics = scored(oracle(logits, encoded), encoded, KIND, 3, transfer=True)
    assert metrics == pytest.approx(
        {
            "accuracy": 0.5,
            "macro_f1": np.mean([f1(truth, guess, c) for c in range(3)]),
            "matthews": reference_matthews(counts(truth, guess, 3)),
            "n": 6,
        }
    )
    with pytest.raises(AssertionError):
        scored(oracle(logits, encoded), encoded, KIND, 3)


def test_a_class_the_data_does_not_have_is_always_wrong(tmp_path: Path, oracle: type[Oracle]) -> None:
    truth = np.array([0, 1, 1, 0])
    encoded = split(truth, tmp_path)
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 2]), 3).float()
    metrics = scored(oracle(logits, encoded), encoded, KIND, 2, transfer=True)
    assert metrics["accuracy"] == 0.5
    assert metrics["f1"] == pytest.approx(2 / 3)


def test_metrics_come_as_asked_and_unknown_ones_are_refused(tmp_path: Path, oracle: type[Oracle]) -> None:
    encoded = split(np.array([0, 1, 1]), tmp_path)
    model = oracle(torch.eye(3)[:, :2], encoded)
    metrics = evaluate(model, encoded, KIND, 2, KIND.checked_metrics(["matthews", "accuracy"], 2)).metrics
    assert list(metrics) == ["matthews", "accuracy", "loss", "n"]
    with pytest.raises(UserError, match=r"^task\.metrics: expected some of accuracy, f1, matthews .*, given bleu$"):
        KIND.checked_metrics(["bleu"], 2)


def test_the_primary_metric_leads() -> None:
    assert KIND.checked_metrics(None, 2)[0] == KIND.checked_metrics(None, 3)[0] == "accuracy"
    assert NUMBERS.checked_metrics(None, 1)[0] == "pearson"
    assert KIND.checked_metrics(["f1", "accuracy"], 2)[0] == "f1"


@pytest.fixture(scope="module")
def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(toy.vocabulary()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    task = Task(
        name="toy",
        text_columns=["sentence"],
        evaluation_splits=["validation"],
        max_train_examples=10,
        max_evaluation_examples=120,
        max_length=48,
    )
    return encode(load(task).evaluation["validation"], toy.tokenizer(), 48, Cache(tmp_path_factory.mktemp("cache")))


def test_neither_padding_nor_batch_size_changes_anything(
    model: BertForSequenceClassification, reviews: Encoded
) -> None:
    one, many = (evaluate(model, reviews, KIND, 2, KIND.metrics(2), batch_size=size) for size in (1, 50))
    assert np.abs(one.logits - many.logits).max() < 1e-5
    assert one.metrics == pytest.approx(many.metrics, abs=1e-6)
    model.eval()
    with torch.inference_mode():
        for index in (0, 17, 63):
            start, length = int(reviews.starts[index]), int(reviews.lengths[index])
            unpadded = model(input_ids=reviews.ids[start : start + length].long()[None]).logits[0]
            assert np.abs(unpadded.numpy() - many.logits[index]).max() < 1e-5


def test_the_model_is_left_in_the_mode_it_was_in(model: BertForSequenceClassification, reviews: Encoded) -> None:
    model.train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    scored(model, reviews, KIND, 2)
    assert [module.training for module in model.modules()] == modes
