"""Every way to look inside, on every kind of model the project makes: the matrix, and docs/look_matrix.md.

Each cell calls the look as a user does and then checks what must hold whatever the model: an intervention with what was
there changes no bit, shares add up to the logit, a lens at the last layer is the model, a model compared with itself
has not changed ... Where a look is refused, the table has the letter of the reason, and the refusal must say it.

    python -m tests.contract.test_look_matrix          writes the table anew

A new look is a line in LOOKS. The fast tests take every model once; `-m slow` takes all cells, with their pages.
"""

from __future__ import annotations

import re
import tempfile
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import nn

import bildung
from bildung.core.errors import BildungError
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import match_linears, replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.quantized import METHODS as STORES
from bildung.model.store import LanguageModel
from bildung.tokens.tokenizer import Tokenizer
from tests.contract.looks import LOOKS, Case
from tests.contract.test_families import CONFIGS

DOCUMENT = Path(bildung.__file__).parents[1] / "docs/look_matrix.md"
HOLDS = "✓"
CLASSES = {"id2label": {"0": "bad", "1": "good"}}
# name: (family, what is done to it, changed keys of its config, in words)
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("llama", "", {}, "a decoder with grouped heads and rotated positions"),
    "LoRA": ("llama", "lora", {}, "the same under an adapter of rank 2 on every matrix"),
    "NF4": ("llama", "nf4", {}, "the same in 4 bits"),
    "Int8": ("llama", "int8", {}, "the same in 8 bits"),
    "pruned": ("llama", "pruned", {}, "the same with half of each row zeros"),
    "edited": ("llama", "edited", {}, "the same with a change of rank 1 in one layer"),
    "gpt2": ("gpt2", "", {}, "a decoder with learned positions"),
    "classes": (
        "llama",
        "",
        {"architectures": ["LlamaForSequenceClassification"], **CLASSES},
        "llama with two classes",
    ),
    "bert": ("bert", "", {}, "an encoder with its masked-language head"),
    "bert classes": ("bert", "", {"architectures": ["BertForSequenceClassification"], **CLASSES}, "bert with two"),
    "t5": ("t5", "", {}, "an encoder-decoder, norms before"),
    "bart": ("bart", "", {}, "an encoder-decoder, norms after"),
    "rnn": ("rnn", "", {}, "an LSTM"),
}
# The reasons for which a look is refused: what the refusal must say, and the reason in words.
REASONS = {
    "a": (r"attends to no source", "there is no source that an answer could be aligned with"),
    "b": (r"does not continue text", "it is measured on the next token of running text, and this model predicts none"),
    "c": (r"turns no state into tokens", "no head turns its states into tokens: there is nothing to read them with"),
    "d": (r"a layer that is not linear", "between its states and its logits stands a layer that is not linear"),
    "e": (r"no sum of what its parts write|no graph of edges", "its states are no sum of what its parts write"),
    "f": (
        r"norms stand post",
        "a post-norm normalises what a part writes with what others wrote: no edge is a summand",
    ),
    "g": (r"no attention|no heads", "it has no attention heads"),
    "h": (r"no class, no next token", "it has nothing to say that could be explained"),
}


INTRODUCTION = (
    "Written by `python -m tests.contract.test_look_matrix`, and checked cell by cell by the tests. ✓: the look",
    "runs, and what must hold on every model holds: what is put back unchanged changes no bit, shares add up to the",
    "logit, a lens at the last layer is the model, a circuit of all edges is the model, a model compared with",
    "itself has not changed. A letter: it is refused, for the reason below. The models are small and random.",
)
NOTES = (
    "An encoder-decoder is looked at in its decoder, while it answers the prompt, in its encoder, or in both, as",
    "the settings say; a masked encoder is asked at the prompt's one mask, a classifier for its class",
    "(`look/asked.py`). Where a default names sites that a model lacks (`patch` and `trace` on an RNN), name",
    "others, such as `resid_post`. `look image_attention` is for models of images (ViT, DINOv2); `look curves`,",
    "`table` and `pairs` read logs, records and a tokenizer.",
)


