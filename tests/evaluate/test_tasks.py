"""Task files and what becomes of them: lm-eval's form, its numbers, few-shot examples, and hostile files."""

from __future__ import annotations

import datetime
import json
import textwrap
from collections import Counter

import pytest

from bildung.core.errors import DataError, SettingsError
from bildung.data.sources import rows
from bildung.evaluate import task_file
from bildung.evaluate.card import TASKS, CardSettings, card
from bildung.evaluate.likelihood import Score
from bildung.evaluate.tasks import data_of, encode, load_task, measure, measure_answer

ROWS = [{"question": f"Is {n} even?", "label": (n + 1) % 2, "n": n} for n in range(12)]
CHOICE = """
    task: parity
    dataset_path: json
    dataset_kwargs: {data_files: {test: rows.jsonl, train: shots.jsonl}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "Q: {{question}}\\nA:"
    doc_to_choice: ["no", "yes"]
    doc_to_target: label
    metadata: {version: 2}
"""


@pytest.fixture
def write(tmp_path):
    def dump(name, lines):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    dump("rows.jsonl", ROWS)
    dump("shots.jsonl", [{"question": "Is 100 even?", "label": 1}])

    def write(text, **replaced):
        text = textwrap.dedent(text)
        for old, new in replaced.values():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "task.yaml"
        path.write_text(text)
        return str(path)

    return write


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_multiple_choice_question(write):
    task = load_task(write(CHOICE))
    assert (task.name, task.version, len(task.questions)) == ("parity", 2, 12)
    question = task.questions[3]
    assert (question.context, question.answers, question.right) == ("Q: Is 3 even?\nA:", ("no", "yes"), (0,))


@pytest.mark.parametrize(
    ("target", "right"),
    [("label", (0,)), ('"{{label}}"', (0,)), ("\"{{'yes' if label else 'no'}}\"", (0,)), ("1", (1,))],
)
def test_targets_are_numbers_texts_or_columns(write, target, right):
    path = write(CHOICE, t=("doc_to_target: label", f"doc_to_target: {target}"))
    assert load_task(path).questions[3].right == right


def test_choices_may_be_a_column_or_a_rendered_list(write):
    path = write(CHOICE, c=('["no", "yes"]', "\"{{['not ' ~ n, n]}}\""))
    assert load_task(path).questions[3].answers == ("not 3", "3")


def test_few_shot_examples_as_lm_eval_writes_them(write):
    """With one example to draw from, the context is lm-eval 0.4.13's, character by character."""
    path = write(CHOICE, f=("test_split: test", "test_split: test\nfewshot_split: train\nnum_fewshot: 1"))
    assert load_task(path).questions[0].context == "Q: Is 100 even?\nA: yes\n\nQ: Is 0 even?\nA:"


def test_few_shot_examples_never_hold_the_question_and_depend_on_the_seed_alone(write):
    path = write(CHOICE, f=("test_split: test", "test_split: test\nnum_fewshot: 11"))
    for question in load_task(path).questions:
        asked = question.context.split("\n\n")
        assert len(asked) == 12 and len({one.split("\n")[0] for one in asked}) == 12
    path = write(CHOICE, f=("test_split: test", "test_split: test\nnum_fewshot: 2"))
    all_of_them = {q.context.split("\n\n")[-1]: q for q in load_task(path).questions}
    for question in load_task(path, limit=4).questions:
        assert all_of_them[question.context.split("\n\n")[-1]] == question
    assert load_task(path).hash == load_task(path).hash != load_task(path, seed=1).hash
    too_many = write(CHOICE, f=("test_split: test", "test_split: test\nnum_fewshot: 12"))
    with pytest.raises(DataError, match="num_fewshot = 12 and only 11 other"):
        load_task(too_many)


def test_a_limit_draws_at_random_by_the_seed(write):
    path = write(CHOICE)
    some, again, others = (load_task(path, limit=5, seed=s) for s in (0, 0, 1))
    assert len(some.questions) == 5 and some.questions == again.questions != others.questions
    assert some.questions != load_task(path).questions[:5]
    with pytest.raises(DataError, match="limit = 0"):
        load_task(path, limit=0)
    assert len(load_task(write(CHOICE, v=("version: 2", "version: 2, limit: 3"))).questions) == 3


def test_bildung_sources_and_hub_names():
    file = task_file.TaskFile(task="t", dataset_path="allenai/ai2_arc", dataset_name="ARC-Easy")
    assert task_file.sources_of(task_file.PACKAGED, file, "test") == [("hub:allenai/ai2_arc:ARC-Easy", "test")]
    file = task_file.TaskFile(task="t", dataset_path="nursery:rt/test")
    assert task_file.sources_of(task_file.PACKAGED, file, None) == [("nursery:rt/test", None)]


