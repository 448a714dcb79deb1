"""Recurrent seq2seq models: the formulas, and padding, caching, decoding, taps and files as everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bildung
from bildung.compress.quantize import replace as quantize
from bildung.core.errors import ConfigError, DataError, SettingsError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.low_rank import LowRank
from bildung.model.seq2seq import Seq2Seq
from bildung.model.store import LanguageModel
from bildung.model.taps import intervene, observe, sites
from bildung.run.beam import Beam, beam_search
from bildung.run.loop import decode
from tests.conftest import tiny_tokenizer

KINDS: list[dict[str, Any]] = [
    {"attention": "none", "cell": "gru"},
    {"attention": "none", "cell": "lstm", "decoder_layers": 2},
    {"attention": "bahdanau", "cell": "gru"},
    {"attention": "bahdanau", "cell": "lstm", "decoder_layers": 2, "encoder_layers": 2, "input_feeding": True},
    {"attention": "dot", "cell": "gru"},
    {"attention": "general", "cell": "lstm", "decoder_layers": 2},
    {"attention": "general", "cell": "gru", "input_feeding": True},
    {"attention": "concat", "cell": "rnn", "encoder_size": 10},
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))


def model_of(**changes: Any) -> Seq2Seq:
    keys = {
        "model_type": "rnn_seq2seq",
        "vocab_size": 300,
        "hidden_size": 24,
        "embedding_size": 16,
        "attention_size": 20,
        "initializer_range": 0.5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        **changes,
    }
    model: Seq2Seq = build(from_dict(keys), seed=3).eval()
    return model


def tokens(batch: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def apart(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def test_the_encoder_equals_torchs_bidirectional_module() -> None:
    model = model_of(cell="lstm", encoder_layers=2)
    peer = nn.LSTM(16, 12, num_layers=2, bidirectional=True, batch_first=True)
    with torch.no_grad():
        for suffix, layers in (("", model.encoder.forward_layers), ("_reverse", model.encoder.backward_layers)):
            for number, layer in enumerate(layers):
                getattr(peer, f"weight_ih_l{number}{suffix}").copy_(layer.input_proj.weight())
                getattr(peer, f"weight_hh_l{number}{suffix}").copy_(layer.recurrent_proj.weight())
                getattr(peer, f"bias_ih_l{number}{suffix}").copy_(layer.input_proj.bias)
                getattr(peer, f"bias_hh_l{number}{suffix}").zero_()
    want, (h, c) = peer(model.shared(tokens()))
    found, last = model.encoder(tokens(), None, torch.float32)
    assert apart(found, want) < 1e-6
    assert apart(last[1][0], torch.cat((h[2], h[3]), dim=-1)) < 1e-6
    assert apart(last[0][1], torch.cat((c[0], c[1]), dim=-1)) < 1e-6


@pytest.mark.parametrize("attention", ["bahdanau", "dot", "general", "concat"])
def test_a_decoder_by_the_papers_formulas(attention: str) -> None:
    """One layer, GRU, one source, step by step with the matrices themselves."""
    model, source, target = model_of(attention=attention), tokens(1, 5), tokens(1, 4, seed=2)
    with observe(model, "decoder.cross.probs") as seen:
        found = model.given(source).hidden(target)
    decoder, cross, cell = model.decoder, model.decoder.cross, nn.GRUCell(*reversed(_shape(model)))
    assert cross is not None
    with torch.no_grad():
        layer = decoder.layers[0]
        for name, value in (
            ("weight_ih", layer.input_proj.weight()),
            ("weight_hh", layer.recurrent_proj.weight()),
            ("bias_ih", layer.input_proj.bias),
            ("bias_hh", layer.recurrent_proj.bias),
        ):
            getattr(cell, name).copy_(value)
        s = model.encoder(source, None, torch.float32)[0][0]  # (S, M)
        last_forward, last_backward = s[-1, :12], s[0, 12:]
        bridge = model.bridge[0]["h"]
        h = torch.tanh(bridge.weight() @ torch.cat((last_forward, last_backward)) + bridge.bias)

        def score(q: Tensor, one: Tensor) -> Tensor:
            if attention == "dot":
                return q @ one
            if attention == "general":
                return q @ (cross.key_proj.weight() @ one)
            inner = cross.query_proj.weight() @ q + cross.key_proj.weight() @ one
            return cross.v_proj.weight()[0] @ torch.tanh(inner)

        for step in range(4):
            y = model.shared.weight[target[0, step]]
            if attention == "bahdanau":  # the state before the step asks, and the answer is read with the token
                weights = torch.stack([score(h, one) for one in s]).softmax(0)
                h = cell(torch.cat((y, weights @ s))[None], h[None])[0]
            else:
                h = cell(y[None], h[None])[0]
                weights = torch.stack([score(h, one) for one in s]).softmax(0)
            out = torch.tanh(decoder.combine.weight() @ torch.cat((weights @ s, h)) + decoder.combine.bias)
            assert apart(seen["decoder.cross.probs"][0, step], weights) < 1e-5
            assert apart(found[0, step], decoder.out_proj.weight() @ out) < 1e-5


def _shape(model: Seq2Seq) -> tuple[int, int]:
    layer = model.decoder.layers[0]
    return layer.size, layer.input_proj.in_features  # type: ignore[union-attr,return-value]


def test_input_feeding_tells_the_next_step_what_was_found() -> None:
    """Changing where step 1 looks changes what step 2 says only with input feeding."""

    def move(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 1] = x[:, 1].roll(1, dims=-1)
        return x

    for feeding in (True, False):
        model = model_of(attention="general", input_feeding=feeding)
        want = model(tokens(), tokens(seed=2))
        with intervene(model, {"decoder.cross.probs": move}):
            found = model(tokens(), tokens(seed=2))
        assert apart(found[:, 1], want[:, 1]) > 1e-4
        assert (apart(found[:, 2], want[:, 2]) > 1e-5) == feeding


@kinds
def test_padding_of_source_and_target_on_either_side_changes_nothing(kind: dict[str, Any]) -> None:
    model, source, target = model_of(**kind), tokens(), tokens(length=5, seed=2)
    want = model(source, target)
    keep_source = torch.tensor([[0] * 3 + [1] * 7, [1] * 7 + [0] * 3, [0] + [1] * 7 + [0] * 2]).bool()
    keep_target = torch.tensor([[0] * 2 + [1] * 5, [1] * 5 + [0] * 2, [0] + [1] * 5 + [0]]).bool()
    wide_source, wide_target = torch.zeros(3, 10, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
    wide_source[keep_source], wide_target[keep_target] = source.flatten(), target.flatten()
    for listened in ("logits", "*"):
        with observe(model, listened) as seen:
            found = model(wide_source, wide_target, source_keep_BS=keep_source, keep_BL=keep_target)
        assert apart(found[keep_target].view(3, 5, -1), want) < 5e-6
        if listened == "*" and kind["attention"] != "none":
            probs = seen["decoder.cross.probs"]
            assert not probs.masked_fill(keep_source[:, None], 0).any()
            assert apart(probs.sum(-1), torch.ones(3, 7)) < 1e-5


@kinds
def test_one_token_at_a_time_is_the_same_in_any_rows(kind: dict[str, Any]) -> None:
    model, source, target = model_of(**kind), tokens(), tokens(length=5, seed=2)
    want, given = model(source, target), model.given(source)
    with torch.no_grad():
        state = given.kv_cache(3, 5)
        found = [given(target[:, i : i + 1], kv_cache=state) for i in range(2)]
        found.append(given(target[:, 2:4], kv_cache=state))
        rows = torch.tensor([2, 2, 0])
        state.select(rows)
        last = given.select(rows)(target[rows, 4:], kv_cache=state)
    assert apart(torch.cat(found, dim=1), want[:, :4]) < 5e-6
    assert apart(last, want[rows, 4:]) < 5e-6
    assert state.length == 5


@kinds
def test_greedy_beam_and_coverage(kind: dict[str, Any]) -> None:
    model, source = model_of(**kind), tokens()
    given, starts = model.given(source), [[0]] * 3
    greedy = decode(given, starts, new_tokens=8, stop_ids={2})
    assert [a.tokens for a in greedy] == [
        a.tokens for a in decode(given, starts, new_tokens=8, stop_ids={2}, use_cache=False)
    ]
    alone = [decode(model.given(source[b : b + 1]), [[0]], new_tokens=8, stop_ids={2})[0].tokens for b in range(3)]
    assert [a.tokens for a in greedy] == alone
    one = beam_search(given, starts, beam=Beam(beams=1), new_tokens=8, stop_ids={2})
    assert [list(best.tokens) for (best, *_) in one] == alone
    beam = Beam(beams=3, coverage_penalty=0.2)
    if kind["attention"] == "none":
        with pytest.raises(SettingsError, match="no source"):
            beam_search(given, starts, beam=beam, new_tokens=8, stop_ids={2})
    else:
        assert len(beam_search(given, starts, beam=beam, new_tokens=8, stop_ids={2})) == 3


@kinds
def test_sites_fire_with_their_shapes_and_an_own_activation_changes_nothing(kind: dict[str, Any]) -> None:
    model, source, target = model_of(**kind), tokens(), tokens(length=5, seed=2)
    config = model.config
    read = model.decoder.layers[0].input_proj.in_features
    sizes = {"B": 3, "L": 5, "S": 7, "D": 24, "E": 16, "V": 300, "M": config.memory_size, "K": config.encoder_size}
    sizes |= {"R": read, "4D": 96, "3D": 72, "4K": 4 * config.encoder_size, "3K": 3 * config.encoder_size}
    with observe(model, "*") as seen:
        want = model(source, target)
    assert set(seen) == set(sites(model))
    for site, shape in sites(model).items():
        assert tuple(seen[site].shape) == tuple(sizes[letter] for letter in shape.split()), site
        kept = seen[site].detach()
        with intervene(model, {site: lambda x, kept=kept: kept}):
            assert apart(model(source, target), want) < 5e-6, site


def test_deltas_and_quantized_matrices_take_effect() -> None:
    plain = model_of(attention="bahdanau", hidden_size=64, embedding_size=64, attention_size=64)
    want, every = plain(tokens(), tokens(seed=2)), list(plain.linears())
    for name in every:
        if name == "lm_head":
            continue
        model = model_of(attention="bahdanau", hidden_size=64, embedding_size=64, attention_size=64)
        linear = model.linears()[name]
        linear.deltas["d"] = LowRank(linear.in_features, linear.out_features, 2, 1.0)
        nn.init.normal_(linear.deltas["d"].lora_B, std=0.3)
        assert apart(model(tokens(), tokens(seed=2)), want) > 1e-4, name
    quantize(plain, [name for name in every if name != "lm_head"], "nf4")
    assert apart(plain(tokens(), tokens(seed=2)), want) > 1e-4


def test_dropout_and_weight_drop_work_in_training_only() -> None:
    for changes in ({"dropout": 0.3}, {"weight_drop": 0.5}, {"weight_drop": 0.5, "attention": "bahdanau"}):
        model, plain = model_of(**changes), model_of(**{k: v for k, v in changes.items() if k == "attention"})
        want = plain(tokens(), tokens(seed=2))
        assert torch.equal(model(tokens(), tokens(seed=2)), want)
        assert apart(model.train()(tokens(), tokens(seed=2)), want) > 1e-3


@kinds
def test_a_directory_keeps_all(kind: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(**kind)
    bildung.save(LanguageModel(model, tiny_tokenizer(), model.config), tmp_path / "lm")
    again = bildung.load(tmp_path / "lm")
    assert apart(again.model(tokens(), tokens(seed=2)), model(tokens(), tokens(seed=2))) < 1e-5
    parameters = dict(again.model.named_parameters())
    assert all(torch.equal(parameters.pop(name), one) for name, one in model.named_parameters()) and not parameters
    assert json.loads((tmp_path / "lm/config.json").read_text())["architectures"] == ["RecurrentSeq2Seq"]


def test_transformers_refuses_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = model_of()
    bildung.save(LanguageModel(model, tiny_tokenizer(), model.config), tmp_path / "lm")
    with pytest.raises(ValueError, match="model type `rnn_seq2seq`"):
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "lm")


def test_bad_configs_and_calls() -> None:
    for changes, message in (
        ({"attention": "bahdenau"}, "'bahdanau'"),
        ({"attention": "dot", "encoder_size": 10}, "2 x encoder_size"),
        ({"attention": "none", "input_feeding": True}, "input_feeding"),
        ({"eos_token_id": None}, "needs eos_token_id"),
        ({"dropout": 1}, "dropout"),
    ):
        with pytest.raises(ConfigError, match=message):
            model_of(**changes)
    model = model_of()
    with pytest.raises(DataError, match="without a single real token"):
        model.given(tokens(), torch.zeros(3, 7, dtype=torch.bool))
    with pytest.raises(DataError, match="2 target rows were given for 3 sources"):
        model(tokens(), tokens(2))
    with pytest.raises(SettingsError, match="one source per row"):
        model.given(tokens())(tokens(), segments_BL=torch.ones(3, 7))
