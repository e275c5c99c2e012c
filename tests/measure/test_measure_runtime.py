"""Latency, memory and energy: what is recorded, in which order, and what happens when a process dies."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
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
from edgemin.measure.rounds import Cell, Schedule, Timing, Turn, evenly_spaced, percentiles, spread
from edgemin.measure.runtime import LENGTHS, Measure, Variant, measure
from edgemin.measure.worker import Opened, padded_input, sentence_input
from edgemin.study.settings import resolved

CONF = Path(__file__).parents[2] / "conf"
QUICK = Measure(length=16, warmup=1, runs=7, rounds=3, max_rounds=3, sentences=5, threads=1)
# Opens what the test saved, talks too much while it does, and leaves behind what it saw.
OPENER = """
import json, os, subprocess, sys
import psutil, torch
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

def with_siblings(name, path, threads):
    siblings = psutil.Process(os.getppid()).children()
    loaded = [any("libtorch" in file.path for file in one.memory_maps()) for one in siblings]
    (path / "siblings.json").write_text(json.dumps(loaded))
    return load(name, path, threads)

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
            *("peak_memory_bytes", "runtime_memory_bytes", "model_memory_bytes", "cold_start_ms"),
        }
        assert json.loads(json.dumps(cost)) == cost
        for form, length, count in (("padded", 16, 7), ("task", 10 / 3, 3)):
            latency = cost["latency_ms"][form]
            assert list(latency) == ["length", "p10", "p50", "p90", "p95", "mean", "n", "spread", "unstable", "rounds"]
            assert len(latency["rounds"]) == 3
            assert latency["p10"] <= statistics.median(latency["rounds"]) <= latency["p90"]
            assert (latency["length"], latency["n"]) == (pytest.approx(length), count)
            assert 0 < latency["p10"] <= latency["p50"] <= latency["p90"] <= latency["p95"]
            assert latency["unstable"] == (latency["spread"] > QUICK.max_spread)
            assert cost["throughput_per_s"][form] == pytest.approx(1000 / latency["mean"])
        assert set(cost["cold_start_ms"]) == {"load", "first_answer"}
        assert min(cost["cold_start_ms"].values()) > 0
        assert cost["threads"] == 1
        assert cost["energy_source"] in {"rapl", "estimate"}
        assert cost["energy_mj"] >= 0
        assert cost["peak_memory_bytes"] >= cost["runtime_memory_bytes"] > cost["model_memory_bytes"]

    plan = [f"timing {turn.name}" for turn in planned(list(artifacts), [3, 5, 2], QUICK.rounds, QUICK.runs)]
    steps = [*(f"opening {name}" for name in artifacts), *plan]
    assert [what for *_, what in turns] == steps
    assert [done for done, *_ in turns] == list(range(1, len(steps) + 1))
    assert {total for done, total, _ in turns if done > 2} == {len(steps)}
    seen = [json.loads((path / "seen.json").read_text()) for path in artifacts.values()]
    assert len({record.pop("pid") for record in seen} | {os.getpid()}) == 3
    assert seen == [{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "threads": 1}] * 2


def test_a_variant_that_cuts_sentences_otherwise_is_timed_on_its_own_tokens(tmp_path: Path) -> None:
    path = save(tmp_path / "a")
    own = [[2, 8, 9, 9, 3], [2, 9, 9, 9, 9, 3], [2, 9, 9, 3]]
    variants = {"whole": Variant("torch", path, 101), "pruned": Variant("torch", path, 101, sentences=own)}
    read = [[2, 8, 3], [2, 7, 9, 3], [2, 3]]
    results = measure(variants, read, QUICK, opener="tiny_opener.load", lock_directory=tmp_path)
    assert [results[name]["latency_ms"]["task"]["length"] for name in variants] == [3, 5]
    assert [results[name]["latency_ms"]["task"]["n"] for name in variants] == [3, 3]


