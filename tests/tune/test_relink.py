"""An adapter whose base has moved: what loads again, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import bildung
from bildung.app.cli import main
from bildung.core.errors import AdapterError, ModelFileError
from bildung.core.record import damage, hash_directory, read_record
from bildung.model.config import from_dict
from bildung.model.store import LanguageModel
from bildung.tune.lora import Settings, lora
from bildung.tune.relink import relink


@pytest.fixture
def moved(tiny_lm_directory: Path, given: dict, tmp_path: Path) -> tuple[Path, Path]:
    """(adapter, where its base is now)."""
    base, adapter = tmp_path / "old" / "base", tmp_path / "life" / "adapter"
    shutil.copytree(tiny_lm_directory, base)
    lora(base, adapter, Settings(**given, rank=2))
    (tmp_path / "attic").mkdir()
    base.rename(tmp_path / "attic" / "model")
    return adapter, tmp_path / "attic" / "model"


def logits(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor([[5, 9, 17, 30]]))


def test_it_loads_again_and_nothing_learned_has_changed(moved, capsys) -> None:
    adapter, base = moved
    with pytest.raises(AdapterError, match="not a model directory here"):
        bildung.load(adapter)
    learned = (adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as done:
        main(["relink", str(adapter), str(base)])
    assert done.value.code == 0 and f"{adapter} is an adapter on {base} now" in capsys.readouterr().out
    with warnings.catch_warnings(action="error"):  # the base is the one it was trained on
        lm = bildung.load(adapter)
    assert lm.base == base and (adapter / "adapter_model.safetensors").read_bytes() == learned
    assert not torch.equal(logits(lm), logits(bildung.load(base)))
    record = read_record(adapter)
    assert not damage(adapter, record) and record.source == {"path": "../../attic/model", "hash": hash_directory(base)}
    assert record.notes[-1] == "its base was relinked to ../../attic/model"
    assert relink(adapter, base) == str(base), "again does no harm"


def test_a_relink_that_was_killed_is_done_again(moved) -> None:
    adapter, base = moved
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}))
    with pytest.raises(ModelFileError, match="altered"):
        bildung.load(adapter)
    relink(adapter, base)
    assert bildung.load(adapter).base == base


def test_another_model_is_refused(moved, tiny_lm, tmp_path: Path) -> None:
    adapter, base = moved
    before = (adapter / "adapter_config.json").read_bytes()
    other = bildung.load(base)
    with torch.no_grad():
        other.model.model.norm.weight += 1
    bildung.save(other, tmp_path / "other")
    with pytest.raises(AdapterError, match=r"not the model .* was made on: that had the hash"):
        relink(adapter, tmp_path / "other")
    with pytest.raises(AdapterError, match="adapter itself"):
        relink(adapter, adapter)
    with pytest.raises(AdapterError, match="cannot be read"):
        relink(base, base)
    with pytest.raises(ModelFileError):
        relink(adapter, tmp_path / "nowhere")
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(AdapterError, match="altered"):
        relink(adapter, base)
    assert (adapter / "adapter_config.json").read_bytes() == before


def test_force_takes_another_base_of_the_same_shapes_only(moved, tmp_path: Path) -> None:
    adapter, base = moved
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config, indent=8))
    with pytest.raises(AdapterError, match="--force"):
        relink(adapter, base)
    relink(adapter, base, force=True)
    with pytest.warns(UserWarning, match="is not what the adapter"):
        bildung.load(adapter)
    wider = from_dict(config | {"intermediate_size": config["intermediate_size"] * 2})
    bildung.save(LanguageModel(bildung.build(wider), bildung.load(base).tokenizer, wider), tmp_path / "wider")
    with pytest.raises(AdapterError, match="do not fit a matrix"):
        relink(adapter, tmp_path / "wider", force=True)
