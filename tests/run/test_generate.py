"""Text in, text out: the answer alone, cut at stop strings, the same in pieces as whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import bildung
from bildung.app.cli import main, run
from bildung.core.errors import DataError, ModelFileError, SettingsError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from bildung.run.beam import Beam, beam_search
from bildung.run.decode import Sampling, only_known
from bildung.run.generate import encode_prompt, stream
from bildung.run.loop import decode
from bildung.tokens.tokenizer import Tokenizer
from tests.conftest import CONFIG
from tests.model.tiny_encoder import tiny_encoder

PROMPT = "The capital of"


def test_the_answer_is_what_the_loop_decodes(tiny_lm: LanguageModel) -> None:
    ids = tiny_lm.tokenizer.encode(PROMPT)
    tokens = decode(tiny_lm.model, [ids], new_tokens=9, stop_ids=tiny_lm.tokenizer.stop_ids)[0].tokens
    known = [token for token in tokens if token not in tiny_lm.tokenizer.stop_ids]
    assert bildung.generate(tiny_lm, PROMPT, new_tokens=9) == tiny_lm.tokenizer.decode(known, skip_special=True)


def test_the_penalties_of_an_answer_reach_it(tiny_lm: LanguageModel) -> None:
    plain = bildung.generate(tiny_lm, PROMPT, new_tokens=20)
    ids = tiny_lm.tokenizer.encode(PROMPT)
    for penalty in ("presence_penalty", "frequency_penalty"):
        found = bildung.generate(tiny_lm, PROMPT, new_tokens=20, **{penalty: 100.0})
        assert found == "".join(stream(tiny_lm, ids, 20, sampling=Sampling(**{penalty: 100.0}))) != plain
    with pytest.raises(SettingsError, match="presence_penalty"):
        bildung.generate(tiny_lm, PROMPT, presence_penalty=float("nan"))


@pytest.mark.parametrize("seed", range(4))
def test_pieces_join_to_the_whole_and_seeds_repeat(tiny_lm: LanguageModel, seed: int) -> None:
    ids = tiny_lm.tokenizer.encode(PROMPT)
    text = bildung.generate(tiny_lm, PROMPT, new_tokens=20, temperature=1.0, top_k=40, seed=seed)
    sampling = Sampling(temperature=1.0, top_k=40, seed=seed)
    assert "".join(stream(tiny_lm, ids, 20, sampling=sampling)) == text
    assert text == bildung.generate(tiny_lm, PROMPT, new_tokens=20, temperature=1.0, top_k=40, seed=seed)
    assert text != bildung.generate(tiny_lm, PROMPT, new_tokens=20, temperature=1.0, top_k=40, seed=seed + 1)


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_stop_strings_cut_even_across_tokens_and_never_leak_in_pieces(tiny_lm: LanguageModel, length: int) -> None:
    whole = bildung.generate(tiny_lm, PROMPT, new_tokens=30, temperature=1.0, seed=2)
    for start in range(1, len(whole) - length):
        stop = whole[start : start + length]
        cut = bildung.generate(tiny_lm, PROMPT, new_tokens=30, temperature=1.0, seed=2, stop=[stop, "never said"])
        assert cut == whole[: whole.find(stop)]
        ids = tiny_lm.tokenizer.encode(PROMPT)
        pieces = list(stream(tiny_lm, ids, 30, sampling=Sampling(temperature=1.0, seed=2), stop=[stop]))
        assert "".join(pieces) == cut
        if start > 12:
            break


def test_a_conversation_goes_through_the_template(tiny_lm: LanguageModel) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    assert bildung.generate(tiny_lm, messages, new_tokens=5) == bildung.generate(
        tiny_lm, PROMPT, new_tokens=5, chat=True
    )
    ids = encode_prompt(tiny_lm, PROMPT, chat=True)
    assert tiny_lm.tokenizer.decode(ids).endswith("assistant\n") and ids != encode_prompt(tiny_lm, PROMPT)


def test_ids_without_a_token_are_never_chosen(tiny_lm: LanguageModel) -> None:
    """The model's vocabulary is larger than the tokenizer's: its last rows would be chosen here."""
    assert tiny_lm.config.vocab_size > tiny_lm.tokenizer.vocab_size
    head = tiny_lm.model.lm_head.base.weight
    kept = head.detach().clone()
    try:
        head.data[tiny_lm.tokenizer.vocab_size :] *= 1000
        generated: list[int] = []
        list(stream(tiny_lm, tiny_lm.tokenizer.encode(PROMPT), 8, generated=generated))
        assert max(generated) < tiny_lm.tokenizer.vocab_size
    finally:
        head.data.copy_(kept)


def test_what_cannot_be_is_refused(tiny_lm: LanguageModel) -> None:
    with pytest.raises(SettingsError, match="stop string is empty"):
        bildung.generate(tiny_lm, PROMPT, stop=[""])
    with pytest.raises(SettingsError, match="new_tokens"):
        bildung.generate(tiny_lm, PROMPT, new_tokens=0)
    with pytest.raises(SettingsError, match="top_p"):
        bildung.generate(tiny_lm, PROMPT, temperature=1.0, top_p=1.5)
    with pytest.raises(SettingsError, match="context"):
        bildung.generate(tiny_lm, PROMPT * 500)
    if not tiny_lm.tokenizer.encode(""):
        with pytest.raises(DataError, match="prompt is empty"):
            bildung.generate(tiny_lm, "")


def test_an_encoder_writes_nothing() -> None:
    for given in ({}, {"beams": 2}):
        with pytest.raises(ModelFileError, match="a bert is of kind 'encoder', which does not continue text"):
            bildung.generate(tiny_encoder(), "the cat", new_tokens=2, **given)


def test_one_stop_string_needs_no_list(tiny_lm: LanguageModel) -> None:
    whole = bildung.generate(tiny_lm, PROMPT, new_tokens=30, temperature=1.0, seed=2)
    stop = whole[5:8]
    cut = bildung.generate(tiny_lm, PROMPT, new_tokens=30, temperature=1.0, seed=2, stop=stop)
    assert cut == whole[: whole.find(stop)]


@pytest.mark.parametrize("prompt", [None, 7, b"bytes", [], {"role": "user"}])
def test_what_is_neither_text_nor_messages_is_refused(tiny_lm: LanguageModel, prompt: object) -> None:
    with pytest.raises(DataError, match="a text, or a list"):
        bildung.generate(tiny_lm, prompt)  # type: ignore[arg-type]


def test_an_answer_keeps_the_space_that_sentencepiece_drops_at_the_start() -> None:
    """Decoded alone, `▁b` is "b"; after a prompt it is " b"."""
    vocabulary = {"<unk>": 0, "▁a": 1, "▁b": 2}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    config = from_dict({**CONFIG, "vocab_size": 3, "eos_token_id": None, "bos_token_id": None})
    lm = LanguageModel(build(config, seed=3).eval(), Tokenizer(backend, {"unk_token": "<unk>"}), config)
    prompt = lm.tokenizer.encode("a b a")
    assert prompt == [1, 2, 1]
    generated: list[int] = []
    text = "".join(stream(lm, prompt, 6, sampling=Sampling(temperature=1.0), generated=generated))
    both = lm.tokenizer.decode(prompt + generated, skip_special=True)
    assert text.startswith(" ") and both == "a b a" + text


def test_a_list_of_prompts_gives_the_list_of_their_answers(tiny_lm: LanguageModel) -> None:
    prompts = [PROMPT, "Four", "A much longer beginning of a text"]
    assert bildung.generate(tiny_lm, prompts, new_tokens=6) == [
        bildung.generate(tiny_lm, prompt, new_tokens=6) for prompt in prompts
    ]
    message = {"role": "user", "content": PROMPT}
    both = bildung.generate(tiny_lm, [[message], [message]], new_tokens=5, stop="e")
    assert both == [bildung.generate(tiny_lm, [message], new_tokens=5, stop="e")] * 2
    with pytest.raises(DataError, match="a text, or a list"):
        bildung.generate(tiny_lm, [PROMPT, 7])


def test_beams_are_searched_and_scored(tiny_lm: LanguageModel) -> None:
    ids = tiny_lm.tokenizer.encode(PROMPT)
    beam = Beam(beams=4, length_penalty=1.0, n_best=3)
    rules = [only_known(tiny_lm.tokenizer.vocab_size)]
    (searched,) = beam_search(
        tiny_lm.model, [ids], new_tokens=8, beam=beam, rules=rules, stop_ids=tiny_lm.tokenizer.stop_ids
    )
    found = bildung.generate(tiny_lm, PROMPT, new_tokens=8, beams=4, length_penalty=1.0, n_best=3)
    assert [(one.tokens, one.score) for one in found] == [(one.tokens, one.score) for one in searched]
    assert bildung.generate(tiny_lm, PROMPT, new_tokens=8, beams=4, length_penalty=1.0) == found[0].text
    assert found[0].text != bildung.generate(tiny_lm, PROMPT, new_tokens=8), "the beam finds another answer than greed"
    several = bildung.generate(tiny_lm, [PROMPT, "Four"], new_tokens=8, beams=4, length_penalty=1.0, n_best=3)
    assert [one.text for one in several[0]] == [one.text for one in found] and len(several[1]) == 3


def test_settings_of_the_beam_that_would_do_nothing_are_refused(tiny_lm: LanguageModel) -> None:
    with pytest.raises(SettingsError, match="one beam"):
        bildung.generate(tiny_lm, PROMPT, length_penalty=1.0)
    with pytest.raises(SettingsError, match="leave one of them out"):
        bildung.generate(tiny_lm, PROMPT, beams=2, temperature=1.0)
    with pytest.raises(SettingsError, match="n_best = 3 of 2 beams"):
        bildung.generate(tiny_lm, PROMPT, beams=2, n_best=3)
    with pytest.raises(SettingsError, match="length_penalty"):
        bildung.generate(tiny_lm, PROMPT, beams=2, lenght_penalty=1.0)


def test_the_command_prints_the_n_best_with_their_scores(
    tiny_lm: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bildung.save(tiny_lm, tmp_path / "model")
    with pytest.raises(SystemExit) as done:
        main(["generate", str(tmp_path / "model"), PROMPT, "--beams", "3", "--n-best", "2", "--new-tokens", "5"])
    assert done.value.code == 0
    found = bildung.generate(bildung.load(tmp_path / "model"), PROMPT, new_tokens=5, beams=3, n_best=2)
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    with pytest.raises(SystemExit) as refused:
        main(["generate", str(tmp_path / "model"), PROMPT, "--beams", "3", "--stop", ""])
    assert refused.value.code == 2 and "stop string is empty" in capsys.readouterr().err
    assert [(score, json.loads(text)) for score, text in lines] == [(f"{one.score:.4f}", one.text) for one in found]


def test_by_default_an_answer_ends_where_the_context_does(
    tiny_lm: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = from_dict({**tiny_lm.config.raw, "max_position_embeddings": 12})
    bildung.save(LanguageModel(build(config), tiny_lm.tokenizer, config), tmp_path / "small")
    room = 12 - len(tiny_lm.tokenizer.encode("abc"))
    run(["generate", str(tmp_path / "small"), "abc"])
    usual = capsys.readouterr().out
    run(["generate", str(tmp_path / "small"), "abc", "--new-tokens", str(room)])
    assert capsys.readouterr().out == usual
    with pytest.raises(SettingsError, match=f"ask for at most {room} new tokens"):
        run(["generate", str(tmp_path / "small"), "abc", "--new-tokens", str(room + 1)])
