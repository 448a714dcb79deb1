"""Adapters by name on the command line: side by side in `generate`, switched in `chat`."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest

import bildung
from bildung.core.errors import SettingsError
from bildung.model.linear import match_linears
from bildung.model.low_rank import LowRank
from bildung.run import chat, generate


@pytest.fixture
def named(tiny_lm_directory: Path, tmp_path: Path) -> tuple[str, ...]:
    for name, seed in (("law", 1), ("verse", 2)):
        lm = bildung.load(tiny_lm_directory)
        for linear in match_linears(lm.model, "all").values():
            linear.deltas["default"] = LowRank(linear.in_features, linear.out_features, 2, 1.0)
            linear.deltas["default"].lora_B.data.normal_(0.0, 0.2 * seed)
        bildung.save(lm, tmp_path / name)
    return tuple(f"{name}={tmp_path / name}" for name in ("law", "verse"))


def test_generate_prints_the_answers_side_by_side(
    tiny_lm_directory: Path, named: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    generate.command(generate.Command(directory=tiny_lm_directory, prompt="The capital", new_tokens=5, adapters=named))
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == ["the model itself", "law", "verse"]
    places = [tiny_lm_directory, *(one.partition("=")[2] for one in named)]
    alone = [bildung.generate(bildung.load(place), "The capital", new_tokens=5) for place in places]
    assert [json.loads(text) for _, text in lines] == alone and len(set(alone)) == 3


def test_chat_goes_on_with_another_adapter(
    tiny_lm_directory: Path,
    named: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = iter(["/use verse", "Hello", "/use nobody", "/use law verse", "/use", "/quit"])
    monkeypatch.setattr(builtins, "input", lambda _: next(said))
    chat.command(chat.Command(directory=tiny_lm_directory, new_tokens=4, adapters=named))
    out = capsys.readouterr().out
    assert "/use NAME goes on with an adapter (law, verse)" in out
    for line in ("(with verse)", "no adapter is called 'nobody'", "(with law and verse)", "(with the model itself)"):
        assert line in out
    verse = bildung.load(named[1].partition("=")[2])
    assert bildung.generate(verse, "Hello", chat=True, new_tokens=4) in out


def test_the_cache_of_one_adapter_is_not_anothers(tiny_lm_directory: Path, named: tuple[str, ...]) -> None:
    conversation = chat.Conversation(bildung.load(tiny_lm_directory), 4, generate.Sampling())
    for one in named:
        bildung.add_adapter(conversation.lm, one.partition("=")[2], one.partition("=")[0])
    conversation.use("law")
    "".join(conversation.ask("Hello"))
    conversation.use("verse")
    answer = "".join(conversation.ask("And now?"))
    verse = bildung.load(named[1].partition("=")[2])
    assert answer == bildung.generate(verse, conversation.messages[:-1], new_tokens=4)


def test_bad_requests(tiny_lm_directory: Path, named: tuple[str, ...]) -> None:
    asked = dict(directory=tiny_lm_directory, prompt="x", new_tokens=2)
    with pytest.raises(SettingsError, match="NAME=DIRECTORY"):
        generate.command(generate.Command(**asked, adapters=("lives/law",)))
    with pytest.raises(SettingsError, match="without beams"):
        generate.command(generate.Command(**asked, adapters=named, beams=2))