def test_without_sentences_only_the_padded_input_is_timed_and_threads_are_really_set(tmp_path: Path) -> None:
    settings = Measure(length=8, warmup=0, runs=2, rounds=2, max_rounds=2, threads=2)
    (cost,) = run({"one": save(tmp_path / "a")}, [], settings).values()
    assert list(cost["latency_ms"]) == list(cost["throughput_per_s"]) == ["padded"]
    seen = json.loads((tmp_path / "a" / "seen.json").read_text())
    assert (seen["threads"], seen["OMP_NUM_THREADS"], cost["threads"]) == (2, "2", 2)


def test_what_is_measured_beside_other_work_is_flagged(tmp_path: Path) -> None:
    settings = Measure(length=8, warmup=0, runs=2, rounds=2, max_rounds=2, threads=1, wait_minutes=0)
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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process may look at what another one has loaded")
def test_all_have_loaded_their_runtime_before_the_first_opens_its_model(tmp_path: Path) -> None:
    artifacts = {name: save(tmp_path / name) for name in "ab"}
    run(artifacts, [], opener="tiny_opener.with_siblings")
    for path in artifacts.values():
        assert json.loads((path / "siblings.json").read_text()) == [True, True]


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
        assert worker.ask({"name": "torch", "threads": 2}) == {}
        worker.send({**setup, "length": 16, "sentences": [], "further": {}, "grid": {}, "watts": 5.0})
        assert worker.answer()["threads"] == 2
        worker.ask({"timed": {"form": "padded", "items": [0] * 5}})
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
        plan = planned(names, [], rounds, 10 * rounds)
        orders = [[turn.name for turn in plan if turn.round == round_] for round_ in range(rounds)]
        assert all(sorted(order) == names for order in orders)
        places = Counter((name, place) for order in orders for place, name in enumerate(order))
        assert set(places.values()) == {2}
        followers = Counter(pair for order in orders for pair in pairwise(order))
        assert all((second, first) in followers for first, second in followers)
        assert [turn.round for turn in plan] == sorted(turn.round for turn in plan)


def test_all_runs_are_dealt_out_and_every_sentence_once_to_everybody() -> None:
    lengths = [int(length) for length in np.random.default_rng(0).integers(3, 60, 101)]
    plan = planned(["a", "b"], lengths, rounds=5, runs=102)
    for name in ("a", "b"):
        assert sum(len(turn.items) for turn in plan if (turn.name, turn.form) == (name, "padded")) == 102
        tasks = [turn for turn in plan if (turn.name, turn.form) == (name, "task")]
        assert sorted(item for turn in tasks for item in turn.items) == list(range(101))
        means = [statistics.fmean(lengths[item] for item in turn.items) for turn in tasks]
        assert max(means) - min(means) < 5
    by_round = {(turn.round, turn.name): turn.items for turn in plan if turn.form == "task"}
    assert all(by_round[round_, "a"] == by_round[round_, "b"] for round_ in range(5))
    assert planned(["a"], [4, 4], 5, 5)[-1].form == "padded"  # fewer sentences than rounds


def test_sentences_of_other_tasks_are_timed_beside_the_tasks_own(tmp_path: Path) -> None:
    asked = {"transfer": {"mnli": [[1] * 9, [1] * 5, [1] * 7], "none": []}}
    cost = run({"one": save(tmp_path / "one")}, [[2, 3]] * 3, **asked)["one"]
    assert {form: timed["length"] for form, timed in cost["latency_ms"]["transfer"].items()} == {"mnli": 7}
    other, own = cost["latency_ms"]["transfer"]["mnli"], cost["latency_ms"]["task"]
    assert other["n"] == 3 and len(other["rounds"]) == 3 and [*other] == [*own]
    assert set(cost["throughput_per_s"]) == {"padded", "task"}


def test_a_further_round_times_the_same_shares_again_and_keeps_the_balance() -> None:
    names = ["a", "b", "c"]
    plan = Schedule(names, {"task": list(range(3, 33))}, rounds=5, runs=52)
    for round_ in range(5, 15):
        again, before = plan.turns(round_), plan.turns(round_ - 5)
        assert {turn.round for turn in again} == {round_}
        for form in ("padded", "task"):
            mine, theirs = ([turn.items for turn in turns if turn.form == form] for turns in (again, before))
            assert [sorted(items) for items in mine] == [sorted(items) for items in theirs] and mine
    orders = [[turn.name for turn in plan.turns(round_) if turn.form == "padded"] for round_ in range(12)]
    assert set(Counter((name, place) for order in orders for place, name in enumerate(order)).values()) == {4}


