"""Captions in every form people have, and pictures of every kind, each with its value."""

import hashlib
import json
import os
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from latentgen.data import Picture, load_pixels, read_folder, write_ledger
from latentgen.data.decode import CannotDecode, Opener
from latentgen.data.folder import caption_of_name
from latentgen.errors import InputError
from tests import profiles

CLEAR = (0, 0, 0, 0)


def save(path: Path, colour: tuple[int, ...] = (255, 0, 0), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (8, 8), colour).save(path)
    return path


def said(root: Path) -> dict[str, tuple[str, ...]]:
    return {picture.path.relative_to(root).as_posix(): picture.captions for picture in read_folder(root).pictures}


ROWS = [
    {"file_name": "sub/a.png", "text": "a cat, grey", "captions": ["cat", "a grey cat"], "split": "test", "year": "7"},
    {"file_name": "b.png", "caption": "a “dog”"},
    {"file_name": "sheet.png", "text": "left", "box": [0, 0, 4, 8]},
]


def write_rows(root: Path, kind: str) -> Path:
    table = root / f"metadata.{kind}"
    if kind == "jsonl":
        table.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    elif kind == "csv":
        table.write_text(
            "file_name,text,caption,captions,split,year,box\n"
            'sub/a.png,"a cat, grey",,"[""cat"", ""a grey cat""]",test,7,\n'
            "b.png,,a “dog”,,,,\n"
            'sheet.png,left,,,,,"[0, 0, 4, 8]"\n',
            encoding="utf-8-sig",
        )
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        names = {name: None for row in ROWS for name in row}
        parquet.write_table(arrow.table({name: [row.get(name) for row in ROWS] for name in names}), table)
    return table


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_of_three_kinds_say_the_same(tmp_path: Path, kind: str) -> None:
    for name in ("sub/a.png", "b.png", "sheet.png", "c.png"):
        save(tmp_path / name)
    table = write_rows(tmp_path, kind)
    folder = read_folder(tmp_path)
    assert folder.pictures == (
        Picture(tmp_path / "sub" / "a.png", ("a cat, grey", "cat", "a grey cat"), "test", {"year": "7"}),
        Picture(tmp_path / "b.png", ("a “dog”",)),
        Picture(tmp_path / "sheet.png", ("left",), box=(0, 0, 4, 8)),
    )
    assert folder.pictures[0].attributes == {"year": "7"} and folder.pictures[1].attributes == {}
    assert [(problem.path.name, problem.reason) for problem in folder.problems] == [
        ("c.png", f"no line of {table.name} names it")
    ]
    assert folder.descriptions == (table,)


def test_a_plain_csv_column_of_captions_is_one_caption(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,captions\na.png,a cat\n")
    assert said(tmp_path) == {"a.png": ("a cat",)}


@pytest.mark.parametrize("between", [";", "\t"])
def test_a_csv_may_be_separated_by_semicolons_or_tabs(tmp_path: Path, between: str) -> None:
    save(tmp_path / "a.png")
    rows = (["text", "file_name", "box"], ['"a cat, red', ' green; and blue"', "a.png", "[0, 0, 4, 8]"])
    head, row = between.join(rows[0]), f"{rows[1][0]},{rows[1][1]}{between}{between.join(rows[1][2:])}"
    (tmp_path / "metadata.csv").write_text(f"{head}\n{row}\n")
    (picture,) = read_folder(tmp_path).pictures
    assert picture == Picture(tmp_path / "a.png", ("a cat, red, green; and blue",), box=(0, 0, 4, 8))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name;text\na.png;a cat\n", "has no column file_name, only name;text"),
        ("file_name;text\na.png;a; cat\n", 'line 2 has more cells than columns; write a semicolon in quotes: "red; '),
        ("file_name,text\na.png,a cat, grey\n", "line 2 has more cells than columns"),
        ('file_name,text\na.png,"a cat\n', "line 2 is not CSV"),
        ("file_name,text\nx.png,a cat\na.png,b\n", "line 2: x.png does not exist (1 of 2 entries"),
        ("file_name,text\na.png,\n", "line 2: a.png has no caption"),
        ('file_name,captions\na.png,"[1"\n', "line 2: captions is not a JSON list"),
        ("", "has no column file_name, only none"),
        ("x" * 2**17 + "x\n", "line 1 is not CSV (field larger than field limit"),
    ],
)
def test_a_bad_csv_is_one_line_that_names_the_place(tmp_path: Path, text: str, words: str) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(InputError) as raised:
        read_folder(tmp_path)
    assert words in str(raised.value) and "metadata.csv" in str(raised.value) and "\n" not in str(raised.value)


