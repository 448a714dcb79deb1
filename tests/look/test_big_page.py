"""The largest attention page there is to be, 48 layers x 32 heads x 512 tokens: its size, and that it is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bildung.look import attention
from bildung.look.attention_heads.attention_patterns import AttentionPatterns
from bildung.look.pages.picture import draw_heads
from tests.look.browser import CHROMIUM, Browser

LAYERS, HEADS, LENGTH = 48, 32, 512
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def patterns(layers: int, heads: int, length: int) -> AttentionPatterns:
    """Distributions as models have them: from sharp to spread, some of each on the first and on the last tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden_LS = torch.ones(length, length, dtype=torch.bool).triu(1)
    back_LS = (torch.arange(length)[:, None] - torch.arange(length)).clamp_min(0)
    probs_NHLS = torch.empty(layers, heads, length, length)
    for one_HLS in probs_NHLS:
        for h, one_LS in enumerate(one_HLS):
            scores_LS = torch.randn(length, length, generator=generator) * (1 + h % 4) - back_LS * (h % 3) * 0.05
            scores_LS[:, 0] += 2.0 * (h % 5)
            one_LS[:] = scores_LS.masked_fill(hidden_LS, -torch.inf).softmax(-1)
    return AttentionPatterns(list(range(length)), [f"·token{n}" for n in range(length)], probs_NHLS)


def write(seen: AttentionPatterns, place: Path) -> Path:
    numbers = attention.as_json(seen, None, "a long prompt", False, "synthetic", None)
    draw_heads(attention.pooled(seen.probs_NHLS, 8).numpy(), "heads", place / "attention.png")
    page = attention.page(numbers, seen, None, place / "attention.png", "bildung look attention synthetic OUT")
    (place / "attention.html").write_text(page, encoding="utf-8")
    return place / "attention.html"


def drawn(page: Path, profile: Path) -> dict[str, float]:
    """Milliseconds by the page's own clock: until all was drawn, and until another head was, once asked for."""
    with Browser(profile) as browser:
        browser.open(page, ready="document.documentElement.dataset.drawn")
        first = browser.run("Number(document.documentElement.dataset.drawn)")
        asked = (
            "(async () => { const t = performance.now(); await choose({ head: 1 }); return performance.now() - t; })()"
        )
        other = browser.call("Runtime.evaluate", expression=asked, awaitPromise=True, returnByValue=True)
        assert not browser.errors
        return {"first": first, "another head": other["result"]["value"]}


@needs_chromium
def test_maps_go_by_the_keyboard_and_say_their_values(tmp_path: Path) -> None:
    seen = patterns(2, 3, 20)
    with Browser(tmp_path / "profile") as browser:
        browser.open(write(seen, tmp_path), ready="document.documentElement.dataset.drawn")
        browser.run("document.getElementById('sheet').focus()")
        for key in ("ArrowUp", "ArrowUp", "Home", "ArrowRight"):
            browser.press(key)
        said = browser.run("document.getElementById('say').textContent")
        assert said.startswith("layer 0, head 1\nprevious token "), said
        browser.run("choose({ head: 1, row: 19 })")
        browser.run("document.getElementById('plot').focus()")
        for key in ("Home", "ArrowUp", "ArrowRight", "ArrowRight"):
            browser.press(key)
        expected = f"looks at ·token2 (2): {round(float(seen.probs_NHLS[0, 1, 18, 2]) * 255) / 255:.3f}"
        assert browser.run("document.getElementById('say').textContent") == f"·token18 (18) {expected}"
        assert browser.run("document.getElementById('tip').textContent").endswith(expected)
        browser.press("Escape")
        assert browser.run("document.getElementById('tip').hidden") and not browser.errors


@pytest.mark.slow
@needs_chromium
def test_the_largest_page_is_small_and_drawn(tmp_path: Path) -> None:
    page = write(patterns(LAYERS, HEADS, LENGTH), tmp_path)
    megabytes, times = page.stat().st_size / 2**20, drawn(page, tmp_path / "profile")
    print(f"{megabytes:.1f} MiB; milliseconds: {times}")
    assert megabytes < 120  # a quarter of its 403 million weights at a byte each
