"""One network is two models: what its SDE draws and what its ODE draws. The bound is the first one's alone.

Data N(0, v), and a network whose eps is c times the right one: c = 1 is exact. All is linear, so all is known. In
u = x/alpha with s² = exp(−logsnr) and y = v + s², eps·s = c·s²/y·u, and the variance V of the model goes as

    ODE  dV/dy = c·V/y          V = V_0·(y/y_0)^c
    SDE  dV/dy = 2c·V/y − 1     V = (V_0 − y_0/(2c − 1))·(y/y_0)^2c + y/(2c − 1)

from V_0 = 1 + s_0² where y = y_0 is the noisy end.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from latentgen.diffusion.likelihood import continuous_bound, discrete_bound, flow_likelihood
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.sampling import SAMPLERS
from latentgen.diffusion.schedule import Discrete, UniformLogsnr, knots, variance_preserving
from latentgen.errors import InputError

NOISY, CLEAN, V = -8.0, 9.0, 0.04


@dataclass(frozen=True)
class Shrunken:
    """The network whose eps is `share` times the right one, and the closed forms of all that can be said of it."""

    share: float

    def denoise(self, x: Any, logsnr: Any) -> Any:
        s2 = torch.exp(-torch.as_tensor(logsnr)) if isinstance(x, torch.Tensor) else math.exp(-logsnr)
        alpha = 1 / (1 + s2) ** 0.5
        estimate = (1 - self.share * s2 / (V + s2)) / alpha
        return (estimate.reshape(-1, 1, 1) if getattr(estimate, "ndim", 0) else float(estimate)) * x

    def variances(self) -> tuple[float, float]:
        """(ODE's, SDE's) of u at the clean end."""
        start, y0, y = 1 + math.exp(-NOISY), V + math.exp(-NOISY), V + math.exp(-CLEAN)
        tail = 2 * self.share - 1
        return start * (y / y0) ** self.share, (start - y0 / tail) * (y / y0) ** (2 * self.share) + y / tail

    def costs(self) -> tuple[float, float]:
        """(ODE's, SDE's) −E log p(x0) in bits. The SDE's last step adds the decoder's variance, s² at the clean end."""
        ode, sde = self.variances()
        return tuple((0.5 * (math.log(2 * math.pi * w) + V / w)) / math.log(2) for w in (ode, sde + math.exp(-CLEAN)))  # type: ignore[return-value]

    def bound(self) -> float:
        """prior + ½·∫E|eps − eps_hat|² dlogsnr + decoder, in bits; E|…|² = (v + (1 − c)²·s²)/y."""
        y0, y, alpha2 = V + math.exp(-NOISY), V + math.exp(-CLEAN), 1 / (1 + math.exp(-NOISY))
        prior = 0.5 * (alpha2 * V + 1 - alpha2 - 1 - math.log(1 - alpha2))
        diffusion = 0.5 * ((CLEAN + math.log(y)) - (NOISY + math.log(y0)) + (1 - self.share) ** 2 * math.log(y0 / y))
        decoder = 0.5 * (1 + math.log(2 * math.pi) - CLEAN)
        return (prior + diffusion + decoder) / math.log(2)


SHARES = [0.9, 0.95, 1.0, 1.05, 1.1]


@pytest.mark.parametrize("share", SHARES)
def test_the_bound_is_never_below_the_sdes_likelihood_and_lies_below_the_odes_where_the_score_is_wrong(
    share: float,
) -> None:
    """In closed form: Song, Durkan et al. 2021, theorem 1, is of p_SDE; p_ODE is another density unless c = 1."""
    model = Shrunken(share)
    ode, sde = model.costs()
    exact = 0.5 * (math.log(2 * math.pi * V) + 1) / math.log(2)
    assert exact - 1e-4 < sde <= model.bound()
    if share == 1.0:
        assert ode == pytest.approx(exact, abs=1e-4) and model.bound() == pytest.approx(exact, abs=4e-3)
    else:
        assert model.bound() < ode - 0.05


@pytest.mark.parametrize("share", SHARES)
def test_the_measured_bound_and_ode_are_those_closed_forms(share: float) -> None:
    model = Shrunken(share)
    x0 = math.sqrt(V) * torch.randn(2000, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 *= math.sqrt(V) / x0.square().mean().sqrt()  # the closed forms ask for the variance alone
    generator = torch.Generator().manual_seed(1)
    schedule = UniformLogsnr(NOISY, CLEAN)
    bound = continuous_bound(model.denoise, schedule, x0, generator=generator, samples=100, bins=None)
    assert bound.total.mean == pytest.approx(model.bound(), abs=0.02)
    found = flow_likelihood(
        model.denoise, x0, variance_preserving, clean=CLEAN, noisy=NOISY, probes=None, bins=None, rtol=1e-7, atol=1e-7
    )
    assert found.bits.mean == pytest.approx(model.costs()[0], abs=1e-5)


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_the_samplers_draw_from_the_two_models(share: float) -> None:
    model, levels = Shrunken(share), np.linspace(NOISY, CLEAN, 600)
    x = np.random.default_rng(0).standard_normal((1, 20_000))
    alpha = variance_preserving(CLEAN)[0]
    for name, expected in zip(("heun", "ddpm"), model.variances(), strict=True):
        *_, end = SAMPLERS[name](model.denoise, x, levels, variance_preserving, Noise([1]))
        assert float(np.var(end.x)) / alpha**2 == pytest.approx(expected, rel=0.04), name
    ode, sde = model.variances()
    assert abs(math.log(ode / sde)) > 0.5


def test_of_a_pixel_known_for_certain_ddpms_bound_is_a_bit_below_the_odes_value() -> None:
    """Always black: 0 bits are due. The exact network's ODE ends at the table's first sigma, where black is as wide
    as that noise; the decoder's outermost bin holds more than half of the same Gaussian."""
    table, x0 = Discrete.linear(), torch.full((64, 1, 32), -1.0, dtype=torch.float64)

    def denoise(x: Any, logsnr: Any) -> Any:
        return -torch.ones_like(x) + 0 * x

    generator = torch.Generator().manual_seed(0)
    bound = discrete_bound(denoise, x0, knots(table, 1000), table.marginal, generator=generator)
    clean, noisy = float(table.levels[0]), float(table.levels[-1])
    ode = flow_likelihood(denoise, x0, table.marginal, clean=clean, noisy=noisy, generator=generator, rtol=1e-6)
    s, half = math.exp(-0.5 * clean), 1 / 255
    mass = 0.5 * (1 + math.erf(half / table.marginal(clean)[1] / math.sqrt(2)))
    assert bound.total.mean == pytest.approx(-math.log2(mass), abs=1e-3)  # 0.62
    spread = math.log2(s * math.sqrt(2 * math.pi) * 255 / 2) + half**2 / (6 * s**2) / math.log(2)  # 1.71
    assert ode.bits.mean == pytest.approx(spread, abs=0.02)
    assert ode.bits.mean - bound.total.mean > 1.0


