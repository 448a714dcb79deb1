"""Two-hop repair: the first hop's last vector answers the second, and the shares are of what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bildung
from bildung.core.errors import DataError
from bildung.look import multi_hop
from bildung.look.multi_hop import HOPS, Question, questions
from bildung.look.patchscopes.patch_targets import target_prompt
from bildung.look.patchscopes.patchscopes import Cell, patchscope

CURRENCY = HOPS["currency"]
FIRST, SECOND = CURRENCY.first, CURRENCY.relation.prompt


def test_questions_join_two_facts():
    found, by_people = questions(CURRENCY), questions(HOPS["capital"])
    assert Question("Tokyo", "Japan", "yen") in found and len(found) > 180
    assert Question("Dutch", "Netherlands", "Amsterdam") in by_people and len(by_people) > 180
    for some in (found, by_people):
        assert len({one.given for one in some}) == len(some)
    assert not [one for one in by_people if one.middle in ("Singapore", "Monaco")]  # the question would say the answer


def test_repair_is_a_patchscope_of_the_first_hop(
    tiny_lm_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lm = bildung.load(tiny_lm_directory)
    with pytest.raises(DataError, match="both hops of 0"):
        monkeypatch.setattr(multi_hop, "questions", lambda hops: [Question("Rome", "Italy", "euro")] * 3)
        multi_hop.repair(lm, multi_hop.Settings(step=1, hops="currency"))
    target, tokens = target_prompt(lm, SECOND), lm.tokenizer.encode(FIRST.format("Rome"))
    cells = [Cell(len(tokens) - 1, layer, into) for layer in (0, 1) for into in (0, 1)]
    texts = patchscope(lm, tokens, target, cells, new_tokens=4).texts
    said = next(word for word in texts[1].split() if len(word) > 0)  # layer 0 into 1 answers with this
    chosen = [Question("Rome", "Italy", said), Question("<Oslo>", "Norway", "never said")]
    monkeypatch.setattr(multi_hop, "answered_one_by_one", lambda lm, some, given: (chosen, 7))
    given = multi_hop.Settings(hops="currency", step=1, new_tokens=4)
    record = multi_hop.multi_hop(tiny_lm_directory, tmp_path / "out", given)
    numbers = json.loads((tmp_path / "out" / "multi_hop.json").read_text())
    assert numbers["texts"][:4] == texts
    assert numbers["grid"]["values"][0][1] == 0.5
    assert record.measured["repaired, any pair of layers"] == record.measured["repaired, any pair with l < l*"] == 0.5
    assert record.measured["of"] == 7 and record.measured["right at once"] == 0
    assert numbers["shares"]["repaired, any pair of layers"] == [0.5, 0.5]  # one of two: sqrt(1/2) / sqrt(2)
    assert record.measured["right at once, standard error"] == 0 and numbers["shares"]["gained by that pair"][0] >= 0
    assert numbers["command"].endswith("OUT --hops currency --step 1 --new-tokens 4")
    html = (tmp_path / "out" / "multi_hop.html").read_text()
    assert "class HeatMap" in html  # the shared script is in it
    assert "&lt;Oslo&gt;" in html and "<Oslo>" not in html
