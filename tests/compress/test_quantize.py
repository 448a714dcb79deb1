"""`bildung quantize`: directories that load here and in transformers, what is measured, what is refused."""

from __future__ import annotations

import importlib
import logging
import math

import pytest
import torch

import bildung
from bildung.compress.quantize import Settings, bits_per_parameter, quantize, weight_bytes
from bildung.core.errors import ModelFileError, NoSuchLinear, OutputError, SettingsError
from bildung.model.build import build
from bildung.model.linear import Dense
from bildung.model.low_rank import LowRank
from bildung.model.quantized import METHODS
from bildung.model.store import LanguageModel
from tests.conftest import CONFIG, tiny_tokenizer
from tests.model.tiny_encoder import tiny_encoder

both = pytest.mark.parametrize("method", METHODS)
# bitsandbytes' CPU kernel is wrong where a row is no whole number of blocks of 64.
WIDE = CONFIG | dict(hidden_size=64, intermediate_size=128, head_dim=16, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from bildung.model.config import from_dict

    config = from_dict(WIDE)
    lm = LanguageModel(build(config, seed=3).eval(), tiny_tokenizer(), config)
    return bildung.save(lm, tmp_path_factory.mktemp("wide") / "lm")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """{method: (directory, record)}"""
    places = {method: tmp_path_factory.mktemp("quantized") / method for method in METHODS}
    return {m: (out, quantize(source, out, Settings(method=m, compare_texts=2))) for m, out in places.items()}


def logits(lm):
    with torch.no_grad():
        return lm.model(torch.arange(3, 63).view(2, 30))


@both
def test_the_directory_holds_the_quantized_numbers_and_loads_bit_equal(source, made, method, tmp_path):
    lm, original = bildung.load(made[method][0]), bildung.load(source)
    for name, linear in original.model.linears().items():
        stored = lm.model.linears()[name].base
        expected = linear.base if name == "lm_head" else METHODS[method].quantize(linear.base.dense())
        assert type(stored) is type(expected), name
        assert torch.equal(stored.dense(), expected.dense()), name
    again = bildung.load(bildung.save(lm, tmp_path / "again"))
    assert torch.equal(logits(lm), logits(again))
    assert again.model.config.raw["quantization_config"] == lm.model.config.raw["quantization_config"]


def test_what_is_measured(source, made):
    int8, nf4 = made["int8"][1].measured, made["nf4"][1].measured
    assert (int8["matrices"], int8["kept"]) == (14, ["lm_head"])
    assert int8["bits_per_parameter_before"] == 32 and 8 < int8["bits_per_parameter_after"] < 9
    # 4.127 for large matrices; the float32 constants of a 64 x 64 matrix weigh more.
    assert 4.127 < nf4["bits_per_parameter_after"] < 4.2
    for measured in (int8, nf4):
        assert measured["weight_bytes_after"] < measured["weight_bytes_before"]
        assert measured["file_bytes_after"] < measured["file_bytes_before"]
        assert 0 <= measured["kl_median"] <= measured["kl_999"] and measured["kl_mean"] > 0
        assert measured["tokens"] > 100
    assert nf4["weight_error"] == pytest.approx(0.092, abs=0.004) and int8["weight_error"] < 0.01
    # This random model is far more sensitive than a trained one; the order is what must hold.
    assert int8["kl_mean"] < 0.1 * nf4["kl_mean"] and int8["same_top"] > nf4["same_top"]
    assert abs(math.log(int8["perplexity_after"] / int8["perplexity_before"])) < 0.01


def test_bytes_in_memory_count_everything_once(tiny_lm):
    """The tiny model's embedding is tied to its unembedding."""
    expected = sum(parameter.numel() * 4 for parameter in tiny_lm.model.parameters())
    assert weight_bytes(tiny_lm.model) == expected
    assert bits_per_parameter(tiny_lm.model, ["model.layers.0.mlp.up_proj"]) == 32


@both
def test_kept_matrices_stay_dense(source, tmp_path, method):
    record = quantize(source, tmp_path / "out", Settings(method=method, keep=("down_proj",), compare_texts=1))
    linears = bildung.load(tmp_path / "out").model.linears()
    dense = {name.rsplit(".", 1)[-1] for name, linear in linears.items() if isinstance(linear.base, Dense)}
    assert dense == {"down_proj", "lm_head"} and record.measured["matrices"] == 12


@both
def test_an_adapter_trained_over_the_quantized_model_loads_over_it(made, tmp_path, method):
    lm = bildung.load(made[method][0])
    linear = lm.model.linears()["model.layers.1.mlp.up_proj"]
    linear.deltas["lora"] = LowRank(linear.in_features, linear.out_features, 2, 1.0)
    torch.nn.init.normal_(linear.deltas["lora"].lora_B, generator=torch.Generator().manual_seed(0))
    before = logits(lm)
    again = bildung.load(bildung.save(lm, tmp_path / "adapter"))
    assert torch.equal(before, logits(again)) and not torch.equal(before, logits(bildung.load(made[method][0])))


@both
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_the_directory(made, method):
    transformers = importlib.import_module("transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a failed download of a kernel on import
    transformers.utils.logging.disable_progress_bar()
    peer = transformers.AutoModelForCausalLM.from_pretrained(made[method][0])
    assert type(peer.lm_head) is torch.nn.Linear
    assert type(peer.model.layers[0].mlp.up_proj).__name__ == {"int8": "Linear", "nf4": "Linear4bit"}[method]
    peer.train()  # in evaluation bitsandbytes repacks the weights to bfloat16 on some processors
    with torch.no_grad():
        theirs = peer(torch.arange(3, 63).view(2, 30)).logits
    assert (theirs - logits(bildung.load(made[method][0]))).abs().max() < 1e-3


def test_an_adapter_and_a_quantized_model_are_refused(source, made, tmp_path):
    lm = bildung.load(source)
    linear = lm.model.linears()["model.layers.0.mlp.up_proj"]
    linear.deltas["lora"] = LowRank(linear.in_features, linear.out_features, 2, 1.0)
    adapter = bildung.save(lm, tmp_path / "adapter")
    with pytest.raises(ModelFileError, match="bildung merge"):
        quantize(adapter, tmp_path / "out", Settings(method="int8"))
    with pytest.raises(ModelFileError, match="quantized already"):
        quantize(made["int8"][0], tmp_path / "out", Settings(method="nf4"))
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_work_are_refused(source, tiny_lm_directory, tmp_path):
    with pytest.raises(NoSuchLinear, match="q_proj"):
        quantize(source, tmp_path / "out", Settings(method="int8", target="q_porj"))
    with pytest.raises(SettingsError, match="leaves nothing"):
        quantize(source, tmp_path / "out", Settings(method="int8", target="q_proj", keep=("self_attn.*",)))
    with pytest.raises(SettingsError, match="tie_word_embeddings"):
        quantize(tiny_lm_directory, tmp_path / "out", Settings(method="int8", target="lm_head"))
    with pytest.raises(SettingsError, match="int8"):
        Settings(method="int4")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "letter.txt").write_text("Dear Ishmael")
    with pytest.raises(OutputError, match="was not made by bildung"):
        quantize(source, tmp_path / "occupied", Settings(method="int8"))


def test_running_again_does_nothing_and_other_settings_are_another_result(source, made):
    out, record = made["int8"]
    assert quantize(source, out, Settings(method="int8", compare_texts=2)).started == record.started
    with pytest.raises(OutputError, match=r"settings\.method int8 -> nf4"):
        quantize(source, out, Settings(method="nf4", compare_texts=2))


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_an_encoder_keeps_its_heads_and_its_states_move_little(method, tmp_path):
    source = bildung.save(tiny_encoder("BertForPreTraining", hidden_size=64, intermediate_size=128), tmp_path / "bert")
    measured = quantize(source, tmp_path / method, Settings(method=method)).measured
    assert 0 < measured["state_error"] < (0.01 if method == "int8" else 0.15) and measured["tokens"] > 0
    assert "perplexity_before" not in measured
    quantized = bildung.load(tmp_path / method)
    assert quantized.config.heads == ("pooler", "mlm", "nsp")
    assert quantized.model.hidden(torch.tensor([[2, 7, 8, 3]])).shape == (1, 4, 64)
