"""Pictures varied: mirrored where captions stay true, scaled as closed forms say, each by its own pixels alone."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from latentgen.build import Run
from latentgen.data import Picture
from latentgen.data.kept import key_of
from latentgen.data.variants import Augmentation, Varied, scaled
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.schedule import from_config
from latentgen.errors import InputError
from latentgen.finetuning.settings import Finetune, Start, choose
from latentgen.recipe import read_recipe
from latentgen.training.captions import CaptionTable
from latentgen.training.denoise import BucketLatents, DenoiseObjective, Denoising, Latents, TextStates, sampled
from latentgen.training.draw import Draw

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "tiny.toml"
ALL = np.arange(5)


def noise(count: int = 5, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def told(*captions: str) -> list[Picture]:
    return [Picture(Path(f"{n}.png"), (text, "a picture")) for n, text in enumerate(captions)]


def test_every_second_version_is_mirrored_but_not_where_a_caption_names_a_side() -> None:
    what = Augmentation(versions=4, mirror=True)
    may = what.may_mirror(told("a cat", "an arrow to the Left", "leftover pizza", "the letter a", "a right angle"))
    assert may.tolist() == [True, False, True, False, False]  # whole words, in any case
    pixels = noise()
    versions = [version[ALL] for version in what.others(pixels, may)]
    turned = np.where(may[:, None, None, None], pixels[:, :, ::-1], pixels)
    for found, expected in zip(versions, (turned, pixels, turned), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert Augmentation(mirror=True, sided=()).may_mirror(told("left")).all()
    assert Augmentation(mirror=True, sided=("c++",)).may_mirror(told("a C++ book", "cc")).tolist() == [False, True]
    assert not Augmentation(scale=(0.9, 1.0)).may_mirror(told("a cat")).any()


@pytest.mark.parametrize(("left", "top"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.25)])
@pytest.mark.parametrize("scale", [0.5, 0.8, 1.25, 2.0])
def test_a_scaled_picture_shows_the_places_that_the_factor_and_the_room_say(
    scale: float, left: float, top: float
) -> None:
    height, width = 40, 60
    across = np.broadcast_to(np.arange(width) * 4, (height, width))
    down = np.broadcast_to(np.arange(height)[:, None] * 6, (height, width))
    found = scaled(np.stack([across, down, down], axis=-1).astype(np.uint8), scale, left, top).astype(float)
    x = (np.arange(width) + 0.5) / scale + left * (width - width / scale) - 0.5  # places of the picture itself
    y = (np.arange(height) + 0.5) / scale + top * (height - height / scale) - 0.5
    inside = (x > 2.5) & (x < width - 3.5)  # beyond it lies the repeated edge, and near it the filter's reach
    np.testing.assert_allclose(found[height // 2, inside, 0], 4 * x[inside], atol=1.0)
    inside = (y > 2.5) & (y < height - 3.5)
    np.testing.assert_allclose(found[inside, width // 2, 1], 6 * y[inside], atol=1.0)
    beyond = x < -3
    np.testing.assert_allclose(found[height // 2, beyond, 0], 0, atol=1.0)
    assert beyond.any() == (scale < 1 and left > 0)


def test_a_smaller_picture_lies_inside_its_frame_wherever_it_lies() -> None:
    white = np.full((5, 32, 32, 3), 255, np.uint8)
    white[:, 1:-1, 1:-1] = np.arange(0, 100, 20, dtype=np.uint8)[:, None, None, None]  # five different ones
    (version,) = Augmentation(versions=2, scale=(0.6, 0.9)).others(white, np.zeros(5, bool))
    dark = version[ALL][..., 0] < 180
    assert not (dark[:, 0] | dark[:, -1] | dark[:, :, 0] | dark[:, :, -1]).any()  # nothing is cut
    sides = np.sqrt(dark.sum((1, 2))) / 30
    assert ((sides > 0.57) & (sides < 0.93)).all() and len(set(sides.round(3).tolist())) == 5
    places = {(int(one.any(1).argmax()), int(one.any(0).argmax())) for one in dark}
    assert len(places) >= 4


def test_a_thing_that_touches_the_edge_of_a_plain_ground_ends_there() -> None:
    picture = np.full((40, 40, 3), (250, 240, 230), np.uint8)
    picture[18:22, :] = 0  # from edge to edge
    found = scaled(picture, 0.5, 0.5, 0.5)
    assert (found[:, :6] == picture[0, 0]).all() and (found[:, 34:] == picture[0, 0]).all()  # the filter reaches 3
    assert (found[19:21, 13:27] < 100).all()
    picture[10:40, :] = 0  # no ground: the edge is repeated
    assert (scaled(picture, 0.5, 0.5, 0.5)[20:, :9] < 40).all()


def test_how_a_picture_is_varied_depends_on_its_own_pixels_alone() -> None:
    what = Augmentation(versions=3, mirror=True, scale=(0.7, 1.3))
    pixels = noise()
    whole = what.others(pixels, np.ones(5, bool))
    some = what.others(pixels[[4, 1]], np.ones(2, bool))
    for ours, theirs in zip(whole, some, strict=True):
        np.testing.assert_array_equal(ours[ALL][[4, 1]], theirs[np.arange(2)])
        assert [ours.keys[4], ours.keys[1]] == theirs.keys and len(set(ours.keys)) == 5
    assert not set(whole[0].keys) & set(whole[1].keys) and not set(whole[0].keys) & {key_of(one) for one in pixels}
    other = Augmentation(versions=3, mirror=True, scale=(0.7, 1.3), seed=1).others(pixels, np.ones(5, bool))
    assert not set(other[0].keys) & set(whole[0].keys)
    unmirrored = what.others(pixels, np.zeros(5, bool))
    assert not set(unmirrored[0].keys) & set(whole[0].keys) and unmirrored[1].keys == whole[1].keys


def test_each_version_is_seen_equally_often_and_in_itself() -> None:
    random = np.random.default_rng(0)
    versions = [Latents(random.standard_normal((6, 2, 4, 8, 8)).astype(np.float32)) for _ in range(3)]
    items = np.arange(3000) % 6
    found = sampled(versions, items, Draw(0, 0, len(items)), torch.device("cpu"))
    eps = Draw(0, 0, len(items)).normal(4, 8, 8)
    each = torch.stack([version.sample(items, eps) for version in versions])
    which = (each == found).flatten(2).all(2)
    assert (which.sum(0) == 1).all()
    assert all(abs(int(count) - 1000) < 120 for count in which.sum(1))  # 4.6 standard deviations
    assert torch.equal(sampled(versions[:1], items, Draw(0, 0, len(items)), torch.device("cpu")), each[0])
    rows = slice(1024, 2048)  # a process of several draws the versions that one process would
    part = sampled(versions, items[rows], Draw(0, 0, len(items), rows), torch.device("cpu"))
    assert torch.equal(part, found[rows])


def test_equal_versions_give_the_loss_of_one(parts: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    latents = Latents(np.abs(random.standard_normal((6, 2, 4, 8, 8))).astype(np.float32))
    states = TextStates(random.standard_normal((7, 5, 16)).astype(np.float16))
    schedule = from_config({"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}).schedule
    table = CaptionTable([Picture(Path(f"{n}.png"), (f"caption {n}",)) for n in range(6)])
    rest = (table, states, np.ones(6), (latents, states), Accelerator())

    def losses(latents: Latents, *others: Latents) -> torch.Tensor:
        denoising = Denoising(schedule, Prediction("v"), caption_dropout=0.0)
        made = DenoiseObjective(parts["unet"], denoising, latents, *rest, others=others, sheet=lambda: None)
        with torch.no_grad():
            return torch.stack([made.loss(np.arange(6), Draw(0, step, 6))["loss"] for step in range(40)])

    # other times are drawn, as the versions are drawn before them; on average it is the same loss
    plain, doubled = losses(latents), losses(latents, latents)
    assert not torch.equal(plain, doubled)
    error = float((plain.var() / 40 + doubled.var() / 40).sqrt())
    assert abs(float(plain.mean() - doubled.mean())) < 4 * error
    bucket = BucketLatents(latents.moments[:0], (latents.moments,), np.zeros(6, int), np.arange(6))
    assert torch.equal(losses(bucket, bucket), doubled)


@pytest.mark.parametrize("buckets", [False, True])
def test_a_recipes_versions_are_encoded_once_in_every_shape(tmp_path: Path, buckets: bool) -> None:
    text = TINY.read_text().replace("steps = 12\n", "steps = 1\n").replace("steps = 16\n", "steps = 1\n")
    asked = "[unet.augment]\nversions = 3\nmirror = true\nscale = [0.8, 1.0]\n\n[unet.train]"
    text = text.replace("[unet.train]", asked)
    if buckets:
        text = text.replace("[tokenizer]", "[data.buckets]\nupscale = true\n\n[tokenizer]")
    (tmp_path / "r.toml").write_text(text)
    pictures = shutil.copytree(ROOT / "tests" / "data" / "icons", tmp_path / "pictures")
    recipe = read_recipe(tmp_path / "r.toml")

    def run() -> tuple[tuple[Latents, ...], Run, list[str]]:
        lines: list[str] = []
        made = Run(recipe, tmp_path / "out", pictures, lines.append)
        return made._varied_latents(), made, lines

    versions, made, lines = run()
    assert len(versions) == 2
    assert (
        sum(line.startswith("data: 3 versions of each picture; ") and "are mirrored too" in line for line in lines) == 1
    )
    data = made.data
    sizes = {(*version.shape(np.array([0])), sum(len(part) for part in version.parts(64))) for version in versions}
    assert sizes == {(4, 4, 4, len(data.pictures))}
    pixels = data.pixels if data.shaped is None else data.shaped.pixels[data.shaped.bucket[0]]
    may = Augmentation(mirror=True).may_mirror(data.pictures[:1])
    (expected,) = Varied(pixels[:1], 1, may, Augmentation(3, True, (0.8, 1.0)), [key_of(pixels[0])])[np.arange(1)]
    encoded = made._latents(np.stack([expected])).moments[0]
    own = versions[0]
    assert isinstance(own, BucketLatents) == buckets
    if isinstance(own, BucketLatents):
        own = own._own(np.array([0]))
    np.testing.assert_allclose(own.moments[0], encoded, atol=1e-5)
    _, _, again = run()
    assert not any(line.startswith("cache: computing") for line in again)


def test_what_cannot_be_meant_is_one_line(tmp_path: Path) -> None:
    def read(keys: str, unet: str = "") -> Any:
        text = TINY.read_text().replace("[unet]\n", f"[unet]\n{unet}\n")
        (tmp_path / "r.toml").write_text(text.replace("[unet.train]", f"[unet.augment]\n{keys}\n\n[unet.train]"))
        return read_recipe(tmp_path / "r.toml").unet.augment

    assert read("scale = [0.9, 1.0]").versions == read("mirror = true\nscale = [0.9, 1.0]").versions == 4
    assert read("mirror = true").versions == read("mirror = true\nversions = 2").versions == 2
    for keys, unet, line in (
        ("", "", "every version would be the same; set mirror = true, or scale"),
        ("mirror = true\nversions = 4", "", "set versions = 2 or none, or a scale too"),
        ('scale = [0.9, 1.0]\nsided = ["left"]', "", "sided says which pictures are not mirrored, and none is"),
        ("scale = [1.0, 0.9]", "", "write the smaller factor first"),
        ("scale = [0.1, 1.0]", "", "greater than or equal to 0.5"),
        ("mirror = true\nversions = 1", "", "greater than or equal to 2"),
        ("mirrored = true", "", "did you mean 'mirror'"),
        ("scale = [0.9, 1.0]", "align = 0.5", "align compares pictures as they are"),
    ):
        with pytest.raises(InputError, match=line):
            read(keys, unet)


def test_true_and_what_is_not_finite_are_no_numbers_of_fine_tuning_either() -> None:
    numbers = [name for name, field in Finetune.model_fields.items() if re.search("Whole|int|float", str(field))]
    assert len(numbers) > 20
    for name in set(numbers) - {"scale"}:
        with pytest.raises(InputError, match=f"^finetune: {name}: true is no number; write one$"):
            Finetune.of({name: True})
    with pytest.raises(InputError, match=r"^finetune: scale\.1: true is no number; write one$"):
        Finetune.of({"scale": (1.0, True)})
    with pytest.raises(InputError, match=r"^finetune: rate is inf: input should be a finite number$"):
        Finetune.of({"rate": float("inf")})


def test_fine_tuning_chooses_how_many_versions_and_refuses_what_cannot_be_meant() -> None:
    start = Start(weights=1_000_000, size=32)

    def versions(**asked: Any) -> int | None:
        settings = Finetune.of(asked)
        settings.check()
        return choose(settings, 20, start, 0).settings.versions

    assert versions() is None and versions(mirror=True) == 2
    assert versions(scale=(0.9, 1.1)) == 4 and versions(scale=(0.9, 1.1), versions=8) == 8
    for asked, line in (
        ({"versions": 3}, "would all be the same; give mirror or scale"),
        ({"versions": 1, "mirror": True}, "give versions = 2 or more"),
        ({"versions": 3, "mirror": True}, "a mirrored picture is one version more"),
        ({"scale": (1.2, 1.0)}, "give the smaller factor first"),
    ):
        with pytest.raises(InputError, match=line):
            Finetune.of(asked).check()
