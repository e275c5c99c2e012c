"""The process in which one variant is measured: `python -m edgemin.measure.worker`, started by `runtime`.

It speaks JSON, one object per line, over its standard input and output. The first line it reads is a runtime and its
threads, `{"name": "torch", "threads": 2}`; it loads the runtime and answers with nothing. The second is the set-up,
whose keys are the arguments of [`Opened`][edgemin.measure.worker.Opened]; it opens the model in its runtime, warms up
and answers with `threads`, `energy_source` and `cold_start_ms`. Each further line names a method of
[`Opened`][edgemin.measure.worker.Opened] and gives its arguments, and is answered with what that returns:
`{"timed": {"form": "padded", "items": [0, 0]}}`, `{"memory": {}}`, `{"profile": {"trace": "<file>"}}`. It ends with its
input, so that it never outlives the process that asked.

Nothing is imported here but what the runtime needs: a process that serves with ONNX Runtime holds no torch.
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

import numpy as np
from tokenizers import Tokenizer

from edgemin.deploy import runtime as runtimes
from edgemin.deploy.runtime import Batch, Runtime
from edgemin.measure.energy import EnergyMeter
from edgemin.measure.memory import peak_bytes, resident_bytes

# Untimed inferences at the start of each turn: the other variants had the caches since the last one.
_REWARM = 2
_QUIET_S, _QUIET_AT_MOST_S = 0.02, 1.0
_PROFILER = "edgemin.measure.profiling.profile"  # by name: it loads torch


class Opened:
    """One model, open in its runtime, which has been started, and the inputs it is timed on.

    Args:
        path: What the runtime opens.
        runtime: Its name.
        opener: "module.function" that is given name, path and threads, and returns the open model.
        tokenizer: A file that is kept in memory beside the model, as whoever serves it does; `None`: the runtime's own.
        vocabulary: How many tokens the model knows.
        threads: Of each inference.
        warmup: Untimed inferences on each form of input, of batches as many as make so many sentences; unless it is 0,
            at least one of each length that occurs. Runtimes build kernels and plan memory for every new shape, and a
            process that has served for a while has met them all.
        length: Tokens of the padded input.
        sentences: Token ids of the task's sentences; may be empty.
        grid: Further forms of input by name, each a batch of so many sentences of so many tokens. They are made and
            warmed up when they are first asked for: what they take of memory is not that of single sentences.
        further: Likewise, sentences of other tasks: token ids by the name of the form.
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
        grid: Mapping[str, tuple[int, int]],
        further: Mapping[str, Sequence[Sequence[int]]],
        watts: float,
    ) -> None:
        open_model: Callable[[str, Path, int], Runtime] = _function(opener)
        _come_to_rest()
        self.vocabulary, self.grid, self.further, self.warmup = vocabulary, grid, further, warmup
        self.inputs: dict[str, list[Batch]] = {"padded": [padded_input(vocabulary, length)]}
        if sentences:
            self.inputs["task"] = self.single(sentences)
        self.before_bytes = resident_bytes()
        began = time.perf_counter_ns()
        self.model = open_model(runtime, Path(path), threads)
        self.tokenizer = None if tokenizer is None else Tokenizer.from_file(tokenizer)
        loaded = time.perf_counter_ns()
        self.infer(self.inputs["padded"][0])
        answered = time.perf_counter_ns()
        self.cold_start_ms = {"load": (loaded - began) / 1e6, "first_answer": (answered - loaded) / 1e6}
        self.meter = EnergyMeter(watts)
        for inputs in self.inputs.values():
            self.warm_up(inputs)
        _come_to_rest()

    def single(self, sentences: Sequence[Sequence[int]]) -> list[Batch]:
        """Sentences one by one, unpadded."""
        return [sentence_input(self.vocabulary, sentence) for sentence in sentences]

    def warm_up(self, inputs: Sequence[Batch]) -> None:
        """Runs inferences that are not timed, as many as `warmup` asks for."""
        if not self.warmup:
            return
        shapes = list({batch["input_ids"].shape: batch for batch in inputs}.values())
        sentences = len(shapes[0]["input_ids"])
        for run in range(max(len(shapes), -(-self.warmup // sentences))):
            self.infer(shapes[run % len(shapes)])

    def infer(self, batch: Batch) -> None:
        """Runs the model once on one input and discards the logits."""
        self.model.answers(batch)

    def timed(self, form: str, items: Sequence[int]) -> dict[str, Any]:
        """Times one inference per item, then waits until this process has come to rest."""
        if form not in self.inputs:
            if form in self.further:
                self.inputs[form] = self.single(self.further[form])
            else:
                batch, length = self.grid[form]
                self.inputs[form] = [padded_input(self.vocabulary, length, batch)]
            self.warm_up(self.inputs[form])
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

    def profile(self, trace: str) -> dict[str, Any]:
        """Looks into torch at work on the padded input; the trace is written to a file."""
        return {"operators": _function(_PROFILER)(lambda: self.infer(self.inputs["padded"][0]), Path(trace))}


def padded_input(vocabulary: int, length: int, batch: int = 1) -> Batch:
    """Sentences of which half is padding: without any, the attention would be spared its mask.

    Args:
        vocabulary: Ids are drawn below it.
        length: Tokens T.
        batch: Sentences B, all alike.

    Returns:
        The same ids for the same arguments, [B, T].
    """
    draw = random.Random(length)
    one = sentence_input(vocabulary, [draw.randrange(vocabulary) for _ in range(length)])
    one["attention_mask"][:, (length + 1) // 2 :] = 0
    return {name: np.repeat(values, batch, axis=0) for name, values in one.items()}


def sentence_input(vocabulary: int, sentence: Sequence[int]) -> Batch:
    """One unpadded sentence, [1, T].

    Every variant is timed on the same ids; a variant with a smaller vocabulary takes them modulo its own, as
    time depends on how many there are and not on which.
    """
    ids = np.asarray([sentence], dtype=np.int64) % vocabulary
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _function(dotted: str) -> Callable[..., Any]:
    module, _, name = dotted.rpartition(".")
    function: Callable[..., Any] = getattr(import_module(module), name)
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
    """Measures what the process that started this one asks for, until it asks no more."""
    answers = _private_output()

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    runtimes.start(**json.loads(sys.stdin.readline()))
    answer({})
    setup = json.loads(sys.stdin.readline())
    variant = Opened(**setup)
    source, cold = variant.meter.source, variant.cold_start_ms
    answer({"threads": setup["threads"], "energy_source": source, "cold_start_ms": cold})
    answers_to: dict[str, Callable[..., dict[str, Any]]] = {
        "timed": variant.timed,
        "memory": variant.memory,
        "profile": variant.profile,
    }
    for line in sys.stdin:
        for name, given in json.loads(line).items():
            answer(answers_to[name](**given))


if __name__ == "__main__":
    main()
