"""The weights that come along: whole, of the form their recipes say, past their gates, and the same on every engine."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentgen import Pipeline
from latentgen.checkpoint import find, open_folder
from latentgen.checkpoint.places import default_weights
from latentgen.diffusion.noise import Noise
from latentgen.durable import MANIFEST, sha256
from latentgen.fields import explained
from latentgen.pixels.recipe import PixelRecipe
from latentgen.recipe import Recipe, read_as, read_kind

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path.parent for path in (ROOT / "weights").glob("*/recipe.json"))
FORM = {  # of a recipe: what a network is, not how it is trained
    "tokenizer": ("vocabulary", "context"),
    "clip": ("width", "heads", "patch", "text_layers", "image_layers"),
    "layout": ("grid",),
    "vae": ("channels", "latent_channels", "layers", "groups"),
    "unet": ("channels", "layers", "head_width", "pooled", "schedule", "prediction"),
    "network": ("blocks", "channels", "layers", "patch"),
}
PROMPTS = ["a red apple, noto emoji style", "a cat, twemoji style"]
ASKED: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}


@cache
def latents() -> torch.Tensor:
    return torch.from_numpy(Noise([7, 8]).initial((16, 8, 8)))


@cache
def rendered(engine: str) -> np.ndarray:
    """(2, 128, 128, 3) in [0, 1]."""
    pipe = Pipeline.from_pretrained(engine=engine)
    found = np.asarray(pipe(PROMPTS, latents=latents().clone(), sampler="dpmpp-2m", **ASKED).images)
    assert found.shape == (2, 128, 128, 3) and found.std() > 0.1  # pictures, no grey fields
    return found


def test_the_default_weights_are_whole_to_every_hash() -> None:
    folder = default_weights()
    assert find(None) == folder and folder.parent == ROOT / "weights"
    open_folder(folder)
    manifest = json.loads((folder / MANIFEST).read_text())["files"]
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *manifest,
        MANIFEST,
    }
    assert all(sha256(folder / name) == digest for name, digest in manifest.items())
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


@pytest.mark.slow
def test_onnx_and_torch_render_the_default_weights_alike() -> None:
    np.testing.assert_allclose(rendered("onnx"), rendered("torch"), atol=1e-3)
    assert np.abs(rendered("onnx")[0] - rendered("onnx")[1]).mean() > 0.05  # the prompts and the noise matter


@pytest.mark.slow
def test_stock_diffusers_renders_the_default_weights_as_we_do() -> None:
    """Its U-Net reads the caption as a whole from the text states by itself (`addition_embed_type` "text")."""
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(default_weights(), safety_checker=None, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    assert theirs.unet.config.addition_embed_type == "text"
    expected = np.asarray(theirs(PROMPTS, latents=latents().clone(), height=128, width=128, **ASKED).images)
    np.testing.assert_allclose(rendered("torch"), expected, atol=1e-3)
    np.testing.assert_allclose(rendered("onnx"), expected, atol=2e-3)


def recipes(folder: Path) -> tuple[Any, Any]:
    """The recipe that weights were trained with, and the one of their name, both with every default."""
    path = ROOT / "pipelines" / f"{folder.name}.toml"
    form = Recipe if read_kind(path) == "latent" else PixelRecipe
    return explained(form, json.loads((folder / "recipe.json").read_text()), str(folder)), read_as(form, path)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_weights_have_the_form_of_the_recipe_of_their_name(folder: Path) -> None:
    trained, recipe = recipes(folder)
    compared = 0
    for section, keys in FORM.items():
        one, other = getattr(trained, section, None), getattr(recipe, section, None)
        assert (one is None) == (other is None), section
        for key in keys if one is not None else ():
            assert getattr(one, key) == getattr(other, key), f"{section}.{key}"
            compared += 1
    assert compared >= 4 and trained.data.size == recipe.data.size


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_weights_are_past_every_gate_of_the_recipe_of_their_name(folder: Path) -> None:
    figures = json.loads((folder / "metrics.json").read_text())
    _, recipe = recipes(folder)
    stages = [stage for stage in ("clip", "layout", "vae", "unet", "decoder") if getattr(recipe, stage, None)]
    held = 0
    for stage in stages or ["pixels"]:  # a model in pixels has one stage, and its gate stands at the top
        gate = getattr(recipe, stage).gate if stages else recipe.gate
        for key, bound in gate.items():
            figure = figures[stage][key.removeprefix("max_")]
            assert figure <= bound if key.startswith("max_") else figure >= bound, f"{stage}: {key}"
        held += bool(gate)
    assert held == len(stages)  # nothing of a latent model is let through unseen
