"""One tiny model goes through the whole chain: adopted, tuned, aligned, quantized, looked into, asked, reported."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import bildung
from bildung.app.live import Command, command
from bildung.core.record import hash_directory, read_record
from tests.processes import START, command_line

CARD = {"tasks": ["capitals", "sentiment_mini"], "limit": 4, "dtype": "float32", "sample_tokens": 4}
SHORT = {"max_length": 160, "steps": 3, "batch_size": 2, "rank": 2, "precision": "fp32", "checkpoint_every": 1}
LIFE = [
    {"as": "base", "do": "adopt", "from": None},
    {"as": "tuned", "do": "tune lora", "with": {"data": "mini:chat", **SHORT}},
    {"as": "merged", "do": "merge", "with": {"compare_texts": 1}},
    {"as": "aligned", "do": "align dpo", "with": {"data": "mini:preferences", "held_out": 2, **SHORT}},
    {"as": "whole", "do": "merge", "with": {"compare_texts": 1}},
    {"as": "int8", "do": "quantize", "from": "whole", "with": {"method": "int8", "compare_texts": 1}},
    {"as": "nf4", "do": "quantize", "from": "whole", "with": {"method": "nf4", "compare_texts": 1}},
    {"as": "schooled", "do": "tune lora", "from": "nf4", "with": {"data": "mini:chat", **SHORT}},
    {"as": "lens", "do": "look logit_lens", "from": "base", "with": {"prompt": "The sea", "against": "@schooled"}},
    {"as": "heads", "do": "look attention", "from": "nf4", "with": {"prompt": "The sea"}},
    {"as": "talk", "do": "chat", "from": "schooled", "with": {"prompts": ["Hello."], "new_tokens": 4}},
    {
        "as": "report",
        "do": "report",
        "from": "whole",
        "with": {"life": ["@base", "@tuned", "@aligned", "@whole", "@nf4", "@talk"]},
    },
]


@pytest.fixture
def recipe(tiny_lm_directory: Path, tmp_path: Path) -> Path:
    steps = [{**step, "from": str(tiny_lm_directory)} if step["as"] == "base" else step for step in LIFE]
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "out": str(tmp_path / "life"), "card": CARD, "life": steps}))
    return path


def test_a_whole_life(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(Command(recipe=recipe))
    assert "report.html" in capsys.readouterr().out
    life = tmp_path / "life"
    records = {step["as"]: read_record(life / str(step["as"])) for step in LIFE}
    assert all(record is not None for record in records.values())

    # The chain of ancestors is whole, and what one step left is what the next one found.
    schooled = records["schooled"]
    assert schooled is not None
    assert [one["operation"] for one in schooled.ancestors] == [
        "adopt",
        "tune lora",
        "merge",
        "align dpo",
        "merge",
        "quantize",
    ]
    for name in ("tuned", "merged", "aligned", "whole", "int8", "nf4", "schooled"):
        record = records[name]
        assert (
            record is not None and set(record.before["tasks"]) == set(record.after["tasks"]) and record.peak_bytes > 0
        )
        values = [task["value"] for task in record.after["tasks"].values()]
        assert values and all(isinstance(value, float) for value in values)

    # What came out is ordinary: the peer computes the same logits from it.
    tokens = torch.arange(3, 23)[None]
    peer = transformers.AutoModelForCausalLM.from_pretrained(life / "whole", dtype=torch.float32)
    with torch.no_grad():
        ours = bildung.load(life / "whole", dtype="float32").model(tokens)
        torch.testing.assert_close(ours, peer(tokens).logits, atol=1e-4, rtol=1e-4)
    report = (life / "report/report.html").read_text(encoding="utf-8")
    assert all(word in report for word in ("tune lora", "align dpo", "quantize", "capitals"))

    # A second time nothing is done.
    command(Command(recipe=recipe))
    assert capsys.readouterr().out.count("up to date") >= len(LIFE)
    again = {step["as"]: read_record(life / str(step["as"])) for step in LIFE}
    assert {n: r and r.started for n, r in again.items()} == {n: r and r.started for n, r in records.items()}


@pytest.mark.slow  # lives that are killed: test_live.py, of toys; operations that are: test_kills.py
def test_a_life_killed_at_any_moment_ends_in_the_same_result(recipe: Path, tmp_path: Path) -> None:
    """kill -9 soon after every ninth new file until it gets through, against a life nobody disturbed."""
    steps = yaml.safe_load(recipe.read_text())["life"][:4]
    hashes = []
    for name in ("whole", "killed"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, "out": str(tmp_path / name), "card": CARD, "life": steps}))
        chance, seen, kills, ended = random.Random(name), set[Path](), 0, None
        while ended != 0:
            process = START.Process(target=command_line, args=(["live", str(path)], tmp_path / "said"))
            process.start()
            known = len(seen)
            while process.is_alive() and (name == "whole" or len(seen) < known + 9):
                seen |= {Path(place, file) for place, _, files in os.walk(tmp_path / name) for file in files}
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.05))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.join()
            ended = process.exitcode
            assert ended in (0, -signal.SIGKILL), (tmp_path / "said").read_text()
        assert kills >= 3 if name == "killed" else kills == 0
        hashes.append({step["as"]: hash_directory(tmp_path / name / step["as"]) for step in steps})
        assert not list((tmp_path / name).glob("*.partial"))
        last = json.loads((tmp_path / name / "aligned/record.json").read_text())
        assert last["measured"]["loss_at_start"] == pytest.approx(0.693147, abs=1e-5)
    # An adapter names the place of its base, so only what does not hold a path can be equal byte for byte.
    for step in ("base", "merged"):
        assert hashes[0][step] == hashes[1][step]
    for step in ("tuned", "aligned"):
        adapters = [(tmp_path / name / step / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")]
        assert adapters[0] == adapters[1]
