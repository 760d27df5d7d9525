"""Curves over a setting: same noise at every point."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from latentgen.evaluation.sweep import KID, LIKENESS, sweep


def test_a_curve_has_its_best_where_renderings_are_the_real_pictures() -> None:
    random = np.random.default_rng(0)
    real = random.standard_normal((40, 16))
    asked = []

    def draw(settings: dict[str, Any], captions: Sequence[str]) -> np.ndarray:
        asked.append((settings, tuple(captions)))
        off = abs(settings["guidance_scale"] - 4)
        return np.rint(100 * (real[: len(captions)] + off)).astype(int)[:, None, :, None]

    found = sweep("guidance_scale", (7.0, 4.0, 1.0, 4.0), ["a"] * 12, draw, lambda pixels: pixels[:, 0, :, 0], real)
    assert [point.value for point in found.points] == [1, 4, 7]
    assert [settings for settings, _ in asked] == [{"guidance_scale": value} for value in (1, 4, 7)]
    assert len({captions for _, captions in asked}) == 1
    likeness = [point.figures[LIKENESS].value for point in found.points]
    assert likeness[1] == pytest.approx(1, abs=1e-3) and likeness[1] > max(likeness[0], likeness[2]) + 0.1
    kernel = [abs(point.figures[KID].value) for point in found.points]
    assert kernel[1] < min(kernel[0], kernel[2])
    assert len(found.points[0].renderings) == len(found.captions) == 6
