"""Let a model write: a text's continuation or an answer in a chat, whole or piece by piece as it comes.

    bildung generate DIR "The capital of France is" --new-tokens 16
    bildung generate DIR "Write a haiku" --chat --temperature 0.8 --seed 1
    bildung generate DIR "Once upon a time" --beams 4 --n-best 4
    bildung generate DIR "Write a haiku" --adapters law=lives/law verse=lives/verse       all answers, in one batch
    bildung generate DIR "I think" --steer lives/happy --strength 4       a steering vector of `bildung look steering`
    bildung generate lives/g2p/model "c a t"                  an encoder-decoder reads the text and writes its answer

A prompt becomes token ids once; from there on only ids are appended. What is given back is the answer alone, without
the prompt, without the stop token, cut before the first stop string.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from bildung.core.errors import DataError, SettingsError
from bildung.core.settings import resolve, settings
from bildung.data.seq2seq import encode_source
from bildung.model.kv_cache import KVCache
from bildung.run.beam import Beam
from bildung.run.decode import Sampling, only_known
from bildung.run.loop import decode_steps
from bildung.run.sources import answers_sources, reading
from bildung.run.write import CONTEXT_OF_TEXT, write
from bildung.tokens.chat_template import encode_chat
from bildung.tokens.stream import StreamDecoder

if TYPE_CHECKING:
    from bildung.model.store import LanguageModel

Prompt = str | Sequence[Mapping[str, object]]
USUAL_LENGTH = 64  # tokens of an answer


@settings
class Command(Sampling, Beam):
    """Generating text."""

    directory: tyro.conf.Positional[Path]  # a model or adapter directory, or a .gguf file
    prompt: tyro.conf.Positional[str]  # the text to go on from, or with --chat the question
    new_tokens: int | None = None  # length of the answer at most; default: 64, or fewer if the context ends before
    chat: bool = False  # the prompt is a user's turn, put through the model's chat template
    stop: tuple[str, ...] = ()  # end the answer before any of these texts
    adapters: tuple[str, ...] = ()  # NAME=DIRECTORY of adapters on the model: each answers beside the model itself
    steer: Path | None = None  # a steering vector: what is added to an activation while the model reads and writes
    strength: float = 1.0  # how many times it is added
    steer_at: str = ""  # where: "[:, -1:]" is from the prompt's last token on; default: everywhere


def command(settings: Command) -> None:
    """`bildung generate DIR PROMPT`: the answer, as it comes."""
    from bildung.model.steering import read_steering, steered
    from bildung.model.store import load

    lm = load(settings.directory)
    if settings.steer is None:
        return _answer(lm, settings)
    with steered(lm, read_steering(settings.steer), settings.strength, at=settings.steer_at):
        return _answer(lm, settings)


def _answer(lm: LanguageModel, settings: Command) -> None:
    ids = encode_prompt(lm, settings.prompt, settings.chat)
    read = 1 if answers_sources(lm.model) else len(ids)
    room = max(1, min(USUAL_LENGTH, lm.config.max_position_embeddings - read))
    new_tokens = room if settings.new_tokens is None else settings.new_tokens
    if settings.adapters:
        return _side_by_side(lm, ids, new_tokens, settings)
    if (beam := _beam(vars(settings))) != Beam():
        stop = _stops(settings.stop)
        found = write(lm.model, lm.tokenizer, [ids], new_tokens, sampling=settings, beam=beam, stop=stop)
        for one in found[0]:
            print(one.text if settings.n_best == 1 else f"{one.score:.4f}\t{json.dumps(one.text, ensure_ascii=False)}")
        return
    for piece in stream(lm, ids, new_tokens, sampling=settings, stop=settings.stop):
        print(piece, end="", flush=True)
    print()


def _side_by_side(lm: LanguageModel, ids: list[int], new_tokens: int, settings: Command) -> None:
    """The answers of the model and of each adapter on it, one a line."""
    from bildung.model.named_adapters import adapters_by_row, add_named

    if (beam := _beam(vars(settings))) != Beam():
        raise SettingsError("adapters answer side by side without beams; search with one at a time.")
    rows = [None, *add_named(lm, settings.adapters)]
    with adapters_by_row(lm.model, rows):
        found = write(
            lm.model,
            lm.tokenizer,
            [ids] * len(rows),
            new_tokens,
            sampling=settings,
            beam=beam,
            stop=_stops(settings.stop),
        )
    for name, (answer, *_) in zip(rows, found, strict=True):
        print(f"{name or 'the model itself'}\t{json.dumps(answer.text, ensure_ascii=False)}")


def generate(
    lm: LanguageModel,
    prompt: Prompt | Sequence[Prompt],
    new_tokens: int = 32,
    *,
    chat: bool = False,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    n_best: int | None = None,
    **beam: Any,
) -> Any:
    """The model's answer (a str) to a text, or to a conversation (a list of messages, or a text with `chat`).

    A list of texts, or of conversations, is answered in one batch by the list of their answers. temperature 0 is greedy
    decoding; what the settings of sampling mean is in run/decode.py. beams, length_penalty and the other settings of
    run/beam.py search instead; with n_best = N an answer becomes the list of the N best, each with .text, .score and
    .log_prob.
    Raises SettingsError for a value out of range and for a prompt that does not fit the model's context together with
    its answer; DataError for an empty prompt; ChatTemplateError without a template.
    """
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
    )
    searched = _beam({**beam, "n_best": 1 if n_best is None else n_best}, strict=True)
    several = isinstance(prompt, list | tuple) and bool(prompt) and not isinstance(prompt[0], Mapping)
    if not several and n_best is None and searched == Beam():
        ids = encode_prompt(lm, prompt, chat)  # type: ignore[arg-type]
        return "".join(stream(lm, ids, new_tokens, sampling=sampling, stop=stop))
    prompts = [encode_prompt(lm, one, chat) for one in (prompt if several else [prompt])]  # type: ignore[arg-type]
    found = write(lm.model, lm.tokenizer, prompts, new_tokens, sampling=sampling, beam=searched, stop=_stops(stop))
    answers = [written[0].text if n_best is None else written for written in found]
    return answers if several else answers[0]


def _beam(given: Mapping[str, Any], strict: bool = False) -> Beam:
    """The settings of beam search among others."""
    return resolve(Beam, given if strict else {field.name: given[field.name] for field in fields(Beam)})


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise SettingsError("a stop string is empty; every text would end before its first character.")
    return stop


def encode_prompt(lm: LanguageModel, prompt: Prompt, chat: bool = False) -> list[int]:
    """Token ids of a text (BOS if the model uses one), or of a conversation up to where the assistant speaks; for a
    model that answers sources, of a text with what stands around a source."""
    if not isinstance(prompt, str) and (not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not prompt):
        raise DataError(f"the prompt is {str(prompt)[:60]!r}; a text, or a list of at least one message, is expected.")
    if answers_sources(lm.model) or getattr(lm.config, "prefix_lm", None) == "source":
        if chat or not isinstance(prompt, str):
            raise SettingsError(
                f"a {lm.config.model_type} reads a source and writes a target, and leads no conversation; give it a "
                f"text, without chat."
            )
        return encode_source(lm.tokenizer, prompt)
    if isinstance(prompt, str) and not chat:
        ids = lm.tokenizer.encode(prompt)
        if not ids:
            raise DataError("the prompt is empty and this model has no token that begins a text; give at least a word.")
        return ids
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return encode_chat(lm.tokenizer, messages, add_generation_prompt=True)


def stream(
    lm: LanguageModel,
    ids: Sequence[int],
    new_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop: str | Sequence[str] = (),
    kv_cache: KVCache | None = None,
    generated: list[int] | None = None,
) -> Iterator[str]:
    """The answer to a prompt of token ids in pieces, each of whole characters; joined they are `generate`'s text.

    The text is what the answer adds to the prompt's text: a SentencePiece answer " Paris" keeps its space.
    A piece that may be the beginning of a stop string is held back until that is decided. kv_cache: one that holds a
    beginning of `ids`, to go on with. generated: a list that receives the ids as they come, the stop token included.
    """
    stop = _stops(stop)
    sampling = sampling or Sampling()
    model, prompts, own_rules = reading(lm.model, [ids])
    rules = [*own_rules, *sampling.rules()]
    if lm.config.vocab_size > lm.tokenizer.vocab_size:
        rules.append(only_known(lm.tokenizer.vocab_size))
    decoder, held = StreamDecoder(lm.tokenizer, skip_special=True), ""
    decoder.context = prompts[0][-CONTEXT_OF_TEXT:]
    stop_ids = lm.tokenizer.stop_ids
    for step in decode_steps(
        model,
        prompts,
        new_tokens=new_tokens,
        choose=sampling.choose(),
        rules=rules,
        stop_ids=stop_ids,
        kv_cache=kv_cache,
    ):
        token = step.tokens[0]
        if generated is not None:
            generated.append(token)
        if token in stop_ids:
            break
        held += decoder.push(token)
        if (end := _first(held, stop)) is not None:
            yield held[:end]
            return
        safe = len(held) - _may_become(held, stop)
        if safe:
            yield held[:safe]
            held = held[safe:]
    held += decoder.flush()
    end = _first(held, stop)
    if held[:end]:
        yield held[:end]


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    return min((at for one in stop if (at := text.find(one)) >= 0), default=None)


def _may_become(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    return max((n for one in stop for n in range(1, min(len(one), len(text) + 1)) if text.endswith(one[:n])), default=0)
