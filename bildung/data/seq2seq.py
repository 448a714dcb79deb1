"""Pairs of a source and a target: translation, letters to phonemes, a damaged text and what was lost.

    {"source": "cat", "target": "K AE T"}

    source   c a t </s>                 read whole by the encoder; a mask says which tokens are padding
    target   <start> K AE T </s>        read by the decoder, each token predicted from those before it (teacher forcing)

What stands around a source and a target is what the tokenizer's post-processor puts around one text (T5 and Marian a
</s>, BART <s> ... </s>); without one, a </s> at the end. The target then begins with the model's
`decoder_start_token_id` and always ends with EOS: a model that never sees the end does not stop.
"""

# B rows, S source length, L target length

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bildung.core.errors import DataError, TokenizerError
from bildung.data.batches import Batch, pad
from bildung.data.examples import NO_TARGET, Example, Examples
from bildung.data.rows import Row, Rows, Unusable
from bildung.data.sources import rows
from bildung.data.text import conversation
from bildung.tokens.frames import Frame, frame_of
from bildung.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class SourceTarget:
    """Two texts, the second made of the first."""

    source: str
    target: str


@dataclass(frozen=True)
class Seq2SeqExample:
    """source: token ids, with what stands around them. target: the start token (no target of the loss), then tokens."""

    source: list[int]
    target: Example

    def __post_init__(self) -> None:
        if not self.source:
            raise DataError("an example with an empty source; the encoder has nothing to read")

    def __len__(self) -> int:
        """The longer of the two: what a row of a batch takes."""
        return max(len(self.source), len(self.target))

    @property
    def num_targets(self) -> int:
        return self.target.num_targets


@dataclass(frozen=True)
class Seq2SeqBatch:
    """source_BS int64; source_keep_BS bool, True = real token; target: a Batch of the decoder's tokens."""

    source_BS: Tensor
    source_keep_BS: Tensor
    target: Batch

    def to(self, device: torch.device | str) -> Seq2SeqBatch:
        """The same batch on another device."""
        return Seq2SeqBatch(self.source_BS.to(device), self.source_keep_BS.to(device), self.target.to(device))

    @property
    def num_tokens(self) -> int:
        """Real tokens, of sources and targets."""
        return int(self.source_keep_BS.sum()) + self.target.num_tokens

    @property
    def num_targets(self) -> int:
        return self.target.num_targets


def pairs(source: str, *, split: str | None = None, limit: int | None = None) -> Rows[SourceTarget]:
    """The rows of a data source with `source` and `target`. Raises DataError when no row has both."""
    return rows(source, split=split).then(pair, limit)


def answered(source: str, *, limit: int | None = None) -> Rows[SourceTarget]:
    """The same, and conversations (see text.py): the last answer, and, line by line, what was said before it."""
    return rows(source).then(_answered, limit)


def _answered(row: Row) -> SourceTarget:
    if row.get("source") is not None or row.get("target") is not None:
        return pair(row)
    messages = conversation(row)
    return SourceTarget("\n".join(message["content"] for message in messages[:-1]), messages[-1]["content"])


def joined(source: str, target: str, key: str, *, limit: int | None = None, column: str = "text") -> Rows[SourceTarget]:
    """Rows of two data sources that agree in the column `key`, as pairs of their texts: verses of two Bibles.

    A row whose key the other source lacks is counted as dropped. Raises DataError when a key stands twice among the
    targets.
    """
    targets: dict[str, str] = {}
    for row in rows(target).then(_keyed(key, column)):
        if row[0] in targets:
            raise DataError(f"{target}: {key} = {row[0]!r} stands in two rows; a key must name one target.")
        targets[row[0]] = row[1]

    def match(row: Row) -> SourceTarget:
        name, text = _keyed(key, column)(row)
        if name not in targets:
            raise Unusable(f"its {key} is not in {target}")
        return SourceTarget(text, targets[name])

    return rows(source).then(match, limit)


def _keyed(key: str, column: str) -> Callable[[Row], tuple[str, str]]:
    def read(row: Row) -> tuple[str, str]:
        text = row.get(column)
        if row.get(key) is None:
            raise Unusable(f"no {key}")
        if not isinstance(text, str) or not text.strip():
            raise Unusable(f"no {column}")
        return str(row[key]), text

    return read


