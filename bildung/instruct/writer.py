"""Who writes: a model directory, or an OpenAI-compatible endpoint; and a memory of what was written.

    LocalWriter       prompts -> run/write.py, a batch at a time
    EndpointWriter    prompts -> POST URL/completions, one after the other
    Remembering       either of them; every answer is on disk before the next question is asked

A program that draws its random numbers from a seed asks the same questions in the same order. So a run that broke off,
at a dead endpoint or a full disk, goes on by being run again: what was answered is read, what was not is asked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx2

from bildung.core.errors import BildungError, DataError, SettingsError
from bildung.model.store import LanguageModel
from bildung.run.decode import Sampling
from bildung.run.generate import encode_prompt
from bildung.run.write import answer_text, write

TRIES, FIRST_WAIT_S, TIMEOUT_S = 5, 1.0, 300.0
KEY = "OPENAI_API_KEY"  # environment variable with the endpoint's key, if it wants one


class EndpointError(BildungError):
    """An endpoint that did not answer as agreed."""


@dataclass(frozen=True)
class Reply:
    """What was written after a prompt. cut_off: because it was too long."""

    text: str
    cut_off: bool


@dataclass(frozen=True)
class Manner:
    """How to write. temperature 0: always the likeliest. presence_penalty: of tokens written before (OpenAI's)."""

    new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()


class Writer(Protocol):
    """Continues texts."""

    def write(self, prompts: Sequence[str], manner: Manner, seed: int) -> list[Reply]: ...


class LocalWriter:
    """A model of ours. chat: each prompt is a user's turn, put through the chat template."""

    def __init__(self, lm: LanguageModel, chat: bool = False):
        self.lm, self.chat = lm, chat

    def write(self, prompts: Sequence[str], manner: Manner, seed: int) -> list[Reply]:
        """All prompts in one batch."""
        ids = [encode_prompt(self.lm, prompt, self.chat) for prompt in prompts]
        sampling = Sampling(
            temperature=manner.temperature, top_p=manner.top_p, presence_penalty=manner.presence_penalty, seed=seed
        )
        found = write(self.lm.model, self.lm.tokenizer, ids, manner.new_tokens, sampling=sampling, stop=manner.stop)
        replies = []
        for prompt, (written, *_) in zip(ids, found, strict=True):
            whole = answer_text(self.lm.tokenizer, prompt, written.tokens)
            ended = written.tokens[-1:] and written.tokens[-1] in self.lm.tokenizer.stop_ids
            replies.append(Reply(written.text, not ended and len(written.text) == len(whole)))
        return replies


class EndpointWriter:
    """A server that speaks OpenAI's API. url: up to and with /v1. Raises EndpointError after several tries."""

    def __init__(self, url: str, model: str, chat: bool = False, wait_s: float = FIRST_WAIT_S):
        if not url.startswith(("http://", "https://")):
            raise SettingsError(f"endpoint = {url!r}; give a server's address, such as http://localhost:8000/v1.")
        self.url, self.model, self.chat, self.wait_s = url.rstrip("/"), model, chat, wait_s
        key = os.environ.get(KEY)
        self.client = httpx2.Client(timeout=TIMEOUT_S, headers={"Authorization": f"Bearer {key}"} if key else {})

    def write(self, prompts: Sequence[str], manner: Manner, seed: int) -> list[Reply]:
        """One after the other; an answer that came is not asked for again."""
        return [self._one(prompt, manner, seed + number) for number, prompt in enumerate(prompts)]

    def _one(self, prompt: str, manner: Manner, seed: int) -> Reply:
        asked = {
            "model": self.model,
            "max_tokens": manner.new_tokens,
            "temperature": manner.temperature,
            "presence_penalty": manner.presence_penalty,
            "seed": seed,
            **({"top_p": manner.top_p} if manner.top_p is not None else {}),
            **({"stop": list(manner.stop)} if manner.stop else {}),
            **({"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}),
        }
        place = f"{self.url}/{'chat/completions' if self.chat else 'completions'}"
        said = ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(self.wait_s * 2 ** (attempt - 1))
            try:
                answer = self.client.post(place, json=asked)
            except httpx2.HTTPError as error:
                said = f"{type(error).__name__}: {error}"
                continue
            said = f"status {answer.status_code}: {answer.text[:200]}"
            if answer.status_code == 200:
                return self._read(answer, place)
            if answer.status_code not in (408, 409, 429) and answer.status_code < 500:
                break  # asking again would not help
        if said.startswith(("status 401", "status 403")):
            said += (
                f"; the environment variable {KEY} holds the key, and is {'set' if KEY in os.environ else 'not set'}"
            )
        raise EndpointError(
            f"{place} did not answer ({said}). What was answered before is kept: run the same command again to go on."
        )

    def _read(self, answer: httpx2.Response, place: str) -> Reply:
        try:
            choice = answer.json()["choices"][0]
            text = choice["message"]["content"] if self.chat else choice["text"]
            return Reply(str(text or ""), choice.get("finish_reason") == "length")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EndpointError(f"{place} did not answer with a completion: {answer.text[:200]}") from error


class Remembering:
    """Answers from a file as far as it goes, then from a writer, each written down before it is used."""

    def __init__(self, writer: Writer, path: Path):
        self.writer, self.path, self.asked = writer, path, 0
        self.known: list[dict[str, object]] = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.known.append(json.loads(line))
                except ValueError:
                    break  # the line that was being written when the run broke off
            path.write_text("".join(json.dumps(row) + "\n" for row in self.known), encoding="utf-8")
        self.remembered = len(self.known)

    def write(self, prompts: Sequence[str], manner: Manner, seed: int) -> list[Reply]:
        """The replies, in order. Raises DataError when the file answers other questions."""
        replies: list[Reply] = []
        while len(replies) < len(prompts):
            digests = [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in prompts]
            if self.asked < len(self.known):
                row = self.known[self.asked]
                if row.get("prompt") != digests[len(replies)]:
                    raise DataError(f"{self.path} answers other questions than these; delete it to ask anew.")
                replies.append(Reply(str(row["text"]), bool(row["cut_off"])))
                self.asked += 1
                continue
            rest = self._ask(prompts[len(replies) :], digests[len(replies) :], manner, seed + len(replies))
            replies += rest
        return replies

    def _ask(self, prompts: Sequence[str], digests: Sequence[str], manner: Manner, seed: int) -> list[Reply]:
        # An endpoint answers one by one, and each answer may be the last.
        step = 1 if isinstance(self.writer, EndpointWriter) else len(prompts)
        replies: list[Reply] = []
        for start in range(0, len(prompts), step):
            new = self.writer.write(prompts[start : start + step], manner, seed + start)
            with self.path.open("a", encoding="utf-8") as file:
                for digest, reply in zip(digests[start : start + step], new, strict=True):
                    self.known.append({"prompt": digest, **dataclasses.asdict(reply)})
                    file.write(json.dumps(self.known[-1]) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.asked += len(new)
            replies += new
        return replies