def test_started_from_the_same_noise_the_exact_networks_ode_meets_the_bound_of_a_pixel_known_for_certain() -> None:
    """Grey level 0 for certain: what both pay is the decoder's, and it is known: −E log2 softmax over the levels."""
    x0 = torch.full((64, 1, 32), -1.0, dtype=torch.float64)

    def denoise(x: Any, logsnr: Any) -> Any:
        return -torch.ones_like(x) + 0 * x

    generator, clean, noisy = torch.Generator().manual_seed(0), 10.0, -12.0
    schedule = UniformLogsnr(noisy, clean)
    bound = continuous_bound(denoise, schedule, x0, generator=generator)
    told: dict[str, Any] = {"clean": clean, "noisy": noisy, "generator": generator, "rtol": 1e-6}
    ode = flow_likelihood(denoise, x0, variance_preserving, dequantisation="noised", **told)
    levels, s = torch.linspace(-1, 1, 256, dtype=torch.float64), math.exp(-0.5 * clean)
    z = -1 + s * torch.linspace(-6, 6, 2001, dtype=torch.float64)
    weight = torch.softmax(-0.5 * ((z + 1) / s) ** 2, 0)
    exact = -float((weight * torch.log_softmax(-0.5 * ((z[:, None] - levels) / s) ** 2, 1)[:, 0]).sum()) / math.log(2)
    assert bound.total.mean == pytest.approx(exact, abs=0.05) and ode.bits.mean == pytest.approx(exact, abs=0.05)
    uniform = flow_likelihood(denoise, x0, variance_preserving, **told)
    assert uniform.bits.mean > ode.bits.mean + 0.1


@pytest.mark.parametrize("share", [0.9, 1.0, 1.1])
def test_noised_dequantisation_is_its_closed_form(share: float) -> None:
    """Of a density q and decoder cancel: what is left is −E log p at u = x0 + s·eps, of variance v + s²."""
    model = Shrunken(share)
    x0 = math.sqrt(V) * torch.randn(4000, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    told: dict[str, Any] = {"clean": CLEAN, "noisy": NOISY, "probes": None, "bins": None, "generator": generator}
    found = flow_likelihood(model.denoise, x0, variance_preserving, dequantisation="noised", **told)
    ode = model.variances()[0]
    expected = 0.5 * (math.log(2 * math.pi * ode) + (V + math.exp(-CLEAN)) / ode) / math.log(2)
    assert found.bits.mean == pytest.approx(expected, abs=4 * found.bits.error)
    with pytest.raises(InputError, match="noised"):
        flow_likelihood(model.denoise, x0, variance_preserving, dequantisation="gaussian", **told)  # type: ignore[arg-type]
