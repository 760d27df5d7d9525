"""Pixel models: every family and both kinds of blocks train, are judged, saved, read back, rendered and resumed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from latentgen import build
from latentgen.cli import app
from latentgen.errors import InputError
from latentgen.models.pixel import pixel_unet
from latentgen.pixels import is_pixel_folder
from latentgen.pixels.build import PixelRun, train
from latentgen.pixels.model import Family, PixelModel
from latentgen.pixels.recipe import read_pixel_recipe
from latentgen.pixels.weights import load_pixels, render_classes
from latentgen.rehearsal import rehearse
from latentgen.training.stage import Report

OBJECTIVES = ("ddpm", "ve", "vdm", "flow")
FOUND = ("bound_total", "bound_prior", "bound_diffusion", "bound_reconstruction", "ode")


def silent(_: object) -> None:
    """A report to nobody."""


def model(objective: str, blocks: str = "resnet", **told: object) -> PixelModel:
    torch.manual_seed(0)
    family = Family(objective, **{"levels": 20, **told})  # type: ignore[arg-type]
    variance = family.learns_variance
    unet = pixel_unet(
        blocks, channels=(8, 16), layers=1, side=8, picture_channels=1, classes=2, patch=2, learned_variance=variance
    )
    return PixelModel(unet, family, 2, (1, 8, 8), 2)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_key_switches_the_family_and_the_run_reports_all_terms(
    objective: str, recipe: Path, bars: Path, tmp_path: Path
) -> None:
    folder = train(recipe, tmp_path / "out", bars, silent, objective=objective)
    assert is_pixel_folder(folder)
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1  # safetensors alone would keep its files from everybody else
    found = json.loads((folder / "metrics.json").read_text())["likelihood"]
    assert all(np.isfinite(found[name]) and np.isfinite(found[f"{name}_error"]) for name in FOUND)
    parts = sum(found[f"bound_{part}"] for part in ("prior", "diffusion", "reconstruction"))
    assert parts == pytest.approx(found["bound_total"], abs=1e-9)
    assert json.loads((folder / "recipe.json").read_text())["objective"] == objective
    assert (folder / "schedule.safetensors").is_file() == (objective == "vdm")


@pytest.mark.parametrize("blocks", ["resnet", "convnext"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_kinds_of_blocks_learn_one_picture(blocks: str, objective: str) -> None:
    learner = model(objective, blocks, variance="learned-range")
    optimizer = torch.optim.Adam(learner.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    x0, labels = torch.full((16, 1, 8, 8), -0.5), torch.zeros(16, dtype=torch.long)
    x0[..., 3] = 0.7
    losses = []
    for _ in range(40):
        t = (torch.rand(1, generator=generator) + torch.arange(16) / 16) % 1
        loss = learner.losses(x0, labels, t.clamp(1e-6, 1 - 1e-6), torch.randn(x0.shape, generator=generator)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:4])
    assert all(weight.grad is not None for weight in learner.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_rendered_after_saving_is_what_was_rendered_in_memory(
    objective: str, recipe: Path, bars: Path, tmp_path: Path
) -> None:
    changes = {"diffusion": {"levels": 20, "variance": "learned-range"}, "objective": objective}
    run = PixelRun(read_pixel_recipe(recipe, **changes), tmp_path / "out", bars, silent)
    folder = run.all()
    trained, _ = run.trained()  # done before: the averaged weights, read from the last checkpoint
    read, classes, _ = load_pixels(folder)
    assert classes == ("a bar", "a beam")
    told = {"steps": 3, "guidance": 2.0}
    assert torch.equal(trained.render([0, 1], [5, 6], **told), read.render([0, 1], [5, 6], **told))  # type: ignore[arg-type]


class Stopped(Exception):
    """As if the process had been killed."""


@pytest.mark.parametrize("objective", ["ddpm", "vdm"])
def test_a_run_cut_between_two_steps_ends_in_the_same_weights_to_the_bit(
    objective: str, recipe: Path, bars: Path, tmp_path: Path
) -> None:
    changes = {"objective": objective, "pace": {"log_seconds": 0, "save_seconds": 0, "validate_steps": 100}}

    def cut(line: object) -> None:
        if "step 4/6" in str(line):
            raise Stopped

    whole = train(recipe, tmp_path / "whole", bars, silent, **changes)
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "cut", bars, cut, **changes)
    assert not (tmp_path / "cut").exists()
    lines: list[str] = []
    again = train(recipe, tmp_path / "cut", bars, lambda line: lines.append(str(line)), **changes)
    assert any("goes on from step 3" in line for line in lines)
    for file in whole.rglob("*.safetensors"):
        expected, found = load_file(file), load_file(again / file.relative_to(whole))
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert (whole / "metrics.json").read_bytes() == (again / "metrics.json").read_bytes()


class OfGaussian(torch.nn.Module):
    """What a perfect network puts out where every pixel is N(0, spread²) on its own, told no more than the time."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread, self.unused = spread, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, time: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        owner = self.owner
        start = owner.schedule
        t = (time / 1000).double() if owner.family.objective != "ddpm" else time.double() / (owner.family.levels - 1)
        if owner.family.objective == "vdm":  # told its share of the way in logSNR
            logsnr = owner.family.clean + (owner.family.noisy - owner.family.clean) * t
        else:
            logsnr = start.logsnr(t)
        alpha, sigma = (value[:, None, None, None].to(x) for value in start.marginal(logsnr))
        x = x * torch.sqrt(1 + sigma**2) if owner.family.objective == "ve" else x
        total = alpha**2 * self.spread**2 + sigma**2
        eps, x0 = sigma * x / total, alpha * self.spread**2 * x / total
        return (eps - x0 if owner.family.objective == "flow" else eps,)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_bound_and_the_ode_say_of_a_gaussian_what_is_known_of_it(objective: str) -> None:
    # of broad data the reverse step's variance is beta itself (Ho et al. 2020, section 3.2)
    spread, family = 0.2, Family(objective, levels=1000, variance="fixed-large")
    perfect = OfGaussian(spread)
    owner = PixelModel(perfect, family, 1, (1, 8, 8))
    perfect.__dict__["owner"] = owner
    generator = torch.Generator().manual_seed(3)
    drawn = spread * torch.randn(64, 1, 8, 8, generator=generator)
    x0 = torch.round((drawn.clamp(-1, 1) + 1) * 127.5) / 127.5 - 1
    labels = torch.zeros(64, dtype=torch.long)
    # nats of the level's bin, of width 2/255, under the density of these very pictures
    density = -0.5 * (x0 / spread) ** 2 - np.log(spread * np.sqrt(2 * np.pi)) + np.log(2 / 255)
    exact = float(-density.mean()) / np.log(2)
    bound = owner.bound(x0, labels, levels=1000, samples=64, generator=generator).total
    ode = owner.flow_likelihood(x0, labels, tolerance=1e-4, generator=generator).bits
    assert ode.mean == pytest.approx(exact, abs=0.03)
    assert bound.mean == pytest.approx(exact, abs=0.1)
    assert bound.mean >= exact - 0.03


