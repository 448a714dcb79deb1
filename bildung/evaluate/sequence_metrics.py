"""How near a written answer comes to a reference: BLEU, chrF and TER by sacreBLEU, error rates by edit distance.

BLEU of a corpus is not the mean of its sentences' BLEU: n-gram matches are summed over all sentences first. So an item,
what one sentence contributes, is a list of counts; items are added up, and the sums make the score:

    bleu   [length, reference length, matches of 1..4-grams, all 1..4-grams]        0 to 100 (Papineni et al. 2002)
    chrf   [n-grams of the answer, of the reference, common ones] for n = 1..6       0 to 100 (Popović 2015)
    ter    [edits, reference length]                                                0 upwards (Snover et al. 2006)
    wer    (edits, reference length) in words; cer in characters; per in phonemes    0 upwards, as a fraction

Scores of different tokenizations or smoothings cannot be compared; therefore each stands beside its signature (Post
2018, arXiv 1804.08771). A number for a small task says nothing without its baseline: `copy_source` hands the sources in
as answers, which for catalog strings gave BLEU 8.1 where a small model reached 1.1.

The share of words of which anything is wrong, which grapheme-to-phoneme papers call WER, is 1 - exact_match.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from typing import Any, Literal

from bildung.core.errors import DataError

SACREBLEU = ("bleu", "chrf", "ter")
ERROR_RATES = {"wer": "words", "cer": "characters", "per": "phonemes"}  # words and phonemes split at white space
SEQUENCE_METRICS = (*SACREBLEU, *ERROR_RATES)


def sequence_item(name: str, answer: str, references: Sequence[str]) -> tuple[float, ...]:
    """What one answer adds to the corpus' sums. Of several references, sacreBLEU takes matches from all of them (BLEU)
    or the best (chrF); an error rate the one with the lowest rate. Raises DataError without a reference."""
    if not references:
        raise DataError(f"{name}: an answer without a reference cannot be judged; leave it out.")
    if name in SACREBLEU:
        # The counts of a sentence have no public name in sacreBLEU; a test holds their sum against corpus_score.
        counts = _sacrebleu(name)._extract_corpus_statistics([answer], [[one] for one in references])[0]
        return tuple(float(count) for count in counts)
    cut = list if name == "cer" else str.split
    said, expected = cut(answer), [cut(one) for one in references]
    if not all(expected):
        raise DataError(f"{name}: a reference without {ERROR_RATES[name]} was given; a rate divides by their number.")
    edits = [(edit_distance(said, one), len(one)) for one in expected]
    return min(edits, key=lambda pair: (pair[0] / pair[1], pair[0]))


def score_of_sums(name: str, sums: Sequence[float]) -> float:
    """The corpus' score from its added items."""
    if name in SACREBLEU:
        return float(_sacrebleu(name)._compute_score_from_stats(list(sums)).score)
    return float(sums[0] / sums[1])


def signature(name: str, references: int | Literal["var"] = 1) -> str:
    """All that a score depends on besides the texts; to be kept beside it. references: how many an answer has."""
    if name in SACREBLEU:
        made = _sacrebleu(name)
        made.num_refs = -1 if references == "var" else references  # it knows its number after scoring only
        return str(made.get_signature())
    return f"nrefs:{references}|case:mixed|unit:{ERROR_RATES[name]}|refs:best"


def corpus_items(
    name: str, answers: Sequence[str], references: Sequence[str | Sequence[str]]
) -> list[tuple[float, ...]]:
    """Item of each answer. references: one text, or several that are all right, for each answer.

    Raises DataError when there are not as many as answers.
    """
    if len(answers) != len(references):
        raise DataError(f"{name}: {len(answers)} answers and {len(references)} references; one each is needed.")
    several = [[one] if isinstance(one, str) else one for one in references]
    return [sequence_item(name, answer, one) for answer, one in zip(answers, several, strict=True)]


def measure_corpus(name: str, answers: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, Any]:
    """The score as it stands in a card: value, stderr by bootstrap over sentences, n, signature, items."""
    from bildung.evaluate.metrics import as_json

    return as_json(name, corpus_items(name, answers, references)) | {"signature": signature_for(name, references)}


def signature_for(name: str, references: Sequence[str | Sequence[str]]) -> str:
    """The signature of a score over these references."""
    counts = {1 if isinstance(one, str) else len(one) for one in references}
    return signature(name, "var" if len(counts) > 1 else next(iter(counts), 1))


def copy_source(name: str, sources: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, Any]:
    """The baseline of a translation: what an answer that repeats the source is worth."""
    return measure_corpus(name, sources, references)


def by_length(
    name: str,
    answers: Sequence[str],
    references: Sequence[str | Sequence[str]],
    lengths: Sequence[int],
    edges: Sequence[int] = (6, 9),
) -> dict[str, dict[str, Any]]:
    """The score for each range of source lengths: edges (6, 9) make "<=6", "7-9" and ">=10". Empty ranges are left out.

    lengths: of the sources, in whatever unit they have (letters of a word, words of a sentence).
    """
    if list(edges) != sorted(set(edges)) or not edges:
        raise DataError(f"edges = {list(edges)}; rising numbers are needed.")
    if len(lengths) != len(answers):
        raise DataError(f"{len(lengths)} lengths for {len(answers)} answers; one each is needed.")
    starts = [None, *(edge + 1 for edge in edges)]
    found = {}
    for low, high in zip(starts, [*edges, None], strict=True):
        inside = [i for i, n in enumerate(lengths) if (low is None or n >= low) and (high is None or n <= high)]
        label = (
            f"<={high}" if low is None else f">={low}" if high is None else f"{low}-{high}" if low < high else str(low)
        )
        if inside:
            found[label] = measure_corpus(name, [answers[i] for i in inside], [references[i] for i in inside])
    return found


def edit_distance(a: Iterable[Hashable], b: Iterable[Hashable]) -> int:
    """The fewest insertions, deletions and replacements of tokens that make `a` of `b` (Levenshtein 1966)."""
    b = list(b)
    row = list(range(len(b) + 1))  # distance of the part of `a` read so far to each beginning of `b`
    for i, token in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (token != other))
    return row[-1]


@cache
def _sacrebleu(name: str) -> Any:
    import sacrebleu

    kinds = {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF, "ter": sacrebleu.TER}
    return kinds[name]()
