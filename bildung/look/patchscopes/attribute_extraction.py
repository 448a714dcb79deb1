"""Attribute extraction: what do the vectors of a name hold of a fact, by Patchscope without and by probe with training?

    source   "My question is about France"   the vector of "France" after layer l
    target   "The capital of x is"           put in for x after layer l*; right if what is written says "Paris"
    probe    a linear classifier on the same vectors, trained on objects as classes

(Ghandeharioun et al. 2024, section 4.2.) A fact counts if the model says it when simply asked. The paper calls a layer
right if any target layer is; with ten target layers that is ten guesses, so two more figures stand beside it: with one
target layer, chosen for each half of the facts on the other half, and the share of OTHER facts' objects that the same
texts say, which is what guessing by the prompt's form would give.

The probe is tested in two ways. With names seen in training in other sentences it can look them up; with names never
seen it must read the attribute itself, and cannot be right about an object that no training name has (each capital
belongs to one country). The Patchscope has no such limit: its vocabulary is the model's.
"""

# S facts, C contexts, N source layers, T target layers, D hidden_size

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bildung.core.errors import DataError
from bildung.look.asked import stack_prefix
from bildung.look.patchscopes.facts import Fact, Relation, says
from bildung.look.patchscopes.patch_targets import place_of, target_prompt
from bildung.look.patchscopes.patchscopes import patched_texts
from bildung.look.probing.activations import Read, collect
from bildung.look.probing.probes import Options, train_probe
from bildung.look.prompt import encode_text, half
from bildung.model.store import LanguageModel
from bildung.run.write import write

# Sentences that say nothing of the attribute; the name never stands first, where attention sinks are. The last is read
# by the Patchscope and tests the probe, the one before stops its training, the others train it.
CONTEXTS = (
    "I read a long book about {}",
    "Last week we talked about {}",
    "This is a picture of {}",
    "There is much to say about {}",
    "My question is about {}",
)
FOLDS = 5


@dataclass
class Extraction:
    """One relation. Shares are of the known facts that were tested; hits_SNT: what each patched text says is right."""

    prompt: str
    facts: list[Fact]
    asked: int  # so many facts were asked for to find them
    layers: list[int]
    target_layers: list[int]
    texts: list[str]  # in the order of hits_SNT
    hits_SNT: Tensor
    others_SN: Tensor  # share of the other facts' objects that any target layer's text says
    seen_SN: Tensor  # the probe is right: names of the training, in another sentence
    unseen_SN: Tensor  # names that it never saw
    majority: float  # of always saying the most frequent object

    @property
    def any_SN(self) -> Tensor:
        """Right with at least one target layer, the paper's measure."""
        return self.hits_SNT.any(-1).double()

    @property
    def one_SN(self) -> Tensor:
        """Right with one target layer per source layer, chosen on the other half of the facts."""
        return right_elsewhere(self.hits_SNT)


