"""What is said of an icon: labels, articles, everyday names, and captions that are true of the drawing."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import icon_captions
import icon_sources


@pytest.mark.parametrize(
    ("unicode_label", "spoken"),
    [
        ("red apple", "red apple"),
        ("man: red hair", "man with red hair"),
        ("woman: bald", "bald woman"),
        ("person walking: facing right", "person walking facing right"),
        ("flag: Japan", "flag of Japan"),
        ("flag: United States", "flag of the United States"),
        ("flag: Trinidad & Tobago", "flag of Trinidad and Tobago"),
        ("family: man, woman, girl, girl", "family of a man, a woman and two girls"),
        ("family: adult, child", "family of an adult and a child"),
        ("kiss: man, man", "two men kissing"),
        ("couple with heart: woman, man", "a woman and a man with a heart"),
        ("three o’clock", "clock showing three o'clock"),
        ("Japanese “here” button", "Japanese here button"),
        ("locked", "padlock"),
    ],
)
def test_labels_are_said_naturally(unicode_label: str, spoken: str) -> None:
    assert icon_captions.natural_label(unicode_label) == spoken


@pytest.mark.parametrize(
    "said",
    [
        "an apple",
        "a red apple",
        "a unicorn",
        "an hourglass",
        "a ewe",
        "an x-ray",
        "a one-piece swimsuit",
        "an OK hand",
        "a bus",
        "a cactus",
        "a wine glass",
        "a nest with eggs",
        "a face with tears of joy",
        "a man with red hair",
        "the sun",
        "a sunflower",
        "the sun behind cloud",
        "the flag of Japan",
        "glasses",
        "bread",
        "two hearts",
        "men with bunny ears",
        "skis",
        "money with wings",
        "Santa Claus",
        "a woman and a man kissing",
        "no smoking",
    ],
)
def test_articles_are_those_one_says(said: str) -> None:
    first, _, rest = said.partition(" ")
    name = rest if first in {"a", "an", "the"} and "kissing" not in said else said
    assert icon_captions.with_article(name) == said


@pytest.mark.parametrize(
    ("label", "bare"),
    [
        ("red apple", "apple"),
        ("light blue heart", "heart"),
        ("large orange diamond", "large diamond"),
        ("man with red hair", "man"),
        ("mahjong red dragon", "mahjong dragon"),
        ("black heart", "black heart"),  # black and white are what that style can show
        ("man with white hair", "man with white hair"),
        ("blueberries", "blueberries"),
        ("rainbow", "rainbow"),
        ("orange", "orange"),  # never empty
    ],
)
def test_colours_are_taken_out_of_a_label(label: str, bare: str) -> None:
    assert icon_captions.without_colours(label) == bare


def test_keywords_put_agreement_first_and_name_no_colour() -> None:
    found = icon_captions.keywords(
        "cat", ["cats", "pet", "kitten", "orange"], ["animal", "animals", "kitten", "cat2", "black cat", "medium"]
    )
    assert found == ("kitten", "pet", "animal")


def test_captions_are_long_and_short_with_the_style_and_without() -> None:
    said = icon_captions.captions("red apple", ("fruit", "food", "ripe", "school"), "object", "noto emoji")
    assert said[0] == "red apple, noto emoji"
    assert {
        "a red apple, noto emoji style",
        "red apple, fruit, food, ripe, noto emoji",
        "red apple",
        "a red apple",
        "an apple",
        "an apple, noto emoji style",
    } <= set(said)
    assert len(set(said)) == len(said)
    assert "a car" in icon_captions.captions("automobile", (), "object", "twemoji")
    assert "a heart" not in icon_captions.captions("blue heart", (), "object", "twemoji")


def test_the_mono_style_names_no_colour_it_cannot_show() -> None:
    phrase = "black and white line icon"
    for label in ("red apple", "man with red hair", "tangerine", "large blue diamond"):
        for caption in icon_captions.captions(label, (), "object", phrase, mono=True):
            assert not icon_captions.names_colour(caption.replace(phrase, "")), caption
    said = icon_captions.captions("red apple", ("fruit",), "object", phrase, mono=True)
    assert said[0] == "apple, black and white line icon"
    assert "an apple" in said


def test_an_everyday_name_is_used_where_it_is_no_other_concept_s_label() -> None:
    said = icon_captions.captions("rabbit face", (), "object", "twemoji")
    assert "a rabbit" in said and "rabbit, twemoji" in said
    said = icon_captions.captions("rabbit face", (), "object", "twemoji", taken={"rabbit"})
    assert not [caption for caption in said if "rabbit" in caption and "rabbit face" not in caption]
    assert "an apple" not in icon_captions.captions("green apple", (), "object", "twemoji", taken={"apple"})
    said = icon_captions.captions("wrapped gift", (), "object", "twemoji", taken={"gift"})
    assert "a present" in said and "a gift" not in said


def test_everyday_names_belong_to_labels_of_the_sample() -> None:
    labels = {icon_captions.natural_label(label) for label in icon_sources.SAMPLE_CONCEPTS.values()}
    assert {"automobile", "deciduous tree", "hot beverage", "airplane"} <= labels & icon_captions.EVERYDAY.keys()
    assert not any(len(names) > 2 for names in icon_captions.EVERYDAY.values())