def test_a_bad_parquet_file_or_no_pyarrow_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "metadata.parquet").write_text("no parquet")
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="needs the package pyarrow"):
        read_folder(tmp_path)


def test_sub_folders_have_tables_of_their_own_and_sidecars_fill_in(tmp_path: Path) -> None:
    for name in ("one/a.png", "two/a.png", "two/b.png", "c.png"):
        save(tmp_path / name)
    (tmp_path / "one" / "metadata.csv").write_text("file_name,text\na.png,first\n")
    (tmp_path / "two" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "second"}')
    (tmp_path / "c.txt").write_text("third")
    assert said(tmp_path) == {"one/a.png": ("first",), "two/a.png": ("second",), "c.png": ("third",)}
    assert [problem.path.name for problem in read_folder(tmp_path).problems] == ["b.png"]
    (tmp_path / "metadata.csv").write_text("file_name,text\none/a.png,again\n")
    with_root = read_folder(tmp_path)
    assert [p.kind for p in with_root.problems] == ["named again", "without caption"]
    assert len(with_root.pictures) == 3
    (tmp_path / "one" / "metadata.jsonl").write_text("")
    with pytest.raises(InputError, match=r"both metadata\.csv and metadata\.jsonl"):
        read_folder(tmp_path)


def test_names_with_accents_in_another_form_mean_the_same_file(tmp_path: Path) -> None:
    apart, whole = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
    assert apart != whole
    for place, on_disk, told in (("one", apart, whole), ("two", whole, apart)):
        save(tmp_path / place / f"{on_disk}.png")
        row = {"file_name": f"{told}.png", "text": "a cup"}
        (tmp_path / place / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
        save(tmp_path / "beside" / place / f"{on_disk}.png")
        (tmp_path / "beside" / place / f"{told}.txt").write_text("a mug")
        assert said(tmp_path / place) == {f"{on_disk}.png": ("a cup",)}  # by its name on the disk
        assert said(tmp_path / "beside" / place) == {f"{on_disk}.png": ("a mug",)}
    save(tmp_path / "two" / f"{apart}.png")  # now there is one of each
    assert said(tmp_path / "two") == {f"{apart}.png": ("a cup",)}
    (tmp_path / "one" / f"{whole}.png".upper()).write_bytes((tmp_path / "one" / f"{apart}.png").read_bytes())
    assert said(tmp_path / "one") == {f"{apart}.png": ("a cup",)}  # which is nearer than other capitals
    for name, text in ((apart, "apart"), (whole, "whole")):
        save(tmp_path / "both" / f"{name}.png")
        (tmp_path / "both" / f"{name}.txt").write_text(text)
    assert said(tmp_path / "both") == {f"{apart}.png": ("apart",), f"{whole}.png": ("whole",)}


def test_a_table_may_write_capitals_otherwise_where_one_file_alone_is_meant(tmp_path: Path) -> None:
    save(tmp_path / "Images" / "a.PNG")
    (tmp_path / "metadata.csv").write_text("file_name,text\nimages/A.png,a cat\n")
    assert said(tmp_path) == {"Images/a.PNG": ("a cat",)}
    save(tmp_path / "Images" / "a.png")
    with pytest.raises(InputError, match=r"line 2: images/A\.png does not exist"):
        read_folder(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\nImages/a.png,a cat\n")
    assert said(tmp_path) == {"Images/a.png": ("a cat",)}


@pytest.mark.parametrize("told", ["a.png", unicodedata.normalize("NFD", "café.png")])
def test_a_picture_is_there_once_also_where_the_disk_takes_any_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    on_disk = {"a.png": "A.PNG"}.get(told, unicodedata.normalize("NFC", told))
    save(tmp_path / on_disk)
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{told},one\n{on_disk},two\n", encoding="utf-8")
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == told or is_file(path))
    assert said(tmp_path) == {on_disk: ("one",)}


@pytest.mark.skipif(os.name == "nt", reason="a backslash parts folders there")
def test_folders_may_be_parted_as_on_windows_but_not_left(tmp_path: Path) -> None:
    save(tmp_path / "images" / "sub" / "a.PNG")

    def name(told: str) -> Path:
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": told, "text": "a cat"}))
        return tmp_path

    for told in ("images\\sub\\a.PNG", "images/sub\\a.PNG", ".\\Images\\sub\\a.png"):
        assert said(name(told)) == {"images/sub/a.PNG": ("a cat",)}
    for told in ("..\\a.png", "images\\..\\..\\a.png", "C:\\images\\a.png", "\\images\\a.png", "\\\\host\\x\\a.png"):
        with pytest.raises(InputError, match="lies outside the folder"):
            read_folder(name(told))
    save(tmp_path / "images\\b.png")  # which is a name here
    assert said(name("images\\b.png")) == {"images\\b.png": ("a cat",)}


def test_capitals_of_an_ending_make_no_difference(tmp_path: Path) -> None:
    save(tmp_path / "loose" / "IMG_1.JPG").with_suffix(".TXT").write_text("a cat")
    save(tmp_path / "loose" / "IMG_2.JPG").with_suffix(".Caption").write_text("a dog")
    assert said(tmp_path / "loose") == {"IMG_1.JPG": ("a cat",), "IMG_2.JPG": ("a dog",)}
    (tmp_path / "loose" / "IMG_1.CAPTION").write_text("cat")
    assert said(tmp_path / "loose")["IMG_1.JPG"] == ("a cat", "cat")  # .txt comes first, as ever
    (tmp_path / "loose" / "NOTES.TXT").write_text("call home")
    assert [problem.path.name for problem in read_folder(tmp_path / "loose").problems] == ["NOTES.TXT"]


@pytest.mark.parametrize(("suffix", "form"), [(".jfif", "JPEG"), (".jpe", "JPEG"), (".apng", "PNG")])
def test_other_endings_of_jpeg_and_png_are_pictures(tmp_path: Path, suffix: str, form: str) -> None:
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / f"a{suffix}", form)
    (tmp_path / "a.txt").write_text("red")
    assert write_ledger(read_folder(tmp_path)).files == {"used": 1, "description": 1}


