"""What every report shares: numbers as people write them, plots with round marks."""

import re

import numpy as np
import pytest

from latentgen.page import BEGINS, curve_plot, document, number, ticks


@pytest.mark.parametrize(
    ("value", "said"),
    [(69583, "69,583"), (0.0, "0"), (25.207, "25.21"), (1e-4, "1e-4"), (2.5e-5, "2.5e-5"), (-0.031, "-0.031")],
)
def test_numbers_are_short_and_whole_ones_in_full(value: float, said: str) -> None:
    assert number(value) == said


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.438, 1.21), (-3.2, 7.9), (1e-5, 1e-3), (99, 101.5), (0, 3e5)])
def test_marks_are_round_few_and_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    assert all(low - 1e-9 <= mark <= high + 1e-9 for mark in found)
    step = found[1] - found[0]
    assert f"{step:e}"[0] in "125"
    assert np.diff(found) == pytest.approx(step)


def test_intervals_are_drawn_within_the_plot_and_curves_are_named() -> None:
    drawn = curve_plot({"a<b": [(1, 2.0, 1.0, 3.0), (2, 2.5, 2.0, 9.0)], "c": [(1, 4.0)]}, "t", ends=("clean", "noise"))
    heights = [float(y) for y in re.findall(r'y[12]="([\d.-]+)"', drawn)]
    assert all(0 <= y <= 240 for y in heights)
    assert drawn.count('opacity=".45"') == 2 and "a&lt;b" in drawn and ">clean<" in drawn and ">noise<" in drawn


def test_a_page_escapes_its_title_and_names_nothing_outside() -> None:
    page = document("<x>", ["<p>y</p>"])
    assert re.match(BEGINS, page) and not re.match(BEGINS, page.replace("color-scheme", "colour", 1))
    assert "<title>&lt;x&gt;</title>" in page and "prefers-color-scheme: dark" in page and "http" not in page


def test_names_that_are_no_characters_leave_a_page_in_utf8() -> None:
    page = document("caf\udce9", ["<b>caf\udce9</b>"])
    assert page.encode().decode() == page and page.count("caf\\udce9") == 2
