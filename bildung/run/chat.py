"""Talk to a model: in the terminal, with a history; or, in a recipe, from a script of prompts.

    bildung chat lives/smollm2/nf4
    /reset forget the conversation, not the system message   /system TEXT begin anew with another   /quit
    bildung chat lives/smollm2/base --adapters law=lives/law verse=lives/verse
    /use law   go on with this adapter (several: stacked; none: the model itself)

Each turn, the whole conversation is rendered by the model's own template. The KV cache of the turn before is kept as
far as the new token ids begin with the ids it holds, which is checked on the ids, not assumed. When the conversation
outgrows the model's context, the oldest turns are dropped, and that is said aloud.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from bildung.core.errors import BildungError, DataError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.model.base import CausalLM
from bildung.model.kv_cache import KVCache
from bildung.model.named_adapters import add_named, use_adapters
from bildung.model.packed import packed
from bildung.run.decode import Sampling
from bildung.run.generate import stream
from bildung.run.sources import answers_sources
from bildung.tokens.chat_template import encode_chat

if TYPE_CHECKING:
    from bildung.model.store import LanguageModel

TRANSCRIPT = "transcript.json"


@settings_class
class Settings(Sampling):
    """A scripted conversation."""

    prompts: tuple[str, ...]  # what the user says, turn by turn
    system: str | None = None  # the system message; default: the template's own
    new_tokens: int = 64  # length of an answer at most


@settings_class
class Command(Sampling):
    """A conversation in the terminal."""

    directory: tyro.conf.Positional[Path]  # a model or adapter directory, or a .gguf file
    system: str | None = None  # the system message; default: the template's own
    new_tokens: int = 256  # length of an answer at most
    adapters: tuple[str, ...] = ()  # NAME=DIRECTORY of adapters on the model, for /use NAME; at first none is used


class Conversation:
    """Messages so far, and the cache of what the model has read of them."""

    def __init__(self, lm: LanguageModel, new_tokens: int, sampling: Sampling, system: str | None = None):
        if answers_sources(lm.model):
            raise SettingsError(
                f"a {lm.config.model_type} answers a source and remembers no conversation; use `bildung generate`."
            )
        if not isinstance(lm.model, CausalLM):
            raise SettingsError(f"a {lm.config.model_type} of kind {lm.config.kind!r} does not continue text.")
        if lm.tokenizer.chat_template is None:
            raise SettingsError("this model has no chat template; `bildung generate` continues plain text.")
        if not 1 <= new_tokens < lm.config.max_position_embeddings:
            raise SettingsError(
                f"new_tokens = {new_tokens}; an answer must have at least 1 token and leave room for a question in the "
                f"model's context of {lm.config.max_position_embeddings}. Give new_tokens between, such as "
                f"{max(1, lm.config.max_position_embeddings // 4)}."
            )
        self.lm, self.new_tokens, self.sampling = lm, new_tokens, sampling
        self.context = lm.config.max_position_embeddings
        self.say: Callable[[str], None] = lambda text: None
        self.begin(system)

    def begin(self, system: str | None = None) -> None:
        """Forget everything; start with a system message, if given."""
        self.system = system
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self.cache: KVCache | None = None
        self.cached: list[int] = []

    def use(self, *names: str) -> None:
        """Go on with these adapters; what others have read is read again. Raises AdapterError for an unknown name."""
        use_adapters(self.lm.model, *names)
        self.cache, self.cached = None, []

    def ask(self, text: str) -> Iterator[str]:
        """The answer to a user's turn, in pieces. A turn cut short by Ctrl-C keeps what was said."""
        if not text.strip():
            raise DataError("an empty question; say something, or /quit.")
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._fitting_ids()
        except BildungError:
            self.messages.pop()
            raise
        cache = self._cache_for(ids)
        said: list[str] = []
        generated: list[int] = []
        try:
            for piece in stream(
                self.lm, ids, self.new_tokens, sampling=self.sampling, kv_cache=cache, generated=generated
            ):
                said.append(piece)
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})
            self.cached = [*ids, *generated][: cache.length]

    def _fitting_ids(self) -> list[int]:
        """The conversation's token ids; drops the oldest question and answer until an answer fits behind them."""
        kept, dropped = list(self.messages), 0
        while True:
            ids = encode_chat(self.lm.tokenizer, kept, add_generation_prompt=True)
            if len(ids) + self.new_tokens <= self.context:
                self.messages = kept
                if dropped:
                    gone = "the oldest turn was" if dropped == 1 else f"the oldest {dropped} turns were"
                    self.say(f"(the conversation outgrew {self.context} tokens: {gone} dropped)")
                return ids
            first = 1 if kept[0]["role"] == "system" else 0
            if len(kept) - first <= 1:
                raise DataError(
                    f"this question has {len(ids)} tokens; with an answer of {self.new_tokens} it does not fit the "
                    f"model's context of {self.context}. Make it shorter."
                )
            del kept[first : first + 2]
            dropped += 1

    def _cache_for(self, ids: list[int]) -> KVCache:
        """The old cache, rewound to what `ids` share with it; a larger or empty one where that does not do."""
        # A prompt that is read in both directions is another one as soon as it is longer: nothing of it is kept.
        shared, kept = 0, [] if self.lm.model.prefix_lm else self.cached
        while shared < min(len(kept), len(ids) - 1) and kept[shared] == ids[shared]:
            shared += 1
        needed = len(ids) + self.new_tokens
        if self.cache is None or self.cache.max_length < needed:
            shared = 0
            self.cache = self.lm.model.kv_cache(1, min(self.context, max(2 * needed, 1024)))
        self.cache.length = shared
        return self.cache


