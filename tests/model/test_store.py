"""Hugging Face directories in and out, and what happens to damaged ones."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bildung
from bildung.core.errors import ConfigError, ModelFileError, OutputError, SettingsError, TokenizerError
from bildung.core.record import Record, describe_files, hash_directory, write_record
from bildung.model import store
from bildung.model.linear import replace_stores
from bildung.model.quantized import Int8, Nf4
from bildung.model.safetensors_file import read_tensors, write_tensors
from bildung.model.taps import attach
from tests.model.test_linear import with_lora
from tests.model.tiny import tiny_lm, tokens

SHAPES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "head_dim": None},
    "qwen3": {"model_type": "qwen3"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_saved_directories_load_here_and_in_transformers_with_equal_logits(shape: str, tmp_path: Path) -> None:
    lm = tiny_lm(**SHAPES[shape])
    bildung.save(lm, tmp_path / "out")
    again = bildung.load(tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o044  # others may read it
    logits = lm.model(tokens())
    assert torch.equal(again.model(tokens()), logits)
    assert again.tokenizer.encode("Grüße") == lm.tokenizer.encode("Grüße")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(peer).__name__ == json.loads((tmp_path / "out/config.json").read_text())["architectures"][0]
    torch.testing.assert_close(peer(tokens()).logits, logits, atol=1e-5, rtol=1e-5)


def test_directories_of_transformers_load_here_sharded_ones_too(tmp_path: Path) -> None:
    bildung.save(tiny_lm(), tmp_path / "ours")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    bildung.load(tmp_path / "ours").tokenizer.save(tmp_path / "theirs")
    lm = bildung.load(tmp_path / "theirs")
    torch.testing.assert_close(lm.model(tokens()), peer(tokens()).logits, atol=1e-5, rtol=1e-5)


def test_shards_written_here_load_in_transformers(tmp_path: Path) -> None:
    lm = tiny_lm()
    bildung.save(lm, tmp_path)
    tensors = dict(read_tensors(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    write_tensors(tensors, tmp_path, max_shard_bytes=200_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(peer(tokens()).logits, lm.model(tokens()), atol=1e-5, rtol=1e-5)
    assert torch.equal(bildung.load(tmp_path).model(tokens()), lm.model(tokens()))


def test_dtype_is_as_stored_unless_asked(tmp_path: Path) -> None:
    lm = tiny_lm()
    lm.model.to(torch.bfloat16)
    bildung.save(lm, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert bildung.load(tmp_path / "out").model(tokens()).dtype == torch.bfloat16
    assert bildung.load(tmp_path / "out", "float32").model(tokens()).dtype == torch.float32
    assert bildung.load(tmp_path / "out", torch.float32).model(tokens()).dtype == torch.float32
    with pytest.raises(SettingsError, match="did you mean 'float32'"):
        bildung.load(tmp_path / "out", "float3")


@pytest.mark.parametrize("kind", [Int8, Nf4])
def test_quantized_directories_come_back_bit_equal(kind: type[Int8] | type[Nf4], tmp_path: Path) -> None:
    lm = tiny_lm(tie_word_embeddings=True)
    replace_stores(lm.model, "all", lambda linear: kind.quantize(linear.base.dense()))
    bildung.save(lm, tmp_path / "out")
    again = bildung.load(tmp_path / "out")
    assert isinstance(again.model.model.layers[1].mlp.up_proj.base, kind)
    assert torch.equal(again.model(tokens()), lm.model(tokens()))
    bildung.save(again, tmp_path / "twice")
    assert (tmp_path / "twice/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float99", ["float32"]])
def test_a_quantized_directory_of_an_unknown_dtype_is_refused(dtype: object, tmp_path: Path) -> None:
    lm = tiny_lm()
    replace_stores(lm.model, "all", lambda linear: Int8.quantize(linear.base.dense()))
    bildung.save(lm, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**config, "dtype": dtype}))
    with pytest.raises(ConfigError, match="allowed: float32, bfloat16, float16"):
        bildung.load(tmp_path / "out")


def test_mixed_stores_are_refused(tmp_path: Path) -> None:
    lm = tiny_lm()
    replace_stores(lm.model, "q_proj", lambda linear: Int8.quantize(linear.base.dense()))
    replace_stores(lm.model, "v_proj", lambda linear: Nf4.quantize(linear.base.dense()))
    with pytest.raises(OutputError, match="one quantization format"):
        bildung.save(lm, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
        "damaged or truncated",
    ),
    "flipped header": (lambda d: flip(d / "model.safetensors", 20), "damaged or truncated"),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "damaged or truncated"),
    "gone": (lambda d: (d / "model.safetensors").unlink(), "is missing"),
    "pickle": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "never opened"),
    "tensor missing": (lambda d: edit_tensors(d, lambda t: t.pop(NORM)), "tensor model.norm.weight is missing"),
    "tensor renamed": (
        lambda d: edit_tensors(d, lambda t: t.update({"model.nrm.weight": t.pop(NORM)})),
        "did you mean 'model.nrm.weight'",
    ),
    "tensor extra": (lambda d: edit_tensors(d, lambda t: t.update(extra=torch.ones(2))), "belongs nowhere"),
    "tensor misshapen": (lambda d: edit_tensors(d, lambda t: t.update({NORM: torch.ones(3)})), r"has shape \(3,\)"),
    "not finite": (lambda d: edit_tensors(d, lambda t: t[NORM].fill_(float("nan"))), "not finite"),
    "index outside": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "outside its directory",
    ),
    "index broken": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weights": 3}'),
        "not a safetensors index",
    ),
    "index too deep": (
        lambda d: (d / "model.safetensors.index.json").write_text("[" * 100_000),
        "not a safetensors index",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_directories_are_refused(case: str, tmp_path: Path) -> None:
    bildung.save(tiny_lm(), tmp_path / "out")
    damage, message = DAMAGE[case]
    damage(tmp_path / "out")
    with pytest.raises(ModelFileError, match=message):
        bildung.load(tmp_path / "out")


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    out = bildung.save(tiny_lm(), tmp_path / "out")
    up = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(out, lambda t: (t.pop(NORM), t.pop(up), t.update(extra=torch.ones(2), more=torch.ones(2))))
    with pytest.raises(ModelFileError, match=rf"{out}: 2 tensors: {up}, {NORM} are missing\. 2 tensors: extra, mo"):
        bildung.load(out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    words = r"5 tensors: \S+gate_proj.weight has shape \(320, 192\), config.json asks for \(100, 192\), "
    with pytest.raises(ModelFileError, match=words):
        bildung.load(out)


def test_a_flipped_weight_is_noticed_by_its_record(tmp_path: Path) -> None:
    out = bildung.save(tiny_lm(), tmp_path / "out")
    write_record(out, Record(operation="test", settings={}, files=describe_files(out)))
    bildung.load(out)
    flip(out / "model.safetensors", -5)
    with pytest.raises(ModelFileError, match=r"model\.safetensors was altered"):
        bildung.load(out)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    bildung.save(tiny_lm(), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    with pytest.raises(TokenizerError, match="200"):
        bildung.load(tmp_path / "out")


def test_nothing_is_a_model() -> None:
    with pytest.raises(ModelFileError, match="neither a model directory"):
        bildung.load("no/such/place")


def test_an_occupied_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="already holds something"):
        bildung.save(tiny_lm(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_tensors", full)
    with pytest.raises(OutputError, match="No space left"):
        bildung.save(tiny_lm(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_models_with_attachments_of_other_packages_are_not_saved(tmp_path: Path) -> None:
    from tests.model.test_taps import Scale

    lm = tiny_lm()
    attach(lm.model, "layers.0.mlp.out", Scale())
    with pytest.raises(OutputError, match="only Attachment classes of this package"):
        bildung.save(lm, tmp_path / "out")


def test_a_model_with_deltas_needs_a_base_on_disk(tmp_path: Path) -> None:
    lm = tiny_lm()
    with_lora(lm.model)
    with pytest.raises(OutputError, match="save the base model first"):
        bildung.save(lm, tmp_path / "out")


@pytest.mark.parametrize("kind", [None, Int8, Nf4])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_adapter_is_written_over_an_untouched_base(
    kind: type[Int8] | type[Nf4] | None, dtype: str | None, tmp_path: Path
) -> None:
    lm = tiny_lm(tie_word_embeddings=True)
    if kind is not None:
        replace_stores(lm.model, "all", lambda linear: kind.quantize(linear.base.dense()))
    lm = bildung.load(bildung.save(lm, tmp_path / "base"), dtype)
    with_lora(lm.model)
    bildung.save(lm, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(bildung.load(tmp_path / "out", dtype).model(tokens()), lm.model(tokens()))


@pytest.mark.parametrize("change", ["value", "store"])
def test_an_adapter_does_not_silently_leave_out_what_changed_in_its_base(change: str, tmp_path: Path) -> None:
    lm = bildung.load(bildung.save(tiny_lm(), tmp_path / "base"))
    with_lora(lm.model)
    if change == "value":
        lm.model.model.norm.weight.data[0] += 1
    else:
        replace_stores(lm.model, "v_proj", lambda linear: Int8.quantize(linear.base.dense()))
    with pytest.raises(OutputError, match="an adapter on that base would leave the change out"):
        bildung.save(lm, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saving_touches_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/.checkpoint-00000010").write_text("of a run that was killed")
    bildung.save(tiny_lm(), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.partial"]
    assert (tmp_path / "out.partial/.checkpoint-00000010").exists()


def test_an_adapter_whose_base_became_another_model_says_so(tmp_path: Path) -> None:
    base = bildung.save(tiny_lm(), tmp_path / "base")
    lm = bildung.load(base)
    with_lora(lm.model)
    out = bildung.save(lm, tmp_path / "out")
    source = {"path": "../base", "hash": hash_directory(base)}
    write_record(out, Record(operation="test", settings={}, source=source, files=describe_files(out)))
    bildung.load(out)
    edit_tensors(base, lambda t: t[NORM].mul_(2))
    with pytest.warns(UserWarning, match="is not what the adapter .*out was trained on"):
        bildung.load(out)


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    bildung.save(tiny_lm(), "~/out")
    assert bildung.load("~/out").path == tmp_path / "out"
