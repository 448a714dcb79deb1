"""Sentence embeddings: pooling by hand, the files of sentence-transformers, the real MiniLM's published pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bildung
from bildung.core.errors import ConfigError, DataError
from bildung.data import nursery
from bildung.run.embed import Command, Recipe, command, pool, recipe
from tests.model.tiny_encoder import tiny_encoder

TEXTS = ["the cat sat on the mat", "a dog ran", "night", "the big red dog saw a small cat and ran on and on"]


def saved(tmp_path: Path, files: dict[str, object]) -> bildung.LanguageModel:
    directory = bildung.save(tiny_encoder("BertModel"), tmp_path / "model")
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    return bildung.load(directory)


def modules(*kinds: str) -> list[dict[str, str]]:
    steps = ["Transformer", *kinds]
    return [
        {"path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(steps)
    ]


def mode(name: str) -> dict[str, object]:
    flags = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    return {"word_embedding_dimension": 32, **{f"pooling_mode_{flag}": flag == name for flag in flags}}


def test_pooling_by_hand() -> None:
    h_BLD = torch.tensor([[[1.0, 5.0], [3.0, -1.0], [9.0, 9.0]], [[2.0, 2.0], [4.0, 0.0], [0.0, 4.0]]])
    keep_BL = torch.tensor([[True, True, False], [True, True, True]])
    assert pool(h_BLD, keep_BL, "mean").tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert pool(h_BLD, keep_BL, "max").tolist() == [[3.0, 5.0], [4.0, 4.0]]
    assert pool(h_BLD, keep_BL, "cls").tolist() == [[1.0, 5.0], [2.0, 2.0]]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_a_text_has_the_same_vector_in_any_company(pooling: str) -> None:
    lm = tiny_encoder("BertModel")
    together = bildung.embed(lm, TEXTS, pooling=pooling)
    alone = torch.cat([bildung.embed(lm, [text], pooling=pooling) for text in TEXTS])
    small = bildung.embed(lm, TEXTS, pooling=pooling, batch_size=2)
    assert torch.allclose(together, alone, atol=1e-6) and torch.allclose(together, small, atol=1e-6)
    assert torch.allclose(together.norm(dim=1), torch.ones(4))
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_the_directory_says_how(tmp_path: Path) -> None:
    files = {"modules.json": modules("Pooling"), "1_Pooling/config.json": mode("max_tokens")}
    lm = saved(tmp_path, {**files, "sentence_bert_config.json": {"max_seq_length": 6}})
    assert lm.base is not None and recipe(lm.base) == Recipe("max", False, 6)
    expected = bildung.embed(lm, ["the cat sat on"], pooling="max", normalize=False)
    assert torch.equal(bildung.embed(lm, [TEXTS[0]]), expected), "cut to six tokens, two of them special"
    again = bildung.load(bildung.save(lm, tmp_path / "copy"))
    assert torch.equal(bildung.embed(again, TEXTS), bildung.embed(lm, TEXTS)), "saving keeps these files"


def test_newer_files_and_none(tmp_path: Path) -> None:
    lm = saved(
        tmp_path, {"modules.json": modules("Pooling", "Normalize"), "1_Pooling/config.json": {"pooling_mode": "cls"}}
    )
    assert lm.base is not None and recipe(lm.base) == Recipe("cls", True, None)
    assert recipe(tmp_path) == Recipe("mean", True, None)


def test_what_is_refused(tmp_path: Path, tiny_lm: bildung.LanguageModel) -> None:
    with pytest.raises(DataError, match="kind 'decoder'"):
        bildung.embed(tiny_lm, ["a"])
    with pytest.raises(DataError, match="no text"):
        bildung.embed(tiny_encoder(), [])
    for files, words in (
        ({"modules.json": modules("Dense", "Pooling")}, "step 'Dense' is not known"),
        ({"modules.json": modules("Pooling"), "1_Pooling/config.json": mode("lasttoken")}, "pooling lasttoken"),
        ({"modules.json": modules("Pooling"), "1_Pooling/config.json": {}}, "pooling none"),
        ({"modules.json": {"a": 1}}, "a JSON list"),
        ({"sentence_bert_config.json": {"max_seq_length": "long"}}, "max_seq_length"),
    ):
        directory = tmp_path / words.replace(" ", "")
        directory.mkdir()
        with pytest.raises(ConfigError, match=words):
            bildung.embed(saved(directory, files), ["a"])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    lm = saved(tmp_path, {})
    assert lm.path is not None
    command(Command(directory=lm.path, texts=("the cat", "the dog"), out=tmp_path / "vectors.safetensors"))
    vectors = load_file(tmp_path / "vectors.safetensors")["embeddings"]
    assert torch.equal(vectors, bildung.embed(lm, ["the cat", "the dog"]))
    assert f"{float(vectors[0] @ vectors[1]):.3f}" in capsys.readouterr().out


@pytest.mark.real
def test_minilm_is_the_published_pipeline() -> None:
    if not nursery.is_current("minilm"):
        pytest.skip("MiniLM is not in the nursery (bildung nursery minilm)")
    from transformers import AutoTokenizer, BertModel

    texts = [
        "A cat sat on the mat.",
        "A kitten is resting on a rug.",
        "The tax law of 1986 lowered the top rate.",
        "Wo ist der Bahnhof?",
        "word " * 400,  # longer than the 256 tokens that its files allow
        "naïve café, 3.14 — ok?",
    ]
    folder = nursery.fetch_file("minilm")
    peer, words = BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    given = words(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = peer(**given).last_hidden_state
    mask = given["attention_mask"][..., None].float()
    expected = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    vectors = bildung.embed(bildung.load(folder), texts)
    assert float((vectors - expected).abs().max()) < 1e-5
    assert float((vectors @ vectors.T - expected @ expected.T).abs().max()) < 1e-5
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]
