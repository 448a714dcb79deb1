"""Scores of written answers: sacreBLEU's own, error rates by hand, their standard errors, and tasks that use them."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from pathlib import Path

import pytest
import sacrebleu

from bildung.core.errors import DataError
from bildung.evaluate.card import CardSettings, card
from bildung.evaluate.metrics import METRICS, estimate, paired_difference
from bildung.evaluate.sequence_metrics import (
    SEQUENCE_METRICS,
    by_length,
    copy_source,
    corpus_items,
    edit_distance,
    measure_corpus,
)
from bildung.evaluate.tasks import load_task, measure_answer
from bildung.model.store import LanguageModel

WORDS = "the a cat dog sat on mat ran to of green house and then slept".split()
draw = random.Random(0)
REFERENCES = [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(60)]
OTHERS = [" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(60)]
NEAR = [" ".join(w if draw.random() < 0.8 else draw.choice(WORDS) for w in one.split()) for one in REFERENCES]
FAR = [" ".join(w if draw.random() < 0.7 else draw.choice(WORDS) for w in one.split()) for one in NEAR]


@pytest.mark.parametrize("name", ["bleu", "chrf", "ter"])
@pytest.mark.parametrize("several", [False, True])
def test_scores_and_signatures_are_sacrebleus(name: str, several: bool) -> None:
    peer = {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF, "ter": sacrebleu.TER}[name]()
    expected = peer.corpus_score(NEAR, [REFERENCES, OTHERS] if several else [REFERENCES])
    references = list(zip(REFERENCES, OTHERS, strict=True)) if several else REFERENCES
    made = measure_corpus(name, NEAR, references)
    assert made["value"] == pytest.approx(expected.score) and 0 < made["value"] != 100
    assert made["signature"] == str(peer.get_signature())
    assert f"nrefs:{2 if several else 1}|" in made["signature"] and sacrebleu.__version__ in made["signature"]


def test_references_of_different_number_say_so() -> None:
    made = measure_corpus("bleu", NEAR[:2], [[REFERENCES[0]], [REFERENCES[1], OTHERS[1]]])
    assert made["signature"].startswith("nrefs:var|")


def test_edit_distances_by_hand() -> None:
    cases = {("kitten", "sitting"): 3, ("", "abc"): 3, ("abc", ""): 3, ("abc", "abc"): 0, ("ab", "ba"): 2, ("", ""): 0}
    for (a, b), distance in cases.items():
        assert edit_distance(a, b) == edit_distance(b, a) == distance
    assert edit_distance(["AH0", "B"], ["AH", "B"]) == 1, "tokens, not characters"


def test_edit_distance_is_the_fewest_edits() -> None:
    """Against all ways to delete from both sides: for short words, distance by brute force over common subsequences."""
    words = ["".join(w) for n in range(4) for w in itertools.product("ab", repeat=n)]
    reached = {(w, w): 0 for w in words}
    for _ in range(3):  # one edit at a time, as a walk over words of up to 3 letters
        for (a, b), steps in list(reached.items()):
            near = {b[:i] + b[i + 1 :] for i in range(len(b))}
            near |= {b[:i] + c + b[i + j :] for i in range(len(b) + 1) for c in "ab" for j in (0, 1)}
            for c in near & set(words):
                reached[a, c] = min(reached.get((a, c), 9), steps + 1)
    for (a, b), steps in reached.items():
        assert edit_distance(a, b) == steps


def test_error_rates_are_of_the_corpus_and_take_the_best_reference() -> None:
    answers = ["a b c", "x", "a b"]
    references = ["a b d", "x y z w", ["q r s t", "a c"]]
    assert corpus_items("wer", answers, references) == [(1, 3), (3, 4), (1, 2)]
    assert measure_corpus("wer", answers, references)["value"] == pytest.approx(5 / 9), "sums, not the mean of rates"
    assert corpus_items("per", ["K AE T"], ["K AE1 T S"]) == [(2, 4)]
    assert corpus_items("cer", ["cat"], ["cart"]) == [(1, 4)]
    assert measure_corpus("per", answers, references)["signature"] == "nrefs:var|case:mixed|unit:phonemes|refs:best"


def test_which_way_is_better() -> None:
    assert {name for name in SEQUENCE_METRICS if METRICS[name].higher_is_better} == {"bleu", "chrf"}


@pytest.mark.parametrize("name", SEQUENCE_METRICS)
def test_the_standard_error_is_the_spread_over_corpora(name: str) -> None:
    """The bootstrap from 60 sentences against the spread of scores over fresh corpora of 60 sentences."""
    items = corpus_items(name, FAR, REFERENCES)
    made = estimate(name, items)
    assert made == estimate(name, items), "seeded"
    fresh = []
    for seed in range(40):
        other = random.Random(seed)
        texts = [" ".join(other.choices(WORDS, k=other.randint(4, 12))) for _ in range(60)]
        said = [" ".join(w if other.random() < 0.56 else other.choice(WORDS) for w in one.split()) for one in texts]
        fresh.append(estimate_value(name, said, texts))
    assert made.stderr == pytest.approx(statistics.stdev(fresh), rel=0.5)
    assert estimate(name, items[:1]).stderr is None


def estimate_value(name: str, answers: list[str], references: list[str]) -> float:
    from bildung.evaluate.sequence_metrics import score_of_sums

    sums = [sum(column) for column in zip(*corpus_items(name, answers, references), strict=True)]
    return score_of_sums(name, sums)


def test_a_paired_difference_is_surer_than_two_scores() -> None:
    near, far = corpus_items("bleu", NEAR, REFERENCES), corpus_items("bleu", FAR, REFERENCES)
    made = paired_difference("bleu", near, far)
    assert made.value == pytest.approx(estimate("bleu", far).value - estimate("bleu", near).value) and made.value < 0
    alone = (estimate("bleu", near).stderr ** 2 + estimate("bleu", far).stderr ** 2) ** 0.5  # type: ignore[operator]
    assert 0 < made.stderr < alone  # type: ignore[operator]
    assert paired_difference("bleu", near, near).stderr == 0


def test_by_length_of_the_source() -> None:
    lengths = [3, 6, 7, 9, 10, 14]
    made = by_length("wer", ["a"] * 6, ["a", "b", "a", "a", "b", "b"], lengths)
    assert {name: (one["value"], one["n"]) for name, one in made.items()} == {
        "<=6": (0.5, 2),
        "7-9": (0.0, 2),
        ">=10": (1.0, 2),
    }
    assert list(by_length("wer", ["a"], ["a"], [8], edges=(7, 8))) == ["8"]
    with pytest.raises(DataError, match="rising"):
        by_length("wer", ["a"], ["a"], [8], edges=(8, 7))


def test_copying_the_source_is_a_baseline() -> None:
    assert copy_source("bleu", REFERENCES, REFERENCES)["value"] == pytest.approx(100)
    assert copy_source("wer", ["die Katze"], ["the cat"])["value"] == 1.0


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(DataError, match="2 answers and 1 references"):
        corpus_items("bleu", ["a", "b"], ["a"])
    with pytest.raises(DataError, match="without a reference"):
        corpus_items("chrf", ["a"], [[]])
    with pytest.raises(DataError, match="reference without words"):
        corpus_items("wer", ["a"], [" "])


def write_task(folder: Path, metrics: str) -> Path:
    rows = [{"q": "cat", "a": "K AE T"}, {"q": "dog", "a": ["D AO G", "D AA G"]}]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = folder / "words.yaml"
    task.write_text(
        "task: words\ndataset_path: json\ndataset_kwargs: {data_files: {test: words.jsonl}}\ntest_split: test\n"
        f"output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\nmetric_list: {metrics}\n"
    )
    return task


def test_a_generation_task_measures_them(tmp_path: Path) -> None:
    path = write_task(tmp_path, "[{metric: per}, {metric: bleu, aggregation: bleu, higher_is_better: true}]")
    task = load_task(str(path))
    items = [measure_answer(task, q, said) for q, said in zip(task.questions, ["K AE T", "D AA K"], strict=True)]
    assert [one["per"] for one in items] == [(0, 3), (1, 3)] and len(items[0]["bleu"]) == 10  # type: ignore[arg-type]
    with pytest.raises(DataError, match="belong to exact_match"):
        load_task(str(write_task(tmp_path, "[{metric: chrf, ignore_case: true}]")))
    with pytest.raises(DataError, match="higher_is_better"):
        load_task(str(write_task(tmp_path, "[{metric: ter, higher_is_better: true}]")))


def test_a_card_holds_the_score_with_its_signature(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    path = write_task(tmp_path, "[{metric: chrf}, {metric: exact_match}]")
    path.write_text(path.read_text() + "generation_kwargs: {max_gen_toks: 4}\n")
    made = card(tiny_lm, CardSettings(tasks=(str(path),), dtype="float32", sample_prompts=()))["tasks"]
    assert made["words"]["signature"].startswith("nrefs:var|case:mixed") and len(made["words"]["items"][0]) == 18
    assert "signature" not in made["words/exact_match"]
