"""What all benchmarks share: variants timed in interleaved rounds, ratios formed inside a round, the machine named."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import transformers

from edgemin.measure.machine import host

Seconds = Mapping[str, Sequence[float]]


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int, at_least_s: float = 0.2) -> Seconds:
    """Time all variants in every round, in an order that is reversed from round to round.

    A machine that is slower for everybody during one round does so in no ratio of that round's times.

    Args:
        variants: what to call; each is called once before, untimed.
        rounds: how many.
        at_least_s: in its turn a variant is called again until so much time has passed.

    Returns:
        Seconds for one call of each variant, round by round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for index in range(rounds):
        for name in list(variants)[:: -1 if index % 2 else 1]:
            calls, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < at_least_s or not calls:
                variants[name]()
                calls += 1
            seconds[name].append(passed / calls)
    return seconds


def ratio(seconds: Seconds, of: str, to: str) -> float:
    """How many times as long the first takes as the second: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(seconds[of], seconds[to], strict=True))


def milliseconds(seconds: Sequence[float]) -> str:
    """The median over the rounds."""
    return f"{1000 * statistics.median(seconds):.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table that is read as well as rendered; numbers to the right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * (width - 1) + ":" if column else "-" * width for column, width in enumerate(widths)], *rows]
    return "\n".join(
        "| "
        + " | ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in lines
    )


def machine() -> str:
    """Everything about the machine and the libraries that a time depends on."""
    about = host()
    load = f", load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return (
        f"CPU: {about['cpu']}, {about['cores']} cores, {torch.get_num_threads()} threads used{load}\n"
        f"flags: {' '.join(about['flags'])}\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {about['python']}, {about['os']}"
    )


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options all benchmarks take."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options.add_argument("--rounds", type=int, default=rounds, help="in each of which every variant is timed")
    options.add_argument("--shapes", type=shape, nargs="+", default=[(8, 128), (4, 512)], help="sequences x tokens")
    return options


def shape(text: str) -> tuple[int, int]:
    """`8x128`: 8 sequences of 128 tokens."""
    sequences, _, tokens = text.partition("x")
    return int(sequences), int(tokens)
