"""What an operation that runs models holds: the models, what it keeps, and the fullest moment of its passes.

    look    its settings, its models on paper, and what was put in for settings that nobody gave
    Pass    one run of the models, as the operation makes it: the operation's own functions, called on paper

Nothing is estimated by a formula where the code itself can be run on tensors without numbers (train/ledger.py). That
code asks now and then for a number, such as the likeliest token: on paper every number is 1. The same pass, on the
models with their numbers, is what is timed.
"""

# L tokens

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bildung.app.planning.using import base_of, file_bytes
from bildung.core.verbs import find, verbs
from bildung.look.asked import mask_id_of, with_source
from bildung.look.lenses.lens import ANSWER
from bildung.look.precise import load_precise
from bildung.look.prompt import encode_prompt
from bildung.model import names
from bildung.model.adapter_file import CONFIG as ADAPTER
from bildung.model.config import read_config
from bildung.model.count import on_paper
from bildung.model.safetensors_file import read_tensors
from bildung.model.store import LanguageModel, load, no_tokenizer
from bildung.tokens.tokenizer import Tokenizer
from bildung.train.ledger import Ledger, paper_of, without_numbers
from bildung.train.plan import HOLES

PROMPT = 64  # tokens of a prompt that nobody gave
FORWARD = 10_000_000
"""Bytes of the CPU's kernels where nothing goes back, in float32 (train/plan.py's KERNELS: where something does)."""
PICTURE = 60_000_000  # bytes that matplotlib takes to draw a PNG of usual size
APART = 2**25  # bytes of a block from which on glibc maps it apart, at the latest
LARGE = "large tables"
aten = torch.ops.aten


class AllOnes(Ledger):
    """A ledger in which a number that is asked for is 1, and in which all numbers are alike."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], FakeTensor):
            if func is aten._local_scalar_dense.default:
                return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
            if func is aten._unique2.default:
                return args[0].flatten()[:1], args[0].new_zeros(0, dtype=torch.long), args[0].new_zeros(0)
        return super().__torch_dispatch__(func, types, args, kwargs)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One run of the models. times: how many passes the operation makes; None: only what it finds says so."""

    what: str  # "a patched run of 16 prompts of 15 tokens"
    run: Callable[[list[LanguageModel]], Any]
    times: int | None = 1
    runs: int = 1  # passes that `run` makes
    back: bool = False  # gradients are worked out
    beside: Mapping[str, int] = dataclasses.field(default_factory=dict)  # bytes that are there while it runs


@dataclasses.dataclass
class Look:
    """What a plan's function fills in. given: the settings; assumed: those of them that nobody gave and all need."""

    source: Path
    given: Any
    assumed: frozenset[str] = frozenset()
    length: int = PROMPT  # tokens of a prompt that nobody gave
    lms: list[LanguageModel] = dataclasses.field(default_factory=list)
    parts: dict[str, int] = dataclasses.field(default_factory=dict)  # bytes that are there in every pass
    later: dict[str, int] = dataclasses.field(default_factory=dict)  # bytes that are there when the passes are over
    said: list[str] = dataclasses.field(default_factory=list)  # what stands in for what
    remarks: list[str] = dataclasses.field(default_factory=list)
    loaders: list[Callable[[], LanguageModel]] = dataclasses.field(default_factory=list)
    runs: tuple[str, Path] | None = None  # another operation that it runs, and what that starts from

    def read(self, path: Path, dtype: str | None = None, precise: bool = False) -> LanguageModel:
        """A model on paper, as the operation loads it; its bytes are added to those of the weights."""
        path = path.expanduser()
        lm = paper_model(path, dtype, precise, paper_of(self.lms[0].model) if self.lms else None)
        self.parts["weights"] = self.parts.get("weights", 0) + weight_bytes(path, lm, dtype)
        self.lms.append(lm)
        self.loaders.append(partial(load_precise, path) if precise else partial(load, path, dtype))
        return lm

    def ids(self, lm: LanguageModel, chat: bool = False, limit: int = 512) -> list[int]:
        """The prompt's token ids; where none was given, some."""
        if "prompt" not in self.assumed:
            return encode_prompt(lm, self.given.prompt, chat, limit)
        length = min(self.length, limit, getattr(lm.config, "max_position_embeddings", None) or PROMPT)
        self.say(f"prompt: {length} tokens")
        mask = mask_id_of(lm) if lm.config.kind == "encoder" else None
        return [0] * length if mask is None else [*[0] * (length - 1), mask]

    def say(self, line: str) -> None:
        """What stands in for a setting that was not given."""
        if line not in self.said:
            self.said.append(line)


