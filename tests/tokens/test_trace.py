"""What our own code makes of words is what the `tokenizers` library makes of them, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from bildung.core.errors import TokenizerError
from bildung.data import nursery
from bildung.data.sources import rows
from bildung.data.text import documents
from bildung.tokenizer.learn import learn
from bildung.tokenizer.learning import Learning
from bildung.tokens.tokenizer import Tokenizer
from bildung.tokens.trace import Tracer
from tests.tokens.samples import TEXTS, byte_level, sentencepiece

MOBY = list(documents("mini:moby", limit=4))
WORDS = list(dict.fromkeys(" ".join(documents("mini:moby")).split()))
KINDS = {
    "byte_bpe": {"vocab_size": 600},
    "bpe": {"vocab_size": 400},
    "bpe with bytes": {"vocab_size": 600, "byte_fallback": True, "alphabet": 40},
    "unigram": {"vocab_size": 400},
    "unigram with bytes": {"vocab_size": 600, "byte_fallback": True, "alphabet": 40},
    "wordpiece": {"vocab_size": 400, "normalize": ("lowercase",)},
    "word": {"vocab_size": 200},
    "character": {"alphabet": 40},
    "byte": {},
}


def made(kind: str) -> Tokenizer:
    return learn(MOBY, Learning(algorithm=kind.split()[0], **KINDS[kind])).tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_library_on_real_words(kind: str) -> None:
    assert_equal(made(kind), [*WORDS[::4], *(f" {word}" for word in WORDS[1::4]), *TEXTS])


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_equals_the_library_for_tokenizers_made_elsewhere(kind: str) -> None:
    tokenizer = byte_level() if kind == "byte level" else sentencepiece()
    assert_equal(tokenizer, TEXTS)


def assert_equal(tokenizer: Tokenizer, texts: list[str]) -> None:
    tracer = Tracer(tokenizer)
    for text in texts:
        assert [number for part in tracer(text) for number in part.ids] == tokenizer.encode(text, bos=False), text


def test_steps_lead_from_the_start_to_the_tokens() -> None:
    (bpe,) = Tracer(made("bpe"))("whaleship")
    assert "".join(bpe.start) == "whaleship" and bpe.steps[-1].pieces == bpe.tokens
    assert all(len(step.pieces) == len(bpe.start) - number for number, step in enumerate(bpe.steps, 1))
    (wordpiece,) = Tracer(made("wordpiece"))("whaleship")
    assert tuple(step.piece for step in wordpiece.steps) == wordpiece.tokens
    (unigram,) = Tracer(made("unigram"))("whaleship")
    assert unigram.steps[0].pieces == unigram.tokens and unigram.steps[0].score > unigram.steps[1].score


def test_whole_words_come_before_merges_where_the_tokenizer_says_so() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [], ignore_merges=True))
    (word,) = Tracer(Tokenizer(backend))("ab")
    assert word.tokens == ("ab",) and word.steps == ()


def test_what_cannot_be_traced_is_refused() -> None:
    tracer = Tracer(made("bpe"))
    with pytest.raises(TokenizerError, match="lone surrogate at character 1"):
        tracer("a\ud800")
    with pytest.raises(TokenizerError, match="2001 characters is too long"):
        tracer("a" * 2001)
    tokenizer = byte_level()
    tokenizer.backend.add_tokens(["whaleship"])
    with pytest.raises(TokenizerError, match=r"added tokens in it \('whaleship'\)"):
        Tracer(Tokenizer(tokenizer.backend))("a whaleship")
    tokenizer.backend.model = models.BPE({"a": 0}, [], dropout=0.1)
    with pytest.raises(TokenizerError, match=r"dropout = 0.1"):
        Tracer(tokenizer)


def real_words() -> list[str]:
    """100,000 distinct words of the CMU dictionary."""
    if not nursery.is_current("cmudict"):
        pytest.skip("cmudict is not here; `bildung nursery cmudict` fetches it")
    return list(dict.fromkeys(row["word"] for row in rows("nursery:cmudict")))[:100_000]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_library_on_100_000_words(kind: str) -> None:
    words = real_words()
    assert len(words) == 100_000
    assert_equal(made(kind), words)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2-tokenizer", "minilm"])
def test_real_vocabularies_equal_the_library_on_100_000_words(name: str) -> None:
    if not nursery.is_current(name):
        pytest.skip(f"{name} is not here; `bildung nursery {name}` fetches it")
    assert_equal(Tokenizer.load(Path(nursery.fetch_file(name))), real_words())
