"""Self-Instruct: a model writes its own instructions and answers (Wang et al. 2023, arXiv 2212.10560).

    seed tasks -> new instructions -> classification or not -> instances -> filters -> conversations to tune on
                  6 of people, 2 of the  decides the order     input first,
                  model are shown        of the next step      or output first

    bildung self-instruct lives/smollm2/base OUT --instructions 50
    bildung self-instruct http://localhost:8000/v1 OUT --endpoint-model NAME --seeds seeds.jsonl --instructions 1000
    bildung tune lora lives/smollm2/base TUNED --data OUT

OUT holds train.jsonl (instruction, input, output: Alpaca's form), tasks.jsonl (each instruction with all its
instances), audit.md (a random sample to be judged by a person: of the authors' own 200, 46 % had something wrong), and
answers.jsonl, everything that was written, from which a broken-off run goes on.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bildung.core.errors import DataError, SettingsError
from bildung.core.operation import Job, perform
from bildung.core.record import Record
from bildung.core.settings import settings as settings_class
from bildung.data.rows import Row, Unusable
from bildung.data.sources import fingerprint, rows
from bildung.instruct.filters import Instance, keep_instances, why_not_instruction
from bildung.instruct.prompts import (
    SeedTask,
    ask_for_instances,
    ask_for_instructions,
    ask_for_kind,
    read_instances,
    read_instructions,
    read_kind,
)
from bildung.instruct.rouge import Pool
from bildung.instruct.writer import EndpointWriter, LocalWriter, Manner, Remembering, Writer
from bildung.model.store import load
from bildung.train.training import check_continues_text

INSTANCES, TASKS, AUDIT, ANSWERS = "train.jsonl", "tasks.jsonl", "audit.md", "answers.jsonl"
OF_PEOPLE, OF_THE_MODEL = 6, 2
SHOWN_KINDS, SHOWN_INSTANCES = 8, 4  # seed tasks in the prompts of the later steps
AUDITED = 200

NEW_INSTRUCTIONS = dict(temperature=0.7, top_p=0.5, presence_penalty=2.0, stop=("\n\n", "\n16", "16.", "16 ."))


@settings_class
class Settings:
    """Self-Instruct."""

    seeds: str = "mini:seed_tasks"  # rows {instruction, instances: [{input, output}], is_classification}
    instructions: int = 100  # how many new ones to make
    most_prompts: int | None = None  # prompts for instructions at most; default: 10 per instruction wanted
    batch_size: int = 8  # prompts at a time
    new_tokens: int = 256  # of an answer at most
    chat: bool = False  # put each prompt through the model's chat template, as a user's turn
    endpoint: str | None = None  # an OpenAI-compatible server (also given as SOURCE), up to and with /v1
    endpoint_model: str = "default"  # the server's name for its model
    seed: int = 0  # decides what is shown and drawn


def self_instruct(source: Path | str, out: Path, settings: Settings, *, force: bool = False) -> Record:
    """Make instructions with the model in `source`, or at the endpoint that it names.

    Raises SettingsError; DataError for seeds that cannot be used, or when nothing that was written is kept;
    EndpointError, after which the same command goes on.
    """
    if str(source).startswith(("http:", "https:")):
        settings = replace(settings, endpoint=str(source).replace(":/", "://").replace(":///", "://"))
    if min(settings.instructions, settings.batch_size, settings.new_tokens, settings.most_prompts or 1) < 1:
        raise SettingsError("instructions, batch_size, new_tokens and most_prompts must be at least 1.")

    def work(job: Job) -> None:
        writer: Writer
        if settings.endpoint:
            writer = EndpointWriter(settings.endpoint, settings.endpoint_model, settings.chat)
        else:
            lm = load(Path(source))
            check_continues_text(lm)
            writer = LocalWriter(lm, settings.chat)
        make(job, Remembering(writer, job.out / ANSWERS), settings)

    place = None if settings.endpoint else Path(source)
    return perform("self-instruct", place, out, settings, work, data=fingerprint(settings.seeds), force=force)


def make(job: Job, writer: Remembering, given: Settings) -> None:
    """All steps with any writer; fills in the job's numbers and writes its files."""
    seeds, notes = read_seeds(given.seeds)
    job.notes += notes
    if writer.remembered:
        job.notes.append(f"{writer.remembered} answers of a run that broke off were used")
    instructions, dropped = new_instructions(writer, seeds, given)
    seen = len(instructions) + dropped.total()
    kinds = _kinds(writer, seeds, instructions, given, dropped)
    tasks = _instances(writer, seeds, instructions, kinds, given, dropped)
    lines = [{"instruction": task.instruction, **asdict(one)} for task in tasks for one in task.instances]
    if not lines:
        raise DataError(
            f"nothing that the model wrote was kept: {', '.join(f'{n} {reason}' for reason, n in dropped.items())}. "
            f"It may be too small for this, or want its chat template (chat). Its answers lie in {writer.path}; delete "
            f"that file to ask anew."
        )
    _write_lines(job.out / INSTANCES, lines)
    _write_lines(job.out / TASKS, [asdict(task) for task in tasks])
    (job.out / AUDIT).write_text(audit_sheet(tasks, given.seed), encoding="utf-8")
    job.measured |= {
        "seed_tasks": len(seeds),
        "prompts": writer.asked,
        "instructions_seen": seen,
        "instructions": len(instructions),
        "classifications": sum(kinds),
        "instructions_with_instances": sum(bool(task.instances) for task in tasks),
        "instances": len(lines),
        "dropped": dict(dropped),
    }
    if len(instructions) < given.instructions:
        job.notes.append(
            f"{len(instructions)} of {given.instructions} instructions after all prompts that were allowed"
        )
    print(*notes, f"{len(instructions)} instructions of {seen}, {len(lines)} instances; thrown away:", sep="\n")
    print(*(f"  {count:>6}  {reason}" for reason, count in dropped.most_common()), sep="\n")


