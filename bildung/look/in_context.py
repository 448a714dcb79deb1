"""In-context learning, measured: accuracy by the number of examples shown, k = 0, 1, 2, 4 ... (Brown et al. 2020).

    bildung look in_context MODEL OUT --task sentiment --shots 0 1 2 4 8 16 --rounds 3

What varies, and is reported as spread: which examples are shown (`rounds`), and in which order (`orders`; Lu et al.
2022, arXiv 2104.08786: from near chance to near the best). All questions of a round follow the same examples, so that
the standard error over questions and the spread over rounds are two different things.

`labels` says what the examples teach: their true labels; labels drawn at random (Min et al. 2022, arXiv 2202.12837: it
often hardly matters); or each label exchanged for the next (Wei et al. 2023, arXiv 2303.03846: who follows the examples
falls below chance). Accuracy is always by the true labels.

Calibrated scores (Zhao et al. 2021, arXiv 2102.09690): a model prefers some answers whatever is asked. Its answer
probabilities for a question without content ("N/A", "[MASK]", ""), averaged, divide those for the real one.

Of a task whose choices are the same for every question (classes), as many questions of each are asked, where there are
enough, so that who always gives one answer is right by chance and no more often. What was drawn is said.

A prompt that exceeds the context loses whole examples from its beginning, never half of one; how often is counted.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bildung.core.errors import DataError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.rows import Row
from bildung.evaluate import task_file
from bildung.evaluate.likelihood import encode_pair, evaluating
from bildung.evaluate.shared_prefix import score_sharing
from bildung.evaluate.task_file import TaskFile, choices_of, text_of
from bildung.evaluate.tasks import data_of, draw_documents, is_answered, read_documents, right_choices
from bildung.look.pages.line_picture import Panel, draw_lines
from bildung.model.store import DTYPES, LanguageModel, load
from bildung.train.training import check_continues_text

CONTENT_FREE = ("N/A", "[MASK]", "")
NUMBERS, PICTURE = "in_context.json", "in_context.png"


@settings_class
class Settings:
    """In-context learning."""

    task: str = "sentiment"  # a multiple-choice task: a packaged one by name, or a task file
    shots: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32)  # how many examples are shown
    rounds: int = 3  # sets of examples
    orders: int = 1  # orders of each set
    labels: Literal["true", "random", "exchanged"] = "true"  # of the examples
    questions: int = 64  # how many are asked
    calibrate: bool = True  # also divide by what the model answers to no question
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations
    seed: int = 0  # decides questions, examples and orders


@dataclass(frozen=True)
class Point:
    """Accuracy with k examples. stderr: over questions, of the mean over rounds; spread: standard deviation over rounds
    and orders. left_out: examples per prompt that did not fit the context, on average."""

    shots: int
    accuracy: float
    stderr: float
    spread: float
    least: float
    most: float
    calibrated: float | None
    calibrated_stderr: float | None
    left_out: float


def in_context(source: Path, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Measure and draw. Raises SettingsError; DataError for a task that is no multiple choice or has too few rows."""
    if not settings.shots or min(settings.shots) < 0:
        raise SettingsError(
            f"shots = {' '.join(map(str, settings.shots)) or 'nothing'} was given; numbers of examples are needed, "
            f"each at least 0, such as 0 1 4 16."
        )
    for name in ("rounds", "orders", "questions"):
        if getattr(settings, name) < 1:
            raise SettingsError(f"{name} = {getattr(settings, name)} was given; it must be at least 1.")

    def work(job: Job) -> None:
        lm = load(source)
        check_continues_text(lm)
        file, asked, pool, notes = read(settings)
        with evaluating(lm.model, DTYPES[settings.dtype]):
            points = [measure(lm, file, asked, pool, k, settings) for k in sorted(set(settings.shots))]
        chance = max(Counter(right_choices(file, row)[0] for row in asked).values()) / len(asked)
        numbers: dict[str, Any] = {"task": file.task, "questions": len(asked), "most_frequent": chance}
        numbers["questions_by_answer"] = drawn = by_answer(file, asked)
        numbers["points"] = [asdict(point) for point in points]
        (job.out / NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        picture(points, chance, file.task, job.out / PICTURE)
        job.measured |= numbers
        job.notes += notes
        job.notes += [f"{p.shots} examples: {p.left_out:.1f} of them did not fit" for p in points if p.left_out]
        print(f"{len(asked)} questions" + "".join(f", {count} of {name!r}" for name, count in drawn.items()))
        print(*shown(points, chance), sep="\n")

    return perform("look in_context", source, out, settings, work, data=data_of(settings.task), force=force)


def read(given: Settings) -> tuple[TaskFile, list[Row], list[Row], list[str]]:
    """(the task, the questions, the rows to take examples from, what was dropped). Raises DataError."""
    path = task_file.find_task_file(given.task)
    file = task_file.read_task_file(path)
    if file.output_type != "multiple_choice":
        raise DataError(f"{path} is of output_type {file.output_type}; examples are shown for multiple_choice.")
    split = file.test_split or file.validation_split
    documents, notes = read_documents(path, file, split)
    asked = draw(file, documents, given.questions, f"{given.seed} {file.task}")
    shots_split = file.fewshot_split or file.training_split or split
    pool = documents if shots_split == split else read_documents(path, file, shots_split)[0]
    pool = [row for row in pool if is_answered(file, row) and row not in asked]
    if len(pool) < max(given.shots):
        raise DataError(
            f"{path}: {max(given.shots)} examples are to be shown, and {len(pool)} rows are left that are not asked; "
            f"ask fewer questions, or show fewer examples."
        )
    return file, asked, pool, notes


def draw(file: TaskFile, documents: list[Row], count: int, seed: str) -> list[Row]:
    """So many questions; of a task with classes one of each in turn, while there are any."""
    if count >= len(documents) or not _has_classes(file, documents):
        return draw_documents(documents, count, seed)
    queues: dict[int, list[int]] = {}
    for place in random.Random(seed).sample(range(len(documents)), len(documents)):
        queues.setdefault(right_choices(file, documents[place])[0], []).append(place)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*(queues[answer] for answer in sorted(queues))))
    drawn = itertools.islice((place for place in turns if place is not None), count)
    return [documents[place] for place in sorted(drawn)]


