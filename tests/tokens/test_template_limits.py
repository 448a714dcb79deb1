"""Chat templates that attack: each is stopped, says why, and the next template works."""

from __future__ import annotations

import time

import psutil
import pytest

from bildung.core.errors import ChatTemplateError
from bildung.tokens import template_process, template_worker
from bildung.tokens.chat_template import render
from tests.tokens.samples import conversation

NESTED = (
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x | tojson }}"
)
HOSTILE = {
    "attribute": ("{{ ''.__class__.__mro__ }}", "leave its sandbox"),
    "function globals": ("{{ raise_exception.__globals__.sys }}", "leave its sandbox"),
    "format string": (
        "{{ '{0.__class__.__init__}'.format(1) ~ '{0.__class__.__init__.x}'.format(1) }}",
        "leave its sandbox",
    ),
    "namespace attribute": ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "leave its sandbox"),
    "changing the messages": ("{{ messages.append(1) }}", "leave its sandbox"),
    "import": ("{% include '/etc/passwd' %}", "no loader"),
    "huge range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "more than 1 s of processor time",
    ),
    "one endless call": (NESTED, "1 s of processor time|MiB of memory"),
    "multiplied text": ("{{ 'a' * 10**10 }}", "MiB of memory"),
    "formatted width": ("{{ '%1000000000d' % 1 }}", "MiB of memory"),
    "doubled text": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "MiB of memory|processor time",  # whichever limit a machine meets first
    ),
    "long output": ("{{ 'x'.center(10**8) }}", "wrote more than 32 Mi characters"),
    "huge number": ("{{ (10**(10**8)) | length }}", "processor time|memory"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    "does not parse": ("{% if", "does not parse, line 1"),
    "wrong type": ("{{ 1 + 'a' }}", "raised TypeError"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_templates_are_stopped(case: str) -> None:
    template, problem = HOSTILE[case]
    with pytest.raises(ChatTemplateError, match=problem):
        render(template, conversation("a"), add_generation_prompt=False)
    assert render("{{ messages[0].content }}", conversation("alive"), add_generation_prompt=False) == "alive"


def test_the_worker_can_neither_grow_nor_open_files() -> None:
    render("x", conversation("a"), add_generation_prompt=False)
    (worker,) = template_process._workers.values()
    process = psutil.Process(worker.pid)
    assert process.rlimit(psutil.RLIMIT_AS) == (template_worker.MEMORY,) * 2
    assert process.rlimit(psutil.RLIMIT_NOFILE) == (3, 3)
    assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)


def test_an_interrupted_request_does_not_shift_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    render("x", conversation("a"), add_generation_prompt=False)
    (worker,) = template_process._workers.values()

    def interrupt() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker.stdout, "readline", interrupt)
    with pytest.raises(KeyboardInterrupt):
        render("first", conversation("a"), add_generation_prompt=False)
    assert render("second", conversation("a"), add_generation_prompt=False) == "second"


def test_a_killed_worker_is_an_error_and_is_replaced() -> None:
    render("x", conversation("a"), add_generation_prompt=False)
    (worker,) = template_process._workers.values()
    psutil.Process(worker.pid).kill()
    time.sleep(0.1)
    with pytest.raises(ChatTemplateError, match="SIGKILL"):
        render("x", conversation("a"), add_generation_prompt=False)
    assert render("y", conversation("a"), add_generation_prompt=False) == "y"


def test_what_templates_may_use() -> None:
    template = (
        "{%- for m in messages %}\n{% if loop.first %}{% continue %}{% endif %}{{ m.content }}"
        "{{ {'é': '<b>'} | tojson }}{% break %}{%- endfor %}{{ strftime_now('%Y') | length }}{{ bos_token }}"
        "{{ tools is none }}{{ documents is none }}"
    )
    text = render(template, conversation("a", "b", "c"), add_generation_prompt=False, bos_token="<s>")
    assert text == 'b{"é": "<b>"}4<s>TrueTrue'
