"""A sentence task generated from a seed: short reviews whose verdict is not in any one word.

A clause praises or blames with one adjective, and a negation turns it round; of two clauses the main one decides
(`although X , Y`, `X but Y`, `Y even though X`), whatever the other says. Counting words therefore gets only so far: a
model has to bind the negation to its clause, and to know which clause leads. Aspects, intensifiers, openings and
closings say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from edgemin.errors import UserError

TEXT_COLUMN = "sentence"
LABEL_COLUMN = "label"
LABELS = ("negative", "positive")
TRAIN_EXAMPLES = 4000
EVALUATION_EXAMPLES = 1000
MAX_EXAMPLES = 200_000  # of all splits together; it takes longer and longer to find reviews that are new
MAX_TOKENS = 128

_BLAME, _PRAISE, _ASPECTS, _INTENSIFIERS, _NEGATIONS = (
    words.split()
    for words in (
        "bad awful dull boring clumsy bland tedious stale lazy cold silly ugly",
        "good great superb lovely brilliant charming clever funny moving fresh warm witty",
        "plot story script acting cast music ending pacing dialogue camera humour editing sound setting hero",
        "very really quite rather truly so",
        "not never hardly",
    )
)
_MAIN_LAST = ("although {other} , {main}", "while {other} , {main}", "{other} but {main}")
_MAIN_FIRST = ("{main} even though {other}",)
_OPENINGS = (
    "last night we saw it with my sister .",
    "on a rainy monday i went alone .",
    "this was shown at the old theater near the station .",
    "my friends had two free tickets .",
    "the critics argued about it for weeks .",
    "we arrived late and sat in the back row .",
)
_CLOSINGS = (
    "the room was full .",
    "it runs two hours .",
    "we walked home after that .",
    "then we had some tea .",
    "they made it in a small town .",
    "a sequel comes next year .",
    "our children asked many questions about its animals .",
    "popcorn cost five dollars and parking ten .",
)
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_TWO_CLAUSES = 0.35
_NEGATED = 0.3
_INTENSIFIED = 0.4
_SURROUNDED = 0.3


def generate(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Write distinct reviews, as many of one class as of the other (one more where `count` is odd).

    Args:
        count: How many.
        seed: Seed of all choices; a smaller `count` gives the beginning of a larger one.

    Returns:
        Texts and the names of their labels, in an order that is random itself.

    Raises:
        UserError: more are asked for than [`MAX_EXAMPLES`][edgemin.toy.MAX_EXAMPLES].
    """
    if count > MAX_EXAMPLES:
        raise UserError(f"task.max_train_examples: expected at most {MAX_EXAMPLES} examples of task=toy, given {count}")
    generator = np.random.default_rng(seed)
    texts: dict[str, str] = {}
    while len(texts) < count:
        pair = generator.permutation(2)
        for verdict in pair:
            text = _review(generator, int(verdict))
            while text in texts:
                text = _review(generator, int(verdict))
            texts[text] = LABELS[verdict]
    return list(texts)[:count], list(texts.values())[:count]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the whole vocabulary, for single texts and pairs, as BERT frames them."""
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary())}, unk_token="[UNK]"))
    backend.normalizer = Lowercase()
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, _SPECIAL.index(word)) for word in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def vocabulary() -> list[str]:
    """Special tokens, then every word of the task in alphabetical order."""
    phrases = [
        *_PRAISE,
        *_BLAME,
        *_ASPECTS,
        *_INTENSIFIERS,
        *_NEGATIONS,
        *_MAIN_LAST,
        *_MAIN_FIRST,
        *_OPENINGS,
        *_CLOSINGS,
    ]
    words = {word for phrase in phrases for word in phrase.split()} - {"{main}", "{other}"}
    return [*_SPECIAL, *sorted(words | {"the", "was"})]


def _review(generator: np.random.Generator, verdict: int) -> str:
    main = _clause(generator, verdict)
    if generator.random() < _TWO_CLAUSES:
        other = _clause(generator, int(generator.integers(2)))
        text = _pick(generator, (*_MAIN_LAST, *_MAIN_FIRST)).format(main=main, other=other)
    else:
        text = main
    parts = [text, "."]
    if generator.random() < _SURROUNDED:
        parts.insert(0, _pick(generator, _OPENINGS))
    if generator.random() < _SURROUNDED:
        parts.append(_pick(generator, _CLOSINGS))
    return " ".join(parts)


def _clause(generator: np.random.Generator, verdict: int) -> str:
    negated = generator.random() < _NEGATED
    words = ["the", _pick(generator, _ASPECTS), "was"]
    if negated:
        words.append(_pick(generator, _NEGATIONS))
    if generator.random() < _INTENSIFIED:
        words.append(_pick(generator, _INTENSIFIERS))
    words.append(_pick(generator, _PRAISE if bool(verdict) != negated else _BLAME))
    return " ".join(words)


def _pick(generator: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(generator.integers(len(choices)))]
