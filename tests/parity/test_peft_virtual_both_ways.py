"""Prompt and prefix tuning of encoders and encoder-decoders against `peft`: logits, a gradient, directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bildung
from bildung.core.errors import AdapterError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from bildung.model.virtual import Prefix, Prompt, add_virtual, prefix_size, virtual_of
from bildung.run.loop import decode
from tests.model.tiny import tiny_lm
from tests.model.tiny_encoder import tiny_encoder, wordpiece

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
M = 5
MADE = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
T5 = {"model_type": "t5", "vocab_size": 260, "d_model": 48, "d_kv": 10, "d_ff": 64, "num_heads": 3, "dropout_rate": 0.0}
BART = {"model_type": "bart", "vocab_size": 260, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_position_embeddings": 64, "dropout": 0.0, "init_std": 0.3, "scale_embedding": True, "pad_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
ANSWERING: dict[str, dict[str, Any]] = {
    "t5 of 2": {**T5, "num_layers": 2},
    "t5 of 3": {**T5, "num_layers": 3},
    "t5, d_kv as peft expects": {**T5, "d_kv": 16, "num_layers": 2},
    "bart": BART,
}
SOURCE = torch.tensor([[40, 41, 42, 43, 44], [50, 51, 52, 1, 1]])
KEEP = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
TARGET = torch.tensor([[2, 60, 61, 62], [2, 70, 71, 72]])
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": {},
    "RobertaForSequenceClassification": {"model_type": "roberta"},
}
TEXTS = torch.tensor([[2, 40, 41, 42, 3], [2, 43, 3, 0, 0]])
TYPES = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])


def with_virtual(base: Path, kind: str) -> LanguageModel:
    """The base with virtual tokens at random."""
    lm = bildung.load(base)
    width = lm.config.hidden_size if kind == "prompt" else prefix_size(lm.config)
    numbers = torch.randn(M, width, generator=torch.Generator().manual_seed(2)) * 0.5
    lm.model.requires_grad_(False)
    add_virtual(lm.model, Prompt(numbers) if kind == "prompt" else Prefix(lm.config, numbers))
    return lm


def answering(name: str, tmp_path: Path) -> Path:
    config = from_dict(ANSWERING[name])
    return bildung.save(LanguageModel(build(config, seed=5).eval(), tiny_lm().tokenizer, config), tmp_path / "base")


def classifier(name: str, tmp_path: Path) -> Path:
    if name == "DistilBert":
        raw = {"model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"], "dim": 48,
               "hidden_dim": 64, "n_layers": 2, "n_heads": 3, "vocab_size": wordpiece().vocab_size, "num_labels": 3,
               "max_position_embeddings": 64}  # fmt: skip
        config = from_dict(raw)
        return bildung.save(LanguageModel(build(config, 3).eval(), wordpiece(), config), tmp_path / "base")
    lm = tiny_encoder(name, num_labels=3, initializer_range=0.3, **CLASSIFIERS[name])
    return bildung.save(lm, tmp_path / "base")


def peer_of(base: Path, adapter: Path | None, kind: str, task: str) -> Any:
    """peft's model: with this adapter, or as peft begins. Its virtual tokens require gradients."""
    answers = task == "SEQ_2_SEQ_LM"
    auto = transformers.AutoModelForSeq2SeqLM if answers else transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(base)
    if adapter is None:
        return peft.get_peft_model(model, MADE[kind](task_type=task, num_virtual_tokens=M)).eval()
    peer = peft.PeftModel.from_pretrained(model, adapter).eval()
    peer.prompt_encoder.requires_grad_(True)
    return peer


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize(
    "name", ["t5 of 2", pytest.param("t5 of 3", marks=pytest.mark.slow), pytest.param("bart", marks=pytest.mark.slow)]
)
def test_an_encoder_decoder_is_pefts(name: str, kind: str, tmp_path: Path) -> None:
    """Forward, with padding; the gradient of one step; the answer; our directory in peft."""
    base = answering(name, tmp_path)
    lm = with_virtual(base, kind)
    bildung.save(lm, tmp_path / "adapter")
    logits = lm.model(SOURCE, TARGET, source_keep_BS=KEEP.bool())
    plain = bildung.load(base).model(SOURCE, TARGET, source_keep_BS=KEEP.bool())
    assert (logits - plain).abs().max() > 0.05
    peer = peer_of(base, tmp_path / "adapter", kind, "SEQ_2_SEQ_LM")
    expected = peer(input_ids=SOURCE, attention_mask=KEEP, decoder_input_ids=TARGET).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    again = bildung.load(tmp_path / "adapter")
    torch.testing.assert_close(again.model(SOURCE, TARGET, source_keep_BS=KEEP.bool()), logits, atol=1e-5, rtol=1e-5)

    logits.sin().sum().backward()
    expected.sin().sum().backward()
    own = next(p for p in lm.model.parameters() if p.requires_grad)
    (peers,) = peer.prompt_encoder.parameters()
    if kind == "prompt":
        found = peers.grad
    else:
        layers = lm.config.num_hidden_layers
        odd = layers + 1 - layers % 2
        found = peers.grad.unflatten(1, (odd, -1))[:, [2 * i % odd for i in range(layers)]].flatten(1)
    assert own.grad.abs().amin(dim=0).max() > 1e-4
    torch.testing.assert_close(own.grad, found, atol=1e-3, rtol=1e-3)

    said = peer.generate(input_ids=SOURCE[:1], attention_mask=KEEP[:1], max_new_tokens=6, min_new_tokens=6,
                         do_sample=False)  # fmt: skip
    start = [[lm.config.decoder_start_token_id]]
    conditioned = again.model.given(SOURCE[:1])
    free = decode(conditioned, start, new_tokens=6)[0].tokens
    if lm.config.eos_token_ids[0] not in free:  # transformers may not end before the sixth
        assert free == said[0, 1:].tolist()
    assert decode(conditioned, start, new_tokens=6, use_cache=False)[0].tokens == free


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("name", ["t5, d_kv as peft expects"])
def test_what_peft_writes_of_an_encoder_decoder_opens_here(name: str, kind: str, tmp_path: Path) -> None:
    """Two layers: peft gives both the file's first pair, and never reads the second."""
    base = answering(name, tmp_path)
    peer = peer_of(base, None, kind, "SEQ_2_SEQ_LM")
    with torch.no_grad():
        expected = peer(input_ids=SOURCE, attention_mask=KEEP, decoder_input_ids=TARGET).logits
    peer.save_pretrained(tmp_path / "theirs")
    lm = bildung.load(tmp_path / "theirs")
    logits = lm.model(SOURCE, TARGET, source_keep_BS=KEEP.bool())
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    if kind == "prefix":
        first, second = virtual_of(lm.model).prefix_MF.chunk(2, dim=1)
        assert torch.equal(first, second)
    bildung.save(lm, tmp_path / "ours")
    with torch.no_grad():
        peer = peer_of(base, tmp_path / "ours", kind, "SEQ_2_SEQ_LM")
        torch.testing.assert_close(
            peer(input_ids=SOURCE, attention_mask=KEEP, decoder_input_ids=TARGET).logits, expected, atol=2e-5, rtol=1e-4
        )


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_text_classifier_is_pefts(name: str, kind: str, tmp_path: Path) -> None:
    base = classifier(name, tmp_path)
    lm = with_virtual(base, kind)
    with torch.no_grad():
        lm.model.classifier.out_proj.base.weight.mul_(-1)  # the head trains too, and is kept beside them
    bildung.save(lm, tmp_path / "adapter")
    types = TYPES if "Roberta" not in name else torch.zeros_like(TYPES)
    logits = lm.model.classes(TEXTS, keep_BL=TEXTS != 0, types_BL=types)
    plain = bildung.load(base).model.classes(TEXTS, keep_BL=TEXTS != 0, types_BL=types)
    assert (logits + plain).abs().max() > 0.05
    peer = peer_of(base, tmp_path / "adapter", kind, "SEQ_CLS")
    expected = peer(input_ids=TEXTS, attention_mask=(TEXTS != 0).long(), token_type_ids=types).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    again = bildung.load(tmp_path / "adapter")
    assert torch.equal(again.model.classes(TEXTS, keep_BL=TEXTS != 0, types_BL=types), logits)
    assert again.model.hidden(TEXTS).shape[:2] == TEXTS.shape

    logits.square().sum().backward()
    expected.square().sum().backward()
    (peers,) = peer.prompt_encoder.parameters()
    own = next(p for p in virtual_of(lm.model).parameters())
    assert own.grad.abs().max() > 1e-4
    torch.testing.assert_close(own.grad, peers.grad, atol=1e-4, rtol=1e-3)

    peer.save_pretrained(tmp_path / "theirs")
    theirs = bildung.load(tmp_path / "theirs").model.classes(TEXTS, keep_BL=TEXTS != 0, types_BL=types)
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-4)


