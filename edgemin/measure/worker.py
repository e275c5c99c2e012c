"""The process in which one variant is measured: `python -m edgemin.measure.worker`, started by `runtime`.

It speaks JSON, one object per line, over its standard input and output. The first line it reads is the set-up, whose
keys are the arguments of [`Opened`][edgemin.measure.worker.Opened]; it opens the model in its runtime, warms up and
answers `{"threads": n, "energy_source": "estimate"}`. Each further line asks for timed inferences, `{"form": "padded",
"items": [0, 0]}`, answered with `latency_ms` of each and with the `joules` and `seconds` of all, until `{"form": null}`
asks for the memory it took and ends it. End of input ends it too, so that it never outlives the process that asked.

Nothing is imported here but what the runtime needs: a process that serves with ONNX Runtime holds no torch.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tokenizers import Tokenizer

from edgemin.deploy import runtime as runtimes
from edgemin.deploy.runtime import Batch, Runtime
from edgemin.measure.energy import EnergyMeter
from edgemin.measure.memory import peak_bytes, resident_bytes

# Untimed inferences at the start of each turn: the other variants had the caches since the last one.
_REWARM = 2
_QUIET_S, _QUIET_AT_MOST_S = 0.02, 1.0


class Opened:
    """One model, open in its runtime, and the inputs it is timed on.

    Args:
        path: What the runtime opens.
        runtime: Its name.
        opener: "module.function" that is given name, path and threads, and returns the open model.
        tokenizer: A file that is kept in memory beside the model, as whoever serves it does; `None`: the runtime's own.
        vocabulary: How many tokens the model knows.
        threads: Of each inference.
        warmup: Untimed inferences on each form of input.
        length: Tokens of the padded input.
        sentences: Token ids of the task's sentences; may be empty.
        watts: Power of one busy core, where energy has to be estimated.
    """

    def __init__(
        self,
        path: str,
        runtime: str,
        opener: str,
        tokenizer: str | None,
        vocabulary: int,
        threads: int,
        warmup: int,
        length: int,
        sentences: Sequence[Sequence[int]],
        watts: float,
    ) -> None:
        runtimes.start(runtime, threads)
        open_model = _function(opener)
        self.before_bytes = resident_bytes()
        self.model = open_model(runtime, Path(path), threads)
        self.tokenizer = None if tokenizer is None else Tokenizer.from_file(tokenizer)
        self.meter = EnergyMeter(watts)
        self.inputs: dict[str, list[Batch]] = {"padded": [padded_input(vocabulary, length)]}
        if sentences:
            self.inputs["task"] = [sentence_input(vocabulary, sentence) for sentence in sentences]
        for inputs in self.inputs.values():
            for run in range(warmup):
                self.infer(inputs[run % len(inputs)])

    def infer(self, batch: Batch) -> None:
        """Runs the model once on one input and discards the logits."""
        self.model.answers(batch)

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


def padded_input(vocabulary: int, length: int) -> Batch:
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


def sentence_input(vocabulary: int, sentence: Sequence[int]) -> Batch:
    """One unpadded sentence, [1, T].

    Every variant is timed on the same ids; a variant with a smaller vocabulary takes them modulo its own, as
    time depends on how many there are and not on which.
    """
    ids = np.asarray([sentence], dtype=np.int64) % vocabulary
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _function(dotted: str) -> Callable[[str, Path, int], Runtime]:
    module, _, name = dotted.rpartition(".")
    function: Callable[[str, Path, int], Runtime] = getattr(import_module(module), name)
    return function


def _come_to_rest() -> None:
    """Waits until the runtime's threads, which spin for a while after their work, have gone to sleep."""
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

    setup = json.loads(sys.stdin.readline())
    variant = Opened(**setup)
    answer({"threads": setup["threads"], "energy_source": variant.meter.source})
    for line in sys.stdin:
        request = json.loads(line)
        if request["form"] is None:
            answer(variant.memory())
            return
        answer(variant.timed(request["form"], request["items"]))


if __name__ == "__main__":
    main()