def test_batches_take_turns_as_all_does_and_compute_about_as_many_sentences() -> None:
    small, large = Cell(1, 16), Cell(8, 32)
    plan = Schedule(["a", "b"], {}, rounds=5, runs=100)
    first, second = (plan.grid_turns(round_, {"a": [small, large], "b": [small]}) for round_ in (0, 1))
    assert [(turn.form, turn.name, len(turn.items)) for turn in first] == [
        *(("1x16", "a", 20), ("1x16", "b", 20), ("8x32", "a", 3)),
    ]
    assert [turn.name for turn in second] == ["b", "a", "a"]
    assert [len(turn.items) for turn in Schedule(["a"], {}, 5, 5).grid_turns(0, {"a": [Cell(32, 4)]})] == [1]


def planned(names: list[str], lengths: list[int], rounds: int, runs: int) -> list[Turn]:
    plan = Schedule(names, {"task": lengths}, rounds, runs)
    return [turn for round_ in range(rounds) for turn in plan.turns(round_)]


def test_sentences_are_taken_from_the_whole_split() -> None:
    assert evenly_spaced(range(10), 4) == [0, 2, 5, 7]
    assert evenly_spaced(range(3), 100) == [0, 1, 2]
    assert evenly_spaced([], 5) == evenly_spaced([1], 0) == []


def test_a_summary_has_the_percentiles_of_its_definition() -> None:
    values = list(np.random.default_rng(0).lognormal(size=37))
    result = percentiles(values)
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


def test_more_rounds_leave_less_open() -> None:
    rough = [10.0] * 4 + [16.0]
    assert spread(timings(a=rough, b=[5.0] * 5), "padded")["a"] == pytest.approx(0.6)
    assert spread(timings(a=[*rough, *[10.0] * 3], b=[5.0] * 8), "padded")["a"] == pytest.approx(0.6)
    assert spread(timings(a=[*rough, *[10.0] * 4], b=[5.0] * 9), "padded")["a"] == 0
    often = [10.0, 16.0, 10.0, 4.0] * 3 + [10.0] * 3
    assert spread(timings(a=often[:12], b=[5.0] * 12), "padded")["a"] == pytest.approx(0.6)
    assert spread(timings(a=often, b=[5.0] * 15), "padded")["a"] == 0


def pretend(monkeypatch: pytest.MonkeyPatch, slow: dict[str, set[int]]) -> None:
    """Workers that take 1 ms, or 2 ms in some rounds, each counted by its padded turns."""

    class Pretended:
        def __init__(self, name: str, _threads: int) -> None:
            self.name, self.turns = name, 0

        def __enter__(self) -> Pretended:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def send(self, message: dict[str, Any]) -> None:
            pass

        def answer(self) -> dict[str, Any]:
            return {}

        def ask(self, message: dict[str, Any]) -> dict[str, Any]:
            if "timed" not in message:
                return {}
            ms = 2.0 if self.turns in slow.get(self.name, set()) else 1.0
            self.turns += message["timed"]["form"] == "padded"
            return {"latency_ms": [ms] * len(message["timed"]["items"]), "joules": 1.0, "seconds": 1.0}

    monkeypatch.setattr(runtime, "WorkerProcess", Pretended)


