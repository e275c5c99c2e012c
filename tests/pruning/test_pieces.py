"""A tokenizer with fewer pieces cuts what lost none as before, and the rest into smaller pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, RobertaTokenizer

from edgemin import artifact, toy
from edgemin.errors import UserError
from edgemin.pruning import pieces

WORDS = "good goodness badness films filmed filming boring bored wonderful wonders unseen seeing a the film was"
TEXTS = [" ".join(WORDS.split()[start : start + 4]) for start in range(0, 16, 2)] * 3
SEEN = ["the film was good", "a boring film", "bored seeing wonders"]
UNSEEN = ["goodness the film was wonderful", "unseen badness", "filming films filmed"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
KINDS = ("wordpiece", "bpe", "char-bpe", "unigram", "words")


def made(kind: str) -> PreTrainedTokenizerBase:
    """A tokenizer of a few dozen pieces, as BERT, RoBERTa or XLM-R have them."""
    trainer: Any = None
    if kind == "words":
        return toy.tokenizer()
    if kind == "wordpiece":
        backend, special = Tokenizer(models.WordPiece(unk_token="[UNK]")), BERT
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    elif kind == "unigram":
        whole = [(f"▁{word}", -2.0) for word in WORDS.split()]
        single = [(character, -9.0) for character in ["▁", *sorted({*WORDS} - {" "})]]
        vocabulary = [*((name, 0.0) for name in ROBERTA), *whole, *single]
        backend, special = Tokenizer(models.Unigram(vocabulary, unk_id=3)), ROBERTA
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.add_special_tokens(ROBERTA)
    else:
        marked = {"continuing_subword_prefix": "##"} if kind == "char-bpe" else {}
        backend, special = Tokenizer(models.BPE(unk_token="<unk>" if marked else None, **marked)), ROBERTA
        backend.pre_tokenizer = pre_tokenizers.Whitespace() if marked else pre_tokenizers.ByteLevel()
        alphabet = [] if marked else pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=80 if marked else 320,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
            **marked,
        )
    if trainer is not None:
        backend.train_from_iterator(TEXTS, trainer)
    first, last = ("[CLS]", "[SEP]") if special is BERT else ("<s>", "</s>")
    ids = [(name, backend.token_to_id(name)) for name in (last, first)]
    if kind == "bpe":
        backend.post_processor = processors.Sequence([processors.RobertaProcessing(*ids)])
    elif kind == "char-bpe":
        backend.post_processor = processors.BertProcessing(*ids)
    else:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}", pair=f"{first} $A {last} $B {last}", special_tokens=ids
        )
    backend.add_tokens([AddedToken("###")])  # beyond the table, and no special one
    names = {"pad_token": special[1] if special is ROBERTA else special[0], "cls_token": first, "sep_token": last}
    unknown = "[UNK]" if special is BERT else "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, model_max_length=64, **names)


def used(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> set[int]:
    return {index for text in texts for index in tokenizer(text)["input_ids"]}


def pruned(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[list[int], PreTrainedTokenizerBase]:
    keep = pieces.kept(tokenizer, used(tokenizer, texts))
    return keep, pieces.shrunk(tokenizer, keep)


@pytest.mark.parametrize("kind", KINDS)
def test_what_lost_no_piece_is_cut_as_before_and_the_rest_into_smaller_pieces(kind: str) -> None:
    before = made(kind)
    content = before.backend_tokenizer.to_str()
    seen = SEEN if kind != "words" else ["the plot was good"]
    keep, after = pruned(before, seen)
    assert len(keep) == len(after) < len(before)
    lost = 0
    for text in [*seen, *UNSEEN, "the plot was dull", "###", "good film !"]:
        old, new = before(text)["input_ids"], after(text)["input_ids"]
        if set(old) <= set(keep):
            assert [keep[index] for index in new] == old, text
            continue
        lost += 1
        assert len(new) > len(old) or kind == "words"
        if kind != "words":
            assert after.unk_token_id not in new
            assert "".join(after.tokenize(text)).replace("##", "") == "".join(before.tokenize(text)).replace("##", "")
        else:
            assert after.unk_token_id in new
    assert lost
    assert before.backend_tokenizer.to_str() == content, "the tokenizer that all jobs share"


@pytest.mark.parametrize("kind", KINDS)
def test_all_ids_in_the_file_are_renumbered_without_holes_and_it_can_be_pruned_again(kind: str, tmp_path: Path) -> None:
    before = made(kind)
    before("a film", padding="max_length", truncation=True, max_length=9)  # what a call leaves behind
    text = "the film was good" if kind != "words" else "the plot was good"
    keep, after = pruned(before, [text])
    assert sorted(after.get_vocab().values()) == list(range(len(keep)))
    assert {token: keep[index] for token, index in after.get_vocab().items()}.items() <= before.get_vocab().items()
    assert [keep[index] for index in after(text, text)["input_ids"]] == before(text, text)["input_ids"]
    for name in ("pad_token", "cls_token", "sep_token", "unk_token"):
        assert getattr(after, name) == getattr(before, name)
        assert keep[getattr(after, f"{name}_id")] == getattr(before, f"{name}_id")
    assert after("a", padding="max_length", max_length=9)["input_ids"][-1] == after.pad_token_id
    after.save_pretrained(tmp_path)
    loaded = artifact.read_tokenizer(tmp_path)
    assert loaded is not None and loaded(text)["input_ids"] == after(text)["input_ids"]
    again, smaller = pruned(loaded, ["the"])
    assert len(smaller) < len(after)
    assert [keep[again[index]] for index in smaller("the")["input_ids"]] == before("the")["input_ids"]


def test_the_last_resort_is_the_unknown_token() -> None:
    """With WordPiece a word is unknown only if one of its characters is no piece by itself, as before."""
    before = made("wordpiece")
    _, after = pruned(before, ["the"])
    assert before("film %")["input_ids"].count(before.unk_token_id) == 1
    assert after("film %")["input_ids"].count(after.unk_token_id) == 1
    singles = {token for token in before.get_vocab() if len(token.removeprefix("##")) == 1}
    assert singles <= after.get_vocab().keys()


@pytest.mark.parametrize("kind", ["bpe", "char-bpe"])
def test_pieces_of_bpe_keep_all_that_they_are_merged_from(kind: str) -> None:
    before = made(kind)
    longest = max(before.get_vocab(), key=len)
    content = json.loads(before.backend_tokenizer.to_str())["model"]
    keep = pieces.kept(before, [before.get_vocab()[longest]])
    after = json.loads(pieces.shrunk(before, keep).backend_tokenizer.to_str())["model"]
    merges = [pair for pair in content["merges"] if pair in after["merges"]]
    assert after["merges"] == merges and 2 < len(merges) < len(content["merges"])
    assert longest in {first + second.removeprefix("##") for first, second in merges}


@pytest.mark.parametrize(("cls", "kind"), [(BertTokenizer, "wordpiece"), (RobertaTokenizer, "bpe")])
def test_tokenizers_of_their_own_class_keep_it(cls: type[Any], kind: str, tmp_path: Path) -> None:
    made(kind).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": cls.__name__}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(written))
    before = artifact.read_tokenizer(tmp_path)
    assert type(before) is cls
    keep, after = pruned(before, SEEN)
    assert type(after) is cls
    assert [keep[index] for index in after(SEEN[0])["input_ids"]] == before(SEEN[0])["input_ids"]


def test_a_tokenizer_that_other_files_make_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = made("wordpiece")
    monkeypatch.setattr(artifact, "read_tokenizer", lambda directory: before)
    with pytest.raises(UserError, match=r"^tokenizer: expected one that its tokenizer\.json describes whole, [^\n]+$"):
        pieces.shrunk(before, pieces.kept(before, []))
