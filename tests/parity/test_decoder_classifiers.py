"""...ForSequenceClassification of every decoder family: logits equal transformers', both ways through a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bildung.core.errors import DataError
from bildung.model import names
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.decoder_classifier import DecoderClassifier
from bildung.model.safetensors_file import read_tensors
from bildung.model.store import LanguageModel, assemble, state_tensors, write_model
from bildung.train.training import check_continues_text
from tests.conftest import tiny_tokenizer

SHAPE: dict[str, Any] = dict(
    vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
    max_position_embeddings=64, initializer_range=0.2, bos_token_id=0, eos_token_id=2, pad_token_id=1,
)  # fmt: skip
GQA = dict(SHAPE, num_key_value_heads=2, head_dim=10)
GPT2 = dict(
    vocab_size=300, n_embd=48, n_layer=2, n_head=6, n_positions=64, initializer_range=0.2, bos_token_id=0,
    eos_token_id=2, pad_token_id=1, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GQA),
    "mistral": ("Mistral", GQA),
    "qwen2": ("Qwen2", dict(SHAPE, num_key_value_heads=2)),
    "qwen3": ("Qwen3", GQA),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", SHAPE),
    "gemma3_text": ("Gemma3Text", GQA),
}
TOKENS = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))
KEEP = torch.ones_like(TOKENS, dtype=torch.bool)
KEEP[1, 6:], KEEP[2, 1:] = False, False


@pytest.mark.parametrize("family", PEERS)
def test_the_logits_are_transformers(family: str, tmp_path: Path) -> None:
    name, keys = PEERS[family]
    peer_config = getattr(transformers, f"{name}Config")(**keys, num_labels=3)
    cls = getattr(transformers, f"{name}ForSequenceClassification")
    torch.manual_seed(0)
    peer = cls._from_config(peer_config, dtype=torch.float32).eval()
    peer.save_pretrained(tmp_path / "peer")
    config = from_dict(json.loads((tmp_path / "peer" / "config.json").read_text(encoding="utf-8")))
    assert config.kind == "classifier" and config.num_labels == 3
    ours = assemble(config, dict(read_tensors(tmp_path / "peer"))).eval()
    assert isinstance(ours, DecoderClassifier)
    padded = TOKENS.masked_fill(~KEEP, 1)
    with torch.no_grad():
        theirs = peer(input_ids=padded, attention_mask=KEEP.long()).logits
        torch.testing.assert_close(ours(padded, keep_BL=KEEP), theirs, atol=1e-5, rtol=1e-5)
        assert (ours(padded) - theirs)[1:].abs().max() > 1e-3  # the last column is padding
    (tmp_path / "ours").mkdir()
    write_model(LanguageModel(ours, tiny_tokenizer(), config), tmp_path / "ours")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is cls
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=padded, attention_mask=KEEP.long()).logits, theirs)


def test_a_classifier_continues_no_text(tmp_path: Path) -> None:
    config = from_dict({"model_type": "llama", **GQA, "architectures": ["LlamaForSequenceClassification"]})
    model = build(config, 0)
    assert config.num_labels == 2 and names.architecture(config) == "LlamaForSequenceClassification"
    assert not any("lm_head" in name for name in state_tensors(model))
    with pytest.raises(DataError, match="of kind 'classifier', which does not continue text"):
        check_continues_text(LanguageModel(model, tiny_tokenizer(), config))
