"""The card: what a model can do, measured before and after every operation on the same items.

    card(lm, settings) -> {"fingerprint", "tasks": {name: {metric, value, stderr, n, higher_is_better, items, docs}},
                           "samples": [{"prompt", "answer"}], "skipped": {task: why}, "notes": [...], "seconds"}

The fingerprint covers all that a number depends on besides the weights: tasks with their versions and questions, number
format, context, BOS, chat template. Two cards with the same fingerprint differ by what was done to the model alone, and
a card in the source's record is not measured again. Numbers from different harnesses differ by tens of points for
want of exactly these (BOS: lm-eval #2676; space before the choice: #614; normalisation: mesh-transformer-jax #257).

A task NAME whose data were not fetched is replaced by the packaged NAME_mini, under that name, with a note; where there
is none, it is skipped with the reason.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from bildung.core.errors import ChatTemplateError, SettingsError
from bildung.core.operation import Job
from bildung.core.settings import as_dict, settings
from bildung.data.examples import Example
from bildung.evaluate import task_file
from bildung.evaluate.answers import answers, chat_prompt
from bildung.evaluate.compare import compare_cards
from bildung.evaluate.likelihood import evaluating, prefix_token, score
from bildung.evaluate.metrics import Item, as_json
from bildung.evaluate.sequence_metrics import SEQUENCE_METRICS, signature_for
from bildung.evaluate.tasks import Question, Task, encode, load_task, measure, measure_answer
from bildung.model.base import CausalLM

if TYPE_CHECKING:
    from bildung.model.store import LanguageModel

Card = dict[str, Any]
VERSION = 1  # part of the fingerprint: raised when a change of this folder changes numbers
TASKS = ("prose", "reviews", "sentiment", "sentiment_fewshot", "capitals", "elements", "instructions")
PROMPTS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    'Is this film review positive or negative? "A dull story, badly acted."',
)


@settings
class CardSettings:
    """What is measured before and after an operation."""

    tasks: tuple[str, ...] = TASKS  # names of packaged tasks, or paths of task files in lm-eval's form
    limit: int | None = None  # documents per task; none: what the task file proposes
    seed: int = 0  # draws the documents and the few-shot examples
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"  # of the activations while measuring
    context: int = 512  # longest input in tokens; never more than the model was made for
    batch_tokens: int = 2048  # tokens of one forward pass
    sample_prompts: tuple[str, ...] = PROMPTS  # answered greedily, for people to read
    sample_tokens: int = 40  # length of these answers

    def __post_init__(self) -> None:
        for name in ("limit", "context", "batch_tokens", "sample_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}; it must be a whole number from 1")


def card(lm: LanguageModel, settings: CardSettings) -> Card:
    """Measures the model. Raises DataError and SettingsError for task files that cannot be used."""
    if not isinstance(lm.model, CausalLM):
        return _blank(lm, settings)
    return _measure(lm, settings, *load_tasks(lm, settings))


def _blank(lm: LanguageModel, settings: CardSettings) -> Card:
    """The card of a model that does not continue text: no figures, and the reason."""
    reason = f"a {lm.config.model_type} ({lm.config.kind}) does not continue text"
    skipped = dict.fromkeys(settings.tasks, reason)
    about = {"dtype": settings.dtype, "template": None, "bos": False, "seconds": 0.0}
    return {"fingerprint": "", "tasks": {}, "samples": [], "skipped": skipped, "notes": [], **about}


def before(job: Job, lm: LanguageModel, settings: CardSettings) -> Card:
    """The card of the model before the operation, put into the job; taken over from the source's record when that was
    measured in the same way."""
    if not isinstance(lm.model, CausalLM):
        job.before = _blank(lm, settings)
        return job.before
    tasks, skipped = load_tasks(lm, settings)
    known = job.source_record.after if job.source_record else {}
    if known.get("fingerprint") == fingerprint(lm, settings, tasks):
        # What changed then is the source's story.
        entries = {name: {k: v for k, v in task.items() if k != "change"} for name, task in known["tasks"].items()}
        job.before = {**known, "tasks": entries}
    else:
        job.before = _measure(lm, settings, tasks, skipped)
    return job.before


def after(job: Job, lm: LanguageModel, settings: CardSettings) -> Card:
    """The card of the model after the operation, put into the job, with the paired "change" of every task."""
    made = card(lm, settings)
    for one in compare_cards(job.before, made):
        made["tasks"][one.task]["change"] = {"difference": one.difference, "stderr": one.stderr}
    job.after = made
    return made


def load_tasks(lm: LanguageModel, settings: CardSettings) -> tuple[list[Task], dict[str, str]]:
    """The tasks that can be run, and for the others the reason. Raises SettingsError for two tasks of one name."""
    tasks: list[Task] = []
    skipped: dict[str, str] = {}
    for asked in settings.tasks:
        name, reason = available(asked)
        if name is None:
            skipped[asked] = reason
            continue
        task = load_task(name, limit=settings.limit, seed=settings.seed)
        if task.name in [other.name for other in tasks]:
            raise SettingsError(f"two of the tasks are called {task.name!r}; a card has one line for each")
        if task.is_chat and lm.tokenizer.chat_template is None:
            skipped[asked] = "the model has no chat template"
            continue
        if reason:
            task.notes.append(f"{name} stands in for {asked}: {reason}")
        tasks.append(task)
    return tasks, skipped


def available(name: str) -> tuple[str | None, str]:
    """The task to run for `name`: itself; or, with the reason, NAME_mini when its data were not fetched, or None."""
    from bildung.data import nursery

    source = task_file.read_task_file(task_file.find_task_file(name)).dataset_path
    entry = source.removeprefix("nursery:").split("/")[0]
    if not source.startswith("nursery:") or nursery.is_current(entry):
        return name, ""
    mini = f"{name}_mini"
    reason = f"nursery:{entry} was not fetched (bildung nursery {entry})"
    return mini if mini in task_file.packaged_names() else None, reason


def fingerprint(lm: LanguageModel, settings: CardSettings, tasks: list[Task]) -> str:
    """Of everything that decides the numbers except the weights. (The batch size changes them by rounding only.)"""
    measured = as_dict(settings)
    for indirect in ("tasks", "limit", "seed", "batch_tokens"):  # their effect is in the tasks' hashes, or none
        del measured[indirect]
    content = {
        "version": VERSION,
        "settings": measured,
        "tasks": [
            [task.name, task.version, task.hash, [as_dict(m) for m in task_file.metrics_of(task.file)]]
            for task in tasks
        ],
        "template": lm.tokenizer.template_hash,
        "bos": [lm.tokenizer.uses_bos, prefix_token(lm.tokenizer)],
        "device": lm.model.device.type,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _measure(lm: LanguageModel, settings: CardSettings, tasks: list[Task], skipped: Mapping[str, str]) -> Card:
    start = time.monotonic()
    with evaluating(lm.model, getattr(torch, settings.dtype)):
        measured = _score_tasks(lm, settings, [task for task in tasks if not task.generates])
        measured |= {task.name: _generate_task(lm, task) for task in tasks if task.generates}
        samples, too_long = _samples(lm, settings)
    entries: dict[str, Any] = {}
    skipped = {**skipped, **{task.name: "nothing of it can be scored" for task in tasks if not measured[task.name]}}
    for task in [task for task in tasks if measured[task.name]]:
        for number, entry in enumerate(task_file.metrics_of(task.file)):
            items = [per_metric[entry.metric] for per_metric in measured[task.name]]
            name = task.name if number == 0 else f"{task.name}/{entry.metric}"
            entries[name] = as_json(entry.metric, items) | {"docs": task.hash}
            if entry.metric in SEQUENCE_METRICS:
                entries[name]["signature"] = signature_for(entry.metric, [q.answers for q in task.questions])
    return {
        "fingerprint": fingerprint(lm, settings, tasks),
        "tasks": entries,
        "samples": samples,
        "skipped": skipped,
        "notes": [*(note for task in tasks for note in task.notes), *too_long],
        "dtype": settings.dtype,
        "template": lm.tokenizer.template_hash,
        "bos": lm.tokenizer.uses_bos,
        "seconds": round(time.monotonic() - start, 1),
    }


def _score_tasks(lm: LanguageModel, settings: CardSettings, tasks: list[Task]) -> dict[str, list[dict[str, Item]]]:
    """Items of all likelihood tasks, scored together so that batches are full."""
    examples: list[Example] = []
    spans: list[tuple[Task, Question, int, int]] = []
    context = min(settings.context, lm.config.max_position_embeddings)
    for task in tasks:
        lost = Counter[str]()
        for question in task.questions:
            try:
                made, is_cut = encode(task, question, lm.tokenizer, context)
            except ChatTemplateError as error:
                lost[f"refused by the chat template ({error})"] += 1
                continue
            lost[f"cut to {context} tokens"] += is_cut
            lost["without any token left to score"] += not made
            if made:
                spans.append((task, question, len(examples), len(examples) + len(made)))
                examples += made
        total = len(task.questions)
        task.notes += [f"{task.name}: {count} of {total} {what}" for what, count in lost.items() if count]
    scores = score(lm.model, examples, batch_tokens=settings.batch_tokens)
    measured: dict[str, list[dict[str, Item]]] = {task.name: [] for task in tasks}
    for task, question, start, end in spans:
        measured[task.name].append(measure(task, question, scores[start:end]))
    return measured


def _samples(lm: LanguageModel, settings: CardSettings) -> tuple[list[dict[str, str]], list[str]]:
    """Answers for people to read, and a note where a prompt and its answer are longer than the model's context."""
    encoded = [(prompt, chat_prompt(lm.tokenizer, prompt)) for prompt in settings.sample_prompts]
    room = lm.config.max_position_embeddings - settings.sample_tokens
    fitting = [(prompt, ids) for prompt, ids in encoded if len(ids) <= room]
    texts = answers(lm, [ids for _, ids in fitting], settings.sample_tokens)
    left_out = len(encoded) - len(fitting)
    note = (
        f"samples: {left_out} of {len(encoded)} prompts and {settings.sample_tokens} new tokens exceed the context of "
        f"{lm.config.max_position_embeddings}"
    )
    made = [{"prompt": prompt, "answer": text} for (prompt, _), text in zip(fitting, texts, strict=True)]
    return made, [note] if left_out else []


def _generate_task(lm: LanguageModel, task: Task) -> list[dict[str, Item]]:
    """Items of a task whose answers the model writes; questions too long for the model's context are left out."""
    how = task.file.generation_kwargs
    until = (how.until,) if isinstance(how.until, str) else how.until or (task.file.fewshot_delimiter,)
    room = lm.config.max_position_embeddings - how.max_gen_toks
    encoded = [(question, lm.tokenizer.encode(question.context)) for question in task.questions]
    fitting = [(question, ids) for question, ids in encoded if len(ids) <= room]
    if left_out := len(encoded) - len(fitting):
        task.notes.append(f"{task.name}: {left_out} of {len(encoded)} exceed the context with their answers")
    texts = answers(lm, [ids for _, ids in fitting], how.max_gen_toks, until)
    return [measure_answer(task, question, text) for (question, _), text in zip(fitting, texts, strict=True)]
