"""Encoder-decoders answer sources: greedily as transformers does, in batches as alone, streamed as whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bildung
from bildung.app.cli import main
from bildung.core.errors import DataError, SettingsError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel, assemble
from bildung.run.chat import Conversation
from bildung.run.decode import Sampling
from bildung.run.generate import encode_prompt
from bildung.run.sources import pad_sources, reading
from bildung.run.write import write
from tests.conftest import tiny_tokenizer

CONFIG: dict[str, Any] = dict(
    model_type="transformer",
    vocab_size=300,
    hidden_size=48,
    intermediate_size=80,
    encoder_layers=2,
    decoder_layers=2,
    num_attention_heads=4,
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
SHAPE: dict[str, Any] = dict(vocab_size=300, d_model=48, pad_token_id=1, eos_token_id=2, decoder_start_token_id=1)
T5 = {**SHAPE, "d_kv": 12, "d_ff": 60, "num_layers": 2, "num_heads": 4}
BART = dict(
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=60,
    decoder_ffn_dim=60,
    init_std=0.5,
)
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", {**SHAPE, **BART, "decoder_start_token_id": 2}),
    "marian": ("MarianMTModel", {**SHAPE, **BART, "max_position_embeddings": 64}),
}
SOURCES = [[5, 17, 230, 44, 2], [9, 2], [100, 101, 102, 2]]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """Untied, so that it does not repeat itself; of all tokens the printable ones are likely."""
    model = build(from_dict({**CONFIG, "tie_word_embeddings": False}), seed=5).eval()
    tokenizer = tiny_tokenizer()
    generator = torch.Generator().manual_seed(6)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.6, generator=generator)
    for token in range(300):
        if not tokenizer.decode([token]).isalnum():
            model.lm_head.base.weight.data[token] = 0.0
    return LanguageModel(model, tiny_tokenizer(), model.config)


@pytest.mark.parametrize("name", PEERS)
def test_greedy_answers_are_those_of_transformers(name: str) -> None:
    architecture, changes = PEERS[name]
    peer_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    peer = peer_class(peer_class.config_class(**changes)).eval()
    for key, parameter in peer.named_parameters():  # or a tied model says one token again and again
        if parameter.dim() > 1 and "positions" not in key:
            torch.nn.init.normal_(parameter, 0.0, 0.1 if "shared" in key else 0.6)
    ours = assemble(from_dict(json.loads(peer.config.to_json_string())), dict(peer.state_dict()))
    source, keep = pad_sources(SOURCES, 300, torch.device("cpu"))
    assert keep is not None
    theirs = peer.generate(
        input_ids=source.masked_fill(~keep, 1),
        attention_mask=keep.long(),
        max_new_tokens=12,
        do_sample=False,
        num_beams=1,
        forced_eos_token_id=None,
        bad_words_ids=[[1]],
        eos_token_id=2,
        pad_token_id=1,
    )
    answers = [written[0].tokens for written in write(ours, tiny_tokenizer(), SOURCES, 12)]
    assert len(set(answers)) == 3
    for row, answer in zip(theirs[:, 1:].tolist(), answers, strict=True):
        assert row[: len(answer)] == list(answer)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)])
def test_a_batch_of_sources_is_answered_as_each_alone(lm: LanguageModel, sampling: Sampling) -> None:
    together = write(lm.model, lm.tokenizer, SOURCES, 10, sampling=sampling)
    assert len({one[0].tokens for one in together}) == 3
    alone = [write(lm.model, lm.tokenizer, [source], 10, sampling=sampling)[0] for source in SOURCES]
    if sampling.temperature:  # a draw depends on the prompt's number
        assert alone[0][0].tokens == together[0][0].tokens
    else:
        assert [one[0].tokens for one in alone] == [one[0].tokens for one in together]


def test_generate_reads_a_source_and_writes_the_answer_alone(lm: LanguageModel) -> None:
    text = "The capital"
    ids = encode_prompt(lm, text)
    assert ids[-1] == 2  # a source ends with EOS
    (expected,) = write(lm.model, lm.tokenizer, [ids], 8)
    assert bildung.generate(lm, text, new_tokens=8) == expected[0].text != ""
    assert bildung.generate(lm, [text, "of France"], new_tokens=8)[0] == expected[0].text
    assert bildung.generate(lm, text, new_tokens=8) != bildung.generate(lm, "of Spain", new_tokens=8)
    assert bildung.generate(lm, text, new_tokens=8, beams=3)
    sampled = [bildung.generate(lm, text, new_tokens=8, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_it_stops_at_eos_and_never_writes_padding(lm: LanguageModel) -> None:
    _, prompts, rules = reading(lm.model, SOURCES)
    assert prompts == [[0], [0], [0]]
    (rule,) = rules
    assert float(rule(torch.zeros(1, 300), [[0]])[0, 1]) == float("-inf")
    eager = build(from_dict({**CONFIG, "tie_word_embeddings": False}), seed=5).eval()
    eager.lm_head.base.weight.data.zero_()
    with torch.no_grad():
        state = eager.given(torch.tensor([SOURCES[0]])).hidden(torch.tensor([[0]]))[0, 0]
    eager.lm_head.base.weight.data[2] = state  # EOS is the likeliest
    assert write(eager, lm.tokenizer, [SOURCES[0]], 8)[0][0].tokens == (2,)


def test_dropout_is_off_and_the_mode_stays(lm: LanguageModel) -> None:
    expected = write(lm.model, lm.tokenizer, SOURCES, 6)
    lm.model.train()
    try:
        assert write(lm.model, lm.tokenizer, SOURCES, 6) == expected
        assert lm.model.training and lm.model.encoder.training
    finally:
        lm.model.eval()


def test_the_command_line_answers_a_source(
    lm: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bildung.save(lm, tmp_path / "model")
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(tmp_path / "model"), "The capital", "--new-tokens", "6"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.rstrip("\n") == bildung.generate(lm, "The capital", new_tokens=6)


def test_bad_input(lm: LanguageModel) -> None:
    with pytest.raises(SettingsError, match="no conversation"):
        Conversation(lm, 8, Sampling())
    with pytest.raises(SettingsError, match="without chat"):
        bildung.generate(lm, "hello", chat=True)
    with pytest.raises(DataError, match="empty"):
        bildung.generate(lm, "")
    with pytest.raises(DataError, match="300"):
        reading(lm.model, [[5, 400]])
    with pytest.raises(SettingsError, match="context"):
        bildung.generate(lm, "hello", new_tokens=5000)
