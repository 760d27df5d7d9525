"""The decoder stage: latents are drawn anew as a sampler would, and the decoder learns what becomes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentgen.data import Picture
from latentgen.diffusion.denoiser import Condition
from latentgen.diffusion.schedule import from_config
from latentgen.models import create
from latentgen.training.autoencoder import AdversaryLoss
from latentgen.training.captions import CaptionTable
from latentgen.training.decoder import WALK, DecoderObjective, Drawing, Painter
from latentgen.training.denoise import Latents, TextStates
from latentgen.training.draw import Draw
from latentgen.training.finish import scheduler_config
from latentgen.training.loop import LoopSettings, TrainState, fit

PLAN = from_config(scheduler_config("cosine", "v"))
SIDE, COUNT, CHANNELS = 16, 12, 4


class Knowing(nn.Module):
    """A v-prediction network that says the latents are `offset` above what is noised: wrong in one known way.

    The batch it is shown starts from `latents` (B, C, h, w), once or, with guidance, twice.
    """

    dtype = torch.float32

    def __init__(self, latents: Tensor, offset: float) -> None:
        super().__init__()
        self.latents, self.offset, self.rows = latents, offset, []

    def forward(self, x: Tensor, time: Tensor, **_: Any) -> tuple[Tensor]:
        self.rows.append(len(x))
        logsnr = PLAN.schedule.logsnr(np.float64(time[0] / 1000))
        alpha, sigma = (float(part) for part in PLAN.schedule.marginal(float(logsnr)))
        x0 = (self.latents + self.offset).repeat(len(x) // len(self.latents), 1, 1, 1)
        return (alpha * (x - alpha * x0) / sigma - sigma * x0,)


def test_latents_are_drawn_to_where_the_network_says_and_stay_where_it_says_nothing_new() -> None:
    x0, eps = torch.randn(2, 3, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
    condition = Condition(torch.zeros(3, 2, 8))
    for steps in (1, 2, 4):
        network = Knowing(x0, 0.25)
        drawn = Painter(network, PLAN, 4.0).draw(x0, condition, condition, steps, eps)  # type: ignore[arg-type]
        torch.testing.assert_close(drawn, x0 + 0.25, atol=2e-3, rtol=0)
        assert network.rows == [6] * steps  # both halves of guidance, each of the last steps of the way
        network = Knowing(x0, 0.0)
        Painter(network, PLAN, 1.0).draw(x0, condition, condition, steps, eps)  # type: ignore[arg-type]
        assert network.rows == [3] * steps
    assert Drawing(depth=0.5).most == WALK // 2 and Drawing(depth=0.01).most == 1


class Offset(nn.Module):
    """A U-Net's stand-in that draws whatever it is shown brighter: the estimate of x0 is x/alpha plus an offset."""

    dtype = torch.float32

    def forward(self, x: Tensor, time: Tensor, **_: Any) -> tuple[Tensor]:
        logsnr = PLAN.schedule.logsnr(np.float64(time[0] / 1000))
        alpha, sigma = (float(part) for part in PLAN.schedule.marginal(float(logsnr)))
        x0 = x / alpha + 1.0
        return (alpha * (x - alpha * x0) / sigma - sigma * x0,)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    random = np.random.default_rng(0)
    plain = random.integers(0, 255, (COUNT, 1, 1, 3)) + random.integers(0, 2, (COUNT, 2, 2, 3)) * 60
    return np.kron(plain.clip(0, 255), np.ones((1, SIDE // 2, SIDE // 2, 1))).astype(np.uint8)


def objective(pixels: np.ndarray, terms: AdversaryLoss | None = None, **drawing: Any) -> DecoderObjective:
    torch.manual_seed(0)
    vae = create.autoencoder(channels=[8, 16], latent_channels=CHANNELS, layers=1, groups=4, size=SIDE)
    vae.requires_grad_(False)
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    vae.register_to_config(scaling_factor=1 / float(posterior.mean.std()))
    moments = torch.stack([posterior.mean * vae.config.scaling_factor, 0 * posterior.std], 1).numpy()
    table = CaptionTable([Picture(Path(f"{n}.png"), (f"picture {n}",)) for n in range(COUNT)])
    states = TextStates(np.zeros((COUNT + 1, 2, 8), np.float16))
    held = Latents(moments[:4]), TextStates(np.zeros((5, 2, 8), np.float16)), pixels[:4]
    painter = Painter(Offset(), PLAN, 1.0)  # type: ignore[arg-type]
    return DecoderObjective(
        vae, painter, Latents(moments), table, states, pixels, np.ones(COUNT), held, Accelerator(),
        drawing=Drawing(**drawing), terms=terms or AdversaryLoss(),
    )  # fmt: skip


def test_the_decoder_learns_what_is_drawn_and_the_encoder_stays(pixels: np.ndarray) -> None:
    learning = objective(pixels, noise=0.1, depth=0.1)
    settings = LoopSettings(steps=150, batch=COUNT, rate=5e-3, warmup=5, ema=0.9)
    state = TrainState.start(learning.module, settings)
    before = {name: value.clone() for name, value in learning.vae.state_dict().items()}
    first = dict(learning.validate())
    for _ in fit(learning, state, settings, Accelerator(), seed=0):
        pass
    state.swap_average()
    last = learning.validate()
    assert first["gain"] == 0 and last["gain"] > 3, (first, last)
    assert last["psnr_drawn"] == pytest.approx(first["psnr_drawn"] + last["gain"], abs=1e-6)
    assert last["psnr"] > first["psnr"]
    for name, value in learning.vae.state_dict().items():
        assert name.startswith(("decoder.", "post_quant_conv.")) or torch.equal(value, before[name]), name
    sheet = learning.sheet()
    assert sheet is not None and sheet.size[1] > 3 * SIDE


def test_a_loss_is_a_function_of_the_draw_and_a_batch_the_mean_of_its_parts(pixels: np.ndarray) -> None:
    learning, items = objective(pixels), np.arange(COUNT)
    with torch.no_grad():
        whole = learning.loss(items, Draw(3, 5, COUNT))["loss"]
        again = learning.loss(items, Draw(3, 5, COUNT))["loss"]
        halves = [slice(0, COUNT // 2), slice(COUNT // 2, COUNT)]
        parts = [learning.loss(items[rows], Draw(3, 5, COUNT, rows))["loss"] for rows in halves]
        plain = objective(pixels, noise=0.0, drawn=0.0).loss(items, Draw(3, 5, COUNT))["loss"]
    assert torch.equal(whole, again) and not torch.equal(whole, plain)
    torch.testing.assert_close(torch.stack(parts).mean(), whole, atol=1e-6, rtol=0)


def test_an_adversary_learns_beside_the_decoder_and_is_not_saved(pixels: np.ndarray) -> None:
    learning = objective(pixels, AdversaryLoss(adversary=0.1, adversary_start=2, matching=0.5), noise=0.1, drawn=0.0)
    keys = set(objective(pixels).vae.state_dict())
    for step, listens in ((1, 0.0), (2, 1.0)):
        losses = learning.loss(np.arange(COUNT), Draw(3, step, COUNT))
        heard = 0.1 * losses["fooled"] + 0.5 * losses["matching"]
        torch.testing.assert_close(losses["loss"], losses["l1"] + losses["adversary"] + listens * heard)
    settings = LoopSettings(steps=40, batch=COUNT, rate=2e-3, warmup=5, ema=0.0)
    state = TrainState.start(learning.module, settings)
    before = learning.vae.state_dict()["encoder.conv_in.weight"].clone()
    first = learning.loss(np.arange(COUNT), Draw(3, 1, COUNT))["adversary"].item()
    for _ in fit(learning, state, settings, Accelerator(), seed=0):
        pass
    assert learning.loss(np.arange(COUNT), Draw(3, 1, COUNT))["adversary"].item() < first  # it has learned something
    assert set(learning.vae.state_dict()) == keys and "adversary" in dict(learning.module.named_children())
    assert torch.equal(before, learning.vae.state_dict()["encoder.conv_in.weight"])
