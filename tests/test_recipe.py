"""Recipes: the ones we ship hold; whatever is wrong in one costs one line that says what would be right."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from latentgen import InputError
from latentgen.build import scheduler_config
from latentgen.diffusion.sampling import SAMPLERS
from latentgen.diffusion.schedule import from_config
from latentgen.fields import explained
from latentgen.pixels.recipe import PixelRecipe, read_pixel_recipe
from latentgen.recipe import Recipe, SamplerName, read_kind, read_recipe
from latentgen.training.finish import BETAS, PREDICTIONS

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "tiny.toml"
SHIPPED = sorted((ROOT / "pipelines").glob("*.toml"))

Change = Callable[[str], str]


def put(old: str, new: str) -> Change:
    def change(text: str) -> str:
        assert text.count(old) >= 1, old
        return text.replace(old, new, 1)

    return change


def refusal(tmp_path: Path, change: Change) -> str:
    """The one line that a changed recipe is refused with."""
    path = tmp_path / "changed.toml"
    path.write_text(change(TINY.read_text()))
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and "pydantic" not in line
    return line


@pytest.mark.parametrize("path", [TINY, *SHIPPED], ids=lambda path: path.name)
def test_every_recipe_of_ours_holds_and_is_named_for_its_file(path: Path) -> None:
    if read_kind(path) == "pixels":
        pixels = read_pixel_recipe(path)
        assert pixels.name == path.stem
        assert PixelRecipe.model_validate(pixels.model_dump(mode="json")) == pixels
        return
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe  # as recipe.json keeps it
    from_config(scheduler_config(recipe))


def test_the_samplers_of_a_recipe_are_those_there_are() -> None:
    assert set(get_args(SamplerName)) == set(SAMPLERS)


@pytest.mark.parametrize("path", sorted((ROOT / "weights").glob("*/recipe.json")), ids=lambda path: path.parent.name)
def test_the_recipes_of_our_weights_hold_too(path: Path) -> None:
    told = json.loads(path.read_text())
    form = PixelRecipe if told.get("kind") == "pixels" else Recipe
    assert form.model_validate(told).name == path.parent.name


def test_there_are_recipes() -> None:
    assert SHIPPED


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("steps = 12", "step = 12"), r"unknown key 'step' in \[clip.train\]; did you mean 'steps'\?"),
        (put("[vae.loss]", "[vae.los]"), r"unknown key 'los' in \[vae\]; did you mean 'loss'\?"),
        (put("[unet]", "[u-net]"), r"unknown key 'u-net' in the top level; did you mean 'unet'\?"),
        (put("held_out", "heldout"), r"unknown key 'heldout' in \[data\]; did you mean 'held_out'\?"),
        (put("seed = 0", "sede = 0"), r"unknown key 'sede' in the top level; did you mean 'seed'\?"),
        (put("columns = 2", "zzz = 2"), r"unknown key 'zzz' in \[sample\]; it can be one of: prompts, columns, seed"),
        (put("size = 32", ""), "data.size is missing; write it"),
        (put("[tokenizer]", "[pace.tokenizer]"), "unknown key 'tokenizer'"),
    ],
)
def test_a_key_that_is_not_known_names_the_nearest(tmp_path: Path, change: Change, said: str) -> None:
    assert re.search(said, refusal(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("size = 32", "size = 0"), "data.size is 0: input should be greater than or equal to 1"),
        (put("size = 32", 'size = "big"'), "data.size is 'big': input should be a valid integer"),
        (put("size = 32", "size = 32.5"), "data.size is 32.5: input should be a valid integer"),
        (put("steps = 12", "steps = 0"), "clip.train.steps is 0: "),
        (put("rate = 1e-3", "rate = 0"), "clip.train.rate is 0: input should be greater than 0"),
        (put("rate = 1e-3", "rate = nan"), "clip.train.rate is nan: "),
        (put("ema = 0.9", "ema = 1.0"), r"clip.train.ema is 1.0: input should be less than 1"),
        (put("context = 16", "context = 3"), "tokenizer.context is 3: "),
        (put("channels = [32, 64]", "channels = []"), r"unet.channels is \[\]: "),
        (put("channels = [32, 64]", "channels = [32, -1]"), "unet.channels.1 is -1: "),
        (put("head_width = 32", 'schedule = "cosin"'), "unet.schedule is 'cosin': input should be 'cosine', "),
        (
            put("head_width = 32", 'prediction = "w"'),
            "unet.prediction is 'w': input should be 'eps', 'x0', 'v' or 'flow'",
        ),
        (
            put('sampler = "dpmpp-2m"', 'sampler = "dpmp-2m"'),
            r"defaults.sampler is 'dpmp-2m': input should be .*; did you mean 'dpmpp-2m'\?",
        ),
        (put("head_width = 32", 'schedule = "flow"'), '^[^{]*: unet: schedule = "flow" and prediction = "flow" belong'),
        (put("head_width = 32", 'prediction = "flow"'), "write both or neither"),
        (put("head_width = 32", "times_mean = 0.5"), "unet: times_mean and times_std are of times = .logit-normal."),
        (put("head_width = 32", "times_std = 1.2"), "unet: times_mean and times_std are of times = .logit-normal."),
        (put("head_width = 32", "caption_dropout = 1.5"), "unet.caption_dropout is 1.5: "),
        (put("smileys-emotion = 0.5", "smileys-emotion = -1"), "data.weights.group.smileys-emotion is -1: "),
        (put('name = "tiny"', 'name = "../tiny"'), "name is '../tiny': "),
        (put('prompts = ["a red', 'prompts = [] # ["a red'), r"sample.prompts is \[\]: "),
        (put("adversary = 0.02", "adversary = -0.1"), "vae.loss.adversary is -0.1: "),
        (put("adversary = 0.02", "matching = 0.1"), "vae.loss: matching is of an adversary, and there is none; set"),
        (put("chance = 0.01", 'chance = "high"'), "clip.gate.chance is 'high': "),
        (put("size = 32", "size = 36"), r"^recipe [^:]*: data.size 36 is no multiple of 8, as vae"),
        (put("patch = 8", "patch = 33"), "clip.patch 33 is more than data.size 32"),
        (put("heads = 2", "heads = 3"), "clip.width 32 is no multiple of clip.heads"),
        (put("groups = 4", "groups = 3"), "each of vae.channels is to be a multiple of vae.groups"),
        (put("channels = [32, 64]", "channels = [48, 64]"), r"unet.channels has \[48\]; each must be a multiple of 32"),
        (put("head_width = 32", "head_width = 64"), r"unet.channels has \[32\]; each must be .* and unet.head_width"),
        (
            put("head_width = 32", 'weighting = "minsnr"'),
            "unet.weighting is 'minsnr': input should be 'simple', 'min-snr'",
        ),
        (put("ema = 0.9", "betas = [0.9, 1.0]"), "clip.train.betas.1 is 1.0: input should be less than 1"),
        (put("rate = 1e-3", "rate = inf"), "clip.train.rate is inf: input should be a finite number"),
        (put("chance = 0.01", "chance = nan"), "clip.gate.chance: nan is no number; write one"),
        (put("smileys-emotion = 0.5", "smileys-emotion = inf"), "data.weights.group.smileys-emotion is inf: "),
        (put("adversary = 0.02", ""), "vae.loss: adversary_start is of an adversary, and there is none; set adversary"),
        (put("ema = 0.9", 'decay = 0\ndecay_shape = "cosine"'), "clip.train: decay_shape is of a rate that falls"),
        (
            put("batch = 32", "batch = 32\naccumulate = 3"),
            "clip.train: accumulate is 3; it must divide the batch of 32",
        ),
        (
            lambda text: put("layers = 1\nhead_width", "disperse = 0.1\nlayers = 1\nhead_width")(
                text.replace("batch = 8", "batch = 8\naccumulate = 2")
            ),
            "unet: disperse compares the pictures of a batch with each other; leave accumulate at 1",
        ),
        (
            put("rate = 1e-3", "rate = 1e-3\naccumulate = 2"),
            "clip: CLIP compares the pictures of a batch with each other; leave accumulate at 1",
        ),
        (put("log_seconds = 1", "save_seconds = nan"), "pace.save_seconds: nan is no number; write one"),
        (put("ema = 0.9", "kept_averages = 8"), "clip.train: kept_averages is of averages, and there are none"),
        (
            put("ema = 0.9", 'optimizer = "adafactor"\nbetas = [0.9, 0.999]'),
            "clip.train: betas are not adafactor's, which has none; take them away",
        ),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_key(tmp_path: Path, change: Change, said: str) -> None:
    assert re.search(said, refusal(tmp_path, change))


def test_true_and_false_are_no_numbers_wherever_a_number_stands(tmp_path: Path) -> None:
    lines = TINY.read_text().splitlines()
    numbers = [place for place, line in enumerate(lines) if re.match(r"[\w-]+ = [\d.]", line)]
    assert len(numbers) > 40
    for place in numbers:
        key = lines[place].split(" = ")[0]
        changed = "\n".join([*lines[:place], f"{key} = true", *lines[place + 1 :]])
        line = refusal(tmp_path, put(TINY.read_text(), changed))
        assert re.search(rf"\b{key}: true is no number; write one$", line), line
    line = refusal(tmp_path, put("channels = [32, 64]", "channels = [32, true]"))
    assert line.endswith("unet.channels.1: true is no number; write one")


def test_what_an_optimizer_does_not_hear_is_refused_where_it_is_given_alone(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(TINY.read_text().replace("ema = 0.9", 'optimizer = "adafactor"\nclip = inf'))
    train = read_recipe(tmp_path / "r.toml").clip.train
    assert train.clip == float("inf")  # which is no clipping
    assert type(train).model_validate(train.model_dump()) == train  # as recipe.json keeps it, all keys written


def test_a_run_may_never_be_saved_on_the_way_and_a_gate_may_be_open(tmp_path: Path) -> None:
    text = TINY.read_text().replace("chance = 0.01", "chance = 0.01\nmax_loss = inf")
    (tmp_path / "r.toml").write_text(text.replace("log_seconds = 1", "log_seconds = inf\nsave_seconds = inf"))
    recipe = read_recipe(tmp_path / "r.toml")
    assert {recipe.pace.save_seconds, recipe.pace.log_seconds, recipe.clip.gate["max_loss"]} == {float("inf")}
    assert Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe


@pytest.mark.parametrize(
    ("place", "keys", "said"),
    [
        ("vae.loss", {"adversary": 0.0}, "vae.loss: adversary_start is of an adversary"),
        ("unet.train", {"kept_averages": 8}, "unet.train: kept_averages is of averages"),
        ("unet.train", {"optimizer": "adafactor", "betas": [0.9, 0.999]}, "unet.train: betas are not adafactor's"),
        ("unet.train", {"decay": 0.0, "decay_shape": "cosine"}, "unet.train: decay_shape is of a rate that falls"),
        ("unet", {"augment": {"scale": [0.9, 1.0], "sided": ["left"]}}, "unet.augment: sided says which"),
        ("clip.train", {"accumulate": 2}, "clip: CLIP compares the pictures of a batch"),
    ],
)
def test_what_has_no_effect_is_refused_where_it_is_written_and_not_where_a_run_stored_it(
    place: str, keys: dict[str, Any], said: str
) -> None:
    stored = section = read_recipe(TINY).model_dump(mode="json")
    for name in place.split("."):
        section = section[name]
    section.update(keys)
    assert explained(Recipe, stored, "recipe.json").name == "tiny"
    with pytest.raises(InputError, match=f"^recipe: {said}"):
        explained(Recipe, stored, "recipe", written=True)


def test_more_than_one_flaw_is_counted_and_the_unknown_key_comes_first(tmp_path: Path) -> None:
    line = refusal(tmp_path, lambda text: text.replace("size = 32", "sise = 32").replace("patch = 8", "patch = 0"))
    assert "did you mean 'size'?" in line and line.endswith("(and 2 more)")


def test_what_is_not_toml_says_where(tmp_path: Path) -> None:
    line = refusal(tmp_path, put("[data]", "[data"))
    assert "is not TOML" in line and "line" in line


def test_a_missing_recipe_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist; there is .*icons\.toml"):
        read_recipe(ROOT / "pipelines" / "icon.toml")
    with pytest.raises(InputError, match=r"does not exist; give a \.toml file such as pipelines/icons\.toml"):
        read_recipe(tmp_path / "nowhere" / "mine.toml")


def test_what_cannot_be_read_as_text_costs_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(binary)


def test_a_recipe_is_frozen() -> None:
    recipe = read_recipe(TINY)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


def test_every_schedule_and_prediction_of_a_recipe_has_its_row() -> None:
    fields = Recipe.model_fields["unet"].annotation.model_fields  # type: ignore[union-attr]
    assert {*BETAS, "flow"} == set(fields["schedule"].annotation.__args__)
    assert {*PREDICTIONS, "flow"} == set(fields["prediction"].annotation.__args__)
