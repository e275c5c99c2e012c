"""The machine's description, its lock and its energy counters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from edgemin.measure import machine
from edgemin.measure.energy import Domain, EnergyMeter, rapl_domains
from edgemin.measure.machine import available_cores, host, machine_lock

HOLDER = """
import sys
from pathlib import Path
from edgemin.measure.machine import machine_lock
with machine_lock(sys.argv[1], lambda line: print("waiting", flush=True), Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.readline()
"""
Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts processes that hold the lock until a line is sent to them."""
    processes = []

    def start(kind: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, kind, str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def let_go(process: subprocess.Popen[str]) -> None:
    process.communicate("\n")


def test_training_shares_the_machine_with_training(start: Start, tmp_path: Path) -> None:
    assert says(start("training")) == "held"
    assert says(start("training")) == "held"
    said: list[str] = []
    with machine_lock("training", said.append, tmp_path):
        pass
    assert said == []


def test_measuring_waits_for_all_training_and_says_so_once(start: Start) -> None:
    first, second = start("training"), start("training")
    assert (says(first), says(second)) == ("held", "held")
    measuring = start("measuring")
    assert says(measuring) == "waiting"
    let_go(first)
    let_go(second)
    assert says(measuring) == "held"


def test_training_and_measuring_wait_for_measuring(start: Start) -> None:
    measuring = start("measuring")
    assert says(measuring) == "held"
    training = start("training")
    assert says(training) == "waiting"
    another = start("measuring")
    assert says(another) == "waiting"
    let_go(measuring)
    assert says(training) == "held"
    let_go(training)
    assert says(another) == "held"


def test_training_that_comes_later_does_not_pass_a_waiting_measurement(start: Start) -> None:
    training = start("training")
    assert says(training) == "held"
    measuring = start("measuring")
    assert says(measuring) == "waiting"
    later = start("training")
    assert says(later) == "waiting"
    let_go(training)
    assert says(measuring) == "held"
    let_go(measuring)
    assert says(later) == "held"


SOON = 0.005  # minutes


def test_a_measurement_waits_only_so_long_and_names_whom_it_waits_for(start: Start, tmp_path: Path) -> None:
    training = start("training")
    assert says(training) == "held"
    said: list[str] = []
    with machine_lock("measuring", said.append, tmp_path, wait_minutes=SOON) as is_alone:
        assert not is_alone()
        later = start("measuring")
        assert says(later) == "waiting"
    assert said == [
        "for the machine: training or another measurement is running on it "
        f"(process {training.pid}); waited for at most 0.005 min; measure=none leaves measuring out"
    ]
    let_go(training)
    assert says(later) == "held"


def test_without_patience_nothing_is_waited_for(start: Start, tmp_path: Path) -> None:
    assert says(start("training")) == "held"
    with machine_lock("measuring", pytest.fail, tmp_path, wait_minutes=0) as is_alone:
        assert not is_alone()


def test_training_does_not_wait_long_for_a_measurement_that_only_waits(start: Start, tmp_path: Path) -> None:
    first = start("training")
    assert says(first) == "held"
    measuring = start("measuring")
    assert says(measuring) == "waiting"
    said: list[str] = []
    with machine_lock("training", said.append, tmp_path, wait_minutes=SOON):
        let_go(first)
        with pytest.raises(subprocess.TimeoutExpired):
            measuring.wait(1)  # it has still not got the machine, which is trained on
    assert len(said) == 1
    assert f"(process {measuring.pid}); a run with measure=none keeps nobody waiting" in said[0]
    assert says(measuring) == "held"


def test_training_waits_for_a_measurement_that_runs(start: Start, tmp_path: Path) -> None:
    measuring = start("measuring")
    assert says(measuring) == "held"
    held = threading.Event()

    def train() -> None:
        with machine_lock("training", None, tmp_path, wait_minutes=0):
            held.set()

    thread = threading.Thread(target=train)
    thread.start()
    assert not held.wait(1)
    let_go(measuring)
    assert held.wait(30)
    thread.join()


def test_a_measurement_learns_that_another_has_come_beside_it(tmp_path: Path) -> None:
    with machine_lock("measuring", None, tmp_path) as is_alone:
        assert is_alone() and is_alone()
        script = HOLDER.replace("Path(sys.argv[2])", "Path(sys.argv[2]), wait_minutes=0")
        other = subprocess.Popen(
            [sys.executable, "-c", script, "measuring", str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert says(other) == "held"
        assert not is_alone()
        let_go(other)
        assert is_alone()


@pytest.mark.parametrize("kind", ["training", "measuring"])
def test_a_killed_holder_lets_go(start: Start, kind: str) -> None:
    holder = start(kind)
    assert says(holder) == "held"
    measuring = start("measuring")
    assert says(measuring) == "waiting"
    os.kill(holder.pid, signal.SIGKILL)
    assert says(measuring) == "held"


def test_a_killed_waiter_does_not_keep_the_gate(start: Start) -> None:
    training = start("training")
    assert says(training) == "held"
    waiter = start("measuring")
    assert says(waiter) == "waiting"
    os.kill(waiter.pid, signal.SIGKILL)
    waiter.wait()
    assert says(start("training")) == "held"


def test_the_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), machine_lock("training", None, tmp_path):
        raise KeyError
    said: list[str] = []
    with machine_lock("measuring", said.append, tmp_path):
        pass
    assert said == []


def test_any_user_may_open_the_lock_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with machine_lock("measuring", None, tmp_path):
            files = sorted(tmp_path.iterdir())
    finally:
        os.umask(before)
    assert len(files) == 2
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in files)


# Everything is imported as root: another user may not be able to read the environment.
STRANGER = """
import os, sys
from pathlib import Path
from edgemin.measure.machine import machine_lock
from edgemin.store.lock import Lock
folder = Path(sys.argv[1])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
with machine_lock("training", None, folder):
    held = [Lock(file).acquire(shared=True, deadline=0) for file in sorted(folder.iterdir())]
print(os.geteuid(), len(held))
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may become another user")
def test_another_user_takes_the_same_lock() -> None:
    # Not pytest's own directory, which lies in one that only its owner may enter.
    with tempfile.TemporaryDirectory() as folder, machine_lock("training", None, Path(folder)):
        Path(folder).chmod(0o755)
        command = [sys.executable, "-c", STRANGER, folder]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout.split()) == (0, ["65534", "2"]), ended.stderr


def test_taking_it_twice_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    with machine_lock("training", None, tmp_path):
        with pytest.raises(AssertionError), machine_lock("measuring", None, tmp_path):
            pass
        with pytest.raises(AssertionError), machine_lock("training", None, tmp_path):
            pass


def test_the_host_is_described_without_naming_it() -> None:
    facts = host()
    assert list(facts) == ["id", "cpu", "cores", "threads", "flags", "memory_bytes", "os", "python"]
    assert facts == host()
    assert len(facts["id"]) == 16
    assert 1 <= facts["cores"] <= facts["threads"]
    assert facts["memory_bytes"] == psutil.virtual_memory().total
    assert os.uname().release not in str(facts)


def test_the_id_tells_machines_apart_but_not_boots(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 16 * 2**30
    monkeypatch.setattr(machine, "_available_cpus", lambda: [0, 1])
    monkeypatch.setattr(machine, "_processor", lambda: ("A CPU", ["avx2"]))
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: type("Memory", (), {"total": memory}))
    before = host()["id"]
    memory -= 5 * 2**20
    assert host()["id"] == before
    memory *= 2
    assert host()["id"] != before
    memory //= 2
    monkeypatch.setattr(machine, "_processor", lambda: ("A CPU", ["avx2", "avx512_vnni"]))
    assert host()["id"] != before


def test_hyper_threads_and_quotas_are_no_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_available_cpus", lambda: [0, 1, 4, 5])
    quota = tmp_path / "cpu.max"
    assert available_cores(tmp_path, quota) == 4  # nothing known: each its own
    for cpu, core in {0: 0, 1: 1, 4: 0, 5: 1}.items():
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{core}\n")
    assert available_cores(tmp_path, quota) == 2
    quota.write_text("max 100000\n")
    assert available_cores(tmp_path, quota) == 2
    quota.write_text("100000 100000\n")
    assert available_cores(tmp_path, quota) == 1
    quota.write_text("50000 100000\n")
    assert available_cores(tmp_path, quota) == 1


def fake_rapl(root: Path, counters: dict[str, tuple[str, int]]) -> None:
    for directory, (name, energy_uj) in counters.items():
        path = root / directory
        path.mkdir(exist_ok=True)
        (path / "name").write_text(f"{name}\n")
        (path / "energy_uj").write_text(f"{energy_uj}\n")
        (path / "max_energy_range_uj").write_text("999999\n")


def test_rapl_adds_the_packages_and_only_those(tmp_path: Path) -> None:
    tree = {
        "intel-rapl:0": ("package-0", 1000),
        "intel-rapl:0:0": ("core", 500),
        "intel-rapl:1": ("package-1", 2000),
        "intel-rapl:2": ("psys", 5000),
    }
    fake_rapl(tmp_path, tree)
    meter = EnergyMeter(watts=5.0, root=tmp_path)
    assert meter.source == "rapl"
    meter.start()
    fake_rapl(tmp_path, {"intel-rapl:0": ("package-0", 4000), "intel-rapl:1": ("package-1", 2500)})
    fake_rapl(tmp_path, {"intel-rapl:0:0": ("core", 3000), "intel-rapl:2": ("psys", 9000)})
    energy = meter.stop()
    assert energy.joules == pytest.approx(3500e-6)
    assert energy.seconds > 0


def test_a_rapl_counter_that_started_again_is_followed(tmp_path: Path) -> None:
    fake_rapl(tmp_path, {"intel-rapl:0": ("package-0", 999_990)})
    meter = EnergyMeter(watts=5.0, root=tmp_path)
    meter.start()
    fake_rapl(tmp_path, {"intel-rapl:0": ("package-0", 15)})
    assert meter.stop().joules == pytest.approx(25e-6)
    assert Domain(tmp_path, 9).used_uj(9, 0) == 1


def test_without_a_readable_counter_energy_is_cpu_time_times_watts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rapl_domains(tmp_path / "nowhere") == []
    fake_rapl(tmp_path, {"intel-rapl:0": ("package-0", 1)})
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert rapl_domains(tmp_path) == []
    meter = EnergyMeter(watts=7.0, root=tmp_path)
    assert meter.source == "estimate"
    clock = iter([10.0, 12.5])
    monkeypatch.setattr("edgemin.measure.energy.time.process_time", lambda: next(clock))
    meter.start()
    assert meter.stop().joules == pytest.approx(2.5 * 7.0)
