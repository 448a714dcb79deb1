"""vocab.json with merges.txt, and vocab.txt, give the ids that transformers gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from bildung.core.errors import TokenizerError
from bildung.data import nursery
from bildung.data.text import documents
from bildung.tokenizer.learn import learn
from bildung.tokenizer.learning import Learning
from bildung.tokens.tokenizer import Tokenizer
from tests.tokens.samples import TEXTS

MOBY = list(documents("mini:moby", limit=3))


def gpt2_files(folder: Path, specials: tuple[str, ...] = ("<|endoftext|>",)) -> Path:
    learned = learn(MOBY, Learning(algorithm="byte_bpe", vocab_size=500, specials={"eos": "<|endoftext|>"}))
    model = json.loads(learned.tokenizer.backend.to_str())["model"]
    vocabulary = {**model["vocab"], **{token: len(model["vocab"]) + n for n, token in enumerate(specials)}}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}")
    return folder


def bert_files(folder: Path) -> Path:
    learned = learn(MOBY, Learning(algorithm="wordpiece", vocab_size=400, normalize=("lowercase",)))
    backend = learned.tokenizer.backend
    pieces = [backend.id_to_token(number) for number in range(backend.get_vocab_size())]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return folder


def same_ids(ours: Tokenizer, peer: transformers.PreTrainedTokenizerBase, texts: list[str]) -> None:
    for text in texts:
        assert ours.encode(text, bos=False) == peer.encode(text, add_special_tokens=False), text
        assert ours.backend.encode(text).ids == peer.encode(text), text


def test_gpt2_files(tmp_path: Path) -> None:
    ours, peer = Tokenizer.load(gpt2_files(tmp_path)), transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    same_ids(ours, peer, TEXTS)
    assert ours.eos_id == ours.bos_id == peer.eos_token_id == ours.vocab_size - 1
    assert ours.decode(ours.encode("odd  spaces\n")) == "odd  spaces\n"


def test_roberta_files(tmp_path: Path) -> None:
    gpt2_files(tmp_path, ("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    ours, peer = Tokenizer.load(tmp_path), transformers.RobertaTokenizer.from_pretrained(tmp_path)
    same_ids(ours, peer, TEXTS)
    masked = [peer.encode(text, add_special_tokens=False) for text in ("a<mask> b", "a <mask> b")]
    # RoBERTa's mask takes the space before it along, as in its tokenizer.json; from these files transformers 5 forgets.
    assert ours.encode("a <mask> b", specials=True, bos=False) == masked[0] != masked[1]
    assert ours.backend.encode("a", "b").ids == peer.encode("a", "b")


@pytest.mark.parametrize("config", [{}, {"do_lower_case": False}, {"strip_accents": False}])
def test_bert_files(config: dict[str, bool], tmp_path: Path) -> None:
    (bert_files(tmp_path) / "tokenizer_config.json").write_text(json.dumps(config))
    ours, peer = Tokenizer.load(tmp_path), transformers.BertTokenizer.from_pretrained(tmp_path)
    same_ids(ours, peer, [*TEXTS, "ÉTÉ Naïve 日本"])
    pair, theirs = ours.backend.encode("a whale", "the sea"), peer("a whale", "the sea")
    assert pair.ids == theirs["input_ids"] and pair.type_ids == theirs["token_type_ids"]


def test_they_are_saved_as_tokenizer_json(tmp_path: Path) -> None:
    for files in (gpt2_files, bert_files):
        old, new = tmp_path / files.__name__, tmp_path / f"{files.__name__} saved"
        old.mkdir()
        ours = Tokenizer.load(files(old))
        ours.save(new)
        again, peer = Tokenizer.load(new), transformers.AutoTokenizer.from_pretrained(new)
        assert not (new / "vocab.json").exists()
        same_ids(again, peer, TEXTS)
        assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    gpt2_files(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    ids = {"<b>": len(vocabulary) + 1, "<a>": len(vocabulary)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    ours = Tokenizer.load(tmp_path)
    assert {token: ours.id_of(token) for token in ids} == ids
    (tmp_path / "added_tokens.json").write_text('{"<a>": 7}')
    with pytest.raises(TokenizerError, match="puts '<a>' at id 7; after the vocabulary it comes at"):
        Tokenizer.load(tmp_path)


def change(file: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda d: (d / file).write_text((d / file).read_text().replace(old, new, 1))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no vocab.json": (lambda d: (d / "vocab.json").unlink(), "vocab.json cannot be read as JSON"),
    "a merge of one piece": (change("merges.txt", "h e\n", "he\n"), r"merges.txt:\d+: 'he' is not two pieces"),
    "merges of another vocabulary": (
        change("merges.txt", "h e\n", "h e\nq q\n"),
        "merges 'q' and 'q', and 'qq' is not in vocab.json: the two files do not belong together",
    ),
    "an id twice": (change("vocab.json", '"!": 0', '"!": 1'), r"gives the id 1 to '!' and to '\\?\"'"),
    "an id that is text": (change("vocab.json", '"!": 0', '"!": "0"'), "the id of '!' is '0'"),
    "no end of text": (change("vocab.json", "<|endoftext|>", "<|end|>"), r"special token '<\|endoftext\|>' is not in"),
    "not UTF-8": (lambda d: (d / "merges.txt").write_bytes(b"\xff\n"), "cannot be read as UTF-8"),
    "another kind": (
        lambda d: (d / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}'),
        "how 'clip' cuts text is not known without a tokenizer.json; .* GPT2, Roberta, Bart",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_gpt2_files_are_refused(case: str, tmp_path: Path) -> None:
    gpt2_files(tmp_path)
    breaks, message = BROKEN[case]
    breaks(tmp_path)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path)


BROKEN_BERT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a piece twice": (change("vocab.txt", "!\n", "[UNK]\n"), r"has '\[UNK\]' in line 1 and again in line 2"),
    "no unknown token": (change("vocab.txt", "[UNK]", "[UNKNOWN]"), r"has no line '\[UNK\]'"),
    "no mask": (change("vocab.txt", "[MASK]", "[M]"), r"special token '\[MASK\]' is not in the vocabulary"),
    "another kind": (
        lambda d: (d / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}'),
        "how 'bertjapanese' cuts text is not known",
    ),
}


@pytest.mark.parametrize("case", BROKEN_BERT)
def test_broken_bert_files_are_refused(case: str, tmp_path: Path) -> None:
    bert_files(tmp_path)
    breaks, message = BROKEN_BERT[case]
    breaks(tmp_path)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "peer"), [("gpt2-tokenizer", transformers.GPT2Tokenizer), ("minilm", transformers.BertTokenizer)]
)
def test_real_files(name: str, peer: type[transformers.PreTrainedTokenizerBase], tmp_path: Path) -> None:
    if not nursery.is_current(name):
        pytest.skip(f"{name} is not here; `bildung nursery {name}` fetches it")
    folder = Path(nursery.fetch_file(name))
    for file in ("vocab.json", "merges.txt", "vocab.txt"):
        if (folder / file).exists():
            (tmp_path / file).write_bytes((folder / file).read_bytes())
    ours = Tokenizer.load(tmp_path)
    same_ids(ours, peer.from_pretrained(tmp_path), [*TEXTS, *MOBY])
    if name == "minilm":
        assert [ours.encode(text) for text in MOBY] == [Tokenizer.load(folder).encode(text) for text in MOBY]
