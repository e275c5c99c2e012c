"""Latency, memory and energy: what is recorded, in which order, and what happens when a process dies."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import BertConfig

from edgemin import config
from edgemin.deploy.torch_eager import TorchEager
from edgemin.encoder import building
from edgemin.errors import UserError
from edgemin.measure import runtime
from edgemin.measure.process import WorkerProcess
from edgemin.measure.rounds import Timing, Turn, evenly_spaced, schedule, spread, summary
from edgemin.measure.runtime import Measure, Variant, measure
from edgemin.measure.worker import padded_input, sentence_input

CONF = Path(__file__).parents[2] / "conf"
QUICK = Measure(length=16, warmup=1, runs=7, rounds=3, sentences=5, threads=1)
# Opens what the test saved, talks too much while it does, and leaves behind what it saw.
OPENER = """
import json, os, subprocess, sys
import torch
from edgemin import config
from edgemin.deploy.torch_eager import TorchEager
from edgemin.encoder import building
from transformers import BertConfig

def load(name, path, threads):
    assert (name, threads) == ("torch", torch.get_num_threads())
    print("a stray print")
    os.write(1, b"one from a native library, without a newline")
    sys.stdout.flush()
    seen = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE")}
    seen |= {"threads": torch.get_num_threads(), "pid": os.getpid()}
    (path / "seen.json").write_text(json.dumps(seen))
    return TorchEager(path, building.build(BertConfig(**json.loads((path / "config.json").read_text()))).eval(), None)

def die_in_loading(name, path, threads):
    if path.name == "bad":
        raise ValueError("first line\\nno weights here")
    return load(name, path, threads)

def die_in_running(name, path, threads):
    opened = load(name, path, threads)
    if path.name == "bad":
        calls = []
        def die(*_):
            calls.append(1)
            if len(calls) > 6:
                os.kill(os.getpid(), 9)
        opened.model.register_forward_pre_hook(die)
    return opened
