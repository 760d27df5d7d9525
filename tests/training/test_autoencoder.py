"""The VAE's loss: each term reaches the weights it is for and no others; normalised latents change no picture."""

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from latentgen.models import create
from latentgen.training.autoencoder import (
    Adversary,
    AutoencoderLoss,
    AutoencoderObjective,
    Perceptual,
    normalise_latents,
)
from latentgen.training.draw import Draw

CPU = torch.device("cpu")


def make_vae() -> Any:
    torch.manual_seed(1)
    return create.autoencoder(channels=[8, 8, 16], latent_channels=3, layers=1, groups=4, size=16)


@pytest.fixture(scope="module")
def tower() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(2)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **size))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    smooth = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    return smooth.repeat(4, axis=1).repeat(4, axis=2)


def objective(pixels: np.ndarray, tower: Any, **terms: float) -> AutoencoderObjective:
    losses = AutoencoderLoss(**terms)  # type: ignore[arg-type]
    return AutoencoderObjective(make_vae(), tower, pixels, pixels[:6], np.ones(40), losses, Accelerator())


def gradient(module: nn.Module) -> float:
    return sum(float(weight.grad.abs().sum()) for weight in module.parameters() if weight.grad is not None)


def test_the_perceptual_gradient_reaches_every_part_of_the_vae_and_never_the_tower(
    pixels: np.ndarray, tower: Any
) -> None:
    made = objective(pixels, tower)
    made.loss(np.arange(8), Draw(0, 0, 8))["perceptual"].backward()
    for part in (made.vae.encoder, made.vae.quant_conv, made.vae.post_quant_conv, made.vae.decoder):
        assert gradient(part) > 0
    assert all(weight.grad is None and not weight.requires_grad for weight in tower.parameters())


def test_the_perceptual_distance_is_nothing_between_equals_and_else_positive(tower: Any) -> None:
    distance = Perceptual(tower)
    pictures = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(distance(pictures, pictures), torch.zeros(4), atol=1e-10, rtol=0)
    found = distance(pictures, pictures.flip(0))
    assert found.shape == (4,) and (found > 0).all() and (found < 4).all()


def test_the_losses_of_the_adversary_reach_their_own_weights_alone() -> None:
    torch.manual_seed(3)
    adversary = Adversary(8)
    real, found = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16, requires_grad=True)
    contest = adversary.contest(real, found)
    contest.own.backward(retain_graph=True)
    assert found.grad is None and gradient(adversary) > 0
    before = gradient(adversary)
    for term in (contest.fooled, contest.matching):
        found.grad = None
        term.backward(retain_graph=True)
        assert found.grad is not None and float(found.grad.abs().sum()) > 0
        assert gradient(adversary) == before


def test_the_terms_of_a_contest_are_what_the_adversary_says_of_both() -> None:
    torch.manual_seed(4)
    adversary = Adversary(8)
    real, found = torch.randn(2, 2, 3, 16, 16)
    said: dict[int, list[torch.Tensor]] = {}
    for layer in (layer for layer in adversary if isinstance(layer, nn.LeakyReLU)):
        layer.register_forward_hook(lambda layer, _, out: said.setdefault(id(layer), []).append(out))
    with torch.no_grad():
        right, wrong = adversary(real), adversary(found)
        apart = [float((one - other).abs().mean()) for one, other in said.values()]
        contest, same = adversary.contest(real, found), adversary.contest(real, real)
    assert len(apart) == 3 and float(contest.matching) == pytest.approx(sum(apart) / 3) and float(same.matching) == 0
    hinge = (1 - right).clamp(min=0).mean() + (1 + wrong).clamp(min=0).mean()
    torch.testing.assert_close(contest.own, hinge)
    torch.testing.assert_close(contest.fooled, -wrong.mean())


