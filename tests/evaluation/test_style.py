"""The probe of style: strokes and colours it must tell apart, whatever the picture shows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from latentgen.data import load_pixels, read_folder
from latentgen.errors import InputError
from latentgen.evaluation.style import GROUPS, StyleProbe, colours, second_moments, style_encoder

ICONS = Path(__file__).parents[1] / "data" / "icons"


def test_second_moments_are_those_of_channels_over_places_and_know_no_place() -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = second_moments(x)
    expected = [(x[0, i] * x[0, j]).mean() for i in range(3) for j in range(i, 3)]
    assert torch.allclose(found[0], torch.stack(expected), atol=1e-6)
    assert torch.allclose(second_moments(x.flip(3)), found, atol=1e-6)


def test_colours_are_shares_of_the_picture() -> None:
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0, :, :2] = 1
    found = colours(red)[0] ** 2
    assert found[0] == pytest.approx(0.5) and found[7 * 64] == pytest.approx(0.5) and found.sum() == pytest.approx(1)


def test_planted_styles_are_found_where_concepts_are_new() -> None:
    random = np.random.default_rng(0)
    styles = np.array(["a", "b", "c"])[np.arange(90) % 3]
    rows = np.eye(3)[np.arange(90) % 3] @ random.standard_normal((3, 12)) + 0.2 * random.standard_normal((90, 12))
    probe = StyleProbe.fit(rows[:60], styles[:60], groups=(4, 8))
    assert (probe(rows[60:]) == styles[60:]).all()
    few, many = np.linspace(-1, 1, 12), np.arange(60) < 8  # fewer rows than features, and more
    for rows_of in (rows[:60], rows[:60][many]):
        found = StyleProbe.fit(rows_of, styles[:60][: len(rows_of)], groups=(4, 8))
        x = (rows_of - found.mean) * found.scale
        wanted = np.where(styles[:60][: len(rows_of), None] == found.styles, 1.0, -1.0) - found.bias
        assert np.allclose(x.T @ (wanted - x @ found.weights), found.weights, atol=1e-8)  # the ridge's own condition
        assert found(found.mean[None] + few).shape == (1,)
    with pytest.raises(InputError, match="two styles or more"):
        StyleProbe.fit(rows, np.full(90, "a"), groups=(4, 8))


def test_the_styles_of_the_sample_are_told_apart_across_concepts(tmp_path: Path) -> None:
    pictures = read_folder(ICONS).pictures
    found = load_pixels(pictures, 64, tmp_path)
    styles = np.array([picture.attributes["style"] for picture in found.pictures])
    concepts = np.array([picture.attributes["codepoint"] for picture in found.pictures])
    features = style_encoder().features(np.asarray(found.array))
    assert features.shape == (len(styles), sum(GROUPS))
    new = np.isin(concepts, np.unique(concepts)[::3])
    right = (StyleProbe.fit(features[~new], styles[~new])(features[new]) == styles[new]).mean()
    assert right > 0.6  # of nine; 1 in 9 is chance
