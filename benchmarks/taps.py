"""What taps cost: idle, against an identity module and a model without them; reading and changing activations, against
TransformerLens and nnsight doing the same on the same weights.

    python -m benchmarks.taps
    pip install --no-deps --target PEERS transformer-lens==2.16.1 nnsight jaxtyping fancy_einsum better_abc beartype \
        typeguard einops astor wadler_lindig accelerate
    python -m benchmarks.taps --peers PEERS          they live beside torch and transformers, which are needed

Reading: the residual stream after every layer. Changing: position 5 of one head's output set to zero. Each figure is a
ratio to the library's own plain forward pass, all measured in turns; `plain` compares the plain passes themselves.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bildung.look.contributions.decompose import decompose
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel, no_tokenizer, write_model
from bildung.model.taps import Taps, intervene, observe, sites
from bildung.model.transformer import Decoder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


class NoTaps(Taps):
    """What a model without the seam would do at a site, as near as Python allows: one call that returns."""

    def __call__(self, site: str, x: Tensor) -> Tensor:
        return x


def ns_per_call(function: object, number: int = 200_000) -> float:
    """Nanoseconds of one call: the best of five."""
    x = torch.zeros(1)
    call = timeit.Timer(lambda: function("layers.0.resid_pre", x), "pass")  # type: ignore[operator]
    empty = timeit.Timer(lambda: x, "pass")
    return (min(call.repeat(5, number)) - min(empty.repeat(5, number))) / number * 1e9


class IdentityHook(nn.Module):
    """The identity module that TransformerLens puts at each site."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def forward_ms(model: Decoder, rounds: int = 15) -> float:
    """Median milliseconds of one forward pass of 128 tokens."""
    tokens = torch.arange(128)[None]
    with torch.inference_mode():
        model(tokens)
        return statistics.median(timeit.repeat(lambda: model(tokens), number=1, repeat=rounds)) * 1e3


Works = dict[str, Callable[[], object]]  # "plain", "read", "change"


def ours(model: Decoder, tokens_1L: Tensor) -> Works:
    """The three passes through taps."""

    def read() -> Tensor:
        with observe(model, "layers.*.resid_post") as seen:
            model(tokens_1L)
        return seen["layers.3.resid_post"]

    def change() -> Tensor:
        with intervene(model, {"layers.3.attn.z[:, 5, 2]": torch.zeros_like}):
            return model(tokens_1L)

    return {"plain": lambda: model(tokens_1L), "read": read, "change": change}