@pytest.mark.parametrize(
    ("slow", "rounds", "unstable"),
    [({}, 5, False), ({"b": {3}}, 9, False), ({"b": {*range(1, 99, 3)}}, 15, True)],
)
def test_rounds_are_added_until_the_spread_is_narrow_or_there_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: dict[str, set[int]], rounds: int, unstable: bool
) -> None:
    pretend(monkeypatch, slow)
    turns: list[tuple[int, int, str]] = []
    results = run(
        {name: save(tmp_path / name) for name in ("a", "b")}, [], Measure(), progress=lambda *t: turns.append(t)
    )
    assert {len(cost["latency_ms"]["padded"]["rounds"]) for cost in results.values()} == {rounds}
    assert {name: cost["latency_ms"]["padded"]["unstable"] for name, cost in results.items()} == {
        "a": False,
        "b": unstable,
    }
    assert results["a"]["latency_ms"]["padded"]["n"] == 20 * rounds
    assert turns[-1][:2] == (2 + 2 * rounds, 2 + 2 * rounds)


def test_batches_are_timed_up_to_the_longest_input_of_each_model_and_take_no_memory_of_single_ones(
    tmp_path: Path,
) -> None:
    path = save(tmp_path / "a", max_position_embeddings=64)
    artifacts = {"long": Variant("torch", path, 101), "short": Variant("torch", path, 101, None, 16)}
    settings = Measure(
        length=8, warmup=1, runs=4, rounds=2, max_rounds=2, threads=1, batch_sizes=[1, 3], lengths=[4, 64]
    )
    results = measure(artifacts, [], settings, opener="tiny_opener.load", lock_directory=tmp_path)
    cells = {name: [(cell["batch"], cell["length"]) for cell in cost["grid"]] for name, cost in results.items()}
    assert cells == {"long": [(1, 4), (1, 64), (3, 4), (3, 64)], "short": [(1, 4), (3, 4)]}
    for cell in results["long"]["grid"]:
        assert list(cell) == ["batch", "length", "p10", "p50", "p90", "n", "sentences_per_s"]
        assert cell["n"] == {1: 4, 3: 2}[cell["batch"]]
        assert 0 < cell["p10"] <= cell["p50"] <= cell["p90"]
    large = Measure(length=8, warmup=0, runs=2, rounds=2, max_rounds=2, threads=1, batch_sizes=[256], lengths=[64])
    without = replace(large, batch_sizes=[], lengths=LENGTHS)
    with_batches, single = (
        measure({"one": artifacts["long"]}, [], asked, opener="tiny_opener.load", lock_directory=tmp_path)["one"]
        for asked in (large, without)
    )
    assert "grid" not in single
    assert with_batches["peak_memory_bytes"] - single["peak_memory_bytes"] < 20e6  # the batches take some 100 MB


def test_all_processes_start_before_the_first_opens_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    said: list[str] = []
    real = runtime.WorkerProcess

    class Watched(real):  # type: ignore[misc, valid-type]
        def __enter__(self) -> Any:
            said.append(f"starts {self.name}")
            return super().__enter__()

    monkeypatch.setattr(runtime, "WorkerProcess", Watched)
    run({name: save(tmp_path / name) for name in ("a", "b")}, [], QUICK, progress=lambda *step: said.append(step[2]))
    assert said[:4] == ["starts a", "starts b", "opening a", "opening b"]


def test_a_warm_up_meets_every_length_once_at_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[int, ...]] = []

    class Met:
        def answers(self, batch: Any) -> Any:
            met.append(batch["input_ids"].shape)

    monkeypatch.setattr(sys.modules[__name__], "met", lambda *_: Met(), raising=False)
    sentences = [[1] * length for length in (3, 5, 3, 4, 5)]
    given = {"path": "", "runtime": "torch", "opener": f"{__name__}.met", "tokenizer": None, "vocabulary": 7}
    given |= {
        "threads": 1,
        "length": 8,
        "sentences": sentences,
        "grid": {"4x2": (4, 2)},
        "further": {"mnli": [[1] * 6]},
        "watts": 5.0,
    }
    opened = Opened(**given, warmup=2)  # type: ignore[arg-type]
    assert met == [(1, 8)] + [(1, 8)] * 2 + [(1, 3), (1, 5), (1, 4)], "a first answer, then each form"
    met.clear()
    opened.timed("4x2", [0])
    assert met == [(4, 2)] * (1 + 1 + 1), "one batch makes two sentences; one before the turn; the timed one"
    met.clear()
    opened.timed("mnli", [0])
    assert met == [(1, 6)] * (2 + 1 + 1), "another task's sentences are warmed up when they are first asked for"
    met.clear()
    Opened(**given, warmup=0)  # type: ignore[arg-type]
    assert met == [(1, 8)], "the first answer alone"


