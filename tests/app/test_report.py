"""The report: everything the records say is in it, nothing in it can act, and what is missing is said."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bildung.app import family_tree
from bildung.app.chapters import changed_settings, find_directories, main_line, read_life, read_log
from bildung.app.report import Settings, licence, report
from bildung.app.report_parts import facts, loss_curves, text_of, value_and_error
from bildung.core import chart
from bildung.core.errors import RecordError
from bildung.core.record import Record, read_record, write_record
from tests.app.fake_life import TASKS, make_life

HOSTILE = "<script>alert('model')</script><img src=x onerror=alert(1)>"


@pytest.fixture
def life(tmp_path: Path) -> Path:
    return make_life(tmp_path / "life")


def change(directory: Path, **fields: Any) -> None:
    record = read_record(directory)
    for name, value in fields.items():
        setattr(record, name, value)
    write_record(directory, record)


def made(life: Path, **settings: Any) -> str:
    out = life.parent / "report"
    report(life, out, Settings(**settings), force=True)
    return (out / "report.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects tags, attributes and text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_whole_life_is_told(life: Path):
    page = made(life, title="a life")
    tags = Tags(page)
    text = " ".join(" ".join(tags.texts).split())
    for name in ("base", "tuned", "merged", "aligned", "int8", "nf4"):
        assert f">{name}</h2>" in page
    assert "a life" in text and "7 min 41 s" in text  # the sum of all seconds
    assert "402,133 of 1,228,800 tokens" in text and "From base to int8" in text
    assert all(f"{task} along the life" in page for task in TASKS)
    assert "Settings that differ" in page and "nursery:alpaca" in text and "same top token" in text
    assert "a long letter without words" in text
    # The largest change of the LoRA, as its card has it.
    task = read_record(life / "tuned").after["tasks"]["instructions"]
    assert value_and_error(task["change"]["difference"], task["change"]["stderr"], "+") in text
    assert "licence Apache-2.0" in text and licence("nursery:alpaca") in text.replace("&#39;", "'")


def test_page_is_one_file_without_scripts(life: Path):
    tags = Tags(made(life))
    assert "script" not in tags.tags and "link" not in tags.tags and "iframe" not in tags.tags
    links = [value for name, value in tags.attributes if name in ("href", "src")]
    assert links and all(re.match(r"#|data:image/png;base64,|\.\./life/", link) for link in links)
    policy = next(value for name, value in tags.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy and "script-src" not in policy


def test_hostile_text_stays_text(life: Path):
    record = read_record(life / "tuned")
    record.after["samples"][0]["answer"] = HOSTILE
    record.after["tasks"][HOSTILE] = record.after["tasks"].pop("prose")
    record.after["skipped"] = {"x": HOSTILE}
    texts = {HOSTILE: HOSTILE}
    measured = texts | {"answers": [{"prompt": HOSTILE, "answer": HOSTILE}]}
    companions = {HOSTILE: {"path": HOSTILE, "hash": ""}}
    change(life / "tuned", after=record.after, notes=[HOSTILE], measured=measured, settings=texts, data=texts)
    change(life / "tuned", versions=texts, companions=companions, operation=HOSTILE)
    (life / "tuned/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, HOSTILE: 2.0}) + "\n")
    page = made(life, title=HOSTILE)
    tags = Tags(page)
    assert "script" not in tags.tags and "img" not in tags.tags
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert page.count("&lt;script&gt;alert(&#39;model&#39;)") > 10


def test_missing_parts_are_said(life: Path):
    (life / "tuned/metrics.jsonl").unlink()
    (life / "aligned/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\nnull\n')
    change(life / "nf4", before={}, after={})
    record = read_record(life / "int8")
    record.after["tasks"]["prose"]["value"] = None
    record.after["skipped"] = {"reviews": "nursery:imdb is not here yet"}
    change(life / "int8", after=record.after, source={"path": "../elsewhere", "hash": "0"})
    text = " ".join(Tags(made(life)).texts)
    assert "It trained, but metrics.jsonl is not there" in text
    assert "2 lines of metrics.jsonl cannot be read" in text
    assert "No card was measured before or after" in text
    assert "No number was measured after the operation for prose" in text
    assert "reviews was not measured after the operation: nursery:imdb is not here yet" in text
    assert "not part of this report" in text


def test_life_without_cards_has_no_comparison(life: Path):
    for directory in life.iterdir():
        change(directory, before={}, after={})
    text = " ".join(Tags(made(life)).texts)
    assert "Fewer than two models of this life were measured" in text
    assert "No model of this life was measured" in text


def test_cards_measured_differently_are_marked(life: Path):
    record = read_record(life / "tuned")
    change(life / "tuned", after=record.after | {"fingerprint": "another"})
    assert "The two cards were not measured in the same way" in made(life)


def test_looks_are_shown(life: Path, tmp_path: Path):
    import bildung
    from bildung.look import attention, logit_lens
    from tests.model.tiny import tiny_lm

    bildung.save(tiny_lm(), tmp_path / "model")
    logit_lens.logit_lens(tmp_path / "model", life / "lens", logit_lens.Settings(prompt="see <b>"))
    attention.attention(tmp_path / "model", life / "attention", attention.Settings(prompt="see <b>"))
    page = made(life)
    tags = Tags(page)
    assert page.count('class="heat"') == 1 and tags.tags.count("img") == 1
    assert ("href", "../life/lens/lens.html") in tags.attributes
    assert "see &lt;b&gt;" in page
    (life / "lens/lens.json").write_text("{}")
    assert "lens.json cannot be read" in made(life)


def test_up_to_date_until_a_record_changes(life: Path):
    out = life / "report"  # inside the life, as a recipe puts it
    first = report(life / "int8", out, Settings())
    assert first.measured["operations"] == 6 and first.source["path"] == "../int8"
    assert report(life / "int8", out, Settings()) == first
    change(life / "nf4", notes=["new"])
    again = report(life / "int8", out, Settings(), force=True)
    assert again.fingerprint != first.fingerprint and "new" in (out / "report.html").read_text()
    chosen = report(life / "int8", life.parent / "two", Settings(life=(life / "base", life / "tuned")))
    assert chosen.measured["operations"] == 2


def test_nothing_to_report_on(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match=r"no record\.json in .*empty"):
        report(tmp_path / "empty", tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()


def test_reading_order_and_lanes(life: Path):
    chapters = read_life(find_directories([life]))
    order = [(c.name, c.parent.name if c.parent else None) for c in chapters]
    assert order == [("base", None), ("tuned", "base"), ("merged", "tuned"), ("nf4", "merged"), ("aligned", "merged"),
                     ("int8", "aligned")]  # fmt: skip
    assert [c.name for c in main_line(chapters)] == ["base", "tuned", "merged", "aligned", "int8"]
    assert family_tree.lanes_of(chapters) == {1: 0, 2: 0, 3: 0, 4: 1, 5: 0, 6: 0}
    change(life / "base", source={"path": "../int8", "hash": "x"})  # a circle, made by hand
    assert len(read_life(find_directories([life]))) == 6


def talk_to(life: Path, model: str, name: str) -> None:
    (life / name).mkdir()
    about: dict[str, Any] = {
        "operation": "chat",
        "settings": {},
        "source": {"path": f"../{model}", "hash": "0" * 64},
        "fingerprint": name,
    }
    write_record(life / name, Record(**about, started="2026-03-02T10:00:00+00:00"))


def test_the_main_line_ends_with_the_model_that_was_talked_to(life: Path):
    """Both quantized models are as far from the beginning; the one in use decides, not the first by name."""
    change(life / "nf4", source={"path": "../aligned", "hash": "0" * 64})
    names = [c.name for c in main_line(read_life(find_directories([life])))]
    assert names == ["base", "tuned", "merged", "aligned", "nf4"], "without a conversation: the last one made"
    change(life / "nf4", source={"path": "../merged", "hash": "0" * 64})
    talk_to(life, "base", "first-talk")
    talk_to(life, "nf4", "conversation")
    assert [c.name for c in main_line(read_life(find_directories([life])))] == ["base", "tuned", "merged", "nf4"]


def test_settings_that_differ_from_the_defaults():
    record = Record(
        operation="look logit_lens", settings={"prompt": "p", "chat": True, "against": None, "max_tokens": 96}
    )
    changed, same, doubt = changed_settings(record)
    assert changed == {"prompt": "p", "chat": True} and same == {"against": None, "max_tokens": 96} and not doubt
    changed, same, doubt = changed_settings(Record(operation="tune lore", settings={"rank": 8}))
    assert changed == {"rank": 8} and not same and "no operation 'tune lore'" in doubt


def test_curves_of_the_log(life: Path):
    chapter = next(c for c in read_life([life / "aligned"]))
    drawn = loss_curves(read_log(chapter))
    assert [one["title"].split(" (")[0] for one in drawn] == ["loss", "margin", "accuracy"]
    assert "held out" in drawn[0]["drawing"] and "held out" not in drawn[1]["drawing"]
    assert drawn[0]["drawing"].count("<polyline") == 3


def test_numbers_for_people():
    assert value_and_error(24.4567, 1.234) == "24.5 ± 1.2"
    assert value_and_error(-0.00909, 0.0091, "+") == "−0.0091 ± 0.0091"
    assert value_and_error(1234.5, 250.0) == "1,234 ± 250" and value_and_error(0.5, None) == "0.5"
    assert value_and_error(0.0, 0.0, "+") == "0"
    assert [text_of(v) for v in (True, None, 12345, 0.12345, "x", [1])] == [
        "yes",
        "none",
        "12,345",
        "0.1235",
        "x",
        "[1]",
    ]
    assert facts({"bytes_on_disk": 2_000_000, "a": {"kl_mean": 0.5}, "list": [1]}) == [
        ("bytes on disk", "2.0 MB"),
        ("a: KL divergence, mean (nats)", "0.5"),
    ]


def test_charts_hold_any_numbers():
    assert chart.nice_ticks(0, 10, 4) == [0, 2, 4, 6, 8, 10] or chart.nice_ticks(0, 10, 4) == [0, 5, 10]
    assert chart.nice_ticks(3, 3, 4) == [3]
    assert chart.smooth([(0, 1.0), (1, 3.0), (2, 5.0)], 2) == [(0, 1.0), (1, 2.0), (2, 4.0)]
    flat = chart.line_chart("one <point>", [chart.Curve("a", [(1, 0.0)])])
    assert "nan" not in flat and "one &lt;point&gt;" in flat
    state = chart.State(1, "x", 0.0, None, None)
    assert "nan" not in chart.states_chart("t", [state])
    assert "worse" in chart.difference_bar(-40.0, False) and 'cx="4.0"' in chart.difference_bar(-40.0, False)
