"""The predictions beside run.json: what is in them, and that half precision changes no answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import studies
from numpy.typing import NDArray
from safetensors.numpy import load_file

from edgemin import toy
from edgemin.store.artifacts import Store
from edgemin.study.nodes import StudyData
from edgemin.study.plan import build
from edgemin.study.predictions import smallest, write_examples
from edgemin.study.reading import read_study
from edgemin.tasks.table import find


def logits(*rows: list[float]) -> NDArray[np.float32]:
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize("outputs", [2, 3, 77])
def test_half_precision_gives_the_same_class_with_a_highest_logit_of_its_own(outputs: int) -> None:
    drawn = np.random.default_rng(0)
    near = drawn.normal(size=(5000, 1)) + drawn.normal(scale=3e-4, size=(5000, outputs))
    exact = (near * 10.0 ** drawn.integers(-9, 5, size=(5000, 1))).astype(np.float32)
    assert (exact.astype(np.float16).argmax(1) != exact.argmax(1)).sum() > 500, "the case that this is about"
    half = smallest(exact, find("classification"))
    assert half.dtype == np.float16 and np.isfinite(half).all()
    assert (half.argmax(1) == exact.argmax(1)).all()
    assert (np.diff(np.sort(half.astype(np.float64), axis=1)[:, -2:]) > 0).all()
    assert np.allclose(half, exact.clip(-65472, 65472), rtol=2e-3, atol=1e-6)


def test_what_is_far_out_of_range_keeps_its_answer() -> None:
    half = smallest(logits([3e5, 9e5], [-1e9, -2e9], [65504, 65520]), find("classification"))
    assert half.tolist() == [[65472, 65504], [-65440, -65472], [65472, 65504]]


def test_each_of_several_labels_keeps_its_sign_and_a_regression_its_digits() -> None:
    kind = find("multi_label")
    assert smallest(logits([1.5, -0.25], [0.0, 2.0]), kind).dtype == np.float16
    tiny = logits([1e-9, 1.0])
    assert smallest(tiny, kind) is tiny, "half precision has no number so small"
    score = logits([3.14159], [2.0])
    assert smallest(score, find("regression")) is score


def test_what_all_rows_share_is_kept_once_with_the_row_numbers_of_the_split(tmp_path: Path) -> None:
    for split, count, seed in (("train", 64, 1), ("validation", 30, 2)):
        texts, label = toy.generate(count, seed)
        lines = [f'"{text}",{name}' for text, name in zip(texts, label, strict=True)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    own = ("task=custom", f"task.path={tmp_path}", "stages=[finetune]")
    study = read_study(studies.settings(*own, "task.max_evaluation_examples=12"))
    whole = read_study(studies.settings(*own)).splits
    assert study.splits is not None and whole is not None
    plan = build(study)
    write_examples(tmp_path / "kept", study.splits, StudyData(study, Store(tmp_path / "store")), plan.nodes[0])
    kept = load_file(tmp_path / "kept" / "examples.custom.validation.safetensors")
    examples = study.splits.evaluation["validation"]
    assert kept["labels"].tolist() == examples.labels.tolist()
    assert [whole.evaluation["validation"].texts[place] for place in kept["rows"]] == examples.texts
    assert sorted(set(kept["rows"].tolist())) == kept["rows"].tolist() != list(range(12))
    assert kept["tokens"].tolist() == [len(toy.tokenizer()(text)["input_ids"]) for (text,) in examples.texts]
    assert (kept["rows"].dtype.name, kept["tokens"].dtype.name) == ("int32", "int16")
