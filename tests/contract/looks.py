"""What test_look_matrix.py does in each cell: a look on a model, and what must hold of it whatever the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import bildung
from bildung.look import (
    alignment,
    attention,
    attributes,
    attribution,
    by_position,
    cache,
    circuit,
    circuits,
    compare,
    gradient_distance,
    heads,
    in_context,
    index,
    induction,
    logit_lens,
    multi_hop,
    patch,
    patchscope,
    path_patch,
    probe,
    saliency,
    steering,
    stream_map,
    trace,
    tuned_lens,
)
from bildung.look.asked import Asked, asked, stack_prefix
from bildung.look.causal.ablation import zero
from bildung.look.comparing.comparison import compare_models
from bildung.look.lenses.translators import read_lens
from bildung.look.prompt import encode_text
from bildung.model.steering import read_steering, steered
from bildung.model.store import LanguageModel
from bildung.model.taps import intervene, observe, sites
from tests.look.test_in_context import TASK


@dataclass
class Case:
    """One cell. page: also call the look as the command line does; else only where the check needs it."""

    directory: Path
    place: Path
    page: bool

    @cached_property
    def lm(self) -> LanguageModel:
        return bildung.load(self.directory)

    @property
    def question(self) -> Asked:
        return asked(self.lm)

    @property
    def masked(self) -> bool:
        return self.lm.config.kind == "encoder" and not self.question.has_classes

    def text(self, words: str) -> str:
        """The words, with a place to ask at where the model needs one."""
        return words + (" [MASK]" if self.masked else "")

    def tokens(self, words: str = "the cat sat") -> Tensor:
        return torch.tensor([encode_text(self.lm, self.text(words))[0]])

    def logits(self, words: str = "the cat sat") -> Tensor:
        with torch.no_grad():
            return self.question.logits(self.tokens(words))[0]

    def rows(self, name: str, rows: list[dict[str, Any]]) -> str:
        (self.place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(self.place / f"{name}.jsonl")

    def texts(self, count: int = 40) -> str:
        return self.rows("texts", [{"text": f"text {n} of cats and dogs, " * 4} for n in range(count)])

    def pairs(self) -> str:
        """Two pairs that differ in one letter."""
        right, wrong = ("good", "bad") if self.question.has_classes else ("a", "b")
        two = [("the cat sat", "the car sat"), ("one dog ran", "one dot ran")]
        texts = [{"clean": self.text(x), "corrupted": self.text(y)} for x, y in two]
        return self.rows("pairs", [{**row, "answers": [right], "wrong": [wrong]} for row in texts])

    @property
    def differs(self) -> int:
        """Where the pairs differ."""
        x, y = (encode_text(self.lm, self.text(words))[0] for words in ("the cat sat", "the car sat"))
        return next(n for n, (a, b) in enumerate(zip(x, y, strict=True)) if a != b)

    def run(self, verb: Callable[..., Any], settings: Any) -> tuple[Any, Path]:
        """The look itself: its record and what it left."""
        out = self.place / "out"
        return verb(self.directory, out, settings), out

    def numbers(self, verb: Callable[..., Any], settings: Any) -> Any:
        """The same, read from its JSON."""
        _, out = self.run(verb, settings)
        assert not self.page or list(out.glob("*.html")) or verb.__name__ in WITHOUT_PAGE
        return json.loads((out / f"{verb.__name__}.json").read_text(encoding="utf-8"))


WITHOUT_PAGE = {"alignment", "induction", "by_position", "gradient_distance", "in_context"}


def _sites(case: Case) -> None:
    with torch.no_grad(), observe(case.lm.model, "*") as seen:
        case.question.logits(case.tokens())
    shapes, silent = sites(case.lm.model), set(sites(case.lm.model)) - set(seen)
    assert all(x.ndim == len(shapes[site].split()) for site, x in seen.items())
    assert all(site == "pos_embed" or ".neck" in site for site in silent), silent
    if case.lm.config.model_type == "llama":
        assert shapes.keys() - {"logits", "pooled", "class_logits"} == _llama_sites()


def _llama_sites() -> set[str]:
    from tests.contract.test_families import made

    return set(sites(made("llama").model)) - {"logits"}


def _observe(case: Case) -> None:
    plain = case.logits()
    with observe(case.lm.model, "*layers.*.resid_post"):
        assert torch.equal(case.logits(), plain)


def _intervene(case: Case) -> None:
    """What was there, put back: at every site, bit for bit."""
    for pattern in ("*", "*layers.*.resid_post", "*layers.0.*[:, 1]"):
        names = pattern if pattern != "*layers.0.*[:, 1]" else f"{stack_prefix(case.lm.model)}layers.0.resid_pre[:, 1]"
        with observe(case.lm.model, names.split("[")[0]):
            plain = case.logits()
        with intervene(case.lm.model, {names: torch.clone}):
            assert torch.equal(case.logits(), plain)


def _ablate(case: Case) -> None:
    prefix, plain = stack_prefix(case.lm.model), case.logits()
    with intervene(case.lm.model, {f"{prefix}layers.0.resid_post[:, {case.differs}]": zero}):
        assert not torch.allclose(case.logits(), plain)
    assert torch.equal(case.logits(), plain)


def _gradients(case: Case) -> None:
    """The gradient is the slope along itself."""
    site = f"{stack_prefix(case.lm.model)}layers.0.resid_pre"
    question, tokens, f = case.question, case.tokens(), lambda out: out[0].double().square().sum()
    case.lm.model.requires_grad_(True)
    with torch.enable_grad(), observe(case.lm.model, site, gradients=True) as seen:
        f(question.logits(tokens)).backward()
    gradient = seen.gradients[site]
    step = 1e-2 / gradient.norm()
    values = []
    for sign in (1, -1):
        with torch.no_grad(), intervene(case.lm.model, {site: lambda x, sign=sign: x + sign * step * gradient}):
            values.append(f(question.logits(tokens)).item())
    assert (values[0] - values[1]) / (2 * step.item()) == np.float64(gradient.norm() ** 2).item() or np.isclose(
        (values[0] - values[1]) / (2 * step.item()), (gradient.norm() ** 2).item(), rtol=0.05
    )


def _cache(case: Case) -> None:
    site = f"{stack_prefix(case.lm.model)}layers.1.resid_post"
    case.run(cache.cache, cache.Settings(data=case.texts(3), sites=(site,), max_length=20))
    found = cache.Activations(case.place / "out", case.lm)
    tokens = torch.tensor(np.array(found.tokens[found.starts[1] : found.starts[2]])).long()[None]
    with torch.no_grad(), observe(case.lm.model, site) as seen:
        asked_at_none(case, tokens)
    torch.testing.assert_close(torch.tensor(np.array(found.text(site, 1))), seen[site][0], atol=1e-4, rtol=1e-4)


def asked_at_none(case: Case, tokens: Tensor) -> None:
    """Read a text without a question."""
    model = case.lm.model
    model.encode(tokens) if hasattr(model, "given") else model.hidden(tokens)


def _steering(case: Case) -> None:
    site = f"{stack_prefix(case.lm.model)}layers.1.resid_post"
    texts = {name: case.rows(name, [{"text": text}]) for name, text in (("yes", "good day"), ("no", "bad news"))}
    case.run(steering.steering, steering.Settings(site=site, positive=texts["yes"], negative=texts["no"], read="mean"))
    made, means = read_steering(case.place / "out"), []
    for text in ("good day", "bad news"):
        with torch.no_grad(), observe(case.lm.model, site) as seen:
            asked_at_none(case, torch.tensor([encode_text(case.lm, text)[0]]))
        means.append(seen[site][0].mean(0))
    torch.testing.assert_close(made.vector_D, means[0] - means[1], atol=1e-5, rtol=1e-4)
    plain = case.logits()
    with steered(case.lm, made, 0.0):
        assert torch.equal(case.logits(), plain)
    with steered(case.lm, made, 4.0):
        assert not torch.allclose(case.logits(), plain)


def _probe(case: Case) -> None:
    words = [("the cat sat", "D N V"), ("a dog ran", "D N V"), ("one man ate", "C N V")] * 5
    data = case.rows("words", [{"words": w.split(), "tags": t.split()} for w, t in words])
    options = probe.Options(epochs=1) if hasattr(probe.Options(), "epochs") else probe.Options()
    made = probe.probe_model(case.lm, probe.Settings(data=data, seeds=1, probes=("linear",), options=options))
    assert len(made.units.labels) == 45 and ((made.sweep.score_PSR >= 0) & (made.sweep.score_PSR <= 1)).all()
    if case.page:
        case.numbers(probe.probe, probe.Settings(data=data, seeds=1, probes=("linear",), options=options))


def _lens(case: Case) -> None:
    settings = logit_lens.Settings(prompt=case.text("the cat sat"), max_tokens=64)
    found = logit_lens.read_lens(case.lm, settings.prompt)
    assert (found.rank_NL[-1] == 1).all() and (found.kl_NL[-1] == 0).all() and (found.kl_NL[0] > 0).any()
    if case.page:
        case.run(logit_lens.logit_lens, settings)


def _tuned_lens(case: Case) -> None:
    record, out = case.run(
        tuned_lens.tuned_lens, tuned_lens.Settings(data=case.texts(), steps=2, rows=2, length=16, held_out=2)
    )
    lens, h = read_lens(out, case.lm), torch.randn(1, 3, case.lm.config.hidden_size)
    assert torch.equal(lens(h, 1), h) and not torch.equal(lens(h, 0), h)
    assert record.measured["kl_before"] != record.measured["kl_after"]


def _attention(case: Case) -> None:
    case.run(attention.attention, attention.Settings(prompt=case.text("the cat sat")))
    patterns = load_file(case.place / "out/patterns.safetensors")["a"]
    torch.testing.assert_close(patterns.sum(-1), torch.ones(patterns.shape[:3]))


def _alignment(case: Case) -> None:
    (found,) = case.numbers(alignment.alignment, alignment.Settings(source=("abc",), new_tokens=4))
    assert all(abs(sum(row) - 1) < 1e-2 for row in found["weights"])


def _heads(case: Case) -> None:
    scores = heads.head_atlas(case.lm, heads.Settings(stretch=8, rows=2)).scores
    assert all(one.isfinite().all() and len(one) == 2 for one in scores.values())
    assert ((scores["induction"] >= 0) & (scores["induction"] <= 1)).all()
    if case.page:
        case.numbers(heads.heads, heads.Settings(stretch=8, rows=2))


def _circuits(case: Case) -> None:
    arrays = circuits.circuit_arrays(case.lm)
    assert (arrays["norm of QK"] > 0).all() and arrays["K"].isfinite().any()
    if case.page:
        case.numbers(circuits.circuits, circuits.Settings())


def _induction(case: Case) -> None:
    found = case.numbers(induction.induction, induction.Settings(stretch=8, rows=2))
    assert 0 <= found["score"] <= 1 and found["first_loss"] > 0


def _patch(case: Case) -> None:
    """Where two prompts differ in one token, its vector below all layers is all that is needed."""
    settings = patch.Settings(pairs=case.pairs(), count=1, sites=("resid_pre",), heads=())
    (grid,) = case.numbers(patch.patch, settings)["grids"]
    assert abs(grid["values"][0][case.differs] - 1) < 1e-3 and abs(grid["values"][0][0]) < 1e-3


def _path_patch(case: Case) -> None:
    found = case.numbers(path_patch.path_patch, path_patch.Settings(pairs=case.pairs(), count=1))
    right, wrong = (1, 0) if case.question.has_classes else (case.lm.tokenizer.encode(x, bos=False)[0] for x in "ab")
    logits = case.logits()
    assert abs(found["clean"] - float(logits[right] - logits[wrong])) < 1e-3 and found["grids"]


def _circuit(case: Case) -> None:
    """All edges are the model."""
    settings = circuit.Settings(pairs=case.pairs(), count=2, method="eap", edges=10**6, knockouts=1)
    measured = case.numbers(circuit.circuit, settings)["measured"]
    assert abs(measured["faithfulness"] - 1) < 1e-3 and measured["edges"] > 50


def _trace(case: Case) -> None:
    """Noise on one token, whose vector is put back below all layers, is no noise."""
    settings = trace.Settings(
        prompt=case.text("the cat sat"), subject="c", samples=2, sites=("resid_pre",), window=1, deviations=1
    )
    found = case.numbers(trace.trace, settings)
    place = case.differs - 2  # the c of cat
    assert abs(found["grids"][0]["values"][0][place] - found["clean"]) < 2e-4


def _attribution(case: Case) -> None:
    found = attribution.attribute(case.lm, case.text("the cat sat"))
    assert abs(sum(found.shares.values()) - found.logit) < 1e-4
    assert abs(found.logit - float(case.logits()[found.target[0]])) < 1e-4
    if case.page:
        case.numbers(attribution.attribution, attribution.Settings(prompt=case.text("the cat sat")))


def _saliency(case: Case) -> None:
    found = saliency.explain(case.lm, case.text("the cat sat"), points=4)
    one = found.methods["integrated_gradients"]
    assert one.value is not None and abs(one.value - float(case.logits().max())) < 1e-4
    assert len(one.scores_L) == len(found.labels) and all(m.scores_L.isfinite().all() for m in found.methods.values())
    if case.page:
        case.numbers(saliency.saliency, saliency.Settings(prompt=case.text("the cat sat"), points=4))


def _patchscope(case: Case) -> None:
    """A vector put where it came from changes nothing: all such runs say what the model says."""
    settings = patchscope.Settings(prompt=case.text("a x b"), at="x", target=case.text("a {} b"), new_tokens=2)
    lm, found = case.lm, case.numbers(patchscope.patchscope, settings)
    own = case.logits("a x b").float().softmax(-1).max().item()
    same = [one for one in found["cells"] if one["layer"] == one["target_layer"]]
    assert len(same) == lm.config.num_hidden_layers and all(abs(one["top"][0][1] - own) < 1e-3 for one in same)


def _stream_map(case: Case) -> None:
    """From a layer to itself the map is the identity."""
    settings = stream_map.Settings(data=case.texts(40), pieces=40, length=64, layers=(1,))
    record, _ = case.run(stream_map.stream_map, settings)
    assert record.measured["R² held out, 1 -> 1"] > 0.999


def _knowing(module: str) -> Any:
    """A random model knows no fact: here whatever it says is right."""
    return replaced(f"bildung.look.{module}.says", lambda text, thing: True)


def _attributes(case: Case) -> None:
    settings = attributes.Settings(relations=("symbol",), facts=2, step=1, new_tokens=1)
    with _knowing("patchscopes.attribute_extraction"):
        found = case.numbers(attributes.attributes, settings)
    assert found["relations"]["symbol"]["grid"] == [[1.0, 1.0], [1.0, 1.0]]


def _multi_hop(case: Case) -> None:
    asked_of = [multi_hop.Question(*one) for one in (("Paris", "France", "euro"), ("Rome", "Italy", "euro"))]
    with _knowing("multi_hop"), replaced("bildung.look.multi_hop.questions", lambda *_: asked_of):
        found = case.numbers(multi_hop.multi_hop, multi_hop.Settings(facts=2, step=1, new_tokens=1))
    assert all(value == 1 for row in found["grid"]["values"] for value in row)


def _compare(case: Case) -> None:
    """A model and itself."""
    found = compare_models(case.lm, bildung.load(case.directory), case.text("the cat sat on it"), columns=2)
    assert not found.weights.changed and not found.weights.others
    assert found.tokens is None or (found.tokens.kl_L == 0).all()
    assert found.lens is None or (found.lens.kl_NL == 0).all()
    assert found.heads is None or not any(one.abs().max() for one in found.heads.differences.values())
    assert found.similarity is not None
    torch.testing.assert_close(found.similarity.debiased_NM.diagonal(), torch.ones(len(found.similarity.rows)).double())
    assert all(grid.recovered is None for grid in found.patches)
    if case.page:
        case.numbers(compare.compare, compare.Settings(prompt=case.text("the cat sat"), against=case.directory))


def _index(case: Case) -> None:
    record, out = case.run(index.index, index.Settings(prompt=case.text("the cat sat")))
    assert (out / "index.html").is_file() and record.measured["pages"] + len(record.notes) == 4


def _by_position(case: Case) -> None:
    found = case.numbers(
        by_position.by_position, by_position.Settings(data=case.texts(), length=16, rows=2, trained=8, bins=4)
    )
    assert all(loss > 0 for loss in found["models"][0]["loss"])


def _gradient_distance(case: Case) -> None:
    settings = gradient_distance.Settings(data=case.texts(), rows=2, length=8)
    (found,) = case.numbers(gradient_distance.gradient_distance, settings).values()
    assert len(found["norms"]) == 8 and all(norm > 0 for norm in found["norms"])


def _in_context(case: Case) -> None:
    case.rows("rows", [{"text": f"thing {number}", "label": number % 2} for number in range(6)])
    (case.place / "colours.yaml").write_text(TASK, encoding="utf-8")
    settings = in_context.Settings(
        task=str(case.place / "colours.yaml"), shots=(0, 1), rounds=1, questions=2, calibrate=False, dtype="float32"
    )
    found = case.numbers(in_context.in_context, settings)
    assert all(0 <= one["accuracy"] <= 1 for one in found["points"])


LOOKS: dict[str, Callable[[Case], None]] = {
    "sites": _sites, "observe": _observe, "intervene": _intervene, "ablate": _ablate, "gradients": _gradients,
    "cache": _cache, "steering": _steering, "probe": _probe, "logit_lens": _lens, "tuned_lens": _tuned_lens,
    "patchscope": _patchscope, "stream_map": _stream_map, "attributes": _attributes, "multi_hop": _multi_hop,
    "attention": _attention, "alignment": _alignment, "heads": _heads, "circuits": _circuits, "induction": _induction,
    "patch": _patch, "trace": _trace, "path_patch": _path_patch, "circuit": _circuit, "attribution": _attribution,
    "saliency": _saliency, "compare": _compare, "index": _index, "by_position": _by_position,
    "gradient_distance": _gradient_distance, "in_context": _in_context,
}  # fmt: skip
