"""`tokenizer compare`: the same texts through several tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bildung.app.cli import run
from bildung.core.errors import DataError, SettingsError, TokenizerError
from bildung.tokenizer.compare import compare, short_names
from bildung.tokenizer.learn import learn
from bildung.tokenizer.learning import Learning


@pytest.fixture
def tokenizers(tmp_path: Path) -> list[Path]:
    for name, given in (("bytes", Learning(algorithm="byte")), ("words", Learning(algorithm="word"))):
        learn(["the cat sat"], given).tokenizer.save(tmp_path / name)
    (tmp_path / "en.txt").write_text("the cat sat")
    (tmp_path / "es.txt").write_text("el gato está sentado")
    return [tmp_path / "bytes", tmp_path / "words"]


def test_every_text_with_every_tokenizer(tokenizers: list[Path], tmp_path: Path) -> None:
    en, es = str(tmp_path / "en.txt"), str(tmp_path / "es.txt")
    found = compare(tokenizers, [en, es])
    assert list(found) == [en, es] and list(found[en]) == ["bytes", "words"]
    assert found[en]["words"].unknown_rate == 0 and found[es]["words"].unknown_rate == 1
    assert found[es]["bytes"].bytes_per_token == 1 and found[en]["words"].tokens_per_word == 1


def test_table_and_plot_on_the_command_line(
    tokenizers: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "compare.png"
    data = ["--data", str(tmp_path / "en.txt"), str(tmp_path / "es.txt")]
    run(["tokenizer", "compare", *map(str, tokenizers), *data, "--plot", str(plot)])
    seen = capsys.readouterr().out
    assert "100.00%" in seen and "11.000" not in seen and "3.667" in seen
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_names_are_as_long_as_needed(tmp_path: Path) -> None:
    assert short_names([Path("/x/a/tok"), Path("/x/b/tok")]) == ["a/tok", "b/tok"]
    with pytest.raises(SettingsError, match="named twice"):
        short_names([Path("/x/a"), Path("/x/a")])


def test_bad_input(tokenizers: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="at least one tokenizer directory"):
        compare([], ["mini:moby"])
    with pytest.raises(TokenizerError, match=r"holds no tokenizer\.json"):
        compare([tmp_path], [str(tmp_path / "en.txt")])
    with pytest.raises(DataError, match="no data called"):
        compare(tokenizers, ["nowhere"])
    with pytest.raises(SettingsError, match=r"ends in \.png"):
        run(["tokenizer", "compare", str(tokenizers[0]), "--data", "mini:moby", "--plot", "x.svg"])
