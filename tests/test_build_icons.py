"""The icon set's script: what is held out, what is told apart, and the whole pipeline on packages made here."""

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentgen.data import read_folder
from latentgen.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import build_icons
import icon_captions
import icon_names
import icon_sources

SAMPLE = Path(__file__).parent / "data" / "icons"

# ---- the hold-out


def thing(codepoint: str, label: str, kind: str = "object") -> icon_names.Concept:
    return icon_names.Concept(codepoint, "", label, (), "objects", kind, False)


def icon(codepoint: str, style: str, kind: str = "object") -> build_icons.Icon:
    concept = thing(codepoint, "thing", kind)
    return build_icons.Icon(concept, next(one for one in icon_sources.STYLES if one.name == style), "thing")


def test_a_pair_is_held_out_by_its_hash_if_three_other_styles_know_the_concept() -> None:
    held_out = icon("1f34e", "fluent-flat")
    assert int(hashlib.sha1(b"1f34e|fluent-flat").hexdigest(), 16) % 20 == 0
    assert build_icons.is_held_out(held_out, 4)
    assert not build_icons.is_held_out(held_out, 3)
    assert not build_icons.is_held_out(icon("1f34e", "noto"), 9)
    assert not build_icons.is_held_out(icon("1f34e", "fluent-flat", kind="person"), 9)
    sample = {(p.attributes["codepoint"], p.attributes["style"]): p.split for p in read_folder(SAMPLE).pictures}
    assert sample["1f34e", "fluent-flat"] == "test"
    for (codepoint, style), split in sample.items():
        assert (split == "test") == build_icons.is_held_out(icon(codepoint, style), 4)


def test_in_black_and_white_one_drawing_is_left_of_those_that_differ_by_colour() -> None:
    labels = ["blue heart", "red heart", "red envelope", "envelope", "red circle", "blue circle", "closed book"]
    labels += ["green book", "blue book", "white heart", "man with red hair", "man", "tangerine"]
    concepts = {f"{turn:x}": thing(f"{turn:x}", label) for turn, label in enumerate(labels)}
    apart = icon_names.Names(concepts, {}, {}).told_apart([*concepts.values()][::-1])
    assert [concepts[key].label for key in sorted(apart, key=lambda key: int(key, 16))] == [
        "red heart",  # called "heart"
        "envelope",
        "red circle",  # Unicode's first
        "closed book",  # called "book", which no blue one is then
        "white heart",
        "man",
        "tangerine",
    ]


