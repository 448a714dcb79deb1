"""Rehearsal: rows of earlier tasks are mixed into the new ones (Robins 1995, Connection Science 7, 123-146).

    share r of the FINAL mix    n_old = round(r / (1 - r) · n_new)      r = 0.1, 1000 new rows: 111 old ones
                                (100 old rows to 1000 new ones would be 9.1 %)

What is kept of earlier tasks is a memory of fixed size:

    balanced    every task has the same number of places, and within a task every class
    reservoir   every row ever seen has the same chance to be kept, without knowing how many will come (Vitter 1985,
                algorithm R): large tasks get more places

Or nothing is kept, and the model writes its own old rows (`generate`): before the task, the model that is about to
change writes a user's turn and answers it, and what it wrote is learned again (generative replay: Shin et al. 2017,
arXiv 1705.08690; with a language model as its own generator: Sun et al. 2019, LAMOL, arXiv 1909.03329). LAMOL trains a
generator token for each task; here the chat template's opening of a user's turn is prompt enough, as in Magpie (Xu et
al. 2024, arXiv 2406.08464).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from bildung.continual.method import Method, Now
from bildung.continual.tasks import Conversations, Row, Task
from bildung.core.errors import DataError, ModelFileError, SettingsError
from bildung.core.settings import settings
from bildung.evaluate.answers import chat_prompt
from bildung.model.store import LanguageModel
from bildung.run.decode import Sampling
from bildung.run.loop import decode
from bildung.tokens.chat_template import encode_chat
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.history import History

MEMORY, WRITTEN = "memory.json", "replay.json"
AT_ONCE = 16  # rows written at a time


@settings
class RehearsalSettings:
    """Rehearsal."""

    share: float = 0.2  # of old rows in the final mix
    memory: int = 200  # rows kept of all earlier tasks together
    buffer: Literal["balanced", "reservoir"] = "balanced"  # which rows are kept
    generate: bool = False  # keep none: the model writes old rows itself (conversations)
    temperature: float = 1.0  # generate: of the writing
    new_tokens: int = 128  # generate: most tokens of a turn

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share = {self.share}; it is a share of the final mix, between 0 and 1")
        if self.memory < 1 or self.new_tokens < 1 or self.temperature <= 0:
            raise ValueError("memory and new_tokens must be at least 1, and temperature above 0")


class Rehearsal(Method):
    """Old rows among the new ones."""

    def __init__(self, given: RehearsalSettings, rank: int | None = None):
        super().__init__(rank)
        self.given = given

    def rows(self, now: Now, lm: LanguageModel, task: Task) -> list[Row]:
        if now.number == 1:
            return task.rows
        wanted = replay_count(len(task.rows), self.given.share)
        if self.given.generate:
            if not isinstance(now.kind, Conversations):
                raise SettingsError(
                    "a classifier writes no texts, so generative replay needs conversations; rehearse from a memory."
                )
            old = self._written(now, lm, wanted)
        else:
            old = drawn(read_memory(now.source)[0], wanted, now.given.seed)
        now.job.measured["rehearsed_rows"] = len(old)
        now.job.measured["rehearsed_share"] = len(old) / (len(old) + len(task.rows))
        return [*task.rows, *old]

    def old_rows(self, now: Now, lm: LanguageModel) -> list[Row]:
        """The whole memory, or what the model wrote for this task."""
        if now.number == 1:
            return []
        if self.given.generate:
            return list(json.loads((now.job.out / WRITTEN).read_text(encoding="utf-8")))
        return read_memory(now.source)[0]

    def _written(self, now: Now, lm: LanguageModel, wanted: int) -> list[Row]:
        """The model's own conversations, written once: a run that goes on after a kill reads them again."""
        place = now.job.out / WRITTEN
        if place.exists():
            return list(json.loads(place.read_text(encoding="utf-8")))
        made = write_conversations(lm, wanted, self.given, now.given.seed + now.number)
        rewritten = place.with_name(f".{WRITTEN}")
        rewritten.write_text(json.dumps(made, indent=1), encoding="utf-8")
        rewritten.replace(place)
        return made

    def finish(self, now: Now, lm: LanguageModel, task: Task, history: History) -> None:
        if self.given.generate:
            return
        kept, seen = read_memory(now.source) if now.number > 1 else ([], 0)
        of_task = [{**row, "task": task.name} for row in task.rows]
        seed = f"memory {now.given.seed} {now.number}"
        if self.given.buffer == "reservoir":
            kept = reservoir(kept, seen, of_task, self.given.memory, seed)
        else:
            kept = balanced([*kept, *of_task], self.given.memory, seed)
        memory = {"seen": seen + len(of_task), "rows": kept}
        (now.job.out / MEMORY).write_text(json.dumps(memory, indent=1), encoding="utf-8")


