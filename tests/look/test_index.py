"""`bildung look MODEL`: one folder of pages that lead to each other; what a model does not have is said."""

from __future__ import annotations

import re
import webbrowser
from pathlib import Path

import pytest

import bildung
from bildung.app import cli
from bildung.core.errors import DataError
from bildung.core.operation import OccupiedError
from bildung.look import index as look
from bildung.look.pages.page import HTML
from tests.model.tiny import tiny_lm


def test_one_command_makes_all_pages_and_opens_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bildung.save(tiny_lm(), tmp_path / "base")
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    # The tiny tokenizer has no room for the atlas's random tokens, so that page is left out, and the index says so.
    cli.run(["look", str(tmp_path / "base"), "--open", "--prompt", "one <b>two</b>"])
    out = tmp_path / "base-look"
    assert opened == [(out / "index.html").as_uri()]
    page = (out / "index.html").read_text()
    links = re.findall(r'href="([^"#]+)#index"', page)
    assert {"lens/lens.html", "attention/attention.html"} <= set(links) and all(
        (out / link).is_file() for link in links
    )
    assert "one &lt;b&gt;two" in page and "<b>two" not in page and "https://" not in page
    assert "all pages of this model" in (out / "lens/lens.html").read_text()
    assert f"bildung look index {tmp_path}/base OUT --prompt &#39;one &lt;b&gt;two&lt;/b&gt;&#39;" in page
    # Another prompt replaces it where the place was not chosen, and is refused where it was.
    cli.run(["look", str(tmp_path / "base"), "--prompt", "three"])
    assert "three" in (out / "attention/attention.html").read_text()
    with pytest.raises(OccupiedError):
        cli.run(["look", str(tmp_path / "base"), str(out), "--prompt", "four"])


def test_two_models_side_by_side_and_nothing_to_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        bildung.save(tiny_lm(), tmp_path / name)
    given = look.Settings(prompt="one two", against=tmp_path / "b")
    record = look.index(tmp_path / "a", tmp_path / "out", given)
    assert "a and b" in (tmp_path / "out/lens/lens.html").read_text()
    links = re.findall(r'href="([^"#]+)#index"', (tmp_path / "out/index.html").read_text())
    assert "compare/compare.html" in links and all((tmp_path / "out" / link).is_file() for link in links)
    assert "all pages of this model" in (tmp_path / "out/compare/compare.html").read_text()
    assert record.companions["against"]["hash"] and record.measured["tokens of the prompt"] > 2
    with pytest.raises(DataError, match="Give some text"):
        look.index(tmp_path / "a", tmp_path / "none", look.Settings(prompt=""))
    assert not (tmp_path / "none").exists()


def test_every_page_is_framed() -> None:
    """The frame has the command, the region that is read out and the keyboard; a page without it has none of them."""
    parts = {"frame.html", "heat_map.html", "heat_table.html", "lens_grid.html", "lens_controls.html"}
    pages = [path for path in HTML.glob("*.html") if path.name not in parts]
    assert len(pages) > 8
    for path in pages:
        assert path.read_text().startswith('{% extends "frame.html" %}'), path.name
    frame = (HTML / "frame.html").read_text()
    assert all(text in frame for text in ('aria-live="polite"', "{{ command }}", "{{ policy }}", 'class="keys"'))
