"""`look patchscope` and `look stream_map`: the files they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bildung
from bildung.look import patchscope as operation
from bildung.look import stream_map
from bildung.look.patchscopes.patch_targets import target_prompt
from bildung.look.patchscopes.patchscopes import Cell, patchscope


def test_the_verb_writes_page_picture_and_numbers(tiny_lm_directory: Path, tmp_path: Path):
    given = operation.Settings(prompt="The capital of <Spain> is", target="It is {} now", new_tokens=3, at="<Spain")
    record = operation.patchscope(tiny_lm_directory, tmp_path / "out", given)
    numbers = json.loads((tmp_path / "out" / "patchscope.json").read_text())
    assert [(c["row"], c["column"]) for c in numbers["cells"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    lm = bildung.load(tiny_lm_directory)
    target = target_prompt(lm, "It is {} now")
    again = patchscope(lm, numbers["tokens"], target, [Cell(numbers["place"], 1, 0)], new_tokens=3)
    assert numbers["cells"][2]["text"] == again.texts[0] and numbers["labels"][numbers["place"]] == "ain"
    assert numbers["cells"][2]["expected_prob"] == pytest.approx(float(again.expected_probs_R[0]), abs=1e-4)
    html = (tmp_path / "out" / "patchscope.html").read_text()
    assert "class HeatMap" in html  # the shared script is in it
    assert "&lt;" in html and "<Spain" not in html and "--at &#39;&lt;Spain&#39;" in html
    assert record.measured["runs"] == 4 and (tmp_path / "out" / "patchscope.png").stat().st_size > 4000
    # Layers by positions, through maps of the model to itself.
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"The capital of number {n} is Rome, said the assistant of {n * 7}." for n in range(40))
    )
    stream_map.stream_map(tiny_lm_directory, tmp_path / "map", stream_map.Settings(data=str(text), length=24))
    given = operation.Settings(prompt="The capital", across="position", new_tokens=0, map=tmp_path / "map")
    seen = operation.patchscope_of(lm, given)
    assert len(seen["cells"]) == 2 * len(seen["tokens"])
    assert {c["target_layer"] for c in seen["cells"] if c["layer"] == 1} == {1}