def chat(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """A scripted conversation: out/transcript.json holds the turns, the record the pairs of prompt and answer.

    Raises SettingsError without prompts or chat template, DataError for an empty prompt or one that does not fit.
    """
    if not settings.prompts:
        raise SettingsError("prompts is empty; give at least one thing to say.")

    def work(job: Job) -> None:
        from bildung.model.store import load

        conversation = Conversation(load(source), settings.new_tokens, settings, settings.system)
        conversation.say = job.notes.append
        with packed(conversation.lm.model):  # once, not in each turn
            answers = ["".join(conversation.ask(prompt)) for prompt in settings.prompts]
        turns = list(zip(settings.prompts, answers, strict=True))
        messages = [("system", settings.system)] if settings.system else []
        messages += [(role, said) for turn in turns for role, said in zip(("user", "assistant"), turn, strict=True)]
        text = json.dumps([{"role": role, "content": said} for role, said in messages], indent=2, ensure_ascii=False)
        (job.out / TRANSCRIPT).write_text(text + "\n", encoding="utf-8")  # with the turns that the context had dropped
        job.measured["conversation"] = [{"prompt": prompt, "answer": answer} for prompt, answer in turns]

    return perform("chat", source, out, settings, work, force=force)


def command(settings: Command) -> None:
    """`bildung chat DIR`: read, answer, until /quit or the end of input."""
    from bildung.model.store import load

    conversation = Conversation(load(settings.directory), settings.new_tokens, settings, settings.system)
    conversation.say = lambda text: print(text, file=sys.stderr)
    print("/reset begins anew, /system TEXT with a system message, /quit or Ctrl-D ends; Ctrl-C stops an answer.")
    if settings.adapters:
        names = add_named(conversation.lm, settings.adapters)
        print(f"/use NAME goes on with an adapter ({', '.join(names)}), /use with the model itself.")
        conversation.use()
    with packed(conversation.lm.model):  # once, not in each turn
        _converse(conversation)


def _converse(conversation: Conversation) -> None:
    while True:
        try:
            line = input("\nyou: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word in ("/reset", "/system"):
            conversation.begin(conversation.system if word == "/reset" else rest.strip() or None)
            print("(a new conversation)")
        elif word == "/use":
            _use(conversation, rest.split())
        elif word.startswith("/"):
            print(f"{word} is not known; there are /reset, /system TEXT, /use NAME, /quit.")
        elif line:
            _answer(conversation, line)


def _use(conversation: Conversation, names: list[str]) -> None:
    try:
        conversation.use(*names)
        print(f"(with {' and '.join(names) or 'the model itself'})")
    except BildungError as error:
        print(f"({error})")


def _answer(conversation: Conversation, line: str) -> None:
    print("\nmodel: ", end="", flush=True)
    pieces = conversation.ask(line)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        print(" (stopped; the history keeps it)")
    except BildungError as error:
        print(f"({error})")
