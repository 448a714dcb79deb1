"""Several adapters on one model: switched, stacked, side by side in a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bildung
from bildung.core.errors import AdapterError, DataError, SettingsError
from bildung.model.dora import DoRA
from bildung.model.ia3 import Rescale
from bildung.model.linear import match_linears
from bildung.model.low_rank import LowRank
from bildung.model.named_adapters import adapter_names, add_named
from bildung.model.store import LanguageModel
from bildung.model.virtual import Prompt, add_virtual
from tests.model.tiny import tiny_lm, tokens

NAMES = ["a", "b", "factors", "dora"]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """A base and adapters on it: two LoRAs on other matrices and of other ranks, factors of features, and a DoRA."""
    base = bildung.save(tiny_lm(), tmp_path / "base")
    made = {"base": base}
    for name, target, rank in (("a", "q_proj", 2), ("b", "all", 5)):
        lm = bildung.load(base)
        generator = torch.Generator().manual_seed(rank)
        for linear in match_linears(lm.model, target).values():
            delta = LowRank(linear.in_features, linear.out_features, rank, 0.7, generator=generator)
            delta.lora_B.data.normal_(0.0, 0.2, generator=generator)
            linear.deltas["default"] = delta
        made[name] = bildung.save(lm, tmp_path / name)
    lm = bildung.load(base)
    for linear in match_linears(lm.model, ("v_proj", "down_proj")).values():
        into = linear.name.endswith("down_proj")
        delta = Rescale(linear.in_features if into else linear.out_features, "input" if into else "output")
        delta.factor.data.uniform_(0.2, 2.0, generator=torch.Generator().manual_seed(1))
        linear.deltas["default"] = delta
    made["factors"] = bildung.save(lm, tmp_path / "factors")
    lm = bildung.load(base)
    for linear in match_linears(lm.model, ("k_proj", "up_proj")).values():
        update = LowRank(linear.in_features, linear.out_features, 3, 0.7)
        update.lora_B.data.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(2))
        linear.deltas["default"] = DoRA(linear, update)
    made["dora"] = bildung.save(lm, tmp_path / "dora")
    return made


@pytest.fixture
def lm(places: dict[str, Path]) -> LanguageModel:
    lm = bildung.load(places["base"])
    for name in NAMES:
        bildung.add_adapter(lm, places[name], name)
    return lm


def alone(directory: Path, rows: torch.Tensor) -> torch.Tensor:
    return bildung.load(directory).model(rows)


@torch.no_grad()
def test_switched(lm: LanguageModel, places: dict[str, Path]) -> None:
    assert sorted(adapter_names(lm.model)) == sorted(NAMES)
    for name in NAMES:
        bildung.use_adapters(lm.model, name)
        torch.testing.assert_close(lm.model(tokens()), alone(places[name], tokens()), atol=1e-5, rtol=1e-5)
    bildung.use_adapters(lm.model)
    assert torch.equal(lm.model(tokens()), alone(places["base"], tokens()))


def test_adapters_are_not_named_on_a_model_that_is_one(places: dict[str, Path]) -> None:
    """Its own would be switched off without a word."""
    with pytest.raises(SettingsError, match=r"is an adapter itself; give its base, .*base, and among .*default=.*a\."):
        add_named(bildung.load(places["a"]), [f"b={places['b']}"])
    assert add_named(bildung.load(places["base"]), [f"a={places['a']}", f"b={places['b']}"]) == ["a", "b"]


@torch.no_grad()
def test_stacked_is_the_sum_of_what_they_add(lm: LanguageModel, places: dict[str, Path]) -> None:
    bildung.use_adapters(lm.model, "a", "b")
    linear = match_linears(lm.model, "layers.0.self_attn.q_proj")["model.layers.0.self_attn.q_proj"]
    a, b = linear.deltas["a"].weight(), linear.deltas["b"].weight()
    torch.testing.assert_close(linear.weight(), linear.base.dense() + a + b)
    stacked = lm.model(tokens())
    assert min((stacked - alone(places[name], tokens())).abs().max() for name in ("a", "b", "base")) > 0.05


@torch.no_grad()
def test_rows_of_a_batch_answer_as_alone(lm: LanguageModel, places: dict[str, Path]) -> None:
    rows = tokens(batch=6)
    used = ["b", None, "factors", "a", "dora", "b"]
    paths = {name for name, _ in lm.model.named_parameters()}
    with bildung.adapters_by_row(lm.model, used):
        together = lm.model(rows)
        cache = lm.model.kv_cache(6, rows.shape[1])
        steps = [lm.model(rows[:, i : i + 1], kv_cache=cache) for i in range(rows.shape[1])]
    for row, name in enumerate(used):
        expected = alone(places[name or "base"], rows[row : row + 1])[0]
        torch.testing.assert_close(together[row], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat(steps, dim=1)[row], expected, atol=1e-4, rtol=1e-4)
    assert {name for name, _ in lm.model.named_parameters()} == paths
    bildung.use_adapters(lm.model, "a")
    torch.testing.assert_close(lm.model(rows), alone(places["a"], rows), atol=1e-5, rtol=1e-5)


def test_each_row_trains_its_own(lm: LanguageModel) -> None:
    lm.model.requires_grad_(False)
    for linear in match_linears(lm.model, "q_proj").values():
        linear.deltas.requires_grad_(True)
    with bildung.adapters_by_row(lm.model, ["a", None]):
        lm.model(tokens())[0].sum().backward()
    (linear, *_) = match_linears(lm.model, "q_proj").values()
    assert linear.deltas["a"].lora_B.grad.any() and linear.deltas["b"].lora_B.grad is None


def test_answers_side_by_side(lm: LanguageModel, places: dict[str, Path]) -> None:
    used = ["a", "b", None]
    with bildung.adapters_by_row(lm.model, used):
        together = bildung.generate(lm, ["One two"] * 3, new_tokens=6)
    assert together == [bildung.generate(bildung.load(places[n or "base"]), "One two", new_tokens=6) for n in used]


def test_bad_requests(lm: LanguageModel, places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no adapter is called 'c'.*a, b, dora, factors"):
        bildung.use_adapters(lm.model, "c")
    with pytest.raises(AdapterError, match="no adapter is called 'x'"), bildung.adapters_by_row(lm.model, ["x"]):
        pass
    for name, said in (("a", "called 'a' already"), ("", "cannot be named"), ("x.y", "cannot be named")):
        with pytest.raises(AdapterError, match=said):
            bildung.add_adapter(lm, places["b"], name)
    with pytest.raises(AdapterError, match="no adapter directory"):
        bildung.add_adapter(lm, places["base"], "c")
    with bildung.adapters_by_row(lm.model, ["a", "b"]), pytest.raises(DataError, match="given 3 rows"):
        lm.model(tokens(batch=3))
    prompted = bildung.load(places["base"])
    add_virtual(prompted.model, Prompt(torch.zeros(2, prompted.config.hidden_size)))
    bildung.save(prompted, tmp_path / "prompt")
    with pytest.raises(AdapterError, match="one set"):
        bildung.add_adapter(lm, tmp_path / "prompt", "c")
    other = bildung.save(tiny_lm(hidden_size=96, intermediate_size=200), tmp_path / "other")
    with pytest.raises(AdapterError, match="belongs to another model"):
        bildung.add_adapter(bildung.load(other), places["a"], "a")
