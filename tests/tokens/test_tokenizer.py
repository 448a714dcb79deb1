"""Encoding, decoding, special tokens, and files that are broken or contradict each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from bildung.core.errors import TokenizerError
from bildung.tokens.tokenizer import Tokenizer
from tests.tokens.samples import SMOLLM2, SPECIALS, TEXTS, byte_level, sentencepiece

TOKENIZER = byte_level()
SENTENCEPIECE = sentencepiece()
texts = st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("<|im_end>/s[]\n ")))
texts_with_specials = st.lists(st.one_of(st.text(max_size=5), st.sampled_from(SPECIALS)), max_size=8).map("".join)


@given(texts)
def test_byte_level_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(texts)
def test_sentencepiece_text_comes_back(text: str) -> None:
    text = text.replace("▁", "")  # the one character it takes for a space
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode(text, bos=False)) == text


@given(texts_with_specials)
def test_plain_text_never_yields_a_special_token(text: str) -> None:
    for tokenizer in (TOKENIZER, SENTENCEPIECE):
        ids = tokenizer.encode(text, bos=False)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == text


def test_specials_are_parsed_only_when_asked() -> None:
    end = TOKENIZER.id_of("<|im_end|>")
    assert TOKENIZER.encode("a<|im_end|>", specials=True)[-1] == end
    assert end not in TOKENIZER.encode("a<|im_end|>")
    assert TOKENIZER.decode([end, *TOKENIZER.encode("a")], skip_special=True) == "a"
    assert TOKENIZER.decode([end]) == "<|im_end|>"


def with_bos(post_processor: bool, **config: Any) -> Tokenizer:
    base = byte_level()
    if post_processor:
        number = base.id_of("<s>")
        base.backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", number)])
    return Tokenizer(base.backend, {"bos_token": "<s>", **config})


def test_bos_comes_exactly_once() -> None:
    tokenizer = with_bos(True)
    bos = tokenizer.bos_id
    assert tokenizer.encode("a").count(bos) == 1 and tokenizer.encode("a")[0] == bos
    assert bos not in tokenizer.encode("a", bos=False)
    assert tokenizer.encode("<s>a", specials=True) == tokenizer.encode("a")
    # as prose, it is prose
    assert tokenizer.encode("<s>a").count(bos) == 1 and tokenizer.decode(tokenizer.encode("<s>a")) == "<s><s>a"
    assert tokenizer.encode("") == [bos]


@pytest.mark.parametrize(
    ("post_processor", "config", "used"),
    [
        (True, {}, True),
        (False, {}, False),
        (False, {"add_bos_token": True}, True),
        (True, {"add_bos_token": False}, True),
    ],
)
def test_whether_a_model_uses_bos(post_processor: bool, config: dict[str, Any], used: bool) -> None:
    assert with_bos(post_processor, **config).uses_bos is used


def test_absent_special_tokens_are_none() -> None:
    tokenizer = byte_level(eos=None)
    assert tokenizer.bos_id is tokenizer.eos_id is tokenizer.pad_id is tokenizer.template_hash is None
    assert tokenizer.stop_ids == set()


def test_an_ordinary_entry_named_as_eos_becomes_special() -> None:
    assert TOKENIZER.id_of("Hello") in TOKENIZER.encode("Hello")
    tokenizer = byte_level(eos="Hello")
    assert tokenizer.eos_id == tokenizer.id_of("Hello") == TOKENIZER.id_of("Hello")
    assert tokenizer.eos_id not in tokenizer.encode("Hello")
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"


def test_stop_ids_join_eos_generation_config_and_the_end_of_turn(tmp_path: Path) -> None:
    base = byte_level(SMOLLM2, eos="<|endoftext|>")
    tokenizer = Tokenizer(base.backend, base.config, SMOLLM2, [base.id_of("<|eot_id|>")])
    expected = {tokenizer.id_of(token) for token in ("<|endoftext|>", "<|im_end|>", "<|eot_id|>")}
    assert tokenizer.stop_ids == expected
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).stop_ids == expected
    refuses = Tokenizer(base.backend, base.config, "{{ raise_exception('system first') }}")
    assert refuses.stop_ids == {refuses.eos_id}


def test_ids_without_a_token_are_refused() -> None:
    for wrong in (-1, -100, TOKENIZER.vocab_size):
        with pytest.raises(TokenizerError, match=f"{wrong} is not a token id; allowed: 0 to"):
            TOKENIZER.decode([wrong])
        with pytest.raises(TokenizerError, match="is not a token id"):
            TOKENIZER.token_of(wrong)
    with pytest.raises(TokenizerError, match=r"'<\|im_emd\|>' is not a token. did you mean '<\|im_end\|>'"):
        TOKENIZER.id_of("<|im_emd|>")
    with pytest.raises(TokenizerError, match="lone surrogate at character 1"):
        TOKENIZER.encode("a\ud800")


def test_the_vocabulary_must_fit_the_embedding() -> None:
    TOKENIZER.check_fits(TOKENIZER.vocab_size)
    with pytest.raises(TokenizerError, match=f"{TOKENIZER.vocab_size} token ids, the model's embedding 20 rows"):
        TOKENIZER.check_fits(20)


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_saved_files_load_in_transformers_with_equal_ids(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_level(SMOLLM2, bos="<s>") if kind == "byte level" else sentencepiece(SMOLLM2)
    tokenizer.save(tmp_path)
    again, peer = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids == peer.encode(text), text
    assert peer.chat_template == again.chat_template == SMOLLM2
    assert again.template_hash == tokenizer.template_hash
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (again.bos_id, again.eos_id, again.pad_id)
    assert again.backend.to_str() == tokenizer.backend.to_str()


def test_files_written_by_transformers_load(tmp_path: Path) -> None:
    base = byte_level(SMOLLM2)
    peer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=base.backend, eos_token="<|im_end|>", bos_token="<s>", chat_template=SMOLLM2
    )
    peer.save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == base.id_of("<|im_end|>") and tokenizer.chat_template == SMOLLM2
    assert [tokenizer.encode(text) for text in TEXTS] == [peer.encode(text) for text in TEXTS]


def test_older_files_keep_names_and_template_elsewhere(tmp_path: Path) -> None:
    byte_level().save(tmp_path)
    config = {"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": SMOLLM2}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>", "lstrip": False}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == tokenizer.id_of("</s>") and tokenizer.chat_template == SMOLLM2


def test_merges_that_spell_a_special_token_are_left_out(tmp_path: Path) -> None:
    byte_level().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    pieces = ["<|im", "<|im_", "<|im_e", "<|im_en", "<|im_end", "<|im_end|"]
    merges = [["<", "|"], ["<|", "i"], ["<|i", "m"], *map(list, zip(pieces, "_end|>", strict=True))]
    raw["model"]["merges"] = merges + raw["model"]["merges"]
    raw["pre_tokenizer"]["pretokenizers"] = raw["pre_tokenizer"]["pretokenizers"][
        -1:
    ]  # as in SentencePiece, nothing keeps the pieces apart
    for left, right in merges:
        raw["model"]["vocab"].setdefault(left + right, len(raw["model"]["vocab"]))
    path.write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("a<|im_end|>b")
    assert tokenizer.id_of("<|im_end|>") not in ids and tokenizer.id_of("<|im_end|") in ids


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer.json": (lambda d: (d / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    "cut short": (lambda d: (d / "tokenizer.json").write_text((d / "tokenizer.json").read_text()[:500]), "as JSON"),
    "not UTF-8": (lambda d: (d / "tokenizer.json").write_bytes(b"\xff\xfe"), "as JSON"),
    "nested": (lambda d: (d / "tokenizer.json").write_text("[" * 100_000), "as JSON"),
    "a list": (lambda d: (d / "tokenizer.json").write_text("[]"), "holds a list; a JSON object is expected"),
    "no model": (lambda d: edit(d / "tokenizer.json", lambda r: r.pop("model")), "not a valid tokenizer"),
    "wrong merges": (
        lambda d: edit(d / "tokenizer.json", lambda r: r["model"]["merges"].append(["zzz", "qqq"])),
        "not a valid tokenizer",
    ),
    "odd merges": (
        lambda d: edit(d / "tokenizer.json", lambda r: r["model"]["merges"].append({"a": 1})),
        "not a valid tokenizer",
    ),
    "added token is a list": (
        lambda d: edit(d / "tokenizer.json", lambda r: r["added_tokens"][0].update(content=["a"])),
        "not a valid tokenizer",
    ),
    "added token moved": (
        lambda d: edit(d / "tokenizer.json", lambda r: r["added_tokens"][2].update(id=7)),
        r"puts the added token '<\|im_end\|>' at id 7, the vocabulary at 2",
    ),
    "an id twice": (
        lambda d: edit(d / "tokenizer.json", lambda r: r["model"]["vocab"].update(he=20)),
        r"contradict each other: tokenizer.json has id 20 for '.' and for 'he'",
    ),
    "config disagrees": (
        lambda d: edit(
            d / "tokenizer_config.json", lambda r: r.update(added_tokens_decoder={"5": {"content": "<|im_end|>"}})
        ),
        "contradict each other",
    ),
    "unknown eos": (
        lambda d: edit(d / "tokenizer_config.json", lambda r: r.update(eos_token="<|im_ends|>")),
        r"eos_token = '<\|im_ends\|>', which is not in tokenizer.json .* did you mean '<\|im_end\|>'",
    ),
    "eos is a number": (lambda d: edit(d / "tokenizer_config.json", lambda r: r.update(eos_token=2)), "a string"),
    "eos id too large": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": [2, 99999]}'),
        "eos_token_id 99999 is not a token",
    ),
    "eos id is text": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": "x"}'),
        "token ids expected",
    ),
    "no default template": (
        lambda d: edit(
            d / "tokenizer_config.json", lambda r: r.update(chat_template=[{"name": "rag", "template": ""}])
        ),
        "none named 'default'",
    ),
    "template is not UTF-8": (lambda d: (d / "chat_template.jinja").write_bytes(b"\xff"), "not UTF-8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(case: str, tmp_path: Path) -> None:
    byte_level().save(tmp_path)
    breaks, message = BROKEN[case]
    breaks(tmp_path)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path)