def read_seeds(source: str) -> tuple[list[SeedTask], list[str]]:
    """(the seed tasks, what was not used). Raises DataError for fewer than two, which cannot be shown as a series."""
    there = set[str]()

    def usable(row: Row) -> SeedTask:
        instruction, instances = row.get("instruction"), row.get("instances")
        if not isinstance(instruction, str) or not instruction.strip() or not isinstance(instances, list):
            raise Unusable("no instruction with instances")
        try:
            pairs = tuple(Instance(str(one.get("input") or ""), str(one["output"])) for one in instances)
        except (TypeError, KeyError, AttributeError):
            raise Unusable("an instance without output") from None
        if not pairs:
            raise Unusable("no instances")
        kind = row.get("is_classification") or False
        if kind not in (True, False):
            raise Unusable("is_classification is neither true nor false")
        if instruction in there:
            raise Unusable("the instruction of another")
        there.add(instruction)
        return SeedTask(instruction, pairs, bool(kind))

    found = rows(source).then(usable)
    seeds = list(found)
    if len(seeds) < 2 or not any(seed.is_classification for seed in seeds) or all(s.is_classification for s in seeds):
        there_are = (
            f"{len(seeds)} usable seed task{'' if len(seeds) == 1 else 's'} ({found.report() or 'none dropped'})"
        )
        raise DataError(
            f"{source} has {there_are}; at least two are needed, one that is a classification (is_classification) and "
            f"one that is none."
        )
    return seeds, [f"{source}: {report}"] if (report := found.report()) else []


def new_instructions(writer: Remembering, seeds: Sequence[SeedTask], given: Settings) -> tuple[list[str], Counter[str]]:
    """(instructions that passed the filters, {reason: how many did not})."""
    pool, found, dropped = Pool(seed.instruction for seed in seeds), list[str](), Counter[str]()
    most = given.most_prompts or 10 * given.instructions
    for first in range(0, most, given.batch_size):
        shown = [
            _shown(seeds, found, f"{given.seed} {number}")
            for number in range(first, min(first + given.batch_size, most))
        ]
        manner = Manner(given.new_tokens, **NEW_INSTRUCTIONS)  # type: ignore[arg-type]
        replies = writer.write([ask_for_instructions(one) for one in shown], manner, given.seed + first)
        for one, reply in zip(shown, replies, strict=True):
            written = read_instructions(reply.text, len(one))
            if reply.cut_off:
                written.pop()
                dropped["cut off"] += 1
            for text in written:
                if len(found) == given.instructions:
                    dropped["more than were asked for"] += 1
                elif (reason := why_not_instruction(text, pool)) is not None:
                    dropped[reason] += 1
                else:
                    found.append(text)
                    pool.add(text)
        if len(found) >= given.instructions:
            break
    return found, dropped


