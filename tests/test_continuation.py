"""What a run that goes on says of the training before it."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latentgen import InputError, build, continuation
from latentgen.checkpoint import open_folder, save_pipeline
from latentgen.continuation import Continuation, open_start, refuse_itself, train_on
from latentgen.durable import MANIFEST, write_folder
from latentgen.models import create
from latentgen.models.loading import load_part
from latentgen.recipe import read_recipe
from latentgen.rehearsal import rehearse
from latentgen.training.finish import Before, check_place, extra_files, parts_before

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "tiny.toml"
ICONS = ROOT / "tests" / "data" / "icons"
TRAIN = {"steps": 9999, "batch": 64, "rate": 1e-3}


def told(place: Path, figures: dict[str, Any], recipe: dict[str, Any], card: str = "") -> Path:
    """What a weights folder tells of its training, written to it."""
    for name, value in (("metrics.json", figures), ("recipe.json", recipe)):
        (place / name).write_text(json.dumps(value))
    (place / "README.md").write_text(card, encoding="utf-8")
    return place


def going_on(recipe: Path, out: Path, start: Path, data: Path, only: str | None = None) -> Continuation:
    return Continuation(read_recipe(recipe), out, data, lambda _: None, open_folder(start), only)


@pytest.fixture(scope="module")
def made(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder of the forms that TINY asks for, but for the text encoder, which is 16 wide."""
    recipe, own = read_recipe(TINY), parts["text_encoder"].config.hidden_size
    vae = create.autoencoder(size=32, **recipe.vae.model_dump(exclude={"gate", "train", "loss"}))
    unet = create.unet(**build.unet_form(recipe, vae.config, own))
    networks = {**parts, "vae": vae, "unet": unet}
    return save_pipeline(
        tmp_path_factory.mktemp("made") / "start", **networks, scheduler_config=build.scheduler_config(recipe)
    )


@pytest.mark.parametrize(
    ("written", "instead", "said"),
    [
        ("[unet]", '[unet]\nprediction = "eps"', "unet.prediction = eps, START has v"),
        ("[unet]", '[unet]\nschedule = "flow"\nprediction = "flow"', "unet.prediction = flow, START has v"),
        (
            "[unet]",
            '[unet]\nschedule = "linear"',
            "unet.schedule (beta_schedule) = linear, START has squaredcos_cap_v2",
        ),
        (
            "[vae]\nchannels = [8, 16, 16, 16]",
            "[data.buckets]\nstep = 8\n\n[vae]\nchannels = [8, 16, 16]",
            "vae.channels = [8, 16, 16], START has [8, 16, 16, 16]",
        ),
        ("channels = [32, 64]", "channels = [32, 96]", "unet.channels = [32, 96], START has [32, 64]"),
        ("layers = 1\nhead_width", "layers = 2\nhead_width", "unet.layers = 2, START has 1"),
        ("head_width = 32", "head_width = 16", "unet.head_width = 16, START has 32"),
        ("head_width = 32", "head_width = 32\npooled = true", "unet.pooled = True, START has False"),
        ("head_width = 32", "head_width = 32\ndropout = 0.1", "unet.dropout = 0.1, START has 0.0"),
    ],
)
def test_networks_of_another_form_are_told_by_key_before_anything_is_done(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, instead: str, said: str
) -> None:
    recipe, text = tmp_path / "r.toml", TINY.read_text().replace("[clip]\nwidth = 32", "[clip]\nwidth = 16")
    assert text.count(written) == 1
    recipe.write_text(text.replace(written, instead))
    lines: list[str] = []
    absent = tmp_path / "no pictures"  # which would be said next
    monkeypatch.setattr(continuation, "load_part", None)  # no weights are read
    for go_on in (
        lambda: train_on(recipe, made, tmp_path / "out", absent, lines.append),
        lambda: rehearse(recipe, tmp_path / "out", absent, lines.append, made),
    ):
        with pytest.raises(InputError) as refused:
            go_on()
        assert str(refused.value) == f"the recipe says {said.replace('START', str(made))}; write the same"
    assert not lines and not list(tmp_path.glob("out*"))


