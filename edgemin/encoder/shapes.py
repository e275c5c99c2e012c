"""A configuration from a shape alone, for encoders that begin at random."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from edgemin.encoder.families import FAMILIES
from edgemin.errors import UserError


def configure(
    family: str, *, layers: int, hidden: int, heads: int, intermediate: int, vocabulary: int, padding_id: int = 0
) -> PretrainedConfig:
    """A family's configuration with these widths, all else as Hugging Face has it.

    Args:
        family: ``bert``, ``electra``, ``distilbert``, ``roberta`` or ``modernbert``.
        layers: transformer layers.
        hidden: H.
        heads: attention heads of each layer; a divisor of ``hidden``.
        intermediate: FFN units of each layer.
        vocabulary: rows of the word embedding.
        padding_id: the tokenizer's padding token.

    Raises:
        UserError: an unknown family, a width below 1, or heads that do not divide the hidden size.
    """
    table = next((known for known in FAMILIES if known.name == family), None)
    if table is None:
        raise UserError(f"family: expected one of {', '.join(known.name for known in FAMILIES)}, given {family!r}")
    widths = {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "intermediate": intermediate,
        "vocabulary": vocabulary,
    }
    for name, value in widths.items():
        if value < 1:
            raise UserError(f"{name}: expected a whole number of at least 1, given {value}")
    if hidden % heads:
        raise UserError(f"heads: expected a divisor of the hidden size {hidden}, given {heads}")
    settings: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        table.ffn_key: intermediate,
        "vocab_size": vocabulary,
        "pad_token_id": padding_id,
    }
    if table.embedding_key is not None:
        settings[table.embedding_key] = hidden
    if table.rotary:  # the defaults are ids of its own large vocabulary
        settings |= {"bos_token_id": None, "eos_token_id": None, "cls_token_id": None, "sep_token_id": None}
    return AutoConfig.for_model(table.model_types[0], **settings)
