"""Tasks: a task file becomes questions, these become examples that can be scored, and their scores items of a metric.

    rows --load_task--> questions --encode--> examples --likelihood.score--> scores --measure--> {metric: item}

A few-shot question begins with other, answered questions, drawn anew for each one by (seed, its own row): never itself,
and independent of how many others are asked. (lm-eval draws from one generator in the order of the documents.) When
only `limit` documents are taken, they are drawn at random by the seed, so that a file sorted by label is no trap;
lm-eval takes the first ones.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bildung.core.errors import DataError, nearest
from bildung.core.record import hash_file
from bildung.data.examples import Example
from bildung.data.rows import Row, Unusable
from bildung.data.sources import fingerprint, rows
from bildung.data.text import Message, conversation
from bildung.evaluate import task_file
from bildung.evaluate.likelihood import Score, encode_pair, rolling
from bildung.evaluate.metrics import Item, exact_match
from bildung.evaluate.sequence_metrics import SEQUENCE_METRICS, sequence_item
from bildung.evaluate.task_file import TaskFile, choices_of, metrics_of, sources_of, target_of, text_of
from bildung.tokens.chat_template import encode_conversation
from bildung.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """One item of a task. `answers`: what is scored (choices, target, text) or, for generate_until, what is right."""

    context: str
    answers: tuple[str, ...]
    right: tuple[int, ...] = (0,)  # which of the choices
    messages: tuple[Message, ...] = ()  # chat_loglikelihood


@dataclass
class Task:
    """The questions of one task file. `notes`: what was left out or shortened on the way, for people to read."""

    file: TaskFile
    questions: list[Question]
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.file.task

    @property
    def version(self) -> Any:
        return self.file.metadata.get("version")

    @cached_property
    def hash(self) -> str:
        """Of everything the model is asked: documents, examples, templates. Equal hashes can be paired item by item."""
        asked = [[q.context, q.answers, q.right, q.messages] for q in self.questions]
        text = json.dumps([self.file.output_type, self.file.target_delimiter, asked], ensure_ascii=False)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]

    @property
    def generates(self) -> bool:
        """Whether the model has to write an answer; otherwise answers are scored."""
        return self.file.output_type == "generate_until"

    @property
    def is_chat(self) -> bool:
        """Whether it needs a chat template."""
        return self.file.output_type == "chat_loglikelihood"


def load_task(name: str, *, limit: int | None = None, seed: int = 0) -> Task:
    """A packaged task by name, or any task file by path.

    limit   at most that many questions; None: metadata.limit of the file, else all
    Raises DataError and SettingsError, naming the file, when it or its data cannot be used.
    """
    path = task_file.find_task_file(name)
    file = task_file.read_task_file(path)
    split = file.test_split or file.validation_split
    documents, notes = read_documents(path, file, split)
    limit = file.metadata.get("limit") if limit is None else limit
    chosen = draw_documents(documents, limit, f"{seed} {file.task}")
    pool: list[Row] = []
    if file.num_fewshot:
        shots_split = file.fewshot_split or file.training_split or split
        pool = documents if shots_split == split else read_documents(path, file, shots_split)[0]
        pool = [row for row in pool if file.output_type != "multiple_choice" or is_answered(file, row)]
    try:
        questions = [_question(file, row, _shots(file, row, pool, seed)) for row in chosen]
    except (DataError, Unusable) as error:
        raise DataError(f"{path}: {error}") from None
    return Task(file, questions, notes)


def data_of(name: str) -> dict[str, str]:
    """{file or source: sha256} of the task file and everything it reads, for the inputs of an operation."""
    path = task_file.find_task_file(name)
    file = task_file.read_task_file(path)
    hashes = {path.name: hash_file(path)}
    splits = {file.test_split or file.validation_split}
    if file.num_fewshot:
        splits.add(file.fewshot_split or file.training_split or file.test_split or file.validation_split)
    for split in splits:
        for source, its_split in sources_of(path, file, split):
            hashes |= fingerprint(source, its_split)
    # What comes with bildung has the same name wherever it is installed.
    return {name.removeprefix(f"{task_file.PACKAGED}/"): digest for name, digest in hashes.items()}


def read_documents(path: Path, file: TaskFile, split: str | None) -> tuple[list[Row], list[str]]:
    """(the rows of a task's split, a note for each source some of whose rows could not be used).

    split: of the source; None where it has none. Of chat_loglikelihood a row is {"messages": its conversation}. Raises
    DataError for a source that cannot be read or has no row that can be used.
    """
    documents: list[Row] = []
    notes: list[str] = []
    for source, its_split in sources_of(path, file, split):
        read = rows(source, split=its_split)
        if file.output_type == "chat_loglikelihood":
            read = read.then(lambda row: {"messages": conversation(row)})
        documents += read
        if report := read.report():
            notes.append(f"{file.task}: {source}: {report}")
    return documents, notes


def draw_documents(documents: list[Row], limit: Any, seed: str) -> list[Row]:
    """`limit` of the documents, drawn by the seed and in the order they have; all of them where there are no more.

    Raises DataError for a limit that is no whole number from 1, or None.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise DataError(f"limit = {limit!r}: at least 1 document, or None for all")
    if limit is None or limit >= len(documents):
        return documents
    return [documents[index] for index in sorted(random.Random(seed).sample(range(len(documents)), limit))]


def _shots(file: TaskFile, row: Row, pool: list[Row], seed: int) -> list[Row]:
    """The answered questions shown before `row`."""
    if not file.num_fewshot:
        return []
    drawn = random.Random(f"{seed} {json.dumps(row, sort_keys=True, default=str)}").sample(range(len(pool)), len(pool))
    others = (pool[index] for index in drawn if pool[index] != row)
    shots = [other for _, other in zip(range(file.num_fewshot), others, strict=False)]
    if len(shots) < file.num_fewshot:
        raise DataError(f"num_fewshot = {file.num_fewshot} and only {len(shots)} other documents to take them from")
    return shots


def _question(file: TaskFile, row: Row, shots: list[Row]) -> Question:
    if file.output_type == "chat_loglikelihood":
        return Question("", (), messages=tuple(row["messages"]))
    if file.output_type == "loglikelihood_rolling":
        return Question("", (str(target_of(file, row)),))
    shown = [f"{text_of(file, shot)}{file.target_delimiter}{_solution(file, shot)}" for shot in shots]
    context = file.description + "".join(text + file.fewshot_delimiter for text in shown) + text_of(file, row)
    if file.output_type == "multiple_choice":
        return Question(context, tuple(choices_of(file, row)), right_choices(file, row))
    target = target_of(file, row)
    answers = tuple(map(str, target)) if isinstance(target, list) and file.output_type == "generate_until" else None
    return Question(context, answers or (_solution(file, row),))


def right_choices(file: TaskFile, row: Row) -> tuple[int, ...]:
    """The numbers of the right choices."""
    choices, target = choices_of(file, row), target_of(file, row)
    right = []
    for one in target if isinstance(target, list) else [target]:
        if isinstance(one, str) and one not in choices:
            raise DataError(f"doc_to_target gives {one!r}, which is none of {choices}. {nearest(one, choices)}")
        number = choices.index(one) if isinstance(one, str) else one
        if not isinstance(number, int) or not 0 <= number < len(choices):
            raise DataError(f"doc_to_target gives {one!r}; there are choices 0 to {len(choices) - 1}")
        right.append(number)
    return tuple(right)


def _solution(file: TaskFile, row: Row) -> str:
    """The right answer as it is shown in an example."""
    if file.output_type == "multiple_choice":
        return choices_of(file, row)[right_choices(file, row)[0]]
    target = target_of(file, row)
    if isinstance(target, int) and file.doc_to_choice is not None:
        return choices_of(file, row)[target]
    return str(target[0] if isinstance(target, list) and target else target)


def encode(task: Task, question: Question, tokenizer: Tokenizer, context: int) -> tuple[list[Example], bool]:
    """What has to be scored for a question: one example per choice, one per window of a text, or one; and whether
    something had to be cut off.

    context: longest input in tokens. Texts are cut into windows and lose nothing; a question that is too long loses its
    beginning, as in lm-eval; a conversation its end, as in training. Without anything left to score, no example.
    """
    if task.is_chat:
        tokens, mask = encode_conversation(tokenizer, list(question.messages))
        mask = [False, *mask[1 : context + 1]]
        return [Example(tokens[: context + 1], mask)] if any(mask) else [], len(tokens) > context + 1
    if task.file.output_type == "loglikelihood_rolling":
        return rolling(tokenizer, question.answers[0], context), False
    # As in lm-eval, a loglikelihood target follows its context as it stands; only choices get the delimiter.
    delimiter = task.file.target_delimiter if task.file.output_type == "multiple_choice" else ""
    whole = [encode_pair(tokenizer, question.context, delimiter + answer) for answer in question.answers]
    if (longest := max(example.num_targets for example in whole)) > context:
        raise DataError(f"{task.name}: an answer of {longest} tokens does not fit the context of {context}")
    fitted = [Example(example.tokens[-context - 1 :], example.loss_mask[-context - 1 :]) for example in whole]
    return fitted, any(len(example) > context + 1 for example in whole)


def measure(task: Task, question: Question, scores: Sequence[Score]) -> dict[str, Item]:
    """{metric: item} of one question, from the scores of its examples."""
    kind, nats = task.file.output_type, -sum(score.logprob for score in scores)
    if kind == "multiple_choice":
        logprobs = [score.logprob for score in scores]
        # lm-eval's acc_norm: per character of the choice, the delimiter not counted.
        per_character = [score.logprob / len(a) for score, a in zip(scores, question.answers, strict=True)]
        right = question.right
        return {"acc": float(_argmax(logprobs) in right), "acc_norm": float(_argmax(per_character) in right)}
    if kind == "loglikelihood":
        # lm-eval's perplexity of a target is per target, not per token (LAMBADA: one word).
        return {"perplexity": (nats, 1), "acc": float(scores[0].is_greedy)}
    items: dict[str, Item] = {"perplexity": (nats, sum(score.count for score in scores))}
    if kind == "loglikelihood_rolling":
        text = question.answers[0]
        num_bytes = len(text.encode())
        items["word_perplexity"] = (nats, len(re.split(r"\s+", text)))
        items["byte_perplexity"] = (nats, num_bytes)
        items["bits_per_byte"] = (nats / LOG_2, num_bytes)
    return items


LOG_2 = 0.6931471805599453


def measure_answer(task: Task, question: Question, answer: str) -> dict[str, Item]:
    """{metric: item} of a generated answer; any of several right answers counts."""
    items: dict[str, Item] = {}
    for entry in metrics_of(task.file):
        if entry.metric in SEQUENCE_METRICS:
            items[entry.metric] = sequence_item(entry.metric, answer, question.answers)
            continue
        options = {
            "ignore_case": entry.ignore_case,
            "ignore_punctuation": entry.ignore_punctuation,
            "regexes_to_ignore": entry.regexes_to_ignore,
        }
        items[entry.metric] = max(exact_match(answer, right, **options) for right in question.answers)  # type: ignore[arg-type]
    return items


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def is_answered(file: TaskFile, row: Row) -> bool:
    """Whether the row's answer is known: a split for a leaderboard has its labels hidden."""
    target = target_of(file, row)
    return not (isinstance(target, int) and target < 0)  # hidden test labels are -1 in many hub datasets
