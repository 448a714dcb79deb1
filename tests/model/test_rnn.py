"""Recurrent language models: equal to torch.nn's, and padding, packing, caching, deltas and taps as everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bildung
from bildung.compress.quantize import replace as quantize
from bildung.core.errors import ConfigError, SettingsError
from bildung.look.lenses.lens import lens_logits
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import deltas_off, record_weights
from bildung.model.low_rank import LowRank
from bildung.model.rnn import RecurrentLM
from bildung.model.store import LanguageModel
from bildung.model.taps import intervene, observe, sites
from bildung.run.loop import decode
from tests.conftest import tiny_tokenizer

CELLS = ["rnn", "lstm", "gru"]
KEYS: dict[str, Any] = {
    "model_type": "rnn",
    "vocab_size": 300,
    "hidden_size": 24,
    "embedding_size": 16,
    "num_hidden_layers": 2,
    "initializer_range": 0.5,
    "eos_token_id": 2,
}


def model_of(cell: str, **changes: Any) -> RecurrentLM:
    model: RecurrentLM = build(from_dict({**KEYS, "cell": cell, **changes}), seed=3).eval()
    return model


def tokens(batch: int = 3, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(seed))


def apart(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("path", ["kernel", "written out"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_stack_equals_torchs_module(cell: str, path: str) -> None:
    model = model_of(cell, tie_word_embeddings=False)
    kind = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell]
    peer = kind(16, 24, num_layers=2, batch_first=True)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.zero_()
        for number, layer in enumerate(model.model.layers):
            getattr(peer, f"weight_ih_l{number}").copy_(layer.input_proj.weight())
            getattr(peer, f"weight_hh_l{number}").copy_(layer.recurrent_proj.weight())
            layer.input_proj.bias.normal_(generator=torch.Generator().manual_seed(number))
            getattr(peer, f"bias_ih_l{number}").copy_(layer.input_proj.bias)
            if layer.recurrent_proj.bias is not None:
                layer.recurrent_proj.bias.normal_(generator=torch.Generator().manual_seed(number))
                getattr(peer, f"bias_hh_l{number}").copy_(layer.recurrent_proj.bias)
    want, _ = peer(model.model.embed_tokens(tokens()))
    listened = "*" if path == "written out" else "embed"
    with observe(model, listened) as seen:
        assert apart(model.hidden(tokens()), want) < (1e-5 if cell == "rnn" else 1e-6)
    if path == "written out":
        assert apart(seen["layers.1.state"], want) < 5e-6
        if cell == "lstm":
            i, f, g, _ = seen["layers.0.gates"].chunk(4, -1)
            before = torch.cat((torch.zeros(3, 1, 24), seen["layers.0.cell"][:, :-1]), dim=1)
            assert apart(seen["layers.0.cell"], f * before + i * g) < 5e-6


@pytest.mark.parametrize("act", ["relu", "identity"])
def test_the_other_activations_of_an_elman_rnn(act: str) -> None:
    model = model_of("rnn", hidden_act=act, num_hidden_layers=1)
    layer = model.model.layers[0]
    x, h = model.model.embed_tokens(tokens()), torch.zeros(3, 24)
    for step in range(9):
        h = x[:, step] @ layer.input_proj.weight().T + layer.input_proj.bias + h @ layer.recurrent_proj.weight().T
        h = h.relu() if act == "relu" else h
    with observe(model, "layers.0.resid_post") as seen:
        model(tokens())
    assert apart(seen["layers.0.resid_post"][:, -1], h) < 1e-5


@pytest.mark.parametrize("cell", CELLS)
def test_both_paths_give_the_same_gradients(cell: str) -> None:
    model = model_of(cell).double()
    gradients = []
    for listened in ("embed", "*"):
        model.zero_grad()
        with observe(model, listened):
            model(tokens()).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert apart(gradient, gradients[1][name]) < 1e-9 * (1 + gradient.abs().max()), name


@pytest.mark.parametrize("listened", ["embed", "*"])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_on_either_side_or_inside_does_not_move_the_state(cell: str, listened: str) -> None:
    model, given = model_of(cell), tokens()
    want = model(given)
    padded = torch.zeros(3, 14, dtype=torch.long)
    keep = torch.tensor([[0] * 5 + [1] * 9, [1] * 9 + [0] * 5, [0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0]]).bool()
    padded[keep] = given.flatten()
    state = model.kv_cache(3, 14)
    with observe(model, listened), torch.no_grad():
        found = model(padded, keep_BL=keep, kv_cache=state)[keep].view(3, 9, -1)
    assert apart(found, want) < 5e-6
    after = model.kv_cache(3, 9)
    model(given, kv_cache=after)
    for mine, theirs in zip(state.layers, after.layers, strict=True):
        assert all(apart(one, other) < 5e-6 for one, other in zip(mine, theirs, strict=True))
    model(padded, keep_BL=torch.zeros_like(keep), kv_cache=state)  # nothing but padding
    for mine, theirs in zip(state.layers, after.layers, strict=True):
        assert all(apart(one, other) < 5e-6 for one, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("listened", ["embed", "*"])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_documents_do_not_leak(cell: str, listened: str) -> None:
    model, given = model_of(cell), tokens(2, 12)
    segments = torch.tensor([[1] * 3 + [2] * 7 + [3] * 2, [1] * 12])
    with observe(model, listened):
        packed = model(given, segments_BL=segments)
    for start, end in ((0, 3), (3, 10), (10, 12)):
        assert apart(packed[:1, start:end], model(given[:1, start:end])) < 5e-6
    assert apart(packed[1:], model(given[1:])) < 5e-6
    assert apart(packed[:1, 3:], model(given[:1])[:, 3:]) > 1e-3  # what a leak would look like
    # The first segment goes on from the state, the others do not, and the state afterwards is that of the last one.
    state = model.kv_cache(2, 24)
    model(given, kv_cache=state)
    went_on = model(given, segments_BL=segments, kv_cache=state)
    assert apart(went_on[:1, :3], packed[:1, :3]) > 1e-3
    assert apart(went_on[:1, 3:], packed[:1, 3:]) < 5e-6
    last = model.kv_cache(1, 2)
    model(given[:1, 10:], kv_cache=last)
    assert apart(state.layers[1][0][:1], last.layers[1][0]) < 5e-6


@pytest.mark.parametrize("cell", CELLS)
def test_one_token_at_a_time_is_the_same_and_takes_no_more_memory(cell: str) -> None:
    model, given = model_of(cell), tokens()
    want = model(given)
    state = model.kv_cache(3, 9)
    size = state.nbytes
    with torch.no_grad():
        found = torch.cat([model(given[:, i : i + 1], kv_cache=state) for i in range(9)], dim=1)
    assert apart(found, want) < 5e-6
    assert (state.length, state.nbytes) == (9, size)
    state.select(torch.tensor([2, 0]))
    more, other = tokens(2, 4, seed=7), model.kv_cache(2, 13)
    model(given[[2, 0]], kv_cache=other)
    assert apart(model(more, kv_cache=state), model(more, kv_cache=other)) < 5e-6


@pytest.mark.parametrize("cell", CELLS)
def test_decoding_with_and_without_the_state_and_in_any_batch(cell: str) -> None:
    model = model_of(cell)
    prompts = [[5, 9, 20], [7], [100, 3, 4, 8, 11]]
    together = decode(model, prompts, new_tokens=20)
    assert [a.tokens for a in together] == [a.tokens for a in decode(model, prompts, new_tokens=20, use_cache=False)]
    assert [a.tokens for a in together] == [decode(model, [p], new_tokens=20)[0].tokens for p in prompts]


@pytest.mark.parametrize("listened", ["embed", "*"])
@pytest.mark.parametrize("cell", CELLS)
def test_deltas_and_quantized_matrices_take_effect_on_both_paths(cell: str, listened: str) -> None:
    model = model_of(cell, hidden_size=64, embedding_size=64)
    plain = model(tokens())
    for name in ("model.layers.0.input_proj", "model.layers.1.recurrent_proj"):
        linear = model.linears()[name]
        linear.deltas["d"] = LowRank(64, linear.out_features, 4, 1.0)
        nn.init.normal_(linear.deltas["d"].lora_B, std=0.1)
        with observe(model, listened):
            with_delta = model(tokens())
        merged = model_of(cell, hidden_size=64, embedding_size=64)
        merged.linears()[name].base.weight.data = linear.weight().detach()
        assert apart(with_delta, merged(tokens())) < 1e-5
        assert apart(with_delta, plain) > 1e-4
        with deltas_off(model, "d"), observe(model, listened):
            assert apart(model(tokens()), plain) < 5e-6
        del linear.deltas["d"]
    quantize(model, ["model.layers.0.recurrent_proj", "model.layers.1.input_proj"], "nf4")
    dense = model_of(cell, hidden_size=64, embedding_size=64)
    for name, linear in model.linears().items():
        dense.linears()[name].base.weight.data = linear.weight().detach().float()
    with observe(model, listened):
        rounded = model(tokens())
    assert apart(rounded, plain) > 1e-4
    assert apart(rounded, dense(tokens())) < 1e-5


def test_a_delta_with_dropout_drops_in_training_on_the_written_out_path() -> None:
    model = model_of("lstm")
    linear = model.linears()["model.layers.0.recurrent_proj"]
    linear.deltas["d"] = LowRank(24, 96, 4, 1.0, dropout=0.5)
    nn.init.normal_(linear.deltas["d"].lora_B)
    assert apart(model(tokens()), model(tokens())) == 0
    model.train()
    assert apart(model(tokens()), model(tokens())) > 1e-4


@pytest.mark.parametrize("listened", ["embed", "*state"])
def test_weight_drop_works_in_training_only_with_one_mask_for_all_steps(listened: str) -> None:
    model, plain = model_of("lstm", weight_drop=0.5), model_of("lstm")
    assert torch.equal(model(tokens()), plain(tokens()))
    model.train()
    torch.manual_seed(0)
    with observe(model, listened):
        dropped = model(tokens())
    assert apart(dropped, plain(tokens())) > 1e-3
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in plain.model.layers:
            weight = layer.recurrent_proj.base.weight
            weight.copy_(nn.functional.dropout(weight, 0.5))
    assert apart(dropped, plain(tokens())) < 5e-6


def test_locked_dropout_has_one_mask_per_row() -> None:
    model = model_of("gru", embed_dropout=0.5).train()
    with observe(model, "layers.0.resid_pre") as seen:
        model(tokens())
    dropped = seen["layers.0.resid_pre"] == 0
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert not torch.equal(dropped[0], dropped[1])


def test_a_recorder_hears_every_step() -> None:
    model, heard = model_of("lstm"), []

    class Recorder:
        def inputs(self, name: str, x: Tensor) -> None:
            heard.append((name, x.shape))

        def gradients(self, name: str, x: Tensor, grad: Tensor) -> None:
            heard.append((name, grad.shape))

    for training in (False, True):
        heard.clear()
        model.train(training)
        model.model.layers[1].weight_drop = 0.5
        with record_weights(model, "*.layers.1.recurrent_proj", Recorder()):
            model(tokens()).sum().backward()
        assert len(heard) == 18 and heard[-1][1] == (3, 96)


@pytest.mark.parametrize("cell", CELLS)
def test_sites_fire_with_their_shapes_and_an_own_activation_changes_nothing(cell: str) -> None:
    model = model_of(cell)
    sizes = {"B": 3, "L": 9, "D": 24, "E": 16, "V": 300, "4D": 96, "3D": 72}
    with observe(model, "*") as seen:
        want = model(tokens())
    for site, shape in sites(model).items():
        assert tuple(seen[site].shape) == tuple(sizes[letter] for letter in shape.split()), site
    for site in sites(model):
        kept = seen[site].detach()
        with intervene(model, {site: lambda x, kept=kept: kept}):
            assert apart(model(tokens()), want) < 5e-6, site


def test_changing_the_state_moves_what_comes_after_and_the_stream_only_what_is_above() -> None:
    model = model_of("lstm")
    want = model(tokens())

    def zero_at_5(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 5] = 0
        return x

    with intervene(model, {"layers.1.state": zero_at_5}), observe(model, "layers.1.state") as seen:
        changed = model(tokens())
    assert not seen["layers.1.state"][:, 5].any()
    assert apart(changed[:, :5], want[:, :5]) < 5e-6
    assert apart(changed[:, 6], want[:, 6]) > 1e-3
    with intervene(model, {"layers.1.resid_post": zero_at_5}):
        changed = model(tokens())
    assert apart(changed[:, 5], want[:, 5]) > 1e-3
    assert apart(changed[:, 6], want[:, 6]) < 5e-6


def test_the_lens_reads_every_layer_and_the_last_is_the_prediction() -> None:
    model = model_of("gru")
    with observe(model, "layers.*.resid_post") as seen:
        logits = model(tokens())
    assert torch.equal(lens_logits(model, seen["layers.1.resid_post"]), logits)
    assert apart(lens_logits(model, seen["layers.0.resid_post"]), logits) > 1e-3


def test_token_vectors_are_scaled_on_the_way_in_only() -> None:
    model = model_of("gru", embed_scale=3.0)
    with observe(model, "embed") as seen:
        model(tokens())
    assert torch.equal(seen["embed"], 3.0 * model.model.embed_tokens.weight[tokens()])
    assert torch.equal(model.lm_head.weight(), model.model.embed_tokens.weight)


def test_stated_starting_weights() -> None:
    layer = model_of("lstm").model.layers[1]
    assert torch.equal(layer.input_proj.bias, torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(24))
    scaled = model_of("rnn", recurrent_scale=0.8).model.layers[1].recurrent_proj.weight()
    assert apart(torch.linalg.eigvals(scaled).abs(), torch.full((24,), 0.8)) < 1e-5
    assert torch.equal(model_of("gru").lm_head.weight(), model_of("gru").model.embed_tokens.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_a_directory_keeps_all_and_transformers_refuses_it(tied: bool, tmp_path: Path) -> None:
    model = model_of("lstm", tie_word_embeddings=tied)
    with torch.no_grad():
        model.lm_head.bias.normal_()
    lm = LanguageModel(model, tiny_tokenizer(), model.config)
    bildung.save(lm, tmp_path / "lm")
    again = bildung.load(tmp_path / "lm")
    assert torch.equal(again.model(tokens()), model(tokens()))
    assert (again.model.model.out_proj is not None) == tied
    bildung.save(again, tmp_path / "again")
    assert (tmp_path / "lm/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "lm/config.json").read_text())["architectures"] == ["RecurrentLM"]
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="model type `rnn`"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm")


def test_bad_configs_and_calls() -> None:
    for changes, message in (
        ({"cell": "lstn"}, "allowed: 'gru', 'lstm', 'rnn'"),
        ({"cell": "lstm", "hidden_act": "relu"}, "hidden_act"),
        ({"weight_drop": 1.0}, "weight_drop"),
        ({"recurrent_scale": 0}, "recurrent_scale"),
        ({"hidden_sise": 3}, "hidden_size"),
    ):
        with pytest.raises(ConfigError, match=message):
            model_of(**{"cell": "gru", **changes})
    with pytest.raises(SettingsError, match="left to right"):
        model_of("gru")(tokens(), prefix_BL=torch.ones(3, 9, dtype=torch.bool))
