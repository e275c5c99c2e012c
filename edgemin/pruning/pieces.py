"""A tokenizer with fewer pieces: which must stay whatever a text needs, and its file rewritten for those that do.

Works on the content of `tokenizer.json` as `tokenizers` writes it, for all of its models: WordPiece, BPE, Unigram and
WordLevel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizerBase

from edgemin import artifact
from edgemin.errors import UserError

_FILE = "tokenizer.json"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # the name of a piece that stands for one byte of what no other piece covers
_SPACE = "▁"  # stands for the space in front of a word
_OF_A_CALL = ("padding", "truncation")  # set by the tokenizer's last call, not part of what it is


def kept(tokenizer: PreTrainedTokenizerBase, used: Iterable[int]) -> list[int]:
    """The ids of the pieces that stay, in ascending order.

    Besides the used ones these are added and special tokens, the unknown token, every piece of one character (in
    WordPiece `c` and `##c`), so that a word that lost its piece is put together of smaller ones, and in BPE all pieces
    that a kept one is merged from. A text whose pieces all stay is cut as before.

    Args:
        tokenizer: a fast one; left as it was.
        used: the ids of the pieces that texts use.
    """
    content = _content(tokenizer)
    model, ids = content["model"], _ids(content["model"])
    stay = {*used, *(token["id"] for token in content["added_tokens"]), *tokenizer.all_special_ids}
    stay |= {index for piece, index in ids.items() if len(_bare(piece, model)) <= 1 or _BYTE.fullmatch(piece)}
    if model.get("unk_id") is not None:
        stay.add(model["unk_id"])
    elif model.get("unk_token") in ids:
        stay.add(ids[model["unk_token"]])

    def add(index: int) -> int:
        stay.add(index)
        return index

    _renumber(content["post_processor"], add)
    return sorted(_with_ancestors(stay, ids, model) if model["type"] == "BPE" else stay)


def shrunk(tokenizer: PreTrainedTokenizerBase, keep: Sequence[int]) -> PreTrainedTokenizerBase:
    """A tokenizer of these pieces alone: that of id `keep[i]` gets the id i.

    Args:
        tokenizer: a fast one; left as it was.
        keep: what `kept` gave.

    Raises:
        UserError: a kind of tokenizer that is not made of its tokenizer.json alone.
    """
    content = _content(tokenizer)
    new = {old: index for index, old in enumerate(keep)}
    model = content["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        model["vocab"] = {piece: new[index] for piece, index in model["vocab"].items() if index in new}
    if model["type"] == "BPE":
        model["merges"] = [
            pair for pair in model["merges"] if all(piece in model["vocab"] for piece in (*pair, _merged(pair, model)))
        ]
    for token in content["added_tokens"]:
        token["id"] = new[token["id"]]
    _renumber(content["post_processor"], new.__getitem__)
    if content["padding"] is not None:
        content["padding"]["pad_id"] = new[content["padding"]["pad_id"]]
    with TemporaryDirectory() as directory:  # as an artifact is written and read
        tokenizer.save_pretrained(directory)
        (Path(directory) / _FILE).write_text(json.dumps(content, ensure_ascii=False))
        made = artifact.read_tokenizer(Path(directory))
    assert made is not None
    if _without_call(_content(made)) != _without_call(content):
        raise UserError(
            f"tokenizer: expected one that its {_FILE} describes whole, given a {type(tokenizer).__name__} that is "
            "made of other files too"
        )
    return made


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def _without_call(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _OF_A_CALL}


def _ids(model: dict[str, Any]) -> dict[str, int]:
    """The pieces of a model with their ids; added tokens may have further ones."""
    if model["type"] == "Unigram":
        return {piece: index for index, (piece, _) in enumerate(model["vocab"])}
    found: dict[str, int] = model["vocab"]
    return found


def _bare(piece: str, model: dict[str, Any]) -> str:
    """The characters of a piece without what marks its place in a word."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    return piece.removeprefix(prefix).removesuffix(suffix).removeprefix(_SPACE)


def _merged(pair: Sequence[str], model: dict[str, Any]) -> str:
    first, second = pair
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _with_ancestors(stay: Collection[int], ids: dict[str, int], model: dict[str, Any]) -> set[int]:
    """With every piece also those that it is merged from, by each of the merges that give it."""
    parents: dict[int, list[int]] = {}
    for pair in model["merges"]:
        parents.setdefault(ids[_merged(pair, model)], []).extend(ids[piece] for piece in pair)
    found, open_ = set[int](), list(stay)
    while open_:
        index = open_.pop()
        if index not in found:
            found.add(index)
            open_ += parents.get(index, ())
    return found


def _renumber(processor: Any, number: Callable[[int], int]) -> None:
    """Give the tokens that a post-processor adds the ids that `number` says, in place."""
    kind = processor["type"] if processor is not None else None
    if kind == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [number(index) for index in token["ids"]]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        for side in ("sep", "cls"):
            processor[side][1] = number(processor[side][1])
    elif kind == "Sequence":
        for part in processor["processors"]:
            _renumber(part, number)
