"""What is asked of the U-Net's middle: the papers' formulas, gradients that reach it, nothing left in the U-Net."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from latentgen.data import Picture
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.schedule import from_config
from latentgen.training.autoencoder import moved
from latentgen.training.captions import CaptionTable
from latentgen.training.clip import to_unit
from latentgen.training.denoise import Denoising, Latents, TextStates
from latentgen.training.draw import Draw
from latentgen.training.features import (
    Alignment,
    FeatureObjective,
    FeatureTerms,
    dispersion,
    patch_items,
    tower_patches,
)

COUNT = 6
SCHEDULE = from_config({"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}).schedule


def objective(unet: Any, terms: FeatureTerms, targets: np.ndarray | None = None) -> FeatureObjective:
    random = np.random.default_rng(0)
    moments = np.abs(random.standard_normal((COUNT, 2, 4, 8, 8))).astype(np.float32)
    states = random.standard_normal((COUNT + 1, 5, 16)).astype(np.float16)
    return FeatureObjective(
        unet,
        Denoising(SCHEDULE, Prediction("v")),
        Latents(moments),
        CaptionTable([Picture(Path(f"{n}.png"), (f"caption {n}",)) for n in range(COUNT)]),
        TextStates(states),
        np.ones(COUNT),
        (Latents(moments[:2]), TextStates(states[[0, 1, COUNT]])),
        Accelerator(),
        terms=terms,
        targets=targets,
        sheet=lambda: None,
    )


def test_dispersion_is_the_papers_sum() -> None:
    middle = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    flat = middle.flatten(1)
    pairs = [torch.exp(-(flat[i] - flat[j]).square().mean() / 0.5) for i in range(5) for j in range(5)]
    torch.testing.assert_close(dispersion(middle), torch.stack(pairs).mean().log())
    assert dispersion(torch.zeros(4, 3, 2, 2)) == pytest.approx(0, abs=1e-6)  # all in one place: the most there is
    assert dispersion(10 * middle) < dispersion(middle)


def test_alignment_is_one_minus_the_cosine_on_the_towers_grid() -> None:
    targets = np.random.default_rng(0).standard_normal((7, 16, 8)).astype(np.float16)
    made = Alignment(3, targets)
    middle, items = torch.randn(2, 3, 4, 4), np.array([5, 1])
    found = made(middle, items)
    told = made.net(middle).flatten(2).transpose(1, 2)  # (B, T, D), row by row as the patches are
    cosine = F.cosine_similarity(told, torch.from_numpy(targets[items].astype(np.float32)), dim=2)
    torch.testing.assert_close(found, 1 - cosine.mean(1))
    assert made(torch.randn(2, 3, 2, 2), items).shape == (2,)  # another grid


@pytest.mark.parametrize("term", ["align", "disperse"])
def test_each_term_reaches_the_middle_and_counts_in_the_loss(parts: dict[str, Any], term: str) -> None:
    unet = copy.deepcopy(parts["unet"])
    targets = np.random.default_rng(1).standard_normal((COUNT, 16, 8)).astype(np.float16)
    made = objective(unet, FeatureTerms(**{term: 0.5}), targets)
    made.module.train().requires_grad_(True)
    losses = made.loss(np.arange(4), Draw(0, 0, 4))
    assert float(losses["loss"].detach()) == pytest.approx(
        float((losses["denoising"] + 0.5 * losses[term]).detach()), rel=1e-5
    )
    unet.zero_grad()
    losses[term].backward()
    touched = {name.split(".")[0] for name, weight in unet.named_parameters() if weight.grad is not None}
    assert "mid_block" in touched and "up_blocks" not in touched
    assert made.splits is (term == "align")
    assert not [name for name, _ in unet.named_parameters() if "alignment" in name]


def test_the_patches_are_the_towers_last_states_without_the_class() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **size)).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (130, 16, 16, 3), dtype=np.uint8)
    found = np.concatenate(list(tower_patches(tower, pixels, torch.device("cpu"))))
    assert found.shape == (130, *patch_items(tower, pixels, torch.device("cpu")).shape) == (130, 4, 16)
    with torch.no_grad():
        alone = tower(pixel_values=to_unit(pixels[129:], torch.device("cpu"))).last_hidden_state[0, 1:]
    np.testing.assert_allclose(found[129], alone.numpy(), atol=2e-3)


def test_latents_and_pictures_are_moved_alike() -> None:
    """With latents that are the picture's own means over squares, moving and encoding commute."""
    corners = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(corners, size=(32, 32), mode="bilinear", align_corners=True)
    latents = F.avg_pool2d(pixels, 4)  # 8 x 8
    for turn in (0.0, 0.3, 0.6, 0.9):
        small, picture = moved(latents, pixels, 1.0, 0.5, 0.99, turn)
        assert small.shape == (2, 3, 4, 4) and picture.shape == (2, 3, 16, 16)
        torch.testing.assert_close(F.avg_pool2d(picture, 4), small, atol=0.05, rtol=0)
    turned, _ = moved(latents, pixels, 1.0, 0.5, 0.0, 0.3)
    torch.testing.assert_close(turned, torch.rot90(latents, 1, (2, 3)))  # size as it was: nothing is lost
    same, untouched = moved(latents, pixels, 0.5, 0.6, 0.9, 0.9)
    assert same is latents and untouched is pixels
