"""One compressed encoder on disk: its weights as they are deployed, its shape, its tokenizer and where it came from.

No pickle is written or read: weights are safetensors, everything else is JSON. A quantized layer is stored as packed
integers with their scales, so that the file is as small as the model claims to be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from edgemin.encoder import config_file, quantized, structure_file
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError, first_line
from edgemin.store.json_file import read_object

WEIGHTS, CONFIG, STRUCTURE, PROVENANCE = "model.safetensors", "config.json", "structure.json", "provenance.json"
# What a runtime reads to run the model; the tokenizer is apart.
MODEL_FILES = (WEIGHTS, CONFIG, STRUCTURE)
# What a later stage of EdgeMIN can go on from beside the model: not its size, not loaded with it, not exported.
TRAINING_STATE = "training_state.safetensors"
SCORES = "scores.safetensors"  # of what was removed and what is left; nothing reads them again


def save(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    provenance: Mapping[str, Any],
    training_state: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write one encoder, with everything that is needed to load it again.

    Args:
        directory: an existing empty directory; [`Store.commit`][edgemin.store.artifacts.Store.commit] makes it
            permanent.
        model: any encoder that [`encoder`][edgemin.encoder] knows, pruned or quantized ones included.
        tokenizer: `None` for an architecture without data (`task=none`).
        provenance: how it came to be: resolved config, parents, seed, versions.
        training_state: what a stage has learnt besides the model; without any there is no file of it.
    """
    _write_tensors(directory / WEIGHTS, quantized.tensors(model))
    if training_state:
        _write_tensors(directory / TRAINING_STATE, training_state)
    model.config.save_pretrained(directory)
    _write_json(directory / STRUCTURE, structure_file.written(quantized.outline(model)))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    _write_json(directory / PROVENANCE, provenance)


def load(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load an artifact: the model in eval mode and its tokenizer, in one call.

    Uneven head counts and packed integers are restored as they were saved; the logits equal those before saving.

    Args:
        path: an artifact directory, e.g. `outputs/store/<run.json's artifact>`.

    Returns:
        The model and its tokenizer (`None` where it was saved without one).

    Raises:
        UserError: the directory is missing, incomplete or damaged.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"artifact: expected a directory, given {str(path)!r}, which does not exist")
    for name in MODEL_FILES:
        if not (directory / name).is_file():
            raise UserError(f"artifact {directory}: expected a file {name}, found none")
    try:
        outline = structure_file.read_outline(directory / STRUCTURE)
        config = config_file.read_config(directory / CONFIG)
        tensors = load_file(directory / WEIGHTS)
        _check_fits(config, outline, tensors, directory)
    except UserError as error:
        raise UserError(f"artifact {directory}: {error}") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"artifact {directory}: {WEIGHTS} is damaged ({first_line(error)})") from error
    tokenizer = read_tokenizer(directory)
    # the weights drawn here are overwritten: leave the caller's generator alone
    with torch.random.fork_rng(devices=[]):
        try:
            model = quantized.build(config, outline)
        except Exception as error:  # the rest was checked: what is left is how layers are quantized
            raise UserError(f"artifact {directory}: {STRUCTURE} cannot be built ({first_line(error)})") from error
    _fill(model, tensors, directory)
    return model.eval(), tokenizer


def has_latents(path: Path) -> bool:
    """Whether unrounded weights lie beside a quantized model.

    Raises:
        UserError: the file is damaged.
    """
    return any(name.startswith(quantized.LATENT) for name in load_training_state(path))


def save_scores(directory: Path, scores: Mapping[str, Tensor]) -> None:
    """Write what a stage found out beside a saved model; without any there is no file of it."""
    if scores:
        _write_tensors(directory / SCORES, {name: tensor.float() for name, tensor in scores.items()})


def load_training_state(path: Path) -> dict[str, Tensor]:
    """What a stage has left beside its model for later stages, by name; empty where it has left nothing.

    Raises:
        UserError: the file is damaged.
    """
    file = path / TRAINING_STATE
    try:
        return load_file(file) if file.is_file() else {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"artifact {path}: {TRAINING_STATE} is damaged ({first_line(error)})") from error


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of an artifact; `None` where it was saved without one.

    Raises:
        UserError: its files are damaged.
    """
    if not (directory / "tokenizer_config.json").is_file():
        return None
    try:
        found = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds: the readers of its files expect what they wrote
        raise UserError(f"artifact {directory}: its tokenizer is damaged ({first_line(error)})") from error
    return cast(PreTrainedTokenizerBase, found)


def _check_fits(config: PretrainedConfig, outline: Outline, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Compare shapes before anything of the size that the outline claims is made."""
    expected = config_file.build_empty(config, outline, directory / CONFIG).state_dict()
    stored = {}  # by what their names would be in full precision; their shapes depend on their bits
    if (held := outline.quantized) is not None:
        ending = quantized.PROVIDERS[held.provider].weight
        stored = {f"{path}.weight": f"{path}.{ending}" for path in held.layers or ()}
    for name, tensor in expected.items():
        given = tensors.get(stored.get(name, name))
        if given is None:
            raise UserError(f"{WEIGHTS} does not fit {STRUCTURE} (first difference: {name})")
        if name not in stored and (given.shape != tensor.shape or not given.is_floating_point()):
            raise UserError(
                f"{WEIGHTS} does not fit {STRUCTURE} (expected {name} of shape {list(tensor.shape)}, given "
                f"{str(given.dtype).removeprefix('torch.')} of shape {list(given.shape)})"
            )


def read_provenance(path: Path) -> dict[str, Any]:
    """The provenance that was saved beside an artifact.

    Raises:
        UserError: it is missing, damaged or not of the form in which it is saved.
    """
    try:
        found = read_object(path / PROVENANCE)
    except (OSError, ValueError) as error:
        raise UserError(f"artifact {path}: {PROVENANCE} cannot be read ({type(error).__name__})") from error
    kinds = {"head_trained": bool, "notes": list, "findings": dict}
    if any(not isinstance(found.get(name, kind()), kind) for name, kind in kinds.items()):
        raise UserError(f"artifact {path}: {PROVENANCE} is not of the form that EdgeMIN writes")
    return found


def _fill(model: PreTrainedModel, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Put the saved tensors into a freshly built model."""
    try:
        quantized.fill(model, tensors)
    except KeyError as error:
        raise UserError(
            f"artifact {directory}: {WEIGHTS} does not fit {STRUCTURE} (first difference: {error.args[0]})"
        ) from error
    except RuntimeError as error:
        raise UserError(f"artifact {directory}: {WEIGHTS} does not fit {STRUCTURE} ({first_line(error)})") from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # clone: safetensors refuses tensors that share storage
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(copies, path, {"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
