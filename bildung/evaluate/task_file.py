"""Task files: lm-eval's YAML form, so that one file runs here and in lm-evaluation-harness.

    task: capitals
    dataset_path: json                       json, csv, parquet, arrow, text; or a source of data/sources.py
    dataset_kwargs: {data_files: {test: capitals.jsonl}}         beside the task file, else in the working directory
    test_split: test
    output_type: multiple_choice             loglikelihood, loglikelihood_rolling, generate_until, chat_loglikelihood
    doc_to_text: "The capital of {{name}} is"          a column's name, or a jinja2 template over the row's columns
    doc_to_choice: choices
    doc_to_target: answer
    metric_list: [{metric: acc}]
    metadata: {version: 1}

Two things differ from lm-eval. `!function` and whatever else would run code of the file is refused. And a single word
that is no column is an error: lm-eval takes `doc_to_text: sentense` for a constant prompt and measures nonsense. One is
added: output_type chat_loglikelihood scores the assistant's turns of a conversation through the chat template.
`metadata.limit` is how many documents a card takes when nobody says otherwise.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from bildung.core.errors import ChatTemplateError, DataError, SettingsError, nearest
from bildung.core.settings import resolve, settings
from bildung.data.rows import Row
from bildung.evaluate.metrics import metric_called
from bildung.evaluate.sequence_metrics import SEQUENCE_METRICS
from bildung.tokens.template_process import render_all

PACKAGED = Path(__file__).parent / "task_files"
BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # names of readers in `datasets`
# What lm-eval measures when the file names no metric; more are allowed.
METRICS_OF = {
    "multiple_choice": (("acc", "acc_norm"), ()),
    "loglikelihood": (("perplexity", "acc"), ()),
    "loglikelihood_rolling": (("word_perplexity", "byte_perplexity", "bits_per_byte"), ("perplexity",)),
    "generate_until": (("exact_match",), SEQUENCE_METRICS),
    "chat_loglikelihood": (("perplexity",), ()),
}


@settings
class MetricEntry:
    """One entry of metric_list. How items are averaged follows from the metric; `aggregation` is not needed."""

    metric: str
    aggregation: str | None = None
    higher_is_better: bool | None = None
    ignore_case: bool = False
    ignore_punctuation: bool = False
    regexes_to_ignore: tuple[str, ...] = ()


@settings
class GenerationKwargs:
    """How generate_until decodes: greedily, until a stop string or max_gen_toks tokens."""

    until: str | tuple[str, ...] = ()
    max_gen_toks: int = 256
    do_sample: Literal[False] = False
    temperature: float = 0.0


@settings
class TaskFile:
    """The keys of a task file."""

    task: str
    task_alias: str | None = None
    tag: str | list[str] | None = None
    dataset_path: str
    dataset_name: str | None = None  # configuration of a hub dataset
    dataset_kwargs: dict[str, Any] = field(default_factory=dict)  # only data_files is known
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    output_type: Literal[
        "multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until", "chat_loglikelihood"
    ] = "generate_until"
    description: str = ""  # stands before the examples
    doc_to_text: str = ""
    doc_to_target: str | int | None = None
    doc_to_choice: str | list[str | int | float] | None = None
    num_fewshot: int = 0
    target_delimiter: str = " "  # between question and answer
    fewshot_delimiter: str = "\n\n"  # between examples
    metric_list: list[MetricEntry] | None = None
    generation_kwargs: GenerationKwargs = GenerationKwargs()
    metadata: dict[str, Any] = field(default_factory=dict)  # version, limit; anything else is for people


@cache
def packaged_names() -> tuple[str, ...]:
    """Names of the task files that come with bildung."""
    return tuple(sorted(path.stem for path in PACKAGED.glob("*.yaml")))


def find_task_file(name: str) -> Path:
    """The file of a packaged task's name or of a path. Raises DataError with the nearest name."""
    if name in packaged_names():
        return PACKAGED / f"{name}.yaml"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    raise DataError(
        f"no task {name!r}, neither packaged nor a file. {nearest(name, packaged_names())} "
        f"Packaged: {', '.join(packaged_names())}; any lm-eval task file can be given by its path"
    )


