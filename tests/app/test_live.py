"""Living a recipe: the plan, what is skipped, what runs again and why, and what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from bildung.app.cli import run
from bildung.app.live import live, plan
from bildung.core.errors import OutputError, RecipeError, RecordError, SettingsError
from bildung.core.recipe import read_recipe
from bildung.core.record import hash_directory, read_record

RECIPE = """
name: toy
out: life
card: 3
life:
  - {as: base, do: toy grow, from: "pypi:toy==1", with: {data: notes.txt}}
  - {as: tall, do: toy grow, with: {lines: LINES, die: kill}}
  - {as: twin, do: toy grow, from: base, with: {teacher: "@tall"}}
  - {as: page, do: toy page, from: tall}
"""


@pytest.fixture
def recipe(toys) -> Path:
    Path("notes.txt").write_text("notes")
    Path("toy.yaml").write_text(RECIPE.replace("LINES", "3"))
    return Path("toy.yaml")


def lived(recipe: Path, *forced: str) -> list[str]:
    """Lives the recipe and names the steps that ran."""
    read = read_recipe(recipe)
    before = {step.name: step.out.exists() and (step.out / "record.json").stat().st_ino for step in read.steps}
    records = live(read, frozenset(forced))
    assert list(records) == [step.name for step in read.steps]
    return [step.name for step in read.steps if (step.out / "record.json").stat().st_ino != before[step.name]]


def test_a_life_and_the_second_run(recipe, capsys):
    assert lived(recipe) == ["base", "tall", "twin", "page"]
    out = capsys.readouterr().out
    assert out.index("run: new") < out.index("tall: toy grow") < out.index("tall: done in")
    assert out.rstrip().endswith("report: life/page/report.html")
    assert Path("life/tall/model.txt").read_text().splitlines() == [
        "pypi:toy==1", "leaf 0", "leaf 1", "leaf 0", "leaf 1", "leaf 2",
    ]  # fmt: skip
    assert read_record(Path("life/tall")).settings["card"] == 3
    assert set(read_record(Path("life/twin")).companions) == {"teacher"}
    assert lived(recipe) == []
    assert "toy is up to date" in capsys.readouterr().out


def test_the_second_run_imports_no_operation(recipe, shell):
    assert "bildung.toy.grow" in shell("live", "toy.yaml").stdout.splitlines()[-1]
    again = shell("live", "toy.yaml")
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == "imported:", again.stdout + again.stderr
    assert "toy is up to date" in again.stdout and "report: life/page/report.html" in again.stdout


@pytest.mark.parametrize(
    "change, ran, why",
    [
        pytest.param(
            lambda: Path("notes.txt").write_text("others"),
            ["base"],
            {"base": "check: notes.txt changed"},
            marks=pytest.mark.slow,
        ),
        (
            lambda: Path("toy.yaml").write_text(RECIPE.replace("LINES", "4")),
            ["tall", "twin", "page"],
            {"tall": "changed: with.lines 3 -> 4", "twin": "run if the result of tall is another"},
        ),
        pytest.param(
            lambda: Path("life/tall/model.txt").unlink(),
            ["tall"],
            {"tall": "run: model.txt is missing"},
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda: shutil.rmtree("life/tall"), ["tall"], {"tall": "run: new"}, marks=pytest.mark.slow),
        (lambda: Path("life/.life.json").write_text("{"), [], {"base": "check: it was not made by this recipe"}),
        pytest.param(
            lambda: Path("toy.yaml").write_text(RECIPE.replace("LINES", "3").replace("toy==1", "toy==2")),
            ["base", "tall", "twin", "page"],
            {"base": "changed: from pypi:toy==1 -> pypi:toy==2"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_only_what_changed_runs_again(recipe, change, ran, why):
    lived(recipe)
    change()
    planned = plan(read_recipe(recipe))
    assert {name: planned[name] for name in why} == why
    assert lived(recipe) == ran
    assert lived(recipe) == []


def test_a_step_whose_result_is_the_same_again_spares_those_after_it(recipe):
    """base reads other notes but grows the same: only base runs (the case above), and nothing is planned afterwards."""
    lived(recipe)
    Path("notes.txt").write_text("others")
    lived(recipe)
    assert set(plan(read_recipe(recipe)).values()) == {"up to date"}


@pytest.mark.slow
def test_other_code_means_asking_the_operations_not_running_them(recipe, monkeypatch):
    lived(recipe)
    monkeypatch.setattr("bildung.app.live.code_hash", lambda: "other")
    assert plan(read_recipe(recipe))["base"] == "check: bildung itself changed"
    assert lived(recipe) == []
    assert set(plan(read_recipe(recipe)).values()) == {"up to date"}


@pytest.mark.slow
def test_a_default_that_changed_in_the_code_is_noticed(recipe, toys, monkeypatch):
    lived(recipe)
    source = toys / "toy" / "grow.py"
    source.write_text(source.read_text().replace('word: str = "leaf"', 'word: str = "oak "'))
    monkeypatch.setattr("bildung.app.live.code_hash", lambda: "other")
    monkeypatch.delitem(__import__("sys").modules, "bildung.toy.grow")
    assert lived(recipe) == ["base", "tall", "twin", "page"]


@pytest.mark.slow
def test_force(recipe):
    lived(recipe)
    assert lived(recipe, "tall") == ["tall"]
    assert lived(recipe, "base", "tall", "twin", "page") == ["base", "tall", "twin", "page"]


def test_force_on_the_command_line(recipe, shell):
    shell("live", "toy.yaml")
    planned = shell("live", "toy.yaml", "--force", "all", "--plan").stdout
    assert planned.count("run: forced") == 4
    assert "tall: done in" in shell("live", "toy.yaml", "--force", "tall").stdout
    wrong = shell("live", "toy.yaml", "--force", "tlal")
    assert wrong.returncode == 2 and "did you mean 'tall'" in wrong.stderr


def test_plan_only_plans(recipe, shell):
    assert shell("live", "toy.yaml", "--plan").stdout.count("run: new") == 4
    assert not Path("life").exists()


def test_kill_9_and_run_again_ends_in_the_same_result(recipe, shell):
    killed = shell("live", "toy.yaml", TOY_DIE="kill")
    assert killed.returncode == -signal.SIGKILL
    assert sorted(os.listdir("life")) == [".life.json", "base", "tall.partial"]
    assert plan(read_recipe(recipe))["tall"] == "run: goes on from an interruption"
    again = shell("live", "toy.yaml")
    assert again.returncode == 0, again.stderr
    assert "base: done" not in again.stdout
    assert read_record(Path("life/tall")).notes[0].startswith("went on")
    ends = {name: hash_directory(Path("life", name)) for name in ("base", "tall", "twin", "page")}
    shutil.rmtree("life")
    shell("live", "toy.yaml")
    assert ends == {name: hash_directory(Path("life", name)) for name in ends}


def test_ctrl_c_names_the_finished_steps(recipe, shell):
    recipe.write_text(recipe.read_text().replace("die: kill", "die: stop"))
    stopped = shell("live", "toy.yaml", TOY_DIE="stop")
    assert stopped.returncode == 130
    assert "Finished: base. tall goes on from life/tall.partial" in stopped.stderr
    assert "To go on: bildung live toy.yaml" in stopped.stderr


def test_a_full_disk_stops_the_life_and_keeps_the_rest(recipe):
    recipe.write_text(recipe.read_text().replace("die: kill", "die: disk"))
    with pytest.raises(OutputError, match="the disk is full"):
        live(read_recipe(recipe))
    assert Path("life/base/record.json").exists() and not Path("life/tall").exists()


def test_a_misspelt_setting_of_a_late_step_is_found_before_the_first_runs(recipe):
    recipe.write_text(recipe.read_text().replace("teacher:", "teecher:"))
    with pytest.raises(
        SettingsError, match=r"step 'twin' \(toy grow\): unknown setting 'teecher'; did you mean 'teacher'"
    ):
        live(read_recipe(recipe))
    assert not Path("life").exists()


def test_a_first_step_that_needs_a_source_says_so(recipe):
    recipe.write_text("{out: life, life: [{as: first, do: toy page}]}")
    with pytest.raises(RecipeError, match=r"step 'first' \(toy page\): `from` is missing"):
        live(read_recipe(recipe))
    assert not Path("life").exists()


def test_what_others_put_in_the_place_of_a_step_is_left_alone(recipe):
    Path("life/tall").mkdir(parents=True)
    Path("life/tall/thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not made by bildung"):
        live(read_recipe(recipe))
    assert os.listdir("life/tall") == ["thesis.tex"]


@pytest.mark.slow
def test_a_corrupted_record_stops_the_life(recipe):
    lived(recipe)
    Path("life/tall/record.json").write_text("{")
    with pytest.raises(RecordError, match="life/tall"):
        live(read_recipe(recipe))


@pytest.mark.slow
def test_the_memory_holds_nothing_but_hashes_and_words(recipe):
    lived(recipe)
    noted = json.loads(Path("life/.life.json").read_text())["twin"]
    assert noted["asked"]["with"] == {"teacher": "life/tall"} and set(noted["needs"]) == {"base", "tall"}


@pytest.mark.slow
def test_a_moved_recipe_directory_is_not_fooled(recipe):
    lived(recipe)
    Path("toy.yaml").write_text(Path("toy.yaml").read_text().replace("out: life", "out: lief"))
    with pytest.raises(RecipeError):
        read_recipe(Path("absent.yaml"))
    assert set(plan(read_recipe(recipe)).values()) == {"run: new"}


@pytest.mark.slow
def test_what_was_made_by_hand_in_between_is_noticed(recipe):
    lived(recipe)
    run(["toy", "grow", "life/base", "life/tall", "--lines", "9", "--force"])
    planned = plan(read_recipe(recipe))
    assert planned["tall"] == "check: it was not made by this recipe"
    assert lived(recipe) == ["tall"]  # the old lines again, so twin and page, which saw those, still stand


def test_a_model_outside_the_life_is_watched(recipe):
    run(["toy", "grow", "pypi:toy==1", "outside"])
    recipe.write_text("{out: life, life: [{as: base, do: toy grow, from: outside}]}")
    assert lived(recipe) == ["base"] and lived(recipe) == []
    Path("outside/model.txt").write_text("another model\n")
    assert plan(read_recipe(recipe)) == {"base": "check: a model it uses changed"}
    assert lived(recipe) == ["base"] and lived(recipe) == []


@pytest.mark.slow
def test_a_step_that_only_names_another_is_asked_when_that_ones_record_changed(recipe):
    lived(recipe)
    path = Path("life/tall/record.json")
    path.write_text(path.read_text().replace('"notes": []', '"notes": ["remade"]'))
    planned = plan(read_recipe(recipe))
    assert (planned["tall"], planned["twin"]) == ("up to date", "check: a model it uses changed")
    assert lived(recipe) == []


@pytest.mark.slow
def test_a_life_that_cannot_be_noted_down(recipe):
    Path("life/.life.json.new").mkdir(parents=True)  # in the way
    with pytest.raises(OutputError, match="life/base itself is complete"):
        live(read_recipe(recipe))
    Path("life/.life.json.new").rmdir()
    assert lived(recipe) == ["tall", "twin", "page"]