def pair(row: Row) -> SourceTarget:
    """One row's two texts. Raises Unusable."""
    for name in ("source", "target"):
        if not isinstance(row.get(name), str):
            raise Unusable(f"no {name}" if row.get(name) is None else f"{name} is not a string")
        if not row[name].strip():
            raise Unusable(f"empty {name}")
    return SourceTarget(row["source"], row["target"])


def text_frame(tokenizer: Tokenizer) -> Frame:
    """What stands before and after one text. Raises TokenizerError for a tokenizer without EOS."""
    if tokenizer.eos_id is None:
        raise TokenizerError("this tokenizer names no eos_token; a source and a target need one at their end.")
    try:
        frame = frame_of(tokenizer)
    except TokenizerError:  # no post-processor that adds anything, no [CLS] and [SEP]
        frame = Frame((tokenizer.bos_id,) if tokenizer.uses_bos and tokenizer.bos_id is not None else (), (), (), 0)
    after = frame.after if tokenizer.eos_id in frame.after else (*frame.after, tokenizer.eos_id)
    return Frame(frame.before, frame.between, after, frame.second)


def pieces(
    tokenizer: Tokenizer, documents: Iterable[str], length: int, examples: Examples[Seq2SeqExample]
) -> Iterator[list[int]]:
    """Texts in pieces of at most `length` tokens. A last one of a single token has nothing to keep beside what it would
    lose: it is counted as dropped from `examples`."""
    for text in documents:
        tokens = tokenizer.encode(text, bos=False)
        for at in range(0, len(tokens), length):
            piece = tokens[at : at + length]
            if len(piece) < 2:
                examples.dropped[NO_TARGET] += 1
            else:
                yield piece


def encode_source(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a source, as the encoder is trained on them. Raises DataError for an empty text."""
    ids = tokenizer.encode(text, bos=False)
    if not ids:
        raise DataError("the source is empty; an encoder-decoder needs a text to read.")
    return text_frame(tokenizer).put(ids).tokens


def seq2seq_examples(
    tokenizer: Tokenizer, texts: Iterable[SourceTarget], start: int, max_length: int, max_target: int | None = None
) -> Examples[Seq2SeqExample]:
    """Pairs of texts as examples. start: the model's decoder_start_token_id.

    A source longer than `max_length` or a target longer than `max_target` (default: the same), the tokens around them
    counted, is cut at its end, which is counted as truncated; a cut target has no EOS, as it does not end there.
    """
    max_target = max_length if max_target is None else max_target
    frame = text_frame(tokenizer)
    examples: Examples[Seq2SeqExample] = Examples()
    for one in texts:
        source, target = (tokenizer.encode(text, bos=False) for text in (one.source, one.target))
        made, cut = framed(frame, source, target, start, max_length, max_target)
        examples.truncated += cut
        examples.append(made)
    return examples.close(texts, max_length)


def framed(
    frame: Frame, source: Sequence[int], target: Sequence[int], start: int, max_length: int, max_target: int
) -> tuple[Seq2SeqExample, bool]:
    """The example of two bare token sequences, and whether one of them was cut."""
    room = max_length - frame.size(pair=False)
    if room < 1 or max_target < 2:
        raise DataError(
            f"max_length = {max_length} and {max_target} for the target leave no room for text beside the special "
            f"tokens; raise them."
        )
    read = frame.put(source[:room]).tokens
    said = frame.put(target).tokens
    said = said if said[0] == start else [start, *said]  # BOS may be both the start token and part of the frame
    kept = said[:max_target]
    example = Seq2SeqExample(read, Example(kept, [False] + [True] * (len(kept) - 1)))
    return example, len(source) > room or len(said) > max_target


def pad_seq2seq(examples: Sequence[Seq2SeqExample], pad_id: int | None, multiple: int = 8) -> Seq2SeqBatch:
    """One example per row; sources and targets padded on the right, each to the longest, up to a multiple."""
    sources = pad([Example(one.source, [False] * len(one.source)) for one in examples], pad_id, multiple)
    return Seq2SeqBatch(sources.tokens_BL, sources.keep_BL, pad([one.target for one in examples], pad_id, multiple))
