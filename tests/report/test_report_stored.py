"""Stored predictions are read as they were written, and refused in one line where they are not what they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_json
from safetensors.numpy import save_file

from edgemin.errors import UserError
from edgemin.report import schema, stored
from edgemin.report.schema import Run

SHARED = "predictions/examples.sst2.validation.safetensors"
OWN = "predictions/0/sst2.validation.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    data = run_json.run()
    data["rows"][0]["predictions"] = "predictions/0"
    kept: dict[str, dict[str, Any]] = {
        SHARED: {
            "labels": np.array([0, 1, 1]),
            "rows": np.array([0, 4, 9], dtype=np.int32),
            "tokens": np.array([5, 17, 9], dtype=np.int16),
        },
        OWN: {"logits": np.array([[1, 0], [0, 2], [0.5, 1]], dtype=np.float16)},
        "predictions/0/sst2.validation.openvino.safetensors": {"logits": np.ones((3, 2), dtype=np.float16)},
    }
    for name, tensors in kept.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, tmp_path / name)
    return schema.read(run_json.save(tmp_path, data))


def test_examples_and_answers_are_read(run: Run) -> None:
    found = stored.examples(run, "sst2", "validation")
    assert found is not None and found.labels.tolist() == [0, 1, 1]
    assert found.rows.tolist() == [0, 4, 9] and found.tokens.tolist() == [5, 17, 9]
    own = stored.answers(run, run.rows[0], "sst2", "validation")
    assert own is not None and own.dtype == np.float32 and own.argmax(1).tolist() == [0, 1, 1]
    there = stored.answers(run, run.rows[0], "sst2", "validation", "openvino")
    assert there is not None and (there == 1).all()


def test_what_was_not_kept_is_none(run: Run) -> None:
    row = run.rows[0]
    assert stored.examples(run, "sst2", "test") is None
    assert stored.answers(run, row, "sst2", "test") is None
    assert stored.answers(run, row, "sst2", "validation", "onnxruntime") is None
    assert stored.answers(run, row.model_copy(update={"predictions": None}), "sst2", "validation") is None
    (run.file.parent / SHARED).unlink()
    assert stored.answers(run, row, "sst2", "validation") is None


@pytest.mark.parametrize(
    ("name", "tensors", "said"),
    [
        (OWN, {"logits": np.ones((4, 2))}, "expected logits of the 3 examples of validation, given 4 x 2"),
        (OWN, {"logits": np.ones(3)}, "expected logits of the 3 examples of validation, given 3"),
        (OWN, {"labels": np.ones(3)}, "expected logits, given no logits"),
        (OWN, None, "expected predictions (safetensors), given a file that cannot be read"),
        (SHARED, {"labels": np.ones(3), "rows": np.ones(3)}, "expected labels, rows, tokens, given no tokens"),
        (
            SHARED,
            {"labels": np.ones(3), "rows": np.ones(3), "tokens": np.ones(2)},
            "expected as many labels, rows and tokens, given 3, 3, 2",
        ),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused_by_name(
    run: Run, name: str, tensors: dict[str, Any] | None, said: str
) -> None:
    file = run.file.parent / name
    if tensors is None:
        file.write_bytes(b"garbage")
    else:
        save_file(tensors, file)
    with pytest.raises(UserError) as refused:
        stored.answers(run, run.rows[0], "sst2", "validation")
    assert str(refused.value).startswith(f"{file}: {said}") and "\n" not in str(refused.value)
