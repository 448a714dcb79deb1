"""A conversation keeps its history and its cache, drops its oldest turns aloud, and can be scripted."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path

import pytest

import bildung
from bildung.core.errors import DataError, SettingsError
from bildung.model.decoder_classifier import DecoderClassifier
from bildung.model.store import LanguageModel
from bildung.model.transformer import Decoder
from bildung.run import chat
from bildung.run.chat import Command, Conversation, Settings
from bildung.run.decode import Sampling

QUESTIONS = ["Hello there.", "What is the capital of France?", "And of Italy?"]


def ask(conversation: Conversation, text: str) -> str:
    return "".join(conversation.ask(text))


def test_a_turn_equals_generating_from_the_whole_history(tiny_lm: LanguageModel) -> None:
    conversation = Conversation(tiny_lm, 8, Sampling(), system="Be kind.")
    history = [{"role": "system", "content": "Be kind."}]
    for question in QUESTIONS:
        history.append({"role": "user", "content": question})
        expected = bildung.generate(tiny_lm, history, new_tokens=8)
        assert ask(conversation, question) == expected
        history.append({"role": "assistant", "content": expected})
    assert conversation.messages == history


def test_the_cache_is_reused_as_far_as_the_ids_agree(tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    hidden = Decoder.hidden

    def counting(self: Decoder, tokens_BL, **given):  # type: ignore[no-untyped-def]
        read.append(tokens_BL.shape[1])
        return hidden(self, tokens_BL, **given)

    monkeypatch.setattr(Decoder, "hidden", counting)
    conversation = Conversation(tiny_lm, 4, Sampling())
    ask(conversation, QUESTIONS[0])
    first = read[0]
    read.clear()
    ask(conversation, QUESTIONS[0])
    assert read[0] < 2 * first  # without the cache: the first turn, its answer and the second turn


def test_the_oldest_turns_go_when_the_context_is_full(tiny_lm: LanguageModel) -> None:
    conversation = Conversation(tiny_lm, 8, Sampling(), system="Be kind.")
    said: list[str] = []
    conversation.say = said.append
    for number in range(40):
        ask(conversation, f"{number}: {QUESTIONS[1]}")
        if said:
            break
    assert "outgrew" in said[0]
    assert conversation.messages[0]["role"] == "system" and not conversation.messages[1]["content"].startswith("0:")
    with pytest.raises(DataError, match="does not fit"):
        ask(conversation, "word " * 2000)
    assert conversation.messages[-1]["role"] == "assistant"


def test_a_stopped_answer_stays_in_the_history(tiny_lm: LanguageModel) -> None:
    conversation = Conversation(tiny_lm, 20, Sampling(temperature=1.0, seed=3))
    pieces = conversation.ask(QUESTIONS[0])
    said = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    assert ask(conversation, QUESTIONS[1]) is not None


def test_scripted_conversation_is_an_operation(tiny_lm_directory: Path, tmp_path: Path) -> None:
    record = chat.chat(tiny_lm_directory, tmp_path / "out", Settings(prompts=tuple(QUESTIONS), new_tokens=6))
    messages = json.loads((tmp_path / "out/transcript.json").read_text())
    assert [m["content"] for m in messages if m["role"] == "user"] == QUESTIONS
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert [turn["answer"] for turn in record.measured["conversation"]] == answers
    long = [f"number {n}, and some more words after it, to fill the context" for n in range(7)]
    record = chat.chat(tiny_lm_directory, tmp_path / "long", Settings(prompts=tuple(long), new_tokens=4, system="Hm."))
    whole = json.loads((tmp_path / "long/transcript.json").read_text())
    assert "the oldest turn was dropped" in record.notes[0] and whole[0] == {"role": "system", "content": "Hm."}
    assert [m["content"] for m in whole if m["role"] == "user"] == long and len(whole) == 1 + 2 * len(long)
    with pytest.raises(SettingsError, match="prompts is empty"):
        chat.chat(tiny_lm_directory, tmp_path / "none", Settings(prompts=()))


def test_the_terminal(
    tiny_lm_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["", "Hello there.", "/reste", "/system Be brief.", "Hello there.", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    chat.command(Command(directory=tiny_lm_directory, new_tokens=4))
    shown = capsys.readouterr().out
    assert shown.count("model: ") == 2 and "/reste is not known" in shown and "a new conversation" in shown


def test_a_reset_keeps_the_system_message(tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(tiny_lm, 2, Sampling(), "Be brief.")
    lines = iter(["Hello.", "/reset", "Hello.", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    chat._converse(conversation)
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant"]
    with pytest.raises(SettingsError, match=r"new_tokens = 256.* Give new_tokens between, such as 64"):
        Conversation(tiny_lm, 256, Sampling())


def test_a_classifier_does_not_talk(tiny_lm: LanguageModel) -> None:
    with pytest.raises(SettingsError, match="kind 'classifier' does not continue text"):
        config = replace(tiny_lm.config, kind="classifier")
        Conversation(replace(tiny_lm, model=DecoderClassifier.over(tiny_lm.model), config=config), 8, Sampling())


def test_models_without_a_template_are_refused(tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_lm.tokenizer, "chat_template", None)
    with pytest.raises(SettingsError, match="no chat template"):
        Conversation(tiny_lm, 8, Sampling())
