"""A configuration from a shape alone, for encoders that begin at random."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from edgemin.encoder.families import BY_NAME, LARGEST
from edgemin.errors import UserError


def configure(
    family: str, *, layers: int, hidden: int, heads: int, intermediate: int, vocabulary: int, padding_id: int = 0
) -> PretrainedConfig:
    """A family's configuration with these widths, all else as Hugging Face has it.

    Args:
        family: `bert`, `electra`, `distilbert`, `roberta`, `modernbert` or `mobilebert`.
        layers: transformer layers.
        hidden: H. Of MobileBERT the width of the feature maps between layers; its bottlenecks, in which attention
            and feed-forward networks work, and its word embeddings are a quarter of it, as the published ones
            (512, 128, 128).
        heads: attention heads of each layer; a divisor of `hidden`, of MobileBERT of its quarter.
        intermediate: FFN units of each layer; of MobileBERT of each of the four networks a layer stacks.
        vocabulary: rows of the word embedding.
        padding_id: the tokenizer's padding token.

    Raises:
        UserError: an unknown family, a width below 1 or beyond `families.LARGEST`, or heads that do not divide the
            width they share.
    """
    table = BY_NAME.get(family)
    if table is None:
        raise UserError(f"family: expected one of {', '.join(BY_NAME)}, given {family!r}")
    widths = {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "intermediate": intermediate,
        "vocabulary": vocabulary,
    }
    for name, value in widths.items():
        if not 1 <= value <= LARGEST[name]:
            raise UserError(f"{name}: expected a whole number from 1 to {LARGEST[name]}, given {value}")
    bottleneck = hidden // 4 if table.bottleneck is not None else None
    if bottleneck is not None and hidden % 4:
        raise UserError(f"hidden: expected a multiple of 4, of which a quarter is the bottleneck, given {hidden}")
    if bottleneck is not None and bottleneck % heads:
        raise UserError(f"heads: expected a divisor of the bottleneck {bottleneck}, a quarter of hidden, given {heads}")
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
        settings[table.embedding_key] = bottleneck or hidden
    if bottleneck is not None:
        settings["intra_bottleneck_size"] = bottleneck
    if table.rotary:  # the defaults are ids of its own large vocabulary
        settings |= {"bos_token_id": None, "eos_token_id": None, "cls_token_id": None, "sep_token_id": None}
    return AutoConfig.for_model(table.model_types[0], **settings)
