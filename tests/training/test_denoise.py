"""The U-Net's loss: captions dropped as often as asked, latents and texts from caches equal to those computed."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from latentgen import InputError
from latentgen.data import Picture
from latentgen.diffusion.loss import denoising_loss
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.schedule import Discrete, from_config
from latentgen.models.network import unet_network
from latentgen.training.cache import cached, latent_moments, text_states
from latentgen.training.captions import CaptionTable
from latentgen.training.clip import to_unit
from latentgen.training.denoise import DenoiseObjective, Denoising, Latents, TextStates
from latentgen.training.draw import VALIDATION, Draw
from latentgen.training.loop import checkpoint_activations

CPU = torch.device("cpu")
COUNT, LENGTH, WIDTH = 6, 5, 16
SCHEDULE = from_config({"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}).schedule


@pytest.fixture
def objective(parts: dict[str, Any]) -> Any:
    random = np.random.default_rng(0)
    moments = np.abs(random.standard_normal((COUNT, 2, 4, 8, 8))).astype(np.float32)
    states = random.standard_normal((COUNT + 1, LENGTH, WIDTH)).astype(np.float16)
    table = CaptionTable([Picture(Path(f"{n}.png"), (f"caption {n}",)) for n in range(COUNT)])

    def make(dropout: float = 0.1, **spread: Any) -> DenoiseObjective:
        return DenoiseObjective(
            parts["unet"],
            Denoising(SCHEDULE, Prediction("v"), caption_dropout=dropout, **spread),
            Latents(moments),
            table,
            TextStates(states),
            np.ones(COUNT),
            (Latents(moments[:2]), TextStates(states[[0, 1, COUNT]])),
            Accelerator(),
            sheet=lambda: None,
        )

    return make


def conditions(objective: DenoiseObjective, monkeypatch: pytest.MonkeyPatch, batch: int) -> np.ndarray:
    """Which texts a step is conditioned on."""
    asked: list[np.ndarray] = []
    real = TextStates.rows

    def rows(self: TextStates, numbers: np.ndarray, device: torch.device) -> Any:
        asked.append(numbers)
        return real(self, numbers, device)

    monkeypatch.setattr(TextStates, "rows", rows)
    with torch.no_grad():
        objective.loss(np.arange(batch) % COUNT, Draw(0, 0, batch))
    return asked[0]


@pytest.mark.parametrize(("dropout", "least", "most"), [(0.0, 0, 0), (0.3, 50, 104), (1.0, 256, 256)])
def test_captions_are_left_empty_as_often_as_asked(
    objective: Any, monkeypatch: pytest.MonkeyPatch, dropout: float, least: int, most: int
) -> None:
    numbers = conditions(objective(dropout), monkeypatch, 256)
    empty = numbers == COUNT
    assert least <= empty.sum() <= most
    np.testing.assert_array_equal(numbers[~empty], (np.arange(256) % COUNT)[~empty])


def test_the_loss_is_that_of_diffusion_on_the_numbers_drawn(objective: Any) -> None:
    made: DenoiseObjective = objective(0.0)
    items = np.array([3, 0, 5])
    with torch.no_grad():
        found = made.loss(items, Draw(2, 9, 3))["loss"]
        draw = Draw(2, 9, 3)
        x0 = made._versions[0].sample(items, draw.normal(4, 8, 8))
        draw.uniform(), draw.uniform()
        times = draw.stratified().clamp(1e-6, 1 - 1e-6)
        condition = made._states.rows(items, CPU)
        eps = draw.normal(4, 8, 8)
        network = unet_network(made.module)
        expected = denoising_loss(network, SCHEDULE, Prediction("v"), x0, condition, times, eps).mean()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_times_are_trained_as_the_density_says_and_judged_evenly(
    objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, spread = objective(), objective(times="logit-normal", times_mean=1.0, times_std=1.4)
    assert spread.validate() == plain.validate()
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(spread, "_losses", lambda x0, condition, times, eps: seen.append(times) or times)
    spread.loss(np.arange(64) % COUNT, Draw(0, 0, 64))
    z = (torch.logit(seen[0].double()) - 1.0) / 1.4  # Esser et al. 2024, eq. 19: standard normal, its ranks even
    evenly = torch.special.ndtr(z).sort().values * 64
    np.testing.assert_allclose(np.diff(evenly), 1.0, atol=1e-3)


def test_validation_is_the_same_each_time_and_tells_what_captions_are_worth(objective: Any) -> None:
    made = objective()
    first = made.validate()
    torch.manual_seed(99)
    assert made.validate() == first
    assert first["validation_loss"] > 0 and first["caption_gain"] != 0
    latents, states = made._held_out
    draw = Draw(0, 0, 2, stream=VALIDATION)
    x0, eps = latents.sample(np.arange(2), draw.normal(4, 8, 8)), draw.normal(4, 8, 8)
    times = draw.stratified().clamp(1e-6, 1 - 1e-6)
    network = unet_network(made.module)
    with torch.no_grad():
        told, untold = (
            denoising_loss(network, SCHEDULE, Prediction("v"), x0, states.rows(np.array(rows), CPU), times, eps).mean()
            for rows in ([0, 1], [2, 2])
        )
    assert first["caption_gain"] == pytest.approx(float(untold - told), rel=1e-3)


def test_a_posterior_is_sampled_anew_from_its_mean_and_std() -> None:
    moments = np.stack([np.full((3, 1, 2, 2), 5.0), np.full((3, 1, 2, 2), 0.5)], axis=1).astype(np.float32)
    eps = torch.randn(2, 1, 2, 2)
    torch.testing.assert_close(Latents(moments).sample(np.array([2, 0]), eps), 5 + 0.5 * eps)


def test_cached_latents_are_those_of_the_vae(parts: dict[str, Any]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)  # more than one part
    moments = np.concatenate(list(latent_moments(parts["vae"], pixels, CPU)))
    with torch.no_grad():
        posterior = parts["vae"].encode(to_unit(pixels[66:], CPU)).latent_dist
    factor = parts["vae"].config.scaling_factor
    np.testing.assert_allclose(moments[66:, 0], posterior.mean * factor, atol=1e-5)
    np.testing.assert_allclose(moments[66:, 1], posterior.std * factor, atol=1e-5)


def test_cached_states_are_those_of_the_encoder_and_the_empty_caption_is_last(parts: dict[str, Any]) -> None:
    from latentgen.models.text import TextEncoder

    texts = ("a red apple", "a blue bird")
    states = TextStates(np.concatenate(list(text_states(parts["text_encoder"], parts["tokenizer"], texts, CPU))))
    expected = TextEncoder(parts["tokenizer"], parts["text_encoder"]).encode([*texts, ""]).states
    assert states.states.dtype == np.float16 and states.empty == 2
    torch.testing.assert_close(states.rows(np.arange(3), CPU).states, expected, atol=2e-3, rtol=2e-3)


def test_an_array_is_computed_once_and_never_kept_in_halves(tmp_path: Path) -> None:
    path, calls = tmp_path / "deep" / "array.npy", []

    def computed() -> Iterator[np.ndarray]:
        calls.append(1)
        yield np.full((2, 3), 1.0)
        yield np.full((1, 3), 2.0)

    def torn() -> Iterator[np.ndarray]:
        yield np.full((2, 3), 1.0)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cached(path, (3, 3), np.float32, torn)
    assert list(path.parent.iterdir()) == []
    for _ in range(2):
        np.testing.assert_array_equal(cached(path, (3, 3), np.float32, computed)[:, 0], [1, 1, 2])
    assert len(calls) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the cache"):
        cached(tmp_path / "file" / "array.npy", (3, 3), np.float32, computed)


def test_the_schedule_of_these_tests_is_a_table() -> None:
    assert isinstance(SCHEDULE, Discrete)


@pytest.mark.parametrize("network", ["unet", "vae", "text_encoder"])
def test_activation_checkpointing_keeps_less_and_gives_the_same_gradients(parts: dict[str, Any], network: str) -> None:
    module = copy.deepcopy(parts[network]).train().requires_grad_(True)
    torch.manual_seed(0)
    inputs = {
        "unet": (torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, LENGTH, WIDTH)),
        "vae": (torch.randn(2, 3, 32, 32),),
        "text_encoder": (torch.arange(6)[None],),
    }[network]

    def gradients() -> tuple[int, list[torch.Tensor]]:
        kept: list[int] = []
        module.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            out = module(*inputs)[0]
        size = sum(kept)
        out.square().mean().backward()
        return size, [weight.grad.clone() for weight in module.parameters() if weight.grad is not None]

    before, plain = gradients()
    assert checkpoint_activations(module) == 1
    after, again = gradients()
    assert after < 0.7 * before
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