def test_distilbert_has_a_prompt_and_no_prefix(tmp_path: Path) -> None:
    base = classifier("DistilBert", tmp_path)
    lm = with_virtual(base, "prompt")
    bildung.save(lm, tmp_path / "adapter")
    peer = peer_of(base, tmp_path / "adapter", "prompt", "SEQ_CLS")
    with torch.no_grad():
        expected = peer(input_ids=TEXTS, attention_mask=(TEXTS != 0).long()).logits
    torch.testing.assert_close(lm.model.classes(TEXTS, keep_BL=TEXTS != 0), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(AdapterError, match="DistilBERT is refused"):
        bildung.save(with_virtual(base, "prefix"), tmp_path / "prefix")


def test_what_peft_gets_wrong_is_refused(tmp_path: Path) -> None:
    base = answering("t5 of 2", tmp_path)
    bildung.save(with_virtual(base, "prefix"), tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "num_transformer_submodules": 1}))
    with pytest.raises(AdapterError, match="cross-attention; 2 is needed"):
        bildung.load(tmp_path / "adapter")
    path.write_text(json.dumps({**told, "num_layers": 1}))
    with pytest.raises(AdapterError, match="the decoder has 2 layers"):
        bildung.load(tmp_path / "adapter")
    marian = from_dict({**BART, "model_type": "marian"})
    lm = LanguageModel(build(marian, 3), tiny_lm().tokenizer, marian)
    lm = bildung.load(bildung.save(lm, tmp_path / "marian"))
    add_virtual(lm.model, Prompt(torch.zeros(M, 48)))
    with pytest.raises(AdapterError, match="leaves the factor off"):
        bildung.save(lm, tmp_path / "refused")


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = classifier("BertForSequenceClassification", tmp_path)
    bildung.save(with_virtual(base, "prompt"), tmp_path / "adapter")
    (tmp_path / "adapter/head.json").write_text('{"id2label": {"0": "yes", "1": "no"}}')
    with pytest.raises(AdapterError, match=r"a head of 3 classes, and head\.json beside it names 2"):
        bildung.load(tmp_path / "adapter")
    (tmp_path / "adapter/head.json").write_text("[]")
    with pytest.raises(AdapterError, match="damaged"):
        bildung.load(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.classifier.weight"]
    save_file(tensors, file)
    (tmp_path / "adapter/head.json").unlink()
    with pytest.raises(AdapterError, match="a head of 0 classes"):
        bildung.load(tmp_path / "adapter")
