"""Seen pairs are the held-out pairs' counterparts: the same concepts, in other styles."""

from collections import Counter

import numpy as np

from latentgen.evaluation.neighbours import Labels
from latentgen.evaluation.pairs import PairLabels, seen_and_held_out, seen_rows

STYLES = ("one", "two", "three", "four")


def labels() -> PairLabels:
    """Twenty concepts in four styles, of which each has one pair held out; and sixty that one style alone shows."""
    pairs = [(f"thing {n}", style) for n in range(20) for style in STYLES]
    held = [(f"thing {n}", STYLES[n % 4]) for n in range(20)]
    known = [*(pair for pair in pairs if pair not in held), *((f"flag {n}", "one") for n in range(60))]
    return PairLabels(*(Labels(*map(np.array, zip(*some, strict=True))) for some in (held, known)))


def test_each_held_out_pair_has_a_training_picture_of_its_concept_in_another_style() -> None:
    both = labels()
    for seed in (0, 1):
        rows = seen_rows(both, len(both.known.concepts), 20, seed)
        chosen = both.known.rows(rows)
        assert chosen.concepts.tolist() == both.held.concepts.tolist()
        assert (chosen.styles != both.held.styles).all() and len(set(rows.tolist())) == 20
    assert not np.array_equal(rows, seen_rows(both, len(both.known.concepts), 20, 0))
    counted = Counter(chosen.styles.tolist())
    assert set(counted) == set(STYLES)  # not the first style alone


def test_a_picture_is_drawn_twice_only_where_there_is_no_other() -> None:
    held = Labels(np.array(["a", "a", "a", "b"]), np.array(["1", "2", "3", "1"]))
    known = Labels(np.array(["a", "a", "c"]), np.array(["4", "5", "1"]))
    rows = seen_rows(PairLabels(held, known), 3, 4, 0)
    assert sorted(rows.tolist()) in ([0, 0, 1], [0, 1, 1])  # none of b, which no other style shows


def test_without_labels_as_many_are_drawn_as_are_held_out() -> None:
    rows = seen_rows(None, 50, 7, 0)
    assert len(set(rows.tolist())) == 7 and rows.max() < 50
    alone = PairLabels(Labels(np.array(["a"]), np.array(["1"])), Labels(np.array(["b"]), np.array(["1"])))
    assert len(seen_rows(alone, 1, 3, 0)) == 1


def test_perfect_renderings_of_both_find_the_concept_equally_often() -> None:
    """Features are a direction of the concept, with noise: real pictures in the renderings' place."""
    both = labels()
    rng = np.random.default_rng(0)
    names = {name: rng.normal(size=64) for name in {*both.held.concepts, *both.known.concepts}}

    def features(some: Labels) -> np.ndarray:
        return np.stack([names[name] + 0.1 * rng.normal(size=64) for name in some.concepts])

    rows = seen_rows(both, len(both.known.concepts), 20, 0)
    theirs, known = features(both.held), features(both.known)
    found = seen_and_held_out(both, (theirs, theirs, known), rows, known[rows], 0)
    for kind in ("held-out", "seen"):
        assert found[f"{kind} pairs: concept"].value == 1 and found[f"{kind} pairs: concept"].count == 20