def lens_model(model: Decoder) -> Any:
    """The model in TransformerLens: built anew and given the same numbers."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    c = model.config
    settings = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=None if c.num_key_value_heads == c.num_attention_heads else c.num_key_value_heads,
        n_ctx=c.max_position_embeddings,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn="silu",
        gated_mlp=True,
        final_rms=True,
        normalization_type="RMS",
        eps=c.norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        rotary_adjacent_pairs=False,
        device="cpu",
        dtype=model.dtype,
    )
    peer = HookedTransformer(settings)
    state, N = peer.state_dict(), c.num_attention_heads
    heads = lambda w: w.unflatten(0, (-1, c.head_dim)).transpose(1, 2)  # noqa: E731  (N H) D -> N D H
    state["embed.W_E"] = model.model.embed_tokens.weight
    state["unembed.W_U"] = model.lm_head.weight().T
    state["ln_final.w"] = model.model.norm.weight  # type: ignore[union-attr,assignment]
    for n, layer in enumerate(model.model.layers):
        block: Any = layer
        attention, mlp = block.self_attn, block.mlp
        for letter in "QKV":
            shared = "_" if letter in "KV" and c.num_key_value_heads != N else ""
            state[f"blocks.{n}.attn.{shared}W_{letter}"] = heads(getattr(attention, f"{letter.lower()}_proj").weight())
        state[f"blocks.{n}.attn.W_O"] = attention.o_proj.weight().T.unflatten(0, (N, -1))
        state[f"blocks.{n}.mlp.W_gate"] = mlp.gate_proj.weight().T
        state[f"blocks.{n}.mlp.W_in"] = mlp.up_proj.weight().T
        state[f"blocks.{n}.mlp.W_out"] = mlp.down_proj.weight().T
        state[f"blocks.{n}.ln1.w"] = block.input_layernorm.weight
        state[f"blocks.{n}.ln2.w"] = block.post_attention_layernorm.weight
    peer.load_state_dict({name: tensor.detach() for name, tensor in state.items()})
    return peer.eval()


def transformer_lens(model: Decoder, tokens_1L: Tensor) -> Works:
    """The same in TransformerLens."""
    peer, c = lens_model(model), model.config
    names = {f"blocks.{n}.hook_resid_post" for n in range(c.num_hidden_layers)}

    def silence(z: Tensor, hook: object) -> Tensor:
        z[:, 5, 2] = 0
        return z

    return {
        "plain": lambda: peer(tokens_1L),
        "read": lambda: peer.run_with_cache(tokens_1L, names_filter=lambda name: name in names)[1][
            "blocks.3.hook_resid_post"
        ],
        "change": lambda: peer.run_with_hooks(tokens_1L, fwd_hooks=[("blocks.3.attn.hook_z", silence)]),
    }


def nnsight(model: Decoder, tokens_1L: Tensor) -> Works:
    """The same in nnsight, around transformers' model of the saved directory. A head is columns of o_proj's input."""
    from nnsight import NNsight, save
    from transformers import AutoModelForCausalLM

    lm = LanguageModel(model, no_tokenizer(model.config), model.config)
    with tempfile.TemporaryDirectory() as place:
        write_model(lm, Path(place))
        plain = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="sdpa").eval()
    peer, H = NNsight(plain), model.config.head_dim

    def read() -> Any:
        with peer.trace(tokens_1L):
            kept = save([])
            for layer in peer.model.layers:
                kept.append(layer.output)
        return kept[3][0] if isinstance(kept[3], tuple) else kept[3]

    def change() -> Any:
        with peer.trace(tokens_1L):
            peer.model.layers[3].self_attn.o_proj.input[:, 5, 2 * H : 3 * H] = 0
            logits = peer.lm_head.output.save()
        return logits

    return {"plain": lambda: plain(tokens_1L).logits, "read": read, "change": change}


def attribution_gap(model: Decoder, tokens_1L: Tensor) -> float:
    """How far our heads' shares of a logit are from TransformerLens's; its final norm must have weights of 1."""
    peer = lens_model(model)
    _, cache = peer.run_with_cache(tokens_1L)
    results_CBD = cache.stack_head_results(layer=-1, pos_slice=-1, apply_ln=True)
    theirs = results_CBD[:, 0] @ peer.W_U[:, 7]
    mine = decompose(model, tokens_1L, [7]).heads_NHT().flatten()
    return float((mine - theirs.double()).abs().max() / mine.abs().max())


@torch.no_grad()
def against_peers(model: Decoder, rounds: int) -> None:
    """Agreement first, then the ratios: medians over `rounds` turns."""
    tokens_1L = torch.arange(128)[None]
    makers = {"bildung": ours, "TransformerLens": transformer_lens, "nnsight": nnsight}
    works = {name: maker(model, tokens_1L) for name, maker in makers.items()}
    for name, work in works.items():
        for what, call in work.items():
            expected, found = works["bildung"][what](), call()
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    gap = attribution_gap(model, tokens_1L)
    print(f"direct logit attribution of the heads: ours and TransformerLens's differ by {gap:.1e} of the largest")
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for name, work in works.items():
            for what, call in work.items():
                seconds.setdefault((name, what), []).append(timeit.timeit(call, number=1))
    median = {key: statistics.median(some) for key, some in seconds.items()}
    for name in works:
        read, change = (median[name, what] / median[name, "plain"] for what in ("read", "change"))
        plain = median[name, "plain"] / median["bildung", "plain"]
        print(f"{name:16} plain / ours {plain:5.2f}   reading / plain {read:5.2f}   changing / plain {change:5.2f}")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", help="where TransformerLens and nnsight were installed")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    if given.peers:
        sys.path.append(given.peers)
        return against_peers(build(from_dict(CONFIG), seed=0).eval(), given.rounds)
    hook = IdentityHook()
    print(f"one idle tap:        {ns_per_call(Taps()):6.0f} ns")
    print(f"one identity module: {ns_per_call(lambda _site, x: hook(x)):6.0f} ns")
    model = build(from_dict(CONFIG)).eval()
    taps, ratios, observed = model.taps, [], []
    for _ in range(given.rounds):  # interleaved: a shared machine drifts
        with_taps = forward_ms(model)
        for module in model.modules():
            if "taps" in vars(module):
                module.taps = NoTaps()
        without = forward_ms(model)
        for module in model.modules():
            if "taps" in vars(module):
                module.taps = taps
        with observe(model, "layers.*.resid_post"):
            listening = forward_ms(model)
        ratios.append(with_taps / without)
        observed.append(listening / with_taps)
    count = len(sites(model))
    print(f"forward of 128 tokens with {count} idle sites / without: {statistics.median(ratios):.3f}")
    print(f"the same while every layer's residual stream is read / idle: {statistics.median(observed):.3f}")


if __name__ == "__main__":
    main()
