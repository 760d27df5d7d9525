"""`latentgen train` from captions to a folder that renders, here and in diffusers; again; with flaws in the data."""

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentgen import Pipeline, foundations
from latentgen.build import Run
from latentgen.checkpoint import open_folder
from latentgen.diffusion.noise import Noise
from latentgen.recipe import read_recipe
from tests.forked import verb

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "tiny.toml"
ICONS = ROOT / "tests" / "data" / "icons"
STAGES = ("clip", "vae", "unet", "decoder")

pytestmark = pytest.mark.slow


def train(out: Path, data: Path | None = None, recipe: Path = TINY) -> subprocess.CompletedProcess[str]:
    return verb("train", recipe, "--out", out, *(() if data is None else ("--data", data)))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder that the tiny recipe became, and what was said on the way."""
    out = tmp_path_factory.mktemp("trained") / "tiny"
    command = [sys.executable, "-m", "latentgen.cli", "train", str(TINY), "--out", str(out)]  # as a person runs it
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out, done


def few(place: Path, count: int = 24) -> Path:
    """A small captioned folder: some pictures of the sample, two of them held out."""
    lines = (ICONS / "metadata.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    chosen = [entry for entry in entries if entry["split"] == "test"][:2]
    chosen += [entry for entry in entries if entry["split"] == "train"][: count - 2]
    for entry in chosen:
        target = place / entry["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ICONS / entry["file_name"], target)
    (place / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in chosen))
    return place


def test_every_stage_says_what_it_did_and_the_folder_is_the_last_line(trained: tuple[Path, object]) -> None:
    out, done = trained
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.stdout == f"{out}\n"
    for stage in STAGES:
        assert f"{stage}: starts at step 0" in done.stderr
    assert "196 pictures to train on, 9 held out" in done.stderr
    assert "are cut at 16" in done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_the_folder_is_whole_and_says_where_it_comes_from(trained: tuple[Path, object]) -> None:
    out, _ = trained
    open_folder(out)
    recipe, metrics = (json.loads((out / name).read_text()) for name in ("recipe.json", "metrics.json"))
    assert recipe["name"] == "tiny" and recipe["unet"]["train"]["betas"] == [0.9, 0.99]  # as resolved
    assert metrics.keys() == {"tokenizer", *STAGES}
    assert metrics["vae"]["psnr"] > 5 and metrics["unet"]["steps"] == 16
    assert json.loads((out / "latentgen.json").read_text())["defaults"]["num_inference_steps"] == 4
    assert (out / "sheet.png").is_file()
    assert (ICONS / "NOTICE").read_text().strip() in (out / "README.md").read_text()
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for stage in STAGES:
        (place,) = out.with_name("tiny.training").glob(f"{stage}-*")
        entries = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
        assert {"loss", "rate", "norm"} <= {key for entry in entries for key in entry}
        assert stage == "clip" or list((place / "sheets").glob("*.png"))


def test_it_renders(trained: tuple[Path, object]) -> None:
    output = Pipeline.from_pretrained(trained[0])("a red apple, noto emoji style", seed=7)
    assert output.images[0].size == (32, 32)
    assert output.settings["engine"] == ("torch" if torch.cuda.is_available() else "onnx")
    graphs = {"text_encoder/model.onnx", "unet/model.onnx", "vae/decoder.onnx"}
    assert graphs <= set(json.loads((trained[0] / "manifest.json").read_text())["files"])
    assert np.asarray(output.images[0]).std() > 0


def test_diffusers_makes_the_same_picture_of_it(trained: tuple[Path, object]) -> None:
    from diffusers import StableDiffusionPipeline

    latents = torch.from_numpy(Noise([7]).initial((4, 4, 4)))
    asked = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "np"}
    theirs = StableDiffusionPipeline.from_pretrained(trained[0], safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs("a cat, noto emoji style", latents=latents.clone(), height=32, width=32, **asked).images
    found = Pipeline.from_pretrained(trained[0])("a cat, noto emoji style", latents=latents.clone(), **asked).images
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-3)


def test_the_same_command_again_does_nothing_again(trained: tuple[Path, object]) -> None:
    out, _ = trained
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = train(out)
    assert done.returncode == 0
    for stage in STAGES:
        assert f"{stage}: done before" in done.stderr and f"{stage}: starts" not in done.stderr
    assert "cache: computing" not in done.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_latents_are_normalised_by_what_was_measured_once(
    trained: tuple[Path, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured again on another machine last bits would differ, and the U-Net start over."""
    out, _ = trained

    def again(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(foundations, "normalise_latents", again)
    run = Run(read_recipe(TINY), out, ICONS, lambda _: None)
    vae = {name: value.half() for name, value in run.vae.state_dict().items()}
    assert run.vae.config.scaling_factor == json.loads((out / "vae/config.json").read_text())["scaling_factor"]
    for name, value in weights(out, "vae").items():
        if name.startswith(("encoder.", "quant_conv.")):  # what decodes was trained on
            torch.testing.assert_close(vae[name], value, rtol=0, atol=0)


def test_a_clip_of_another_context_is_another_clip(trained: tuple[Path, object], tmp_path: Path) -> None:
    out, _ = trained
    (place,) = out.with_name("tiny.training").glob("clip-*")
    assert foundations.other_context(place, 32) and not foundations.other_context(place, 16)
    torn = shutil.copytree(place, tmp_path / "torn")
    for file in torn.rglob("model.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    assert not foundations.other_context(torn, 32)
    run = Run(read_recipe(TINY), out, ICONS, lambda _: None)
    assert run.clip.text_model.embeddings.position_embedding.weight.shape[0] == 16


def test_longer_steps_go_on_and_only_what_depends_on_them_is_done_again(
    trained: tuple[Path, object], tmp_path: Path
) -> None:
    first, _ = trained
    out = tmp_path / "tiny"
    shutil.copytree(first.with_name("tiny.training"), tmp_path / "tiny.training")
    recipe = tmp_path / "longer.toml"
    head, unet = TINY.read_text().split("[unet]")
    recipe.write_text(head + "[unet]" + unet.replace("steps = 16", "steps = 18"))
    done = train(out, recipe=recipe)
    assert done.returncode == 0, done.stderr
    assert "vae: done before" in done.stderr and "unet: goes on from step 16 of 18" in done.stderr
    (old,) = (tmp_path / "tiny.training").glob("vae-*/normalised-*.safetensors")
    vae = "steps = {}\nbatch = 8\nrate = 2e-3"
    recipe.write_text(recipe.read_text().replace(vae.format(16), vae.format(18)))
    done = train(out, recipe=recipe)
    assert "vae: goes on from step 16 of 18" in done.stderr, done.stderr
    both = set((tmp_path / "tiny.training").glob("vae-*/normalised-*.safetensors"))
    (new,) = both - {old}  # the longer one's latents are measured anew
    one, other = load_file(old), load_file(new)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_broken_picture_costs_a_line(tmp_path: Path) -> None:
    data = few(tmp_path / "data")
    broken = sorted((data / "images").rglob("*.webp"))[-1]
    broken.write_bytes(broken.read_bytes()[:40])
    done = train(tmp_path / "out", data)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if broken.name in line]
    assert len(lines) == 1 and lines[0].startswith("data: left out ")
    assert "Traceback" not in done.stderr


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("latentgen: ")]
    assert len(lines) == 1 and done.stderr.endswith(f"{lines[0]}\n")
    return lines[0]