def test_data_of_names_everything_read(write):
    path = write(CHOICE, f=("test_split: test", "test_split: test\nfewshot_split: train\nnum_fewshot: 1"))
    before = data_of(path)
    assert len(before) == 3 and {key.rsplit("/")[-1] for key in before} == {"task.yaml", "rows.jsonl", "shots.jsonl"}
    write(CHOICE)
    assert data_of(path)["task.yaml"] != before["task.yaml"]


def test_packaged_data_go_by_their_own_name():
    assert set(data_of("capitals")) == {"capitals.yaml", "capitals.jsonl"}


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("output_type:", "outptu_type:", "unknown setting 'outptu_type'; did you mean 'output_type'"),
        ("doc_to_target: label", "doc_to_target: labell", "no column 'labell'. did you mean 'label'"),
        ('"Q: {{question}}\\nA:"', '"Q: {{quest}}"', "'quest' is undefined; the columns are question, label, n"),
        ('"Q: {{question}}\\nA:"', '"Q: {{question"', "the template .* fails"),
        ("doc_to_target: label", 'doc_to_target: "maybe"', "no column 'maybe'"),
        ("doc_to_target: label", 'doc_to_target: "{{n}}"', "gives 2; there are choices 0 to 1"),
        ('["no", "yes"]', '"{{question}}"', "which is not a list"),
        ('["no", "yes"]', '["no"]', "at least two"),
        ("metadata:", "metric_list: [{metric: accc}]\nmetadata:", "no metric 'accc'. did you mean 'acc'"),
        ("metadata:", "metric_list: [{metric: perplexity}]\nmetadata:", "multiple_choice does not measure"),
        ("metadata:", "metric_list: [{metric: acc, higher_is_better: false}]\nmetadata:", "higher_is_better"),
        ('doc_to_choice: ["no", "yes"]\n', "", "multiple_choice needs doc_to_choice"),
        ("test_split: test", "test_split: tset", "no data_files for split 'tset'. did you mean 'test'"),
        ("rows.jsonl", "gone.jsonl", "no data called .*gone.jsonl"),
        ("data_files", "trust_remote_code: true, data_files", "only data_files is known"),
        ("multiple_choice", "multiple_choices", "output_type"),
    ],
)
def test_mistakes_name_the_way_out(write, old, new, message):
    with pytest.raises((DataError, SettingsError), match=message):
        load_task(write(CHOICE, r=(old, new)))


def test_yaml_reads_a_bare_yes_as_true(write):
    with pytest.raises(DataError, match="write them in quotes"):
        load_task(write(CHOICE, c=('["no", "yes"]', "[no, yes]")))


@pytest.mark.parametrize("tag", ["!function utils.doc_to_text", "!!python/object/apply:os.system [true]"])
def test_code_in_a_task_file_is_refused(write, tag):
    with pytest.raises(DataError, match="A task file is data"):
        load_task(write(CHOICE, f=('"Q: {{question}}\\nA:"', tag)))


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ question.__init__.__globals__ }}", "{{ range(10000000)|list }}", "{{ 1 // 0 }}"],
)
def test_templates_stay_in_their_sandbox(write, template):
    with pytest.raises(DataError, match=r"fails|undefined"):
        load_task(write(CHOICE, t=('"Q: {{question}}\\nA:"', json.dumps(template))))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "more than 1 s of processor",
        ),
        ("{{ 'x' * 4000000000 }}", "memory"),
    ],
)
def test_a_template_that_does_not_end_is_stopped(write, template, reason):
    with pytest.raises(DataError, match=reason):
        load_task(write(CHOICE, t=('"Q: {{question}}\\nA:"', json.dumps(template))))
    assert load_task(write(CHOICE)).questions, "the next one is rendered as ever"


def test_a_column_of_dates_is_text():
    row = {"question": "when", "n": datetime.date(2024, 2, 29)}
    assert task_file.rendered("doc_to_text", "{{question}}: {{n}}\n", row) == "when: 2024-02-29\n"


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(DataError, match="did you mean 'capitals'"):
        load_task("captials")


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────


def scored(*logprobs):
    return [Score((logprob,), is_greedy=logprob > -1) for logprob in logprobs]


def test_acc_and_acc_norm_differ_on_long_choices(write):
    task = load_task(write(CHOICE, c=('["no", "yes"]', '["no", "certainly yes"]')))
    question = task.questions[0]  # 0 is even
    # Sums -4 and -6: the short one wins. Per character -2 and -0.46: the long one.
    assert measure(task, question, scored(-4.0, -6.0)) == {"acc": 0.0, "acc_norm": 1.0}


def test_likelihood_targets_follow_without_a_delimiter(write, tiny_lm):
    text = CHOICE.replace("multiple_choice", "loglikelihood").replace('doc_to_choice: ["no", "yes"]', "")
    task = load_task(write(text, t=("doc_to_target: label", 'doc_to_target: " {{n}}"')))
    ([example], is_cut) = encode(task, task.questions[3], tiny_lm.tokenizer, 256)
    assert example.tokens == tiny_lm.tokenizer.encode("Q: Is 3 even?\nA: 3") and not is_cut
    assert measure(task, task.questions[3], scored(-0.5)) == {"perplexity": (0.5, 1), "acc": 1.0}


