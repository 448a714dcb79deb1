"""Pages are one file that runs its own script and nothing else; pictures draw any text; tokens get readable labels."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError

from bildung.app.cli import _operation_arguments, parse
from bildung.core.operation import Job
from bildung.core.verbs import verbs
from bildung.look import logit_lens, patchscope, probe, trace
from bildung.look.pages.page import command_of, render
from bildung.look.pages.picture import draw_heads, draw_lens, drawable
from bildung.look.prompt import label
from tests.model.tiny import tiny_lm


def test_policy_allows_the_pages_own_script_alone(tmp_path: Path):
    (tmp_path / "t.html").write_text(
        '<meta content="{{ policy }}"><style>{{ asset("s.css") }}</style><p>{{ text }}</p><script>{{ script }}</script>'
    )
    (tmp_path / "s.css").write_text('a::before { content: "<>"; }')
    (tmp_path / "s.js").write_text("if (1 < 2 && 3 > 2) run();")
    page = render("t.html", (tmp_path,), scripts=("s.js",), text="<b onclick='x'>")
    assert '{ content: "<>"; }' in page and "&lt;b onclick=&#39;x&#39;&gt;" in page
    script = re.search(r"<script>(.*)</script>", page, re.S).group(1)
    assert script == "if (1 < 2 && 3 > 2) run();"
    assert "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in page
    assert "script-src" not in render("t.html", (tmp_path,), text="")
    with pytest.raises(UndefinedError):
        render("t.html", (tmp_path,))


@pytest.mark.parametrize(
    ("verb", "settings"),
    [
        ("logit_lens", logit_lens.Settings(prompt="--against 'a'\n$HOME", chat=True, against=Path("b c"))),
        ("patchscope", patchscope.Settings(prompt="-", position=-2, layers=(1, 2), new_tokens=0, target="{} is")),
        ("probe", probe.Settings(data="x.jsonl", limit=None, probes=("mlp",), options=probe.Options(rank=3))),
        ("trace", trace.Settings(prompt="a b", subject="b", sites=("mlp.out",), deviations=2.5)),
    ],
)
def test_the_command_at_the_foot_of_a_page_gives_its_settings(verb: str, settings: Any):
    job = Job(f"look {verb}", Path("my models/a"), Path("out"), settings, None)
    words = shlex.split(command_of(job))
    one = verbs()[f"look {verb}"]
    given = parse(_operation_arguments(one.load()), one, words[3:])
    assert words[:3] == ["bildung", "look", verb] and (given.source, str(given.out)) == ("my models/a", "OUT")
    assert given.settings == settings


def test_labels_show_what_a_token_is():
    tokenizer = tiny_lm().tokenizer
    assert [label(tokenizer, number) for number in tokenizer.encode("a b\n", bos=False)] == ["a", "·", "b", "↵"]
    half = tokenizer.encode("é", bos=False)[0]
    assert label(tokenizer, half) == tokenizer.token_of(half)
    assert label(tokenizer, tokenizer.bos_id) == "<bos>"
    assert label(tokenizer, 259) == "#259"  # a row of the embedding without a token


def test_pictures_draw_any_text(tmp_path: Path):
    assert drawable("a漢·𝔘") == "a□·□"
    side = {"top_ids": [[[0]], [[1]]], "top_probs": [[[0.5]], [[1.0]]], "rank": [[2], [1]]}
    numbers = {"model": "m $x$ 漢", "labels": ["$\\frac{$"], "words": {"0": "漢$", "1": "long" * 9}, "a": side}
    draw_lens(numbers, tmp_path / "one.png")
    both = numbers | {"against": "n", "b": side, "kl_ab": [[0.0], [0.0]], "first_difference": [-1]}
    draw_lens(both, tmp_path / "two.png")
    draw_heads(np.eye(3)[None, None].repeat(2, 1), "heads", tmp_path / "heads.png")
    draw_heads(np.zeros((1, 1, 1, 1)), "no difference", tmp_path / "none.png", difference=True)
    draw_lens(numbers, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    assert all(path.stat().st_size > 500 for path in tmp_path.glob("*.png"))
