"""One labelled model in pixels: a network, and the family of diffusion that says how it is taught, drawn and judged.

| objective | schedule, frame | the network puts out | it is taught by |
|---|---|---|---|
| ddpm | a table of betas, variance preserving | eps, and a variance if learned | L_simple, or L_hybrid |
| ve | a geometric ladder of sigma, alpha = 1 | eps = −sigma·score | denoising score matching |
| vdm | a learned monotone logSNR, variance preserving | eps | the bound in continuous time |
| flow | a straight line | eps − x0 | flow matching |
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from latentgen.diffusion import likelihood
from latentgen.diffusion.array import column
from latentgen.diffusion.denoiser import Condition, Denoise, Denoiser
from latentgen.diffusion.guidance import guided
from latentgen.diffusion.likelihood import Bound, FlowLikelihood
from latentgen.diffusion.loss import (
    denoising_loss,
    hybrid_loss,
    learned_schedule,
    score_matching_loss,
    sigma_ladder,
    variational_loss,
)
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.sampling import SAMPLERS, walked
from latentgen.diffusion.schedule import VE, Discrete, Learned, RectifiedFlow, Schedule, knots
from latentgen.errors import InputError
from latentgen.models.pixel import label_network

SAMPLER = {"ddpm": "ddpm", "ve": "predictor-corrector", "vdm": "ddpm", "flow": "euler"}  # each family's own
BINS = 256


def sampler_of(objective: str, name: str = "") -> str:
    """The sampler asked for, or the family's own. Raises InputError for one that there is not."""
    if name and name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}; it can be one of: {', '.join(SAMPLERS)}")
    return name or SAMPLER[objective]


