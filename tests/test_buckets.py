"""Pictures keep nearly their shape: cut no more than allowed, enlarged only when asked, a batch of one shape each."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps

from latentgen.data import Buckets, Picture, load_pixels, read_folder, write_ledger
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.schedule import from_config
from latentgen.errors import InputError
from latentgen.training.captions import CaptionTable
from latentgen.training.denoise import BucketLatents, DenoiseObjective, Denoising, Latents, TextStates
from latentgen.training.draw import BucketOrder, Draw, Order
from latentgen.training.intake import divide, in_shapes, read_pictures
from tests.forked import verb

ROOT = Path(__file__).parents[1]
ICONS = ROOT / "tests" / "data" / "icons"
EIGHT = Buckets.around(64, 8, 2.0, 0.1, False)


@pytest.mark.parametrize(("size", "step", "ratio"), [(64, 8, 2.0), (512, 64, 2.0), (32, 16, 4.0), (64, 64, 1.0)])
def test_shapes_are_multiples_of_the_step_within_the_area_and_the_ratio(size: int, step: int, ratio: float) -> None:
    shapes = Buckets.around(size, step, ratio, 0.1, False).shapes
    assert (size, size) in shapes and len(set(shapes)) == len(shapes)
    for width, height in shapes:
        assert width % step == height % step == 0 and (height, width) in shapes
        assert max(width, height) <= ratio * min(width, height)
        larger = (max(width, height) * (min(width, height) + step)) > size**2
        assert width * height <= size**2 and larger  # no row more would fit
    if (size, step) == (512, 64):
        assert shapes == ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))
    with pytest.raises(InputError, match="no multiple of the buckets' step"):
        Buckets.around(100, 64, 2.0, 0.1, False)


@pytest.mark.parametrize("size", [(64, 64), (300, 200), (200, 300), (90, 71), (640, 333)])
def test_what_is_lost_is_what_pillow_cuts_away(size: tuple[int, int]) -> None:
    fit = EIGHT.fit(*size)
    ramp = np.broadcast_to(((np.arange(size[0], dtype=np.float32) + 0.5) / size[0]), size[::-1])
    rise = np.broadcast_to(((np.arange(size[1], dtype=np.float32) + 0.5) / size[1])[:, None], size[::-1])
    shape = EIGHT.shapes[fit.bucket]
    spans = []
    for values, axis in ((ramp, 1), (rise, 0)):
        seen = np.asarray(ImageOps.fit(Image.fromarray(np.ascontiguousarray(values)), shape, Image.Resampling.BOX))
        line = seen.mean(axis=1 - axis)
        spans.append((line[-1] - line[0]) * len(line) / (len(line) - 1))  # from the first pixel's edge to the last's
    assert 1 - spans[0] * spans[1] == pytest.approx(fit.lost, abs=0.03)
    others = [w * h / (size[0] * size[1] * max(w / size[0], h / size[1]) ** 2) for w, h in EIGHT.shapes]
    assert 1 - fit.lost == pytest.approx(max(others))


def put(path: Path, size: tuple[int, int], shade: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(shade).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    path.with_suffix(".txt").write_text(f"a picture of shade {shade}")
    return path


def test_what_would_be_cut_or_enlarged_too_much_is_left_out_and_listed(tmp_path: Path) -> None:
    for shade, (name, size) in enumerate(
        {"square": (80, 80), "wide": (180, 100), "panorama": (400, 80), "small": (40, 40), "tall": (64, 100)}.items()
    ):
        put(tmp_path / "d" / f"{name}.png", size, shade)
    folder = read_folder(tmp_path / "d")
    ledger = write_ledger(folder, 64, buckets=EIGHT)
    assert ledger.files == {"used": 3, "description": 5, "does not fit": 2}
    why = {entry.file: entry.reason for entry in ledger.entries if entry.status == "does not fit"}
    assert "400 x 80: 67% would be cut away in the nearest bucket, 80 x 48; at most 10%" in why["panorama.png"]
    assert "40 x 40: would be enlarged 1.6 times" in why["small.png"]
    assert all(entry.lost <= 0.1 and entry.scale <= 1 for entry in ledger.entries)
    asked = write_ledger(folder, 64, buckets=Buckets.around(64, 8, 2.0, 0.1, True))
    assert asked.files["used"] == 4 and asked.remarks["upscaled"] == 1
    with pytest.raises(InputError, match="none of 5 pictures fits 512 x 512"):
        write_ledger(folder, 64, buckets=Buckets(((512, 512),), 0.0))

    settings: Any = {"captions": "files", "background": "white", "held_out": "test", "part": 0.4}
    read, pixels, _ = read_pictures(tmp_path / "d", 64, tmp_path / "cache", buckets=EIGHT, **settings)
    assert {problem.path.name for problem in read.problems} == {"panorama.png", "small.png"}
    data = in_shapes(divide(read.root, pixels, "test", {}), read.root, EIGHT, tmp_path / "cache", "white")
    assert data.shaped is not None and data.held_shaped is not None
    for shaped, pictures in ((data.shaped, data.pictures), (data.held_shaped, data.held)):
        for bucket, row, picture in zip(shaped.bucket, shaped.row, pictures, strict=True):
            expected = ImageOps.fit(Image.open(picture.path), EIGHT.shapes[bucket], Image.Resampling.LANCZOS)
            np.testing.assert_array_equal(shaped.pixels[bucket][row], np.asarray(expected))


def test_no_picture_is_enlarged_to_its_square_unless_asked_for(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from latentgen.cli import app
    from latentgen.foundations import Foundations
    from latentgen.recipe import read_recipe

    sizes = {"whole": (32, 32), "large": (80, 40), "long": (90, 31), "small": (16, 16), "high": (32, 64)}
    for shade, (name, size) in enumerate(sizes.items()):
        put(tmp_path / "d" / f"{name}.png", size, shade)
    for asked, kept in ((False, {"whole", "large", "high"}), (True, set(sizes))):
        recipe = tmp_path / f"{asked}.toml"
        text = (ROOT / "tests" / "data" / "tiny.toml").read_text()
        recipe.write_text(text.replace("size = 32", "size = 32\nupscale = true") if asked else text)
        said: list[str] = []
        run = Foundations(read_recipe(recipe), tmp_path / f"out-{asked}", tmp_path / "d", said.append)
        assert {picture.path.stem for picture in (*run.data.pictures, *run.data.held)} == kept
        told = [line for line in said if "left out" in line]
        assert len(told) == len(sizes) - len(kept) == run.ledger.files.get("does not fit", 0)
        assert run.ledger.remarks.get("upscaled", 0) == (2 if asked else 0)
        assert asked or any("small.png: 16 x 16: would be enlarged 2 times for 32 x 32" in line for line in told)
        done = CliRunner().invoke(
            app, ["doctor", str(tmp_path / "d"), "--recipe", str(recipe), "--json", str(tmp_path / "ledger.json")]
        )
        assert done.exit_code == 0, done.output
        assert json.loads((tmp_path / "ledger.json").read_text())["files"] == run.ledger.files
    for name in ("whole", "large", "high"):
        (tmp_path / "d" / f"{name}.png").unlink()
        (tmp_path / "d" / f"{name}.txt").unlink()
    with pytest.raises(InputError, match=r"none of 2 pictures fits 32 x 32; the first is .* upscale = true allows it"):
        _ = Foundations(read_recipe(tmp_path / "False.toml"), tmp_path / "none", tmp_path / "d", print).data


def test_pixels_of_a_shape_are_kept_apart_from_squares(tmp_path: Path) -> None:
    picture = [Picture(put(tmp_path / "a.png", (90, 60)), ("x",))]
    for _ in range(2):
        assert load_pixels(picture, (24, 16), tmp_path / "c").array.shape == (1, 16, 24, 3)
        assert load_pixels(picture, 16, tmp_path / "c").array.shape == (1, 16, 16, 3)
        assert load_pixels(picture, (16, 24), tmp_path / "c").array.shape == (1, 24, 16, 3)


def test_a_batch_holds_one_bucket_and_every_item_is_seen_as_often_as_it_weighs() -> None:
    buckets = np.array([0] * 50 + [1] * 13 + [3] * 2)
    weights = np.where(np.arange(65) == 3, 2.0, 1.0)
    order = BucketOrder(weights, 8, 5, buckets)
    steps = 825  # 100 epochs of 66 / 8 batches
    seen: Counter[int] = Counter()
    for step in range(steps):
        items = order.items(step)
        assert len(items) == 8 and len(set(buckets[items])) == 1
        seen.update(items.tolist())
    for item in range(65):
        assert abs(seen[item] - 100 * weights[item]) <= 12, item
    for step in (0, 7, 400, steps - 1):  # from nothing, as a resumed run asks
        np.testing.assert_array_equal(BucketOrder(weights, 8, 5, buckets).items(step), order.items(step))
    assert any((BucketOrder(weights, 8, 6, buckets).items(s) != order.items(s)).any() for s in range(5))
    first = [order.items(step) for step in range(40)]
    ours = np.concatenate([items for items in first if buckets[items[0]] == 0])[:50]
    assert len(set(ours.tolist())) >= 48  # the one that weighs twice is there twice: an epoch repeats nothing else


def test_one_bucket_gives_the_loss_of_no_buckets_and_several_give_each_its_own(parts: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    square = np.abs(random.standard_normal((4, 2, 4, 8, 8))).astype(np.float32)
    wide = np.abs(random.standard_normal((2, 2, 4, 4, 12))).astype(np.float32)
    states = TextStates(random.standard_normal((7, 5, 16)).astype(np.float16))
    schedule = from_config({"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}).schedule

    def objective(latents: Latents, count: int) -> DenoiseObjective:
        table = CaptionTable([Picture(Path(f"{n}.png"), (f"caption {n}",)) for n in range(count)])
        denoising = Denoising(schedule, Prediction("v"))
        rest = (np.ones(count), (latents, states), Accelerator())
        return DenoiseObjective(parts["unet"], denoising, latents, table, states, *rest, sheet=lambda: None)

    plain = objective(Latents(square), 4)
    one = objective(BucketLatents(square[:0], (square,), np.zeros(4, int), np.arange(4)), 4)
    items = np.array([2, 0, 3])
    assert torch.equal(plain.loss(items, Draw(0, 3, 3))["loss"], one.loss(items, Draw(0, 3, 3))["loss"])
    assert plain.validate() == one.validate() and plain.buckets is None
    bucket, row = np.array([0, 1, 0, 0, 1, 0]), np.array([0, 0, 1, 2, 1, 3])
    both = objective(BucketLatents(square[:0], (square, wide), bucket, row), 6)
    order = BucketOrder(both.weights, 2, 0, bucket)
    losses = [both.loss(order.items(step), Draw(0, step, 2))["loss"] for step in range(6)]
    assert all(torch.isfinite(loss) for loss in losses) and np.isfinite(both.validate()["validation_loss"])
    eps = torch.zeros(2, 4, 4, 12)
    np.testing.assert_array_equal(both._versions[0].sample(np.array([4, 1]), eps), wide[[1, 0], 0])


def test_the_order_without_buckets_is_what_it_was() -> None:
    seen = [Order(np.ones(7), 4, 0).items(step).tolist() for step in (0, 1, 3)]
    assert seen == [[0, 6, 3, 4], [5, 1, 2, 0], [6, 2, 3, 2]]
    weighted = [Order(np.array([1, 2, 0.5, 1]), 4, 3).items(step).tolist() for step in (0, 1, 3)]
    assert weighted == [[1, 2, 1, 3], [0, 1, 1, 3], [3, 0, 1, 1]]
    assert sorted(np.concatenate([Order(np.ones(8), 4, 0).items(s) for s in (0, 1)]).tolist()) == list(range(8))


def test_a_recipe_asks_for_shapes_that_its_networks_take(tmp_path: Path) -> None:
    from latentgen.foundations import buckets_of
    from latentgen.recipe import read_recipe

    text = (ROOT / "tests" / "data" / "tiny.toml").read_text()

    def asked(keys: str, unet: str = "") -> Buckets | None:
        recipe = text.replace("[tokenizer]", f"{keys}\n[tokenizer]").replace("[unet]\n", f"[unet]\n{unet}\n")
        (tmp_path / "r.toml").write_text(recipe)
        return buckets_of(read_recipe(tmp_path / "r.toml"))

    assert asked("") is None
    found = asked("[data.buckets]\nratio = 3\nlargest_crop = 0.2")
    assert found == Buckets(((16, 48), (32, 32), (48, 16)), 0.2, False)  # 8 for the VAE times 2 for the U-Net
    with pytest.raises(InputError, match=r"step 8 .* does not suit VAE and U-Net; give a multiple of 16"):
        asked("[data.buckets]\nstep = 8")
    with pytest.raises(InputError, match="align compares pictures with squares"):
        asked("[data.buckets]", "align = 0.5")
    with pytest.raises(InputError, match=r"upscale in \[data\] is said of squares"):
        text = text.replace("size = 32", "size = 32\nupscale = true")
        asked("[data.buckets]")
    text = text.replace("upscale = true\n", "")
    with pytest.raises(InputError, match="did you mean 'largest_crop'"):
        asked("[data.buckets]\nlargest_crops = 0.5")


@pytest.mark.slow
def test_a_run_with_buckets_and_varied_captions_trains_to_its_end_and_says_what_is_in_each(tmp_path: Path) -> None:
    pictures = [p for p in read_folder(ICONS).pictures if p.attributes["style"] == "noto"][:13]
    for number, picture in enumerate(pictures):
        place = tmp_path / "data" / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        size = [(48, 48), (60, 20), (200, 20)][0 if number < 6 else 1 if number < 12 else 2]
        picture_of = Image.open(picture.path).convert("RGB")
        picture_of.resize(size).save(place)
        place.with_suffix(".txt").write_text(f"{picture.captions[0]}, flat, drawn by hand, on white\nan emoji")
    text = (ROOT / "tests" / "data" / "tiny.toml").read_text().replace("steps = 12", "steps = 3")
    text = text.replace("steps = 16", "steps = 3").replace("batch = 32", "batch = 4").replace("batch = 8", "batch = 4")
    text = text.replace("[data.weights.group]\nsmileys-emotion = 0.5", "[data.buckets]\nstep = 16\nratio = 3")
    text = text.replace("[unet]\n", "[unet]\ncaption_orders = 3\nlong_captions = 0.5\n")
    (tmp_path / "r.toml").write_text(text)
    done = verb("train", tmp_path / "r.toml", "--data", tmp_path / "data", "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert "data: left out" in done.stderr and "200 x 20" in done.stderr and "does not fit" in done.stderr
    assert "data: buckets 32 x 32: " in done.stderr and "48 x 16: " in done.stderr and "unet: step 3/3" in done.stderr
    taught = int(done.stderr.split(" pictures to train on")[0].rsplit(" ", 1)[-1])
    # each one's own caption in three orders, the one they share, and the empty one
    assert taught <= 12 and f"cache: computing {3 * taught + 2} of {3 * taught + 2} rows of text-" in done.stderr
