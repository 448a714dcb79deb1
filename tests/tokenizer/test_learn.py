"""Every algorithm: equal ids in transformers, text that comes back, special tokens that text cannot produce."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from bildung.core.errors import DataError, SettingsError, TokenizerError
from bildung.data.text import documents
from bildung.tokenizer.learn import learn
from bildung.tokenizer.learning import Learning
from bildung.tokens.tokenizer import Tokenizer
from tests.tokens.samples import TEXTS

MOBY = list(documents("mini:moby", limit=3))
KINDS: dict[str, dict[str, Any]] = {
    "byte_bpe": {"vocab_size": 500},
    "bpe": {"vocab_size": 300},
    "bpe with bytes": {"vocab_size": 600, "byte_fallback": True},
    "unigram": {"vocab_size": 300},
    "unigram with bytes": {"vocab_size": 600, "byte_fallback": True},
    "wordpiece": {"vocab_size": 300, "normalize": ("nfkc", "lowercase", "strip_accents")},
    "word": {"vocab_size": 200},
    "character": {},
    "character with bytes": {"byte_fallback": True},
    "byte": {},
}
LOSSLESS = ("byte_bpe", "bpe with bytes", "unigram with bytes", "character with bytes", "byte")


def made(kind: str, **more: Any) -> Tokenizer:
    return learn(MOBY, Learning(algorithm=kind.split()[0], **{**KINDS[kind], **more})).tokenizer


TOKENIZERS = {kind: made(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_files_give_equal_ids_in_transformers(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for peer in (
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path),
    ):
        for text in [*TEXTS, *MOBY]:
            ids = tokenizer.encode(text)
            assert again.encode(text) == ids == peer.encode(text, add_special_tokens=False), text
            assert peer.decode(ids) == tokenizer.decode(ids)
        for role in ("bos", "eos", "unk", "pad", "cls", "sep", "mask"):
            token = tokenizer.named[f"{role}_token"]
            assert getattr(peer, f"{role}_token_id") == (None if token is None else tokenizer.id_of(token))


@pytest.mark.parametrize("kind", LOSSLESS)
@given(text=st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("<0x41>s/ \n"))))
def test_text_comes_back(kind: str, text: str) -> None:
    text = text.replace("▁", "")  # the one character that stands for a space
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & tokenizer.control_ids


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_looks_like_special_tokens_is_text(kind: str) -> None:
    tokenizer = made(kind, control=("<|im_start|>",))
    texts = ["<s></s> <pad> [CLS] [MASK]x<|im_start|>", "<|im_start|>", "<s>", "[SEP] <0x41> <unk>"]
    for text in texts:
        assert not set(tokenizer.encode(text)) & tokenizer.control_ids
    number = tokenizer.id_of("<|im_start|>")
    assert number == tokenizer.vocab_size - 1 and tokenizer.encode("<|im_start|>", specials=True) == [number]


def test_special_tokens_in_the_training_text_are_not_learned() -> None:
    spiked = [text.replace(" the ", " <|im_start|> ") for text in MOBY]
    for algorithm in ("bpe", "unigram", "word", "byte_bpe"):
        given = Learning(algorithm=algorithm, vocab_size=500, control=("<|im_start|>",))
        tokenizer = learn(spiked, given).tokenizer
        pieces = tokenizer.backend.get_vocab(with_added_tokens=False)
        assert not any("im_start" in piece for piece in pieces), algorithm


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_has_the_size_asked_for(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert len(tokenizer.backend.get_vocab()) == tokenizer.vocab_size  # no holes
    if size := KINDS[kind].get("vocab_size"):
        assert tokenizer.vocab_size == size


def test_the_same_text_gives_the_same_tokenizer_in_every_process() -> None:
    script = (
        "import hashlib\nfrom tests.tokenizer.test_learn import KINDS, TOKENIZERS\n"
        "for kind in KINDS: print(kind, hashlib.sha256(TOKENIZERS[kind].backend.to_str().encode()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    hashes = {kind: hashlib.sha256(one.backend.to_str().encode()).hexdigest() for kind, one in TOKENIZERS.items()}
    assert other.splitlines() == [f"{kind} {digest}" for kind, digest in hashes.items()] and len(hashes) == len(KINDS)


def test_bytes_are_their_own_ids() -> None:
    tokenizer = TOKENIZERS["byte"]
    assert tokenizer.encode("aé\n") == [0x61, 0xC3, 0xA9, 0x0A] and tokenizer.vocab_size == 256 + 3


def test_words_are_what_stands_between_spaces() -> None:
    learned = learn(["EY1 Z\nEY1", "AH0 EY1  B"], Learning(algorithm="word"))
    tokenizer = learned.tokenizer
    assert tokenizer.decode(tokenizer.encode(" EY1\n B ")) == "EY1 B"
    assert tokenizer.encode("EY1 Q") == [tokenizer.id_of("EY1"), tokenizer.id_of("<unk>")]
    assert tokenizer.vocab_size == 4 + 4


def test_normalizers_are_applied_in_order_to_every_text() -> None:
    tokenizer = made("character", normalize=("nfkc", "lowercase"))
    assert tokenizer.encode("ＷＨＡＬＥ") == tokenizer.encode("whale") and "W" not in tokenizer.backend.get_vocab()
    stripped = made("character", normalize=("strip_accents",))
    assert stripped.decode(stripped.encode("señor")) == "senor"
    hangul = learn(["한국어 señor"], Learning(algorithm="character", normalize=("strip_accents",))).tokenizer
    assert hangul.decode(hangul.encode("한국어 señor")) == "한국어 senor"  # not taken apart into single letters


def test_rare_characters_can_be_left_out() -> None:
    learned = learn(MOBY, Learning(algorithm="bpe", vocab_size=300, alphabet=30))
    assert learned.characters == 30 and learned.left_out > 20
    assert learned.tokenizer.id_of("<unk>") in learned.tokenizer.encode("Q")
    assert all(piece.count("Q") == 0 for piece in learned.tokenizer.backend.get_vocab())
    by_bytes = learn(MOBY, Learning(algorithm="bpe", vocab_size=500, alphabet=30, byte_fallback=True)).tokenizer
    assert by_bytes.encode("Q") == [by_bytes.id_of("<0x51>")] and by_bytes.decode(by_bytes.encode("Qß")) == "Qß"
    rarer = learn(MOBY, Learning(algorithm="character", min_frequency=100))
    assert 5 < rarer.characters < 50


def test_min_frequency() -> None:
    texts = ["abc abc abc xyz"] * 2
    assert learn(texts, Learning(algorithm="word", min_frequency=3)).tokenizer.backend.token_to_id("xyz") is None
    often = learn(texts, Learning(algorithm="bpe", vocab_size=50, min_frequency=3)).tokenizer.backend.get_vocab()
    assert "▁abc" in often and "▁xyz" not in often
    assert "▁xyz" in learn(texts, Learning(algorithm="bpe", vocab_size=50)).tokenizer.backend.get_vocab()


def test_bos_is_added_where_asked(tmp_path: Path) -> None:
    tokenizer = made("bpe", add_bos=True)
    assert tokenizer.encode("a")[0] == tokenizer.bos_id and TOKENIZERS["bpe"].encode("a")[0] != tokenizer.bos_id
    tokenizer.save(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).encode("a whale") == tokenizer.encode("a whale")


def test_wordpiece_frames_sentences_as_bert_does(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["wordpiece"]
    cls, sep = (tokenizer.id_of(token) for token in ("[CLS]", "[SEP]"))
    pair = tokenizer.backend.encode("a", "b")
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    assert pair.ids == [cls, a, sep, b, sep] and pair.type_ids == [0, 0, 0, 1, 1]


def test_what_stands_alone_has_no_form_for_inside_a_word() -> None:
    tokenizer = learn(["whale, 日本 ship"], Learning(algorithm="wordpiece", vocab_size=60)).tokenizer
    vocabulary = tokenizer.backend.get_vocab()
    assert {"##w", ",", "日"} <= set(vocabulary) and not {"##,", "##日"} & set(vocabulary)


def test_special_tokens_by_role() -> None:
    specials = {"bos": "<|end|>", "eos": "<|end|>", "pad": "<|pad|>"}
    tokenizer = made("byte_bpe", specials=specials)
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.vocab_size - 2
    assert tokenizer.pad_id == tokenizer.vocab_size - 1 and tokenizer.named["unk_token"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "bpe", "vocab_size": 50}, r"the text has \d\d characters and 4 special tokens, so at"),
        ({"algorithm": "unigram", "vocab_size": 50}, r"vocab_size = 50 is below the alphabet: the text has \d\d char"),
        ({"algorithm": "wordpiece", "vocab_size": 80}, r"below the alphabet: the text has \d+ letters \(a and ##a are"),
        (
            {"vocab_size": 258},
            r"the text has 256 bytes and 3 special tokens, so at least 259 are needed. Raise it\.$",
        ),
        (
            {"algorithm": "bpe", "vocab_size": 300, "byte_fallback": True},
            r"\d\d characters and 259 special tokens and bytes",
        ),
        ({"algorithm": "word", "vocab_size": 4}, "vocab_size = 4 leaves no room for words"),
        ({"algorithm": "byte", "vocab_size": 300}, "the vocabulary of a byte tokenizer is its alphabet; leave"),
        ({"algorithm": "character", "vocab_size": 300}, "is its alphabet; give `alphabet` to limit it"),
        ({"algorithm": "wordpiece", "byte_fallback": True}, "wordpiece knows no bytes"),
        ({"byte_fallback": True}, "byte_bpe has all bytes anyway"),
        ({"alphabet": 5}, "alphabet is for tokenizers of characters; byte_bpe has none"),
        ({"algorithm": "unigram", "min_frequency": 2}, "unigram does not choose its pieces by frequency"),
        ({"min_frequency": 0}, "min_frequency = 0; at least 1"),
        ({"specials": {"eos": "</s>"}, "add_bos": True}, "add_bos needs a token for the role bos"),
        ({"algorithm": "bpe", "specials": {"eos": "</s>"}}, "needs a token for what is unknown"),
        ({"specials": {"bos": "a"}}, "special token 'a' is also a piece of text in the vocabulary"),
        ({"specials": {"bos": "Ġthe"}}, "special token 'Ġthe' is also a piece of text"),
    ],
)
def test_settings_that_do_not_fit_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        learn(MOBY, Learning(**settings))


def test_the_size_named_in_the_error_is_enough() -> None:
    for algorithm in ("bpe", "unigram", "wordpiece", "byte_bpe"):
        with pytest.raises(SettingsError) as caught:
            learn(MOBY, Learning(algorithm=algorithm, vocab_size=1))
        size = int(str(caught.value).split("at least ")[1].split()[0])
        assert learn(MOBY, Learning(algorithm=algorithm, vocab_size=size)).tokenizer.vocab_size == size
        with pytest.raises(SettingsError, match="below the alphabet"):
            learn(MOBY, Learning(algorithm=algorithm, vocab_size=size - 1))


@pytest.mark.parametrize("algorithm", ["byte_bpe", "bpe", "unigram", "wordpiece", "word", "character"])
def test_text_that_is_none(algorithm: str) -> None:
    for nothing in ([], [""], ["", ""]):
        with pytest.raises(DataError, match="the training text is empty"):
            learn(nothing, Learning(algorithm=algorithm))
    with pytest.raises(TokenizerError, match="text 2 is not Unicode: it holds a lone surrogate"):
        learn(["a", "b\udc80"], Learning(algorithm=algorithm))


def test_merges_are_stored_only_by_bpe() -> None:
    models = {kind: json.loads(tokenizer.backend.to_str())["model"] for kind, tokenizer in TOKENIZERS.items()}
    assert models["bpe"]["merges"] and models["byte_bpe"]["merges"]
    assert "merges" not in models["wordpiece"] and "merges" not in models["unigram"]
    assert models["character"]["merges"] == models["byte"]["merges"] == []
