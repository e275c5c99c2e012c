"""Where the paths of a study start: its named models, read as far as planning needs them."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from edgemin import artifact, checkpoint
from edgemin.checkpoint import Facts
from edgemin.data.splits import Splits
from edgemin.encoder.outline import Outline
from edgemin.encoder.quantized import is_trainable
from edgemin.errors import UserError
from edgemin.store.content import digest, file_digest
from edgemin.study import roots
from edgemin.study.roots import Root
from edgemin.tasks.base import listed

log = logging.getLogger(__name__)

_PROBE = 256  # training texts that tokenizers are tried on; the student's and the teacher's must agree on them
_UNKNOWN = 0.1  # share of unknown words from which on a tokenizer is suspected to be another model's
SOURCE = ".source"  # after a model's name: its weights as they came


@dataclass(frozen=True, eq=False)
class Start:
    """A named model, with what planning had to read of it.

    Attributes:
        name: `teacher`, `student`, or what the study calls it (`assistant`).
        root: its settings.
        config: of its checkpoint, of the model it is cut from, or of its random weights.
        facts: of its checkpoint; `None` for any other start.
        tokenizer: `None` only without data.
        outline: of the model that starts here.
        own_labels: its checkpoint's head already speaks the task's labels.
        origin: the model of the study that it is cut from, if any.
        from_trained: it is cut from the end of that model's own path, not from its weights as they came.
        latent: it is quantized, and is trained on from the latent weights beside its checkpoint, an artifact.
    """

    name: str
    root: Root
    config: PretrainedConfig
    facts: Facts | None
    tokenizer: PreTrainedTokenizerBase | None
    outline: Outline
    own_labels: bool
    origin: str | None = None
    from_trained: bool = False
    latent: bool = False

    def cut_from(self, source: Outline) -> Outline:
        """The outline of the model that starts here, if the one it is cut from was changed by stages of its own.

        Args:
            source: the outline of the model that it is cut from, after those stages.

        Raises:
            UserError: the source cannot be cut as the settings ask.
        """
        own = self.outline
        rows, source = source.vocabulary, replace(source, vocabulary=source.vocabulary or own.vocabulary)
        if not source.is_known:  # nor is what is left of it
            assert source.labels is not None
            unknown = [None] * len(self.outline.layers)
            heads, ffn = (any(getattr(layer, key) is None for layer in source.layers) for key in ("heads", "ffn"))
            found = self.outline.with_labels(source.labels)
            found = found.with_heads(unknown) if heads else found
            found = found.with_ffn(unknown) if ffn else found
        else:
            try:
                found = roots.outline(self.config, source, self.root)
            except UserError as error:
                raise UserError(f"{self.name}.{error}") from error
        found = replace(found, quantized=source.quantized, vocabulary=rows)
        return replace(found, max_tokens=own.max_tokens, tokenizer=own.tokenizer)

    def content(self, splits: Splits | None, parent_key: str | None) -> dict[str, Any]:
        """All that decides the model that starts here, of which its key is made: contents, never paths."""
        content: dict[str, Any] = {"root": roots.describe(self.root)}
        if parent_key is not None:
            content["parent"] = parent_key
        elif self.facts is not None:
            content["files"] = checkpoint.fingerprint(self.facts.directory)
            if self.latent:
                content["latent"] = file_digest(self.facts.directory / artifact.TRAINING_STATE)
        else:
            content |= {"family": self.outline.family, "vocabulary": self.config.vocab_size}
        content["tokenizer"] = self.outline.tokenizer
        content["inputs"] = list(self.tokenizer.model_input_names) if self.tokenizer is not None else None
        if self.own_labels and splits is not None:
            content |= {"labels": list(splits.labels), "problem_type": splits.kind.problem_type}
        if self.facts is not None and self.facts.draws_head:
            content["seed"] = self.root.seed
        return content


def read_starts(named: Mapping[str, Root], splits: Splits | None) -> dict[str, Start]:
    """Find checkpoint and tokenizer of every named model; a model that is cut from another comes after that one.

    Raises:
        UserError: a checkpoint or tokenizer that cannot be had, or settings that contradict each other.
    """
    starts: dict[str, Start] = {}

    def read(name: str, asking: tuple[str, ...]) -> Start:
        if name in asking:
            chain = " from ".join([*asking[asking.index(name) :], name])
            raise UserError(f"{name}.source: expected models that do not start from one another, given {chain}")
        if name not in starts:
            origin = _origin(named[name].source, named)
            source = read(origin, (*asking, name)) if origin is not None else None
            teacher = source or (read("teacher", (*asking, name)) if name != "teacher" else None)
            starts[name] = _read(name, named[name], source, teacher, splits)
        return starts[name]

    for name in named:
        read(name, ())
    return starts


def _origin(source: str | None, named: Mapping[str, Root]) -> str | None:
    """The model of the study that a source names, if any: `teacher` for both `teacher` and `teacher.source`."""
    name = source.removesuffix(SOURCE) if source is not None else None
    return name if name in named else None


def _read(name: str, root: Root, origin: Start | None, teacher: Start | None, splits: Splits | None) -> Start:
    if name == "student" and root.stages:
        raise UserError(f"student.stages: expected none (the key stages has them), given {list(root.stages)}")
    facts, config, source = None, None, None
    if origin is not None:
        if origin.facts is None and origin.origin is None and root.source == f"{origin.name}{SOURCE}":
            raise UserError(
                f"{name}.source: expected a model with weights, given {root.source} while that starts at random"
            )
        config, source = origin.config, origin.outline
    elif root.source is not None:
        facts = checkpoint.read_facts(root.source, f"{name}.source")
        config, source = facts.config, facts.outline
    tokenizer = _tokenizer(name, root, origin, teacher, splits)
    if tokenizer is None and splits is not None:
        raise UserError(f"{name}.tokenizer: expected a Hub id, a directory or toy, as there is no source, given null")
    try:
        if config is None:
            config = _random_config(root, teacher, tokenizer)
        outline = _outline(config, source, root, tokenizer)
    except UserError as error:
        raise UserError(f"{name}.{error}") from error
    _check_tokenizer(name, root, outline, tokenizer, splits)
    if tokenizer is not None and splits is not None and tokenizer is not getattr(origin or teacher, "tokenizer", None):
        _check_words(name, tokenizer, splits)
    own = (
        root.inherit == "all"  # else its head is fresh
        and facts is not None
        and facts.labels is not None
        and splits is not None
        and splits.kind.takes_head(facts.config.problem_type)
        and checkpoint.head_order(facts.labels, splits.labels) is not None
    )
    if root.inherit == "all" and facts is not None and facts.labels and splits is not None and not own:
        log.warning(
            "%s: its head has labels that are not the task's, %s: a new one is drawn", name, listed(facts.labels)
        )
    return Start(
        name,
        root,
        config,
        facts,
        tokenizer,
        outline,
        own,
        origin.name if origin is not None else None,
        origin is not None and root.source == origin.name,
        _latent(name, root, facts, outline),
    )


def _latent(name: str, root: Root, facts: Facts | None, outline: Outline) -> bool:
    """Whether a model that starts at an artifact goes on from the latent weights there."""
    quantized = outline.quantized is not None and is_trainable(outline.provider)
    there = quantized and facts is not None and artifact.has_latents(facts.directory)
    if root.latent is True and not there:
        raise UserError(
            f"{name}.latent: expected auto or false, as no latent weights lie beside the source ({root.source}), "
            "given true"
        )
    return there and root.latent is not False


def _outline(
    config: PretrainedConfig, source: Outline | None, root: Root, tokenizer: PreTrainedTokenizerBase | None
) -> Outline:
    """What a root becomes of its source, and the tokens that it reads."""
    outline = roots.outline(config, source, root)
    longest = outline.max_tokens
    if source is not None:
        as_it_was = replace(source, quantized=None, max_tokens=longest, tokenizer=None)
        if not is_trainable(source.provider) and (root.inherit != "all" or outline != as_it_was):
            raise UserError(f"source: expected weights that can be cut, given {root.source}, which is quantized")
        outline = replace(outline, quantized=source.quantized)
    if tokenizer is None or longest is None:
        return outline
    shorter = min(longest, tokenizer.model_max_length)
    return replace(outline, max_tokens=shorter, tokenizer=_tokenizer_digest(tokenizer))


def _tokenizer(
    name: str, root: Root, origin: Start | None, teacher: Start | None, splits: Splits | None
) -> PreTrainedTokenizerBase | None:
    source = root.tokenizer or (root.source if origin is None else None)
    if source is not None:
        if splits is None and root.tokenizer is None and not checkpoint.has_tokenizer(checkpoint.find(source, name)):
            return None  # nothing is read
        return checkpoint.read_tokenizer(source, f"{name}.tokenizer")
    giver = origin or teacher
    return giver.tokenizer if giver is not None else None


def _random_config(root: Root, teacher: Start | None, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
    family = root.family or (teacher.outline.family if teacher is not None else None)
    if family is None:
        raise UserError("family: expected a family, as there is no source to take it from, given null")
    if tokenizer is None and root.vocabulary is None:
        raise UserError("vocabulary: expected a whole number, as there is no tokenizer to take it from, given null")
    padding = tokenizer.pad_token_id if tokenizer is not None else None
    return roots.random_config(root, family, len(tokenizer) if tokenizer is not None else 1, padding or 0)


def _check_tokenizer(
    name: str, root: Root, outline: Outline, tokenizer: PreTrainedTokenizerBase | None, splits: Splits | None
) -> None:
    if tokenizer is None or splits is None:
        return
    assert outline.vocabulary is not None, "only a stage leaves it open"
    rows, tokens = outline.vocabulary, max(tokenizer.get_vocab().values()) + 1
    if tokens > rows:
        raise UserError(
            f"{name}.tokenizer: expected at most the {rows} tokens the weights embed, given one of {tokens}"
        )
    if root.source is not None and 2 * tokens < rows:
        log.warning(
            "%s: its tokenizer has %d tokens and its weights embed %d: check that they belong together",
            *(name, tokens, rows),
        )
    limit, asked = outline.max_tokens, splits.task.max_length
    if limit is not None and asked > limit:
        raise UserError(f"task.max_length: expected at most {limit}, what the {name} takes, given {asked}")


def _check_words(name: str, tokenizer: PreTrainedTokenizerBase, splits: Splits) -> None:
    """Refuse a tokenizer that knows no word of the training texts; warn of one that knows few."""
    tried = splits.train.texts[:_PROBE]
    texts = [text for pair in tried for text in pair]
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    tokens = [token for encoding in encodings for token in encoding.ids]
    unknown = tokens.count(tokenizer.unk_token_id)
    if unknown == len(tokens):
        raise UserError(
            f"{name}.tokenizer: expected one that knows words of {splits.task.name}, given one to which all words of "
            f"its first {len(tried)} training examples are unknown"
        )
    if unknown > _UNKNOWN * len(tokens):
        log.warning("%s: to its tokenizer %.0f %% of the words are unknown", name, 100 * unknown / len(tokens))
    if tokenizer.num_special_tokens_to_add() == 0:
        log.warning("%s: its tokenizer adds no special tokens, so that the head reads the first word alone", name)


def check_same_tokens(stage: str, student: Start, teacher: Start, splits: Splits | None) -> None:
    """Refuse a teacher whose tokenizer, another than the student's, cuts the training texts otherwise.

    Raises:
        UserError: vocabularies or tokens differ.
    """
    mine, theirs = student.tokenizer, teacher.tokenizer
    if mine is None or theirs is None:
        return
    # Others may still cut these texts alike; where there are none (a corpus), nobody knows.
    texts = [text for pair in splits.train.texts[:_PROBE] for text in pair] if splits is not None else []
    if not texts or mine.get_vocab() != theirs.get_vocab() or _tokens(mine, texts) != _tokens(theirs, texts):
        raise UserError(
            f"{stage}.teacher: expected a teacher with the student's tokenizer, as it is compared token by token, "
            f"given {teacher.root.name} and {student.root.name}, whose tokens differ"
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Any:
    """By a copy: a call sets padding and truncation, and all jobs share the tokenizer."""
    return copy.deepcopy(tokenizer)(list(texts))["input_ids"]


@lru_cache(maxsize=16)  # of the objects that checkpoint.read_tokenizer gives to all jobs alike
def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides a tokenizer's tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content |= {"padding": None, "truncation": None}  # which are left over from its last call
    else:
        content = {"vocabulary": tokenizer.get_vocab()}
    content |= {"pad": tokenizer.pad_token_id}
    return digest(json.dumps(content, sort_keys=True))
