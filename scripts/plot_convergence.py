"""Error against evaluations for every ODE sampler, on data whose exact score is known; a picture and a table.

    python scripts/plot_convergence.py [--out docs/convergence.png]

The data is a mixture of two Gaussians, its denoiser exact; the truth is the probability-flow ODE solved to 1e-11, from
logSNR −6 to 5 with uniform knots. The order is the slope between the two longest runs.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latentgen.diffusion.sampling import SAMPLERS, Sampler
from latentgen.diffusion.sampling.adaptive import dormand_prince, flow_slope
from latentgen.diffusion.schedule import variance_preserving

MEANS, STDS, WEIGHTS = (-1.0, 0.6), (0.2, 0.35), (0.4, 0.6)
START, END = -6.0, 5.0
STEPS = (5, 10, 20, 40, 80, 160)
CURVES: dict[str, Sampler] = {
    "ddim, euler": SAMPLERS["ddim"],
    "heun": SAMPLERS["heun"],
    "dpmpp-2m": SAMPLERS["dpmpp-2m"],
    "unipc": SAMPLERS["unipc"],
    "unipc order 3": partial(SAMPLERS["unipc"], order=3, lower_order_final=False),
    "deis": SAMPLERS["deis"],
    "deis order 3": partial(SAMPLERS["deis"], order=3, lower_order_final=False),
    "plms": SAMPLERS["plms"],
    "lms": SAMPLERS["lms"],
}
COLOURS = ("#222222", "#999999", "#d1495b", "#1b7f79", "#62c370", "#2e5eaa", "#7aa6e8", "#edae49", "#7b4ea3")
WIDTH, HEIGHT, MARGIN = 900, 600, 70


def denoise(x: np.ndarray, logsnr: float) -> np.ndarray:
    """E[x0 | x] of the mixture, coordinate by coordinate."""
    alpha, sigma = variance_preserving(logsnr)
    spreads = [alpha**2 * std**2 + sigma**2 for std in STDS]
    shares = [
        w / math.sqrt(v) * np.exp(-0.5 * (x - alpha * m) ** 2 / v)
        for w, m, v in zip(WEIGHTS, MEANS, spreads, strict=True)
    ]
    parts = [m + alpha * s**2 / v * (x - alpha * m) for m, s, v in zip(MEANS, STDS, spreads, strict=True)]
    return sum(share * part for share, part in zip(shares, parts, strict=True)) / sum(shares)


def measured(sampler: Sampler, x: np.ndarray, exact: np.ndarray) -> tuple[list[int], list[float]]:
    """Evaluations and root-mean-square errors, one for each of STEPS."""
    evaluations, errors = [], []
    for steps in STEPS:
        calls = 0

        def counted(x: np.ndarray, logsnr: float) -> np.ndarray:
            nonlocal calls
            calls += 1
            return denoise(x, logsnr)

        for step in sampler(counted, x, np.linspace(START, END, steps + 1), variance_preserving, None):
            end = step.x
        evaluations.append(calls)
        errors.append(float(np.sqrt(np.mean((end - exact) ** 2))))
    return evaluations, errors


def drawn(curves: dict[str, tuple[list[int], list[float]]]) -> Image.Image:
    """A log-log picture: evaluations across, error up."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=15)
    every = [error for _, errors in curves.values() for error in errors]
    low, high = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
    most = math.log10(400)

    def place(evaluations: float, error: float) -> tuple[float, float]:
        across = (math.log10(evaluations) - math.log10(4)) / (most - math.log10(4))
        up = (math.log10(error) - low) / (high - low)
        return MARGIN + across * (WIDTH - 2.9 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 1.5 * MARGIN)

    for power in range(low, high + 1):
        draw.line([place(4, 10**power), place(400, 10**power)], fill="#dddddd")
        draw.text((12, place(4, 10**power)[1] - 9), f"1e{power}", fill="#444444", font=font)
    for count in (5, 10, 20, 50, 100, 200):
        draw.line([place(count, 10**low), place(count, 10**high)], fill="#eeeeee")
        draw.text((place(count, 10**low)[0] - 10, HEIGHT - MARGIN + 8), str(count), fill="#444444", font=font)
    draw.text((WIDTH / 2 - 120, HEIGHT - 32), "network evaluations", fill="#222222", font=font)
    draw.text((12, 8), "error of x against the exact ODE", fill="#222222", font=font)
    ends: list[tuple[float, str, str]] = []
    for (name, (evaluations, errors)), colour in zip(curves.items(), COLOURS, strict=True):
        points = [place(*pair) for pair in zip(evaluations, errors, strict=True)]
        draw.line(points, fill=colour, width=3)
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        ends.append((points[-1][1], name, colour))
    level = -math.inf
    for end, name, colour in sorted(ends):
        level = max(end - 9, level + 18)
        draw.text((WIDTH - 1.75 * MARGIN, level), name, fill=colour, font=font)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/convergence.png"))
    asked = parser.parse_args()
    x = exact = np.random.default_rng(0).standard_normal((4, 64))
    for step in dormand_prince(flow_slope(denoise), x, START, END, rtol=1e-11, atol=1e-12):
        exact = step.y
    curves = {name: measured(sampler, x, exact) for name, sampler in CURVES.items()}
    print("| sampler | " + " | ".join(f"{steps} steps" for steps in STEPS) + " | order |")
    print("|---|" + "---|" * (len(STEPS) + 1))
    for name, (_, errors) in curves.items():
        order = math.log2(errors[-2] / errors[-1])
        print(f"| {name} | " + " | ".join(f"{error:.1e}" for error in errors) + f" | {order:.2f} |")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    drawn(curves).save(asked.out, optimize=True)
    print(asked.out)


if __name__ == "__main__":
    main()
