"""Curves over a setting: same noise at every point, values read strictly."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from latentgen.errors import InputError
from latentgen.evaluation.sweep import KID, LIKENESS, read_values, sweep


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


def test_values_are_read_strictly() -> None:
    assert read_values("1, 2,4.5", "--guidances", 0) == (1, 2, 4.5)
    assert read_values("5,10", "--step-counts", 1, whole=True) == (5, 10)
    for text in ("", "1,x", "nan", "-1", "inf"):
        with pytest.raises(InputError, match="--guidances is"):
            read_values(text, "--guidances", 0)
    for text in ("0", "2.5"):
        with pytest.raises(InputError, match="whole numbers of 1 or more"):
            read_values(text, "--step-counts", 1, whole=True)