def by_answer(file: TaskFile, asked: Sequence[Row]) -> dict[str, int]:
    """How many questions have which answer, of a task with classes; else nothing."""
    if not _has_classes(file, asked):
        return {}
    choices = choices_of(file, asked[0])
    found = Counter(right_choices(file, row)[0] for row in asked)
    return {choices[answer]: found[answer] for answer in sorted(found)}


def _has_classes(file: TaskFile, documents: Sequence[Row]) -> bool:
    return all(choices_of(file, row) == choices_of(file, documents[0]) for row in documents)


def measure(
    lm: LanguageModel, file: TaskFile, asked: Sequence[Row], pool: Sequence[Row], k: int, given: Settings
) -> Point:
    """Accuracy of all questions after k examples, over rounds and orders."""
    plain, calibrated, left_out = [], [], []
    for shown_rows, draw_number in demonstrations(pool, k, given):
        beginning = _shown(file, shown_rows, given, draw_number)
        blank = [_without_content(row, text) for row in asked[:1] for text in CONTENT_FREE]
        scores, left = answer_logprobs(lm, file, beginning, [*asked, *(blank if given.calibrate else ())])
        left_out.append(left)
        plain.append([_is_right(file, row, found) for row, found in zip(asked, scores, strict=False)])
        if given.calibrate:
            free = _mean_probabilities(scores[len(asked) :])
            adjusted = [[s - math.log(p) for s, p in zip(found, free, strict=True)] for found in scores[: len(asked)]]
            calibrated.append([_is_right(file, row, found) for row, found in zip(asked, adjusted, strict=True)])
    accuracy, stderr = _mean(plain)
    rounds = [statistics.fmean(one) for one in plain]
    spread = statistics.stdev(rounds) if len(rounds) > 1 else 0.0
    better, its_error = _mean(calibrated) if calibrated else (None, None)
    left = statistics.fmean(left_out)
    return Point(k, accuracy, stderr, spread, min(rounds), max(rounds), better, its_error, left)


def demonstrations(pool: Sequence[Row], k: int, given: Settings) -> Iterator[tuple[list[Row], int]]:
    """(k rows in an order, number of the draw) for each round and order. More examples begin with the fewer ones, so
    that a curve over k adds to what was shown; without any there is one draw."""
    for number in range(given.rounds if k else 1):
        generator = random.Random(f"{given.seed} examples {number}")
        rows = generator.sample(list(pool), max(given.shots))[:k]
        for order in range(given.orders if k > 1 else 1):
            arranged = list(rows)
            if order:
                random.Random(f"{given.seed} order {number} {order}").shuffle(arranged)
            yield arranged, number