def told_twice(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Main captions of held-out pictures that are training captions of another concept."""
    said: dict[str, set[str]] = {}
    for row in rows:
        if row["split"] == "train":
            for caption in row["captions"]:
                said.setdefault(caption, set()).add(row["codepoint"])
    return [row["text"] for row in rows if row["split"] == "test" and said.get(row["text"], set()) - {row["codepoint"]}]


def test_no_held_out_caption_is_a_training_caption_of_another_concept(tmp_path: Path, cache: Path) -> None:
    """Of every label that has an everyday name, and every everyday name as a concept of its own, in all styles."""
    table = icon_captions.EVERYDAY
    labels = [*table, *(name for names in table.values() for name in names), "green apple", "red apple", "blue book"]
    concepts = {f"{k:x}": thing(f"{k:x}", label) for k, label in enumerate(dict.fromkeys(labels))}
    apart = icon_names.Names(concepts, {}, {}).told_apart([*concepts.values()])
    drawn = [(one, style) for style in icon_sources.STYLES for one in concepts.values()]
    icons = [build_icons.Icon(one, style, "") for one, style in drawn if not style.mono or one.codepoint in apart]
    rows = build_icons.metadata(icons)
    assert sum(row["split"] == "test" for row in rows) > 100
    assert told_twice(rows) == []
    bare = [{**r, "captions": icon_captions.captions(r["label"], (), "object", r["style"])} for r in rows]
    assert told_twice([{**row, "text": row["captions"][0]} for row in bare])  # what the rule is for
    assert run(tmp_path / "icons", cache) == 0
    for place in (SAMPLE, tmp_path / "icons"):
        lines = (place / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert any(row["split"] == "test" for row in rows) and told_twice(rows) == []


# ---- the pipeline, on packages of this size

EMOJI = {  # hexcode -> label, group, subgroup
    "1F34E": ("red apple", 4, 0),
    "1F431": ("cat face", 3, 0),
    "1F436": ("dog face", 3, 0),
    "1F44B": ("waving hand", 1, 0),
    "1F552": ("three o’clock", 5, 1),
    "1F553": ("four o’clock", 5, 1),
    "0031-FE0F-20E3": ("keycap: 1", 8, 2),
    "1F1EF-1F1F5": ("flag: Japan", 9, 3),
}
GROUPS = ["smileys-emotion", "people-body", "component", "animals-nature", "food-drink", "travel-places"]
GROUPS += ["activities", "objects", "symbols", "flags"]
STYLES = "noto,twemoji,fluent-flat,fluent-3d,fluent-mono"


def emojibase() -> dict[str, bytes]:
    entries = [
        {"hexcode": code, "emoji": "x", "label": label, "group": group, "subgroup": subgroup, "tags": ["thing"]}
        for code, (label, group, subgroup) in EMOJI.items()
    ]
    skin = {"hexcode": "1F44B-1F3FB", "emoji": "x", "label": "waving hand: light skin tone"}
    entries[3]["skins"] = [skin]
    messages = {
        "groups": [{"order": order, "key": key} for order, key in enumerate(GROUPS)],
        "subgroups": [{"order": order, "key": key} for order, key in enumerate(("any", "time", "keycap", "flag"))],
    }
    files = {"data": entries, "messages": messages, "shortcodes/emojibase": {}, "shortcodes/iamcal": {"1F436": "pup"}}
    return {f"en/{name}.json": json.dumps(content).encode() for name, content in files.items()}


def iconify(shade: int, *, by_name: bool = False) -> dict[str, bytes]:
    """An icon package: each concept a disc of its own radius; the dog is drawn exactly as the cat."""
    codes = [*EMOJI, "1F44B-1F3FB"]
    names = {"1F436": "pup"} if by_name else {}
    icons = {
        names.get(code, f"icon-{code.lower()}" if not by_name else icon_names.slug(EMOJI.get(code, ("skin",))[0])): {
            "body": f'<circle cx="8" cy="8" r="{1 + (1 if code == "1F436" else index)}" fill="rgb({shade},0,0)"/>'
        }
        for index, code in enumerate(codes)
    }
    files = {"icons.json": {"icons": icons, "width": 16, "height": 16}}
    if not by_name:
        files["chars.json"] = {code.lower(): f"icon-{code.lower()}" for code in codes}  # type: ignore[dict-item]
    return {name: json.dumps(content).encode() for name, content in files.items()}


def webp_files() -> dict[str, bytes]:
    files = {}
    for index, code in enumerate(EMOJI):
        picture = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
        picture.paste((0, 0, 255, 255), (0, 0, 2 + 3 * index, 32))
        data = io.BytesIO()
        picture.save(data, "WEBP", lossless=True)
        files[f"assets/{code.lower().replace('-', '_')}.webp"] = data.getvalue()
    return files


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of small tarballs in the place of the real ones, with their checksums."""
    pytest.importorskip("resvg_py")
    folder = tmp_path / "npm"
    folder.mkdir()
    emojilib = {"dist/emoji-en-US.json": json.dumps({chr(0x1F34E): ["red_apple", "fruit", "red"]}).encode()}
    contents = {
        "emojibase-data": emojibase(),
        "emojilib": emojilib,
        "@iconify-json/noto": iconify(0),
        "@iconify-json/twemoji": iconify(90),
        "@iconify-json/fluent-emoji-flat": iconify(140),
        "@iconify-json/fluent-emoji-high-contrast": iconify(200, by_name=True),
        "@lobehub/fluent-emoji-3d": webp_files(),
    }
    for name, files in contents.items():
        tarball = folder / f"{name.removeprefix('@').replace('/', '-')}-1.0.0.tgz"
        with tarfile.open(tarball, "w:gz") as archive:
            for path, data in files.items():
                member = tarfile.TarInfo(f"package/{path}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        monkeypatch.setitem(
            icon_sources.PACKAGES,  # type: ignore[arg-type]
            name,
            ("1.0.0", hashlib.sha256(tarball.read_bytes()).hexdigest()),
        )
    return folder


def run(out: Path, cache: Path, *more: str) -> int:
    return build_icons.main(["--out", str(out), "--cache", str(cache), "--styles", STYLES, "--size", "32", *more])


def test_the_set_is_built_by_all_the_rules(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "icons"
    assert run(out, cache) == 0
    assert "22 pictures of 6 concepts in 5 styles" in capsys.readouterr().out
    folder = read_folder(out)
    assert folder.problems == ()
    found: dict[str, list[str]] = {}
    for picture in folder.pictures:
        found.setdefault(picture.attributes["style"], []).append(picture.attributes["label"])
    clock = "clock showing three o'clock"
    # no keycap, no skin tone, one clock of two, the flag in one style, the dog not drawn again as the cat
    assert found == {
        "noto": ["red apple", "cat face", "waving hand", clock],
        "twemoji": ["red apple", "cat face", "waving hand", clock, "flag of Japan"],
        "fluent-flat": ["red apple", "cat face", "waving hand", clock],
        "fluent-3d": ["red apple", "cat face", "dog face", "waving hand", clock],
        "fluent-mono": ["apple", "cat face", "waving hand", clock],
    }
    apple = folder.pictures[0]
    assert apple.path == out / "images" / "noto" / "1f34e.webp"
    assert apple.captions[0] == "red apple, noto emoji"
    assert apple.attributes["source"] == "@iconify-json/noto@1.0.0"
    assert apple.attributes["license"] == "Apache-2.0"
    with Image.open(apple.path) as picture:
        assert (picture.size, picture.mode) == ((32, 32), "RGB")
        assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert [(p.attributes["label"], p.attributes["style"]) for p in folder.select("test")] == [
        ("cat face", "noto"),
        ("red apple", "fluent-flat"),
    ]
    assert "Fluent Emoji, Microsoft Corporation" in (out / "NOTICE").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["icons", "npm"]


def test_two_runs_with_a_limit_give_the_same_bytes_and_a_third_has_nothing_to_do(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        assert run(out, cache, "--limit", "2") == 0
    files = [{p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} for out in outs]
    assert files[0] == files[1]
    assert len(read_folder(outs[0]).pictures) == 10
    assert "nothing to do" not in capsys.readouterr().out
    assert run(outs[0], cache, "--limit", "2") == 0
    assert "10 pictures" in (said := capsys.readouterr().out)
    assert "nothing to do" in said
    assert run(outs[0], cache, "--limit", "1") == 0  # asked for something else: built anew in its place
    assert len(read_folder(outs[0]).pictures) == 5


def test_what_others_put_into_the_folder_stays_when_it_is_built_anew(tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "icons"
    assert run(out, cache) == 0
    kept = {out / "notes.txt": b"notes", out / "images/mine/one.webp": b"a picture", out / "images/noto/.mark": b""}
    for path, content in kept.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert run(out, cache, "--limit", "1") == 0
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert len([*out.glob("images/*/*.webp")]) == 5 + 1  # those of the larger set are gone


def test_a_build_that_would_replace_what_others_put_there_is_refused(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "icons"
    assert run(out, cache, "--limit", "1") == 0
    (out / "images/noto/1f431.webp").write_text("my own")
    assert run(out, cache) == 2
    assert "1f431.webp was not built here and would be replaced; move it" in capsys.readouterr().err
    assert (out / "images/noto/1f431.webp").read_text() == "my own"
    (out / "images/noto/1f431.webp").unlink()
    with (out / "metadata.jsonl").open("a") as table:
        table.write('{"file_name": "mine.webp", "text": "mine"}\n')
    assert run(out, cache) == 2
    assert "metadata.jsonl is not as it was built; name another --out or remove" in capsys.readouterr().err
    assert "mine.webp" in (out / "metadata.jsonl").read_text()


def test_a_build_that_fails_leaves_what_was_there(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "icons"
    assert run(out, cache, "--limit", "1") == 0
    before = (out / "metadata.jsonl").read_bytes()

    def fail(content: str | bytes, size: int) -> Image.Image:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_icons, "draw", fail)
    assert run(out, cache) == 2
    assert "build_icons: " in (said := capsys.readouterr().err)
    assert "No space left on device" in said
    assert (out / "metadata.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["icons", "npm"]


def test_a_changed_tarball_is_refused_by_name_and_both_sums(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tarball = cache / "iconify-json-noto-1.0.0.tgz"
    expected = hashlib.sha256(tarball.read_bytes()).hexdigest()
    tarball.write_bytes(tarball.read_bytes() + b"x")
    found = hashlib.sha256(tarball.read_bytes()).hexdigest()
    assert run(tmp_path / "icons", cache) == 2
    said = capsys.readouterr().err
    for word in (tarball.name, expected, found):
        assert word in said
    assert not (tmp_path / "icons").exists()


def test_without_npm_and_cache_one_line_says_so(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert run(tmp_path / "icons", tmp_path / "empty") == 2
    assert "npm client is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--styles", "noot"], "there is no style noot; did you mean noto?"),
        (["--styles", "openmoji"], "ask with --share-alike"),
        (["--size", "0"], "--size 0 is out of range"),
        (["--limit", "-1"], "--limit -1 is negative"),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path, cache: Path, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "icons", cache, *arguments) == 2
    assert line in capsys.readouterr().err


def test_a_folder_of_someone_else_is_not_replaced(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("keep")
    assert run(tmp_path / "mine", cache) == 2
    assert (tmp_path / "mine" / "a.txt").read_text() == "keep"


def test_share_alike_styles_come_only_when_asked_for(tmp_path: Path) -> None:
    options = build_icons.Options(tmp_path, tmp_path)
    assert len(build_icons.choose_styles(options)) == 9
    everything = build_icons.Options(tmp_path, tmp_path, share_alike=True)
    assert [style.name for style in build_icons.choose_styles(everything)][9:] == ["openmoji", "emojione-v1"]
    for styles in (("openmoji",), ("noto", "openmoji")):
        with pytest.raises(InputError, match=r"^openmoji: licensed share-alike, so left out; ask with --share-alike"):
            build_icons.choose_styles(build_icons.Options(tmp_path, tmp_path, styles=styles))
    named = build_icons.Options(tmp_path, tmp_path, styles=("noto", "openmoji"), share_alike=True)
    assert [style.name for style in build_icons.choose_styles(named)] == ["noto", "openmoji"]


def test_the_sample_is_what_the_captions_of_today_say() -> None:
    """The tests' sample is not edited by hand: its captions follow from its own labels, tags and styles."""
    phrases = {style.name: style for style in icon_sources.STYLES}
    for picture in read_folder(SAMPLE).pictures:
        style = phrases[picture.attributes["style"]]
        label = icon_captions.natural_label(icon_sources.SAMPLE_CONCEPTS[picture.attributes["codepoint"]])
        said = icon_captions.captions(
            label, picture.attributes["tags"], picture.attributes["kind"], style.phrase, mono=style.mono
        )
        assert picture.captions == said