def test_folders_that_are_named_as_splits_are_splits_unless_it_is_said_that_they_are_none(tmp_path: Path) -> None:
    names = ("train/a", "test/b", "Val/x/c", "valid/d", "validation/e", "cats/test/f", "test", "testing/g", "val/h")
    wanted = ("train", "test", "validation", "validation", "validation", "train", "train", "train", "train")
    rows = {name: {"file_name": f"{name}.png", "text": "x"} for name in names}
    rows["val/h"]["split"] = "train"  # said so
    for name in names:
        save(tmp_path / "table" / f"{name}.png")
        save(tmp_path / "tables" / f"{name}.png")
        table = tmp_path / "tables" / name
        own = rows[name] | {"file_name": f"{table.name}.png"}
        if name != "test":
            (table.parent / "metadata.jsonl").write_text(json.dumps(own))
        if name != "val/h":
            save(tmp_path / "beside" / f"{name}.png").with_suffix(".txt").write_text("x")
    (tmp_path / "table" / "test").rename(tmp_path / "table" / "Test")
    rows["test/b"]["file_name"] = "Test/b.png"
    (tmp_path / "table" / "test").write_bytes((tmp_path / "table" / "test.png").read_bytes())  # a file of that name
    rows["file"] = {"file_name": "test", "text": "x"}
    (tmp_path / "table" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows.values()))
    for place, captions in (("table", "files"), ("tables", "files"), ("beside", "files"), ("beside", "names")):
        root = tmp_path / place
        folder = read_folder(root, captions)
        found = {p.path.relative_to(root).with_suffix("").as_posix(): p.split for p in folder.pictures}
        expected = dict(zip(names, wanted, strict=True)) | {"Test/b": "test"}
        assert found.items() <= expected.items() and len(found) >= len(names) - 2
        assert len(folder.select("validation")) == 3
        assert folder.remark == "data: pictures in a split by their folder: 1 'test', 3 'validation'"
        plain = read_folder(root, captions, folders=False)
        assert {picture.split for picture in plain.pictures} == {"train"} and not plain.remark
    inner = read_folder(tmp_path / "table" / "train", "names")
    assert inner.select("train") and not inner.remark
    unsaid = save(tmp_path / "unsaid" / "test" / "a.png")
    save(tmp_path / "unsaid" / "b.png").with_suffix(".txt").write_text("x")
    (problem,) = read_folder(tmp_path / "unsaid").problems
    assert (problem.path, problem.split) == (unsaid, "test")  # for methods that caption it themselves


