"""Proof before anything is put in place: what was written is opened anew, here and in stock diffusers, and compared."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentgen.checkpoint import SingleFile
from latentgen.diffusion.noise import Noise
from latentgen.errors import InputError
from latentgen.finetuning.base import Base
from latentgen.finetuning.methods import Trainee
from latentgen.finetuning.settings import Finetune
from latentgen.models.adapters import stock_pictures
from latentgen.pipeline import Pipeline

SAME = 2e-3  # in [0, 1]: what pictures of the same weights may differ by
EFFECT = 2e-3  # what pictures of changed weights have to differ by
NUDGE = 1e-6
STEPS = 8


@dataclass(frozen=True)
class Proof:
    """Largest differences of pictures in [0, 1]: saved against in memory, here and in stock diffusers (None: could not
    be opened there, why stands in `remark`), and saved against the starting weights.
    """

    pictures: int
    saved: float
    stock: float | None
    changed: float
    remark: str = ""

    def line(self) -> str:
        """For people."""
        stock = "not compared" if self.stock is None else f"{self.stock:.1e}"
        return (
            f"proof: {self.pictures} pictures of what was saved differ from those in memory by {self.saved:.1e} here, "
            f"{stock} in stock diffusers (most allowed {SAME:g}), and from the starting weights' by {self.changed:.2f}"
            + (f"; {self.remark}" if self.remark else "")
        )

    def figures(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


def prove(
    base: Base, trainee: Trainee, settings: Finetune, start: np.ndarray, prompts: Sequence[str], aside: Path
) -> Proof:
    """Compare what lies in `aside` with what is in memory. start: `look` at the starting weights.

    Raises InputError where what was saved renders other pictures, or the same as the starting weights.
    """
    size = int(settings.size or 0)
    memory = look(base.pipe, base, prompts, size)
    changed = float(np.abs(memory - start).max())
    if not changed > EFFECT:
        raise InputError(
            f"the training changed nothing that can be seen ({changed:.1e}); give more steps or a larger rate, "
            "nothing was written"
        )
    saved = look(trainee.reopen(aside), base, prompts, size)
    apart = float(np.abs(saved - memory).max())
    if not apart <= SAME and not apart <= _rounding(base, prompts, memory):
        raise InputError(f"what was saved renders other pictures than the model in memory ({apart:.2g}); nothing kept")
    changed = float(np.abs(saved - start).max())
    if isinstance(base.checkpoint, SingleFile):
        return Proof(len(prompts), apart, None, changed, "stock diffusers opens single files with files from its hub")
    if base.plan.prediction.name == "flow":
        return Proof(len(prompts), apart, None, changed, "stock diffusers' pipeline knows no rectified flow")
    there = _stock(base, settings, prompts, size, aside)
    beyond = float(np.abs(there - memory).max())
    if not beyond <= SAME and not beyond <= _rounding(base, prompts, memory):
        raise InputError(f"stock diffusers renders other pictures from what was saved ({beyond:.2g}); nothing kept")
    return Proof(len(prompts), apart, beyond, changed)


def look(pipe: Pipeline, base: Base, prompts: Sequence[str], size: int, apart: float = 0.0) -> np.ndarray:
    """(B, H, W, 3) in [0, 1]: a few steps of the sampler that proofs take, from fixed noise.

    apart: how much of another noise is added to it.
    """
    noise = _noise(base, prompts, size)
    if apart:
        noise = noise + apart * _noise(base, prompts, size, len(prompts))
    return np.asarray(pipe(list(prompts), latents=noise, **_call(base, size)).images)


def _rounding(base: Base, prompts: Sequence[str], memory: np.ndarray) -> float:
    """What rounding can make of these pictures: guided steps of a network that knows few pictures amplify it.

    Twice what the model in memory makes of noise that is off by NUDGE, as a float32 network's own answers are.
    """
    nudged = look(base.pipe, base, prompts, memory.shape[1], NUDGE)
    return 2 * float(np.abs(nudged - memory).max())


def _call(base: Base, size: int) -> dict[str, Any]:
    guidance = base.pipe.terms.guidance
    return {
        "num_inference_steps": STEPS,
        "guidance_scale": guidance,
        "guidance_interval": (0.0, 1.0),  # diffusers knows no other, whatever the weights' own default
        "height": size,
        "width": size,
        "sampler": base.sampler,
        "output_type": "np",
        "prompt_weights": False,
        "max_embeddings_multiples": 1,
    }


def _noise(base: Base, prompts: Sequence[str], size: int, first: int = 0) -> Any:
    import torch

    side, seeds = size // base.pipe.terms.factor, range(first, first + len(prompts))
    return torch.from_numpy(Noise(seeds).initial((base.pipe.terms.channels, side, side)))


def _stock(base: Base, settings: Finetune, prompts: Sequence[str], size: int, aside: Path) -> np.ndarray:
    call = {key: value for key, value in _call(base, size).items() if key in ("guidance_scale", "height", "width")}
    call |= {"prompt": list(prompts), "num_inference_steps": STEPS, "latents": _noise(base, prompts, size)}
    ddim = base.sampler != base.plan.sampler
    if settings.adapter is None and settings.method != "textual-inversion":
        return np.asarray(stock_pictures(aside, None, None, None, call, ddim=ddim))
    token = settings.token if settings.method == "textual-inversion" else None
    variant = base.checkpoint.variant
    return np.asarray(stock_pictures(base.checkpoint.folder, aside, settings.adapter, token, call, variant, ddim))