def test_in_one_descent_adversary_and_vae_each_get_what_they_would_get_alone(pixels: np.ndarray, tower: Any) -> None:
    made = objective(pixels, tower, adversary=0.5, matching=0.3, kl=0.0, perceptual=0.0)
    losses = made.loss(np.arange(4), Draw(0, 0, 4))
    nets = [list(made.vae.parameters()), list(made.module.get_submodule("adversary").parameters())]
    together = [torch.autograd.grad(losses["loss"], net, retain_graph=True) for net in nets]
    asked = losses["l1"] + 0.5 * losses["fooled"] + 0.3 * losses["matching"]
    for_vae = torch.autograd.grad(asked, nets[0], retain_graph=True)
    for_adversary = torch.autograd.grad(losses["adversary"], nets[1])
    for found, expected in zip([*together[0], *together[1]], [*for_vae, *for_adversary], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_the_adversary_learns_before_the_vae_listens(pixels: np.ndarray, tower: Any) -> None:
    made = objective(pixels, tower, adversary=0.5, matching=0.3, adversary_start=3)
    for step, listens in ((2, 0.0), (3, 1.0)):
        losses = made.loss(np.arange(4), Draw(0, step, 4))
        rest = losses["l1"] + 5e-4 * losses["kl"] + 0.1 * losses["perceptual"] + losses["adversary"]
        heard = 0.5 * losses["fooled"] + 0.3 * losses["matching"]
        torch.testing.assert_close(losses["loss"], rest + listens * heard)


def test_without_the_perceptual_term_no_tower_is_needed(pixels: np.ndarray) -> None:
    losses = objective(pixels, None, perceptual=0.0).loss(np.arange(4), Draw(0, 0, 4))
    torch.testing.assert_close(losses["loss"], losses["l1"] + 5e-4 * losses["kl"])


def test_kl_is_that_of_torch(pixels: np.ndarray, tower: Any) -> None:
    from torch.distributions import Normal, kl_divergence

    made = objective(pixels, tower)
    with torch.no_grad():
        posterior = made.vae.encode(torch.from_numpy(pixels[:6]).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    expected = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).mean()
    assert made.validate()["kl"] == pytest.approx(float(expected), rel=1e-4)


def test_normalised_latents_have_mean_0_and_std_1_and_the_picture_stays(pixels: np.ndarray, tmp_path: Any) -> None:
    from diffusers import AutoencoderKL

    vae = make_vae().eval()
    with torch.no_grad():
        scales = torch.tensor([0.3, 2.0, 5.0])
        vae.quant_conv.weight[:3] *= scales[:, None, None, None]
        vae.quant_conv.bias[:3] = torch.tensor([4.0, -3.0, 0.5])
        vae.quant_conv.bias[3:] = -16.0
    real = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1

    def look() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            posterior = vae.encode(real).latent_dist
            drawn = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=torch.manual_seed(0))
            return drawn, vae.decode(drawn).sample

    before, picture = look()
    assert float(before.mean(dim=(0, 2, 3)).abs().max()) > 1
    figures = normalise_latents(vae, pixels, CPU)
    after, same = look()
    torch.testing.assert_close(same, picture, atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean(dim=(0, 2, 3)), torch.zeros(3), atol=0.02, rtol=0)
    torch.testing.assert_close(after.std(dim=(0, 2, 3)), torch.ones(3), atol=0.02, rtol=0)
    vae.save_pretrained(tmp_path)
    assert AutoencoderKL.from_pretrained(tmp_path).config.scaling_factor == pytest.approx(figures["scaling_factor"])
    assert figures["scaling_factor"] == pytest.approx(1.0, abs=1e-3)


def test_a_moved_picture_trains_every_part_and_the_perceptual_term_still_fits(pixels: np.ndarray, tower: Any) -> None:
    made = objective(pixels, tower, equivariance=1.0)
    for step in range(4):  # sizes differ from step to step
        losses = made.loss(np.arange(8), Draw(0, step, 8))
        losses["loss"].backward()
        assert torch.isfinite(losses["loss"])
    assert min(gradient(part) for part in (made.vae.encoder, made.vae.decoder)) > 0