def read_task_file(path: Path) -> TaskFile:
    """The checked contents of a task file. Raises DataError or SettingsError, naming the file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise DataError(
            f"{path}: {error.problem} ({error.problem_mark}). A task file is data: `!function` and other tags, which "
            "would run Python code, are refused; write the field as a jinja2 template"
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML: {error}") from None
    choices = content.get("doc_to_choice") if isinstance(content, dict) else None
    if isinstance(choices, list) and any(isinstance(choice, bool) for choice in choices):
        raise DataError(
            f"{path}: doc_to_choice is {choices}: YAML reads bare yes, no, on, off so; write them in quotes"
        )
    try:
        file = resolve(TaskFile, content)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    _check(path, file)
    return file


def _check(path: Path, file: TaskFile) -> None:
    default, more = METRICS_OF[file.output_type]
    for entry in metrics_of(file):
        metric = metric_called(entry.metric)
        if entry.metric not in (*default, *more):
            known = ", ".join((*default, *more))
            raise DataError(f"{path}: {file.output_type} does not measure {entry.metric!r}; it measures {known}")
        ignores = entry.ignore_case or entry.ignore_punctuation or entry.regexes_to_ignore
        if entry.metric in SEQUENCE_METRICS and ignores:
            raise DataError(
                f"{path}: {entry.metric} is measured as its signature says; ignore_case, ignore_punctuation and "
                f"regexes_to_ignore belong to exact_match"
            )
        if entry.higher_is_better not in (None, metric.higher_is_better):
            raise DataError(f"{path}: higher_is_better of {entry.metric} is {metric.higher_is_better}")
    needed = {"multiple_choice": ("doc_to_choice", "doc_to_target"), "chat_loglikelihood": ()}
    for key in needed.get(file.output_type, ("doc_to_target",)):
        if getattr(file, key) is None:
            raise DataError(f"{path}: {file.output_type} needs {key}")
    if file.num_fewshot < 0 or (file.num_fewshot and file.output_type.endswith(("rolling", "chat_loglikelihood"))):
        raise DataError(f"{path}: num_fewshot = {file.num_fewshot} with {file.output_type}")
    if unknown := set(file.dataset_kwargs) - {"data_files"}:
        raise DataError(f"{path}: dataset_kwargs {sorted(unknown)}; only data_files is known")


def metrics_of(file: TaskFile) -> list[MetricEntry]:
    """The metrics the file asks for, or lm-eval's for its output type. The first is the task's main one."""
    if file.metric_list is not None:
        return file.metric_list
    return [MetricEntry(metric=name) for name in METRICS_OF[file.output_type][0]]


def sources_of(path: Path, file: TaskFile, split: str | None) -> list[tuple[str, str | None]]:
    """(source, split) of data/sources.py to read for `split` of this task."""
    if file.dataset_path not in BUILDERS:
        source = file.dataset_path
        if ":" not in source and not Path(source).exists():  # lm-eval: a bare name is a hub dataset
            source = f"hub:{source}" + (f":{file.dataset_name}" if file.dataset_name else "")
        return [(source, split)]
    given = file.dataset_kwargs.get("data_files")
    if isinstance(given, Mapping):
        if split not in given:
            raise DataError(
                f"{path}: no data_files for split {split!r}. {nearest(str(split), given)} There are: {list(given)}"
            )
        given = given[split]
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"{path}: dataset_path {file.dataset_path} needs dataset_kwargs: {{data_files: {{SPLIT: FILE}}}}"
        )
    beside = [path.parent / name for name in names]
    return [(str(there if there.exists() else name), None) for there, name in zip(beside, names, strict=True)]


def rendered(key: str, template: str, row: Row) -> Any:
    """What `template` makes of a row: the column of that name, else the rendered text. Raises DataError."""
    if template in row:
        return row[template]
    if re.fullmatch(r"\w+", template):
        raise DataError(f"{key}: no column {template!r}. {nearest(template, row)} There are: {', '.join(row)}")
    if not any(mark in template for mark in ("{{", "{%", "{#")):
        return template
    # Columns may hold dates or bytes, which a template sees as text: it runs in a process of its own, which the kernel
    # stops when it loops or fills the memory, and what reaches it is JSON.
    variables = json.loads(json.dumps(row, default=str))
    try:
        return render_all(template, [variables], environment="task")[0]
    except ChatTemplateError as error:
        raise DataError(f"{key}: the template {template!r} fails: {error}; the columns are {', '.join(row)}") from None


def text_of(file: TaskFile, row: Row) -> str:
    """The question."""
    return str(rendered("doc_to_text", file.doc_to_text, row)) if file.doc_to_text else ""


def choices_of(file: TaskFile, row: Row) -> list[str]:
    """The answers to choose from."""
    given = file.doc_to_choice
    if isinstance(given, str):
        given = rendered("doc_to_choice", given, row)
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given)  # a template renders a list as text; literals only, nothing is run
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise DataError(f"doc_to_choice gives {given!r}, which is not a list") from None
    if not isinstance(given, list | tuple) or len(given) < 2 or not all(str(choice) for choice in given):
        raise DataError(f"doc_to_choice gives {given!r}; a list of at least two texts is needed")
    return [str(choice) for choice in given]


def target_of(file: TaskFile, row: Row) -> str | int | list[Any]:
    """The right answer: the number of a choice, a text, or a list of texts that are all right."""
    given: Any = file.doc_to_target
    if isinstance(given, str):
        given = rendered("doc_to_target", given, row) if given else ""
    if isinstance(given, bool):
        given = int(given)
    if isinstance(given, str) and file.doc_to_choice is not None and given.isdigit():
        return int(given)
    if not isinstance(given, str | int | list):
        raise DataError(f"doc_to_target gives {given!r}; a text, the number of a choice, or a list is needed")
    return given
