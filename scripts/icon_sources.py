"""Where the icons come from: pinned packages with their checksums, styles, licences, and the NOTICE that says so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# npm package -> (version, sha256 of its tarball)
PACKAGES: Mapping[str, tuple[str, str]] = {
    "emojibase-data": ("17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
    "emojilib": ("4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303"),
    "@iconify-json/noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "@iconify-json/noto-v1": ("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "@iconify-json/twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "@iconify-json/fluent-emoji-flat": ("1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "@lobehub/fluent-emoji-3d": ("1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "@iconify-json/fluent-emoji-high-contrast": (
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
    "@iconify-json/fxemoji": ("1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "@iconify-json/emojione": ("1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "@iconify-json/streamline-emojis": ("1.2.4", "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"),
    "@iconify-json/openmoji": ("1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "@iconify-json/emojione-v1": ("1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
}
NAME_PACKAGES = ("emojibase-data", "emojilib")
TABLE_PACKAGES = ("@iconify-json/noto", "@iconify-json/twemoji", "@iconify-json/fluent-emoji-flat")


@dataclass(frozen=True)
class Style:
    """One foundry's way of drawing; `phrase` is how captions name it, `mono` that it is drawn in black and white."""

    name: str
    package: str
    licence: str
    phrase: str
    credit: str
    mono: bool = False
    holds_pictures: bool = False  # WebP files named by code point rather than SVG

    @property
    def share_alike(self) -> bool:
        return "-SA-" in self.licence


STYLES = (
    Style("noto", "@iconify-json/noto", "Apache-2.0", "noto emoji", "Noto Emoji, Google Inc."),
    Style("blob", "@iconify-json/noto-v1", "Apache-2.0", "blob emoji", "Noto Emoji version 1, Google Inc."),
    Style("twemoji", "@iconify-json/twemoji", "CC-BY-4.0", "twemoji", "Twemoji, Twitter, Inc. and other contributors"),
    Style(
        "fluent-flat",
        "@iconify-json/fluent-emoji-flat",
        "MIT",
        "flat fluent emoji",
        "Fluent Emoji, Microsoft Corporation",
    ),
    Style(
        "fluent-3d",
        "@lobehub/fluent-emoji-3d",
        "MIT",
        "3d fluent emoji",
        "Fluent Emoji, Microsoft Corporation; packaged by LobeHub",
        holds_pictures=True,
    ),
    Style(
        "fluent-mono",
        "@iconify-json/fluent-emoji-high-contrast",
        "MIT",
        "black and white line icon",
        "Fluent Emoji, Microsoft Corporation",
        mono=True,
    ),
    Style("fxemoji", "@iconify-json/fxemoji", "Apache-2.0", "firefox emoji", "FxEmojis, Mozilla Foundation"),
    Style(
        "emojione",
        "@iconify-json/emojione",
        "CC-BY-4.0",
        "emojione",
        "EmojiOne 2, Ranks.com Inc. / EmojiOne, continued as EmojiTwo",
    ),
    Style(
        "streamline",
        "@iconify-json/streamline-emojis",
        "CC-BY-4.0",
        "streamline sticker",
        "Streamline Emojis, Streamline (Webalys)",
    ),
    Style("openmoji", "@iconify-json/openmoji", "CC-BY-SA-4.0", "openmoji", "OpenMoji, HfG Schwäbisch Gmünd"),
    Style("emojione-v1", "@iconify-json/emojione-v1", "CC-BY-SA-4.0", "old emojione", "EmojiOne 1, Ranks.com Inc."),
)

# Drawings whose name means something else elsewhere: package -> drawing -> code point. Found by looking at them.
MISNAMED: Mapping[str, Mapping[str, str]] = {
    "@iconify-json/fxemoji": {
        "beachumbrella": "1f3d6",  # a beach, not the umbrella on the ground
        "cat": "1f431",  # the face
        "catside": "1f408",
        "couple": "1f491",  # with a heart, not holding hands
        "down": "1f447",  # hands, not buttons
        "left": "1f448",
        "right": "1f449",
        "up": "1f446",
        "pout": "1f64e",  # a person
        "pouting": "1f621",  # the red face
        "wave": "1f30a",  # of the sea, not of a hand
    },
}

# The sample that stands beside the tests: what an everyday prompt asks for, in every style that draws it.
SAMPLE_CONCEPTS: Mapping[str, str] = {
    "1f34e": "red apple",
    "1f34c": "banana",
    "1f355": "pizza",
    "1f382": "birthday cake",
    "2615": "hot beverage",
    "1f408": "cat",
    "1f415": "dog",
    "1f41f": "fish",
    "1f426": "bird",
    "1f333": "deciduous tree",
    "1f339": "rose",
    "1f697": "automobile",
    "1f6b2": "bicycle",
    "2708": "airplane",
    "1f680": "rocket",
    "1f3e0": "house",
    "2600": "sun",
    "2601": "cloud",
    "2b50": "star",
    "2602": "umbrella",
    "1f60a": "smiling face with smiling eyes",
    "1f600": "grinning face",
    "2764": "red heart",
    "1f511": "key",
}

LICENCES: Mapping[str, str] = {
    "Apache-2.0": "Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0",
    "MIT": "MIT License, below",
    "CC-BY-4.0": "Creative Commons Attribution 4.0, https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-4.0": "Creative Commons Attribution-ShareAlike 4.0, https://creativecommons.org/licenses/by-sa/4.0/",
}

MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def notice(styles: Sequence[Style], size: int) -> str:
    """The NOTICE of a set: every source, licence and credit, and what was changed."""
    pictures = "".join(
        f"- images/{style.name}: {style.credit}.\n"
        f"  {LICENCES[style.licence]}\n"
        f"  From the npm package {style.package} {PACKAGES[style.package][0]}.\n"
        for style in styles
    )
    return (
        "The pictures of this folder are drawings of others. They were changed: each was rendered or resized to\n"
        f"{size}x{size} pixels, composited on white, and saved as lossless WebP. The makers endorse nothing here.\n\n"
        f"{pictures}\n"
        "The captions are made from:\n"
        f"- emojibase-data {PACKAGES['emojibase-data'][0]}, copyright 2017-2019 Miles Johnson. MIT License, below.\n"
        f"- emojilib {PACKAGES['emojilib'][0]}, copyright 2014 Mu-An Chiou. MIT License, below.\n"
        "- Names and keywords of the Unicode Character Database and CLDR, copyright Unicode, Inc.\n"
        "  Unicode License v3, https://www.unicode.org/license.txt\n\n"
        "MIT License (Fluent Emoji: copyright Microsoft Corporation; packaging: LobeHub; emojibase; emojilib)\n\n"
        f"{MIT}"
    )
