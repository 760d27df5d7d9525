"""Latents are in the U-Net's unit, pixels come back from them, and generators draw as diffusers draws."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentgen import Pipeline
from latentgen.checkpoint import open_folder
from latentgen.models import loading
from latentgen.models.engine import EngineNote
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


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_a_shift_of_the_config_is_put_back(folder: Path, tmp_path: Path, engine: str) -> None:
    place = shutil.copytree(folder, tmp_path / "moved", ignore=shutil.ignore_patterns("manifest.json"))
    plain = Pipeline.from_pretrained(place, engine=engine)
    config = place / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift_factor": 0.5}))
    moved = Pipeline.from_pretrained(place, engine=engine)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    apart = 0.5 * plain.latent.scale
    found, expected = (
        np.asarray(pipe.latent.decode(torch.from_numpy(x) if engine == "torch" else x))
        for pipe, x in ((moved, latents), (plain, latents + np.float32(apart)))
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert moved.latent.shift == 0.5 and plain.latent.shift == 0


def test_generators_draw_what_diffusers_draws() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    one = GeneratorNoise(tuple(generators(1)), 2)
    (theirs,) = generators(1)
    np.testing.assert_array_equal(one.initial((4, 3, 3)), randn_tensor((2, 4, 3, 3), generator=theirs).numpy())
    step = one.brownian([]).step(5, torch.zeros(2, 4, 3, 3, dtype=torch.float64))
    torch.testing.assert_close(step, randn_tensor((2, 4, 3, 3), generator=theirs).double())
    several = GeneratorNoise(tuple(generators(1, 2)), 2)
    expected = randn_tensor((2, 4, 3, 3), generator=generators(1, 2))
    np.testing.assert_array_equal(several.initial((4, 3, 3)), expected.numpy())


def overflowing(folder: Path, copy: Path, **config: Any) -> Path:
    """The weights with a first layer of the decoder that gives numbers no float16 holds; norms take the size away."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.onnx", "manifest.json"))
    (file,) = open_folder(copy).weights["vae"]
    tensors = {name: value.float() for name, value in load_file(file).items()}
    for name in ("decoder.conv_in.weight", "decoder.conv_in.bias"):
        tensors[name] = (tensors[name] * 2e5).clamp(-6e4, 6e4)
    save_file(tensors, file, {"format": "pt"})
    told = json.loads((copy / "vae/config.json").read_text())
    (copy / "vae/config.json").write_text(json.dumps(told | config))
    return copy


def test_the_autoencoder_of_xl_computes_in_float32_where_all_else_is_float16(xl: Path, tmp_path: Path) -> None:
    place = overflowing(xl, tmp_path / "xl")
    pipes = {dtype: Pipeline.from_pretrained(place, engine="torch", dtype=dtype) for dtype in ("float16", "float32")}
    half = pipes["float16"]
    assert half.text.model.dtype == torch.float16 and half.latent.vae.dtype == torch.float32  # type: ignore[union-attr]
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 1, "output_type": "np", "guidance_scale": 3.0}
    found, expected = (pipe("a red apple", **call).images for pipe in pipes.values())
    assert np.isfinite(found).all() and expected.std() > 0.03
    np.testing.assert_allclose(found, expected, atol=0.02)
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    moments = [pipe.latent.encode(pixels).mean for pipe in pipes.values()]  # type: ignore[union-attr]
    assert torch.equal(*moments)


def test_an_autoencoder_that_does_not_overflow_stays_in_float16(folder: Path, xl: Path, tmp_path: Path) -> None:
    fixed = overflowing(xl, tmp_path / "fixed", force_upcast=False)
    for place, dtype, expected in (
        (folder, torch.float16, torch.float16),  # Stable Diffusion 1, though its config says force_upcast
        (fixed, torch.float16, torch.float16),
        (xl, torch.bfloat16, torch.bfloat16),
    ):
        latent = Latent.load(open_folder(place), torch.device("cpu"), dtype)
        assert latent.vae.dtype == expected


def test_an_autoencoder_that_overflows_in_float16_decodes_in_float32_and_says_so(xl: Path, tmp_path: Path) -> None:
    place, host = open_folder(overflowing(xl, tmp_path / "fixed", force_upcast=False)), torch.device("cpu")
    half, whole = (Latent.load(place, host, dtype) for dtype in (torch.float16, torch.float32))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # so these weights do overflow
        assert not half.vae.decode((latents / half.scale).half()).sample.isfinite().all()
    with pytest.warns(EngineNote, match="the autoencoder overflows in float16; it computes in float32 now"):
        found = half.decode(latents)
    assert half.vae.dtype == torch.float32 and found.std() > 0.01
    torch.testing.assert_close(found, whole.decode(latents), atol=5e-3, rtol=0)
    torch.testing.assert_close(half.decode(latents), found)  # and nothing is said again


@pytest.mark.parametrize(
    ("dtype", "knows", "slow"),
    [
        (torch.bfloat16, {}, "no instructions for bfloat16"),
        (torch.bfloat16, {"amx_bf16": True}, None),
        (torch.float16, {"avx512_bf16": True}, "no instructions for float16"),
        (torch.float32, {}, None),
    ],
)
def test_a_half_type_that_a_cpu_has_no_instructions_for_is_said_to_be_slow(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, knows: dict[str, bool], slow: str | None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: knows)
    said = loading.slow_here(dtype, torch.device("cpu"))
    assert said is None if slow is None else said is not None and slow in said
    assert loading.slow_here(dtype, torch.device("cuda")) is None
