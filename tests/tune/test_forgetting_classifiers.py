"""A budget for forgetting on `tune classify`: what the layers lose is measured through the source's language head."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import bildung
from bildung.core.errors import SettingsError
from bildung.core.record import Record
from bildung.core.settings import resolve
from bildung.data.batches import clm_examples, pad
from bildung.data.masking import MaskedBatch
from bildung.evaluate.card import CardSettings
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import replace_stores
from bildung.model.nf4 import Nf4
from bildung.model.store import LanguageModel
from bildung.train import fit as fit_module
from bildung.train.loss import LossSum
from bildung.train.masked import mlm
from bildung.train.objectives import clm
from bildung.tune.classify import Settings, classify
from bildung.tune.gauges import TEXTS
from bildung.tune.trunk import WithTexts, fixed_batches, speaking, text_batches_of
from tests.conftest import CONFIG, tiny_tokenizer
from tests.model.tiny_encoder import tiny_encoder
from tests.tune.conftest import GENERAL


@pytest.fixture(autouse=True)
def any_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets that are never reached are of use in these tests alone."""
    monkeypatch.setattr("bildung.tune.forgetting.MOST", math.inf)


RATES = {"lora": 2e-2, "full": 5e-3, "prompt": 0.5, "prefix": 0.5, "adapter": 5e-2, "ia3": 0.2}


@pytest.fixture
def texts(tmp_path: Path) -> str:
    rows = [{"text": word * 3, "label": number % 2} for number, word in enumerate(["sun ", "fog "] * 4)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def tuned(source: Path, out: Path, texts: str, general: str | None, **more: Any) -> Record:
    """A run that forgets much, by a large learning rate, looked at every two steps."""
    given: dict[str, Any] = dict(data=texts, forget_data=general, steps=8, forget_every=2, schedule="constant")
    given |= dict(batch_size=2, precision="fp32", warmup=0.0, method="lora")
    given |= {"learning_rate": RATES.get(more.get("method", "lora"), 1e-3)}
    return classify(source, out, resolve(Settings, given | more))


def layers_under_the_head_of(source: Path, classifier: Path) -> Any:
    """The source with the classifier's layers in place of its own, copied one by one."""
    lm, tuned_one = bildung.load(source), bildung.load(classifier)
    theirs = tuned_one.model.state_dict()
    shared = [name for name in lm.model.state_dict() if name in theirs]
    lm.model.load_state_dict({name: theirs[name] for name in shared}, strict=False)
    return lm


def prose_loss(lm: LanguageModel) -> float:
    batch = pad(clm_examples(lm.tokenizer, [GENERAL], 256), lm.tokenizer.pad_id)
    return fit_module.mean_loss(lm.model, clm, [batch])["loss"]


def held_to(budget_from: Any, run: Any) -> tuple[Record, dict[str, Any]]:
    """Twice the same run: free, and held to the most that it lost before it lost clearly more."""
    free = budget_from.measured["forgetting"]
    looks, start = free["looks"], free["at_start"]
    assert free["stopped_after"] is None
    beyond = next(place for place, (_, lost) in enumerate(looks) if place and lost > max(start, looks[0][1]) + 1e-3)
    budget = max(start, *(lost for _, lost in looks[:beyond])) + 1e-6
    record = run(budget)
    measured = record.measured["forgetting"]
    assert measured["looks"] == looks[: beyond + 1] and measured["kept_step"] == looks[beyond - 1][0]
    assert record.measured["steps"] == measured["stopped_after"] == looks[beyond][0]
    return record, measured


@pytest.mark.parametrize(
    "method", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in RATES if name != "full")]
)
def test_a_decoder_that_classifies_ends_within_it(
    method: str, source: Path, general: str, texts: str, tmp_path: Path
) -> None:
    more = {"method": method} | ({method: {"length": 4, "init": "random"}} if method in ("prompt", "prefix") else {})
    free = tuned(source, tmp_path / "free", texts, general, forget_budget=1e9, **more)
    out = tmp_path / "held"
    _, measured = held_to(free, lambda budget: tuned(source, out, texts, general, forget_budget=budget, **more))
    short = tuned(source, tmp_path / "short", texts, None, **more, steps=measured["kept_step"])
    assert short.measured["steps"] == measured["kept_step"]
    kept, expected = (bildung.load(place).model.state_dict() for place in (out, tmp_path / "short"))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in expected.items())
    before = prose_loss(bildung.load(source))
    lm = speaking(bildung.load(out), source)
    assert (prose_loss(lm) - before) / before == pytest.approx(measured["lost"], abs=1e-5)
    if method in ("lora", "full"):
        assert prose_loss(layers_under_the_head_of(source, out)) == pytest.approx(prose_loss(lm), abs=1e-5)


