"""What is served answers as what was scored, with tokenizers that cut on the left or make no segment ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
from bundles import bare
from numpy.typing import NDArray

import edgemin
from edgemin import artifact, toy
from edgemin.data.encoding import Encoded, encode
from edgemin.data.examples import Examples
from edgemin.deploy import bundle, scored
from edgemin.deploy.runtime import open_model
from edgemin.encoder import building
from edgemin.evaluate import evaluate
from edgemin.store.cache import Cache
from edgemin.tasks.table import KINDS

LONGEST = 12
LABELS = ("bad", "good")
ODD: dict[str, dict[str, Any]] = {
    "left": {"truncation_side": "left"},
    "without_types": {"model_input_names": ["input_ids", "attention_mask"]},
}
SENTENCES = toy.generate(6, seed=3)[0]
PAIRS = [*zip(SENTENCES[:3], SENTENCES[3:], strict=True), ("so good", "not so"), (" ".join(SENTENCES * 40), "dull")]
ANSWER = """
import json, sys
from predict import encode, load
answer = load(1)
print(json.dumps([answer(encode(texts))[0].tolist() for texts in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module", params=ODD)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Encoded, NDArray[np.float32]]:
    """An artifact, its bundle, pairs as a study encodes them, and the logits [N, C] that it scores."""
    pytest.importorskip("onnxruntime")
    folder, out = tmp_path_factory.mktemp("artifact"), tmp_path_factory.mktemp("bundle")
    tokenizer, model = toy.tokenizer(), tiny.model()
    for name, value in ODD[request.param].items():
        setattr(tokenizer, name, value)
        tokenizer.init_kwargs[name] = value  # which are saved
    torch.manual_seed(1)
    building.attach_head(model, LABELS, KINDS["classification"].problem_type)
    with torch.no_grad():
        model.classifier.weight.normal_(std=5)  # type: ignore[union-attr, operator]
    task = {"name": "toy", "text_columns": ["one", "two"], "max_length": LONGEST}
    artifact.save(folder, model, tokenizer, {"task": task})
    reloaded, kept = edgemin.load(folder)
    assert kept is not None and {name: getattr(kept, name) for name in ODD[request.param]} == ODD[request.param]
    encoded = encode(Examples(PAIRS, np.zeros(len(PAIRS), np.int64)), kept, LONGEST, Cache(folder / "cache"))
    assert (encoded.types is None) == (request.param == "without_types") and min(encoded.lengths) < LONGEST
    bundle.write(folder, "onnxruntime", out)
    logits = evaluate(reloaded, encoded, KINDS["classification"], 2, ("accuracy",)).logits
    return folder, out, encoded, np.asarray(logits)


def test_a_runtime_scores_what_torch_scores(served: tuple[Path, Path, Encoded, NDArray[np.float32]]) -> None:
    _, out, encoded, logits = served
    found = scored.score(open_model("onnxruntime", out, 1), encoded, KINDS["classification"], 2, ("accuracy",))
    assert np.allclose(found.logits, logits, atol=1e-5)


def test_the_pipeline_answers_what_was_scored(served: tuple[Path, Path, Encoded, NDArray[np.float32]]) -> None:
    folder, out, _, logits = served
    for path in (folder, out):
        assert np.allclose(edgemin.pipeline(path)._logits(PAIRS)[0], logits, atol=1e-5)


def test_a_bundle_by_itself_answers_what_was_scored(
    served: tuple[Path, Path, Encoded, NDArray[np.float32]], tmp_path: Path
) -> None:
    _, out, _, logits = served
    found = json.loads(bare(out, ["-c", ANSWER, json.dumps(PAIRS)], ("torch", "edgemin"), tmp_path / "site"))
    assert np.allclose(cast(list[list[float]], found), logits, atol=1e-5)