def test_an_entry_that_names_a_missing_picture_stops_before_anything_is_written(tmp_path: Path) -> None:
    data = few(tmp_path / "data")
    gone = sorted((data / "images").rglob("*.webp"))[0]
    gone.unlink()
    line = refused(train(tmp_path / "out", data))
    assert gone.name in line and "does not exist (1 of 24 entries" in line
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.glob("out.training/**/*")] == [".lock"]  # that one run was here, no more


def unmarked(place: Path) -> Path:
    data = few(place)
    metadata = data / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"split": "test"', '"split": "train"'))
    return data


def test_a_folder_without_held_out_pictures_is_told_how_to_mark_them_where_none_may_be_chosen(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(TINY.read_text().replace('held_out = "test"', 'held_out = "test"\nhold_out = 0'))
    assert '"split": "test"' in refused(train(tmp_path / "out", unmarked(tmp_path / "data"), recipe))
    assert not (tmp_path / "out").exists()


def test_pictures_are_held_out_by_name_where_none_is_marked_and_the_ledger_is_kept(tmp_path: Path) -> None:
    data = unmarked(tmp_path / "data")
    (data / "scan.pdf").write_bytes(b"%PDF")
    done = train(tmp_path / "out", data)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "no picture is marked 'test', so " in line]
    count = int(line.split("so ")[1].split()[0])
    assert f"{24 - count} pictures to train on, {count} held out" in done.stderr
    assert "data: 26 files: 24 used, 1 description, 1 not a picture; of 24 pictures" in done.stderr
    ledger = json.loads((tmp_path / "out.training" / "ledger.json").read_text())
    assert sum(ledger["files"].values()) == 26 and ledger["size"] == 32 and ledger["context"] == 16
    assert sum(entry.get("split") == "test" for entry in ledger["entries"]) == count
    assert "data:image/jpeg;base64," in (tmp_path / "out.training" / "ledger.html").read_text()