@pytest.mark.parametrize("objective", ["ve", "vdm", "flow"])
def test_the_bound_of_a_tiny_network_is_not_below_its_ode_likelihood(objective: str) -> None:
    learner = model(objective).eval()
    generator = torch.Generator().manual_seed(1)
    x0 = torch.round(torch.rand(16, 1, 8, 8, generator=generator) * 255) / 127.5 - 1
    labels = torch.zeros(16, dtype=torch.long)
    bound = learner.bound(x0, labels, samples=16, generator=generator).total
    ode = learner.flow_likelihood(x0, labels, tolerance=1e-3, generator=generator).bits
    assert bound.mean + 2 * (bound.error + ode.error) >= ode.mean


def test_pictures_that_are_no_numbers_are_refused(recipe: Path, bars: Path, tmp_path: Path) -> None:
    out = build.train(recipe, tmp_path / "weights", bars, silent)
    file = out / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(file).items()}, file)
    (out / "manifest.json").unlink()
    with pytest.raises(InputError, match="pictures 1, 2 of 2 would be black: the pixels are no finite numbers"):
        render_classes(out, ["a bar"], steps=2, n=2)


def test_a_replayed_picture_is_the_same_file_whatever_its_folder_says_by_now(
    recipe: Path, bars: Path, tmp_path: Path
) -> None:
    out = build.train(recipe, tmp_path / "weights", bars, silent)

    def verb(*words: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words])

    assert verb("render", "bar", "--weights", out, "--seed", 3, "--n", 2, "--out", tmp_path / "drawn").exit_code == 0
    drawn, again = tmp_path / "drawn/bar-4.png", tmp_path / "again.png"
    moved = shutil.move(out, tmp_path / "moved")
    form = json.loads((moved / "pixels.json").read_text())
    form["sample"]["steps"] += 3  # how it renders unless told
    (moved / "pixels.json").write_text(json.dumps(form))
    (moved / "manifest.json").unlink()
    lost = verb("replay", drawn)
    assert isinstance(lost.exception, InputError) and f"not found at {out}; name their" in str(lost.exception)
    assert verb("replay", drawn, "--weights", moved, "--out", again).exit_code == 0
    assert again.read_bytes() == drawn.read_bytes()
    refused = verb("replay", drawn, "--weights", moved, "--lora", "mine.safetensors")
    assert isinstance(refused.exception, InputError) and "--lora mine.safetensors is not of" in str(refused.exception)
    weights = moved / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    others = verb("replay", drawn, "--weights", moved)
    assert isinstance(others.exception, InputError) and f"and {moved} (" in str(others.exception)
    assert "are others" in str(others.exception)


