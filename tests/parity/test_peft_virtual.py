"""Prompt and prefix tuning against `peft`: logits, the gradient of one step, and directories both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import bildung
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from bildung.model.virtual import Prefix, Prompt, add_virtual, prefix_size, virtual_of
from bildung.run.loop import decode
from tests.model.tiny import tiny_lm, tokens

M = 5
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 260,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
}
KINDS = {"prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}


@pytest.fixture(params=["llama, grouped-query", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    lm = tiny_lm()
    if request.param == "gpt2":
        config = from_dict(GPT2)
        lm = LanguageModel(build(config, seed=5).eval(), lm.tokenizer, config)
    return bildung.save(lm, tmp_path / "base")


def with_virtual(base: Path, kind: str, seed: int = 2) -> LanguageModel:
    """The base with virtual tokens at random."""
    lm = bildung.load(base)
    generator = torch.Generator().manual_seed(seed)
    width = lm.config.hidden_size if kind == "prompt" else prefix_size(lm.config)
    numbers = torch.randn(M, width, generator=generator) * 0.5
    lm.model.requires_grad_(False)
    add_virtual(lm.model, Prompt(numbers) if kind == "prompt" else Prefix(lm.config, numbers))
    return lm


def theirs(base: Path, adapter: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def fresh_peer(base: Path, kind: str, **settings: Any) -> Any:
    """Virtual tokens as peft starts them."""
    made = peft.PromptTuningConfig if kind == "prompt" else peft.PrefixTuningConfig
    config = made(task_type="CAUSAL_LM", num_virtual_tokens=M, **settings)
    return peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_here_opens_in_peft(kind: str, base: Path, tmp_path: Path) -> None:
    lm = with_virtual(base, kind)
    logits = lm.model(tokens())
    assert (logits - bildung.load(base).model(tokens())).abs().max() > 0.05
    bildung.save(lm, tmp_path / "adapter")
    peer = theirs(base, tmp_path / "adapter")
    with torch.no_grad():
        expected = peer(tokens()).logits[:, -tokens().shape[1] :]  # of a prompt, its own logits come first
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    again = bildung.load(tmp_path / "adapter")
    assert torch.equal(again.model(tokens()), logits)
    assert again.config.max_position_embeddings == bildung.load(base).config.max_position_embeddings - M


@pytest.mark.parametrize("kind", [*KINDS, "prefix through an MLP"])
def test_what_peft_writes_opens_here(kind: str, base: Path, tmp_path: Path) -> None:
    through = {"prefix_projection": True, "encoder_hidden_size": 7} if "MLP" in kind else {}
    peer = fresh_peer(base, kind, **through)
    with torch.no_grad():
        expected = peer(tokens()).logits[:, -tokens().shape[1] :]
    peer.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(bildung.load(tmp_path / "adapter").model(tokens()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_pefts(kind: str, base: Path) -> None:
    lm = with_virtual(base, kind)
    (virtual,) = [p for p in lm.model.parameters() if p.requires_grad]
    peer = fresh_peer(base, kind)
    (peers,) = [p for p in peer.parameters() if p.requires_grad]
    peers.data.copy_(virtual)
    rows = tokens()
    torch.nn.functional.cross_entropy(lm.model(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).backward()
    # peft's prompt also predicts a row's first token, from its last virtual one; here nothing stands before a row.
    peer(rows, labels=torch.cat((torch.full_like(rows[:, :1], -100), rows[:, 1:]), dim=1)).loss.backward()
    assert peers.grad is not None and peers.grad.abs().max() > 1e-4
    torch.testing.assert_close(virtual.grad, peers.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_greedy_answers_are_pefts(kind: str, base: Path, tmp_path: Path) -> None:
    lm = with_virtual(base, kind)
    bildung.save(lm, tmp_path / "adapter")
    prompt = tokens(batch=1, length=6)
    answer = theirs(base, tmp_path / "adapter").generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert decode(lm.model, prompt.tolist(), new_tokens=8)[0].tokens == answer[0, -8:].tolist()


def test_the_file_is_pefts_layout(base: Path, tmp_path: Path) -> None:
    lm = with_virtual(base, "prefix")
    bildung.save(lm, tmp_path / "adapter")
    (tensor,) = load_file(tmp_path / "adapter/adapter_model.safetensors").values()
    assert tensor.shape == (M, prefix_size(lm.config))
    given = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert given["token_dim"] * given["num_layers"] * 2 == tensor.shape[1]
    assert torch.equal(tensor, virtual_of(lm.model).prefix_MF)
