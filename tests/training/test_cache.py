"""Caches are kept item by item: of a changed set only what changed is computed; pixels never have to fit in memory."""

import copy
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen.data import Picture, load_pixels
from latentgen.models.latent import Latent
from latentgen.training import cache
from latentgen.training.cache import Items, cached_items, key_of, latent_items, latent_moments, text_items

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def squares(keys: list[int], asked: list[int], name: str = "squares") -> Items:
    def parts(rows: np.ndarray) -> Iterator[np.ndarray]:
        asked.extend(keys[row] for row in rows)
        for few in np.array_split(rows, max(1, len(rows) // 2)):
            yield np.array([[keys[row] ** 2] for row in few], np.float32)

    return Items(name, [key_of(str(key).encode()) for key in keys], (1,), np.float32, parts)


def test_only_what_is_new_is_computed_and_every_row_stands_in_its_place(tmp_path: Path) -> None:
    asked: list[int] = []
    for keys, new in [([3, 1, 2], [3, 1, 2]), ([2, 5, 3, 3], [5]), ([3, 1, 2], []), ([5, 1], []), ([1, 7, 8], [7, 8])]:
        asked.clear()
        found = cached_items(tmp_path, squares(keys, asked))
        assert asked == new
        assert isinstance(found, np.memmap) and found[:, 0].tolist() == [key**2 for key in keys]
    asked.clear()
    cached_items(tmp_path, squares([3, 1], asked, "cubes"))
    assert asked == [3, 1]  # another network's rows are not taken


def test_rows_whose_keys_are_lost_or_torn_are_computed_again(tmp_path: Path) -> None:
    asked: list[int] = []
    cached_items(tmp_path, squares([1, 2], asked))
    (keys,) = tmp_path.glob("*.keys")
    keys.write_bytes(keys.read_bytes()[:-1])
    asked.clear()
    assert cached_items(tmp_path, squares([2, 3], asked))[:, 0].tolist() == [4, 9] and asked == [2, 3]


@pytest.mark.parametrize("torn", [b"", b"\x93NUMPY"])
def test_rows_of_a_torn_array_are_computed_again(tmp_path: Path, torn: bytes) -> None:
    asked: list[int] = []
    cached_items(tmp_path, squares([1, 2], asked))
    (array,) = tmp_path.glob("*.npy")
    array.write_bytes(torn)
    asked.clear()
    assert cached_items(tmp_path, squares([2, 3], asked))[:, 0].tolist() == [4, 9] and asked == [2, 3]


def test_a_cut_computation_leaves_nothing(tmp_path: Path) -> None:
    def torn(rows: np.ndarray) -> Iterator[np.ndarray]:
        yield np.zeros((1, 1), np.float32)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cached_items(tmp_path, Items("x", [b"a" * 16, b"b" * 16], (1,), np.float32, torn))
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_the_same_bytes_and_another_shape_have_rows_of_their_own(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    wide = np.full((2, 32, 64, 3), 255, np.uint8)
    tall = wide.reshape(2, 64, 32, 3)
    for pixels in (wide, tall, wide):
        found = cached_items(tmp_path, latent_items(parts["vae"], pixels, CPU))
        expected = np.concatenate(list(latent_moments(parts["vae"], pixels, CPU)))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-5)
    square = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert key_of(square) == hashlib.sha256(square.tobytes()).digest()[:16]  # as ever, so what was kept stays valid


def test_an_array_of_another_shape_or_a_torn_one_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    np.save(path, np.ones((3, 2), np.float32))
    for damaged in (path.read_bytes(), b"\x93NUMPY", b""):
        path.write_bytes(damaged)
        found = cache.cached(path, (2, 3), np.float32, lambda: iter([np.full((2, 3), 7, np.float32)]))
        assert found.shape == (2, 3) and (found == 7).all()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system has no posix_fallocate")
def test_the_disk_sets_a_cache_aside_before_it_is_filled(tmp_path: Path) -> None:
    """A write to a mapped page that a full disk has no block for kills the process."""
    held: list[int] = []

    def parts() -> Iterator[np.ndarray]:
        (aside,) = tmp_path.iterdir()
        held.append(aside.stat().st_blocks * 512)
        yield np.zeros((256, 1024), np.float32)

    cache.cached(tmp_path / "array.npy", (256, 1024), np.float32, parts)
    assert held[0] >= 2**20


def test_one_changed_picture_is_one_picture_for_the_vae(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    vae, seen = parts["vae"], []
    encode = type(vae).encode
    monkeypatch.setattr(type(vae), "encode", lambda self, x, *rest: seen.append(len(x)) or encode(self, x, *rest))
    first = np.array(cached_items(tmp_path, latent_items(vae, pixels, CPU)))
    assert seen == [6]
    changed = pixels.copy()
    changed[4] = 255 - changed[4]
    again = cached_items(tmp_path, latent_items(vae, changed, CPU))
    assert seen == [6, 1]
    np.testing.assert_array_equal(np.delete(again, 4, 0), np.delete(first, 4, 0))
    np.testing.assert_allclose(again[4], next(iter(latent_moments(vae, changed[4:5], CPU)))[0], atol=1e-6)
    cached_items(tmp_path, latent_items(vae, changed[::-1], CPU))
    cached_items(tmp_path, latent_items(vae, pixels, CPU))
    assert sum(seen[2:-1]) == 0 and seen[2:] == [1]  # encoded here above to compare, and never again


def test_latents_are_shifted_and_scaled_as_the_pipeline_has_them(parts: dict[str, Any], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    vae = copy.deepcopy(parts["vae"])
    before, plain = latent_items(vae, pixels, CPU).name, next(iter(latent_moments(vae, pixels, CPU)))
    vae.register_to_config(shift_factor=0.5)
    items = latent_items(vae, pixels, CPU)
    mean, spread = np.array(cached_items(tmp_path, items)).swapaxes(0, 1)
    assert items.name != before
    np.testing.assert_allclose(mean, plain[:, 0] - 0.5 * vae.config.scaling_factor, atol=1e-6)
    np.testing.assert_array_equal(spread, plain[:, 1])
    shown = Latent(vae).decode(torch.from_numpy(mean))
    torch.testing.assert_close(shown, Latent(parts["vae"]).decode(torch.from_numpy(plain[:, 0])))


def test_one_changed_caption_is_one_caption_for_the_text_encoder_and_another_network_is_all(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = cache.text_states

    def counted(model: Any, words: Any, texts: Any, device: Any, *, empty: bool = True) -> Iterator[np.ndarray]:
        seen.append(list(texts))
        return real(model, words, texts, device, empty=empty)

    monkeypatch.setattr(cache, "text_states", counted)
    encoder, words = parts["text_encoder"], parts["tokenizer"]
    cached_items(tmp_path, text_items(encoder, words, ("a red apple", "a blue bird"), CPU))
    cached_items(tmp_path, text_items(encoder, words, ("a red apple", "a green frog"), CPU))
    assert seen == [["a red apple", "a blue bird", ""], ["a green frog"]]
    weight = next(iter(encoder.parameters()))
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(0.1)
        cached_items(tmp_path, text_items(encoder, words, ("a red apple",), CPU))
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert seen[2] == ["a red apple", ""]


def test_one_changed_file_is_one_picture_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(5)]
    for n, path in enumerate(paths):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(path)
    pictures = [Picture(path, ("x",)) for path in paths]
    load_pixels(pictures, 8, tmp_path / "cache")
    decoded: list[str] = []
    real = load_pixels.__globals__["_try_decode"]

    def counted(picture: Picture, *rest: Any) -> Any:
        decoded.append(picture.path.name)
        return real(picture, *rest)

    monkeypatch.setattr("latentgen.data.pixels._try_decode", counted)
    Image.new("RGB", (8, 8), (99, 0, 0)).save(paths[3])
    assert load_pixels(pictures, 8, tmp_path / "cache").array[:, 0, 0, 0].tolist() == [0, 1, 2, 99, 4]
    assert decoded == ["3.png"]
    decoded.clear()
    assert load_pixels(pictures, 8, tmp_path / "cache", "black").array.shape == (5, 8, 8, 3)
    assert len(decoded) == 5  # another transform


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit that Linux has")
def test_pixels_larger_than_the_memory_allowed_are_divided_and_hashed(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from latentgen.data import Picture, Pixels
from latentgen.training.intake import divide
rows = 16000  # 16000 * 64 * 64 * 3 bytes: 188 MiB
array = np.lib.format.open_memmap(sys.argv[1], mode="w+", dtype=np.uint8, shape=(rows, 64, 64, 3))
array[7] = 3
array = np.load(sys.argv[1], mmap_mode="r")
pictures = tuple(Picture(Path(f"{n}.png"), ("x",), "test" if n >= rows - 4 else "train") for n in range(rows))
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 64 * 2**20,) * 2)
try:
    np.array(array)
except MemoryError:
    print("does not fit")
data = divide(Path("x"), Pixels(array, pictures, ()), "test", {})
print(len(data.fingerprint), data.pixels[[7, 9]].sum(), data.pixels.shape, len(data.held_pixels))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pixels.npy")], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"does not fit\n64 {64 * 64 * 3 * 3} (15996, 64, 64, 3) 4\n"