def test_the_verbs_train_and_render_take_a_pixel_model(recipe: Path, bars: Path, tmp_path: Path) -> None:
    out = build.train(recipe, tmp_path / "weights", bars, silent)
    told = ["--weights", str(out), "--steps", "2", "--seed", "3", "--guidance", "3", "--sampler", "ddim"]
    nowhere = ["--out", str(tmp_path / "no")]
    done = CliRunner().invoke(app, ["render", "bar", *told, "--out", str(tmp_path / "bar.png")])
    assert done.exit_code == 0, done.output
    [(name, seed, picture)] = render_classes(out, ["a bar"], steps=2, seed=3, guidance=3, sampler="ddim")
    from PIL import Image

    with Image.open(tmp_path / "bar.png") as drawn:
        assert (name, seed, drawn.size) == ("a bar", 3, (8, 8))
        assert np.array_equal(np.asarray(drawn), np.asarray(picture))
    with pytest.raises(InputError, match="a bar, a beam"):
        render_classes(out, ["a boat"])
    refused = CliRunner().invoke(app, ["render", "bar", *told, *nowhere, "--dtype", "bf16"])
    assert isinstance(refused.exception, InputError) and "--dtype is not for a pixel model" in str(refused.exception)
    refused = CliRunner().invoke(app, ["render", "bar", *told, *nowhere, "--negative", "a beam"])
    assert isinstance(refused.exception, InputError)
    for option in (
        ["--style", "mine"],
        ["--word", "mine"],
        ["--engine", "torch"],
        ["--batch", 2],
        ["--no-prompt-weights"],
        ["--eta", -1],
        ["--clip-skip", -1],
        ["--feature-cache", 0],
        ["--no-vae-tiling"],
        ["--max-chunks", 0],
        ["--size", ""],
    ):
        refused = CliRunner().invoke(app, ["render", "bar", *told, *nowhere, *map(str, option)])
        assert isinstance(refused.exception, InputError) and f"{option[0]} is not for a pixel" in str(refused.exception)
    for option, said in {
        ("--steps", "0"): "num_inference_steps is 0; it must be 1 or more",
        ("--guidance", "-1"): "guidance_scale is -1; it must be a number of 0 or more",
        ("--guidance", "nan"): "guidance_scale is nan",
        ("--seed", "-1"): "seed is -1; it must be 0 or more",
        ("--n", "0"): "num_images_per_prompt is 0; it must be from 1 to 65536",
        ("--sampler", "elure"): "unknown sampler 'elure'; did you mean 'euler'",
    }.items():
        refused = CliRunner().invoke(app, ["render", "bar", *told, *nowhere, *option])
        assert isinstance(refused.exception, InputError) and said in str(refused.exception)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('objective = "flow"', 'objective = "flwo"', "objective is 'flwo'"),
        ("channels =", "chanels =", "did you mean 'channels'"),
        ('kind = "pixels"', 'kind = "pixel"', "kind is 'pixel'; it can be one of: latent, pixels"),
        ('blocks = "resnet"', 'blocks = "mixer"', "network.blocks is 'mixer'"),
        ("channels = [8, 16]", "channels = [8, 16, 16, 16, 16]", "do not divide by 16"),
        ("rows = 1", 'rows = 1\nsampler = "elure"', "unknown sampler 'elure'"),
    ],
)
def test_a_flaw_in_a_pixel_recipe_is_one_line(
    old: str, new: str, said: str, recipe: Path, bars: Path, tmp_path: Path
) -> None:
    recipe.write_text(recipe.read_text().replace(old, new))
    with pytest.raises(InputError, match=said) as caught:
        build.train(recipe, tmp_path / "out", bars, silent)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_ledger_comes_first_and_doctor_takes_the_recipe(recipe: Path, bars: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (4, 4)).save(bars / "small.png")
    (bars / "notes.md").write_text("of bars")
    with (bars / "metadata.jsonl").open("a") as table:
        table.write(json.dumps({"file_name": "small.png", "text": "a bar"}))
    lines: list[str] = []
    train(recipe, tmp_path / "out", bars, lambda line: lines.append(str(line)))
    (told,) = [number for number, line in enumerate(lines) if "files: 32 used" in line]
    assert "1 does not fit, 1 not a picture" in lines[told] and told < lines.index("bars: 0.04M weights")
    assert any("left out" in line and "4 x 4: would be enlarged 2 times for 8 x 8" in line for line in lines)
    kept = json.loads((tmp_path / "out.training" / "ledger.json").read_text())
    assert (tmp_path / "out.training" / "ledger.html").is_file()
    arguments = ["doctor", str(bars), "--recipe", str(recipe), "--json", str(tmp_path / "ledger.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "ledger.json").read_text()) == kept
    recipe.write_text(recipe.read_text().replace("[network]", "[data.buckets]\n[network]"))
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, InputError) and "take [data.buckets] away" in str(refused.exception)


@pytest.mark.parametrize("grey", [True, False])
def test_pictures_stay_on_the_disk(grey: bool, recipe: Path, bars: Path, tmp_path: Path) -> None:
    from PIL import Image

    recipe.write_text(recipe.read_text().replace("grey = true", f"grey = {str(grey).lower()}"))
    for number in range(2):  # computed, then read back
        run = PixelRun(read_pixel_recipe(recipe), tmp_path / "out", bars, silent)
        for pictures, names in zip(run._pictures[:2], (range(1), range(6, 7)), strict=True):
            assert isinstance(pictures.pixels, np.memmap) and not pictures.pixels.flags.writeable, number
            for row, name in enumerate(names):
                drawn = np.asarray(Image.open(bars / f"{name:02d}.png"))
                assert pictures.pixels[row].shape == (1 if grey else 3, 8, 8)
                assert all(np.array_equal(plane, drawn) for plane in pictures.pixels[row])


def test_a_pixel_recipe_is_rehearsed(recipe: Path, bars: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace("ema = 0.9", "ema = 0.9\naverages = [0.1]\nkept_averages = 2")
    recipe.write_text(text.replace("validate_steps = 3", "validate_steps = 3\nsave_seconds = 0"))
    lines: list[str] = []
    (measured,) = rehearse(recipe, tmp_path / "out", bars, lambda line: lines.append(str(line)))
    assert any("pixels: 0.0M weights" in line and "samples/s" in line for line in lines)
    assert any("would write" in line for line in lines) and not (tmp_path / "out.training").exists()
    train(recipe, tmp_path / "out", bars, silent)
    stage = next((tmp_path / "out.training").glob("pixels-*/checkpoints")).parent
    left = [path for part in ("checkpoints", "averages") for path in (stage / part).rglob("*.safetensors")]
    assert sum(path.stat().st_size for path in left) / 2**20 == pytest.approx(measured.disk, rel=0.3)
    recipe.write_text(recipe.read_text() + "[gate]\nmax_validation_los = 9\n")
    with pytest.raises(InputError, match="did you mean 'validation_loss'"):
        rehearse(recipe, tmp_path / "out", bars, silent)


def test_a_pixel_recipe_takes_no_start(recipe: Path) -> None:
    for option in (["--start", "weights/icons"], ["--start", "weights/icons", "--dry-run"]):
        refused = CliRunner().invoke(app, ["train", str(recipe), *option])
        assert isinstance(refused.exception, InputError)


def test_weights_that_are_not_what_their_manifest_says_are_not_rendered(
    recipe: Path, bars: Path, tmp_path: Path
) -> None:
    out = train(recipe, tmp_path / "out", bars, silent, objective="vdm")
    schedule = out / "schedule.safetensors"
    whole = schedule.read_bytes()
    schedule.write_bytes(whole[:-64] + bytes(64))
    with pytest.raises(InputError, match=r"schedule\.safetensors was altered or torn; fetch or train it again"):
        load_pixels(out)
    (out / "manifest.json").unlink()
    load_pixels(out)  # nobody says what it should be
    schedule.write_bytes(whole[:-64])
    with pytest.raises(InputError, match="is not whole: ") as caught:
        load_pixels(out)
    assert "\n" not in str(caught.value)
    schedule.write_bytes(whole)
    form = json.loads((out / "pixels.json").read_text())
    del form["sample"]["steps"]
    (out / "pixels.json").write_text(json.dumps(form))
    with pytest.raises(InputError, match="is not whole: 'steps'; train it again"):
        render_classes(out, ["a bar"])


def told(folder: Path, *texts: str) -> None:
    """The pictures called by these names in turn, the last seven held out."""
    lines = [
        {"file_name": path.name, "text": texts[number % len(texts)], "split": "test" if number > 24 else "train"}
        for number, path in enumerate(sorted(folder.glob("*.png")))
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_a_class_is_found_by_its_own_name_first_and_then_by_one_that_is_like_no_other(
    recipe: Path, bars: Path, tmp_path: Path
) -> None:
    names = ("A", "a", "a bag", "bag", "a Beam")
    told(bars, *names)
    out = train(recipe, tmp_path / "out", bars, silent)
    for asked, found in (*zip(names, names, strict=True), ("beam", "a Beam"), ("BEAM", "a Beam")):
        assert [name for name, _, _ in render_classes(out, [asked], steps=1)] == [found]
    with pytest.raises(InputError, match="'a Bag' may be 'a bag' or 'bag'; write which"):
        render_classes(out, ["a Bag"], steps=1)


def test_a_validation_is_of_all_classes_though_the_files_are_sorted_by_class(
    recipe: Path, bars: Path, tmp_path: Path
) -> None:
    told(bars, *["a bar"] * 10, *["a beam"] * 10)  # of those held out five bars come first, then two beams
    run = PixelRun(read_pixel_recipe(recipe, validation=4), tmp_path / "out", bars, silent)
    held = run._pictures[1].labels
    assert held.tolist() == [0] * 5 + [1] * 2
    assert len(run._validated) == 4 and set(held[run._validated]) == {0, 1}


def test_a_finished_stage_is_judged_anew_on_as_many_pictures_as_are_asked_for_now(
    recipe: Path, bars: Path, tmp_path: Path
) -> None:
    def figures(out: str, validation: int, report: Report = silent) -> dict[str, float]:
        folder = train(recipe, tmp_path / out, bars, report, validation=validation)
        found: dict[str, float] = json.loads((folder / "metrics.json").read_text())["pixels"]
        return found

    lines: list[str] = []
    few, all_of_them = figures("out", 2), figures("out", 8, lines.append)
    assert few["validation_loss"] != all_of_them["validation_loss"] and all_of_them == figures("other", 8)
    assert any("judged anew" in line for line in lines) and not any("step 1/" in line for line in lines)
    lines.clear()
    assert figures("out", 100, lines.append) == all_of_them  # there are eight
    assert not any("judged anew" in line for line in lines)


def test_more_steps_for_the_sheet_than_ddpm_has_levels_are_refused_before_the_hours(
    recipe: Path, bars: Path, tmp_path: Path
) -> None:
    changes = {"objective": "ddpm", "sample": {"steps": 30}}
    with pytest.raises(InputError, match=r"steps 30 are more than the 20 diffusion\.levels of ddpm"):
        train(recipe, tmp_path / "out", bars, silent, **changes)
    assert not [*(tmp_path / "out.training").glob("pixels-*")]


def test_one_picture_held_out_is_refused_before_the_hours(recipe: Path, bars: Path, tmp_path: Path) -> None:
    table = bars / "metadata.jsonl"
    table.write_text(table.read_text().replace('"test"', '"train"', 7))
    with pytest.raises(InputError, match="one picture held out, which gives no standard error; mark two or more"):
        train(recipe, tmp_path / "out", bars, silent)