def test_names_are_captions_when_asked_for(tmp_path: Path) -> None:
    for name in ("red-apple_02.png", "sub/Big Dog (3).jpg", "0001.png"):
        save(tmp_path / name)
    folder = read_folder(tmp_path, "names")
    assert [picture.captions for picture in folder.pictures] == [("red apple",), ("Big Dog",)]
    assert [(problem.path.name, problem.kind) for problem in folder.problems] == [("0001.png", "without caption")]
    assert caption_of_name("a 2cv") == "a 2cv" and caption_of_name("cat3") == "cat3" and caption_of_name("été") == "été"
    with pytest.raises(InputError, match="files or names"):
        read_folder(tmp_path, "name")


# ---- pictures of every kind


def middle(path: Path, background: str = "white") -> list[int]:
    array = load_pixels([Picture(path, ("x",))], 8, path.parent / "cache", background).array
    return [int(value) for value in array[0, 4, 4]]


def test_transparent_pictures_lie_on_the_chosen_background(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), CLEAR).save(tmp_path / "rgba.png")
    Image.new("LA", (8, 8), (9, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 0, 0, 255])
    palette.save(tmp_path / "p.png", transparency=1)
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(tmp_path / "deep.png", transparency=4000)
    for name in ("rgba", "la", "p", "deep"):
        assert middle(tmp_path / f"{name}.png") == [255] * 3, name
        assert middle(tmp_path / f"{name}.png", "#ff8000") == [255, 128, 0], name
    Image.new("RGBA", (8, 8), (255, 255, 255, 128)).save(tmp_path / "half.png")
    assert middle(tmp_path / "half.png", "black") == [128] * 3
    with pytest.raises(InputError, match="background is 'whit'; give a colour"):
        middle(tmp_path / "half.png", "whit")


def test_deep_floating_and_wide_gamut_pictures_are_handled_or_listed(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    assert middle(tmp_path / "float.tif") == [128] * 3
    Image.fromarray(np.full((8, 8), 300.0, np.float32)).save(tmp_path / "bright.tif")
    with pytest.raises(InputError, match="floating-point values outside 0 to 1"):
        middle(tmp_path / "bright.tif")
    save(tmp_path / "cmyk.tif", (0, 255, 255, 0), "CMYK")
    assert middle(tmp_path / "cmyk.tif") == [255, 0, 0]


@pytest.mark.parametrize(
    ("least", "most", "said"),
    [
        (0, 0, [0] * 3),
        (0, 257 * 200, [200] * 3),
        (0, 65535, [255] * 3),
        (0, 200, "32-bit integers from 0 to 200, not 16-bit greys"),
        (0, 65536, "32-bit integers from 0 to 65536, above the 65535 of 16 bits"),
        (0, 2_000_000_000, "32-bit integers from 0 to 2000000000, above the 65535 of 16 bits"),
        (-5, 60000, "32-bit integers from -5 to 60000, not 16-bit greys"),
    ],
)
def test_32_bit_integers_are_16_bit_greys_or_listed(
    tmp_path: Path, least: int, most: int, said: list[int] | str
) -> None:
    pixels = np.full((8, 8), most, np.int32)
    pixels[0, 0] = least
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    if isinstance(said, list):
        assert middle(tmp_path / "deep.tif") == said
    else:
        with pytest.raises(InputError, match=said):
            middle(tmp_path / "deep.tif")


def test_a_dark_16_bit_picture_stays_dark(tmp_path: Path) -> None:
    for suffix in ("png", "tif"):
        Image.fromarray(np.full((8, 8), 200, np.uint16)).save(tmp_path / f"dark.{suffix}")
        assert middle(tmp_path / f"dark.{suffix}") == [1] * 3


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame_is_used_and_the_ledger_says_so(tmp_path: Path, suffix: str) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    path = tmp_path / f"moving.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(path, save_all=True, append_images=[second], **options)
    (tmp_path / "moving.txt").write_text("red, then blue")
    red, green, blue = middle(path)
    assert red > 250 and green < 5 and blue < 5
    ledger = write_ledger(read_folder(tmp_path))
    assert ledger.remarks["several frames"] == 1 and "the first of 2 frames" in ledger.entries[0].words()


def test_a_turned_photograph_has_its_upright_size_in_the_ledger(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (160, 80)).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "turned.txt").write_text("a door")
    facts = write_ledger(read_folder(tmp_path)).entries[0].facts
    assert (facts.width, facts.height) == (80, 160)


