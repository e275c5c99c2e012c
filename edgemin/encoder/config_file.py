"""A checkpoint's `config.json`: types as transformers declares them, and the ranges in which a model can be built."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from edgemin.encoder.building import build
from edgemin.encoder.families import FAMILIES, LARGEST, table
from edgemin.encoder.outline import Outline
from edgemin.errors import UserError
from edgemin.store.json_file import read_object

Rule = tuple[str, bool, str]  # a key, whether its value is one that was expected, what that is
_LARGEST_NAMES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "positions",
    "type_vocab_size": "positions",
}
_WORDS = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false", "NoneType": "null"}
_ACTIVATIONS = ("hidden_act", "activation", "hidden_activation")


def read_config(path: Path) -> PreTrainedConfig:
    """Read a `config.json`.

    Raises:
        UserError: it cannot be read, its architecture is unknown, or a field is of the wrong type or out of range: the
            message begins with the field and the file.
    """
    try:
        content = read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"expected a checkpoint with a config.json, given {path} ({error})") from error
    known = [model_type for family in FAMILIES for model_type in family.model_types]
    if content.get("model_type") not in known:
        raise _refusal("model_type", path, f"an encoder ({', '.join(known)})", content.get("model_type"))
    _refuse(_names(content), content, path)
    try:
        config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    except StrictDataclassError as error:
        raise _wrong_type(str(error), content, path) from error
    except Exception as error:  # whatever transformers raises, it read nothing but this file
        raise _unusable(path, error) from error
    _refuse(_ranges(config), content, path)
    return cast(PreTrainedConfig, config)


def build_empty(config: PreTrainedConfig, outline: Outline | None, path: Path) -> PreTrainedModel:
    """The model of a configuration that was read from a file, without weights (on the meta device).

    Args:
        config: what [`read_config`][edgemin.encoder.config_file.read_config] gave.
        outline: of an EdgeMIN artifact, what wins over the configuration.
        path: of the `config.json`, for the message.

    Raises:
        UserError: none can be built, or it is too large for this machine.
    """
    if outline is None:  # else each layer has heads of its own
        _refuse(_attention(config), config.to_dict(), path)
    try:
        with torch.device("meta"):
            model = build(config, outline)
    except UserError:
        raise
    except Exception as error:  # what is wrong beyond the fields that were looked at
        raise _unusable(path, error) from error
    check_size(model)
    return model


def check_size(model: PreTrainedModel) -> None:
    """Refuse a model whose weights alone need more than the memory there is.

    Args:
        model: May be on the meta device.

    Raises:
        UserError: the message names no key, as several can cause this.
    """
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    memory = psutil.virtual_memory().total
    if needed > memory:
        raise UserError(
            f"expected weights that fit into this machine's memory of {memory / 2**30:.1f} GiB, given a shape of "
            f"{needed / 2**30:.1f} GiB"
        )


def _refuse(rules: Iterator[Rule], content: Mapping[str, Any], path: Path) -> None:
    for key, holds, expected in rules:
        if not holds:
            raise _refusal(key, path, expected, content.get(key))


def _refusal(key: str, path: Path, expected: str, given: Any) -> UserError:
    return UserError(f"{key} in {path}: expected {expected}, given {str(given)[:80]!r}")


def _names(content: Mapping[str, Any]) -> Iterator[Rule]:
    """Rules for names, which transformers does not check."""
    names = content.get("architectures")
    texts = names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))
    yield "architectures", texts, "a list of names"
    labels = content.get("id2label")
    if labels is not None:
        numbers = {str(index) for index in range(len(labels))} if isinstance(labels, dict) else None
        yield "id2label", numbers is not None and set(labels) == numbers, "names numbered from 0"
        named = all(isinstance(name, str) and name.isprintable() for name in labels.values())
        yield "id2label", named and bool(labels), "printable names"


def _ranges(config: PreTrainedConfig) -> Iterator[Rule]:
    family = table(config)
    names = _LARGEST_NAMES | {family.ffn_key: "intermediate"}
    if family.embedding_key is not None:
        names[family.embedding_key] = "hidden"
    for name, bound in names.items():
        key, value = config.attribute_map.get(name, name), getattr(config, name, None)
        if value is not None:
            yield key, 1 <= value <= LARGEST[bound], f"a whole number from 1 to {LARGEST[bound]}"
    padding = config.pad_token_id
    inside = 0 <= padding < config.vocab_size if padding is not None else not family.positions_follow_padding
    yield "pad_token_id", inside, f"one of the {config.vocab_size} tokens"
    for key in ("is_decoder", "output_attentions", "output_hidden_states"):
        yield key, not getattr(config, key, False), "false, a plain encoder"
    yield "quantization_config", getattr(config, "quantization_config", None) is None, "weights that are not quantized"
    absolute = getattr(config, "position_embedding_type", None) in (None, "absolute")
    yield "position_embedding_type", absolute, "absolute"
    # splits a sentence's tokens into equal parts, and so fails on most lengths
    yield "chunk_size_feed_forward", not getattr(config, "chunk_size_feed_forward", 0), "0"
    for key, value in vars(config).items():
        if key in _ACTIVATIONS:
            yield key, value in ACT2FN, "an activation that transformers knows"
        elif "dropout" in key and isinstance(value, int | float):
            yield key, 0 <= value <= 1, "a number in [0, 1]"
        elif key.endswith("_eps"):
            yield key, 0 < value < math.inf, "a number above 0"
        elif key == "initializer_range":
            yield key, 0 <= value < math.inf, "a number of at least 0"


def _attention(config: PreTrainedConfig) -> Iterator[Rule]:
    width = config.true_hidden_size if table(config).bottleneck is not None else config.hidden_size
    key = config.attribute_map.get("num_attention_heads", "num_attention_heads")
    yield key, width % config.num_attention_heads == 0, f"a divisor of the width {width} that the heads share"


def _wrong_type(found: str, content: Mapping[str, Any], path: Path) -> UserError:
    """The error for a field of a wrong type, from transformers' message, which has two forms."""
    field = re.search(r"[Ff]ield '([^']*)'", found)
    types = re.findall(r"expected (\w+), got", found)
    if field is None or not types:
        return UserError(f"{path}: {' '.join(found.split())[:200]}")
    expected = " or ".join(_WORDS.get(name, name) for name in types)
    return _refusal(field[1], path, expected, content.get(field[1]))


def _unusable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"no model can be built from {path} ({type(error).__name__}: {reason})")
