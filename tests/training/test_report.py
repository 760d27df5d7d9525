"""The page of a run: whole in itself, true to its logs, and drawn right."""

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from latentgen.training.report import HEIGHT, WIDTH, curve_plot, smoothed, write_page


class Page(HTMLParser):
    """What a page refers to, and what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_holds_all_it_shows(tmp_path: Path) -> None:
    place = tmp_path / "unet-0123"
    (place / "sheets").mkdir(parents=True)
    entries = [{"step": s, "loss": 1 / s, "rate": 1e-3, "norm": 2.0} for s in range(1, 400)]
    entries += [{"step": s, "validation_loss": 1.1 / s, "caption_gain": s / 9} for s in range(100, 400, 100)]
    (place / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for step in range(0, 900, 100):
        Image.new("RGB", (8, 8), (step // 4, 0, 0)).save(place / "sheets" / f"unet-{step:07d}.png")
    figures = {"tokenizer": {"vocabulary": 64}, "unet": {"validation_loss": 0.0123456}}
    page = Page()
    text = write_page("a <name>", tmp_path, figures, {"name": "x", "note": "</pre><script>alert(1)</script>"})
    page.feed(text)
    assert page.open == [] and "script" not in re.findall(r"<(\w+)", text)
    assert len(page.links) == 6 and all(link.startswith("data:image/png;base64,") for link in page.links)
    said = " ".join(page.words)
    assert "a <name>" in said and "0.01235" in said and "validation loss" in said and "caption gain" in said
    assert "unet-0000000" in said and "unet-0000800" in said


def test_of_two_runs_the_page_shows_the_one_whose_figures_it_has(tmp_path: Path) -> None:
    for place, loss in (("unet-first", 0.5), ("unet-later", 0.25)):
        (tmp_path / place / "sheets").mkdir(parents=True)
        (tmp_path / place / "log.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
        (tmp_path / place / "done.json").write_text(json.dumps({"figures": {"validation_loss": loss}}))
        Image.new("RGB", (8, 8)).save(tmp_path / place / "sheets" / f"{place}.png")
    os.utime(tmp_path / "unet-first" / "log.jsonl", (0, 0))
    for place, loss in (("unet-first", 0.5), ("unet-later", 0.25), ("unet-later", 0.75)):  # of no such run: the latest
        text = write_page("x", tmp_path, {"unet": {"validation_loss": loss, "more": 1.0}}, {})
        assert re.findall(r"<figcaption>(unet-.*?)<", text) == [place]


def test_a_log_that_a_kill_cut_short_still_makes_a_page(tmp_path: Path) -> None:
    place = tmp_path / "unet-0123"
    place.mkdir()
    lines = [json.dumps({"step": s, "loss": None if s == 5 else 1 / s, "rate": 1, "norm": None}) for s in range(1, 9)]
    (place / "log.jsonl").write_text(
        "\n".join([*lines, '{"step": 9, "lo', '{"step": 9, "loss": NaN, "norm": 1}', "[1]", ""])
    )
    text = write_page("a", tmp_path, {"unet": {"loss": 0.1}}, {})
    assert "<figcaption>loss</figcaption>" in text
    drawn = curve_plot({"loss": [(1, 0.5), (2, None), (3, 0.1)]}, "loss")  # type: ignore[list-item]
    assert len(re.search(r'points="([^"]+)"', drawn).group(1).split()) == 2  # type: ignore[union-attr]
    assert smoothed([(1, 0.5), (2, None), (3, 0.1)]) == [(1, 0.5), (3, 0.1)]


def test_a_curve_lies_where_its_numbers_are() -> None:
    drawn = curve_plot({"loss": [(0, 1.0), (50, 3.0), (100, 2.0), (70, math.nan)]}, "a & b")
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", drawn).group())  # type: ignore[union-attr]
    (line,) = svg.iter("polyline")
    points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
    assert len(points) == 3
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.2)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert "a &amp; b" in drawn


def test_a_log_axis_leaves_out_what_it_cannot_show() -> None:
    drawn = curve_plot({"norm": [(1, 0.0), (2, 1.0), (3, 10.0), (4, 100.0)]}, "norm", log=True)
    points = re.search(r'points="([^"]+)"', drawn).group(1).split()  # type: ignore[union-attr]
    heights = [float(point.split(",")[1]) for point in points]
    assert len(points) == 3 and heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert curve_plot({"norm": [(1, 0.0)]}, "norm", log=True) == ""


def test_smoothing_keeps_the_mean_and_the_end() -> None:
    points = [(float(step), float(step % 7)) for step in range(1000)]
    found = smoothed(points, 100)
    assert len(found) == 100 and found[-1][0] == 999
    assert sum(y for _, y in found) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
