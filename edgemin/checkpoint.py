"""A checkpoint as its makers left it: found, fingerprinted, read, its head brought into a task's label order."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from edgemin import artifact, toy
from edgemin.encoder import building, config_file, parts, slicing, structure_file, taps
from edgemin.encoder.building import ProblemType
from edgemin.encoder.outline import Outline
from edgemin.encoder.weights_file import tensor_names
from edgemin.errors import UserError, first_line
from edgemin.progress import counted, live_line
from edgemin.store.content import file_digest
from edgemin.store.memo import Memo

# Files of a checkpoint that decide what is loaded.
_FILES = (
    "model*.safetensors",
    "*.index.json",
    "pytorch_model*.bin",
    "config.json",
    "structure.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
)


@dataclass(frozen=True)
class Facts:
    """What planning knows of a checkpoint before its weights are read."""

    directory: Path
    config: PretrainedConfig
    outline: Outline
    is_artifact: bool  # of EdgeMIN, whose widths the configuration cannot say
    labels: tuple[str, ...] | None  # of a trained classification head; `None` without one, or without all its weights
    draws_head: bool  # parts of its head that a task may keep are missing and drawn at random


# All jobs of a sweep ask for the same models, for their plans and for themselves.
_known_facts = Memo[Facts]()
_known_tokenizers = Memo[PreTrainedTokenizerBase]()


def read_facts(source: str, key: str) -> Facts:
    """Find a checkpoint (download it where it is a Hub id) and read its configuration.

    Its weights are loaded and run once, so that a damaged model is found before anything is trained.

    Raises:
        UserError: it is neither a directory nor to be had from the Hub, its architecture is unknown, or its files are
            damaged or do not fit one another.
    """
    directory = find(source, key)
    files = [*_files(directory), directory / artifact.PROVENANCE]
    try:
        return _known_facts.of(directory, files, lambda: _facts(directory))
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _facts(directory: Path) -> Facts:
    config = config_file.read_config(directory / artifact.CONFIG)
    held = None
    if (directory / artifact.STRUCTURE).is_file():  # an EdgeMIN artifact says itself whether its head was trained
        held = structure_file.read_outline(directory / artifact.STRUCTURE)
        try:
            classifier = bool(artifact.read_provenance(directory)["head_trained"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"expected a checkpoint with a {artifact.PROVENANCE}, given {directory} ({first_line(error)})"
            ) from error
    else:
        classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    outline = building.outline(config_file.build_empty(config, held, directory / artifact.CONFIG))
    if held is not None:
        outline = replace(outline, quantized=held.quantized)
    labels = tuple(str(label) for _, label in sorted((config.id2label or {}).items())) if classifier else None
    names = tensor_names(directory, artifact.WEIGHTS)
    draws_head = not all(any(part in name for name in names) for part in parts.head_parts(config))
    facts = Facts(directory, config, outline, held is not None, labels, draws_head)
    with torch.random.fork_rng(devices=[]):  # leave the caller's generator alone
        model, drawn = _loaded(facts, 0)
        _try_out(model, directory)
    if facts.labels is not None and drawn:  # the architecture's name promises a head that the file has not got
        facts = replace(facts, labels=None, draws_head=True)
    return facts


def _files(directory: Path) -> list[Path]:
    return sorted({path for pattern in _FILES for path in directory.glob(pattern) if path.is_file()})


def _try_out(model: PreTrainedModel, directory: Path) -> None:
    """Refuse weights that are not finite, and a model that cannot answer a few tokens."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"expected finite weights in {directory}, given {name} with nan or infinity")
    tokens = torch.zeros(1, 8, dtype=torch.long)
    try:
        with torch.inference_mode():
            finite = bool(
                torch.isfinite(taps.logits(model.eval(), {"input_ids": tokens, "attention_mask": tokens + 1})).all()
            )
    except Exception as error:  # whatever of its configuration has passed until here
        raise UserError(f"the model in {directory} cannot be run ({first_line(error)})") from error
    if not finite:
        raise UserError(f"expected a model whose logits are finite, given that in {directory}")


@cache
def find(source: str, key: str) -> Path:
    """The local directory of a checkpoint: a path as it is, a Hub id from the cache or the network."""
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{key}: expected an existing directory or a Hub id, given {source!r}, which does not exist")
    try:
        with live_line(f"{source}  downloading, unless it is cached", beside_bars=True):
            kept = snapshot_download(source, allow_patterns=list(_FILES), ignore_patterns=["*/*"])
    except Exception as error:  # the Hub's client raises many kinds
        raise UserError(
            f"{key}: expected a local directory or a Hub id that is cached or can be reached, given {source!r} "
            f"({type(error).__name__}); "
            f"without a network give {key}=<directory with the weights>"
        ) from error
    return Path(kept)


