"""Probes: selectivity and bits where the answer is known; words find their tokens; every kind of model is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bildung
from bildung.core.errors import DataError, NoSuchSite, SettingsError
from bildung.data.tagged import prose, read_tagged
from bildung.look import probe as operation
from bildung.look.probing import activations
from bildung.look.probing.activations import Read, collect, vector_sites, word_units
from bildung.look.probing.probes import Options, control_labels, online_code, train_probe
from bildung.look.probing.selectivity import sweep
from bildung.look.probing.vectors import Vectors
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.int8 import Int8
from bildung.model.linear import replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.store import LanguageModel
from bildung.model.taps import observe
from bildung.tokens.spans import encode_with_spans, tokens_of
from tests.conftest import CONFIG, tiny_tokenizer

FAST = Options(epochs=15, batch_size=64, learning_rate=5e-2, hidden=16)


def constructed() -> tuple[list[str], list[str], list[int], Tensor, Tensor]:
    """(types, labels, texts, one-hot vectors of the types, one feature that is the label and nothing else)."""
    generator = torch.Generator().manual_seed(0)
    type_N = torch.randint(12, (600,), generator=generator)
    label_N = torch.where(type_N < 9, type_N % 3, torch.randint(3, (600,), generator=generator))
    noise = torch.randn(600, 8, generator=generator)
    noise[:, 0] = label_N.float() + 0.05 * noise[:, 0]
    noise[:, 1] = (label_N == 1).float() + 0.05 * noise[:, 1]
    types, labels = [f"word {t}" for t in type_N.tolist()], [f"tag {t}" for t in label_N.tolist()]
    return types, labels, [i // 10 for i in range(600)], torch.eye(12)[type_N], noise


def test_a_probe_of_the_type_is_not_selective_and_one_of_the_property_is() -> None:
    types, labels, texts, one_hot, feature = constructed()
    found = sweep({"type": one_hot, "feature": feature}, labels, types, texts, options=FAST, seeds=1)
    accuracy, control, selectivity = (
        values.mean(-1) for values in (found.score_PSR, found.control_PSR, found.selectivity_PSR)
    )
    assert torch.equal(found.selectivity_PSR, found.score_PSR - found.control_PSR)
    # One-hot types: the control task is memorised to the last word, the property only as far as the type tells it.
    assert control[:, 0].min() == 1 and selectivity[:, 0].max() < 0
    assert accuracy[:, 0] == pytest.approx(found.by_type, abs=0.04)
    # The property alone: always right, and the control task no better than the property's own correlation with types.
    assert accuracy[:, 1].min() > 0.97 and selectivity[:, 1].min() > 0.25
    assert (found.units[0] + found.units[1] + found.units[2]) == 600 and found.units[0] == 480


def test_bits_are_few_where_the_label_can_be_read_off() -> None:
    types, labels, texts, one_hot, feature = constructed()
    vectors = {"type": one_hot, "feature": feature}
    found = sweep(vectors, labels, types, texts, kinds=("linear",), options=FAST, seeds=1, bits=True)
    assert found.bits_PSR is not None and found.control_bits_PSR is not None
    (by_type, by_feature), (control_by_type, control_by_feature) = (
        bits[0, :, 0].tolist() for bits in (found.bits_PSR, found.control_bits_PSR)
    )
    assert by_feature < 0.45 < by_type < found.uniform_bits == math.log2(3)
    assert control_by_type < 0.6 < 0.9 < control_by_feature


def test_control_labels_are_those_of_the_published_code() -> None:
    """control-tasks/task.py, CorruptedPartOfSpeechLabelTask: types as written, of all parts together; one label
    each, wherever it stands; drawn from the distribution of tags over tokens, not over types."""
    types = [f"{i}" for i in range(4000)] + ["the"] * 12000 + [f"{i}" for i in reversed(range(4000))]
    labels_N = torch.tensor([name == "the" for name in types]).long()  # 60 % of the tokens, 1 of 4001 types
    drawn = control_labels(types, labels_N, seed=3)
    assert torch.equal(drawn[:4000], drawn[-4000:].flip(0)) and len(drawn[4000:16000].unique()) == 1
    assert drawn[:4000].float().mean().item() == pytest.approx(0.6, abs=0.03)
    assert torch.equal(drawn, control_labels(types, labels_N, seed=3))
    assert not torch.equal(drawn, control_labels(types, labels_N, seed=4))
    cased = control_labels(["May", "may"] * 200, torch.arange(400) // 2, seed=0)
    assert cased[0] != cased[1] and len(cased.unique()) == 2


def test_probes_stop_where_the_published_code_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """control-tasks/regimen.py: Adam at 1e-3, and the end at the fifth look at the development part without a loss that
    is 0.001 better."""
    steps: list[float] = []
    step = torch.optim.Adam.step

    def counted(self: torch.optim.Adam, *given: Any) -> Any:
        steps.append(self.param_groups[0]["lr"])
        return step(self, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    x_NF, y_N = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    probe = train_probe("linear", Options(), (x_NF, y_N), (x_NF, 1 - y_N), 2, seed=0)  # learning makes it worse
    assert len(steps) == 6 and steps[:3] == [1e-3, 1e-3, 5e-4]
    again = train_probe("linear", Options(epochs=1), (x_NF, y_N), (x_NF, 1 - y_N), 2, seed=0)
    assert torch.equal(probe.layers[0].weight, again.layers[0].weight)  # the best is kept, here the first


def test_online_code_is_the_sum_of_its_stretches() -> None:
    """By hand: 8 labels of 4 classes; 2 at 2 bits, then 2 at p = 1/2, then 4 at p = 1/4 or so says a stub."""
    read: list[int] = []

    def fit(x_NF: Tensor, y_N: Tensor) -> Any:
        read.append(len(y_N))
        p = {2: 0.5, 4: 0.25}[len(y_N)]
        return lambda new: torch.full((len(new), 4), p).log()

    bits = online_code(fit, torch.zeros(8, 1), torch.arange(8) % 4, 4, portions=(0.25, 0.5, 1.0))
    assert read == [2, 4] and bits == pytest.approx(2 * 2 + 2 * 1 + 4 * 2)


@pytest.mark.parametrize(("name", "value"), [("seeds", 0), ("limit", 0), ("max_length", 3), ("memory", -1.0)])
def test_numbers_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"{name} = {value}; it must be at least"):
        operation.check(operation.Settings(data="x", **{name: value}))


def test_regression_and_its_baseline() -> None:
    x_NF = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
    labels = (3 * x_NF[:, 2] + 40).tolist()
    found = sweep({"x": x_NF}, labels, ["a"] * 400, range(400), kinds=("linear",), options=FAST, seeds=1)
    assert found.classes is None and found.score_PSR.item() > 0.98 and abs(found.majority) < 0.1
    with pytest.raises(DataError, match="description length"):
        sweep({"x": x_NF}, labels, ["a"] * 400, range(400), bits=True)


def test_the_rank_of_a_linear_probe_limits_it() -> None:
    x_NF = torch.eye(6).repeat(20, 1)
    y_N = torch.arange(120) % 6
    losses = {}
    for rank in (1, None):
        options = Options(epochs=60, batch_size=32, learning_rate=3e-2, rank=rank)
        probe = train_probe("linear", options, (x_NF, y_N), (x_NF, y_N), 6, seed=0)
        losses[rank] = torch.nn.functional.cross_entropy(probe(x_NF), y_N).item()
    assert losses[None] < 0.1 < losses[1]


def test_brown_sentences_become_prose_whose_words_are_found_again() -> None:
    sentences, notes = read_tagged("mini:brown")
    assert len(sentences) == 120 and not notes
    assert {label for one in sentences for label in one.labels} <= set(
        "NOUN VERB ADJ ADV PRON DET ADP CONJ NUM PRT PUNCT X".split()
    )
    assert read_tagged("mini:brown", tag_set="raw", limit=3)[0][0].labels != sentences[0].labels
    text, spans = prose(["``", "No", "''", ",", "he", "said", ";", ";", "(", "once", ")"])
    assert text == '"No", he said; (once)'
    assert [text[a:b] for a, b in spans] == ['"', "No", '"', ",", "he", "said", ";", "", "(", "once", ")"]
    tokenizer = tiny_tokenizer()
    for one in sentences[:20]:
        text, spans = prose(one.words)
        _, pieces = encode_with_spans(tokenizer, text)
        for (start, end), mine in zip(spans, tokens_of(spans, pieces), strict=True):
            assert text[start:end] == "".join(text[a:b] for a, b in (pieces[place] for place in mine)).strip()


def test_words_without_a_token_of_their_own_are_counted_and_named(tiny_lm: LanguageModel) -> None:
    backend = tiny_lm.tokenizer.backend
    backend.add_tokens([" said."])  # one token for two words
    sentence = read_tagged("mini:brown", limit=1)[0][0]
    sentence = type(sentence)(["He", "said", ".", ";", ";", "Truly"], ["A", "B", "C", "D", "E", "F"], "here:7")
    units = word_units(tiny_lm, [sentence], "last", 100)
    assert units.types == ["He", ";", "Truly"]
    assert units.left_out["its token stands for a neighbour too"] == 2
    assert units.left_out["a doubled punctuation mark"] == 1
    assert "'said' in here:7" in units.report()[0]
    longest = len(units.reads[0].tokens) - 1
    cut = word_units(tiny_lm, [sentence], "last", longest)
    assert cut.types == ["He", ";"] and cut.left_out[f"beyond max_length = {longest} tokens"] == 1


def lm_of(kind: str) -> LanguageModel:
    special = dict(vocab_size=320, bos_token_id=0, eos_token_id=2, pad_token_id=2)
    keys: dict[str, Any] = {
        "llama": CONFIG,
        "bert": dict(special, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                     initializer_range=0.2, max_position_embeddings=256, architectures=["BertForMaskedLM"]),
        "t5": dict(special, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=2),
    }[kind]  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.named |= {"cls_token": "<|im_start|>", "sep_token": "<|im_end|>"}
    config = from_dict({"model_type": kind, **keys})
    return LanguageModel(build(config, seed=3).eval(), tokenizer, config)


@pytest.mark.parametrize("kind", ["llama", "lora", "int8", "bert", "t5"])
def test_activations_of_every_kind_of_model_are_those_of_one_text_alone(kind: str) -> None:
    lm = lm_of(kind if kind in ("bert", "t5") else "llama")
    linear = next(iter(lm.model.linears().values()))
    if kind == "lora":
        linear.deltas["tune"] = LowRank(linear.in_features, linear.out_features, rank=2, scaling=1.0)
        torch.nn.init.normal_(next(iter(linear.deltas["tune"].parameters())))
    if kind == "int8":
        replace_stores(lm.model, "all", lambda linear: Int8.quantize(linear.weight()))
    sentences = read_tagged("mini:brown", limit=6)[0]
    units = word_units(lm, sentences, "mean", 100)
    prefix = "encoder." if kind == "t5" else ""
    chosen = [*vector_sites(lm, ()), f"{prefix}layers.1.attn.q"]
    assert len(chosen) == 4
    found = collect(lm, units.reads, chosen)
    n = sum(len(read.picks) for read in units.reads[:3]) + 1  # the second word of the fourth text
    read = units.reads[3]
    tokens_BL = torch.tensor([read.tokens])
    with observe(lm.model, chosen) as seen, torch.no_grad():
        lm.model.encode(tokens_BL) if kind == "t5" else lm.model.hidden(tokens_BL)
    for site in chosen:
        assert found[site].shape[0] == len(units.labels)
        alone = seen[site][0].flatten(1)[read.picks[1]].mean(0)
        assert torch.allclose(found[site][n], alone, atol=2e-4), site


def test_sites_without_a_vector_per_token_are_refused() -> None:
    with pytest.raises(NoSuchSite, match="B N L S"):
        vector_sites(lm_of("llama"), ["layers.0.attn.probs"])
    with pytest.raises(NoSuchSite, match="not reached"):
        vector_sites(lm_of("t5"), ["decoder.layers.0.mlp.out"])
    with pytest.raises(NoSuchSite, match="did you mean"):
        vector_sites(lm_of("llama"), ["layers.0.resid_pst"])


def test_sites_are_read_in_one_pass() -> None:
    lm, calls = lm_of("llama"), []
    run = lm.model.hidden
    lm.model.hidden = lambda *args, **kwargs: (calls.append(1), run(*args, **kwargs))[1]
    collect(lm, [Read([5, 6, 7], [[1]]), Read([5, 6], [[0], [1]])], vector_sites(lm, ()))
    assert len(calls) == 1


def test_vectors_that_are_too_many_lie_in_files_and_a_stopped_reading_goes_on(tmp_path: Path, monkeypatch) -> None:
    lm, calls = lm_of("llama"), []
    lm.model.to(torch.bfloat16)
    run = lm.model.hidden

    def stops(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    reads = [Read([5 + n] * (1 + n % 4), [[0]] if n % 3 else []) for n in range(20)]
    expected = collect(lm, reads, ["layers.1.resid_post", "layers.0.attn.q"])
    monkeypatch.setattr(activations, "BATCH_TOKENS", 8)
    monkeypatch.setattr(lm.model, "hidden", stops)
    given: dict[str, Any] = {"folder": tmp_path / "vectors", "most_bytes": 100.0}
    with pytest.raises(KeyboardInterrupt):
        collect(lm, reads, list(expected), **given)
    found = collect(lm, reads, list(expected), **given)
    assert len(calls) == 1 + sum(any(reads[i].picks for i in batch) for batch in activations._batches(reads))
    for name, x in expected.items():
        assert x.dtype == torch.bfloat16 and torch.allclose(found[name].float(), x.float(), atol=0.05)
        assert (tmp_path / f"vectors/{name}.bin").stat().st_size == x.numel() * 2


@pytest.mark.parametrize("level", ["word", "text"])
def test_operation_leaves_page_picture_and_numbers(level: str, tmp_path: Path, monkeypatch, capsys) -> None:
    bildung.save(lm_of("llama"), tmp_path / "lm")
    data = {"data": "mini:brown"} if level == "word" else {"data": "mini:sentiment", "level": "text"}
    kinds = {"probes": ("linear", "mlp"), "memory": 0.0} if level == "word" else {"probes": ("linear",)}
    settings = operation.Settings(**data, **kinds, limit=30, seeds=2, options=Options(epochs=2), mdl=level == "text")
    mapped: list[Any] = []
    map_files = Vectors._map
    monkeypatch.setattr(Vectors, "_map", lambda self, *given: (mapped.append(self.folder), map_files(self, *given))[1])
    record = operation.probe(tmp_path / "lm", tmp_path / "out", settings)
    assert len(mapped) == (level == "word") and not (tmp_path / "out/vectors").exists()
    assert f"look probe  {6 * len(settings.probes)}/{6 * len(settings.probes)}" in capsys.readouterr().err
    numbers = json.loads((tmp_path / "out/probe.json").read_text())
    assert numbers["sites"] == ["layers.0.resid_pre", "layers.0.resid_post", "layers.1.resid_post"]
    assert operation.along(numbers["sites"])[0] == [0, 1, 2] != operation.along(numbers["sites"][::2])[0]
    assert operation.along(["layers.3.mlp.out", "layers.5.resid_post"])[0] == [0, 1]
    scores = numbers["probes"]["linear"]
    for s in range(3):
        assert scores["selectivity"][s][0] == pytest.approx(scores["score"][s][0] - scores["control"][s][0], abs=2e-4)
        assert scores["score"][s][1] is not None
    assert ("bits" in scores) == (level == "text")
    page = (tmp_path / "out/probe.html").read_text()
    assert (
        f"{scores['score'][2][0]:.3f} ± {scores['score'][2][1]:.3f}" in page
        and "http://" not in page
        and "https://" not in page
    )
    assert numbers["command"].endswith("--options.epochs 2") and "--limit 30 --seeds 2" in numbers["command"]
    assert ("--level text" in numbers["command"]) == ("--mdl" in numbers["command"]) == (level == "text")
    assert (tmp_path / "out/probe.png").read_bytes()[:4] == b"\x89PNG"
    assert record.measured["units"] == numbers["units"] and len(record.data) == 1
