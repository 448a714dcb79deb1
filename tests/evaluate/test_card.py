"""The card: what its fingerprint covers, when it is taken over, and what stands in for missing data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bildung.core.errors import SettingsError
from bildung.core.operation import Job
from bildung.core.record import Record
from bildung.evaluate import card as card_module
from bildung.evaluate.card import CardSettings, after, available, before, card, fingerprint, load_tasks
from bildung.evaluate.metrics import paired_difference

SMALL = CardSettings(
    tasks=("elements", "prose", "instructions_mini"), limit=6, context=96, dtype="float32", sample_tokens=3
)


def changed(**settings):
    return CardSettings(**{**vars(SMALL), **settings})


@pytest.fixture(autouse=True)
def no_nursery(tmp_path, monkeypatch):
    monkeypatch.setenv("BILDUNG_NURSERY", str(tmp_path / "none"))


def job(tmp_path, record=None):
    return Job("toy", None, tmp_path, None, source_record=record)


def test_a_card(tiny_lm):
    made = card(tiny_lm, SMALL)
    assert list(made["tasks"]) == ["elements", "prose", "instructions_mini"]
    for entry in made["tasks"].values():
        assert set(entry) == {"metric", "value", "stderr", "n", "higher_is_better", "items", "docs"}
        assert entry["n"] == len(entry["items"]) == 6 and entry["stderr"] >= 0
    assert made["tasks"]["elements"]["items"] != made["tasks"]["prose"]["items"]
    assert [sample["prompt"] for sample in made["samples"]] == list(SMALL.sample_prompts)
    assert all(sample["answer"] for sample in made["samples"])
    json.dumps(made, allow_nan=False)


def test_twice_the_same(tiny_lm):
    first, second = card(tiny_lm, SMALL), card(tiny_lm, changed(batch_tokens=100))
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in second.items() if k != "seconds"}


def test_measuring_leaves_the_model_and_the_random_numbers_alone(tiny_lm):
    tiny_lm.model.train()
    state, weights = torch.get_rng_state(), {n: p.clone() for n, p in tiny_lm.model.named_parameters()}
    card(tiny_lm, changed(dtype="bfloat16"))
    assert torch.equal(torch.get_rng_state(), state) and tiny_lm.model.training
    assert all(torch.equal(p, weights[n]) for n, p in tiny_lm.model.named_parameters())


def test_the_dtype_counts(tiny_lm):
    exact, rough = card(tiny_lm, SMALL), card(tiny_lm, changed(dtype="bfloat16"))
    assert exact["tasks"]["prose"]["value"] != rough["tasks"]["prose"]["value"]
    assert exact["tasks"]["prose"]["value"] == pytest.approx(rough["tasks"]["prose"]["value"], rel=0.02)


@pytest.mark.parametrize(
    "settings",
    [{"limit": 5}, {"seed": 1}, {"dtype": "bfloat16"}, {"context": 64}, {"tasks": ("prose",)}, {"sample_tokens": 4}],
)
def test_the_fingerprint_covers_the_settings(tiny_lm, settings):
    prints = {fingerprint(tiny_lm, s, load_tasks(tiny_lm, s)[0]) for s in (SMALL, changed(**settings))}
    assert len(prints) == 2


def test_the_fingerprint_covers_template_and_bos_and_not_the_weights(tiny_lm):
    tasks, _ = load_tasks(tiny_lm, SMALL)
    first = fingerprint(tiny_lm, SMALL, tasks)
    tiny_lm.model.model.norm.weight.data.mul_(2)
    assert fingerprint(tiny_lm, changed(batch_tokens=7), tasks) == first
    tiny_lm.tokenizer.uses_bos = True
    with_bos = fingerprint(tiny_lm, SMALL, tasks)
    tiny_lm.tokenizer.chat_template += " "
    assert len({first, with_bos, fingerprint(tiny_lm, SMALL, tasks)}) == 3


def test_before_takes_over_the_card_of_the_source(tiny_lm, tmp_path, monkeypatch):
    known = card(tiny_lm, SMALL)
    known["tasks"]["prose"]["change"] = {"difference": 1.0, "stderr": 0.1}
    record = Record(operation="toy", settings={}, after=known)
    monkeypatch.setattr(card_module, "score", None)  # measuring would fail
    taken = job(tmp_path, record)
    before(taken, tiny_lm, SMALL)
    assert taken.before["tasks"]["prose"]["value"] == known["tasks"]["prose"]["value"]
    assert "change" not in taken.before["tasks"]["prose"]  # it tells what the source's operation did
    with pytest.raises(TypeError):
        before(job(tmp_path, record), tiny_lm, changed(limit=5))


def test_after_notes_the_paired_change(tiny_lm, tmp_path):
    work = job(tmp_path)
    before(work, tiny_lm, SMALL)
    tiny_lm.model.model.norm.weight.data.mul_(0.98)
    after(work, tiny_lm, SMALL)
    old, new = (one["tasks"]["prose"] for one in (work.before, work.after))
    expected = paired_difference("perplexity", old["items"], new["items"])
    assert new["change"] == {"difference": expected.value, "stderr": expected.stderr}
    assert expected.value == pytest.approx(new["value"] - old["value"]) and expected.value != 0
    assert 0 < expected.stderr < new["stderr"]


def test_after_without_before(tiny_lm, tmp_path):
    work = job(tmp_path)
    assert "change" not in after(work, tiny_lm, SMALL)["tasks"]["prose"] and work.after


def test_missing_data_are_replaced_under_another_name_and_said(tiny_lm):
    made = card(tiny_lm, changed(tasks=("sentiment", "reviews"), sample_prompts=()))
    assert list(made["tasks"]) == ["sentiment_mini"]
    assert made["notes"] == ["sentiment_mini stands in for sentiment: nursery:rt was not fetched (bildung nursery rt)"]
    assert made["skipped"] == {"reviews": "nursery:imdb was not fetched (bildung nursery imdb)"}
    assert available("prose") == ("prose", "")


def test_a_model_without_chat_template_skips_the_chat_task(tiny_lm):
    tiny_lm.tokenizer.chat_template = None
    made = card(tiny_lm, SMALL)
    assert made["skipped"] == {"instructions_mini": "the model has no chat template"}
    assert list(made["tasks"]) == ["elements", "prose"] and len(made["samples"]) == 3


def test_conversations_that_the_template_refuses_are_counted(tiny_lm):
    tiny_lm.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tiny_lm.tokenizer.chat_template
    )
    settings = changed(tasks=("instructions_mini",), limit=48)
    made = card(tiny_lm, settings)
    refused = 48 - made["tasks"]["instructions_mini"]["n"]
    assert refused > 0
    assert any(note.startswith(f"instructions_mini: {refused} of 48 refused by the chat") for note in made["notes"])
    assert any("cut to 96 tokens" in note for note in made["notes"])


def test_a_context_longer_than_the_model_is_not_used(tiny_lm):
    assert card(tiny_lm, changed(context=10_000))["tasks"] == card(tiny_lm, changed(context=256))["tasks"]


def test_samples_that_exceed_the_models_context_are_left_out_with_a_note(tiny_lm):
    short = replace(tiny_lm, config=replace(tiny_lm.config, max_position_embeddings=60))
    short.model.config = short.config
    made = card(short, changed(tasks=("prose",), sample_prompts=("Sea.", "Sea. " * 60)))
    assert [sample["prompt"] for sample in made["samples"]] == ["Sea."]
    assert made["notes"][-1] == "samples: 1 of 2 prompts and 3 new tokens exceed the context of 60"


def test_only_the_assistants_tokens_count(tiny_lm, monkeypatch):
    from bildung.data.text import conversations
    from bildung.tokens.chat_template import encode_conversation

    settings = changed(tasks=("instructions_mini",), limit=48, context=256)
    counted = sum(item[1] for item in card(tiny_lm, settings)["tasks"]["instructions_mini"]["items"])
    masks = [encode_conversation(tiny_lm.tokenizer, one)[1][:257] for one in conversations("mini:chat")]
    assert counted == sum(map(sum, masks)) < sum(map(len, masks))


def test_two_tasks_of_one_name_are_refused(tiny_lm):
    with pytest.raises(SettingsError, match="two of the tasks are called 'prose'"):
        card(tiny_lm, changed(tasks=("prose", "prose")))


def test_a_generation_task(tiny_lm, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "The capital of France"}\n{"q": "The"}\n')
    path = tmp_path / "task.yaml"
    text = (
        "task: echo\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: q\ngeneration_kwargs: {until: [], max_gen_toks: 4}\n"
    )
    path.write_text(text + "doc_to_target: q\n")
    settings = changed(tasks=(str(path),), sample_prompts=())
    assert card(tiny_lm, settings)["tasks"]["echo"]["items"] == [0.0, 0.0]
    from bildung.evaluate.answers import answers

    tokenizer = tiny_lm.tokenizer
    said = answers(tiny_lm, [tokenizer.encode("The capital of France"), tokenizer.encode("The")], 4)
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"q": "The capital of France", "a": said[0]}) + "\n" + json.dumps({"q": "The", "a": "no"}) + "\n"
    )
    path.write_text(text + 'doc_to_target: "{{a}}"\n')
    assert card(tiny_lm, settings)["tasks"]["echo"]["items"] == [1.0, 0.0]


@pytest.mark.parametrize("name", ["limit", "context", "batch_tokens", "sample_tokens"])
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(name):
    for value in (0, -3):
        with pytest.raises(SettingsError, match=f"{name} = {value}; it must be a whole number from 1"):
            changed(**{name: value})