@pytest.mark.slow
def test_a_quantized_base_and_an_unembedding_of_its_own(general: str, texts: str, tmp_path: Path) -> None:
    """The head is read from the source, as it is stored there."""
    config = from_dict({**CONFIG, "tie_word_embeddings": False})
    made = LanguageModel(build(config, seed=3).eval(), tiny_tokenizer(), config)
    replace_stores(made.model, "*.layers.*", lambda linear: Nf4.quantize(linear.base.dense().detach()))
    source = bildung.save(made, tmp_path / "nf4")
    record = tuned(source, tmp_path / "out", texts, general, forget_budget=1e9)
    measured = record.measured["forgetting"]
    assert measured["at_start"] == 0 and abs(measured["lost"]) > 1e-4
    before, now = prose_loss(made), prose_loss(speaking(bildung.load(tmp_path / "out"), source))
    assert (now - before) / before == pytest.approx(measured["lost"], abs=1e-4)
    untied = tuned(source, tmp_path / "merged", texts, None, method="head", learning_rate=1e-3)
    assert untied.measured["steps"] == 8
    with pytest.raises(SettingsError, match="neither continues text nor fills in masked words"):
        tuned(tmp_path / "merged", tmp_path / "no", texts, general, forget_budget=0.1)


def test_an_encoder_is_measured_by_its_masked_words(texts: str, tmp_path: Path) -> None:
    """The masks are the same at every look; a source without such a head is refused."""
    prose = tmp_path / "prose.jsonl"
    prose.write_text(json.dumps({"text": "the cat sat on the mat and the dog ran. " * 20}) + "\n")
    made = tiny_encoder("BertForPreTraining", initializer_range=0.2)
    words = text_batches_of(made, str(prose), 32, 4, seed=0)
    fit_module.fit(made.model, words, mlm, torch.optim.AdamW(made.model.parameters(), 1e-2), steps=25)
    source = bildung.save(made, tmp_path / "source")
    common: dict[str, Any] = {"method": "full", "learning_rate": 2e-2}
    free = tuned(source, tmp_path / "free", texts, str(prose), forget_budget=1e9, **common)
    _, measured = held_to(
        free, lambda budget: tuned(source, tmp_path / "out", texts, str(prose), forget_budget=budget, **common)
    )
    lm = layers_under_the_head_of(source, tmp_path / "out")
    masked = fixed_batches(lm, str(prose), TEXTS, 64)
    assert all(isinstance(batch, MaskedBatch) for batch in masked)
    before, now = (fit_module.mean_loss(one.model, mlm, masked)["loss"] for one in (bildung.load(source), lm))
    assert (now - before) / before == pytest.approx(measured["lost"], abs=1e-5)
    bare = bildung.save(tiny_encoder("BertModel"), tmp_path / "bare")
    with pytest.raises(
        SettingsError, match=r"a bert of kind 'encoder' \(heads: pooler\), which neither continues text"
    ):
        tuned(bare, tmp_path / "no", texts, str(prose), forget_budget=0.1, **common)


