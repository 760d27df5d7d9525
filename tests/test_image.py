"""A picture's PNG holds its settings, encodes to the same bytes, and is refused in one line when it says nothing."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from latentgen import InputError
from latentgen.image import Picture, read_settings

SETTINGS = {
    "prompt": "a red apple",
    "negative_prompt": "",
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
    "sampler": "ddim",
    "seed": 2**64 - 1,
    "height": 8,
    "width": 12,
    "weights": {"name": "tiny", "path": None, "sha256": "ab" * 32},
    "latentgen": "0.1.0",
}


@pytest.fixture
def picture() -> Picture:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Picture.of(pixels, SETTINGS)


def test_a_picture_is_an_ordinary_pil_image(picture: Picture) -> None:
    assert isinstance(picture, Image.Image) and picture.size == (12, 8) and picture.mode == "RGB"
    expected = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(picture), expected)
    assert picture.resize((6, 4)).size == (6, 4)


def test_its_png_is_the_same_every_time_and_holds_the_settings(picture: Picture, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    picture.save(str(tmp_path / "b.PNG"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.PNG").read_bytes() == picture.png()
    assert read_settings(tmp_path / "a.png") == SETTINGS


def test_a_pickle_and_a_deep_copy_hold_the_settings_too(picture: Picture) -> None:
    for other in (pickle.loads(pickle.dumps(picture)), copy.deepcopy(picture)):
        assert other.settings == SETTINGS and other.png() == picture.png()


def test_other_formats_and_a_pnginfo_of_ones_own_are_left_alone(picture: Picture, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.jpg")
    info = PngImagePlugin.PngInfo()
    info.add_text("mine", "yes")
    picture.save(tmp_path / "a.png", pnginfo=info)
    with Image.open(tmp_path / "a.png") as image:
        assert image.info == {"mine": "yes"}
    with pytest.raises(InputError, match="says nothing of how it was made"):
        read_settings(tmp_path / "a.jpg")


def test_what_cannot_be_read_gets_one_line(picture: Picture, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no picture at"):
        read_settings(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        read_settings(tmp_path / "text.png")
    (tmp_path / "torn.png").write_bytes(picture.png()[:-40])
    with pytest.raises(InputError, match="cannot be read as a picture"):
        read_settings(tmp_path / "torn.png")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        read_settings(tmp_path)
    for text, line in [("{", "settings are torn"), ("[]", "no JSON object")]:
        info = PngImagePlugin.PngInfo()
        info.add_text("latentgen", text)
        picture.save(tmp_path / "odd.png", pnginfo=info)
        with pytest.raises(InputError, match=line):
            read_settings(tmp_path / "odd.png")
