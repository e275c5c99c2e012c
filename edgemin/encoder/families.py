"""Where each Hugging Face family keeps its parts: one table of attribute paths per family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from transformers import PreTrainedConfig, PreTrainedModel

from edgemin.errors import UserError

# Larger than any encoder; more of either is a typing error that would take minutes or all memory to build.
LARGEST = {
    "layers": 1_000,
    "hidden": 65_536,
    "heads": 65_536,
    "intermediate": 262_144,
    "vocabulary": 10_000_000,
    "positions": 10_000_000,
}


@dataclass(frozen=True)
class Family:
    """Paths of one family's parts, first those from the model, then those from one of its layers."""

    name: str
    model_types: tuple[str, ...]

    layers: str
    words: str
    positions: str | None
    token_types: str | None
    embedding_norm: str
    projection: str | None  # from the embedding's width to the hidden size, where a model has one
    final_norm: str | None
    head: tuple[str, ...]  # the Linears of pooler and classifier, in the order they run
    head_norms: tuple[str, ...]
    head_prefixes: tuple[str, ...]

    attention: str  # the module that holds the head size
    projections: tuple[str, ...]  # query, key, value; or one Linear that holds all three one after the other
    output: str
    ffn_in: str
    ffn_out: str
    norms: tuple[str, ...]
    attention_norm: str | None  # the norm in front of attention, which the first layer may lack

    head_size: str  # attributes of the attention module
    head_count: str | None
    inner_width: str | None
    ffn_key: str  # configuration keys that have no common name
    embedding_key: str | None
    gated: bool = False
    rotary: bool = False
    positions_follow_padding: bool = False  # the first position is padding_idx + 1
    bottleneck: str | None = None  # what narrows the hidden state for a layer; a model may have none
    stacked: str | None = None  # feed-forward networks in front of the last one, their parts at its paths
    pooler_key: str | None = None  # configuration key that says whether the pooler has a Linear

    @property
    def classifier(self) -> str:
        """Path of the final Linear."""
        return self.head[-1]


def _bert_like(name: str, model_types: tuple[str, ...], *, head: tuple[str, ...], prefixes: tuple[str, ...]) -> Family:
    return Family(
        name=name,
        model_types=model_types,
        layers=f"{name}.encoder.layer",
        words=f"{name}.embeddings.word_embeddings",
        positions=f"{name}.embeddings.position_embeddings",
        token_types=f"{name}.embeddings.token_type_embeddings",
        embedding_norm=f"{name}.embeddings.LayerNorm",
        projection="electra.embeddings_project" if name == "electra" else None,
        final_norm=None,
        head=head,
        head_norms=(),
        head_prefixes=prefixes,
        attention="attention.self",
        projections=("attention.self.query", "attention.self.key", "attention.self.value"),
        output="attention.output.dense",
        ffn_in="intermediate.dense",
        ffn_out="output.dense",
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        attention_norm=None,
        head_size="attention_head_size",
        head_count="num_attention_heads",
        inner_width="all_head_size",
        ffn_key="intermediate_size",
        embedding_key="embedding_size" if name == "electra" else None,
        positions_follow_padding=name == "roberta",
    )


_DENSE_HEAD = ("classifier.dense", "classifier.out_proj")