def fingerprint(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint that decides what is loaded, by name."""
    files = _files(directory)
    if any(path.suffix == ".safetensors" for path in files):
        files = [path for path in files if path.suffix != ".bin"]
    return {path.name: file_digest(path) for path in counted(files, f"{directory}  reading files for its key")}


def read_tokenizer(source: str, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id or local directory, or the toy task's: of one directory the same object for all.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    if source == "toy":
        return toy.tokenizer()
    directory = find(source, key)
    if not has_tokenizer(directory):
        raise UserError(
            f"{key}: expected a tokenizer (tokenizer.json, vocab.txt ...) beside the weights of {source}, found none"
        )
    return _known_tokenizers.of(directory, _files(directory), lambda: _tokenizer(directory, key))


def _tokenizer(directory: Path, key: str) -> PreTrainedTokenizerBase:
    try:
        found = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        words = set(found.get_vocab()) - set(found.all_special_tokens)
    except Exception as error:  # of many kinds: the readers of these files do not expect damaged ones
        raise UserError(
            f"{key}: the tokenizer in {directory} cannot be read ({type(error).__name__}: {first_line(error)})"
        ) from error
    rules = {
        "tokenizer.json, a fast tokenizer": found.is_fast,
        "a vocabulary with words": words,
        "a padding token": found.pad_token_id is not None,
        "model_max_length, a whole number of at least 1": _is_whole(found.model_max_length),
        "model_input_names, a list with input_ids": "input_ids" in found.model_input_names,
    }
    for expected, holds in rules.items():
        if not holds:
            raise UserError(f"{key}: expected {expected} in {directory}, given a tokenizer without")
    return cast(PreTrainedTokenizerBase, found)


def has_tokenizer(directory: Path) -> bool:
    """Whether any file beside the weights holds a vocabulary; transformers would make an empty one up."""
    names = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
    return any(path.is_file() for name in names for path in directory.glob(name))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 1  # transformers' "unlimited" is a float


def load_checkpoint(facts: Facts, seed: int) -> PreTrainedModel:
    """A checkpoint as a sequence classifier; what its head lacks is drawn from the seed.

    Raises:
        UserError: the weights are damaged, of other shapes, or the encoder's are not all there.
    """
    return _loaded(facts, seed)[0]


def _loaded(facts: Facts, seed: int) -> tuple[PreTrainedModel, list[str]]:
    """The same, and the names of the weights of its head that were drawn."""
    if facts.is_artifact:
        return artifact.load(facts.directory)[0], []
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(seed)
    try:
        # torch reads .bin files with weights_only; no pickled object is ever executed
        model, report = AutoModelForSequenceClassification.from_pretrained(
            facts.directory,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"expected weights in safetensors, given a pickle in {facts.directory} that is damaged or holds more than "
            "tensors, which is never loaded; on a machine where you trust the file, load it with the code that wrote "
            "it and save it by model.save_pretrained(<directory>), which writes safetensors"
        ) from error
    except Exception as error:  # of many kinds, torch's and transformers' own among them
        raise UserError(
            f"the weights in {facts.directory} cannot be loaded ({type(error).__name__}: {first_line(error)})"
        ) from error
    _check_report(report, model, facts.directory)
    building.silence_padding(model)
    drawn = [key for key in report["missing_keys"] if key.startswith(parts.head_prefixes(model))]
    return cast(PreTrainedModel, model), drawn


def _check_report(report: Mapping[str, Any], model: PreTrainedModel, directory: Path) -> None:
    """Refuse what transformers would draw at random in the place of weights that do not fit or are not there."""
    if misfits := sorted(report["mismatched_keys"]):
        name, given, expected = misfits[0]
        others = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise UserError(
            f"expected weights in {directory} of the shapes that its config.json says, {list(expected)} for {name}, "
            f"given {list(given)}{others}"
        )
    absent = sorted(key for key in report["missing_keys"] if not key.startswith(parts.head_prefixes(model)))
    if absent:
        raise UserError(f"expected all weights of the encoder in {directory}, given none for {absent[0]}")
    if spare := sorted(parts.in_layers(model, report["unexpected_keys"])):
        raise UserError(
            f"expected weights in {directory} for the {parts.num_layers(model)} layers that its config.json says, "
            f"given {spare[0]} besides"
        )


def align_head(model: PreTrainedModel, labels: Sequence[str], problem_type: ProblemType) -> bool:
    """Bring the head of an already fine-tuned checkpoint into the task's label order, by name.

    Args:
        model: of the checkpoint.
        labels: the task's.
        problem_type: what transformers calls such a task.

    Returns:
        Whether the head speaks this task's labels: their names (case apart) are the same, or the checkpoint has only
        generic names (`LABEL_0` ...) and as many of them.
    """
    order = head_order(parts.label_names(model), labels)
    if order is None:
        return False
    if order == list(range(len(labels))):
        _name_labels(model, labels, problem_type)
        return True
    classifier = model.get_submodule(parts.classifier_prefix(model))
    if not isinstance(classifier, torch.nn.Linear):
        raise UserError(
            f"source: expected the labels in the order {list(labels)} of a head that is quantized, given others"
        )
    slicing.slice_weight(classifier, torch.tensor(order), None)
    _name_labels(model, labels, problem_type)
    return True


def _name_labels(model: PreTrainedModel, labels: Sequence[str], problem_type: ProblemType) -> None:
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}
    model.config.problem_type = problem_type


def head_order(have: Sequence[str], want: Sequence[str]) -> list[int] | None:
    """For each wanted label the row of the head that scores it, or `None` where the labels do not match.

    Names are compared as they are, then in plain letters; generic ones that are not wanted stand for their places.
    """
    if is_generic(have, want):
        return list(range(len(want)))
    return _by_name(have, want) or _by_name([*map(_plain, have)], [*map(_plain, want)])


def is_generic(have: Sequence[str], want: Sequence[str]) -> bool:
    """Whether a head has as many labels as are wanted but no names for them: `LABEL_0` and so on."""
    places = [f"LABEL_{index}" for index in range(len(want))]
    return [name.upper() for name in have] == places and {name.upper() for name in want} != {*places}


def _by_name(have: Sequence[str], want: Sequence[str]) -> list[int] | None:
    rows = {name: index for index, name in enumerate(have)}
    if len(have) != len(want) or len(rows) < len(have) or rows.keys() != {*want}:
        return None
    return [rows[name] for name in want]


def _plain(label: str) -> str:
    return label.lower().replace("-", "_").replace(" ", "_")
