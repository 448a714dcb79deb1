"""Births of encoder-decoders: pairs, spans, denoising; answers beside baselines."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers

import bildung
from bildung.core.errors import DataError, SettingsError, TokenizerError
from bildung.data.seq2seq import SourceTarget
from bildung.pretrain.answering import answers_to, scored
from bildung.pretrain.seq2seq import Settings, seq2seq
from bildung.tokenizer.learn import learn
from bildung.tokenizer.learning import Learning
from bildung.tokens.tokenizer import Tokenizer

MODEL = {
    "model_type": "transformer",
    "hidden_size": 32,
    "intermediate_size": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "dropout": 0.0,
}
LETTERS = "abcdefgh"


def reversals(count: int, seed: int) -> list[dict[str, str]]:
    """A letter becomes its capital, in reverse order."""
    draws = random.Random(seed)
    words = ["".join(draws.choice(LETTERS) for _ in range(draws.randint(2, 4))) for _ in range(count)]
    return [{"source": " ".join(word), "target": " ".join(word[::-1].upper())} for word in words]


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    tokenizer = learn([" ".join(LETTERS), " ".join(LETTERS.upper())], Learning(algorithm="word")).tokenizer
    (tmp_path / "words").mkdir()
    tokenizer.save(tmp_path / "words")
    return tmp_path / "words"


def settings(data: str, **other: object) -> Settings:
    common: dict[str, object] = {
        "data": data,
        "model": MODEL,
        "steps": 150,
        "batch_size": 32,
        "max_length": 16,
        "precision": "fp32",
        "learning_rate": 4e-3,
        "weight_decay": 0.0,
        "metrics": ("per", "exact_match"),
    }
    return Settings(**{**common, **other})  # type: ignore[arg-type]


def test_a_transformer_is_born_and_answers_better_than_who_knows_nothing(words: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", reversals(800, 1))
    test = write_rows(tmp_path / "test.jsonl", reversals(60, 2))
    record = seq2seq(words, tmp_path / "out", settings(data, test=test, answers=40, length_edges=(3,)))
    measured = record.measured
    assert measured["answered"] == 40
    assert measured["per"] < 0.5 * min(measured["per_copy_source"], measured["per_most_frequent"])
    assert measured["exact_match"] > measured["exact_match_copy_source"] == 0.0
    assert measured["held_out_nats_per_token"] < 1.0
    assert {"per, length <=3", "per, length >=4", "per_stderr"} <= set(measured)
    assert "unit:phonemes" in measured["signatures"]["per"]
    assert record.after["samples"][0]["prompt"] == json.loads(Path(test).read_text().split("\n")[0])["source"]
    lm = bildung.load(tmp_path / "out")
    assert lm.config.kind == "encoder-decoder" and lm.config.decoder_start_token_id == lm.tokenizer.bos_id
    answer = bildung.generate(lm, "a b", new_tokens=8)
    assert answer == record_answer(lm, "a b")
    again = seq2seq(tmp_path / "out", tmp_path / "more", settings(data, model=None, steps=10))
    assert [ancestor["operation"] for ancestor in again.ancestors] == ["pretrain seq2seq"]


def record_answer(lm: bildung.LanguageModel, text: str) -> str:
    from bildung.data.seq2seq import encode_source

    return answers_to(lm, [encode_source(lm.tokenizer, text)], 8)[0]


def test_a_recurrent_model_learns_by_the_same_operation(words: Path, tmp_path: Path) -> None:
    """Everything it needs is `given`."""
    model = {
        "model_type": "rnn_seq2seq",
        "cell": "gru",
        "hidden_size": 32,
        "embedding_size": 16,
        "encoder_size": 16,
        "attention": "general",
    }
    data = write_rows(tmp_path / "train.jsonl", reversals(400, 1))
    record = seq2seq(words, tmp_path / "out", settings(data, model=model, steps=100, learning_rate=1e-2))
    assert record.measured["per"] < 0.5 * record.measured["per_most_frequent"]
    assert bildung.generate(bildung.load(tmp_path / "out"), "a b c", new_tokens=8)


def test_smoothing_batches_by_tokens_and_beams(words: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", reversals(300, 1))
    given = settings(data, label_smoothing=0.1, batch_tokens=128, beams=3, schedule="inverse_sqrt", steps=60)
    record = seq2seq(words, tmp_path / "out", given)
    assert record.measured["per"] < record.measured["per_most_frequent"]
    # A smoothed loss has a floor that the held-out loss, which is plain, does not have.
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] > record.measured["held_out_nats_per_token"]
    tokens = [row["tokens"] for row in rows if "tokens" in row]
    assert max(tokens) <= 2 * 128


def test_targets_of_their_own_source_are_joined_by_key(words: Path, tmp_path: Path) -> None:
    rows = reversals(60, 1)
    one = write_rows(tmp_path / "a.jsonl", [{"text": row["source"], "verse": str(n)} for n, row in enumerate(rows)])
    other = write_rows(
        tmp_path / "b.jsonl", [{"text": row["target"], "verse": str(n)} for n, row in enumerate(rows[:50])]
    )
    given = settings(one, target_data=other, key="verse", steps=2, metrics=("bleu",))
    record = seq2seq(words, tmp_path / "out", given)
    assert record.measured["answered"] == 32
    assert any("10 row" in note for note in record.notes)
    assert len(record.data) == 2


@pytest.mark.parametrize("objective", ["spans", "denoising"])
def test_prose_is_pretraining_too(objective: str, tmp_path: Path) -> None:
    text = [{"text": f"the cat number {i % 7} sat. the mat saw {i % 5} dogs and one bird."} for i in range(80)]
    data = write_rows(tmp_path / "text.jsonl", text)
    control = tuple(f"<extra_id_{n}>" for n in range(10)) if objective == "spans" else ()
    specials = {"eos": "</s>", "pad": "<pad>", "mask": "<mask>", "unk": "<unk>"}
    given_words = Learning(algorithm="word", control=control, specials=specials)
    tokenizer = learn([row["text"] for row in text], given_words).tokenizer
    (tmp_path / "words").mkdir()
    tokenizer.save(tmp_path / "words")
    model = {
        "model_type": "t5",
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 1,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    given = settings(data, objective=objective, model=model, max_length=32, steps=120, evaluate_every=60)
    record = seq2seq(tmp_path / "words", tmp_path / "out", given)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert record.measured["held_out_nats_per_token"] < 0.5 * rows[0]["held_out_loss"]
    assert "answered" not in record.measured
    peer = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    source = torch.tensor([[3, 4, 5, tokenizer.eos_id]])
    written = peer.generate(source, max_new_tokens=5, do_sample=False)[0].tolist()
    assert written[0] == tokenizer.pad_id, "it knows what to decode from"
    with torch.no_grad():
        ours = bildung.load(tmp_path / "out").model(source, torch.tensor([written]))
        theirs = peer(input_ids=source, decoder_input_ids=torch.tensor([written])).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_killed_and_run_again_is_the_same_model(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bildung.train import objectives

    data = write_rows(tmp_path / "train.jsonl", reversals(100, 1))
    model = {**MODEL, "dropout": 0.1}
    given = settings(data, model=model, steps=8, batch_tokens=64, checkpoint_every=2)
    seq2seq(words, tmp_path / "whole", given)
    calls, plain = [], objectives.sum_at_targets

    def failing(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(objectives, "sum_at_targets", failing)
    with pytest.raises(KeyboardInterrupt):
        seq2seq(words, tmp_path / "broken", given)
    monkeypatch.setattr(objectives, "sum_at_targets", plain)
    seq2seq(words, tmp_path / "broken", given)
    whole, broken = (bildung.load(tmp_path / name).model for name in ("whole", "broken"))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, broken.get_parameter(name)), name


def test_scores_stand_beside_their_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [SourceTarget("a b", "A B"), SourceTarget("c", "C")]
    learned = [SourceTarget("d", "A B"), SourceTarget("e", "A B"), SourceTarget("f", "C")]
    found = scored(("per", "exact_match", "chrf"), ["A B", "A"], asked, learned, [2, 1], (1,))
    assert found["per"] == pytest.approx(1 / 3)
    assert found["per_copy_source"] == 1.0
    assert found["per_most_frequent"] == pytest.approx(2 / 3)  # "A B" for "C": one replaced, one too many
    assert (found["exact_match"], found["exact_match_most_frequent"]) == (0.5, 0.5)
    assert found["per, length <=1"] == 1.0 and found["per, length >=2"] == 0.0
    assert "copy source 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"metrics": ("blue",)}, "bleu"),
        ({"beams": 0}, "beams"),
        ({"objective": "spans", "test": "x.jsonl"}, "makes its own targets"),
        ({"model": {**MODEL, "model_type": "llama"}}, None),
        ({"model": {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "max_position_embeddings": 8}}, "encoder-decoder, seq2seq"),
        ({"objective": "spans"}, "no usable row|text"),
    ],
)  # fmt: skip
def test_bad_settings(words: Path, tmp_path: Path, wrong: dict[str, object], named: str | None) -> None:
    data = write_rows(tmp_path / "train.jsonl", reversals(50, 1))
    with pytest.raises((SettingsError, DataError, TokenizerError, bildung.core.errors.ConfigError), match=named):
        seq2seq(words, tmp_path / "out", settings(data, **wrong))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_what_the_objective_needs(words: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "text.jsonl", [{"text": "a b c d e f g h"}] * 3 + [{"text": "a b c d"}] * 40)
    for objective, named in (("spans", "extra_id_0"), ("denoising", "mask_token")):
        with pytest.raises(TokenizerError, match=named):
            seq2seq(words, tmp_path / objective, settings(data, objective=objective))
    assert Tokenizer.load(words).named["mask_token"] is None