def _shown(file: TaskFile, rows: Sequence[Row], given: Settings, number: int) -> list[str]:
    """Each example as text, with the label that it is to have."""
    generator = random.Random(f"{given.seed} labels {number}")
    said = []
    for row in rows:
        choices, right = choices_of(file, row), right_choices(file, row)[0]
        if given.labels == "random":
            right = generator.randrange(len(choices))
        elif given.labels == "exchanged":
            right = (right + 1) % len(choices)
        said.append(f"{text_of(file, row)}{file.target_delimiter}{choices[right]}{file.fewshot_delimiter}")
    return said


def answer_logprobs(
    lm: LanguageModel, file: TaskFile, beginning: Sequence[str], asked: Sequence[Row]
) -> tuple[list[list[float]], float]:
    """(log-probability of each choice for each question, examples left out of a prompt on average)."""
    limit, examples, ends, left = lm.config.max_position_embeddings, [], [], 0
    for row in asked:
        kept = list(beginning)
        while True:
            context = file.description + "".join(kept) + text_of(file, row)
            found = [encode_pair(lm.tokenizer, context, file.target_delimiter + one) for one in choices_of(file, row)]
            if max(map(len, found)) <= limit + 1 or not kept:
                break
            kept.pop(0)
            left += 1
        if max(map(len, found)) > limit + 1:
            raise DataError(f"{file.task}: a question alone is longer than the context of {limit} tokens.")
        examples += found
        ends.append(len(examples))
    scores = [score.logprob for score in score_sharing(lm.model, examples)]
    return [scores[start:end] for start, end in zip([0, *ends], ends, strict=False)], left / len(asked)


def _without_content(row: Row, text: str) -> Row:
    """The row with every text in it replaced; what is no text (labels, lists of choices) stays."""
    return {name: text if isinstance(value, str) else value for name, value in row.items()}


def _mean_probabilities(scores: Sequence[Sequence[float]]) -> list[float]:
    """Probability of each answer among the answers, averaged over questions."""
    shares = []
    for found in scores:
        top = max(found)
        powers = [math.exp(one - top) for one in found]
        shares.append([power / sum(powers) for power in powers])
    return [max(statistics.fmean(column), 1e-12) for column in zip(*shares, strict=True)]


def _is_right(file: TaskFile, row: Row, scores: Sequence[float]) -> float:
    return float(max(range(len(scores)), key=scores.__getitem__) in right_choices(file, row))


def _mean(rounds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(mean, standard error over questions of each question's mean over rounds)."""
    per_question = [statistics.fmean(one) for one in zip(*rounds, strict=True)]
    error = statistics.stdev(per_question) / math.sqrt(len(per_question)) if len(per_question) > 1 else 0.0
    return statistics.fmean(per_question), error


def shown(points: Sequence[Point], chance: float) -> list[str]:
    """A line per number of examples."""
    lines = [f"always the most frequent answer: {chance:.3f}"]
    for p in points:
        line = f"{p.shots:>3} examples: {p.accuracy:.3f} ± {p.stderr:.3f}, by round {p.least:.3f} to {p.most:.3f}"
        if p.calibrated is not None:
            line += f"; calibrated {p.calibrated:.3f} ± {p.calibrated_stderr:.3f}"
        lines.append(line)
    return lines


def picture(points: Sequence[Point], chance: float, task: str, path: Path) -> None:
    """Accuracy by the number of examples, with its standard error."""
    places = [math.log2(p.shots + 1) for p in points]  # 0 has a place, and doubling is a step
    lines: dict[str, Any] = {"as it answers": (places, [p.accuracy for p in points])}
    errors = {"as it answers": [p.stderr for p in points]}
    if all(p.calibrated is not None for p in points):
        lines["calibrated"] = (places, [p.calibrated for p in points])
        errors["calibrated"] = [p.calibrated_stderr or 0.0 for p in points]
    lines["most frequent"] = ([places[0], places[-1]], [chance, chance])
    names = {place: str(p.shots) for place, p in zip(places, points, strict=True)}
    title = f"{task}: accuracy by examples shown; bands are one standard error"
    draw_lines([Panel(title, "examples shown", lines, errors=errors, x_names=names)], path)
