"""The process in which one variant is measured: `python -m edgemin.measure.worker`, started by `runtime`.

It speaks JSON, one object per line, over its standard input and output. The first line it reads is the set-up, whose
keys are the arguments of [`Variant`][edgemin.measure.worker.Variant]; it loads the artifact, warms up and answers
`{"threads": n, "energy_source": "estimate"}`. Each further line asks for timed inferences, `{"form": "padded", "items":
[0, 0]}`, answered with `latency_ms` of each and with the `joules` and `seconds` of all, until `{"form": null}` asks for
the memory it took and ends it. End of input ends it too, so that it never outlives the process that asked.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from edgemin.encoder import building, taps
from edgemin.measure.energy import EnergyMeter
from edgemin.measure.memory import peak_bytes, resident_bytes

# Untimed inferences at the start of each turn: the other variants had the caches since the last one.
_REWARM = 2
_QUIET_S, _QUIET_AT_MOST_S = 0.02, 1.0


class Variant:
    """One loaded artifact and the inputs it is timed on.

    Args:
        artifact: What the loader is given.
        loader: "module.function" that returns (model, tokenizer).
        threads: Threads of torch's parallel operations.
        warmup: Untimed inferences on each form of input.
        length: Tokens of the padded input.
        sentences: Token ids of the task's sentences; may be empty.
        watts: Power of one busy core, where energy has to be estimated.
    """

    def __init__(
        self,
        artifact: str,
        loader: str,
        threads: int,
        warmup: int,
        length: int,
        sentences: Sequence[Sequence[int]],
        watts: float,
    ) -> None:
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        load = _function(loader)
        some = torch.ones(256, 256)
        some @ some  # the thread pool and the kernels are the runtime's, not the model's
        self.before_bytes = resident_bytes()
        # The tokenizer stays alive: whoever serves the model holds it as well.
        self.model, self.tokenizer = load(Path(artifact))
        self.model.eval()
        self.meter = EnergyMeter(watts)
        vocabulary = building.outline(self.model).vocabulary
        self.inputs = {"padded": [padded_input(vocabulary, length)]}
        if sentences:
            self.inputs["task"] = [sentence_input(vocabulary, sentence) for sentence in sentences]
        for inputs in self.inputs.values():
            for run in range(warmup):
                self.infer(inputs[run % len(inputs)])

    def infer(self, batch: Mapping[str, Tensor]) -> None:
        """Runs the model once on one input and discards the logits."""
        with torch.inference_mode():
            taps.logits(self.model, batch)

    def timed(self, form: str, items: Sequence[int]) -> dict[str, Any]:
        """Times one inference per item, then waits until this process has come to rest."""
        inputs = self.inputs[form]
        latency_ms = []
        gc.collect()
        gc.disable()
        for item in items[:_REWARM]:
            self.infer(inputs[item])
        self.meter.start()
        for item in items:
            start = time.perf_counter_ns()
            self.infer(inputs[item])
            latency_ms.append((time.perf_counter_ns() - start) / 1e6)
        energy = self.meter.stop()
        gc.enable()
        _come_to_rest()
        return {"latency_ms": latency_ms, **energy._asdict()}

    def memory(self) -> dict[str, Any]:
        """Resident set of this process: peak, now, and now less what the runtime held before the load."""
        resident = resident_bytes()
        return {
            "peak_memory_bytes": peak_bytes(),
            "runtime_memory_bytes": resident,
            "model_memory_bytes": resident - self.before_bytes,
        }


def padded_input(vocabulary: int, length: int) -> dict[str, Tensor]:
    """A sentence of which half is padding: without any, the attention would be spared its mask.

    Args:
        vocabulary: Ids are drawn below it.
        length: Tokens T.

    Returns:
        The same ids for the same arguments, [1, T].
    """
    draw = random.Random(length)
    batch = sentence_input(vocabulary, [draw.randrange(vocabulary) for _ in range(length)])
    batch["attention_mask"][:, (length + 1) // 2 :] = 0
    return batch


def sentence_input(vocabulary: int, sentence: Sequence[int]) -> dict[str, Tensor]:
    """One unpadded sentence, [1, T].

    Every variant is timed on the same ids; a variant with a smaller vocabulary takes them modulo its own, as
    time depends on how many there are and not on which.
    """
    ids = torch.tensor([sentence], dtype=torch.int64) % vocabulary
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def _function(dotted: str) -> Callable[[Path], tuple[Any, Any]]:
    module, _, name = dotted.rpartition(".")
    function: Callable[[Path], tuple[Any, Any]] = getattr(import_module(module), name)
    return function


def _come_to_rest() -> None:
    """Waits until OpenMP's threads, which spin for a while after their work, have gone to sleep."""
    deadline = time.monotonic() + _QUIET_AT_MOST_S
    while time.monotonic() < deadline:
        used = time.process_time()
        time.sleep(_QUIET_S)
        if time.process_time() - used < _QUIET_S / 10:
            return


def _private_output() -> TextIO:
    """Keeps standard output for the answers: whatever else is printed, natively too, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main() -> None:
    """Measures what the process that started this one asks for, until it asks for the memory."""
    answers = _private_output()

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    variant = Variant(**json.loads(sys.stdin.readline()))
    answer({"threads": torch.get_num_threads(), "energy_source": variant.meter.source})
    for line in sys.stdin:
        request = json.loads(line)
        if request["form"] is None:
            answer(variant.memory())
            return
        answer(variant.timed(request["form"], request["items"]))


if __name__ == "__main__":
    main()
