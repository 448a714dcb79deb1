"""Labelled texts: classes by name or number, what is dropped, and batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bildung.core.errors import DataError
from bildung.data.labelled import encode_labelled, pad_texts, read_labelled, text_batches
from tests.model.tiny_encoder import wordpiece


def file(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_classes_and_dropped_rows(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": 10},
        {"text": "b", "label": 2},
        {"text": "c", "label": 10},
        {"text": " ", "label": 2},
    ]
    data = read_labelled(file(tmp_path, [*rows, {"text": "d"}, {"text": "e", "label": [1]}]))
    assert data.classes == ("2", "10") and data.labels == [1, 0, 1] and len(data) == 3
    assert "no text" in data.notes[0] and "no class" in data.notes[0]
    assert data.take([2, 0]).texts == [("c", None), ("a", None)]
    flags = read_labelled(file(tmp_path, [{"text": "a", "label": True}, {"text": "b", "label": False}]))
    assert flags.classes == ("0", "1") and flags.labels == [1, 0]
    named = read_labelled(file(tmp_path, [{"q": "a", "r": "x", "c": "no"}, {"q": "b", "r": "y", "c": "yes"}]),
                          text="q", second="r", label="c")  # fmt: skip
    assert named.classes == ("no", "yes") and named.texts[1] == ("b", "y")


def test_classes_that_do_not_fit(tmp_path: Path) -> None:
    source = file(tmp_path, [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}])
    assert read_labelled(source, classes=("good", "bad", "fair")).labels == [0, 1]
    with pytest.raises(DataError, match=r"'good' is none of the 2 known.*did you mean 'goods'"):
        read_labelled(source, classes=("goods", "bad"))
    with pytest.raises(DataError, match="the only class is 'x'"):
        read_labelled(file(tmp_path, [{"text": "a", "label": "x"}]))


def test_batches(tmp_path: Path) -> None:
    tokenizer = wordpiece()
    source = file(tmp_path, [{"text": "the cat sat", "label": 0}, {"text": "a dog", "label": 1}] * 2)
    items = encode_labelled(tokenizer, read_labelled(source), 4)
    batch = pad_texts(items[:2], 0)
    assert batch.tokens_BL.shape == (2, 8) and batch.num_tokens == 8 and batch.num_targets == 2
    assert batch.tokens_BL[0, 3] == tokenizer.id_of("[SEP]") and batch.labels_B.tolist() == [0, 1]
    assert [one.num_targets for one in text_batches(items, 3, 0)] == [3, 1]
    assert batch.to("cpu").types_BL.sum() == 0


def test_messages_say_what_the_rows_have(tmp_path: Path) -> None:
    """A misspelt column is answered with the columns there are, a label of another kind with the problem it is for, and
    rows left out are named where too few classes remain."""
    named = file(tmp_path, [{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    with pytest.raises(DataError, match=r"columns of the first row are: text, label. did you mean 'label'"):
        read_labelled(named, label="lable")
    with pytest.raises(DataError, match="multi_label a list"):
        read_labelled(file(tmp_path, [{"text": "a", "label": ["x", "y"]}]))
    with pytest.raises(DataError, match=r"at least two are needed. 1 row not used: 1 no class in 'label'"):
        read_labelled(file(tmp_path, [{"text": "a", "label": 1}, {"text": "b", "label": 2.5}]))


def test_what_is_held_out_has_as_large_a_share_of_each_class(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": "rare" if n % 10 == 3 else "one" if n == 99 else "often"} for n in range(100)]
    data = read_labelled(file(tmp_path, rows))
    for seed in range(3):
        kept, aside = data.set_aside(20, seed)
        assert [aside.labels.count(c) for c in range(3)] == [18, 0, 2] and data.classes == ("often", "one", "rare")
        assert sorted(kept.texts + aside.texts) == sorted(data.texts) and kept.labels.count(1) == 1
    assert data.set_aside(20, 2)[1].texts == aside.texts != data.set_aside(20, 3)[1].texts
    assert "of the 20 texts held out none has 'one'" in data.notes[0]
    assert min(map(data.set_aside(97, 0)[0].labels.count, range(3))) == 1
    with pytest.raises(DataError, match="held_out = 100 of 100 usable rows"):
        data.set_aside(100, 0)
    numbers = read_labelled(
        file(tmp_path, [{"text": "a", "label": n} for n in range(9)]), problem="regression"
    ).set_aside(3, 0)[1]
    assert len(numbers) == 3 and not numbers.notes


def test_a_number_and_the_same_as_text_are_not_merged(tmp_path: Path) -> None:
    source = file(tmp_path, [{"text": "a", "label": one} for one in (0, 1, "1", 1)])
    with pytest.raises(DataError, match=r"'label' stands 1 as a number \(2 times\) and as text, \"1\" \(1 times\)"):
        read_labelled(source)
