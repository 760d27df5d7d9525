"""What a render opens while it is being imported: the same pictures, and mistakes said by who opens afterwards."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentgen import InputError, Pipeline
from latentgen.checkpoint import folder as reading
from latentgen.checkpoint import open_folder, read_manifest
from latentgen.models.onnx import ahead, session
from latentgen.models.onnx.ahead import open_ahead

ROOT = Path(__file__).parents[2]
NETWORKS = 4  # graphs of a folder: a U-Net has two


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Any, Any]]:
    """A cache of its own, and what has been begun."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield session._BEGUN
    session._BEGUN.clear()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ready copies that sessions are opened of, as they are."""
    found: list[str] = []
    whole = session._session

    def told(graph: Any, *arguments: Any, **more: Any) -> Any:
        if more.get("optimised"):
            found.append(Path(graph).parent.name)
        return whole(graph, *arguments, **more)

    monkeypatch.setattr(session, "_session", told)
    return found


def pixels(folder: Path) -> np.ndarray:
    output = Pipeline.from_pretrained(folder, engine="onnx")("a red apple", seed=1, num_inference_steps=2)
    return np.asarray(output.images[0])


def torn(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    whole[-5] ^= 64
    file.write_bytes(whole)


def test_what_was_begun_is_taken_once_and_gives_the_same_picture(
    folder: Path, begun: dict[Any, Any], opened: list[str]
) -> None:
    open_ahead(folder)
    assert not begun  # nothing is ready, and nothing is made so by it
    first = pixels(folder)
    opened.clear()
    open_ahead(str(folder))
    assert len(begun) == NETWORKS
    np.testing.assert_array_equal(pixels(folder), first)
    assert not begun and len(set(opened)) == len(opened) == NETWORKS
    np.testing.assert_array_equal(pixels(folder), first)
    assert len(opened) == 2 * NETWORKS  # sessions are not shared by pipelines


def test_large_weights_are_left_to_who_renders(
    folder: Path, begun: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    monkeypatch.setattr(ahead, "SMALL", size - 1)
    open_ahead(folder)
    assert not begun
    monkeypatch.setattr(ahead, "SMALL", size)
    open_ahead(folder)
    assert len(begun) == NETWORKS


def test_another_number_of_threads_opens_its_own(folder: Path, begun: dict[Any, Any], opened: list[str]) -> None:
    pixels(folder)
    open_ahead(folder)
    opened.clear()
    pipe = Pipeline.from_pretrained(folder, engine="onnx", threads=session.cores() + 1)
    assert pipe.machine is not None and pipe.machine["threads"] == session.cores() + 1
    assert len(begun) == NETWORKS and len(opened) >= NETWORKS


def test_a_torn_copy_is_made_anew(folder: Path, begun: dict[Any, Any]) -> None:
    first = pixels(folder)
    ready = Path(os.environ["XDG_CACHE_HOME"]) / "latentgen/onnx/ready"
    for weights in ready.glob("*/weights.bin"):
        torn(weights)
    open_ahead(folder)
    np.testing.assert_array_equal(pixels(folder), first)
    assert not begun


def test_hashes_are_compared_once_for_files_that_stay_as_they_are(
    folder: Path, tmp_path: Path, begun: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, hashed = shutil.copytree(folder, tmp_path / "copy"), []
    whole = reading.sha256
    monkeypatch.setattr(reading, "sha256", lambda path: hashed.append(path.name) or whole(path))
    open_folder(copy)
    listed = len(read_manifest(copy)["files"])
    assert len(hashed) == listed > NETWORKS
    open_folder(copy).verify()
    open_ahead(copy)
    pixels(copy)
    assert len(hashed) == listed
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    torn(weights)
    open_ahead(copy)
    for _ in range(2):
        with pytest.raises(InputError, match=r"is not the file the manifest names \(its SHA-256 differs\)"):
            pixels(copy)
    torn(weights)  # whole again
    pixels(copy)


@pytest.mark.parametrize("weights", ["nowhere", "org/name", "tests/models", "pyproject.toml"])
def test_what_cannot_be_opened_is_for_others_to_say(folder: Path, begun: dict[Any, Any], weights: str) -> None:
    pixels(folder)
    open_ahead(weights)
    open_ahead(folder, tokenizer="nowhere")  # a folder has one of its own
    assert not begun
    open_ahead(folder)
    assert len(begun) == NETWORKS


def test_the_command_line_opens_weights_before_it_imports_the_pipeline(
    folder: Path, tmp_path: Path, begun: dict[Any, Any]
) -> None:
    code = """
import sys
from importlib.abc import MetaPathFinder

class Watch(MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "latentgen.pipeline":
            session = sys.modules.get("latentgen.models.onnx.session")
            print(len(session._BEGUN) if session else 0, "begun")

sys.meta_path.insert(0, Watch())
from latentgen import cli
sys.argv = ["latentgen", *sys.argv[1:]]
cli.main()
"""

    def said(*options: str) -> subprocess.CompletedProcess[str]:
        arguments = ["render", "a red apple", "--seed", "1", "--weights", str(folder), *options]
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)

    made = []
    for count in (0, NETWORKS):
        target = tmp_path / f"{count}.png"
        ran = said("--steps", "2", "--out", str(target))
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.split() == [str(count), "begun", str(target)]
        made.append(target.read_bytes())
    assert made[0] == made[1]
    ran = said("--steps", "0")  # what was begun says nothing, and holds nothing up
    assert (ran.returncode, ran.stdout.split()) == (2, [str(NETWORKS), "begun"])
    assert ran.stderr == "latentgen: --steps is 0; it must be 1 or more\n"
