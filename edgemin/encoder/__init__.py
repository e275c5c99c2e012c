"""The encoder: the only place that knows Hugging Face attribute names.

Models are Hugging Face ``*ForSequenceClassification`` instances of the families bert (MiniLM too), electra,
distilbert, roberta (XLM-R too), modernbert and mobilebert. Layers, heads and units are counted from 0 here.
"""

from __future__ import annotations

from edgemin.encoder.building import attach_head, build, max_tokens, silence_padding, structure
from edgemin.encoder.config_file import build_empty, check_size, read_config
from edgemin.encoder.families import family
from edgemin.encoder.parts import (
    Matrix,
    classifier_prefix,
    head_parts,
    head_prefixes,
    heads,
    in_layers,
    label_names,
    matrices,
    num_layers,
    parameters_by_depth,
)
from edgemin.encoder.shapes import LARGEST, configure
from edgemin.encoder.slicing import (
    slice_ffn,
    slice_head_size,
    slice_heads,
    slice_hidden,
    slice_layers,
    slice_vocabulary,
    slice_weight,
)
from edgemin.encoder.structure_file import read_structure
from edgemin.encoder.taps import Projections, Reading, changed_input, head_contexts, logits, read
from edgemin.encoder.truncation import Truncation, truncate, with_fresh_layers

__all__ = [
    "LARGEST",
    "Matrix",
    "Projections",
    "Reading",
    "Truncation",
    "attach_head",
    "build",
    "build_empty",
    "changed_input",
    "check_size",
    "classifier_prefix",
    "configure",
    "family",
    "head_contexts",
    "head_parts",
    "head_prefixes",
    "heads",
    "in_layers",
    "label_names",
    "logits",
    "matrices",
    "max_tokens",
    "num_layers",
    "parameters_by_depth",
    "read",
    "read_config",
    "read_structure",
    "silence_padding",
    "slice_ffn",
    "slice_head_size",
    "slice_heads",
    "slice_hidden",
    "slice_layers",
    "slice_vocabulary",
    "slice_weight",
    "structure",
    "truncate",
    "with_fresh_layers",
]
