"""A process that renders templates: one JSON request a line on stdin, one JSON answer a line on stdout.

A chat template is a program from a stranger. jinja2's sandbox keeps it from Python's attributes, but nothing inside a
Python process can stop one C call that builds a gigabyte (`'%1000000000d' % 1`, `x|tojson` of a list that holds itself
thirty times over). So templates run here, and the kernel holds the limits:

    CPU time      ITIMER_PROF kills this process after SECONDS of its own time: a loaded machine is not a slow template
    memory        RLIMIT_AS, MEMORY bytes
    files         RLIMIT_NOFILE and RLIMIT_FSIZE leave no way to open or write one, should the sandbox ever leak

Started by path, so it imports jinja2 and the standard library only. Chat templates get the environment transformers
renders with (trim_blocks, lstrip_blocks, loop controls, raise_exception, strftime_now, tojson without HTML escapes),
the templates of task files lm-eval's: a column that is not there is an error, and white space stays as it is.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.debug  # loaded on the first error otherwise, when no file can be opened any more
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 1.0
MEMORY = 512 * 2**20
MAX_CHARACTERS = 32 * 2**20
MAX_COMPILED = 16  # templates kept; a task file has three, and its rows take turns
# Noncharacters (Unicode 23.7: never in interchanged text) that frame what `{% generation %}` encloses.
GENERATION_START, GENERATION_END = "\ufdd2", "\ufdd3"


class Generation(Extension):
    """`{% generation %}answer{% endgeneration %}`: frames the text that the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own class attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_frame"), [], [], body).set_lineno(line)

    def _frame(self, caller: Any) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


class Names(jinja2.utils.Namespace):
    """jinja2's `namespace()`, without names that reach into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace attribute may not start with an underscore: {name!r}")
        super().__setitem__(name, value)


def raise_exception(message: str) -> None:
    """For templates that refuse a conversation, e.g. roles that do not alternate."""
    raise jinja2.exceptions.TemplateError(message)


def strftime_now(form: str) -> str:
    """Today's date as Llama 3's template prints it. Makes the rendering depend on the day."""
    return datetime.now().strftime(form)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without jinja2's HTML escapes, as tool descriptions were written in training."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> ImmutableSandboxedEnvironment:
    """The sandbox every template runs in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    del environment.globals["lipsum"]  # placeholder prose, read from a file
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, namespace=Names)
    return environment


def make_task_environment() -> ImmutableSandboxedEnvironment:
    """The sandbox of task files' templates."""
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    del environment.globals["lipsum"]
    environment.globals["namespace"] = Names
    return environment


def answer(
    environments: dict[str, ImmutableSandboxedEnvironment],
    compiled: dict[tuple[str, str], jinja2.Template],
    request: dict[str, Any],
) -> Any:
    """The rendered texts of one request, or what went wrong."""
    which = (request["environment"], request["template"])
    try:
        if which not in compiled:
            if len(compiled) >= MAX_COMPILED:
                compiled.clear()
            compiled[which] = environments[which[0]].from_string(which[1])
        texts = [compiled[which].render(**variables) for variables in request["renders"]]
    except MemoryError:
        return {"error": f"the template needed more than {MEMORY // 2**20} MiB of memory"}
    except RecursionError:
        return {"error": "the template calls itself without end"}
    except jinja2.exceptions.SecurityError as error:
        return {"error": f"the template tried to leave its sandbox: {error}"}
    except jinja2.exceptions.TemplateSyntaxError as error:
        return {"error": f"the template does not parse, line {error.lineno}: {error}"}
    except Exception as error:  # a template can raise anything Python can
        return {"error": f"the template raised {type(error).__name__}: {error}"}
    if sum(map(len, texts)) > MAX_CHARACTERS:
        return {"error": f"the template wrote more than {MAX_CHARACTERS // 2**20} Mi characters"}
    return {"texts": texts}


def main() -> None:
    """Serves until stdin closes."""
    environments = {"chat": make_environment(), "task": make_task_environment()}
    compiled: dict[tuple[str, str], jinja2.Template] = {}
    # What is imported or opened lazily (time zone, jinja2's compiler) must be there before files become unavailable.
    first = {"environment": "chat", "template": "{{ strftime_now('%d') | tojson }}", "renders": [{}]}
    answer(environments, compiled, first)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        reply = json.dumps(answer(environments, compiled, json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
