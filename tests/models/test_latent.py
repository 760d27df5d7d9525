"""Latents are in the U-Net's unit, pixels come back from them, and generators draw as diffusers draws."""

from typing import Any

import numpy as np
import pytest
import torch

from latentgen.models.latent import GeneratorNoise, Latent


@pytest.fixture(scope="module")
def latent(parts: dict[str, Any]) -> Latent:
    return Latent(parts["vae"])


def test_factor_channels_and_scale_are_the_autoencoders(latent: Latent) -> None:
    assert (latent.factor, latent.channels, latent.scale, latent.shift) == (4, 4, 0.7, 0.0)


def test_moments_are_those_of_the_autoencoder_scaled(latent: Latent) -> None:
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    moments = latent.encode(pixels)
    with torch.no_grad():
        expected = latent.vae.encode(pixels).latent_dist
    assert moments.mean.shape == (2, 4, 4, 6)
    torch.testing.assert_close(moments.mean, expected.mean * 0.7)
    torch.testing.assert_close(moments.std, expected.std * 0.7)
    eps = torch.randn_like(moments.mean)
    torch.testing.assert_close(moments.sample(eps), (expected.mean + expected.std * eps) * 0.7)


def test_decoding_is_the_autoencoders_in_0_to_1(latent: Latent) -> None:
    latents = torch.randn(2, 4, 4, 6) * 3
    pixels = latent.decode(latents)
    with torch.no_grad():
        expected = latent.vae.decode(latents / 0.7).sample
    torch.testing.assert_close(pixels, (expected / 2 + 0.5).clamp(0, 1))
    assert pixels.shape == (2, 3, 16, 24) and not pixels.requires_grad


def test_a_shift_is_taken_off_and_put_back(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    latent, pixels = Latent(parts["vae"]), torch.rand(1, 3, 8, 8) * 2 - 1
    plain = latent.encode(pixels).mean
    monkeypatch.setattr(Latent, "shift", 0.5)
    torch.testing.assert_close(latent.encode(pixels).mean, plain - 0.35)
    torch.testing.assert_close(latent.decode(latent.encode(pixels).mean), Latent.decode(latent, plain - 0.35))


def test_generators_draw_what_diffusers_draws() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    one = GeneratorNoise(tuple(generators(1)), 2)
    (theirs,) = generators(1)
    np.testing.assert_array_equal(one.initial((4, 3, 3)), randn_tensor((2, 4, 3, 3), generator=theirs).numpy())
    step = one.brownian().step(5, torch.zeros(2, 4, 3, 3, dtype=torch.float64))
    torch.testing.assert_close(step, randn_tensor((2, 4, 3, 3), generator=theirs).double())
    several = GeneratorNoise(tuple(generators(1, 2)), 2)
    expected = randn_tensor((2, 4, 3, 3), generator=generators(1, 2))
    np.testing.assert_array_equal(several.initial((4, 3, 3)), expected.numpy())
