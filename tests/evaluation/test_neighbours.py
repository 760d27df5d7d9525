"""Copies, concepts and styles, planted."""

import numpy as np
import pytest

from latentgen.evaluation.neighbours import Labels, find_copies, pair_figures


def test_a_planted_copy_is_flagged_and_nothing_else_is() -> None:
    random = np.random.default_rng(0)
    training, ours = random.standard_normal((500, 32)), random.standard_normal((50, 32))
    ours[7] = training[123] + 1e-3
    found = find_copies(ours, training)
    assert np.flatnonzero(found.flagged).tolist() == [7]
    assert found.nearest[7] == 123


def test_an_exact_copy_is_flagged_where_training_pictures_are_twice_there() -> None:
    training = np.repeat(np.random.default_rng(0).standard_normal((50, 8)), 2, axis=0).astype(np.float32)
    found = find_copies(training[[10]], training)
    assert found.flagged.tolist() == [True]


def planted() -> tuple[np.ndarray, Labels]:
    """Ten concepts in four styles: a concept's direction, and a style's, fainter."""
    concepts, styles = (values.ravel() for values in np.meshgrid(np.arange(10), np.arange(4), indexing="ij"))
    features = np.eye(14)[concepts] + 0.9 * np.eye(14)[10 + styles]
    return features, Labels(concepts, styles)


def test_the_right_concept_and_style_are_found_and_the_pair_itself_is_not_asked() -> None:
    features, labels = planted()
    figures = pair_figures(features, features, labels, features, labels)
    assert figures["concept"].value == figures["concept_share"].value == 1
    assert figures["concept_real"].value == 1
    assert figures["style"].value < 1  # its nearest is of its concept, in another style


def test_renderings_of_other_concepts_find_them_less() -> None:
    features, labels = planted()
    other = np.roll(features, 4, axis=0)  # the next concept, the same style
    figures = pair_figures(other, features, labels, features, labels)
    assert figures["concept"].value < 0.5
    assert figures["concept_share"].value == pytest.approx(figures["concept"].value)


def test_pairs_that_nobody_could_find_are_left_out() -> None:
    features, labels = planted()
    assert pair_figures(features[:2], features[:2], Labels(np.array([98, 99]), np.zeros(2)), features, labels) == {}
