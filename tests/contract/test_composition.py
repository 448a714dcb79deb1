"""Every way to tune, over every way to hold the base, in four kinds of model: the matrix, and docs/composition.md.

Each cell starts from a directory, adds the method, makes one step, saves, loads, and merges. In every cell that is not
refused: only what the method declares changes, the step lowers the loss, and what was saved is what is loaded. What
differs from cell to cell stands in the table of docs/composition.md, and each cell is held to what it says there:

    =   starts at the base, bit for bit        ≈  within rounding        ≠  elsewhere (what the method starts with)
    M   merges into the matrices, with the same logits                   –  changes no matrix

    python -m tests.contract.test_composition          writes the table anew

A base that was pruned (half of each row's numbers are zeros) or edited (a change of rank one folded in) is an ordinary
one, and behaves as fp32 does; a second table says what becomes of the zeros.

A new method is a line in METHODS.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import bildung
from bildung.core.errors import BildungError
from bildung.model import adapter_file
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.linear import match_linears, replace_stores
from bildung.model.low_rank import LowRank
from bildung.model.nested import use_rank
from bildung.model.quantized import METHODS as STORES
from bildung.model.store import LanguageModel, write_attached
from bildung.train.training import check_trainable
from bildung.tune import adapter, bitfit, dylora, ia3, lora, prefix, prompt, said
from bildung.tune.merge import fold_deltas
from tests.contract.test_families import CONFIGS, SOURCE, TARGET
from tests.model.tiny import tiny_lm

DOCUMENT = Path(bildung.__file__).parents[1] / "docs/composition.md"
FAMILIES = ("llama", "gpt2", "bert", "t5")
BASES = ("fp32", "bf16", "int8", "nf4", "edited")
CHANGED = ("pruned", "folded")  # dense bases that something was done to
ONE_LAYER = {"gpt2": {"n_layer": 1}, "t5": {"num_layers": 1}}


def _written(lm: LanguageModel, directory: Path) -> Path:
    directory.mkdir()
    write_attached(lm, directory)
    return directory


def _full(lm: LanguageModel) -> None:
    check_trainable(lm, Path("the base"))
    lm.model.float().requires_grad_(True)


@dataclasses.dataclass(frozen=True)
class Method:
    """add: puts it on a model and lets it train. start: where that leaves the model. save: as the operation does."""

    what: str
    add: Callable[[LanguageModel], Any]
    start: Literal["=", "≈", "≠"] = "="
    save: Callable[[LanguageModel, Path], Path] = bildung.save


HOULSBY = adapter.Settings(data="-", kind="houlsby")
METHODS: dict[str, Method] = {
    "full": Method("every parameter", _full),
    "lora": Method("LoRA, rank 4", lambda lm: lora.add_lora(lm.model, lora.Options(rank=4))),
    "pissa": Method("PiSSA, rank 4", lambda lm: lora.add_lora(lm.model, lora.Options(rank=4, initialise="pissa")), "≈"),
    "dora": Method("DoRA, rank 4", lambda lm: lora.add_lora(lm.model, lora.Options(rank=4, dora=True))),
    "dylora": Method("DyLoRA, ranks 1 to 4", lambda lm: dylora.add_dylora(lm.model, dylora.Options(rank=4))),
    "ia3": Method("(IA)³", lambda lm: ia3.add_ia3(lm.model, ia3.Options())),
    "bitfit": Method("BitFit", lambda lm: bitfit.add_bitfit(lm.model, bitfit.Options())),
    "said": Method("SAID", lambda lm: said.add_intrinsic(lm.model, said.Settings(data="-", dimension=200))),
    "prompt": Method(
        "prompt tuning", lambda lm: prompt.add_prompt(lm, prompt.Settings(data="-", text="Say yes.")), "≠"
    ),
    "prefix": Method(
        "prefix tuning", lambda lm: prefix.add_prefix(lm, prefix.Settings(data="-", text="Say yes.")), "≠"
    ),
    "adapter": Method("Houlsby adapters", lambda lm: adapter.add_adapter(lm.model, HOULSBY), "≠", _written),
}


def make_base(family: str, base: str, directory: Path) -> Path:
    """A small random model as a directory."""
    raw = {"model_type": family, **CONFIGS[family], **ONE_LAYER.get(family, {"num_hidden_layers": 1})}
    if family == "bert":
        raw["architectures"] = ["BertForMaskedLM"]
    config = from_dict(raw)
    model = build(config, 3).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # zeros would hide what is left out
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    if base == "bf16":
        model.bfloat16()
    elif base in STORES:
        replace_stores(model, "all", lambda linear: STORES[base].quantize(linear.base.dense().detach()))
    elif base in CHANGED:
        for linear in match_linears(model, "*.layers.*").values():
            change(linear.base.dense(), base)
    lm = LanguageModel(model, tiny_lm().tokenizer, config)
    if base != "edited":
        return bildung.save(lm, directory)
    lm = bildung.load(bildung.save(lm, directory.with_name(f"{directory.name}-base")))
    for linear in match_linears(lm.model, "mlp.up_proj").values():
        linear.deltas["edit"] = delta = LowRank(linear.in_features, linear.out_features, 1, 1.0)
        nn.init.normal_(delta.lora_B, std=0.3, generator=torch.Generator().manual_seed(5))
    return bildung.save(lm, directory)


@torch.no_grad()
def change(weight_OI: Tensor, base: str) -> None:
    """pruned: the smaller half of each row is 0. folded: plus u v^T."""
    if base == "pruned":
        smallest_OK = weight_OI.abs().argsort(dim=1)[:, : weight_OI.shape[1] // 2]
        weight_OI.scatter_(1, smallest_OK, 0.0)
        return
    generator = torch.Generator().manual_seed(weight_OI.numel())
    u_O, v_I = (torch.randn(size, generator=generator) for size in weight_OI.shape)
    weight_OI.add_(0.02 * torch.outer(u_O, v_I))


def zeros(model: Any) -> Tensor:
    """Where the layers' matrices are exactly 0."""
    chosen = match_linears(model, "*.layers.*").values()
    return torch.cat([(linear.weight() == 0).flatten() for linear in chosen])


