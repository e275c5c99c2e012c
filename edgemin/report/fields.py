"""The fields of run.json that the report reads, and their types; docs/run_json.md says what each means.

Every field may be null or absent, but for those that the report cannot do without. Fields that are not listed here are
no business of the report's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

_EXPECTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
_NAMES = {str: "a text", bool: "true or false", list: "a list", dict: "an object", int: "a whole number"}


def _refuse_unless(fits: Callable[[Any], bool], expected: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not fits(value):
            raise ValueError(expected)
        return value

    return AfterValidator(check)


# NaN and infinity are not refused: what they stand in place of is not known, and not shown.
_Bounded = Annotated[float, _refuse_unless(lambda value: not 1e30 < abs(value) < math.inf, "a number below 1e30")]
Number = _Bounded | None
Cost = (
    Annotated[_Bounded, _refuse_unless(lambda value: value == 0 or not value < 1e-12, "0 or a number above 1e-12")]
    | None
)
Time = Annotated[_Bounded, _refuse_unless(lambda value: not value < 1e-12, "a number above 1e-12")] | None
Bits = Annotated[str, _refuse_unless(lambda value: re.fullmatch("[0-9]{1,2}", value) is not None, "bits as names")]
Text = str | None
Texts = list[str] | None


class _Fields(BaseModel):
    """Types are taken at their word: true is no number."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _absent_is_null(cls, data: Any) -> Any:
        """So that what is required and absent is refused with the type that was expected."""
        return {**dict.fromkeys(cls.model_fields), **data} if isinstance(data, dict) else data


class _Job(_Fields):
    overrides: Texts = None
    command: Text = None


class _Task(_Fields):
    name: Text = None
    metric: Text = None
    splits: Texts = None


class _Ablation(_Fields):
    name: str
    stages: Annotated[list[str], _refuse_unless(lambda value: len(value) == 2, "two stages")]


class _Order(_Fields):
    name: Text = None
    stages: Texts = None
    ablation: _Ablation | None = None


class _Host(_Fields):
    cpu: Text = None
    cores: int | None = None
    threads: int | None = None


class _Node(_Fields):
    path: str
    model: str
    stages: list[str]
    teachers: Texts = None


class _Latency(_Fields):
    length: Cost = None
    p10: Time = None
    p50: Time = None
    p90: Time = None
    p95: Time = None
    mean: Time = None
    n: Cost = None
    unstable: bool | None = None


class _Forms(_Fields):
    padded: _Latency | None = None
    task: _Latency | None = None


class _PerForm(_Fields):
    padded: Cost = None
    task: Cost = None


class _Runtime(_Fields):
    size_bytes: Cost = None
    latency_ms: _Forms | None = None
    throughput_per_s: _PerForm | None = None
    peak_memory_bytes: Cost = None
    runtime_memory_bytes: Cost = None
    model_memory_bytes: Number = None
    energy_mj: Cost = None
    power_w: Cost = None
    energy_source: Text = None
    measured_beside_other_work: bool | None = None
    threads: Cost = None


class _Costs(_Fields):
    params: Cost = None
    params_visible: Cost = None
    macs: Cost = None
    flops: Cost = None
    runtimes: dict[str, _Runtime] | None = None


class _RuntimeRatios(_Fields):
    compression_ratio: Cost = None
    speed_up: _PerForm | None = None


class _Difference(_Fields):
    metric: Number = None
    metric_retained: Number = None
    params_ratio: Cost = None
    flops_ratio: Cost = None
    runtimes: dict[str, _RuntimeRatios] | None = None


class _Delta(_Fields):
    teacher: _Difference | None = None
    student: _Difference | None = None
    parent: _Difference | None = None


class _Damaged(_Fields):
    layer: str
    damage: _Bounded


class _Gate(_Fields):
    passed: bool
    parent: Text = None
    parent_artifact: Text = None
    task: Text = None
    split: Text = None
    metric: Text = None
    parent_value: Number = None
    value: Number = None
    drop: Number = None
    max_drop: Number = None
    chance: Number = None
    agreement: Number = None
    flips: Number = None
    examples: Number = None
    collapsed: bool | None = None
    worst: list[_Damaged] | None = None


class _Majority(_Fields):
    metrics: dict[str, Number] | None = None


class _Collapsed(_Fields):
    majority: _Majority | None = None


class _Layer(_Fields):
    name: str
    weights: _Bounded
    damage: dict[Bits, Number]
    bits: int | None = None


class _Sensitivity(_Fields):
    examples: Number = None
    budget_mib: Number = None
    size_mib: Number = None
    layers: list[_Layer]


class _Quantized(_Fields):
    bits: dict[str, int] | None = None
    granularity: Text = None


class _Findings(_Fields):
    sensitivity: _Sensitivity | None = None
    quantization: _Quantized | None = None


class _Row(_Fields):
    name: str
    model: str
    stages: list[str]
    control: bool | None = None
    artifact: Text = None
    made_from: Text = None
    metrics: dict[str, dict[str, dict[str, Number]]] | None = None
    transfer: Texts = None
    cost: _Costs | None = None
    delta: _Delta | None = None
    notes: Texts = None
    gate: _Gate | None = None
    collapsed: dict[str, dict[str, _Collapsed]] | None = None
    findings: _Findings | None = None


class _File(_Fields):
    study: str
    experiment: Text = None
    job: _Job
    started: Text = None
    ended: Text = None
    seed: int
    task: _Task | None = None
    order: _Order | None = None
    config: dict[str, Any] | None = None
    host: _Host | None = None
    versions: dict[str, str] | None = None
    precision: Text = None
    threads: list[int] | None = None
    device: Text = None
    published: Text = None
    nodes: list[_Node] | None = None
    warnings: Texts = None
    rows: list[_Row]


def wrong(data: dict[str, Any]) -> str | None:
    """The first field that is not as it must be: where it is, what was expected, what was given; None if all are."""
    try:
        _File.model_validate(data)
    except ValidationError as found:
        error = found.errors(include_url=False)[0]
        if error["type"] == "value_error":
            expected, given = error["ctx"]["error"], error["input"]
        else:
            expected, given = _EXPECTED[error["type"]], _kind(error["input"])
        return f"{_where(error['loc'])}: expected {expected}, given {given}"
    return None


def _where(location: tuple[int | str, ...]) -> str:
    named = [part for part in location if part != "[key]"]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named).removeprefix(".")


def _kind(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 1024:
        return "a number that is too large"
    return "nothing" if value is None else _NAMES.get(type(value), "a number")
