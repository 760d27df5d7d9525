"""scripts/build_fashion.py: what is torn or missing is one line that says where it belongs."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import build_fashion

NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
WHOLE = gzip.compress(bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6]))


def test_an_idx_file_has_its_shape_in_its_head(tmp_path: Path) -> None:
    (tmp_path / "some.gz").write_bytes(WHOLE)
    assert np.array_equal(build_fashion.read_idx(tmp_path / "some.gz"), [[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    "torn",
    [WHOLE[:-9], WHOLE[:3], b"", b"no gzip at all", gzip.compress(b"\0"), gzip.compress(bytes([0, 0, 8, 3, 0]))],
    ids=["cut", "its head", "empty", "another format", "a byte", "half a shape"],
)
def test_a_torn_file_costs_one_line(torn: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache" / build_fashion.PACKAGE / build_fashion.PLACE
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / f"{name}-ubyte.gz").write_bytes(torn)
    assert build_fashion.main(["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 2
    said = f"build_fashion: {folder}/{NAMES[0]}-ubyte.gz is no whole IDX file of bytes; remove it and run again\n"
    assert capsys.readouterr().err == said and not (tmp_path / "out").exists()


def test_without_apt_the_line_names_the_folder_that_is_looked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    asked = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert build_fashion.main(asked) == 2
    folder = Path(capsys.readouterr().err.split(" into ")[1].strip())
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / f"{name}-ubyte.gz").write_bytes(WHOLE)
    assert build_fashion.main(asked) == 2
    assert "is not Fashion-MNIST" in capsys.readouterr().err  # it was found there