def test_rolling_counts_tokens_words_and_bytes(write):
    text = "task: t\ndataset_path: json\ndataset_kwargs: {data_files: rows.jsonl}\noutput_type: loglikelihood_rolling\n"
    task = load_task(write(text + 'doc_to_target: "Ünï {{n}}"\n'))
    made = measure(task, task.questions[0], scored(-3.0, -4.0))
    assert (
        made["perplexity"] == (7.0, 2) and made["word_perplexity"] == (7.0, 2) and made["byte_perplexity"] == (7.0, 7)
    )
    assert made["bits_per_byte"] == pytest.approx((7 / 0.693147180559945, 7))


def test_a_question_that_is_too_long_loses_its_beginning(write, tiny_lm):
    task = load_task(write(CHOICE))
    whole, was_cut = encode(task, task.questions[3], tiny_lm.tokenizer, 256)
    cut, is_cut = encode(task, task.questions[3], tiny_lm.tokenizer, 6)
    assert is_cut and not was_cut
    assert [example.tokens for example in cut] == [example.tokens[-7:] for example in whole]
    with pytest.raises(DataError, match="does not fit the context of 1"):
        encode(task, task.questions[3], tiny_lm.tokenizer, 1)


def test_generated_answers(write):
    text = CHOICE.replace("multiple_choice", "generate_until").replace('doc_to_choice: ["no", "yes"]', "")
    lists = write(
        text,
        t=(
            "doc_to_target: label",
            'doc_to_target: "{{question}}"\nmetric_list: [{metric: exact_match, ignore_case: true}]',
        ),
    )
    task = load_task(lists)
    assert measure_answer(task, task.questions[3], "is 3 EVEN?") == {"exact_match": 1.0}
    assert measure_answer(task, task.questions[3], "Is 4 even?") == {"exact_match": 0.0}


# lm-eval 0.4.13, HFLM(dtype float32) on the directory of the fixture `tiny_lm`: all documents of the packaged tasks
# capitals and elements, and of the rolling task below in windows of the model's 256 tokens.
LM_EVAL = {"capitals": 0.24553571428571427, "elements": 0.2457627118644068}
LM_EVAL_ROLLING = {
    "word_perplexity": 95099228482293.88,
    "byte_perplexity": 278.37567739953965,
    "bits_per_byte": 8.120889353447035,
}


def test_numbers_are_those_of_lm_eval(tiny_lm, tmp_path):
    rolling = tmp_path / "prose.yaml"
    texts = [{"text": row["text"][:700]} for row in rows("mini:moby", limit=6)]
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    rolling.write_text(
        "task: rolling\ndataset_path: json\ndataset_kwargs: {data_files: {test: prose.jsonl}}\ntest_split: test\n"
        'output_type: loglikelihood_rolling\ndoc_to_target: "{{text[:600]}}"\n'
    )
    settings = CardSettings(
        tasks=("capitals", "elements", str(rolling)), limit=1000, dtype="float32", sample_prompts=()
    )
    made = {
        entry["metric"] if "rolling" in name else name: entry
        for name, entry in card(tiny_lm, settings)["tasks"].items()
    }
    for name, value in LM_EVAL.items():
        assert made[name]["value"] == pytest.approx(value, abs=1e-9)
    for name, value in LM_EVAL_ROLLING.items():
        assert made[name]["value"] == pytest.approx(value, rel=1e-5)


# ── the packaged ones ───────────────────────────────────────────────────────────────────────────────────────────────


def test_every_packaged_file_is_named_after_its_task():
    for name in task_file.packaged_names():
        assert task_file.read_task_file(task_file.find_task_file(name)).task == name
    assert set(TASKS) <= set(task_file.packaged_names())


@pytest.mark.parametrize(
    ("name", "answer", "group"), [("capitals", "capital", "region"), ("elements", "symbol", "group_id")]
)
def test_facts_are_those_of_the_tables_and_wrong_choices_of_the_same_group(name, answer, group):
    table = {row["name"].lower(): row for row in rows("mini:countries" if name == "capitals" else "mini:elements")}
    groups = {row[answer]: row[group] for row in table.values()}
    facts = list(rows(str(task_file.PACKAGED / f"{name}.jsonl")))
    assert len(facts) > 100
    for fact in facts:
        row = table[fact["name"].lower()]
        assert fact["choices"][fact["answer"]] == row[answer]
        assert len(set(fact["choices"])) == 4 and {groups[choice] for choice in fact["choices"]} == {row[group]}
    places = Counter(fact["answer"] for fact in facts)
    assert min(places.values()) > len(facts) / 6  # the right answer stands in every place