def tokenizer() -> Tokenizer:
    """Bytes, with the special tokens of every family."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = dict(
        zip(("bos", "eos", "pad", "cls", "sep", "mask"), "<bos> <eos> <pad> [CLS] [SEP] [MASK]".split(), strict=True)
    )
    backend.add_special_tokens(list(named.values()))
    return Tokenizer(backend, {f"{name}_token": token for name, token in named.items()})


@cache
def directory(name: str) -> Path:
    """A small random model of that kind, as a user has it."""
    family, how, keys, _ = MODELS[name]
    longer = (
        {"n_positions": 256}
        if family == "gpt2"
        else {}
        if family in ("t5", "rnn")
        else {"max_position_embeddings": 256}
    )
    config = from_dict({"model_type": family, **CONFIGS[family], "vocab_size": 264, **longer, **keys})
    model = build(config, 3).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "running" not in parameter_name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    if how in STORES:
        replace_stores(model, "all", lambda linear: STORES[how].quantize(linear.base.dense().detach()))
    if how == "pruned":
        for linear in match_linears(model, "*.layers.*").values():
            linear.base.dense().data[:, ::2] = 0
    lm = LanguageModel(model, tokenizer(), config)
    place = Path(tempfile.mkdtemp(prefix="looks")) / name.replace(" ", "_")
    if how in ("lora", "edited"):
        lm = bildung.load(bildung.save(lm, place.with_name("base")))
        for linear in match_linears(lm.model, "*.layers.*" if how == "lora" else "layers.0.mlp.up_proj").values():
            linear.deltas["added"] = delta = LowRank(linear.in_features, linear.out_features, 1 + (how == "lora"), 2.0)
            nn.init.normal_(delta.lora_B, std=0.1, generator=generator)
    return bildung.save(lm, place)


def outcome(look: str, model: str, place: Path, *, page: bool) -> str:
    """✓, or the letter of the reason for which the look is refused."""
    try:
        LOOKS[look](Case(directory(model), place, page))
    except BildungError as error:
        found = [letter for letter, (pattern, _) in REASONS.items() if re.search(pattern, str(error))]
        assert found, f"{look} on {model}: refused for no reason of the table: {error}"
        return found[0]
    return HOLDS


def documented() -> dict[str, dict[str, str]]:
    """The table of docs/look_matrix.md: {look: {model: what stands there}}."""
    rows = re.findall(r"^\| `([\w ]+)` \|(.*)\|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    return {look: dict(zip(MODELS, map(str.strip, cells.split("|")), strict=True)) for look, cells in rows}


# Every model once, with a look that takes no time; each look has fast tests of its own in tests/look.
QUICK = (
    "intervene",
    "logit_lens",
    "attribution",
    "saliency",
    "gradients",
    "heads",
    "circuits",
    "sites",
    "ablate",
    "observe",
)
FEW = list(zip(cycle(QUICK), MODELS, strict=False))


@pytest.mark.parametrize(("look", "model"), FEW)
def test_every_model_once(look: str, model: str, tmp_path: Path) -> None:
    assert outcome(look, model, tmp_path, page=False) == documented()[look][model]


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("look", LOOKS)
def test_every_look_on_every_model(look: str, model: str, tmp_path: Path) -> None:
    assert outcome(look, model, tmp_path, page=True) == documented()[look][model]


def test_the_table_has_every_look_and_every_model() -> None:
    assert set(documented()) == set(LOOKS)
    used = {cell for row in documented().values() for cell in row.values()}
    assert used <= {HOLDS, *REASONS}


def write() -> None:
    """docs/look_matrix.md, from what each cell does."""
    lines = [
        "# Looking inside: what works on which model",
        "",
        *INTRODUCTION,
        "",
        f"| look | {' | '.join(MODELS)} |",
        f"|---|{'---|' * len(MODELS)}",
    ]
    for look in LOOKS:
        cells = []
        for model in MODELS:
            with tempfile.TemporaryDirectory() as place:
                cells.append(outcome(look, model, Path(place), page=False))
            print(look, model, cells[-1], flush=True)
        lines.append(f"| `{look}` | {' | '.join(cells)} |")
    lines += ["", "| | reason |", "|---|---|"]
    lines += [
        f"| {letter} | {why} |" for letter, (_, why) in REASONS.items() if any(f"| {letter} |" in x for x in lines)
    ]
    lines += ["", "| model | |", "|---|---|", *(f"| {name} | {words} |" for name, (*_, words) in MODELS.items())]
    lines += [
        "",
        *NOTES,
        "",
    ]
    DOCUMENT.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write()
