"""The fields of run.json that the report reads, and their types.

`docs/run_json.md` says what each field means. The report ignores fields that are not listed here. All of these may be
null or absent except those without a default.
"""

from __future__ import annotations

from typing import Any

from edgemin.report.findings import Fields, Findings, Gate
from edgemin.report.values import Cost, Count, Metrics, Number, Pair, Text, Time


class Job(Fields):
    """How the job was asked for."""

    overrides: list[str] = []
    command: Text = None


class Task(Fields):
    """What was learnt; nothing of it is known of a run of architectures alone."""

    name: Text = None
    path: Text = None
    metric: Text = None
    splits: list[str] = []
    labels: list[str] = []


class Ablation(Fields):
    """The ablation that expanded the order into more rows."""

    name: str
    stages: list[str] = []


class Order(Fields):
    """The student's stages, in the order they ran."""

    name: Text = None
    stages: list[str] = []
    ablation: Ablation | None = None
    comparisons: list[Pair] = []


class Host(Fields):
    """The machine that the job ran on."""

    cpu: Text = None
    cores: int | None = None
    threads: int | None = None


class Node(Fields):
    """A node of the plan."""

    path: str
    model: str
    stages: list[str]
    teachers: list[str] = []


class Latency(Fields):
    """The timings of one form of input."""

    length: Cost = None
    p10: Time = None
    p50: Time = None
    p90: Time = None
    p95: Time = None
    mean: Time = None
    n: Cost = None
    rounds: list[Time] = []
    unstable: bool = False

    def over(self, other: Latency) -> list[float]:
        """This one's median by the other's, round by round; nothing where they had not the same rounds."""
        if len(self.rounds) != len(other.rounds):
            return []
        return [mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True) if mine and theirs]


class Latencies(Fields):
    """The timings by form of input; `transfer`: sentences of other tasks, by the task's name."""

    padded: Latency = Latency()
    task: Latency = Latency()
    transfer: dict[str, Latency] = {}

    def of(self, form: str, task: str | None) -> Latency:
        """The timings of a form of input; of `transfer`, those of a task."""
        found = self.transfer.get(task or "", Latency()) if form == "transfer" else getattr(self, form)
        assert isinstance(found, Latency)
        return found


class PerForm(Fields):
    """A number by form of input."""

    padded: Cost = None
    task: Cost = None


class Batch(Fields):
    """The timings of batches of one size and length, all sentences of a batch padded to it."""

    batch: Count
    length: Count
    p10: Time = None
    p50: Time = None
    p90: Time = None
    n: Cost = None
    sentences_per_s: Cost = None


class ColdStart(Fields):
    """What a fresh process takes until it has answered for the first time, in milliseconds."""

    load: Cost = None
    first_answer: Cost = None


class Operator(Fields):
    """What one operator costs in an inference."""

    name: str
    self_ms: Cost = None
    share: Number = None
    memory_bytes: Number = None
    calls: Cost = None


class Profile(Fields):
    """The costliest operators, and the file that has all of them."""

    trace: Text = None
    operators: list[Operator] = []


class Runtime(Fields):
    """What a model costs in one runtime."""

    size_bytes: Cost = None
    latency_ms: Latencies | None = None
    grid: list[Batch] = []
    cold_start_ms: ColdStart = ColdStart()
    profile: Profile | None = None
    throughput_per_s: PerForm = PerForm()
    peak_memory_bytes: Cost = None
    runtime_memory_bytes: Cost = None
    model_memory_bytes: Number = None
    energy_mj: Cost = None
    power_w: Cost = None
    energy_source: Text = None
    measured_beside_other_work: bool = False
    threads: Cost = None
    metrics: Metrics = {}
    agreement: Number = None
    largest_difference: Number = None


class Costs(Fields):
    """What a model costs: what follows from its architecture, and by runtime what does not."""

    params: Cost = None
    params_visible: Cost = None
    macs: Cost = None
    flops: Cost = None
    runtimes: dict[str, Runtime] = {}


class Ratios(Fields):
    """One row against another in one runtime."""

    compression_ratio: Cost = None
    speed_up: PerForm = PerForm()


class Difference(Fields):
    """One row against another; ratios above 1 say that it is smaller or faster."""

    metric: Number = None
    metric_retained: Number = None
    params_ratio: Cost = None
    flops_ratio: Cost = None
    runtimes: dict[str, Ratios] = {}


class Delta(Fields):
    """A row against what it is compared with."""

    teacher: Difference = Difference()
    student: Difference = Difference()
    parent: Difference = Difference()


class Row(Fields):
    """One row of the stage table: an evaluated, measured artifact.

    `device` is no field of run.json: it names the device where that is not the job's machine.
    """

    name: str
    model: str
    stages: list[str]
    control: bool = False
    artifact: Text = None
    made_from: Text = None
    metrics: Metrics = {}
    transfer: list[str] = []
    cost: Costs = Costs()
    delta: Delta = Delta()
    predictions: Text = None
    notes: list[str] = []
    gate: Gate | None = None
    collapsed: dict[str, dict[str, dict[str, Any]]] = {}
    findings: Findings = Findings()
    device: str = ""

    def score(
        self, task: str | None, split: str | None, metric: str | None, runtime: str | None = None
    ) -> float | None:
        """A metric, that of torch's answers or of a runtime's; None where it is not known."""
        metrics = self.metrics if runtime is None else self.cost.runtimes.get(runtime, Runtime()).metrics
        return metrics.get(task or "", {}).get(split or "", {}).get(metric or "")


class Content(Fields):
    """All of one run.json."""

    study: str
    job: Job
    started: str = ""
    ended: str = ""
    seed: int
    task: Task = Task()
    order: Order = Order()
    config: dict[str, Any] = {}
    host: Host = Host()
    versions: dict[str, str] = {}
    precision: Text = None
    threads: list[int] = []
    device: Text = None
    published: Text = None
    nodes: list[Node] = []
    warnings: list[str] = []
    rows: list[Row]
