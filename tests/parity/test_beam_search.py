"""Beam search finds what transformers' generate(num_beams) finds, with early_stopping="never".

By default transformers guesses when to stop from the present length, and ends too early under a length penalty. Its
penalty is |Y|^α ("average" here); it counts the stop token too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from bildung.model.config import from_dict
from bildung.model.store import assemble
from bildung.run.beam import Beam, Hypothesis, beam_search
from tests.parity.test_decoder_families import SHAPE
from tests.parity.test_encoder_decoder_families import BART, KEEP_BS, SOURCE_BS, T5, ours_of

PROMPTS = [[5, 17, 20, 8], [9, 3, 21, 12]]
STOP = 2


@pytest.fixture(scope="module")
def llamas() -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SHAPE, "vocab_size": 23, "initializer_range": 0.1})
    peer = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        peer.lm_head.weight[STOP] *= 3.0  # so that hypotheses end at many lengths
    return peer, assemble(from_dict(config.to_dict()), {k: v.clone() for k, v in peer.state_dict().items()})


def peers_best(peer: Any, inputs: torch.Tensor, new_tokens: int, beam: Beam, **more: Any) -> list[Any]:
    with torch.no_grad():
        made = peer.generate(
            inputs,
            num_beams=beam.beams,
            num_return_sequences=beam.n_best,
            length_penalty=beam.length_penalty,
            no_repeat_ngram_size=beam.no_repeat_ngram,
            min_new_tokens=beam.min_tokens or None,
            max_new_tokens=new_tokens,
            early_stopping="never",
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **more,
        )
    return list(zip(made.sequences.tolist(), made.sequences_scores.tolist(), strict=True))


@pytest.mark.parametrize("settings", [
    dict(length_penalty=0.0),
    dict(length_penalty=1.0),
    dict(length_penalty=2.0),
    dict(length_penalty=1.0, no_repeat_ngram=2),
    dict(length_penalty=1.0, min_tokens=5),
])  # fmt: skip
def test_a_decoder_finds_the_same(llamas: tuple[Any, Any], settings: dict[str, Any]) -> None:
    peer, ours = llamas
    beam = Beam(beams=4, n_best=4, length_norm="average", **settings)
    found = beam_search(ours, PROMPTS, new_tokens=12, beam=beam, stop_ids={STOP})
    theirs = peers_best(
        peer, torch.tensor(PROMPTS), 12, beam, eos_token_id=STOP, attention_mask=torch.ones(2, 4).long()
    )
    assert len({len(one.tokens) for answers in found for one in answers}) >= 2, "answers of several lengths"
    same(found, theirs, [4, 4])


def same(found: list[list[Hypothesis]], theirs: list[Any], prompt_lengths: list[int], stop: int = STOP) -> None:
    ours = [(one, n) for answers, n in zip(found, prompt_lengths, strict=True) for one in answers]
    for (one, n), (sequence, score) in zip(ours, theirs, strict=True):
        assert list(one.tokens) == sequence[n : n + len(one.tokens)]
        assert set(sequence[n + len(one.tokens) :]) <= {0, stop}, "only padding is left"
        assert one.score == pytest.approx(score, abs=1e-4)


def seq2seq_peer(name: str) -> Any:
    """As many layers on both sides: the cache of transformers 5.23 fails otherwise."""
    torch.manual_seed(1)
    if name == "bart":
        peer: Any = transformers.BartForConditionalGeneration(transformers.BartConfig(**{**BART, "encoder_layers": 3}))
    else:
        peer = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**T5, "num_layers": 3}))
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.ndim > 1:
                parameter *= 0.7  # flat enough for answers to end at many lengths
    return peer.eval()


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_an_encoder_decoder_finds_the_same_with_padded_sources(name: str, alpha: float) -> None:
    peer = seq2seq_peer(name)
    ours, start = ours_of(peer), peer.config.decoder_start_token_id
    stops = list(range(3, 311, 4))
    beam = Beam(beams=3, n_best=3, length_penalty=alpha, length_norm="average", no_repeat_ngram=1)
    found = beam_search(ours.given(SOURCE_BS, KEEP_BS), [[start]] * 3, new_tokens=9, beam=beam, stop_ids=stops)
    assert len({len(one.tokens) for answers in found for one in answers}) >= 3
    peer.generation_config.forced_eos_token_id = None  # BART would end every answer with its own at the last step
    mask = KEEP_BS.long()
    theirs = peers_best(peer, SOURCE_BS, 9, beam, eos_token_id=stops, attention_mask=mask, pad_token_id=stops[0])
    same(found, theirs, [1] * 3, stops[0])