def test_colours_of_a_profile_become_those_of_srgb(tmp_path: Path) -> None:
    colour, wide = (90, 160, 200), profiles.matrix_profile(profiles.P3)
    expected = profiles.to_8_bits(profiles.P3 @ profiles.from_curve(np.array(colour) / 255))
    assert np.abs(expected - colour).max() > 25  # without the profile it is another colour
    picture = Image.new("RGB", (8, 8), colour)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, *colour])
    for name, image, options in (
        ("rgb.png", picture, {}),
        ("rgb.jpg", picture, {"quality": 100}),
        ("rgb.webp", picture, {"lossless": True}),
        ("rgb.tif", picture, {}),
        ("p.png", palette, {}),
        ("opaque.png", picture.convert("RGBA"), {}),
    ):
        image.save(tmp_path / name, icc_profile=wide, **options)
        assert np.abs(middle(tmp_path / name) - expected).max() <= (3 if name == "rgb.jpg" else 1), name
    part = Opener().open(Picture(tmp_path / "rgb.png", ("x",), box=(2, 2, 6, 6)))
    assert part.image.size == (4, 4) and np.abs(np.subtract(part.image.getpixel((1, 1)), expected)).max() <= 1
    assert part.mode == "RGB" and Opener().open(Picture(tmp_path / "p.png", ("x",))).mode == "P"
    Image.fromarray(np.full((8, 8), 64, np.uint8)).save(tmp_path / "l.png", icc_profile=profiles.grey_profile(1))
    grey = profiles.to_8_bits(profiles.D50 * 64 / 255)
    assert np.abs(middle(tmp_path / "l.png") - grey).max() <= 1 and grey.min() > 130
    inks = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    cyan = (55, -37, -50)
    inks.save(tmp_path / "cmyk.tif", icc_profile=profiles.ink_profile(cyan))
    assert np.abs(middle(tmp_path / "cmyk.tif") - profiles.to_8_bits(profiles.lab_to_xyz(cyan))).max() <= 2
    assert profiles.to_8_bits(profiles.lab_to_xyz((20, 0, 0))).min() > 40  # ink is no deeper; what is seen is black
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "k.tif", icc_profile=profiles.ink_profile(cyan, 20))
    assert middle(tmp_path / "k.tif") == [0] * 3


def test_transparency_stays_where_a_profile_changes_the_colours(tmp_path: Path) -> None:
    wide, linear = profiles.matrix_profile(profiles.P3), profiles.grey_profile(1)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 90, 160, 200])
    palette.save(tmp_path / "p.png", transparency=1, icc_profile=wide)
    Image.new("RGB", (8, 8), (90, 160, 200)).save(tmp_path / "rgb.png", transparency=(90, 160, 200), icc_profile=wide)
    Image.new("RGBA", (8, 8), (90, 160, 200, 0)).save(tmp_path / "rgba.png", icc_profile=wide)
    Image.new("LA", (8, 8), (64, 0)).save(tmp_path / "la.png", icc_profile=linear)
    for name in ("p", "rgb", "rgba", "la"):
        assert middle(tmp_path / f"{name}.png", "#ff8000") == [255, 128, 0], name
    Image.new("LA", (8, 8), (64, 128)).save(tmp_path / "half.png", icc_profile=linear)
    grey = profiles.to_8_bits(profiles.D50 * 64 / 255)
    assert np.abs(middle(tmp_path / "half.png", "black") - grey * 128 / 255).max() <= 1


