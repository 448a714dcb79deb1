"""Let a model write: a text's continuation or an answer in a chat, whole or piece by piece as it comes.

    bildung generate DIR "The capital of France is" --new-tokens 16
    bildung generate DIR "Write a haiku" --chat --temperature 0.8 --seed 1

A prompt becomes token ids once; from there on only ids are appended. What is given back is the answer alone, without
the prompt, without the stop token, cut before the first stop string.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from torch import Tensor

from bildung.core.errors import DataError, SettingsError
from bildung.core.settings import settings
from bildung.model.kv_cache import KVCache
from bildung.run.decode import FORBIDDEN, Ids, LogitsRule, Sampling
from bildung.run.loop import decode_steps
from bildung.tokens.chat_template import encode_chat
from bildung.tokens.stream import StreamDecoder

if TYPE_CHECKING:
    from bildung.model.store import LanguageModel

Prompt = str | Sequence[Mapping[str, object]]

CONTEXT_OF_TEXT = 8  # so many tokens of the prompt decide how the answer's first one is written


@settings
class Command(Sampling):
    """Generating text."""

    directory: tyro.conf.Positional[Path]  # a model or adapter directory, or a .gguf file
    prompt: tyro.conf.Positional[str]  # the text to go on from, or with --chat the question
    new_tokens: int = 64  # length of the answer at most
    chat: bool = False  # the prompt is a user's turn, put through the model's chat template
    stop: tuple[str, ...] = ()  # end the answer before any of these texts


def command(settings: Command) -> None:
    """`bildung generate DIR PROMPT`: the answer, as it comes."""
    from bildung.model.store import load

    lm = load(settings.directory)
    ids = encode_prompt(lm, settings.prompt, settings.chat)
    for piece in stream(lm, ids, settings.new_tokens, sampling=settings, stop=settings.stop):
        print(piece, end="", flush=True)
    print()


def generate(
    lm: LanguageModel,
    prompt: Prompt,
    new_tokens: int = 32,
    *,
    chat: bool = False,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: str | Sequence[str] = (),
    seed: int = 0,
) -> str:
    """The model's answer to a text, or to a conversation (a list of messages, or a text with `chat`).

    temperature 0 is greedy decoding. Raises SettingsError for a value out of range and for a prompt that does not fit
    the model's context together with its answer; DataError for an empty prompt; ChatTemplateError without a template.
    """
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    return "".join(stream(lm, encode_prompt(lm, prompt, chat), new_tokens, sampling=sampling, stop=stop))


def encode_prompt(lm: LanguageModel, prompt: Prompt, chat: bool = False) -> list[int]:
    """Token ids of a text (BOS if the model uses one), or of a conversation up to where the assistant speaks."""
    if not isinstance(prompt, str) and (not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or not prompt):
        raise DataError(f"the prompt is {str(prompt)[:60]!r}; a text, or a list of at least one message, is expected.")
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
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise SettingsError("a stop string is empty; every text would end before its first character.")
    sampling = sampling or Sampling()
    rules = sampling.rules()
    if lm.config.vocab_size > lm.tokenizer.vocab_size:
        rules.append(_only_known(lm.tokenizer.vocab_size))
    decoder, held = StreamDecoder(lm.tokenizer, skip_special=True), ""
    decoder.context = list(ids[-CONTEXT_OF_TEXT:])
    stop_ids = lm.tokenizer.stop_ids
    for step in decode_steps(
        lm.model,
        [ids],
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


def _only_known(vocab_size: int) -> LogitsRule:
    """An unembedding may be padded to a round size; its last rows are no tokens."""

    def rule(logits_BV: Tensor, ids: Ids) -> Tensor:
        logits_BV = logits_BV.clone()
        logits_BV[:, vocab_size:] = FORBIDDEN
        return logits_BV

    return rule
