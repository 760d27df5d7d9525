"""The two ways of training a U-Net that `benchmark_train.py` compares; both yield the number of steps done, 0 first."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentgen.data import Picture
from latentgen.diffusion.denoiser import Condition
from latentgen.diffusion.schedule import from_config
from latentgen.training.cache import cached, latent_moments, text_states
from latentgen.training.captions import CaptionTable
from latentgen.training.denoise import DenoiseObjective, Denoising, Latents, TextStates
from latentgen.training.loop import LoopSettings, TrainState, fit

RATE = 1e-4


class Waits(Protocol):
    """A clock that counts the time spent in `waiting`."""

    def waiting(self) -> Any: ...


@dataclass(frozen=True)
class Parts:
    """The configs of a weights folder, as networks with random weights."""

    folder: Path
    vae: AutoencoderKL
    text: CLIPTextModel
    words: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Parts":
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        return cls(
            folder,
            AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")).eval().requires_grad_(False),
            text.float().eval().requires_grad_(False),
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            cls._unet(folder),
            scheduler,
        )

    @staticmethod
    def _unet(folder: Path) -> UNet2DConditionModel:
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))

    @property
    def size(self) -> int:
        """Pixels along a side of what the U-Net is made for."""
        factor: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return int(self.unet.config.sample_size) * factor

    def forward_flops(self, batch: int) -> int:
        """Floating-point operations of the U-Net's forward pass; plain attention, whose products are all counted."""
        unet = self._unet(self.folder)
        unet.set_attn_processor(AttnProcessor())
        side = unet.config.sample_size
        states = torch.zeros(1, self.words.model_max_length, unet.config.cross_attention_dim)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(torch.zeros(1, unet.config.in_channels, side, side), torch.zeros(1), encoder_hidden_states=states)
        return batch * int(counter.get_total_flops())


def by_latentgen(
    parts: Parts, pixels: Any, batch: int, steps: int, clock: Waits, accelerator: Accelerator, scratch: Path
) -> Iterator[int]:
    """The objective and the loop of `latentgen train`, without its log, its checkpoints and its sheets."""
    device = accelerator.device
    vae, unet = (net.to(memory_format=torch.channels_last) for net in (parts.vae, parts.unet))
    captions = CaptionTable(pixels.pictures)
    side, channels = parts.unet.config.sample_size, parts.vae.config.latent_channels
    shape = (len(pixels.array), 2, channels, side, side)
    moments = cached(scratch / "latents.npy", shape, np.float32, lambda: latent_moments(vae, pixels.array, device))
    extent = (len(captions.texts) + 1, parts.words.model_max_length, parts.text.config.hidden_size)
    told = lambda: text_states(parts.text, parts.words, captions.texts, device)  # noqa: E731
    states = cached(scratch / "text.npy", extent, np.float16, told)

    class TimedLatents(Latents):
        def sample(self, items: np.ndarray, eps: Tensor) -> Tensor:
            with clock.waiting():
                return super().sample(items, eps)

    class TimedStates(TextStates):
        def rows(self, numbers: np.ndarray, device: torch.device) -> Condition:
            with clock.waiting():
                return super().rows(numbers, device)

    plan = from_config(parts.scheduler)
    kept = TimedLatents(moments), TimedStates(states)
    objective = DenoiseObjective(
        unet,
        Denoising(plan.schedule, plan.prediction),
        kept[0],
        captions,
        kept[1],
        np.ones(len(pixels.array)),
        kept,
        accelerator,
        sheet=lambda: Image.new("RGB", (1, 1)),
    )
    settings = LoopSettings(steps=steps, batch=batch, rate=RATE)
    state = TrainState.start(objective.module, settings)
    yield 0
    for progress in fit(objective, state, settings, accelerator, seed=0):
        yield progress.step


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Pictures read, scaled and normalised, and one of their captions tokenised, when they are asked for."""

    def __init__(self, pictures: Sequence[Picture], words: CLIPTokenizer, size: int) -> None:
        self._pictures, self._words, self._size = pictures, words, size

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = self._pictures[index]
        with Image.open(picture.path) as opened:
            scaled = opened.convert("RGB").resize((self._size, self._size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)
        caption = picture.captions[int(torch.randint(len(picture.captions), ()))]
        context = self._words.model_max_length
        ids = self._words(caption, max_length=context, padding="max_length", truncation=True, return_tensors="pt")
        return pixels, ids.input_ids[0]


def by_diffusers(
    parts: Parts, pictures: Sequence[Picture], batch: int, steps: int, clock: Waits, accelerator: Accelerator
) -> Iterator[int]:
    """What diffusers' text-to-image example does at each step, with its defaults and its EMA."""
    device = accelerator.device
    vae, text, unet = parts.vae.to(device), parts.text.to(device), parts.unet.to(device).train()
    scheduler = DDPMScheduler.from_config(parts.scheduler)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, weight_decay=1e-2)
    average = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    average.to(device)
    loader = DataLoader(Examples(pictures, parts.words, parts.size), batch, shuffle=True, drop_last=True)
    batches = (loaded for _ in iter(int, 1) for loaded in loader)  # epoch after epoch
    yield 0
    for step in range(steps):
        with clock.waiting():
            pixels, ids = (value.to(device) for value in next(batches))
        with accelerator.autocast():
            x0 = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            eps = torch.randn_like(x0)
            times = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),), device=device)
            x = scheduler.add_noise(x0, eps, times)
            states = text(ids, return_dict=False)[0]
            velocity = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(x0, eps, times) if velocity else eps
            out = unet(x, times, states, return_dict=False)[0]
            loss: Any = F.mse_loss(out.float(), target.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        loss.item()  # the example logs it
        yield step + 1
