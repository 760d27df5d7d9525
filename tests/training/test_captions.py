"""Which caption, in which order of its parts, a picture is told by: as likely as asked, the same when asked again."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from latentgen.data import Picture
from latentgen.training.captions import CaptionTable, Variety, order_parts
from latentgen.training.draw import Draw

TAGS = "red apple, shiny, on a table, watercolour, 1990s"


def pictures(*captions: tuple[str, ...]) -> list[Picture]:
    return [Picture(Path(f"{n}.png"), said) for n, said in enumerate(captions)]


def test_orders_hold_the_same_parts_with_the_first_in_front_and_the_first_order_is_as_written() -> None:
    orders = order_parts(TAGS, Variety(orders=8, keep=2, seed=3))
    assert orders[0] == TAGS and len(set(orders)) == 6  # all there are
    for order in orders:
        parts = order.split(", ")
        assert parts[:2] == ["red apple", "shiny"] and sorted(parts) == sorted(TAGS.split(", "))
    assert orders == order_parts(TAGS, Variety(orders=8, keep=2, seed=3))
    assert orders != order_parts(TAGS, Variety(orders=8, keep=2, seed=4))


def test_a_sentence_and_a_single_loose_part_have_one_order() -> None:
    assert order_parts("a cat asleep", Variety(orders=4)) == ["a cat asleep"] * 4
    assert order_parts("a cat, asleep", Variety(orders=4)) == ["a cat, asleep"] * 4


def test_a_table_without_variety_is_what_it_was() -> None:
    told = pictures(("a", "b c"), ("d, e, f",))
    plain, varied = CaptionTable(told), CaptionTable(told, Variety())
    assert plain.texts == varied.texts == ("a", "b c", "d, e, f")
    assert plain.fingerprint() == varied.fingerprint()
    items, uniform = np.array([0, 0, 1]), np.array([0.49, 0.51, 0.99], np.float32)
    assert plain.choose(items, uniform).tolist() == varied.choose(items, uniform).tolist() == [0, 1, 2]


def test_every_order_is_seen_about_equally_often() -> None:
    table = CaptionTable(pictures((TAGS,)), Variety(orders=4))
    seen = Counter(table.choose(np.zeros(4000, int), Draw(0, 0, 4000).uniform().numpy()).tolist())
    assert len(seen) == len(table.texts) == 4
    assert all(abs(count - 1000) < 130 for count in seen.values())  # 4.7 standard deviations


@pytest.mark.parametrize("orders", [1, 3])
def test_the_long_caption_is_told_as_often_as_asked(orders: int) -> None:
    told = pictures(("cat", "an orange cat, asleep, on a red sofa", "a cat"), ("dog",), ("one two", "three four"))
    table = CaptionTable(told, Variety(orders, 1, 0.8))
    items = np.repeat(np.arange(3), 3000)
    chosen = table.choose(items, Draw(1, 0, 9000).uniform().numpy())
    said = [Counter(table.texts[number] for number in chosen[items == item]) for item in range(3)]
    long = sum(count for text, count in said[0].items() if "sofa" in text)
    assert abs(long / 3000 - 0.8) < 0.035  # 4.8 standard deviations
    assert abs(said[0]["cat"] / 3000 - 0.1) < 0.027 and abs(said[0]["a cat"] / 3000 - 0.1) < 0.027
    assert said[1] == {"dog": 3000}
    assert abs(said[2]["one two"] / 3000 - 0.5) < 0.045


@pytest.mark.parametrize("long", [0.0, 1.0])
def test_the_ends_of_the_scale_are_never_and_always(long: float) -> None:
    table = CaptionTable(pictures(("a", "a b")), Variety(long=long))
    uniform = np.array([0.0, 0.5, 1 - 2**-24], np.float32)
    assert table.choose(np.zeros(3, int), uniform).tolist() == [int(long)] * 3


def test_what_a_step_is_told_depends_on_seed_and_step_alone() -> None:
    items = np.arange(2).repeat(50)

    def choose(seed: int, step: int) -> list[int]:
        table = CaptionTable(pictures((TAGS, "x"), ("y", TAGS)), Variety(4, 1, 0.5, seed=7))
        return table.choose(items, Draw(seed, step, 100).uniform().numpy()).tolist()

    assert choose(0, 5) == choose(0, 5)
    assert choose(0, 5) != choose(0, 6) and choose(0, 5) != choose(1, 5)
