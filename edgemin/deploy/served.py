"""What an artifact or a bundle says of itself, read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError

from edgemin.deploy.runtime import ARTIFACT, RUNTIMES
from edgemin.errors import UserError, first_line
from edgemin.store.json_file import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The names are repeated here because `artifact.py` and `bundle.py` load torch.
CONFIG, STRUCTURE, PROVENANCE, TOKENIZER = "config.json", "structure.json", "provenance.json", "tokenizer.json"


class _Task(BaseModel):
    text_columns: tuple[str, ...] = ()
    max_length: PositiveInt | None = None


class _Provenance(BaseModel):
    head_trained: bool = True
    path: str = "a model"
    task: _Task = _Task()


class _Bundle(BaseModel):
    runtime: str
    texts: PositiveInt
    max_length: PositiveInt
    length: PositiveInt | None = None
    text_columns: tuple[str, ...] = ()
    truncation_side: Literal["left", "right"] = "right"
    token_types: bool = True


class _Config(BaseModel):
    id2label: dict[int, str] = Field(default_factory=dict)
    problem_type: str | None = None
    pad_token_id: NonNegativeInt | None = None
    edgemin: _Bundle | None = None


@dataclass(frozen=True)
class Served:
    """What an artifact or a bundle says of itself.

    Attributes:
        path: the directory.
        runtime: that opens it.
        labels: of its outputs, by index.
        problem_type: what transformers calls its kind of task.
        pad_id: the token that fills a batch up.
        text_columns: the columns that it was trained on; empty where that is not recorded.
        texts: of an example, one or two; `None` where that is not recorded.
        max_length: longest input in tokens; `None` until the model is open, where only the model tells.
        length: the length of every input, where the model has a fixed one.
        truncation_side: where an input that is too long is cut; of an artifact its tokenizer tells when it is opened.
        token_types: whether the tokenizer's segment ids are used, else all are 0; of an artifact likewise.
    """

    path: Path
    runtime: str
    labels: Mapping[int, str]
    problem_type: str | None
    pad_id: int
    text_columns: tuple[str, ...]
    texts: int | None
    max_length: int | None
    length: int | None = None
    truncation_side: Literal["left", "right"] = "right"
    token_types: bool = True


def text_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What transformers knows of a tokenizer beside its `tokenizer.json`: the settings of that name of `Served`."""
    return {
        "truncation_side": tokenizer.truncation_side,
        "token_types": "token_type_ids" in tokenizer.model_input_names,
    }


def described(path: Path) -> Served:
    """What an artifact or a bundle says of itself; nothing of it is opened yet.

    Raises:
        UserError: it is neither, or damaged.
    """
    if not path.is_dir():
        raise UserError(f"model: expected the directory of an artifact or a bundle, given {path}, which is none")
    config = _read(path, CONFIG, _Config) if (path / CONFIG).is_file() else None
    own = config.edgemin if config is not None else None
    if config is None or (own is None and not (path / STRUCTURE).is_file()):
        missing = CONFIG if config is None else f"{STRUCTURE} (an artifact) and no runtime in {CONFIG} (a bundle)"
        raise UserError(f"model: expected an artifact or a bundle of EdgeMIN, given {path} without {missing}")
    if own is None:
        return _artifact(path, config)
    known = [name for name, runtime in RUNTIMES.items() if runtime.form != ARTIFACT]
    if own.runtime not in known:
        raise UserError(
            f"model: expected an artifact, or a bundle for {', '.join(known[:-1])} or {known[-1]}, given {path}, "
            f"made for {own.runtime}"
        )
    said = config.id2label, config.problem_type, config.pad_token_id or 0
    inputs = own.text_columns, own.texts, own.max_length, own.length, own.truncation_side, own.token_types
    return Served(path, own.runtime, *said, *inputs)


def _artifact(path: Path, config: _Config) -> Served:
    provenance = _read(path, PROVENANCE, _Provenance)
    if not provenance.head_trained:
        raise UserError(f"model: expected one whose head was trained, given {path} ({provenance.path}), whose was not")
    said, columns = (config.id2label, config.problem_type, config.pad_token_id or 0), provenance.task.text_columns
    return Served(path, "torch", *said, columns, len(columns) or None, provenance.task.max_length)


def _read(path: Path, name: str, form: type[Any]) -> Any:
    try:
        return form.model_validate(read_object(path / name))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"model: {path / name} is damaged ({where}: {first['msg']})") from error
    except (OSError, ValueError) as error:
        raise UserError(f"model: {path / name} cannot be read ({first_line(error)})") from error
