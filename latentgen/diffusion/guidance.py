"""Guidance: two estimates combined into one Denoise.

Classifier-free guidance (Ho & Salimans 2022) with a negative or empty condition, its rescaling (Lin et al. 2023) and
its interval (Kynkäänniemi et al. 2024). Scale 1 is off and costs one evaluation of B; so does every step outside the
interval. On, it is one evaluation of 2B, the unconditional half first.
"""

import array_api_compat

from latentgen.diffusion.array import Array, column
from latentgen.diffusion.denoiser import Condition, Denoise, Denoiser
from latentgen.errors import InputError


def guided(
    denoiser: Denoiser,
    condition: Condition,
    uncond: Condition | None = None,
    *,
    scale: float = 1.0,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    clip: float | None = None,
) -> Denoise:
    """A Denoise with the condition, and guidance away from `uncond`, built in.

    scale: w in out = out_u + w·(out_c − out_u) (Imagen's and diffusers' w; Ho & Salimans' is w − 1).
    rescale: phi in [0, 1], how far the guided output's standard deviation is brought back to the conditional one's
    (Lin et al. 2023, eq. 15 and 16). interval: (low, high) logSNR inside which guidance acts; None is everywhere.
    clip: bound of |x0| (pixel models). Raises InputError for a scale other than 1 without an `uncond`.
    """
    if scale != 1.0 and uncond is None:
        raise InputError(f"guidance scale {scale} needs an unconditional or negative condition")

    def denoise(x: Array, logsnr: float) -> Array:
        if uncond is None or scale == 1.0 or not _inside(interval, logsnr):
            out = denoiser.output(x, logsnr, condition)
        else:
            out_u, out_c = both(denoiser, x, logsnr, uncond, condition)
            out = out_u + scale * (out_c - out_u)
            if rescale:
                out = rescaled(out, out_c, rescale)
        x0 = denoiser.x0(out, x, logsnr)
        return x0 if clip is None else array_api_compat.array_namespace(x0).clip(x0, -clip, clip)

    return denoise


def both(denoiser: Denoiser, x: Array, logsnr: float, uncond: Condition, condition: Condition) -> tuple[Array, Array]:
    """(unconditional, conditional) raw outputs (B, …) from one evaluation of 2B."""
    xp = array_api_compat.array_namespace(x)
    out = denoiser.output(xp.concat((x, x), axis=0), logsnr, uncond.join(condition))
    return out[: x.shape[0]], out[x.shape[0] :]


def rescaled(out: Array, reference: Array, phi: float) -> Array:
    """phi of the way from `out` to `out` with the reference's standard deviation, row by row (Lin et al. 2023)."""
    factor = _spread(reference) / _spread(out)
    return out * (phi * factor + (1 - phi))


def _spread(out: Array) -> Array:
    """Standard deviation over all but the batch: (B, 1, …, 1)."""
    xp = array_api_compat.array_namespace(out)
    return column(xp.std(xp.reshape(out, (out.shape[0], -1)), axis=1), out)


def _inside(interval: tuple[float, float] | None, logsnr: float) -> bool:
    return interval is None or interval[0] <= logsnr <= interval[1]