def test_a_recipe_that_does_not_hold_is_refused_before_anything(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(TINY.read_text().replace("caption", "x").replace("head_width", "headwidth"))
    assert "did you mean 'head_width'?" in refused(train(tmp_path / "out", recipe=recipe))
    assert "does not exist" in refused(train(tmp_path / "out", recipe=tmp_path / "none.toml"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_a_dry_run_says_what_every_stage_takes_and_leaves_nothing(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = verb("train", TINY, "--out", tmp_path / "out", "--dry-run", TMPDIR=str(scratch))
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert list(tmp_path.iterdir()) == [scratch] and not list(scratch.glob("latentgen-*"))
    lines = done.stderr.splitlines()
    for stage in STAGES:
        (line,) = [line for line in lines if line.startswith(f"{stage}: ")]
        assert re.search(r"M weights, [\d.]+ GFLOP a sample, [\d.]+ samples/s .* in all, \d+ MiB of memory", line)
    assert f"would write {tmp_path / 'out'}" in lines[-1] and "ONLY" not in lines[-1]


def test_a_dry_run_refuses_what_a_run_would(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(TINY.read_text().replace("tests/data/icons", "tests/data/nowhere"))
    assert "nowhere" in refused(verb("train", recipe, "--dry-run"))


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    (path,) = open_folder(folder).weights[part]
    return load_file(path)


def test_a_run_goes_on_from_finished_weights_and_takes_all_but_the_u_net_as_it_is(
    trained: tuple[Path, object], tmp_path: Path
) -> None:
    start, out, recipe = trained[0], tmp_path / "more", tmp_path / "more.toml"
    *before, last = TINY.read_text().rpartition("steps = 16")  # of the U-Net
    recipe.write_text("".join([*before[:-1], "steps = 100", last]))
    done = verb("train", recipe, "--start", start, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "clip: " not in done.stderr and "vae: " not in done.stderr and "decoder: starts" in done.stderr

    for part in ("text_encoder", "vae"):  # but the decoder, which learns what the new U-Net draws
        before, after = weights(start, part), weights(out, part)
        learned = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert bool(learned) == (part == "vae")
        assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in learned)
    assert any(not torch.equal(value, weights(out, "unet")[name]) for name, value in weights(start, "unet").items())
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (start, out))
    assert after["vae"] == before["vae"] and after["decoder"]["steps"] == 12
    assert after["unet"]["steps_before"] == before["unet"]["steps"]
    told = json.loads((start / "recipe.json").read_text())["unet"]["train"]
    first = {"steps": before["unet"]["steps"], "batch": told["batch"], "rate": told["rate"]}
    assert after["unet"]["parts_before"] == [first]
    card = (out / "README.md").read_text()
    assert f"| unet | parts before | 16 steps of batch {told['batch']} at rate {told['rate']:g} |" in card
    assert after["unet"]["validation_loss"] < before["unet"]["validation_loss"]


def test_the_decoder_alone_is_trained_on_where_only_that_is_asked_for(
    trained: tuple[Path, object], tmp_path: Path
) -> None:
    start, out, recipe = trained[0], tmp_path / "more", tmp_path / "more.toml"
    recipe.write_text(f"{TINY.read_text()}\n[decoder.loss]\nadversary = 0.1\nmatching = 0.1\n")
    told = ("train", recipe, "--start", start, "--out", out, "--only", "decoder")
    rehearsed = verb(*told, "--dry-run")
    assert "decoder: " in rehearsed.stderr and "unet: " not in rehearsed.stderr and not out.exists()
    done = verb(*told)
    assert done.returncode == 0, done.stderr
    assert "decoder: starts at step 0 of 12" in done.stderr and "fooled" in done.stderr and "unet: " not in done.stderr
    for part in ("text_encoder", "unet", "vae"):
        before, after = weights(start, part), weights(out, part)
        assert before.keys() == after.keys()
        learned = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert bool(learned) == (part == "vae")
        assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in learned)
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in (start, out))
    assert after["unet"] == before["unet"] and after["decoder"] != before["decoder"]


def test_the_decoder_alone_needs_weights_and_a_recipe_for_it(trained: tuple[Path, object], tmp_path: Path) -> None:
    alone = ("train", TINY, "--out", tmp_path / "out", "--only", "decoder")
    assert "--only decoder needs the weights whose decoder it is; name them with --start" in refused(verb(*alone))
    recipe = tmp_path / "without.toml"
    head, _, rest = TINY.read_text().partition("[decoder.train]")
    recipe.write_text(head + rest[rest.index("[defaults]") :])
    told = ("train", recipe, "--out", tmp_path / "out", "--only", "decoder", "--start", trained[0])
    assert "--only decoder needs a [decoder] in the recipe; add it, with its [decoder.train]" in refused(verb(*told))


def test_a_run_that_goes_on_learns_a_layout_first_and_only_once(trained: tuple[Path, object], tmp_path: Path) -> None:
    recipe = tmp_path / "laid.toml"
    layout = "[layout]\ngrid = 2\n[layout.train]\nsteps = 20\nbatch = 16\nrate = 1e-3\nwarmup = 2\n"
    recipe.write_text(f"{TINY.read_text()}\n{layout}")
    folders = [trained[0], tmp_path / "once", tmp_path / "twice"]
    said = []
    for start, out in pairwise(folders):
        done = verb("train", recipe, "--start", start, "--out", out)
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
    assert "layout: starts at step 0 of 20" in said[0] and "layout: " not in said[1]
    first, once, twice = (load_file(open_folder(folder).weights["text_encoder"][0]) for folder in folders)
    assert any(not torch.equal(value, once[name]) for name, value in first.items())
    assert all(torch.equal(value, twice[name]) for name, value in once.items())
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert "layout" not in figures[0] and 0 < figures[1]["layout"]["validation_loss"] < 2
    assert figures[2]["layout"] == figures[1]["layout"]


@pytest.mark.parametrize(
    ("written", "instead", "said"),
    [
        (
            "head_width = 32",
            'head_width = 32\nprediction = "eps"',
            "the recipe says unet.prediction = eps, {start} has v; write the same",
        ),
        (
            "layers = 1\nhead_width = 32",
            "layers = 2\nhead_width = 32",
            "the recipe says unet.layers = 2, {start} has 1; write the same",
        ),
        ("head_width = 32", "head_width = 16", "the recipe says unet.head_width = 16, {start} has 32; write the same"),
        (
            "head_width = 32",
            "head_width = 32\npooled = true",
            "the recipe says unet.pooled = True, {start} has False; write the same",
        ),
    ],
)
def test_a_run_goes_on_only_with_a_u_net_of_its_form(
    trained: tuple[Path, object], tmp_path: Path, written: str, instead: str, said: str
) -> None:
    recipe = tmp_path / "other.toml"
    recipe.write_text(TINY.read_text().replace(written, instead))
    line = refused(verb("train", recipe, "--out", tmp_path / "out", "--start", trained[0]))
    assert said.format(start=trained[0]) in line


def test_a_dry_run_rehearses_a_run_that_goes_on(trained: tuple[Path, object], tmp_path: Path) -> None:
    asked = ("train", TINY, "--out", tmp_path / "out", "--dry-run", "--start")
    done = verb(*asked, trained[0])
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr
    assert "clip: " not in done.stderr and "vae: " not in done.stderr
    assert "unet: " in done.stderr and "decoder: " in done.stderr and "would write" in done.stderr
    assert "none" in refused(verb(*asked, tmp_path / "none"))
