"""The architecture of a model: blocks, shapes, parameters and multiply-adds per part, stores, deltas, a picture.

    bildung show lives/smollm2/base                      from its files
    bildung show config.json --length 2048               from a configuration alone: nothing is allocated
    bildung show lives/smollm2/tuned --picture a.png     an adapter, drawn (.png or .svg)

What is counted, and what is left out, stands in model/count.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.table import Table

from bildung.core.errors import ConfigError, SettingsError
from bildung.core.json_file import read_object
from bildung.core.settings import settings

if TYPE_CHECKING:
    from bildung.model.count import Part

PICTURES = (".png", ".svg", ".pdf")


@settings
class Command:
    source: tyro.conf.Positional[Path]  # a model or adapter directory, a .gguf file, or a config.json alone
    # tokens of the row that is counted; default: 1024, or the model's whole context (of images: their patches)
    length: int | None = None
    source_length: int | None = None  # tokens of an encoder-decoder's source; default: as many
    picture: Path | None = None  # draw it into this file: .png, .svg or .pdf
    sites: bool = False  # list the activation sites too


def command(settings: Command) -> None:
    """`bildung show SOURCE`."""
    from bildung.app.show_picture import draw  # here, not above: `bildung --help` must not wait for torch

    if any(given is not None and given < 1 for given in (settings.length, settings.source_length)):
        raise SettingsError("length and source_length must be at least 1.")
    if settings.picture is not None and settings.picture.suffix not in PICTURES:
        raise SettingsError(f"--picture {settings.picture}: a picture ends in {', '.join(PICTURES)}.")
    shown = look_at(settings.source.expanduser(), settings.length, settings.source_length)
    console = Console(highlight=False)
    console.width = max(console.width, 120)  # rows of a table that is cut are of no use
    for text in heading(shown):
        console.print(text, markup=False, soft_wrap=True)
    console.print(table(shown))
    for text in remarks(shown):
        console.print(text, markup=False, soft_wrap=True)
    if settings.sites:
        for site, shape in shown.model.sites.items():
            console.print(f"  {site:<40} {shape}", markup=False)
    if settings.picture is not None:
        draw(shown, settings.picture)
        console.print(f"drawn into {settings.picture}", markup=False)


@dataclass
class Shown:
    """A model to be shown: with its numbers, or on paper."""

    name: str
    model: Any
    parts: list[Part]
    length: int
    on_paper: bool

    @property
    def config(self) -> Any:
        """Its ModelConfig, or that of another kind of model."""
        return self.model.config


def look_at(source: Path, length: int | None = None, source_length: int | None = None) -> Shown:
    """Load what is there, or build it on paper from a configuration. Raises ModelFileError."""
    import bildung
    from bildung.model.adapter_file import CONFIG
    from bildung.model.config import from_dict, read_config
    from bildung.model.count import count, on_paper

    alone = source.suffix == ".json" or (
        source.is_dir() and not any(source.glob("*.safetensors")) and not (source / CONFIG).exists()
    )
    if not alone:
        model = bildung.load(source).model
    elif source.is_dir():
        model = on_paper(read_config(source))
    else:
        model = on_paper(from_dict(read_object(source, ConfigError)))
    place = source.resolve()
    name = place.parent.name if place.name == "config.json" else place.stem if place.suffix == ".json" else place.name
    if length is None:
        length = min(1024, model.config.max_position_embeddings)
    return Shown(name, model, count(model, length, source_length), length, alone)


# ── in words ────────────────────────────────────────────────────────────────────────────────────────────────────────


def heading(shown: Shown) -> list[str]:
    """What it is, in two or three lines."""
    from bildung.model.count import totals

    config, (parameters, _) = shown.config, totals(shown.parts)
    sizes = [f"{config.num_hidden_layers} layers", f"width {config.hidden_size}"]
    if hasattr(config, "num_attention_heads"):
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        grouped = "" if shared == heads else f" ({shared} key-value head{'s' if shared > 1 else ''})"
        sizes += [
            f"{heads} heads of {config.head_dim}{grouped}",
            f"feed-forward {config.intermediate_size}" if config.mlp else "no feed-forward",
        ]
    if config.kind != "vision":
        sizes.append(f"vocabulary {config.vocab_size:,}")
    lines = [f"{shown.name}: {config.model_type}, {config.kind}, {parameters:,} parameters", "  " + ", ".join(sizes)]
    if hasattr(config, "norm_placement"):
        lines.append("  " + ", ".join(choices(config)))
    return lines


NORMS = {"rms": "RMSNorm", "layer": "LayerNorm", "batch": "BatchNorm"}


def choices(config: Any) -> list[str]:
    """The choices of a Transformer in words."""
    positions = config.positions + (f" up to {config.max_position_embeddings}" if config.positions == "learned" else "")
    if config.positions == "rope":
        stretched = "" if config.rope.kind == "default" else f", {config.rope.kind} × {config.rope.factor:g}"
        positions = f"RoPE (base {config.rope.theta:,.0f}{stretched})"
    windows = Counter(window for window in config.windows if window is not None)
    said = [
        f"{config.norm_placement}-norm {NORMS[config.norm]}",
        f"positions: {positions}",
        f"{'gated ' if config.gated else ''}{config.hidden_act}",
        "bidirectional" if not config.causal else "causal after a prompt read whole" if config.prefix_lm else "causal",
        *(f"{count} of {config.num_hidden_layers} layers see {window} tokens" for window, count in windows.items()),
        *(["attention and feed-forward side by side"] if config.parallel_residual else []),
        *(["q and k normed"] if config.qk_norm else []),
        *(["attention sinks"] if config.attention_sinks else []),
        *([f"scores capped at {config.attention_softcap:g}"] if config.attention_softcap else []),
        *([f"logits capped at {config.logit_softcap:g}"] if config.logit_softcap else []),
    ]
    if config.kind != "vision":
        said.append("unembedding tied to the embedding" if config.tie_word_embeddings else "unembedding of its own")
    return said


def rows(parts: list[Part]) -> list[tuple[str, Part, int]]:
    """(name, part, how often): layers that are alike are one row."""
    grouped: dict[Any, list[Part]] = {}
    for part in parts:
        prefix, dot, rest = part.name.partition("layers.")
        number, _, word = rest.partition(".")
        kind = f"{prefix}layers.N.{word}" if dot and number.isdigit() else part.name
        key = (kind, part.shape, part.parameters, part.delta_parameters, part.multiply_adds)
        grouped.setdefault(key, []).append(part)
    found = []
    for (kind, *_), alike in grouped.items():
        numbers = [int(part.name.partition("layers.")[2].partition(".")[0]) for part in alike] if ".N." in kind else []
        found.append((kind.replace("N", spans(numbers)) if numbers else kind, alike[0], len(alike)))
    return found


def spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def table(shown: Shown) -> Table:
    """The parts, one row each; numbers are of all layers that a row stands for."""
    from bildung.model.count import Part, totals

    parameters, work = totals(shown.parts)
    per = 1 if shown.config.kind == "vision" else shown.length
    made = Table(box=None, padding=(0, 2, 0, 0))
    made.add_column("part", no_wrap=True)
    made.add_column("shape", no_wrap=True)
    deltas = any(part.delta_parameters for part in shown.parts)
    titles = ["parameters", "share", *(["in deltas"] if deltas else [])]
    for title in (*titles, f"multiply-adds per {'image' if per == 1 else 'token'}", "share"):
        made.add_column(title, justify="right", no_wrap=True)
    lines = [(name, part.shape, part, count) for name, part, count in rows(shown.parts)]
    whole = Part("all", "", parameters, sum(part.delta_parameters for part in shown.parts), work)
    for name, shape, part, count in (*lines, ("all", "", whole, 1)):
        own, adds = part.parameters * count, part.multiply_adds * count
        numbers = [f"{own:,}" if own else "", _share(own, parameters)]
        numbers += [f"{part.delta_parameters * count:,}"] if deltas else []
        numbers += [f"{adds / per:,.0f}" if adds else "", _share(adds, work)]
        made.add_row(name, shape, *numbers, style="bold" if name == "all" else None)
    return made


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if part else ""


def remarks(shown: Shown) -> list[str]:
    """Work per token, cache, how the numbers are stored, what was added, where one can look."""
    from bildung.model.count import cache_bytes, totals
    from bildung.model.virtual import virtual_of

    model, config, (_, work) = shown.model, shown.config, totals(shown.parts)
    what = "one image" if config.kind == "vision" else f"{shown.length} tokens in one row"
    said = [f"{what}: {work / 1e9:,.2f} billion multiply-adds forward, three times as many to train"]
    if config.kind in ("decoder", "encoder-decoder"):
        kept = cache_bytes(config, shown.length) / 1e6
        said.append(f"keys and values of {shown.length} tokens: {kept:.1f} MB in bfloat16")
    linears = model.linears()
    if shown.on_paper:
        said.append(f"{len(linears)} matrices, on paper: no weights were read")
    else:
        stores = Counter(_store(linear.base) for linear in linears.values())
        said.append("stored: " + ", ".join(f"{count} matrices {name}" for name, count in stores.items()))
    kinds: dict[tuple[str, str], list[Any]] = {}
    for linear in linears.values():
        for name, delta in linear.deltas.items():
            kinds.setdefault((name, type(delta).__name__), []).append(delta)
    for (name, kind), deltas in kinds.items():
        ranks = sorted({delta.rank for delta in deltas if hasattr(delta, "rank")})
        rank = f", rank {', '.join(map(str, ranks))}" if ranks else ""
        said.append(f"delta {name!r}: {kind} on {len(deltas)} matrices{rank}")
    if (virtual := virtual_of(model)) is not None:
        said.append(f"{virtual.length} virtual tokens before every text, as a {type(virtual).__name__.lower()}")
    if len(model.attached):
        said.append(f"attached modules at {', '.join(key.replace('/', '.') for key in model.attached)}")
    said.append(f"{len(model.sites)} activation sites (--sites lists them)")
    return said


def _store(base: Any) -> str:
    kind = type(base).__name__
    return str(base.weight.dtype).removeprefix("torch.") if kind == "Dense" else kind