@dataclass(frozen=True)
class Family:
    """Which family, and what it needs to be told (`pixels.recipe.Diffusion` says what each is)."""

    objective: str
    levels: int = 1000
    betas: str = "linear"
    variance: str = "fixed-small"
    clean: float = 10.0
    noisy: float = -8.0

    @property
    def learns_variance(self) -> bool:
        """Whether the network puts out a variance too."""
        return self.objective == "ddpm" and self.variance == "learned-range"

    @property
    def prediction(self) -> Prediction:
        """What the network puts out."""
        return Prediction("flow" if self.objective == "flow" else "eps")

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> "Family":
        """The family that a table of at least these fields describes."""
        return cls(**{field.name: table[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Straight(RectifiedFlow):
    """Rectified flow, walked evenly in logSNR between two ends: what its bound is taken on."""

    clean: float = 10.0
    noisy: float = -8.0

    def logsnr(self, t: Any) -> Any:
        """clean at 0, noisy at 1."""
        return self.clean + (self.noisy - self.clean) * t


class LearnedSchedule(nn.Module):
    """The weights of VDM's monotone schedule (Kingma et al. 2021, appendix H), trained beside the network."""

    def __init__(self, clean: float, noisy: float, hidden: int = 256) -> None:
        super().__init__()
        self.ends = (noisy, clean)
        _, weights = learned_schedule(hidden, logsnr_min=noisy, logsnr_max=clean)
        self.w1, self.b1, self.w2, self.b2, self.w3 = (nn.Parameter(weight.detach()) for weight in weights)

    def schedule(self) -> Learned:
        """The schedule these weights are; under no_grad it takes no gradients."""
        held: list[Tensor] = [self.w1, self.b1, self.w2, self.b2, self.w3]
        w1, b1, w2, b2, w3 = held if torch.is_grad_enabled() else [weight.detach() for weight in held]
        return Learned(w1, b1, w2, b2, w3, *self.ends)


class PixelModel(nn.Module):
    """A labelled network and its family. x0: (B, C, H, W) in [−1, 1]; labels: (B,), `classes` where untold."""

    def __init__(self, unet: Any, family: Family, classes: int, shape: tuple[int, int, int], patch: int = 1) -> None:
        super().__init__()
        self.unet, self.family, self.classes, self.shape, self.patch = unet, family, classes, shape, patch
        self.learned = LearnedSchedule(family.clean, family.noisy) if family.objective == "vdm" else None
        self._network = label_network(unet, patch)
        what = family
        if what.objective == "ddpm":
            table = Discrete.linear if what.betas == "linear" else Discrete.cosine
            self._fixed: Schedule = table(what.levels)
        elif what.objective == "ve":
            self._fixed = VE(math.exp(-0.5 * what.clean), math.exp(-0.5 * what.noisy))
        else:
            self._fixed = RectifiedFlow()

    @property
    def schedule(self) -> Schedule:
        """The family's schedule; a learned one as it is now."""
        return self._fixed if self.learned is None else self.learned.schedule()

    @property
    def ends(self) -> tuple[float, float]:
        """(clean, noisy) logSNR: what the likelihood is taken between."""
        if isinstance(self._fixed, Discrete):
            return float(self._fixed.levels[0]), float(self._fixed.levels[-1])
        return self.family.clean, self.family.noisy

    def network(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The raw output. In the VE frame x is first brought to unit variance (Karras et al. 2022, c_in)."""
        if isinstance(self._fixed, VE) and self.learned is None:
            sigma = column(torch.exp(-0.5 * self._fixed.logsnr(time / 1000)), x)
            x = x / torch.sqrt(1 + sigma**2)
        return self._network(x, time, condition)

    def score(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The score of x's density at sigma (B,), in the VE frame: −eps/sigma."""
        time = self.schedule.time(-2 * torch.log(sigma))
        return -self.network(x, time, condition) / column(sigma, x)

    def denoiser(self) -> Denoiser:
        """(x, logsnr, condition) -> x0."""
        return Denoiser(self.network, self.schedule, self.family.prediction)

    # --- taught

    def losses(self, x0: Tensor, labels: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What each row is taught by, at times t (B,) in (0, 1): (B,). VDM's is in bits a dimension."""
        what, condition = self.family, Condition(labels=labels)
        if what.objective == "ddpm":
            return self._ddpm_losses(x0, condition, t, eps)
        if what.objective == "ve":
            ladder = sigma_ladder(math.exp(-0.5 * what.noisy), math.exp(-0.5 * what.clean), what.levels)
            rung = (t * what.levels).long().clamp(max=what.levels - 1)
            return score_matching_loss(self.score, x0, condition, ladder.to(x0), rung, eps) * (2 / x0[0].numel())
        if what.objective == "vdm":
            terms = variational_loss(self.network, self.schedule, what.prediction, x0, condition, t, eps)
            return terms / math.log(2)
        return denoising_loss(self.network, self.schedule, what.prediction, x0, condition, t, eps)

    def _ddpm_losses(self, x0: Tensor, condition: Condition, t: Tensor, eps: Tensor) -> Tensor:
        table = self._fixed
        assert isinstance(table, Discrete)
        index = (t * len(table)).long().clamp(max=len(table) - 1)
        if not self.family.learns_variance:
            t = index / (len(table) - 1)
            return denoising_loss(self.network, table, self.family.prediction, x0, condition, t, eps)
        levels = torch.as_tensor(table.levels, dtype=torch.float32, device=x0.device)
        # below the first entry the ladder goes on as it came: there the bound's term is the decoder's
        beyond = torch.cat([2 * levels[:1] - levels[1:2], levels])
        ends = levels[index], beyond[index]
        return hybrid_loss(self.network, table, self.family.prediction, x0, condition, *ends, eps)

    # --- drawn

    @torch.no_grad()
    def render(
        self, labels: Sequence[int], seeds: Sequence[int], *, steps: int = 50, sampler: str = "", guidance: float = 1.0
    ) -> Tensor:
        """Pictures (B, C, H, W) in [−1, 1] of some classes, picture k from the noise of its seed k.

        Raises InputError for a sampler or a class that there is not.
        """
        name = sampler_of(self.family.objective, sampler)
        denoiser, noise = self.denoiser(), Noise(seeds)
        if self.family.objective in ("ve", "vdm"):
            levels = knots(denoiser.schedule, steps, spacing="uniform-logsnr", within="whole")
        else:
            levels = knots(denoiser.schedule, steps, spacing="trailing")
        device = next(self.parameters()).device
        told = torch.as_tensor(list(labels), device=device)
        variance = self.family.learns_variance and name == "ddpm"
        nothing = torch.full_like(told, self.classes)
        how: dict[str, Any] = {"scale": guidance, "clip": 1.0, "variance": variance}

        def denoise(part: slice) -> Denoise:
            uncond = Condition(labels=nothing[part]) if guidance != 1.0 else None
            return guided(denoiser, Condition(labels=told[part]), uncond, **how)

        alpha, sigma = denoiser.schedule.marginal(float(levels[0]))
        x = torch.from_numpy(noise.initial(self.shape)).to(device) * math.hypot(alpha, sigma)
        options = {"variance": "learned-range"} if variance else {}
        for step in walked(name, denoise, x, levels, denoiser.schedule.marginal, noise, **options):
            x = step.x
        return x.clamp(-1, 1)

    # --- judged

    @torch.no_grad()
    def bound(
        self, x0: Tensor, labels: Tensor, *, levels: int = 250, samples: int = 64, generator: torch.Generator
    ) -> Bound:
        """The variational bound of pictures of 256 levels given their classes, with its terms.

        DDPM's is the sum over a ladder of `levels` of its table, the variance being its own; the others' the integral
        between the two ends, `samples` times a picture.
        """
        denoiser, condition = self.denoiser(), Condition(labels=labels)
        if isinstance(self._fixed, Discrete):
            variance = self.family.variance
            estimate = guided(denoiser, condition, clip=1.0, variance=variance == "learned-range")
            ladder = knots(self._fixed, min(levels, len(self._fixed)))
            marginal = self._fixed.marginal
            return likelihood.discrete_bound(estimate, x0, ladder, marginal, generator=generator, variance=variance)
        schedule = denoiser.schedule
        if self.family.objective == "flow":
            schedule = Straight(clean=self.family.clean, noisy=self.family.noisy)
        # one time a picture in each turn, so that every picture's own times lie over all of the schedule
        turns = [
            likelihood.continuous_bound(
                lambda x, logsnr: denoiser(x, logsnr, condition), schedule, x0, generator=generator
            )
            for _ in range(samples)
        ]
        terms = (torch.stack([term.rows for term in each]).mean(0) for each in zip(*turns, strict=True))
        return Bound(*(likelihood.bits(rows * math.log(2), 1) for rows in terms))

    @torch.no_grad()
    def flow_likelihood(
        self,
        x0: Tensor,
        labels: Tensor,
        *,
        probes: int = 1,
        tolerance: float = 1e-4,
        levels: int | None = None,
        generator: torch.Generator,
    ) -> FlowLikelihood:
        """The probability-flow ODE's likelihood of pictures of 256 levels, dequantised, given their classes.

        levels: None dequantises uniformly; else the ODE starts from the noise that `bound`, of as many levels, starts
        from, and the result's `between` may be held against that bound's prior + diffusion.
        """
        denoiser, condition = self.denoiser(), Condition(labels=labels)
        clean, noisy = self.ends
        if levels is not None and isinstance(self._fixed, Discrete):
            clean = float(knots(self._fixed, min(levels, len(self._fixed)))[-2])
        return likelihood.flow_likelihood(
            lambda x, logsnr: denoiser(x, logsnr, condition),
            x0,
            denoiser.schedule.marginal,
            clean=clean,
            noisy=noisy,
            probes=probes,
            dequantisation="uniform" if levels is None else "noised",
            rtol=tolerance,
            atol=tolerance,
            generator=generator,
        )