def test_the_profiler_names_the_costliest_operators_and_no_place(tmp_path: Path) -> None:
    path, trace = save(tmp_path / "a"), tmp_path / "trace.json.gz"
    settings = replace(QUICK, profile=True)
    variants = {"one": Variant("torch", path, 101), "other": Variant("torch", path, 101)}
    more: dict[str, Any] = {"opener": "tiny_opener.load", "lock_directory": tmp_path}
    results = measure(variants, [], settings, traces={"one": trace}, **more)
    assert "profile" not in results["other"]
    operators = results["one"]["profile"]["operators"]
    assert len(operators) == 10
    assert all(list(one) == ["name", "self_ms", "share", "memory_bytes", "calls"] for one in operators)
    times = [one["self_ms"] for one in operators]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    assert 0.3 < sum(one["share"] for one in operators) <= 1
    products = next(one for one in operators if one["name"] == "aten::addmm")
    assert products["calls"] >= 12
    assert products["memory_bytes"] > 0
    written = gzip.decompress(trace.read_bytes())
    names = {event.get("name") for event in json.loads(written)["traceEvents"]}
    assert {"aten::addmm", "[memory]"} <= names
    for place in (platform.node(), str(tmp_path), os.environ.get("TMPDIR", "/tmp/")):
        assert f'"{place}'.encode() not in written


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "runtimes",
            ["tflite"],
            "runtimes: expected torch, torch_compiled, onnxruntime, openvino, openvino_bf16, given 'tflite'",
        ),
        ("runtimes", [], "runtimes: expected at least one runtime and each once, given []"),
        ("runtimes", ["torch"] * 2, "runtimes: expected at least one runtime and each once, given ['torch', 'torch']"),
        ("runtimes", "torch", "runtimes: expected a list, each entry a string, given 'torch'"),
        ("length", 0, "length: expected a whole number of at least 1, given 0"),
        ("warmup", -1, "warmup: expected a whole number of at least 0, given -1"),
        ("rounds", 1, "rounds: expected a whole number of at least 2, given 1"),
        ("runs", 4, "runs: expected a whole number of at least 5, as rounds, given 4"),
        ("max_rounds", 4, "max_rounds: expected a whole number of at least 5, as rounds, given 4"),
        ("batch_sizes", [1, 0], "batch_sizes: expected a list, each entry a whole number of at least 1, given [1, 0]"),
        ("batch_sizes", [8, 8], "batch_sizes: expected each number once, given [8, 8]"),
        ("batch_sizes", 8, "batch_sizes: expected a list, each entry a whole number of at least 1, given 8"),
        ("lengths", [16], "lengths: expected batch_sizes beside them, given [16] and no batch size"),
        ("lengths", [16, 16], "lengths: expected each number once, given [16, 16]"),
        ("profile", 1, "profile: expected true or false, given 1"),
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


def test_settings_that_contradict_are_one_line() -> None:
    with pytest.raises(UserError, match=r"^lengths: expected at least one length for the batch sizes, given \[\]$"):
        Measure(batch_sizes=[1], lengths=[])
    with pytest.raises(UserError, match=r"^profile: expected torch among runtimes, given true and \['onnxruntime'\]$"):
        Measure(profile=True, runtimes=["onnxruntime"])


def test_the_configuration_is_the_class_and_none_is_nothing() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = OmegaConf.to_container(compose(overrides=["+measure=default"]).measure)
        plain = Measure(runtimes=["torch"], batch_sizes=[], lengths=list(LENGTHS))
        assert config.construct(node, "measure") == plain
        grid = OmegaConf.to_container(compose(overrides=["+measure=grid"]).measure)
        assert config.construct(grid, "measure") == replace(plain, batch_sizes=[1, 8, 32])
        assert resolved(compose(overrides=["+measure=none"]))["measure"] is None