def extract(
    lm: LanguageModel,
    relation: Relation,
    every_fact: Sequence[Fact],
    layers: Sequence[int],
    target_layers: Sequence[int],
    *,
    count: int,
    new_tokens: int,
    seed: int = 0,
    options: Options | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Extraction:
    """Patchscope and probes of one relation. Raises DataError when the model knows fewer than two of its facts."""
    order = torch.randperm(len(every_fact), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, asked = known_facts(lm, relation, [every_fact[i] for i in order], count, new_tokens)
    numbers = [every_fact.index(fact) for fact in chosen]
    reader = half(lm, "encoder")  # of an encoder-decoder the half that reads questions
    sites = [f"{stack_prefix(reader.model)}layers.{layer}.resid_post" for layer in layers]
    vectors = collect(lm, [reading(lm, c.format(f.subject), f.subject) for f in every_fact for c in CONTEXTS], sites)
    h_FCND = torch.stack([vectors[site] for site in sites], 1).unflatten(0, (len(every_fact), len(CONTEXTS)))
    h_SND = h_FCND[numbers, -1]
    # Every vector into every target layer: the runs are facts x layers x target layers.
    into = torch.arange(len(target_layers)).repeat(len(chosen) * len(layers))
    h_RE = h_SND.flatten(0, 1).repeat_interleave(len(target_layers), 0).to(lm.model.device, lm.model.dtype)
    target = target_prompt(reader, relation.prompt)
    texts: list[str] = []
    for start in range(0, len(h_RE), 256):
        part = slice(start, start + 256)
        texts += patched_texts(reader, target, h_RE[part], [target_layers[t] for t in into[part].tolist()], new_tokens)
        advance(len(texts) - start)
    shape = (len(chosen), len(layers), len(target_layers))
    per_fact = shape[1] * shape[2]
    hits = torch.tensor([says(text, chosen[r // per_fact].object) for r, text in enumerate(texts)]).view(shape)
    labels, objects = _labels(every_fact)
    seen_SN, unseen_SN = probes(h_FCND, labels, len(objects), numbers, seed, options or Options())
    majority = float(labels[numbers].bincount(minlength=len(objects))[labels.bincount().argmax()]) / len(numbers)
    others_SN = others_said(texts, chosen, shape)
    return Extraction(
        relation.prompt, chosen, asked, list(layers), list(target_layers), texts, hits, others_SN, seen_SN, unseen_SN,
        majority,
    )  # fmt: skip


def known_facts(
    lm: LanguageModel, relation: Relation, every_fact: Sequence[Fact], count: int, new_tokens: int
) -> tuple[list[Fact], int]:
    """(the first `count` facts that the model says when it is asked in the target's own words, how many were asked)."""
    known: list[Fact] = []
    asked = 0
    for start in range(0, len(every_fact), 64):
        part = every_fact[start : start + 64]
        prompts = [encode_text(lm, relation.prompt.format(fact.subject))[0] for fact in part]
        answers = write(lm.model, lm.tokenizer, prompts, new_tokens)
        asked += len(part)
        known += [fact for fact, answer in zip(part, answers, strict=True) if says(answer[0].text, fact.object)]
        if len(known) >= count:
            break
    if len(known) < 2:
        raise DataError(
            f"of {asked} facts the model says {len(known)} when asked {relation.prompt!r}; at least two are needed to "
            "look for where it keeps them."
        )
    return known[:count], asked


def reading(lm: LanguageModel, text: str, name: str) -> Read:
    """A text, of which the vector of the name's last token is wanted."""
    tokens = encode_text(lm, text)[0]
    return Read(tokens, [[place_of(lm, text, tokens, name)]])


def right_elsewhere(hits_SNT: Tensor) -> Tensor:
    """SN: right with the one T (per N) that was best on the other half of S."""
    hits, right_SN = hits_SNT.double(), torch.zeros(hits_SNT.shape[:2], dtype=torch.float64)
    for part in (0, 1):
        mine = hits[part::2]
        best_N = hits[1 - part :: 2].mean(0).argmax(-1)
        right_SN[part::2] = mine.gather(-1, best_N.expand(len(mine), -1)[..., None])[..., 0]
    return right_SN


def _labels(every_fact: Sequence[Fact]) -> tuple[Tensor, list[str]]:
    objects = sorted({fact.object for fact in every_fact})
    return torch.tensor([objects.index(fact.object) for fact in every_fact]), objects


def others_said(texts: Sequence[str], chosen: Sequence[Fact], shape: tuple[int, int, int]) -> Tensor:
    """For each fact and layer: the share of the other facts' (different) objects said in any target layer's text."""
    found = torch.zeros(shape[:2], dtype=torch.float64)
    objects = sorted({fact.object for fact in chosen})
    for s, fact in enumerate(chosen):
        others = [one for one in objects if one != fact.object]
        for n in range(shape[1]):
            start = (s * shape[1] + n) * shape[2]
            mine = texts[start : start + shape[2]]
            found[s, n] = sum(any(says(text, one) for text in mine) for one in others) / max(1, len(others))
    return found


def probes(
    h_FCND: Tensor, labels_F: Tensor, classes: int, tested: Sequence[int], seed: int, options: Options
) -> tuple[Tensor, Tensor]:
    """(right on names of the training SN, right on names never seen SN) of linear probes, one per layer."""
    facts, contexts, layers = h_FCND.shape[:3]
    fold_F = torch.randperm(facts, generator=torch.Generator().manual_seed(seed)) % FOLDS
    seen, unseen = torch.zeros(len(tested), layers).double(), torch.zeros(len(tested), layers).double()

    def right(layer: int, train: list[int], rows: list[int]) -> Tensor:
        def part(names: list[int], which: list[int]) -> tuple[Tensor, Tensor]:
            return h_FCND[names][:, which, layer].flatten(0, 1).float(), labels_F[names].repeat_interleave(len(which))

        probe = train_probe(
            "linear",
            options,
            part(train, list(range(contexts - 2))),
            part(train, [contexts - 2]),
            classes,
            seed,
        )
        with torch.no_grad():
            x_SD, y_S = part(rows, [contexts - 1])
            return (probe(x_SD).argmax(-1) == y_S).double()

    for layer in range(layers):
        seen[:, layer] = right(layer, list(range(facts)), list(tested))
        for fold in range(FOLDS):
            mine = [s for s, name in enumerate(tested) if fold_F[name] == fold]
            if mine:
                train = [name for name in range(facts) if fold_F[name] != fold]
                unseen[mine, layer] = right(layer, train, [tested[s] for s in mine])
    return seen, unseen