def test_a_profile_that_is_srgb_or_no_use_changes_nothing(tmp_path: Path) -> None:
    known = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rounded = profiles.SRGB + 1e-4 * np.array([[1, -1, 0], [0, 1, -1], [-1, 0, 1]])  # as other programs write it
    own, inks = profiles.matrix_profile(rounded), profiles.ink_profile((55, -37, -50))
    shades = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for name, profile in (("own", own), ("known", known), ("torn", b"x"), ("inks", inks)):
        Image.fromarray(shades).save(tmp_path / f"{name}.png", icc_profile=profile)
        np.testing.assert_array_equal(Opener().open(Picture(tmp_path / f"{name}.png", ("x",))).image, shades)


def test_pixels_kept_before_profiles_were_heeded_stay_but_for_pictures_with_one(tmp_path: Path) -> None:
    def kept(name: str, **options: bytes) -> tuple[str, str]:
        """The name of the array, and the one it had before: of the transform, the size and the file."""
        Image.new("RGB", (8, 8), (90, 160, 200)).save(tmp_path / name, **options)
        load_pixels([Picture(tmp_path / name, ("x",))], 4, tmp_path / name[:-4])
        (array,) = (tmp_path / name[:-4]).glob("*.npy")
        own = hashlib.sha256((tmp_path / name).read_bytes()).digest()
        before = "upright, on white, 8-bit RGB, Lanczos to cover, centre crop; 3; 4"
        return array.stem, hashlib.sha256(before.encode() + own).hexdigest()[:32]

    for name in ("plain.png", "plain.jpg"):
        now, before = kept(name)
        assert now == before
        (tmp_path / "plain").rename(tmp_path / f"done-{name}")
    for suffix in ("png", "jpg", "tif", "webp"):
        now, before = kept(f"{suffix}.{suffix}".rjust(8, "x"), icc_profile=profiles.matrix_profile(profiles.P3))
        assert now != before


@pytest.mark.parametrize("kind", ["itxt", "ztxt", "many"])
def test_long_texts_in_a_png_do_not_hide_its_pixels(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta tiff:Orientation="6"/>')  # a short one, which stays
    if kind == "many":
        monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2**15)  # together; without this 64 MiB
        for number in range(9):
            texts.add_text(f"workflow {number}", "x" * 2**12)
    elif kind == "itxt":
        texts.add_itxt("workflow", "x" * 2_000_000, zip=True)
    else:
        texts.add_text("workflow", "x" * 2_000_000, zip=True)
    image = Image.new("RGB", (16, 8), (255, 0, 0))
    path = tmp_path / "long.png"
    image.save(path, pnginfo=texts)
    with pytest.raises(ValueError, match="MAX_TEXT"):
        Image.open(path).load()
    assert middle(path) == [255, 0, 0]
    assert Opener().open(Picture(path, ("x",))).size == (8, 16)
    part = Opener().open(Picture(path, ("x",), box=(0, 0, 4, 16)))
    assert part.size == (4, 16)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CannotDecode, match="cannot be decoded"):
        Opener().open(Picture(path, ("x",)))


def test_very_large_pictures_are_opened_or_refused_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.warns(Image.DecompressionBombWarning):  # which the command line does not show
        assert middle(path) == [255, 0, 0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)
    path.write_bytes(path.read_bytes()[:16] + struct.pack(">2I", 14000, 14000) + path.read_bytes()[24:])
    data = path.read_bytes()
    path.write_bytes(data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:])
    with pytest.raises(CannotDecode, match="has more than 178 megapixels, which are not opened; make it smaller"):
        Opener().open(Picture(path, ("x",)))