def test_texts_are_rehearsed_before_the_end(
    source: Path, general: str, texts: str, tmp_path: Path, capsys: Any
) -> None:
    more: dict[str, Any] = {"forget_budget": 0.0, "method": "full", "learning_rate": 5e-3}
    more |= {"steps": 16, "forget_every": 4}
    alone = tuned(source, tmp_path / "alone", texts, general, **more).measured["forgetting"]
    record = tuned(source, tmp_path / "out", texts, general, **more, rehearse=general)
    measured = record.measured["forgetting"]
    assert [share for _, share in measured["rehearsal"]][:2] == [0.1, 0.25] and alone["rehearsal"] == []
    assert f"from here on 10% of the batches are of {general}" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    learned = ["accuracy" in row for row in rows if "loss" in row]
    assert (
        all(learned[:10])
        and not all(learned[10:])
        and all(row.get("rehearsed") == 1 for row in rows if "accuracy" not in row)
    )


def test_a_row_of_text_weighs_as_a_text_with_a_class(tiny_lm: LanguageModel, general: str) -> None:
    """And its gradient is that of the loss per token, in the layers that the classifier shares."""
    tiny_lm.model.requires_grad_(True)
    batch = text_batches_of(tiny_lm, general, 32, 2, seed=0)(0)
    objective = WithTexts(lambda model, batch: LossSum(torch.tensor(1.0), 7), tiny_lm.model)
    found = objective(None, batch)
    mean = clm(tiny_lm.model, batch)
    assert found.count == 2 and objective(None, "a text with a class").count == 7
    assert float(found.total.detach() / found.count) == pytest.approx(float(mean.total.detach() / mean.count), rel=1e-6)
    found.total.backward()
    assert float(tiny_lm.model.model.layers[0].mlp.up_proj.base.weight.grad.abs().sum()) > 0


def test_rehearsed_words_of_an_encoder_are_masked(tmp_path: Path) -> None:
    prose = tmp_path / "prose.jsonl"
    prose.write_text(json.dumps({"text": "the cat sat on the mat. " * 20}) + "\n")
    batches = text_batches_of(tiny_encoder(), str(prose), 24, 2, seed=0)
    assert isinstance(batches(0), MaskedBatch) and batches(0).num_targets > 0
    assert not torch.equal(batches(0).chosen_BL, batches(int(batches.batches_per_epoch) + 1).chosen_BL)


@pytest.mark.slow
def test_on_the_card(tiny_lm_directory: Path, texts: str, tmp_path: Path) -> None:
    """Before and after are the cards of a language model, and nothing is lost where nothing was learned."""
    measured = CardSettings(tasks=("sentiment_mini",), limit=6, sample_prompts=(), dtype="float32")
    more = {"steps": 2, "learning_rate": 1e-9, "forget_budget": 0.5, "card": measured}
    record = tuned(tiny_lm_directory, tmp_path / "out", texts, None, **more)
    assert record.measured["forgetting"]["measured_on"] == "card"
    assert record.measured["forgetting"]["looks"] == [[2, 0.0]]
    values = [one["tasks"]["sentiment_mini"]["value"] for one in (record.before, record.after)]
    assert values[0] == values[1] and record.after["tasks"]["sentiment_mini"]["change"]["difference"] == 0


@pytest.mark.slow
def test_a_killed_run_decides_as_the_one_that_was_not(
    source: Path, general: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"forget_budget": 0.0, "rehearse": general, "checkpoint_every": 1, "steps": 12}
    more |= {"async_checkpoints": False, "method": "full", "learning_rate": 5e-3}
    whole = tuned(source, tmp_path / "whole", texts, general, **more)
    log = fit_module.Log.add

    def killed(self: Any, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit_module.Log, "add", killed)
        tuned(source, tmp_path / "out", texts, general, **more)
    record = tuned(source, tmp_path / "out", texts, general, **more)
    assert record.measured["forgetting"] == whole.measured["forgetting"]
    kept, expected = (bildung.load(tmp_path / place).model.state_dict() for place in ("out", "whole"))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in expected.items())