def told(lm: LanguageModel, ids: Sequence[int]) -> tuple[LanguageModel, list[int]]:
    """(what runs, the tokens it reads): of a model that answers sources, its decoder with an answer of usual length."""
    if not hasattr(lm.model, "given"):
        return lm, list(ids)
    return with_source(lm, ids), [lm.config.decoder_start_token_id] * (1 + ANSWER)


def paper_model(
    path: Path, dtype: str | None = None, precise: bool = False, paper: FakeTensorMode | None = None
) -> LanguageModel:
    """A model as `load` gives it, without numbers. An adapter, a quantized model and a GGUF file are loaded: what lies
    in their files is not in config.json. Raises SettingsError, ModelFileError."""
    directory = path.is_dir() and not (path / ADAPTER).exists()
    config = read_config(base_of(path)) if directory else None
    if config is None or "quantization_config" in config.raw:
        lm = load(path, dtype)
    else:
        tokenizer = no_tokenizer(config) if config.kind == "vision" else Tokenizer.load(path)
        kind = getattr(torch, dtype) if dtype else stored_type(path)
        if (present := getattr(names.family_of(config), "present", None)) is not None:
            config = dataclasses.replace(config, **present(config, dict(read_tensors(path))))
        model = on_paper(config).to(kind).eval()
        lm = LanguageModel(model, tokenizer, model.config, None, path, base=path)
    made = dataclasses.replace(lm, model=without_numbers(lm.model, paper))
    if precise and torch.finfo(made.model.dtype).bits < 32:
        made.model.compute_dtype = torch.float32
    return made


@cache
def own_bytes(module: str, source: Path) -> int:
    """Bytes of a process that has imported a verb's module and a tokenizer, and nothing that plans: such a process is
    started, and asked."""
    code = (
        "import importlib, sys, psutil, bildung.app.cli\n"
        "from pathlib import Path\n"
        "importlib.import_module(sys.argv[1])\n"
        "if Path(sys.argv[2], 'tokenizer.json').exists():\n"
        "    from bildung.tokens.tokenizer import Tokenizer\n"
        "    kept = Tokenizer.load(Path(sys.argv[2]))\n"
        "print(psutil.Process().memory_info().rss)"
    )
    done = subprocess.run([sys.executable, "-c", code, module, source], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def process_bytes(operation: str, source: Path) -> int:
    """Bytes of a process that is about to run an operation on a model."""
    return own_bytes(find(operation, verbs()).load().__name__, base_of(source))


def stored_type(directory: Path) -> torch.dtype:
    """The type of most numbers in a directory's files."""
    counts: dict[torch.dtype, int] = {}
    for _, tensor in read_tensors(directory):
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def weight_bytes(path: Path, lm: LanguageModel, dtype: str | None) -> int:
    """Bytes of a loaded model. What keeps its type is mapped from its file; what changes it is beside the file while
    that is read."""
    if not path.is_dir():
        return path.stat().st_size + sum(one.nbytes for one in lm.model.parameters())
    base = base_of(path)
    stored = file_bytes(base) + (file_bytes(path) if base != path else 0)
    if dtype is None or (stored_type(base) == getattr(torch, dtype)):
        return stored
    return sum(one.nbytes for one in {id(one): one for one in lm.model.parameters()}.values())


def fullest(lms: list[LanguageModel], passes: Sequence[Pass]) -> dict[str, int]:
    """Bytes of what the fullest of the passes makes and keeps, by kind. Blocks that the C library maps apart leave no
    holes (train/plan.py)."""
    best: dict[str, int] = {}
    for one in passes:
        vocabulary = {lm.config.vocab_size for lm in lms if hasattr(lm.config, "vocab_size")}
        ledger = AllOnes(partial(_kind, vocabulary), paper_of(lms[0].model) if lms else None)
        with torch.random.fork_rng(devices=[]), ledger:
            kept = one.run(lms)
        del kept
        found = {name: int(count) for name, count in ledger.fullest.items()}
        found["holes"] = int(HOLES * sum(count for name, count in found.items() if name != LARGE))
        best = max(best, {**one.beside, **found}, key=lambda parts: sum(parts.values()))
    return best


def _kind(vocabulary: set[int], tensor: Tensor) -> str:
    if tensor.untyped_storage().nbytes() >= APART:
        return LARGE
    return "logits" if tensor.ndim > 1 and tensor.shape[-1] in vocabulary else "activations"


def seconds_of(one: Pass, lms: list[LanguageModel], seconds: float) -> float:
    """How long a pass takes on this machine, after one run that warms up."""
    one.run(lms)
    passes, start = 0, time.monotonic()
    while not passes or time.monotonic() - start < seconds:
        one.run(lms)
        passes += 1
    return (time.monotonic() - start) / passes / one.runs