def test_networks_that_no_recipe_asks_for_are_told_too_and_those_of_the_form_are_taken(
    made: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(TINY.read_text().replace("[clip]\nwidth = 32", "[clip]\nwidth = 16"))
    what = read_recipe(recipe)
    assert open_start(what, made).folder == made
    other = TINY.read_text()
    for written, instead in (  # of CLIP and VAE, which are taken as they are
        ("[clip]\nwidth = 32", "[clip]\nwidth = 64"),
        ("channels = [8, 16, 16, 16]", "channels = [16, 16, 16]"),
        ("latent_channels = 4", "latent_channels = 8"),
    ):
        assert written in other
        other = other.replace(written, instead)
    (tmp_path / "other.toml").write_text(other)
    assert open_start(read_recipe(tmp_path / "other.toml"), made).folder == made
    (tmp_path / "other.toml").write_text(other.replace("size = 32", "size = 36"))  # which its VAE cannot halve
    with pytest.raises(InputError, match=r"says vae\.channels = \[16, 16, 16\], .* has \[8, 16, 16, 16\]"):
        open_start(read_recipe(tmp_path / "other.toml"), made)
    run = going_on(recipe, tmp_path / "out", made, ICONS)
    first, own = run._first_unet(run._unet_form), load_part(open_folder(made), "unet")
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in first.state_dict().items())
    odd = shutil.copytree(made, tmp_path / "odd")
    (odd / MANIFEST).unlink()
    config = json.loads((odd / "unet" / "config.json").read_text())
    config["down_block_types"] = ["CrossAttnDownBlock2D", "DownBlock2D"]
    (odd / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is of no form that \[unet\] can ask for: its down_block_types is \['Cross"):
        open_start(what, odd)


def test_an_optimizer_that_is_not_installed_is_refused_before_anything_is_read(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe, absent, lines = tmp_path / "r.toml", tmp_path / "no pictures", list[str]()
    recipe.write_text(TINY.read_text().replace("[unet.train]", '[unet.train]\noptimizer = "adamw-8bit"'))
    for go_on in (
        lambda: train_on(recipe, made, tmp_path / "out", absent, lines.append),
        lambda: rehearse(recipe, tmp_path / "out", absent, lines.append, made),
    ):
        with pytest.raises(InputError, match="needs the package bitsandbytes; install it, or choose"):
            go_on()
    assert not lines


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "start")


def test_every_part_is_listed_with_its_batch_and_rate() -> None:
    train = {"steps": 9999, "batch": 64, "rate": 1e-3, "warmup": 5}
    first = parts_before({"steps": 800.0, "validation_loss": 0.4}, train)
    assert first == [{"steps": 800.0, "batch": 64, "rate": 1e-3}]  # the steps that were trained, not those asked for
    again = {"steps": 100.0, "steps_before": 800.0, "parts_before": first}
    assert parts_before(again, {"batch": 32, "rate": 2e-4}) == [*first, {"steps": 100.0, "batch": 32, "rate": 2e-4}]


def test_of_metrics_with_a_sum_alone_the_sum_is_a_part_and_of_none_there_is_none() -> None:
    old = {"steps": 1950.0, "steps_before": 6300.0}
    found = parts_before(old, {"batch": 32, "rate": 7e-4})
    assert found == [{"steps": 6300.0}, {"steps": 1950.0, "batch": 32, "rate": 7e-4}]
    assert sum(part["steps"] for part in found) == 8250
    assert parts_before({}, {}) == []


def test_weights_are_not_replaced_by_what_goes_on_from_them(tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(tmp_path / "mine")
    for out in (tmp_path / "mine", tmp_path / "linked", tmp_path / "x" / ".." / "mine"):
        with pytest.raises(InputError, match="is what training goes on from, and would be replaced"):
            refuse_itself(tmp_path / "mine", out)
    refuse_itself(tmp_path / "mine", tmp_path / "more")


def test_the_card_tells_the_parts() -> None:
    parts = [{"steps": 6300.0}, {"steps": 1950.0, "batch": 32, "rate": 7e-4}]
    figures = {"unet": {"steps": 100.0, "steps_before": 8250.0, "parts_before": parts}, "vae": {"psnr": 25.2071}}
    files = extra_files(
        name="mine", recipe={}, figures=figures, defaults={}, size=32, data=ROOT, sheet=Image.new("RGB", (4, 4))
    )
    card = str(files["README.md"])
    assert "| unet | parts before | 6,300 steps, 1,950 steps of batch 32 at rate 0.0007 |" in card
    assert "| unet | steps before | 8,250 |" in card and "| vae | psnr | 25.21 |" in card
    assert json.loads(str(files["metrics.json"]))["unet"]["parts_before"] == parts


def test_a_layout_that_only_the_recipe_tells_of_is_not_learned_again(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[object] = []
    monkeypatch.setattr(Continuation, "_laid_out", lambda _, encoder: learned.append(encoder) or encoder)
    for figures, recipe, again in (
        ({"finetune": {}}, {"layout": {"grid": 4}}, 0),
        ({"layout": {}}, {}, 0),
        ({}, {"layout": None}, 1),
        ({}, {}, 1),
    ):
        learned.clear()
        _ = going_on(TINY, tmp_path / "out", told(start, figures, recipe), ICONS).text_encoder
        assert len(learned) == again, (figures, recipe)


def saved(run: Continuation, monkeypatch: pytest.MonkeyPatch, **unet: float) -> dict[str, Any]:
    """The files beside the networks that a run would write. unet: the U-Net's figures."""
    written: dict[str, Any] = {}
    monkeypatch.setattr(build, "save_pipeline", lambda _, *, extra_files, **rest: written.update(extra_files))
    monkeypatch.setattr(run, "sheet", lambda *_: Image.new("RGB", (4, 4)))
    networks: dict[str, Any] = dict.fromkeys(("unet", "finished_vae", "text_encoder", "words"))
    vars(run).update(networks)
    run.save(networks["unet"], {"unet": unet})
    return written


def test_a_decoder_trained_alone_leaves_what_the_u_net_was_made_by(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = {"channels": [8], "train": TRAIN}
    told(start, {"unet": {"steps": 800.0}}, {"unet": unet})
    alone = saved(going_on(TINY, tmp_path / "out", start, ICONS, "decoder"), monkeypatch, steps=800.0)
    on = saved(going_on(TINY, tmp_path / "out", start, ICONS), monkeypatch, steps=16.0)
    part = {"steps": 800.0, "batch": 64, "rate": 1e-3}
    for files in (alone, on):
        again = Before.of(told(start, *(json.loads(files[name]) for name in ("metrics.json", "recipe.json"))))
        assert again.history()["parts_before"][0] == part
    assert json.loads(alone["recipe.json"])["unet"] == unet
    assert json.loads(on["recipe.json"])["unet"]["train"]["batch"] == 8


def test_whose_pictures_the_first_weights_saw_is_said_before_whose_the_new_ones_are(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    first = "By Ann, MIT.\n\n## A heading of hers\n\n- and more"
    told(start, {}, {}, f"# icons\n\n| a |\n\n## What it was trained on\n\n{first}\n")
    run = going_on(TINY, tmp_path / "out", start, mine)
    assert saved(run, monkeypatch)["README.md"].endswith(f"## What it was trained on\n\n{first}\n")
    (mine / "NOTICE").write_text("By Bob, CC0.\n")
    card = saved(run, monkeypatch)["README.md"]
    assert card.endswith(f"## What it was trained on\n\n{first}\n\nBy Bob, CC0.\n")
    told(start, {}, {}, card)
    assert saved(going_on(TINY, tmp_path / "out", start, mine), monkeypatch)["README.md"] == card  # once is enough


def test_pictures_held_out_now_that_were_trained_on_before_are_told(start: Path, tmp_path: Path) -> None:
    now = read_recipe(TINY).data.hold_out
    for data, said in (
        ({"held_out": "test", "hold_out": now}, False),
        ({"held_out": "val", "hold_out": now}, True),
        ({"held_out": "test", "hold_out": now + 0.1}, False),
        ({"held_out": "test", "hold_out": now - 0.01}, True),
        (None, False),
    ):
        told(start, {}, {"data": {"folders": True, **data}} if data else {})
        run, lines = going_on(TINY, tmp_path / "out", start, ICONS), list[str]()
        run.say = lines.append
        assert len(run.data.held) == 9
        assert any("start may have been trained on" in line for line in lines) == said


def test_folders_that_were_no_splits_before_and_are_now_are_told(start: Path, tmp_path: Path) -> None:
    data = {"held_out": "test", "hold_out": read_recipe(TINY).data.hold_out}
    for own, placed, said in (
        ({}, True, True),
        ({}, False, False),  # no folder has such a name
        ({"folders": True}, True, False),
    ):
        told(start, {}, {"data": data | own})
        run, lines = going_on(TINY, tmp_path / "out", start, tmp_path / "pictures"), list[str]()
        run.say = lines.append
        shutil.rmtree(tmp_path / "pictures", ignore_errors=True)
        shutil.copytree(ICONS, tmp_path / "pictures" / ("test" if placed else "some"))
        (table,) = (tmp_path / "pictures").glob("*/metadata.jsonl")
        first, *rest = (json.loads(line) for line in table.read_text(encoding="utf-8").splitlines())
        rows = [first | {"split": None}, *(row | {"split": "train"} for row in rest)]
        table.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        assert run.data.held
        assert [line for line in lines if "in a split by their folder" in line] == [run.placed] * placed
        assert any("it took no folders for splits; write folders = false" in line for line in lines) == said


def test_where_a_training_runs_is_no_place_for_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path(), Path(".."), tmp_path):
        with pytest.raises(InputError, match="is where this runs, or above it, and would be replaced"):
            check_place(out)
    check_place(Path("weights"))


def test_a_place_where_others_things_stand_is_refused_before_the_training(folder: Path, tmp_path: Path) -> None:
    letter, theirs, notes = (tmp_path / name for name in ("letter", "theirs", "notes"))
    letter.write_text("a letter of mine")
    theirs.mkdir()
    (theirs / "README.md").write_text("of theirs")
    notes.mkdir()
    (notes / "notes.txt").write_text("which are carried over")
    for free in (tmp_path / "none", notes, folder):
        check_place(free)
    data = tmp_path / "data"
    for out in (letter, theirs):
        with pytest.raises(InputError, match="exists and is no result of this command; name another place"):
            check_place(out)
        with pytest.raises(InputError, match=f"{out} exists"):
            build.train(TINY, out, data, lambda _: None)  # before the data, which are not there
        with pytest.raises(InputError):  # what it foresees
            write_folder(out, lambda aside: (aside / "README.md").write_text("ours") and None)
    assert not list(tmp_path.glob("*.training"))


def test_what_fine_tuning_adds_is_a_part_of_the_history(tmp_path: Path) -> None:
    figures = {"clip": {"steps": 5.0}, "unet": {"steps": 4200.0, "caption_gain": 0.1}, "tokenizer": {"vocabulary": 9}}
    base = Before.of(told(tmp_path, figures, {"unet": {"train": TRAIN}}))
    part = {"steps": 300.0, "batch": 8, "rate": 1e-4}
    tuned = base.then(part)
    assert tuned["clip"] == figures["clip"] and tuned["unet"]["caption_gain"] == 0.1
    parts = [{"steps": 4200.0, "batch": 64, "rate": 1e-3}, part]
    again = Before.of(told(tmp_path, {**tuned, "finetune": {"steps": 300.0}}, {"unet": {"train": TRAIN}}))
    assert again.history() == {"steps_before": 4500.0, "parts_before": parts}
    assert again.history(part)["parts_before"] == [*parts, part]
