"""The settings that all of EdgeMIN's quantization shares: bits, scales, calibration, exemptions, the quality gate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedModel

from edgemin.config import Checked, Count, Positive
from edgemin.data.module import DataModule
from edgemin.encoder import building, quantized
from edgemin.encoder.families import BY_NAME
from edgemin.encoder.outline import Matrix, Outline, QuantizedLayers
from edgemin.errors import UserError
from edgemin.progress import live_line
from edgemin.quantization import model as quantization
from edgemin.quantization.ranges import ActivationRange, Calibration, Percentile
from edgemin.quantization.sensitivity import assign, matrix_bytes, sensitivity
from edgemin.quantization.weights import BITS, FLOAT, Activations, Granularity, Spec, WeightBits, WeightRange
from edgemin.training.stage import Stage

CALIBRATION_BATCH = 32
INPUT_BYTES = 8  # of a static Linear: scale and zero point of what it reads
_MIB = 2**20
# Names of places beside the paths of layers, in patterns.
PLACES = ("embeddings", "first", "last", "head", "classifier")


class Applied(NamedTuple):
    """What quantizing a model found out: notes and findings for run.json."""

    notes: list[str]
    findings: dict[str, Any]


@dataclass(frozen=True)
class Quantization(Checked):
    """Which layers are quantized, and how.

    Attributes:
        bits: of the weights of Linears: 2, 3, 4 or 8; 32 leaves them, and what they read, as they are.
        embedding_bits: of the embedding tables, likewise; `auto` is 8, or 32 where `bits` is.
        granularity: what shares a scale: `tensor`, `channel` (a row: an output, or a token's embedding) or
            `group`.
        group_size: columns of a group (`granularity=group`). It must divide every width but those inside attention
            and FFN, which pruning may have cut: they may end with a shorter group.
        embedding_granularity: what shares a scale in embedding tables, likewise; `auto` is `granularity`, but groups
            in place of rows where the bits are fewer than 8 and `group_size` divides the width: tables have columns
            of large values, beside which one scale for a row leaves the others next to nothing.
        activations: what Linears read: `static` (uint8, a range found on calibration sentences), `dynamic` (uint8,
            the range of each token) or `none`.
        weight_range: scales of weights: `minmax`, or the `mse` of least squared error.
        activation_range: ranges of static activations: `minmax`, `moving_average`, `percentile` or `mse`; see
            [`ranges`][edgemin.quantization.ranges].
        percentile: share of the values inside the range (`activation_range=percentile`), in percent.
        calibration_examples: training sentences to calibrate on.
        exempt: layers to leave in float: patterns of their paths (`bert.encoder.layer.0.*`), or `embeddings`,
            `first` and `last` (layer), `head` (pooler and classifier), `classifier`.
        sensitivity: mixed precision: measure what every matrix does to the answers at each of `candidates`, alone, on
            the calibration sentences (of train, also where there is a hold-out), and give each the bits that do the
            least damage in all within `size_mib`; see [`sensitivity`][edgemin.quantization.sensitivity]. Tables keep
            `embedding_bits` where that is a number.
        candidates: the bits to choose from.
        size_mib: the size of the file's tensors in MiB; `None`: what uniform `bits` would take.
        keep_latent: leave the weights as they were before rounding, in float32, and the scales beside the model, as
            training state: whatever trains or prunes it next goes on from them, not from the rounded weights, and
            leaves its own. They are no part of the model: not in its size, never exported.
    """

    bits: Literal[WeightBits, 32] = 8
    embedding_bits: Literal["auto", WeightBits, 32] = "auto"
    granularity: Granularity = "channel"
    embedding_granularity: Literal["auto", Granularity] = "auto"
    group_size: Count = 64
    activations: Activations = "static"
    weight_range: WeightRange = "mse"
    activation_range: ActivationRange = "percentile"
    percentile: Percentile = 99.99
    calibration_examples: Count = 256
    exempt: Sequence[str] = field(default=("classifier",))
    sensitivity: bool = False
    candidates: Sequence[WeightBits] = field(default=(8, 4, 2))
    size_mib: Positive | None = None
    keep_latent: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.candidates or len(set(self.candidates)) < len(self.candidates):
            known = ", ".join(map(str, BITS))
            raise UserError(f"candidates: expected different bits out of {known}, given {list(self.candidates)}")
        if self.size_mib is not None and not self.sensitivity:
            raise UserError(f"size_mib: expected null with sensitivity=false, given {self.size_mib}")

    @property
    def calibration(self) -> Calibration:
        """The part of the settings that says how static activations are calibrated."""
        return Calibration(self.activation_range, self.percentile, self.calibration_examples)

    @property
    def reads_data(self) -> bool:
        """Whether it looks at the task's sentences."""
        return self.sensitivity or (self.activations == "static" and self.bits != FLOAT)

    def idle(self, model: Outline, *, draws: bool = False) -> tuple[str, ...]:
        """Settings that decide nothing beside the others.

        Args:
            model: to be quantized.
            draws: whether the stage reads the calibration sentences for something else, too.
        """
        specs = self.specs(model.matrices).values()
        static = any(spec.activations == "static" and spec.bits != FLOAT for spec in specs)
        unread = {
            "activation_range": not static,
            "percentile": not static or self.activation_range != "percentile",
            "calibration_examples": not (static or self.sensitivity or draws),
            "candidates": not self.sensitivity,
            "group_size": not self.sensitivity and all(spec.group_size is None for spec in specs),
        }
        return tuple(name for name, holds in unread.items() if holds)

    def check(self, model: Outline) -> None:
        """Refuse patterns that match nothing, groups that do not divide a width, and sizes that cannot be reached."""
        specs = self.specs(model.matrices)
        if self.sensitivity:
            self._check_candidates(model, specs)
        for path, spec in specs.items():
            matrix = model.matrices[path]
            inside = path.endswith((BY_NAME[model.family].output, BY_NAME[model.family].ffn_out))
            if spec.group_size is None or inside:
                continue
            assert matrix.columns is not None, "only widths inside attention and FFN are not known yet"
            if matrix.columns % spec.group_size:
                raise UserError(
                    f"group_size: expected a divisor of {matrix.columns}, the width of {path}, given {spec.group_size}"
                )

    def after(self, model: Outline) -> Outline:
        """The outline of what it makes of a model; how its layers are quantized may be known only when it runs.

        Raises:
            UserError: as `check`.
        """
        self.check(model)
        held = model.quantized or QuantizedLayers("integers", {})
        if self.sensitivity or held.layers is None:
            return replace(model, quantized=replace(held, layers=None))
        specs = self.specs(model.matrices).items()
        new = {path: spec.describe() for path, spec in specs if spec.bits != FLOAT}
        return replace(model, quantized=replace(held, layers=held.layers | new))

    def changes_nothing(self, model: Outline) -> bool:
        """Whether planning knows that a model is quantized in this very way already, so that it stays as it is."""
        return bool(model.quantized and model.quantized.layers) and self.after(model) == model

    def _check_candidates(self, model: Outline, uniform: Mapping[str, Spec]) -> None:
        """Check, before there are weights, that the fewest bits of the matrices alone stay within `size_mib`."""
        matrices = model.matrices
        free = self._candidates(matrices, uniform)
        if not free:
            raise UserError(
                "sensitivity: expected matrices to choose bits for, given none: all are exempt or keep embedding_bits"
            )
        if not model.is_known:  # its widths are not known yet; applying it tells
            return
        least = sum(min(matrix_bytes(matrices[path], spec) for spec in ways) for path, ways in free.items())
        if self.size_mib is None and least > sum(_bytes(matrices[path], uniform[path]) for path in free):
            raise UserError(
                f"candidates: expected some that take no more than uniform bits ({self.bits}), as size_mib=null asks, "
                f"given {list(self.candidates)}"
            )
        rest = sum(
            _bytes(matrix, uniform[path]) if path in uniform else 0  # an earlier stage may have packed what is exempt
            for path, matrix in matrices.items()
            if path not in free
        )
        if self.size_mib is not None and least + rest > self.size_mib * _MIB:
            raise UserError(
                f"size_mib: expected more than {(least + rest) / _MIB:.2f} MiB, what the matrices take at the fewest "
                f"bits of candidates, given {self.size_mib:g}"
            )

    def _candidates(self, matrices: Mapping[str, Matrix], uniform: Mapping[str, Spec]) -> dict[str, list[Spec]]:
        """The ways to quantize each matrix whose bits are to be chosen."""
        ways = [replace(self, bits=bits, embedding_bits=bits) for bits in self.candidates]
        return {
            path: [way.spec(matrices[path]) for way in ways]
            for path in uniform
            if not matrices[path].is_table or self.embedding_bits == "auto"
        }

    def specs(self, matrices: Mapping[str, Matrix]) -> dict[str, Spec]:
        """How each matrix is quantized; those that are exempt are absent.

        Raises:
            UserError: a pattern matches none of them.
        """
        last = max((int(matrix.place) for matrix in matrices.values() if matrix.place.isdigit()), default=0)
        exempt: set[str] = set()
        for index, pattern in enumerate(self.exempt):
            matched = {path for path, matrix in matrices.items() if _matches(pattern, path, matrix.place, last)}
            if not matched:
                some = ", ".join(list(matrices)[:3])
                raise UserError(
                    f"exempt[{index}]: expected {', '.join(PLACES)} or a pattern of a layer's path ({some} ...), given "
                    f"{pattern!r}, which matches none"
                )
            exempt |= matched
        return {path: self.spec(matrix) for path, matrix in matrices.items() if path not in exempt}

    def spec(self, matrix: Matrix) -> Spec:
        """The specification by which one matrix is quantized."""
        bits, granularity, activations = self.bits, self.granularity, self.activations
        if matrix.is_table:
            activations = "none"
            if self.embedding_bits != "auto":
                bits = self.embedding_bits
            elif bits != FLOAT:
                bits = 8
            if self.embedding_granularity != "auto":
                granularity = self.embedding_granularity
            elif granularity == "channel" and bits < 8 and matrix.columns and matrix.columns % self.group_size == 0:
                granularity = "group"
        return Spec(bits, granularity, self.group_size if granularity == "group" else None, activations)

    def apply(self, model: PreTrainedModel, data: DataModule | None, seed: int) -> Applied:
        """Quantize a model in place and calibrate it.

        Args:
            model: with the head that it will have.
            data: the task's, where [`Quantization.reads_data`][edgemin.quantization.settings.Quantization.reads_data].
            seed: of the draw of calibration sentences.

        Raises:
            UserError: activations that are not finite, or a size that cannot be reached.
        """
        matrices = building.outline(model).matrices
        specs = self.specs(matrices)
        findings: dict[str, Any] = {}
        if self.sensitivity:
            assert data is not None
            specs, findings = self._mixed(model, matrices, specs, data, seed)
        specs = {path: spec for path, spec in specs.items() if spec.bits != FLOAT}
        if not specs:
            return Applied(["nothing is quantized: all layers are exempt or keep 32 bits"], {})
        kept = sum(layer.spec == specs.get(path) for path, layer in quantization.quantized_layers(model).items())
        quantization.quantize(model, specs, self.weight_range, self.calibration)
        calibrates = self.reads_data and quantization.needs_ranges(model)
        if calibrates:
            assert data is not None
            quantization.fit_inputs(model, data.calibration(self.calibration_examples, CALIBRATION_BATCH, seed))
        scales = "the scales of their weights, ranges of activations are chosen here" if calibrates else "their scales"
        notes = [f"{kept} layers were quantized in this way already: they keep {scales}"] if kept else []
        ragged = [path for path, spec in specs.items() if spec.group_size and matrices[path].size[1] % spec.group_size]
        if ragged:
            notes.append(f"rows of {len(ragged)} pruned layers end with a group shorter than {self.group_size}")
        return Applied(notes, findings)

    def _mixed(
        self,
        model: PreTrainedModel,
        matrices: Mapping[str, Matrix],
        uniform: dict[str, Spec],
        data: DataModule,
        seed: int,
    ) -> tuple[dict[str, Spec], dict[str, Any]]:
        """Choose bits by sensitivity: how each matrix is quantized, and the damage that each does."""
        free = self._candidates(matrices, uniform)
        fixed = [path for path, spec in uniform.items() if path not in free and spec.bits != FLOAT]
        batches = data.calibration(self.calibration_examples, CALIBRATION_BATCH, seed)
        damages = sensitivity(model, free, self.weight_range, batches, data.kind)
        sizes = {path: {spec.bits: matrix_bytes(matrices[path], spec) for spec in ways} for path, ways in free.items()}
        static = sum(spec.activations == "static" for path, spec in uniform.items() if path in free)
        kept = _bytes_beside(model, {*free, *fixed}) + static * INPUT_BYTES
        kept += sum(matrix_bytes(matrices[path], uniform[path]) for path in fixed)
        equal = kept + sum(_bytes(matrices[path], uniform[path]) for path in free)
        budget = equal if self.size_mib is None else int(self.size_mib * _MIB)
        with live_line("choosing bits"):
            chosen = assign(damages, sizes, budget - kept)
        found = {
            "examples": sum(len(batch["labels"]) for batch in batches),
            "candidates": list(self.candidates),
            "budget_mib": budget / _MIB,
            "size_mib": (kept + sum(sizes[path][bits] for path, bits in chosen.items())) / _MIB,
            "layers": [
                {
                    "name": path,
                    "weights": math.prod(matrices[path].size),
                    "damage": {str(bits): value for bits, value in damages[path].items()},
                    "bits": chosen[path],
                }
                for path in free
            ],
        }
        best = {path: next(spec for spec in ways if spec.bits == chosen[path]) for path, ways in free.items()}
        return uniform | best, {"sensitivity": found}


def quantize_given(stage: Stage, how: Quantization, data: DataModule | None) -> None:
    """Quantize the model that a stage was given; what there is to say of it goes to the stage's notes and findings."""
    stage.keeps_latent = how.keep_latent
    applied = how.apply(stage.model, data, stage.seed)
    stage.notes += applied.notes
    stage.findings |= applied.findings


def _bytes(matrix: Matrix, spec: Spec) -> int:
    return 4 * math.prod(matrix.size) if spec.bits == FLOAT else matrix_bytes(matrix, spec)


def _bytes_beside(model: PreTrainedModel, paths: set[str]) -> int:
    """The bytes of a model in a file without the matrices at these paths; their biases count."""
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in quantized.tensors(model).items()
        if name.endswith(".bias") or name.rpartition(".")[0] not in paths
    )


def _matches(pattern: str, path: str, place: str, last: int) -> bool:
    if pattern in PLACES:
        names = {"first": ("1",), "last": (str(last),), "head": ("head", "classifier")}
        return place in names.get(pattern, (pattern,))
    return fnmatchcase(path, pattern)
