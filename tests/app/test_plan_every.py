"""`bildung plan` of every verb there is, and figures of looks that can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bildung
from bildung.app.cli import run
from bildung.app.planning import plain, several, using
from bildung.app.planning.passes import fullest, own_bytes
from bildung.app.planning.passing import PASSING, looked, smaller
from bildung.core.errors import AdapterError, BildungError, DataError, ModelFileError, SettingsError
from bildung.core.staging import INPUTS
from bildung.core.verbs import verbs
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel, no_tokenizer
from bildung.train.training import Training
from bildung.tune.lora import Options, add_lora
from tests.conftest import tiny_tokenizer
from tests.model.tiny_encoder import tiny_encoder

PROMPT = "The capital of France is"
PAIR = {"clean": "abc", "corrupted": "abd", "answers": ["e"], "wrong": ["f"]}
VIT = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "id2label": {"0": "cat", "1": "owl"},
    "image_size": [12, 20],
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}


def test_every_verb_has_a_plan_of_some_kind() -> None:
    kinds = [plain.PLAIN, using.OPERATIONS, PASSING, several.SEVERAL, ("live", "look index")]
    for name, verb in verbs().items():
        planned = sum(name in kind for kind in kinds)
        settings = getattr(verb.load(), "Settings", object)
        assert planned == 1 or (planned == 0 and issubclass(settings, Training)), name


@pytest.fixture(autouse=True)
def no_other_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How large a process is that has imported a verb is asked of one, which takes seconds."""
    if request.node.name != "test_the_process_itself":
        for module in ("passing", "plain"):
            monkeypatch.setattr(f"bildung.app.planning.{module}.own_bytes", lambda *_: 10**8)


