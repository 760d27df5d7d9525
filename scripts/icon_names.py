"""Which Unicode emoji an icon draws, and what Unicode says of it.

Sources: emojibase-data (labels, keywords, groups, short codes), emojilib (more keywords), the character tables that
icon packages bring. An icon package names its drawings in its own way, so a drawing is matched by code point where the
package tells it and else by name: Unicode's label, another package's name, the character's name, a short code.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from icon_captions import EVERYDAY, keywords, natural_label, without_colours

Files = Mapping[str, bytes]  # path inside a package -> content

CLOCK_FACES = frozenset({"1f552", "1f555", "1f558", "1f55b"})  # three, six, nine and twelve stand for all 24
KINDS = {"flags": "flag", "symbols": "symbol", "people-body": "person", "": "text", "component": "text"}


@dataclass(frozen=True)
class Concept:
    """What one emoji shows. `codepoint` is lower-case hexadecimal joined by "-", without the variation selector."""

    codepoint: str
    emoji: str
    label: str
    tags: tuple[str, ...]
    group: str
    kind: str
    is_variant: bool  # a skin tone of another concept


@dataclass(frozen=True)
class Names:
    """The concepts by code point, and the two ways from a drawing's name to a code point."""

    concepts: Mapping[str, Concept]
    exact: Mapping[str, str]
    squeezed: Mapping[str, str]

    def codepoint(self, name: str) -> str | None:
        """The code point of a drawing known by name only ("red-apple"), or None."""
        return self.exact.get(name) or self.squeezed.get(name.replace("-", "")) or self.exact.get(_unnumbered(name))

    def told_apart(self, concepts: Sequence[Concept]) -> set[str]:
        """The code points of those that can be told apart in black and white: ten hearts would have one caption.

        One is left of each label that is the same without colours: the one that is called so anyhow ("envelope" beside
        "red envelope", the red heart, which is "heart"), else Unicode's first.
        """
        called: defaultdict[str, set[str]] = defaultdict(set)
        for concept in concepts:
            for name in (concept.label, *EVERYDAY.get(concept.label, ())):
                called[name].add(concept.codepoint)
        apart: set[str] = set()
        seen: set[str] = set()
        place = {key: turn for turn, key in enumerate(self.concepts)}
        for concept in sorted(concepts, key=lambda concept: place[concept.codepoint]):
            bare = without_colours(concept.label)
            if bare != concept.label and (bare in seen or called[bare] - {concept.codepoint}):
                continue
            seen.add(bare)
            apart.add(concept.codepoint)
        return apart


def codepoint(written: str) -> str:
    """ "1F3F3-FE0F-200D-1F308" or "1f3f3_fe0f_200d_1f308" -> "1f3f3-200d-1f308"."""
    return "-".join(part for part in re.split(r"[-_]", written.lower()) if part != "fe0f")


def slug(text: str) -> str:
    """ "Côte d’Ivoire" -> "cote-divoire"."""
    ascii_text = unicodedata.normalize("NFKD", text.replace("’", "'")).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text.replace("'", "")).strip("-")


def _unnumbered(name: str) -> str:
    return re.sub(r"-\d$", "", name)


def read_names(emojibase: Files, emojilib: Files, character_tables: Iterable[Mapping[str, str]]) -> Names:
    """`character_tables` are packages' chars.json: written code point -> drawing's name."""
    concepts, labels = _concepts(emojibase, emojilib)
    exact: dict[str, str] = {}
    for key, label in labels.items():
        exact.setdefault(slug(label), key)
    for table in character_tables:
        for written, name in table.items():
            if codepoint(written) in concepts:
                exact.setdefault(name, codepoint(written))
    return Names(concepts, exact, _squeezed(exact, concepts, emojibase))


def _concepts(emojibase: Files, emojilib: Files) -> tuple[dict[str, Concept], dict[str, str]]:
    """The concepts, and Unicode's own label of each, both by code point."""
    messages = json.loads(emojibase["en/messages.json"])
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups = {subgroup["order"]: subgroup["key"] for subgroup in messages["subgroups"]}
    other = {
        codepoint("-".join(f"{ord(character):x}" for character in emoji)): words[1:]  # words[0] repeats the label
        for emoji, words in json.loads(emojilib["dist/emoji-en-US.json"]).items()
    }
    concepts: dict[str, Concept] = {}
    labels: dict[str, str] = {}
    for entry in json.loads(emojibase["en/data.json"]):
        group, subgroup = groups.get(entry.get("group"), ""), subgroups.get(entry.get("subgroup"), "")
        for one in [entry, *entry.get("skins", [])]:
            key = codepoint(one["hexcode"])
            label = natural_label(one["label"])
            spoken = [word.replace("_", " ") for word in other.get(key, [])]
            labels[key] = one["label"]
            concepts[key] = Concept(
                codepoint=key,
                emoji=one["emoji"],
                label=label,
                tags=keywords(label, entry.get("tags", []), spoken),
                group=group,
                kind=_kind(key, one["label"], group, subgroup),
                is_variant=one is not entry,
            )
    return concepts, labels


def _kind(key: str, label: str, group: str, subgroup: str) -> str:
    """object, person, symbol, flag, clock; "text" for letters and keycaps, which are no pictures of anything."""
    if subgroup in ("keycap", "alphanum") and group != "flags":
        return "text"
    if subgroup == "time" and ("thirty" in label or re.search("o[’']clock", label)):
        return "clock"
    return KINDS.get(group, "object")


def _squeezed(exact: Mapping[str, str], concepts: Mapping[str, Concept], emojibase: Files) -> dict[str, str]:
    """Names without separators: the exact ones, then character names and short codes where they are new."""
    squeezed = {name.replace("-", ""): key for name, key in exact.items()}
    for key in concepts:
        if "-" not in key:
            name = unicodedata.name(chr(int(key, 16)), "").lower()
            squeezed.setdefault(re.sub(r"[^a-z0-9]", "", name), key)
    for scheme in ("emojibase", "iamcal"):
        for written, codes in json.loads(emojibase[f"en/shortcodes/{scheme}.json"]).items():
            for code in [codes] if isinstance(codes, str) else codes:
                squeezed.setdefault(re.sub(r"[_-]", "", code), codepoint(written))
    return {name: key for name, key in squeezed.items() if re.search("[a-z]{2}", name)}