def replay_count(new: int, share: float) -> int:
    """Old rows beside `new` ones so that they are `share` of all."""
    return round(share / (1 - share) * new)


def drawn(kept: Sequence[Row], count: int, seed: int) -> list[Row]:
    """So many of the kept rows in an order given by seed; each once before any comes again."""
    if not kept:
        raise DataError("the memory of earlier tasks is empty; nothing can be rehearsed.")
    draw = random.Random(f"rehearsal {seed}")
    rows: list[Row] = []
    while len(rows) < count:
        rows += draw.sample(list(kept), min(len(kept), count - len(rows)))
    return rows


def reservoir(kept: Sequence[Row], seen: int, new: Sequence[Row], places: int, seed: str) -> list[Row]:
    """Algorithm R: after n rows each is kept with chance places / n. seen: rows that came before `new`."""
    draw, rows = random.Random(seed), list(kept)
    for number, row in enumerate(new, start=seen):
        if len(rows) < places:
            rows.append(row)
        elif (place := draw.randrange(number + 1)) < places:
            rows[place] = row
    return rows


def balanced(rows: Sequence[Row], places: int, seed: str) -> list[Row]:
    """As equal a number of rows of every task, and within a task of every class, as there are."""
    draw = random.Random(seed)
    tasks: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        tasks.setdefault(row["task"], {}).setdefault(str(row.get("label", "")), []).append(row)
    queues = []
    for classes in tasks.values():
        for of_class in classes.values():
            draw.shuffle(of_class)
        queues.append(_in_turn(list(classes.values())))
    return _in_turn(queues)[:places]


def _in_turn(queues: Sequence[list[Row]]) -> list[Row]:
    """The first of each, then the second of each, ..."""
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[place] for place in range(longest) for queue in queues if place < len(queue)]


def read_memory(directory: Path) -> tuple[list[Row], int]:
    """(rows, how many were ever seen) that an earlier task left. Raises ModelFileError."""
    place = directory / MEMORY
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        return list(found["rows"]), int(found["seen"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{place} does not hold the rows of earlier tasks: {error}") from error


def write_conversations(lm: LanguageModel, count: int, given: RehearsalSettings, seed: int) -> list[Row]:
    """`count` conversations that the model writes: a user's turn after the template's opening of one, and its answer.

    Empty turns are left out and written anew. Raises SettingsError for a model without a chat template, DataError when
    it writes nothing usable.
    """
    if lm.tokenizer.chat_template is None:
        raise SettingsError("the model has no chat template, which generative replay needs to open a user's turn.")
    opening = user_opening(lm.tokenizer)
    made: list[Row] = []
    for attempt in range(4 * (1 + count // AT_ONCE)):
        if len(made) >= count:
            break
        sampling = Sampling(temperature=given.temperature, seed=seed * 10_007 + attempt)
        asked = [text for text in _texts(lm, [opening] * AT_ONCE, given, sampling) if text]
        prompts = [chat_prompt(lm.tokenizer, text) for text in asked]
        answered = _texts(lm, prompts, given, sampling) if prompts else []
        for question, answer in zip(asked, answered, strict=True):
            if answer:
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                made.append({"messages": turns})
    if len(made) < count:
        raise DataError(f"the model wrote {len(made)} usable conversations where {count} were wanted.")
    return made[:count]


def user_opening(tokenizer: Tokenizer) -> list[int]:
    """The tokens that two conversations have in common before the first word of their users."""
    one, other = (encode_chat(tokenizer, [{"role": "user", "content": content}]) for content in ("a", "Z"))
    same = next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[:same]


def _texts(lm: LanguageModel, prompts: list[list[int]], given: RehearsalSettings, sampling: Sampling) -> list[str]:
    room = lm.config.max_position_embeddings - max(map(len, prompts))
    found = decode(
        lm.model,
        prompts,
        new_tokens=min(given.new_tokens, room),
        choose=sampling.choose(),
        rules=sampling.rules(),
        stop_ids=lm.tokenizer.stop_ids,
    )
    stop = lm.tokenizer.stop_ids
    return [
        lm.tokenizer.decode([t for t in one.tokens if t not in stop and t < lm.tokenizer.vocab_size], skip_special=True)
        .replace("\ufffd", "")
        .strip()
        for one in found
    ]
