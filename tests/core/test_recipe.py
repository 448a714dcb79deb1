"""Reading a recipe: order, defaults, references, and every way to write it wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from bildung.core import recipe as recipe_module
from bildung.core.errors import RecipeError
from bildung.core.recipe import read_recipe
from bildung.core.settings import settings
from bildung.core.verbs import Verb


@pytest.fixture(autouse=True)
def operations(monkeypatch, tmp_path):
    """Three operations and a command; the test runs in an empty directory."""
    names = {"adopt": "model.adopt", "tune lora": "tune.lora", "align dpo": "align.dpo"}
    found = {name: Verb(name, module.split(".")[0], module, "", True, False) for name, module in names.items()}
    found["log"] = Verb("log", "app", "app.log", "", False, True)
    monkeypatch.setattr(recipe_module, "verbs", lambda: found)
    monkeypatch.chdir(tmp_path)


def read(text: str):
    Path("recipe.yaml").write_text(text)
    return read_recipe(Path("recipe.yaml"))


GOOD = """
name: toy
out: lives/toy
seed: 3
card: {items: 9}
life:
  - {as: base, do: adopt, from: "pypi:x==1"}
  - as: aligned
    do: align dpo
    from: tuned
    with: {rate: 1e-4, reference: "@base", mix: ["@tuned", {a: "@base"}], at: "@@x"}
  - {as: tuned, do: tune lora, from: base, with: {seed: 5}}
  - {as: alone, do: tune lora, from: null}
  - {as: again, do: tune lora}
"""


def test_steps_run_after_what_they_need_and_otherwise_as_written():
    assert [step.name for step in read(GOOD).steps] == ["base", "tuned", "aligned", "alone", "again"]


def test_names_of_steps_become_their_directories():
    recipe = read(GOOD)
    aligned = recipe.step("aligned")
    assert (aligned.source, aligned.out) == (Path("lives/toy/tuned"), Path("lives/toy/aligned"))
    assert aligned.given["reference"] == "lives/toy/base"
    assert aligned.given["mix"] == ["lives/toy/tuned", {"a": "lives/toy/base"}]
    assert aligned.given["at"] == "@x"
    assert aligned.needs == ("tuned", "base")
    assert recipe.step("base").source == "pypi:x==1"
    assert recipe.step("alone").source is None and recipe.step("alone").needs == ()
    assert recipe.step("again").source == Path("lives/toy/alone")


def test_defaults_reach_the_steps_that_know_them_and_yield_to_with():
    @settings
    class Seeded:
        seed: int = 0

    @settings
    class Both:
        seed: int = 0
        card: dict[str, int] | None = None

    recipe = read(GOOD)
    assert recipe.step("base").settings(Seeded) == {"seed": 3}
    assert recipe.step("base").settings(Both) == {"seed": 3, "card": {"items": 9}}
    assert recipe.step("tuned").settings(Seeded) == {"seed": 5}


def test_a_path_that_exists_may_be_a_source():
    Path("model").mkdir()
    assert read("{out: o, life: [{as: a, do: adopt, from: model}]}").steps[0].source == Path("model")


STEP = "{as: a, do: adopt, from: 'pypi:x'}"


@pytest.mark.parametrize(
    "text, words",
    [
        ("- a\n- b", r"must be a mapping with the keys name, out, .*got \['a', 'b'\]"),
        ("just text", "must be a mapping"),
        ("", "must be a mapping"),
        ("out: [", "cannot be read as a recipe"),
        ("out: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("out: o\nout: p", "'out' is given twice"),
        (f"{{out: o, lief: [{STEP}]}}", "unknown key 'lief'; did you mean 'life'"),
        ("{out: o}", "has no 'life'"),
        ("{out: o, life: []}", "at least one step"),
        ("{out: 3, life: [{as: a, do: adopt}]}", "`out` must be a path"),
        ("{out: o, life: [tune]}", "step 1 of `life` must be a mapping"),
        (
            "{out: o, life: [{as: a, do: adopt, wiht: {}}]}",
            "step 1 of `life` has the unknown key 'wiht'; did you mean 'with'",
        ),
        ("{out: o, life: [{do: adopt}]}", "needs 'as' as text, got None"),
        ("{out: o, life: [{as: 3, do: adopt}]}", "needs 'as' as text, got 3"),
        ("{out: o, life: [{as: ../up, do: adopt}]}", "use letters"),
        ("{out: o, life: [{as: a, do: adopt, with: [1]}]}", "`with` must be a mapping"),
        ("{out: o, life: [{as: a, do: adopt, from: 3}]}", "`from` must be"),
        (f"{{out: o, life: [{STEP}, {STEP}]}}", "two steps are called 'a'"),
        ("{out: o, life: [{as: a, do: tune lroa}]}", "step 'a': bildung cannot 'tune lroa'; did you mean 'tune lora'"),
        ("{out: o, life: [{as: a, do: log}]}", "bildung cannot 'log'"),
        (f"{{out: o, life: [{STEP}, {{as: b, do: adopt, from: aa}}]}}", "'a'"),
        (
            "{out: o, life: [{as: base, do: adopt, from: baes}]}",
            "neither a step nor an existing path; did you mean 'base'",
        ),
        (
            "{out: o, life: [{as: base, do: adopt, with: {x: '@baes'}}]}",
            "step 'base': no step is called 'baes'; did you mean",
        ),
        (
            "{out: o, life: [{as: a, do: adopt, from: c}, {as: b, do: adopt}, {as: c, do: adopt}]}",
            "in a circle: (a needs c needs b needs a|c needs b needs a needs c|b needs a needs c needs b)",
        ),
        ("{out: o, life: [{as: a, do: adopt, from: a}]}", "in a circle: a needs a"),
        ("[" * 20_000, "cannot be read as a recipe"),
        ("{out: o, life: [{as: a, do: adopt, with: &w {x: *w}}]}", "more than 100000 values"),
        (
            "{out: o, card: [&a [x, x, x, x, x, x, x, x], &b [*a, *a, *a, *a, *a, *a, *a, *a], "
            "&c [*b, *b, *b, *b, *b, *b, *b, *b], &d [*c, *c, *c, *c, *c, *c, *c, *c], "
            "&e [*d, *d, *d, *d, *d, *d, *d, *d], [*e, *e, *e, *e, *e, *e, *e, *e]], life: []}",
            "counting what its aliases stand for",
        ),
    ],
)
def test_each_mistake_is_named(text, words):
    with pytest.raises(RecipeError, match=words):
        read(text)


def test_files_that_cannot_be_read():
    Path("latin.yaml").write_bytes(b"out: \xfc")
    for path in ("absent.yaml", "latin.yaml", "."):
        with pytest.raises(RecipeError, match="cannot be read as a recipe"):
            read_recipe(Path(path))


def test_settings_can_be_merged_and_what_is_merged_replaced():
    """`<<: *other` brings another step's settings along; keys written beside it win, nested ones too."""
    recipe = read("""
out: o
life:
  - as: a
    do: adopt
    from: "pypi:x==1"
    with: &a {rate: 1, sizes: &sizes {wide: 2, deep: 3}}
  - {as: b, do: adopt, with: &b {<<: *a, sizes: {<<: *sizes, deep: 4}}}
  - {as: c, do: adopt, with: {<<: *b, rate: 5}}
""")
    assert recipe.step("b").given == {"rate": 1, "sizes": {"wide": 2, "deep": 4}}
    assert recipe.step("c").given == {"rate": 5, "sizes": {"wide": 2, "deep": 4}}
    assert recipe.step("a").given == {"rate": 1, "sizes": {"wide": 2, "deep": 3}}