FAMILIES = (
    _bert_like("bert", ("bert",), head=("bert.pooler.dense", "classifier"), prefixes=("bert.pooler", "classifier")),
    _bert_like("electra", ("electra",), head=_DENSE_HEAD, prefixes=("classifier",)),
    Family(
        name="distilbert",
        model_types=("distilbert",),
        layers="distilbert.transformer.layer",
        words="distilbert.embeddings.word_embeddings",
        positions="distilbert.embeddings.position_embeddings",
        token_types=None,
        embedding_norm="distilbert.embeddings.LayerNorm",
        projection=None,
        final_norm=None,
        head=("pre_classifier", "classifier"),
        head_norms=(),
        head_prefixes=("pre_classifier", "classifier"),
        attention="attention",
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        output="attention.out_lin",
        ffn_in="ffn.lin1",
        ffn_out="ffn.lin2",
        norms=("sa_layer_norm", "output_layer_norm"),
        attention_norm=None,
        head_size="attention_head_size",
        head_count="n_heads",
        inner_width="dim",
        ffn_key="hidden_dim",
        embedding_key=None,
    ),
    _bert_like("roberta", ("roberta", "xlm-roberta"), head=_DENSE_HEAD, prefixes=("classifier",)),
    Family(
        name="modernbert",
        model_types=("modernbert",),
        layers="model.layers",
        words="model.embeddings.tok_embeddings",
        positions=None,
        token_types=None,
        embedding_norm="model.embeddings.norm",
        projection=None,
        final_norm="model.final_norm",
        head=("head.dense", "classifier"),
        head_norms=("head.norm",),
        head_prefixes=("head", "classifier"),
        attention="attn",
        projections=("attn.Wqkv",),
        output="attn.Wo",
        ffn_in="mlp.Wi",
        ffn_out="mlp.Wo",
        norms=("attn_norm", "mlp_norm"),
        attention_norm="attn_norm",
        head_size="head_dim",
        head_count=None,
        inner_width=None,
        ffn_key="intermediate_size",
        embedding_key=None,
        gated=True,
        rotary=True,
    ),
    replace(
        _bert_like(
            "mobilebert",
            ("mobilebert",),
            head=("mobilebert.pooler.dense", "classifier"),
            prefixes=("mobilebert.pooler", "classifier"),
        ),
        projection="mobilebert.embeddings.embedding_transformation",
        embedding_key="embedding_size",
        bottleneck="bottleneck",
        stacked="ffn",
        pooler_key="classifier_activation",
    ),
)

BY_NAME = {family.name: family for family in FAMILIES}


def table(model_or_config: PreTrainedModel | PreTrainedConfig) -> Family:
    """The table of a model's or configuration's family.

    Raises:
        UserError: the architecture is none of those EdgeMIN knows, or the model is no sequence classifier.
    """
    is_model = isinstance(model_or_config, PreTrainedModel)
    config = cast(PreTrainedConfig, model_or_config.config if is_model else model_or_config)
    for family in FAMILIES:
        if config.model_type in family.model_types:
            if is_model and not type(model_or_config).__name__.endswith("ForSequenceClassification"):
                raise UserError(
                    "model: expected a sequence classification model, given "
                    f"{type(model_or_config).__name__} of {config.model_type}"
                )
            return family
    known = ", ".join(model_type for family in FAMILIES for model_type in family.model_types)
    raise UserError(
        f"model: expected an encoder of {known} (MiniLM checkpoints count as bert), given {config.model_type}"
    )


def family(model_or_config: PreTrainedModel | PreTrainedConfig) -> str:
    """Name of the family: bert (MiniLM too), electra, distilbert, roberta (XLM-R too), modernbert or mobilebert.

    Raises:
        UserError: the architecture is none of these, or the model is no sequence classifier.
    """
    return table(model_or_config).name


def check_ffn(family: str, networks: int) -> None:
    """Refuse to cut FFN units of layers that stack several feed-forward networks (MobileBERT)."""
    if networks > 1:
        raise UserError(
            f"ffn: cannot be cut for {family}, whose layers stack {networks} feed-forward networks, so that a unit's "
            "number does not say which of them it is in"
        )


def check_hidden(family: str, hidden: int) -> None:
    """Refuse to cut the hidden size of a family whose layers have a width of their own (MobileBERT)."""
    if BY_NAME[family].bottleneck is not None:
        raise UserError(
            f"hidden: cannot be cut for {family}, whose feature maps of {hidden} units are tied by bottlenecks to "
            "another width inside the layers"
        )
