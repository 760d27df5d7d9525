"""Captioned folders: what is read, what is refused with which line, and pixels decoded once."""

import errno
import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentgen.data import CaptionedFolder, Picture, hold_out, load_pixels, pixels, read_folder, write_ledger
from latentgen.data.page import keep_ledger
from latentgen.data.picture import PROFILED, content_of
from latentgen.errors import InputError
from latentgen.training.finish import notice_of
from latentgen.training.intake import divide, read_pictures, unknown_weights

SAMPLE = Path(__file__).parent / "data" / "icons"


def save(path: Path, colour: tuple[int, ...] = (255, 0, 0), size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def describe(root: Path, *lines: Mapping[str, Any] | str) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")
    return root


def one_picture(path: Path) -> list[Picture]:
    return [Picture(path, ("a thing",))]


# ---- reading


def test_metadata_gives_captions_split_and_every_other_column(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    save(tmp_path / "b.png")
    describe(
        tmp_path,
        {"file_name": "images/a.png", "text": "a cat ", "captions": ["cat", "a cat"], "split": "test", "year": 3},
        "",
        {"file_name": "b.png", "captions": ["dog"]},
    )
    folder = read_folder(tmp_path)
    assert folder.root == tmp_path
    assert folder.problems == ()
    assert folder.pictures == (
        Picture(tmp_path / "images" / "a.png", ("a cat", "cat"), "test", {"year": 3}),
        Picture(tmp_path / "b.png", ("dog",), "train", {}),
    )
    assert folder.select("test") == folder.pictures[:1]
    assert folder.select("train") == folder.pictures[1:]
    assert folder.select("validation") == ()


def test_sidecars_give_one_caption_a_line(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg", "c.webp"):
        save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a cat\n\n  cat  \n", encoding="utf-8")
    (tmp_path / "b.caption").write_text("\ufeffein Hund, süß", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("call home")
    folder = read_folder(tmp_path)
    assert [(picture.path.name, picture.captions) for picture in folder.pictures] == [
        ("a.png", ("a cat", "cat")),
        ("b.jpg", ("ein Hund, süß",)),
    ]
    assert [(problem.path.name, problem.reason) for problem in folder.problems] == [
        ("c.webp", "no caption file beside it; write c.txt"),
        ("notes.txt", "no picture of that name beside it"),
    ]


def test_unnamed_and_twice_named_pictures_are_listed(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", ".thumbnails/a.png"):
        save(tmp_path / name)
    describe(tmp_path, {"file_name": "a.png", "text": "one"}, {"file_name": "a.png", "text": "two"})
    folder = read_folder(tmp_path)
    assert [picture.captions for picture in folder.pictures] == [("one",)]
    assert [(problem.path.name, problem.reason) for problem in folder.problems] == [
        ("a.png", "named again in metadata.jsonl line 2; the first entry is used"),
        ("b.png", "no line of metadata.jsonl names it"),
    ]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{'file_name': 'a.png'}"], ["line 1 is not JSON"]),
        (["", "[1]"], ["line 2 is not a JSON object"]),
        ([{"text": "a cat"}], ["line 1 has no file_name"]),
        ([{"file_name": "a.png"}], ["line 1", "a.png has no caption"]),
        ([{"file_name": "a.png", "text": "  ", "captions": [""]}], ["a.png has no caption"]),
        ([{"file_name": "a.png", "text": 3}], ["text of a.png is not a string"]),
        ([{"file_name": "a.png", "text": "cat", "captions": "cat"}], ["captions of a.png is not a list"]),
        ([{"file_name": "a.png", "text": "cat", "split": 1}], ["split of a.png is not a string"]),
        ([{"file_name": "../a.png", "text": "cat"}], ["../a.png lies outside the folder"]),
        (
            [
                {"file_name": "a.png", "text": "cat"},
                {"file_name": "x.png", "text": "x"},
                {"file_name": "y.png", "text": "y"},
            ],
            ["line 2: x.png does not exist", "2 of 3 entries"],
        ),
    ],
)
def test_bad_metadata_is_one_line_naming_file_and_line(tmp_path: Path, lines: list[Any], words: list[str]) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(InputError) as raised:
        read_folder(describe(tmp_path, *lines))
    for word in ["metadata.jsonl", *words]:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_sidecar_that_is_not_utf8_costs_its_own_picture_not_the_run(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png", "d.jpg"):
        save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.txt").write_bytes("\ufeffa dog\nun caf".encode() + b"\xe9")
    (tmp_path / "b.caption").write_text("a dog")
    (tmp_path / "c.txt").write_bytes("a cup".encode("utf-16"))
    (tmp_path / "d.txt").write_bytes("two".encode("utf-16-le"))  # whose every other byte is 0, and all are UTF-8
    folder = read_folder(tmp_path)
    told = {(picture.path.name, picture.captions) for picture in folder.pictures}
    assert told == {("a.png", ("a cat",)), ("b.png", ("a dog",))}  # of b.png the other sidecar holds
    first, second, third = (
        f"{name}.txt is not UTF-8 text ({where}); save it as UTF-8"
        for name, where in (("b", "line 2, byte 15"), ("c", "line 1, byte 0"), ("d", "line 1, byte 1"))
    )
    assert {(problem.path.name, problem.kind, problem.reason) for problem in folder.problems} == {
        ("b.txt", "unreadable", first),
        ("c.txt", "unreadable", second),
        ("d.txt", "unreadable", third),
        ("c.png", "without caption", second),
        ("d.png", "without caption", third),
        ("d.jpg", "without caption", third),
    }
    ledger = write_ledger(folder, 8)
    assert ledger.files == {"used": 2, "description": 2, "without caption": 3, "unreadable": 3}
    assert sum(ledger.files.values()) == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_table_in_another_code_is_one_line_that_names_file_and_line(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a.png")
    form = name.endswith("csv")
    rows = ["file_name,text", "a.png,café"] if form else ["", json.dumps({"file_name": "a.png", "text": "café"})]
    text = "\r\n".join(rows).replace("\\u00e9", "é")
    table = tmp_path / name
    for code, where in (("latin-1", "line 2, "), ("utf-16", "line 1, byte 0"), ("utf-16-be", "line 1, byte ")):
        table.write_bytes(text.encode(code))
        with pytest.raises(InputError) as refused:
            read_folder(tmp_path)
        line = str(refused.value)
        assert line.startswith(f"{table} is not UTF-8 text ({where}") and "\n" not in line
    table.write_bytes(text.encode("utf-8-sig"))
    assert read_folder(tmp_path).pictures[0].captions == ("café",)


def test_folders_without_anything_to_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_folder(tmp_path / "none")
    with pytest.raises(InputError, match="holds no pictures"):
        read_folder(tmp_path)
    picture = save(tmp_path / "a.png")
    with pytest.raises(InputError, match="is a file"):
        read_folder(picture)
    with pytest.raises(InputError, match="1 pictures but no captions"):
        read_folder(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"a\.txt is empty"):
        read_folder(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        read_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "caf\xe9"}')
    with pytest.raises(InputError, match="not UTF-8"):
        read_folder(tmp_path)


# ---- pixels


def pixels_of(path: Path, size: int, cache: Path) -> np.ndarray:
    return np.asarray(load_pixels(one_picture(path), size, cache).array[0])


def test_a_picture_is_cropped_in_the_middle_to_cover_the_square(tmp_path: Path) -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert pixels_of(tmp_path / "wide.png", 8, tmp_path / "cache").min() == 255


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    stored = np.zeros((16, 16, 3), np.uint8)
    stored[:8] = 255  # orientation 6: the stored top is the right side
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    array = pixels_of(tmp_path / "turned.jpg", 16, tmp_path / "cache")
    assert array[:, 10:].min() > 200
    assert array[:, :6].max() < 60


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "alpha.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "grey.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "clear.png", transparency=1)
    expected = {"alpha": [255, 127, 127], "grey": [255] * 3, "opaque": [0, 0, 255], "clear": [255] * 3}
    for name, colour in expected.items():
        assert pixels_of(tmp_path / f"{name}.png", 4, tmp_path / "cache")[0, 0].tolist() == colour, name


def test_cmyk_16_bit_and_one_bit_pictures_keep_their_values(tmp_path: Path) -> None:
    save(tmp_path / "cmyk.jpg", (0, 255, 255, 0), mode="CMYK")
    Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((8, 8), 257 * 200, np.int32)).save(tmp_path / "deeper.tif")
    Image.new("1", (8, 8), 1).save(tmp_path / "bit.png")
    expected = {"cmyk.jpg": [255, 0, 0], "deep.png": [100] * 3, "deeper.tif": [200] * 3, "bit.png": [255] * 3}
    for name, colour in expected.items():
        found = pixels_of(tmp_path / name, 8, tmp_path / "cache")[4, 4].astype(int)
        assert np.abs(found - colour).max() <= 2, name


def test_pixels_are_memory_mapped_and_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save(tmp_path / f"{index}.png", (index, 0, 0)) for index in range(5)]
    pictures = [Picture(path, ("a thing",)) for path in paths]
    first = load_pixels(pictures, 4, tmp_path / "cache")
    assert isinstance(first.array, np.memmap)
    assert first.array.shape == (5, 4, 4, 3)
    assert first.array.dtype == np.uint8
    assert not first.array.flags.writeable
    assert first.array[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setattr("latentgen.data.pixels._try_decode", lambda *_: pytest.fail("decoded again"))
    assert (load_pixels(pictures, 4, tmp_path / "cache").array == first.array).all()


def test_the_cache_follows_content_size_and_order_not_names(tmp_path: Path) -> None:
    red, blue = save(tmp_path / "red.png"), save(tmp_path / "blue.png", (0, 0, 255))
    cache = tmp_path / "cache"
    load_pixels([*one_picture(red), *one_picture(blue)], 4, cache)
    assert load_pixels([*one_picture(blue), *one_picture(red)], 4, cache).array[0, 0, 0].tolist() == [0, 0, 255]
    assert load_pixels(one_picture(red), 8, cache).array.shape == (1, 8, 8, 3)
    count = len(list(cache.glob("*.npy")))
    red.rename(tmp_path / "rot.png")
    load_pixels(one_picture(tmp_path / "rot.png"), 8, cache)
    assert len(list(cache.glob("*.npy"))) == count
    save(tmp_path / "rot.png", (0, 255, 0))
    assert pixels_of(tmp_path / "rot.png", 8, cache)[0, 0].tolist() == [0, 255, 0]


def test_a_torn_cache_is_made_again(tmp_path: Path) -> None:
    red = save(tmp_path / "red.png")
    load_pixels(one_picture(red), 4, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").glob("*.npy")
    for torn in (kept.read_bytes()[:100], b""):
        kept.write_bytes(torn)
        assert pixels_of(red, 4, tmp_path / "cache")[0, 0].tolist() == [255, 0, 0]


def test_an_unreadable_picture_costs_a_line_not_the_run(tmp_path: Path) -> None:
    red, blue = save(tmp_path / "red.png"), save(tmp_path / "blue.png", (0, 0, 255))
    (tmp_path / "fake.png").write_text("no picture")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "torn.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "torn.png").read_bytes()[:3000])
    paths = [red, tmp_path / "fake.png", tmp_path / "torn.png", tmp_path / "gone.png", blue]
    for _ in range(2):  # decoded, then from the cache
        pixels = load_pixels([Picture(path, ("a thing",)) for path in paths], 4, tmp_path / "cache")
        assert [picture.path for picture in pixels.pictures] == [red, blue]
        assert pixels.array[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]
        assert [problem.path.name for problem in pixels.problems] == ["fake.png", "torn.png", "gone.png"]
        assert pixels.problems[0].reason == "is not a picture that can be read"
        assert "truncated" in pixels.problems[1].reason
        assert "No such file" in pixels.problems[2].reason


def test_nothing_to_decode_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "fake.png").write_text("no picture")
    cache = tmp_path / "cache"
    with pytest.raises(InputError, match=r"none of the 1 pictures can be read, the first is .*fake\.png"):
        load_pixels(one_picture(tmp_path / "fake.png"), 4, cache)
    assert list(cache.iterdir()) == []
    with pytest.raises(InputError, match="no pictures"):
        load_pixels([], 4, cache)
    with pytest.raises(InputError, match="size of 0"):
        load_pixels(one_picture(tmp_path / "fake.png"), 0, cache)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    red = save(tmp_path / "red.png")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left on device; free space"):
        load_pixels(one_picture(red), 4, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(InputError, match="cannot write the pixel cache"):
        load_pixels(one_picture(red), 4, red / "cache")


# ---- the sample beside the tests


def test_the_sample_is_whole_captioned_small_and_credited(tmp_path: Path) -> None:
    folder = read_folder(SAMPLE)
    assert folder.problems == ()
    labels = {picture.attributes["label"] for picture in folder.pictures}
    assert {"red apple", "cat", "dog", "automobile", "sun", "red heart", "house", "star"} <= labels
    said = {caption for picture in folder.pictures for caption in picture.captions}
    assert {"an apple", "a car", "a tree", "a heart", "a smiling face with smiling eyes", "a dog"} <= said
    assert len({picture.attributes["style"] for picture in folder.pictures}) == 9
    assert 3 <= len(folder.select("test")) < len(folder.select("train"))
    pixels = load_pixels(folder, 64, tmp_path)
    assert pixels.array.shape == (len(folder.pictures), 64, 64, 3)
    assert pixels.problems == ()
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 2_000_000
    notice = (SAMPLE / "NOTICE").read_text(encoding="utf-8")
    for word in ("Apache License 2.0", "MIT License", "Attribution 4.0", "Unicode License", "composited on white"):
        assert word in notice
    for picture in folder.pictures:
        assert picture.attributes["source"].rpartition("@")[0] in notice


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_what_is_linked_to_is_read_and_what_cannot_be_reached_is_said(tmp_path: Path) -> None:
    root, away = tmp_path / "pictures", tmp_path / "away"
    save(root / "a.png")
    save(away / "deep" / "b.png", (0, 255, 0))
    (root / "more").symlink_to(away)
    (root / "more" / "round").symlink_to(root)
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    lines = [{"file_name": "a.png", "text": "a"}, {"file_name": "more/deep/b.png", "text": "b"}]
    folder = read_folder(describe(root, *lines))
    assert [picture.path.relative_to(root).as_posix() for picture in folder.pictures] == ["a.png", "more/deep/b.png"]
    said = {problem.path.relative_to(root).as_posix(): problem.reason for problem in folder.problems}
    assert said == {
        "gone.png": "a link to nothing that is there",
        "more/round": "a link to a folder that is read already",
    }
    entries = {entry.file: entry.status for entry in write_ledger(folder, 8).entries}
    assert entries["gone.png"] == "unreadable" and entries["more/deep/b.png"] == "used"


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes")
def test_a_name_that_is_not_utf8_is_a_name_as_others(tmp_path: Path) -> None:
    root, odd = tmp_path / "pictures", os.fsdecode(b"caf\xe9")
    for k, name in enumerate(("a", "b", odd)):
        save(root / "c.png", (k, 0, 0)).rename(root / f"{name}.png")
        (root / f"{name}.txt").write_text("a")
    folder = hold_out(read_folder(root), "test", 0.3)
    assert len(folder.pictures) == 3 and folder.select("test")
    page = keep_ledger(write_ledger(folder, 8), tmp_path / "state")
    assert "<b>caf\\udce9.png</b>" in page.read_text() and "caf" in (tmp_path / "state" / "ledger.json").read_text()
    (problem,) = (problem for problem in read_folder(root, "names").problems if problem.kind == "without caption")
    assert problem.path.name == f"{odd}.png" and problem.reason == "its name is not UTF-8"


def test_half_a_character_in_a_caption_is_refused_with_its_line(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    describe(tmp_path, r'{"file_name": "a.png", "text": "a cat \ud83d"}')
    with pytest.raises(InputError, match=r"metadata\.jsonl line 1: a caption of a\.png holds half a character"):
        read_folder(tmp_path)


def test_what_could_not_be_read_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [Picture(save(tmp_path / f"{k}.png", (k, 0, 0)), ("a",)) for k in range(3)]
    real = pixels._try_decode

    def busy(picture: Picture, *rest: Any) -> Any:
        return "too many open files" if picture.path.name == "1.png" else real(picture, *rest)

    monkeypatch.setattr(pixels, "_try_decode", busy)
    assert len(load_pixels(pictures, 8, tmp_path / "cache").array) == 2
    assert len(load_pixels(pictures, 8, tmp_path / "cache").array) == 2
    monkeypatch.undo()
    again = load_pixels(pictures, 8, tmp_path / "cache")
    assert len(again.array) == 3 and not again.problems


def test_who_is_held_out_never_changes() -> None:
    root = Path("pictures")
    folder = CaptionedFolder(root, tuple(Picture(root / f"{k}.png", ("a",)) for k in range(60)), ())
    held = hold_out(folder, "test", 0.1).select("test")
    assert [picture.path.stem for picture in held] == ["0", "6", "8", "33", "40", "42"]


def test_the_pictures_of_a_sheet_are_held_out_one_by_one() -> None:
    root = Path("pictures")
    boxes = [(8 * k, 0, 8 * k + 8, 8) for k in range(40)]
    folder = CaptionedFolder(root, tuple(Picture(root / "sheet.png", ("a",), box=box) for box in boxes), ())
    held = hold_out(folder, "test", 0.1).select("test")
    assert [boxes.index(picture.box) for picture in held if picture.box] == [1, 6, 18, 19, 28]


def test_the_picture_held_out_is_one_that_can_be_read(tmp_path: Path) -> None:
    for k in range(4):
        save(tmp_path / "pictures" / f"{k}.png", (k, 0, 0))
        (tmp_path / "pictures" / f"{k}.txt").write_text("a")
    first = hold_out(read_folder(tmp_path / "pictures"), "test", 0.01).select("test")[0].path
    first.write_bytes(b"torn")
    how: dict[str, Any] = {"captions": "files", "background": "white", "held_out": "test", "part": 0.01}
    _, found, remark = read_pictures(tmp_path / "pictures", 8, tmp_path / "cache", **how)
    assert [picture.split == "test" for picture in found.pictures].count(True) == 1 and len(found.pictures) == 3
    assert [problem.path for problem in found.problems] == [first] and remark


def test_a_notice_in_another_code_is_kept_as_far_as_it_can_be_read(tmp_path: Path) -> None:
    assert notice_of(tmp_path) == ""
    (tmp_path / "NOTICE").write_bytes("by André".encode("latin-1"))
    assert notice_of(tmp_path) == "by Andr\ufffd"


def test_weights_that_fit_no_picture_are_named_and_weights_of_nothing_refused() -> None:
    pictures = tuple(Picture(Path(f"{n}.png"), ("a",), "train" if n else "test", {"group": "flags"}) for n in range(3))
    weights = {"group": {"flags": 0.5, "flgas": 2.0}, "style": {"noto": 3.0}}
    assert unknown_weights(pictures, weights) == [
        "data: [data.weights.group] weighs flgas, which no picture to train on has",
        "data: [data.weights.style] weighs noto, which no picture to train on has",
    ]
    decoded = pixels.Pixels(np.zeros((3, 8, 8, 3), np.uint8), pictures, ())
    np.testing.assert_array_equal(divide(Path("x"), decoded, "test", weights).weights, [0.5, 0.5])
    with pytest.raises(InputError, match="all weigh 0"):
        divide(Path("x"), decoded, "test", {"group": {"flags": 0.0}})


@pytest.mark.parametrize(
    ("head", "far", "marked"),
    [(b"\xff\xd8", 40, True), (b"\xff\xd8", 1 << 20, False), (b"II*\0", 1 << 20, True), (b"\x89PNG", 1 << 20, False)],
)
def test_profiles_are_looked_for_where_they_stand(head: bytes, far: int, marked: bool) -> None:
    data = head + bytes(far) + b"acsp"
    assert content_of(data) == sha256(data).digest() + (PROFILED if marked else b"")