def fate(before: Tensor, place: Path) -> str:
    """What became of the base's zeros in what was merged, or in what was saved where nothing is merged."""
    after = zeros(bildung.load(place / ("merged" if (place / "merged").exists() else "saved")).model)
    if torch.equal(after & before, before):
        return "kept"
    left = float((after & before).sum() / before.sum())
    return "filled" if left < 0.02 else f"{left:.0%} left"


def logits(model: Any) -> Tensor:
    """Of one fixed batch."""
    found: Tensor = model(SOURCE, TARGET) if model.config.kind == "encoder-decoder" else model(TARGET)
    return found.float()


def loss(model: Any) -> Tensor:
    """Each token from those before it; of an encoder from those around it, itself among them."""
    return nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), TARGET[:, 1:].flatten())


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two sets of logits agree within a share of their size."""
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """All that a model holds, quantized codes included."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in held.items()}


def examine(method: Method, base: Path, dtype: str, place: Path) -> tuple[str, int]:
    """(the cell of the table, how many numbers train). Raises AssertionError where a promise is broken."""
    lm = bildung.load(base)
    lm.model.compute_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    rounding = 0.05 if dtype == "bf16" else 1e-4
    with torch.no_grad():
        plain = logits(lm.model)
    try:
        method.add(lm)
        if lm.added:
            adapter_file.check_place(lm.model, lm.base)
    except BildungError as error:
        return f"refused: {type(error).__name__}", 0
    with torch.no_grad():
        start = logits(lm.model)
    if method.start == "≠":
        assert not torch.equal(start, plain)
    else:
        assert torch.equal(start, plain) if method.start == "=" else near(start, plain, rounding)
    cell = method.start
    declared = {name for name, parameter in lm.model.named_parameters() if parameter.requires_grad}
    before = numbers(lm.model)
    rate = 1e-2 if dtype == "bf16" else 1e-3  # a factor of 1.001 leaves every bfloat16 number what it was
    optimizer = torch.optim.AdamW([p for p in lm.model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    first = loss(lm.model)
    first.backward()
    optimizer.step()
    after = numbers(lm.model)
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and moved <= declared, f"{sorted(moved - declared)[:3]} changed and does not train"
    use_rank(lm.model, None)
    with torch.no_grad():
        trained = logits(lm.model)
        assert loss(lm.model) < first, "one step did not lower the loss"
        if len(declared) == len(dict(lm.model.named_parameters())):
            _saved_whole(lm, place, trained, rounding)
            return f"{cell} –", sum(parameter.numel() for parameter in lm.model.parameters())
        again = bildung.load(method.save(lm, place / "saved"))
        again.model.compute_dtype = lm.model.compute_dtype
        assert near(logits(again.model), trained, 1e-6), "what was saved is not what was loaded"
        count = sum(parameter.numel() for name, parameter in lm.model.named_parameters() if name in declared)
        if set(again.added) & {"virtual tokens", "attached modules"}:
            return f"{cell} –", count
        fold_deltas(again.model, torch.float32)
        again.model.compute_dtype = lm.model.compute_dtype
        assert near(logits(again.model), trained, rounding), "merged is not unmerged"
        whole = LanguageModel(again.model, again.tokenizer, again.config, base=base)
        merged = bildung.load(bildung.save(whole, place / "merged"))
        merged.model.compute_dtype = lm.model.compute_dtype
        assert not merged.added and torch.equal(logits(merged.model), logits(again.model))
    return f"{cell} M", count


def _saved_whole(lm: LanguageModel, place: Path, trained: Tensor, rounding: float) -> None:
    """Every parameter was trained: the result is a model, not an adapter."""
    again = bildung.load(bildung.save(lm, place / "saved"))
    again.model.compute_dtype = lm.model.compute_dtype
    assert near(logits(again.model), trained, rounding)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(family, base) -> its directory, made once."""
    made: dict[tuple[str, str], Path] = {}
    place = tmp_path_factory.mktemp("bases")

    def directory(family: str, base: str) -> Path:
        if (family, base) not in made:
            made[family, base] = make_base(family, base, place / f"{family}-{base}")
        return made[family, base]

    return directory


def in_turn(name: str, family: str, base: str) -> bool:
    """Whether the fast tests take the cell: families in turn, so that each two of method, family and base meet."""
    return FAMILIES[(list(METHODS).index(name) + BASES.index(base)) % len(FAMILIES)] == family


@pytest.mark.parametrize(
    ("name", "family", "base"),
    [
        pytest.param(*cell, marks=() if in_turn(*cell) else pytest.mark.slow)
        for cell in itertools.product(METHODS, FAMILIES, BASES)
    ],
)
def test_each_method_over_each_base(
    name: str, family: str, base: str, bases: Callable[[str, str], Path], tmp_path: Path
) -> None:
    cell, count = examine(METHODS[name], bases(family, base), base, tmp_path)
    assert documented()[name, family][base] == cell, "docs/composition.md says otherwise; write it anew if it is wrong"
    assert count in (0, int(documented()[name, family]["trained"].replace(",", "")))


@pytest.mark.parametrize("base", CHANGED)
@pytest.mark.parametrize("name", METHODS)
def test_each_method_over_a_base_that_was_changed(
    name: str, base: str, bases: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """As over fp32; of a pruned base, what becomes of the zeros."""
    directory = bases("gpt2", base)
    cell, _ = examine(METHODS[name], directory, base, tmp_path)
    assert cell == documented()[name, "gpt2"]["fp32"]
    if base == "pruned":
        before = zeros(bildung.load(directory).model)
        assert 0.4 < float(before.float().mean()) <= 0.5
        assert zeros_documented()[name] == fate(before, tmp_path)


def zeros_documented() -> dict[str, str]:
    """The second table of docs/composition.md."""
    return dict(re.findall(r"^\| `(\w+)` \| (kept|filled|\d+% left) \|$", DOCUMENT.read_text("utf-8"), re.MULTILINE))


def documented() -> dict[tuple[str, str], dict[str, str]]:
    """The table of docs/composition.md: (method, family) -> {column: cell}."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|(.*)\|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    columns = ("trained", *BASES)
    return {
        (name, family): dict(zip(columns, (one.strip() for one in rest.split("|")), strict=True))
        for name, family, rest in rows
    }


def test_the_table_has_no_row_too_many() -> None:
    assert set(documented()) == {(name, family) for name in METHODS for family in FAMILIES}


TOP = """# What goes together

Written by `python -m tests.contract.test_composition`, and checked cell by cell by the tests: each cell starts from a
directory, adds the method, makes one step, saves, loads, and merges. Where a cell is not refused, only the numbers that
the method declares have changed, the step has lowered the loss, and what was loaded is what was saved.

| | |
|---|---|
| `=` | starts at the base, bit for bit |
| `≈` | starts at the base within rounding (two terms that cancel) |
| `≠` | starts elsewhere: at what a written prompt makes of the base, or near it (an adapter's small random numbers) |
| `M` | can be merged: the same logits from plain matrices (a quantized base is dequantized for it) |
| `–` | changes no matrix, or is a model already: nothing to merge |
| refused | by an error that says why: rounded weights cannot train in place, or there are no biases (TrainingError); \
two types of adapter are not saved as one (OutputError, SettingsError) |

fp32 and bf16 are dense bases, whose activations run in that type; int8 and nf4 are quantized, with activations in fp32.
edited is an fp32 base that carries a frozen low-rank edit already, and is saved as one adapter with it. What trains is
float32 everywhere. The models are small and random: llama and gpt2 decoders, bert an encoder with its
masked-language head, t5 an encoder-decoder.

| method | model | numbers that train | fp32 | bf16 | int8 | nf4 | edited |
|---|---|---|---|---|---|---|---|
"""

ZEROS = """## Over a base that was pruned or edited

A base whose matrices have zeros (half of each row), or into whose matrices a change of rank one was folded, is a dense
model like any other: every method starts on it, trains, is saved and merges as on fp32 above. But no method knows of
the zeros. What becomes of them in the merged model (where nothing is merged: in the matrices of the base) after one
step, in gpt2:

| method | zeros |
|---|---|
"""


def write() -> None:
    """docs/composition.md from the cells as they are."""
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        bases = {
            (family, base): make_base(family, base, Path(folder, f"{family}-{base}"))
            for family in FAMILIES
            for base in BASES
        }
        for name, method in METHODS.items():
            for family in FAMILIES:
                place = Path(folder, "place")
                cells, counts = [], set()
                for base in BASES:
                    place.mkdir()
                    cell, count = examine(method, bases[family, base], base, place)
                    cells.append(cell)
                    counts |= {count} - {0}
                    shutil.rmtree(place)
                assert len(counts) < 2, (name, family, counts)
                trained = f"{counts.pop():,}" if counts else "0"
                lines.append(f"| `{name}` | {family} | {trained} | {' | '.join(cells)} |\n")
                print(lines[-1], end="", flush=True)
        counter = itertools.count()

        def fresh() -> Path:
            made = Path(folder, f"classifier-{next(counter)}")
            made.mkdir()
            return made

        classifiers = importlib.import_module("tests.contract.test_classifier_composition")  # which imports this file
        theirs = classifiers.rows(lambda family, base: bases[family, base], fresh)
    names = "".join(f"| `{name}` | {method.what} |\n" for name, method in METHODS.items())
    legend = f"| method | |\n|---|---|\n{names}"
    text = f"{TOP}{''.join(lines)}\n{ZEROS}{''.join(fates())}\n{legend}\n{theirs}"
    DOCUMENT.write_text(text, encoding="utf-8")


def fates() -> list[str]:
    """The rows of the second table."""
    with tempfile.TemporaryDirectory() as folder:
        base = make_base("gpt2", "pruned", Path(folder, "pruned"))
        before, rows = zeros(bildung.load(base).model), []
        for name, method in METHODS.items():
            place = Path(folder, name)
            place.mkdir()
            examine(method, base, "pruned", place)
            rows.append(f"| `{name}` | {fate(before, place)} |\n")
    return rows


if __name__ == "__main__":
    write()
