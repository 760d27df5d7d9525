"""A network, a schedule and a prediction type make a denoiser: (x, logSNR, condition) -> x0."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from latentgen.diffusion.array import Array, Level, column, is_number, namespace
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.schedule.protocol import Schedule
from latentgen.errors import InputError


@dataclass(frozen=True)
class Condition:
    """What the network is told beside x and the time; every field is None or an array with the batch first.

    states: (B, L, D), the text encoder's hidden states. pooled: (B, D). mask: (B, L). labels: (B,). sizes: (B, 6),
    what Stable Diffusion XL is told in pixels: original height and width, top and left of the crop, height and width.
    guided: (B, D), the guidance scale as a guidance-distilled network is told it (`told_scale`).
    """

    states: Array | None = None
    pooled: Array | None = None
    mask: Array | None = None
    labels: Array | None = None
    sizes: Array | None = None
    guided: Array | None = None

    def _arrays(self) -> dict[str, Array]:
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: array for name, array in named if array is not None}

    def __len__(self) -> int:
        """The batch size; 0 for a condition that holds nothing."""
        return next((int(array.shape[0]) for array in self._arrays().values()), 0)

    def join(self, *others: "Condition") -> "Condition":
        """Conditions one below the other along the batch; they must hold the same fields in the same shapes."""
        held = self._arrays()
        if any(set(other._arrays()) != set(held) for other in others):
            raise InputError("conditions that are joined must hold the same fields (states, pooled, mask, labels)")
        joined = {}
        for name, array in held.items():
            rest = [getattr(other, name) for other in others]
            if any(other.shape[1:] != array.shape[1:] for other in rest):
                shapes = ", ".join(str(tuple(part.shape)) for part in (array, *rest))
                raise InputError(f"conditions that are joined must agree beyond the batch; {name} has shapes {shapes}")
            joined[name] = namespace(array).concat((array, *rest), axis=0)
        return Condition(**joined)

    def rows(self, index: slice | np.ndarray) -> "Condition":
        """The rows of the batch that a slice, or numbers, name."""
        return Condition(**{name: array[index] for name, array in self._arrays().items()})


Network = Callable[[Array, Array, Condition], Array]  # (x (B, …), time (B,), condition) -> raw output (B, …)
Denoise = Callable[[Array, Level], Array]  # (x (B, …), logsnr) -> x0 (B, …)


@dataclass(frozen=True)
class Denoiser:
    """(x, logsnr, condition) -> x0: the contract everything downstream of a network is written against.

    A network that puts out twice x's channels has learned a variance too (Nichol & Dhariwal 2021, section 3.1): the
    first half is the prediction, the second v in [−1, 1].
    """

    network: Network
    schedule: Schedule
    prediction: Prediction

    def output(self, x: Array, logsnr: Level, condition: Condition) -> Array:
        """The network's raw output at x (B, …) and logsnr (a float, or one for each row)."""
        return self.network(x, batch_times(self.schedule, x, logsnr), condition)

    def x0(self, out: Array, x: Array, logsnr: Level) -> Array:
        """x0 (B, …) from the raw output at x."""
        alpha, sigma = self.schedule.marginal(logsnr)
        plain = is_number(logsnr)
        alpha, sigma = (float(alpha), float(sigma)) if plain else (column(alpha, x), column(sigma, x))
        return self.prediction.x0(halves(out, x)[0], x, alpha, sigma)

    def __call__(self, x: Array, logsnr: Level, condition: Condition) -> Array:
        """The estimate of x0, of x's shape."""
        return self.x0(self.output(x, logsnr, condition), x, logsnr)


def halves(out: Array, x: Array) -> tuple[Array, Array | None]:
    """(prediction, learned variance) of a raw output: the second is None unless there are twice x's channels."""
    channels = x.shape[1]
    return (out[:, :channels], out[:, channels:]) if out.shape[1] == 2 * channels else (out, None)


def told_scale(scale: float, width: int) -> np.ndarray:
    """A guidance scale w as a guidance-distilled network is told it, (width,) float32 (Meng et al. 2023, section 3.1).

    1000·(w − 1) by sines and cosines of `width`/2 frequencies, as latent consistency models have it (Luo et al. 2023).
    """
    half = width // 2
    angles = 1000 * (scale - 1) * np.exp(-np.log(10000) / (half - 1) * np.arange(half))
    found = np.zeros(width, dtype=np.float32)
    found[: 2 * half] = np.concatenate([np.sin(angles), np.cos(angles)])
    return found


def batch_times(schedule: Schedule, x: Array, logsnr: Level) -> Array:
    """What the network is told, (B,): float64 for a float64 state, else float32 (half types cannot hold 999.5)."""
    xp = namespace(x)
    dtype = xp.float64 if x.dtype == xp.float64 else xp.float32
    time = schedule.time(logsnr)
    if is_number(time):
        return xp.full((x.shape[0],), float(time), dtype=dtype, device=x.device)
    return xp.astype(xp.asarray(time), dtype, copy=False)
