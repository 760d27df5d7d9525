"""Captions in every form people have, and pictures of every kind, each with its value."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentgen.data import Picture, load_pixels, read_folder, write_ledger
from latentgen.data.folder import caption_of_name
from latentgen.errors import InputError

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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name;text\na.png;a cat\n", "has no column file_name, only file_name;text"),
        ("file_name,text\na.png,a cat, grey\n", "line 2 has more cells than columns"),
        ('file_name,text\na.png,"a cat\n', "line 2 is not CSV"),
        ("file_name,text\nx.png,a cat\na.png,b\n", "line 2: x.png does not exist (1 of 2 entries"),
        ("file_name,text\na.png,\n", "line 2: a.png has no caption"),
        ('file_name,captions\na.png,"[1"\n', "line 2: captions is not a JSON list"),
        ("", "has no column file_name, only none"),
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