"""


@pytest.fixture(autouse=True)
def opener_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_opener.py").write_text(OPENER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def save(directory: Path, **changes: int) -> Path:
    directory.mkdir()
    config = {
        "vocab_size": 101,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def run(artifacts: dict[str, Path], sentences: list[list[int]], settings: Measure = QUICK, **more: Any) -> Any:
    directory = next(iter(artifacts.values())).parent
    variants = {
        name: Variant("torch", path, json.loads((path / "config.json").read_text())["vocab_size"])
        for name, path in artifacts.items()
    }
    return measure(
        variants, sentences, settings, **({"opener": "tiny_opener.load", "lock_directory": directory} | more)
    )


def test_every_variant_is_measured_padded_and_on_the_same_sentences(tmp_path: Path) -> None:
    artifacts = {"teacher": save(tmp_path / "a"), "+ Distillation": save(tmp_path / "b", vocab_size=40)}
    sentences = [[2, 100, 3], [2, 7, 50_000, 9, 3], [2, 3]]  # ids outside both vocabularies
    turns: list[tuple[int, int, str]] = []
    results = run(artifacts, sentences, progress=lambda *turn: turns.append(turn))

    assert list(results) == list(artifacts)
    for cost in results.values():
        assert set(cost) == {
            *("latency_ms", "throughput_per_s", "energy_mj", "power_w", "energy_source", "threads"),
            *("peak_memory_bytes", "runtime_memory_bytes", "model_memory_bytes"),
        }
        assert json.loads(json.dumps(cost)) == cost
        for form, length, count in (("padded", 16, 7), ("task", 10 / 3, 3)):
            latency = cost["latency_ms"][form]
            assert list(latency) == ["length", "p10", "p50", "p90", "p95", "mean", "n", "spread", "unstable"]
            assert (latency["length"], latency["n"]) == (pytest.approx(length), count)
            assert 0 < latency["p10"] <= latency["p50"] <= latency["p90"] <= latency["p95"]
            assert latency["unstable"] == (latency["spread"] > QUICK.max_spread)
            assert cost["throughput_per_s"][form] == pytest.approx(1000 / latency["mean"])
        assert cost["threads"] == 1
        assert cost["energy_source"] in {"rapl", "estimate"}
        assert cost["energy_mj"] >= 0
        assert cost["peak_memory_bytes"] >= cost["runtime_memory_bytes"] > cost["model_memory_bytes"]

    plan = list(schedule(list(artifacts), [3, 5, 2], QUICK.rounds, QUICK.runs))
    assert turns == [(number, len(plan), turn.name) for number, turn in enumerate(plan, start=1)]
    seen = [json.loads((path / "seen.json").read_text()) for path in artifacts.values()]
    assert len({record.pop("pid") for record in seen} | {os.getpid()}) == 3
    assert seen == [{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "threads": 1}] * 2


def test_without_sentences_only_the_padded_input_is_timed_and_threads_are_really_set(tmp_path: Path) -> None:
    settings = Measure(length=8, warmup=0, runs=2, rounds=2, threads=2)
    (cost,) = run({"one": save(tmp_path / "a")}, [], settings).values()
    assert list(cost["latency_ms"]) == list(cost["throughput_per_s"]) == ["padded"]
    seen = json.loads((tmp_path / "a" / "seen.json").read_text())
    assert (seen["threads"], seen["OMP_NUM_THREADS"], cost["threads"]) == (2, "2", 2)


def test_what_is_measured_beside_other_work_is_flagged(tmp_path: Path) -> None:
    settings = Measure(length=8, warmup=0, runs=2, rounds=2, threads=1, wait_minutes=0)
    artifacts = {"one": save(tmp_path / "a")}
    assert "measured_beside_other_work" not in run(artifacts, [], settings)["one"]
    held, done = threading.Event(), threading.Event()

    def train() -> None:
        with runtime.machine_lock("training", None, tmp_path):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=train)
    thread.start()
    assert held.wait(30)
    try:
        assert run(artifacts, [], settings)["one"]["measured_beside_other_work"] is True
    finally:
        done.set()
        thread.join()


def test_how_long_is_waited_is_not_part_of_a_measurement() -> None:
    assert Measure(wait_minutes=3).content == Measure().content
    assert Measure(watts=3).content != Measure().content


def test_nothing_to_measure_starts_nothing() -> None:
    assert measure({}, [], QUICK, opener="no.such") == {}


def gone(directory: Path) -> bool:
    return not psutil.pid_exists(json.loads((directory / "seen.json").read_text())["pid"])


def test_an_artifact_that_does_not_load_ends_all_with_one_line(tmp_path: Path) -> None:
    artifacts = {"good": save(tmp_path / "good"), "the bad one": save(tmp_path / "bad")}
    with pytest.raises(UserError) as caught:
        run(artifacts, [], opener="tiny_opener.die_in_loading")
    message = "measure: the process that measured 'the bad one' ended with exit code 1: no weights here"
    assert str(caught.value) == message
    assert "Traceback" in str(caught.value.__cause__)
    assert gone(tmp_path / "good")


def test_a_process_killed_between_two_answers_ends_all_with_one_line(tmp_path: Path) -> None:
    artifacts = {"good": save(tmp_path / "good"), "bad": save(tmp_path / "bad")}
    with pytest.raises(UserError) as caught:
        run(artifacts, [], opener="tiny_opener.die_in_running")
    assert str(caught.value).startswith("measure: the process that measured 'bad' was killed by signal 9")
    assert "\n" not in str(caught.value)
    assert gone(tmp_path / "good") and gone(tmp_path / "bad")


def test_an_interruption_ends_the_process_and_frees_the_machine(tmp_path: Path) -> None:
    def interrupt(*_turn: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run({"a": save(tmp_path / "a")}, [], progress=interrupt)
    assert gone(tmp_path / "a")
    with runtime.machine_lock("measuring", pytest.fail, tmp_path):
        pass


def test_a_process_that_is_not_asked_rests_and_ends_with_its_parent(tmp_path: Path) -> None:
    setup = {"path": str(save(tmp_path / "a")), "opener": "tiny_opener.load", "threads": 2, "warmup": 1}
    setup |= {"runtime": "torch", "tokenizer": None, "vocabulary": 101}
    with WorkerProcess("a", 2) as worker:
        worker.send({**setup, "length": 16, "sentences": [], "watts": 5.0})
        assert worker.answer()["threads"] == 2
        worker.ask({"form": "padded", "items": [0] * 5})
        process = psutil.Process(worker._process.pid)
        before = sum(process.cpu_times()[:2])
        with pytest.raises(subprocess.TimeoutExpired):
            worker._process.wait(0.5)
        assert sum(process.cpu_times()[:2]) - before < 0.25  # one spinning thread alone would take twice that
        assert worker._process.stdin is not None
        worker._process.stdin.close()  # as when the parent is killed
        assert worker._process.wait(30) == 0


def test_a_peak_is_the_programs_own_and_not_inherited(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; big = bytearray(800_000_000); command = [sys.executable, '-c', "
        "'from edgemin.measure.memory import peak_bytes; print(peak_bytes())']; "
        "print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)"
    )
    env = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    peak = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert 1_000_000 < int(peak.stdout) < 400_000_000


def test_a_process_that_measures_holds_nothing_but_its_runtime() -> None:
    code = "import sys, edgemin.measure.worker; print({'torch', 'transformers'} & {*sys.modules})"
    env = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert found.stdout.strip() == "set()"


def test_padded_input_is_reproducible_inside_the_vocabulary_and_half_padding() -> None:
    batch = padded_input(vocabulary=7, length=128)
    assert batch["input_ids"].shape == (1, 128)
    assert int(batch["input_ids"].max()) == 6
    assert int(batch["attention_mask"].sum()) == 64
    assert np.array_equal(batch["input_ids"], padded_input(vocabulary=7, length=128)["input_ids"])
    assert padded_input(vocabulary=7, length=1)["attention_mask"].tolist() == [[1]]
    model = building.build(BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    opened = TorchEager(Path(), model.eval(), None)
    assert opened.answers(sentence_input(7, [2, 700, 3])).shape == (1, 2)


def test_variants_are_interleaved_and_nobody_keeps_a_place() -> None:
    for names in (["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d", "e", "f"]):
        rounds = 2 * len(names)
        plan = list(schedule(names, [], rounds, 10 * rounds))
        orders = [[turn.name for turn in plan if turn.round == round_] for round_ in range(rounds)]
        assert all(sorted(order) == names for order in orders)
        places = Counter((name, place) for order in orders for place, name in enumerate(order))
        assert set(places.values()) == {2}
        followers = Counter(pair for order in orders for pair in pairwise(order))
        assert all((second, first) in followers for first, second in followers)
        assert [turn.round for turn in plan] == sorted(turn.round for turn in plan)


def test_all_runs_are_dealt_out_and_every_sentence_once_to_everybody() -> None:
    lengths = [int(length) for length in np.random.default_rng(0).integers(3, 60, 101)]
    plan = list(schedule(["a", "b"], lengths, rounds=5, runs=102))
    for name in ("a", "b"):
        assert sum(len(turn.items) for turn in plan if (turn.name, turn.form) == (name, "padded")) == 102
        tasks = [turn for turn in plan if (turn.name, turn.form) == (name, "task")]
        assert sorted(item for turn in tasks for item in turn.items) == list(range(101))
        means = [statistics.fmean(lengths[item] for item in turn.items) for turn in tasks]
        assert max(means) - min(means) < 5
    by_round = {(turn.round, turn.name): turn.items for turn in plan if turn.form == "task"}
    assert all(by_round[round_, "a"] == by_round[round_, "b"] for round_ in range(5))
    assert list(schedule(["a"], [4, 4], 5, 5))[-1].form == "padded"  # fewer sentences than rounds


def test_sentences_are_taken_from_the_whole_split() -> None:
    assert evenly_spaced(range(10), 4) == [0, 2, 5, 7]
    assert evenly_spaced(range(3), 100) == [0, 1, 2]
    assert evenly_spaced([], 5) == evenly_spaced([1], 0) == []


def test_a_summary_has_the_percentiles_of_its_definition() -> None:
    values = list(np.random.default_rng(0).lognormal(size=37))
    result = summary(values)
    ordered = sorted(values)
    for name, share in {"p10": 0.10, "p50": 0.50, "p90": 0.90, "p95": 0.95}.items():
        place = share * (len(ordered) - 1)
        below, rest = int(place), place - int(place)
        assert result[name] == pytest.approx(ordered[below] * (1 - rest) + ordered[below + 1] * rest)
    assert result["mean"] == pytest.approx(sum(values) / 37)
    assert result["n"] == 37


def timings(**medians: list[float]) -> list[Timing]:
    return [
        Timing(Turn(round_, "padded", name, [0] * 3), [value / 2, value, value * 9], 0.0, 1.0)
        for name, values in medians.items()
        for round_, value in enumerate(values)
    ]


def test_noise_inside_the_rounds_that_leaves_their_medians_alone_is_stable() -> None:
    assert spread(timings(a=[10.0] * 5, b=[5.0] * 5), "padded") == {"a": 0.0, "b": 0.0}


def test_a_drift_that_everybody_shares_is_divided_out_of_the_spread() -> None:
    drift = np.array([1.0, 1.2, 1.7, 1.5, 1.0])
    both = spread(timings(a=list(30 * drift), b=list(10 * drift)), "padded")
    assert both == {"a": pytest.approx(0.0), "b": pytest.approx(0.0)}
    assert spread(timings(a=list(30 * drift)), "padded") == {"a": pytest.approx(0.7 / 1.2)}


@pytest.mark.parametrize("others", [1, 2, 3])
def test_a_disturbance_of_one_variant_is_its_own(others: int) -> None:
    quiet = {f"quiet{number}": [5.0] * 5 for number in range(others)}
    found = spread(timings(disturbed=[10.0, 10.0, 16.0, 10.0, 10.0], **quiet), "padded")
    assert found["disturbed"] == pytest.approx(0.6)
    assert all(found[name] == 0 for name in quiet)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("runtimes", ["tflite"], "runtimes: expected torch, onnxruntime, openvino, given 'tflite'"),
        ("runtimes", [], "runtimes: expected at least one runtime and each once, given []"),
        ("runtimes", ["torch"] * 2, "runtimes: expected at least one runtime and each once, given ['torch', 'torch']"),
        ("runtimes", "torch", "runtimes: expected a list, each entry a string, given 'torch'"),
        ("length", 0, "length: expected a whole number of at least 1, given 0"),
        ("warmup", -1, "warmup: expected a whole number of at least 0, given -1"),
        ("rounds", 1, "rounds: expected a whole number of at least 2, given 1"),
        ("runs", 4, "runs: expected a whole number of at least 5, as rounds, given 4"),
        ("sentences", 1.5, "sentences: expected a whole number of at least 0, given 1.5"),
        ("threads", 0, "threads: expected a whole number of at least 1 or null, given 0"),
        ("threads", True, "threads: expected a whole number of at least 1 or null, given True"),
        ("watts", "much", "watts: expected a number above 0, given 'much'"),
        ("max_spread", 0, "max_spread: expected a number above 0, given 0"),
        ("wait_minutes", -1, "wait_minutes: expected a number of at least 0, given -1"),
        ("wait_minutes", math.nan, "wait_minutes: expected a finite number, given nan"),
        ("wait_minutes", math.inf, "wait_minutes: expected a finite number, given inf"),
    ],
)
def test_a_setting_out_of_range_is_one_line(key: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        Measure(**{key: value})
    assert str(caught.value) == expected


def test_a_runtime_that_is_not_installed_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert Measure(runtimes=["torch", "openvino"]).runtimes == ["torch", "openvino"]
    with pytest.raises(UserError) as caught:
        Measure(runtimes=["torch", "onnxruntime"])
    missing = "expected onnxruntime to be installed for onnxruntime (pip install 'edgemin[onnxruntime]'), given none"
    assert str(caught.value) == f"runtimes: {missing}"


def test_the_configuration_is_the_class_and_none_is_nothing() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = OmegaConf.to_container(compose(overrides=["+measure=default"]).measure)
        assert config.construct(node, "measure") == Measure(runtimes=["torch"])
        assert compose(overrides=["+measure=none"]).measure is None