@pytest.fixture(scope="module")
def places(tiny_lm_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What verbs start from that do not start from a language model."""
    folder = tmp_path_factory.mktemp("places")
    lm = bildung.load(tiny_lm_directory)
    add_lora(lm.model, Options(rank=2))
    bildung.save(lm, folder / "lora")
    bildung.save(tiny_encoder(), folder / "bert")
    keys = {"model_type": "rnn_seq2seq", "attention": "bahdanau", "vocab_size": 300, "hidden_size": 24}
    config = from_dict({**keys, "bos_token_id": 0, "eos_token_id": 2})
    bildung.save(LanguageModel(build(config).eval(), tiny_tokenizer(), config), folder / "seq2seq")
    image = from_dict(VIT)
    bildung.save(LanguageModel(build(image).eval(), no_tokenizer(image), image), folder / "vit")
    gpt2 = from_dict({"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 300})
    bildung.save(LanguageModel(build(gpt2).eval(), tiny_tokenizer(), gpt2), folder / "gpt2")
    (folder / "words").mkdir()
    tiny_tokenizer().save(folder / "words")
    (folder / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    (folder / "run.partial").mkdir()
    inputs = {"operation": "tune lora", "settings": {"data": "mini:chat"}, "source": {"path": str(tiny_lm_directory)}}
    (folder / "run.partial" / INPUTS).write_text(json.dumps(inputs))
    life = {"as": "tuned", "do": "tune lora", "from": str(tiny_lm_directory), "with": {"data": "mini:chat"}}
    then = {"as": "seen", "do": "look attention", "with": {"prompt": PROMPT}}
    recipe = {"out": str(folder / "life"), "life": [life, then]}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return {path.stem: path for path in folder.iterdir()} | {"lm": tiny_lm_directory}


STARTS = {
    "merge": "lora", "tune cut": "lora", "relink": "lora", "embed": "bert", "look alignment": "seq2seq",
    "look image_attention": "vit", "tune stretch": "gpt2", "tune bitfit": "gpt2", "export": "run", "live": "recipe",
    "self-instruct": "gpt2",
}  # fmt: skip
BORN = {
    "pretrain causal": "{model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, "
    "num_attention_heads: 2, max_position_embeddings: 64}",
    "pretrain masked": "{model_type: bert, hidden_size: 24, num_hidden_layers: 1, num_attention_heads: 2, "
    "intermediate_size: 24, max_position_embeddings: 32}",
    "pretrain seq2seq": "{model_type: rnn_seq2seq, hidden_size: 8}",
    "pretrain bptt": "{model_type: rnn, hidden_size: 16}",
    "pretrain image": "{model_type: vit, image_size: 12, patch_size: 4, hidden_size: 12}",
}
BORN["pretrain prefix"] = BORN["pretrain causal"]


@pytest.mark.slow
@pytest.mark.parametrize("name", verbs())
def test_every_verb_on_the_command_line(
    name: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BILDUNG_NURSERY", str(Path("nursery").absolute()))
    words = [f"model={BORN[name]}"] if name in BORN else []
    words += {
        "look patch": [f"pairs={places['pairs']}", "count=1"],
        "look path_patch": [f"pairs={places['pairs']}", "count=1"],
        "look circuit": [f"pairs={places['pairs']}", "count=1", "knockouts=1"],
        "look in_context": ["shots=[0, 1]", "questions=2"],
        "tune by_examples": ["sizes=[2, 4]"],
        "tune long_lora": ["length=512"],
        "tune intrinsic_dimension": ["dimensions=[100]"],
        "tune qlora": ["rank=2"],
        "tune said": ["dimension=100"],
        "pretrain seq2seq": ["batch_tokens=256"],
        "self-instruct": ["new_tokens=8"],
    }.get(name, [])
    source = places["words"] if name in BORN else places[STARTS.get(name, "lm")]
    run(["plan", name, str(source), "--seconds", "0", *(["--given", *words] if words else [])])
    shown = " ".join(capsys.readouterr().out.split())
    assert "has no plan" not in shown
    assert "It fits" in shown or "holds no model" in shown or "The largest step" in shown, shown


def test_what_the_operation_refuses_its_plan_refuses(places: dict[str, Path]) -> None:
    """By the operation's own check."""
    refused: list[tuple[str, str, type[BildungError], str]] = [
        ("look induction", "bert", DataError, "does not continue text"),
        ("tune stretch", "lm", ModelFileError, "are not a learned table: there is nothing to stretch"),
        ("tune cut", "lm", AdapterError, "there is nothing to cut"),
        ("merge", "lm", AdapterError, "there is nothing to merge"),
        ("quantize", "lora", ModelFileError, "is an adapter"),
        ("self-instruct", "lm", SettingsError, "exceed the model's context"),
        ("self-instruct", "bert", DataError, "does not continue text"),
    ]
    for name, source, error, message in refused:
        with pytest.raises(error, match=message):
            looked(name, places[source], {}, own=0)


def test_patterns_by_hand(tiny_lm_directory: Path) -> None:
    """2 layers, 4 heads: patterns of 4 bytes each, which are there twice while they are put together."""
    patterns = 2 * 4 * 64 * 64 * 4
    one = looked("look attention", tiny_lm_directory, {})[0]
    short = looked("look attention", tiny_lm_directory, {}, length=16)[0]
    longer, shorter = (fullest(made.look.lms, made.passes)["activations"] for made in (one, short))
    assert 2 * patterns * 15 / 16 < longer - shorter < 3 * patterns
    assert one.parts["patterns"] == patterns  # while they are drawn
    assert one.look.said == ["prompt: 64 tokens"]
    real = looked("look attention", tiny_lm_directory, {"prompt": PROMPT})[0]
    assert real.passes[0].what.startswith(f"one text of {len(tiny_tokenizer().encode(PROMPT))} tokens")
    two = looked("look attention", tiny_lm_directory, {"against": str(tiny_lm_directory)})[0]
    assert two.parts["weights"] == 2 * one.parts["weights"]
    assert two.parts["patterns"] == 2 * patterns
    assert fullest(two.look.lms, two.passes)["activations"] == longer + patterns  # the first are kept


def test_what_settings_say_is_counted(tiny_lm_directory: Path, tmp_path: Path) -> None:
    cached = looked("look cache", tiny_lm_directory, {"sites": ["layers.*.resid_post"], "limit": 10, "max_length": 32})[
        0
    ]
    assert cached.parts["files that are written, mapped"] == 10 * 32 * 2 * 32 * 4  # texts, tokens, layers, numbers
    traced = looked("look trace", tiny_lm_directory, {"sites": ["resid_post"], "samples": 4}, length=16)[0]
    assert traced.passes[0].times == 1 + 2 * 16
    mapped = looked("look stream_map", tiny_lm_directory, {"layers": [0]})[0]
    assert mapped.parts["sums of products, float64"] == 2 * (2 * 32 * 32 + 2 * 32) * 8
    with pytest.raises(SettingsError, match="promt"):
        looked("look attention", tiny_lm_directory, {"promt": PROMPT})


@pytest.mark.slow
def test_what_would_fit_is_said(tiny_lm_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = looked("look attention", tiny_lm_directory, {}, length=32)[0]
    assert "a prompt of" in smaller("look attention", tiny_lm_directory, {}, made.peak_bytes + 10**7)
    with pytest.raises(SystemExit) as stop:
        run(["plan", "look attention", str(tiny_lm_directory), "--memory", "1MB", "--seconds", "0"])
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    assert "too small by" in shown and "Nothing that was tried fits" in shown


def test_a_misspelt_verb_gets_the_nearest(tiny_lm_directory: Path) -> None:
    with pytest.raises(SettingsError, match="look attention"):
        run(["plan", "look atention", str(tiny_lm_directory)])


@pytest.mark.slow
def test_time_of_passes(tiny_lm_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--given", "prompt=The capital of France is", "subject=France", "sites=[resid_post]"]
    run(["plan", "look trace", str(tiny_lm_directory), "--seconds", "0.01", *words])
    assert "s a pass, " in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_the_process_itself(tiny_lm_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["plan", "look curves", str(tiny_lm_directory), "--seconds", "0"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "holds no model" in shown and "The process itself takes about" in shown
    assert 10**7 < own_bytes("bildung.core.progress", tiny_lm_directory) < 10**9
