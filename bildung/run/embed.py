"""Sentence embeddings: one vector for a text, so that texts of like meaning point the same way.

    [CLS] the cat sat [SEP] -> encoder -> a state per token -> pooling -> one vector -> length 1
                                                               mean   of all real tokens' states (most models)
                                                               cls    the first one
                                                               max    the largest value of each feature

Which pooling a model was trained with stands in its directory, in the files of sentence-transformers (Reimers &
Gurevych 2019, arXiv 1908.10084): modules.json lists the steps, 1_Pooling/config.json says how. Where they are missing
it is the mean, brought to length 1 (sentence-transformers would leave the length as it is), so that the product of two
vectors is their cosine.

    bildung embed lives/minilm "A cat." "A kitten." "Tax law."         cosines of every pair
    bildung embed lives/minilm "A cat." --out vectors.safetensors      the vectors themselves
"""

# B texts, L tokens, D features

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from bildung.core.errors import ConfigError, DataError, OutputError
from bildung.core.settings import settings as settings_class
from bildung.tokens.frames import Framed, encode_sentence, frame_of

if TYPE_CHECKING:
    from bildung.model.store import LanguageModel

Pooling = Literal["mean", "cls", "max"]
POOLINGS: dict[str, Pooling] = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}


@settings_class
class Command:
    """Vectors of texts, and how alike they are."""

    directory: tyro.conf.Positional[Path]  # the model
    texts: tyro.conf.Positional[tuple[str, ...]]  # what to embed
    pooling: Pooling | None = None  # how states become one vector; default: as the model's directory says, or mean
    out: Path | None = None  # a .safetensors file for the vectors: one row of `embeddings` per text


@dataclass(frozen=True)
class Recipe:
    """How a directory makes vectors. max_length: tokens with the special ones; None = what the model can take."""

    pooling: Pooling = "mean"
    normalize: bool = True
    max_length: int | None = None


def embed(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    pooling: Pooling | None = None,
    normalize: bool | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Vectors BD, float32, on the CPU. Texts beyond the recipe's max_length are cut at their end, as the peers do.

    pooling, normalize: default: as the model's directory says (see `recipe`). Raises DataError without texts or for a
    model that is no encoder.
    """
    if lm.config.kind != "encoder":
        raise DataError(f"a {lm.config.model_type} is of kind {lm.config.kind!r}; sentence embeddings need an encoder.")
    if not texts:
        raise DataError("there is no text to embed.")
    how = recipe(lm.base) if lm.base is not None else Recipe()
    how = replace(how, pooling=pooling or how.pooling, normalize=how.normalize if normalize is None else normalize)
    longest = min(how.max_length or lm.config.max_position_embeddings, lm.config.max_position_embeddings)
    frame = frame_of(lm.tokenizer)
    framed = [encode_sentence(lm.tokenizer, frame, text, None, longest) for text in texts]
    order = sorted(range(len(texts)), key=lambda index: len(framed[index].tokens))  # little padding
    vectors_BD = torch.empty(len(texts), lm.config.hidden_size)
    for rows in _slices(order, batch_size):
        vectors_BD[rows] = _vectors(lm.model, [framed[row] for row in rows], how.pooling)
    return F.normalize(vectors_BD, dim=-1) if how.normalize else vectors_BD


def _slices(order: list[int], size: int) -> Iterator[list[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def _vectors(model: Any, framed: Sequence[Framed], pooling: Pooling) -> Tensor:
    longest = max(len(one.tokens) for one in framed)
    tokens_BL = torch.zeros(len(framed), longest, dtype=torch.int64)
    keep_BL = torch.zeros(len(framed), longest, dtype=torch.bool)
    for row, one in enumerate(framed):
        tokens_BL[row, : len(one.tokens)] = torch.tensor(one.tokens)
        keep_BL[row, : len(one.tokens)] = True
    was_training, device = model.training, model.device
    model.eval()
    with torch.no_grad():
        h_BLD = model.hidden(tokens_BL.to(device), keep_BL=keep_BL.to(device)).float().cpu()
    model.train(was_training)
    return pool(h_BLD, keep_BL, pooling)


def pool(h_BLD: Tensor, keep_BL: Tensor, pooling: Pooling) -> Tensor:
    """One vector BD of the states of the real tokens, special ones included."""
    if pooling == "cls":
        return h_BLD[torch.arange(len(h_BLD)), keep_BL.int().argmax(1)]
    if pooling == "max":
        return h_BLD.masked_fill(~keep_BL[..., None], float("-inf")).amax(1)
    kept_BLD = h_BLD * keep_BL[..., None]
    return kept_BLD.sum(1) / keep_BL.sum(1, keepdim=True)


def recipe(directory: Path) -> Recipe:
    """What modules.json, 1_Pooling/config.json and sentence_bert_config.json say. Raises ConfigError for a step or a
    pooling that is not built here."""
    limit = _read(directory / "sentence_bert_config.json").get("max_seq_length")
    if limit is not None and (not isinstance(limit, int) or limit < 3):
        raise ConfigError(f"{directory / 'sentence_bert_config.json'}: max_seq_length = {limit!r}.")
    if not (directory / "modules.json").exists():
        return Recipe(max_length=limit)
    pooling, normalize = None, False
    for module in _read(directory / "modules.json", list):
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling(directory / Path(str(module.get("path"))).name / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ConfigError(f"{directory / 'modules.json'}: step {kind!r} is not known; known: Pooling, Normalize.")
    return Recipe(pooling or "mean", normalize, limit)


def _pooling(path: Path) -> Pooling:
    given = _read(path)
    chosen = [key.removeprefix("pooling_mode_") for key, on in given.items() if key.startswith("pooling_mode_") and on]
    if isinstance(mode := given.get("pooling_mode"), str):  # newer files name it in one key
        chosen = [{"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}.get(mode, mode)]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise ConfigError(f"{path}: pooling {', '.join(chosen) or 'none'}; one of {', '.join(POOLINGS)} is needed.")
    return POOLINGS[chosen[0]]


def _read(path: Path, kind: type = dict) -> Any:
    """The JSON in `path`, an object or a list of objects; an empty one where there is no file."""
    if not path.exists():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    items = value if isinstance(value, list) else []
    if not isinstance(value, kind) or not all(isinstance(one, dict) for one in items):
        raise ConfigError(f"{path} is not what sentence-transformers writes: a JSON {kind.__name__} is needed.")
    return value


def command(settings: Command) -> None:
    """`bildung embed MODEL TEXT...`: the cosines of every pair; with --out, the vectors in a file."""
    from rich.console import Console
    from rich.table import Table
    from safetensors.torch import save_file

    from bildung.model.store import load

    vectors_BD = embed(load(settings.directory), settings.texts, pooling=settings.pooling)
    if settings.out is not None:
        if settings.out.exists():
            raise OutputError(f"{settings.out} is there already; give a new place.")
        save_file({"embeddings": vectors_BD.contiguous()}, settings.out)
    unit_BD = F.normalize(vectors_BD, dim=-1)
    table = Table("", *(str(number + 1) for number in range(len(unit_BD))), "text", box=None)
    for number, (row, text) in enumerate(zip((unit_BD @ unit_BD.T).tolist(), settings.texts, strict=True)):
        table.add_row(str(number + 1), *(f"{cosine:.3f}" for cosine in row), text[:60])
    Console(highlight=False).print(table)
    where = "" if settings.out is None else f"; written to {settings.out}"
    print(f"cosines of {len(vectors_BD)} vectors of {vectors_BD.shape[1]} numbers{where}")
