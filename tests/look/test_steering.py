"""Steering vectors and ablations: what is added or put in place, where, and on which weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bildung
from bildung.app.cli import main
from bildung.core.errors import BadIntervention, ModelFileError, NoSuchSite, SettingsError
from bildung.look import steering as operation
from bildung.look.causal.ablation import mean, patch, resample, zero
from bildung.model.steering import read_steering, steered
from bildung.model.taps import intervene, observe
from tests.model.tiny import tiny_decoder, tiny_lm, tokens

SITE = "layers.0.resid_post"


def texts(folder: Path, name: str, words: str) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(f'{{"text": "{word}"}}\n' for word in words.split()), encoding="utf-8")
    return str(path)


def test_a_vector_is_made_saved_and_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = bildung.save(tiny_lm(), tmp_path / "lm")
    lm = bildung.load(place)
    data = texts(tmp_path, "up", "good fine nice"), texts(tmp_path, "down", "bad poor dull")
    settings = operation.Settings(site=SITE, positive=data[0], negative=data[1])
    record = operation.steering(place, tmp_path / "vector", settings)
    assert record.measured["positive"] == 3 and record.measured["pairs told apart"] <= 1
    made = read_steering(tmp_path / "vector")

    def last(word: str) -> torch.Tensor:
        with observe(lm.model, SITE) as seen, torch.no_grad():
            lm.model(torch.tensor([lm.tokenizer.encode(word)]))
        return seen[SITE][0, -1]

    ups, downs = ([last(word) for word in words.split()] for words in ("good fine nice", "bad poor dull"))
    torch.testing.assert_close(made.vector_D, torch.stack(ups).mean(0) - torch.stack(downs).mean(0))
    with observe(lm.model, SITE) as before, torch.no_grad():
        lm.model(tokens())
    with steered(lm, made, 3.0, at="[:, -2:]"), observe(lm.model, SITE) as after, torch.no_grad():
        lm.model(tokens())
    added = after[SITE] - before[SITE]
    assert (added[:, :-2] == 0).all()
    torch.testing.assert_close(added[:, -2:], (3 * made.vector_D).expand(2, 2, -1), atol=1e-4, rtol=1e-3)
    plain = bildung.generate(lm, "abc", new_tokens=4)
    with steered(lm, made, 40.0):
        pushed = bildung.generate(lm, "abc", new_tokens=4)
    assert pushed != plain
    words = [
        "generate",
        str(place),
        "abc",
        "--new-tokens",
        "4",
        "--steer",
        str(tmp_path / "vector"),
        "--strength",
        "40",
    ]
    with pytest.raises(SystemExit, match="0"):
        main(words)
    assert capsys.readouterr().out == pushed + "\n"

    other = bildung.load(bildung.save(tiny_lm(initializer_range=0.2), tmp_path / "other"))
    with pytest.raises(ModelFileError, match="other weights"), steered(other, made):
        pass
    with steered(other, made, other_weights=True):
        other.model(tokens())
    with pytest.raises(SettingsError, match="it is a selection"), steered(lm, made, at="from 3"):
        pass
    with pytest.raises(ModelFileError, match="is no steering vector"):
        read_steering(place / "model.safetensors")
    with pytest.raises(NoSuchSite, match="names 2 sites"):
        operation.vectors(lm, "layers.*.resid_post", ["a"], settings)


def test_ablations_put_in_what_they_say() -> None:
    model = tiny_decoder()
    with observe(model, SITE) as seen, torch.no_grad():
        plain = model(tokens(seed=5))
    samples_MD = seen[SITE].flatten(0, 1)
    site = f"{SITE}[:, 2|5]"
    for ablation in (zero, mean(samples_MD), resample(samples_MD, seed=1), patch(samples_MD[3])):
        with intervene(model, {site: ablation}), observe(model, SITE) as after, torch.no_grad():
            first = model(tokens(seed=5))
            assert torch.equal(model(tokens(seed=5)), first) and not torch.equal(first, plain)
        put = after[SITE][:, [2, 5]]
        assert torch.equal(after[SITE][:, [0, 1, 3, 4]], seen[SITE][:, [0, 1, 3, 4]])
        if ablation is zero:
            assert (put == 0).all()
    assert torch.equal(put, samples_MD[3].expand(2, 2, -1))
    with intervene(model, {SITE: mean(samples_MD)}), observe(model, SITE) as after:
        model(tokens())
    torch.testing.assert_close(after[SITE], samples_MD.mean(0).expand(2, 11, -1))
    with intervene(model, {SITE: resample(samples_MD, seed=2)}), observe(model, SITE) as after:
        model(tokens())
    drawn = {tuple(row) for row in after[SITE].flatten(0, 1).tolist()}
    assert drawn <= {tuple(row) for row in samples_MD.tolist()} and len(drawn) > 5
    for wrong in (mean(samples_MD[:, :7]), resample(samples_MD[:, :7]), patch(samples_MD[:3])):
        with pytest.raises(BadIntervention, match="shape"), intervene(model, {SITE: wrong}):
            model(tokens())