def _shown(seeds: Sequence[SeedTask], found: Sequence[str], draw: str) -> list[str]:
    """Six instructions of people and two of the model, shuffled; while the model has fewer, more of people."""
    generator = random.Random(f"shown {draw}")
    own = generator.sample(list(found), min(OF_THE_MODEL, len(found)))
    wanted = min(OF_PEOPLE + OF_THE_MODEL - len(own), len(seeds))
    shown = [seed.instruction for seed in generator.sample(list(seeds), wanted)] + own
    generator.shuffle(shown)
    return shown


def first_shown(seeds: Sequence[SeedTask], given: Settings) -> list[list[str]]:
    """What the first batch of prompts shows."""
    return [_shown(seeds, [], f"{given.seed} {number}") for number in range(given.batch_size)]


def _kinds(
    writer: Remembering,
    seeds: Sequence[SeedTask],
    instructions: Sequence[str],
    given: Settings,
    dropped: Counter[str],
) -> list[bool]:
    """Of each instruction whether it is a classification; an answer that is neither yes nor no counts as no, and is
    counted in `dropped`."""
    generator = random.Random(f"kinds {given.seed}")
    half = SHOWN_KINDS // 2
    shown = _some(generator, [s for s in seeds if s.is_classification], half)
    shown += _some(generator, [s for s in seeds if not s.is_classification], half)
    generator.shuffle(shown)
    prompts = [ask_for_kind(shown, one) for one in instructions]
    replies = _in_batches(writer, prompts, Manner(3), given)
    kinds = [read_kind(text) for text, _ in replies]
    if None in kinds:
        dropped["classification or not: neither yes nor no, taken for no"] += kinds.count(None)
    return [kind is True for kind in kinds]


def _instances(
    writer: Remembering,
    seeds: Sequence[SeedTask],
    instructions: Sequence[str],
    kinds: Sequence[bool],
    given: Settings,
    dropped: Counter[str],
) -> list[SeedTask]:
    """Each instruction with its instances that passed the filters; adds to `dropped`."""
    generator = random.Random(f"instances {given.seed}")
    shown = {
        kind: _some(generator, [s for s in seeds if s.is_classification is kind], SHOWN_INSTANCES)
        for kind in (True, False)
    }
    prompts = [ask_for_instances(shown[kind], one, kind) for one, kind in zip(instructions, kinds, strict=True)]
    replies = _in_batches(writer, prompts, Manner(given.new_tokens, presence_penalty=1.5, stop=("\nTask:",)), given)
    tasks = []
    for instruction, kind, (text, cut_off) in zip(instructions, kinds, replies, strict=True):
        found = read_instances(text)
        kept, why = keep_instances(found, cut_off, generator if kind else None)
        dropped.update({f"instance: {reason}": count for reason, count in why.items()})
        if not any(one.output for one in found):
            dropped["instruction without any instance"] += 1
        tasks.append(SeedTask(instruction, tuple(kept), kind))
    return tasks


def _in_batches(writer: Remembering, prompts: Sequence[str], manner: Manner, given: Settings) -> list[tuple[str, bool]]:
    found: list[tuple[str, bool]] = []
    for first in range(0, len(prompts), given.batch_size):
        replies = writer.write(prompts[first : first + given.batch_size], manner, given.seed + first)
        found += [(reply.text, reply.cut_off) for reply in replies]
    return found


def _some(generator: random.Random, tasks: list[SeedTask], count: int) -> list[SeedTask]:
    return generator.sample(tasks, min(count, len(tasks)))


def _write_lines(path: Path, lines: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def audit_sheet(tasks: Sequence[SeedTask], seed: int) -> str:
    """A random sample for a person to judge, as the paper's table 2 asks."""
    pairs = [(task, one) for task in tasks for one in task.instances]
    sample = random.Random(f"audit {seed}").sample(pairs, min(AUDITED, len(pairs)))
    parts = [f"# {len(sample)} of {len(pairs)} instances, drawn at random\n"]
    for number, (task, one) in enumerate(sample, start=1):
        parts.append(
            f"## {number}\n\n- instruction: {task.instruction}\n- input: {one.input or '(none)'}\n"
            f"- output: {one.output}\n\n[ ] describes a valid task   [ ] the input fits it   [ ] the output is right\n"
        )
    return "\n".join(parts)
