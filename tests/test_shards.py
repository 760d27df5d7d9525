"""Tar shards and saved data sets are read as folders are: every member and row used or listed, nothing unpacked."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentgen.data import Picture, hold_out, load_pixels, read_folder, write_ledger, write_page
from latentgen.errors import InputError
from tests.forked import verb
from tests.shards import Served, png, tar, webshards

ROOT = Path(__file__).parents[1]
ICONS = ROOT / "tests" / "data" / "icons"


def test_shards_hold_what_the_webdataset_package_reads_in_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = webshards(tmp_path / "shards")
    found = read_folder(folder)
    names = [str(path) for path in sorted(folder.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(names, shardshuffle=False))
    assert len(found.pictures) == len(theirs) == 10 and found.problems == ()
    for ours, sample in zip(found.pictures, theirs, strict=True):
        assert ours.read() == sample["png"]
        assert str(ours.path).endswith(f".tar/{sample['__key__']}.png") and str(ours.file) == sample["__url__"]
        said = json.loads(sample["json"])
        assert ours.captions == (sample["txt"].decode(), said["caption"], "a colour")
        assert ours.attributes["n"] == said["n"] and ours.split == (said["split"] or "train")


def test_shards_become_the_pixels_of_the_same_pictures_in_a_folder(tmp_path: Path) -> None:
    folder = read_folder(webshards(tmp_path / "shards"))
    for picture in folder.pictures:
        loose = tmp_path / "loose" / f"{picture.path.stem}.png"
        loose.parent.mkdir(exist_ok=True)
        loose.write_bytes(picture.read())
        loose.with_suffix(".txt").write_text("x")
    ours, theirs = (load_pixels(read_folder(tmp_path / name), 8, tmp_path / name) for name in ("shards", "loose"))
    np.testing.assert_array_equal(ours.array, theirs.array)
    kept = [[path.name for path in (tmp_path / name).glob("*.npy")] for name in ("shards", "loose")]
    assert kept[0] == kept[1]  # one cache serves both
    held = hold_out(folder, "validation", 0.3).select("validation")
    assert 0 < len(held) < 10


def test_a_pattern_names_its_shards_and_no_others(tmp_path: Path) -> None:
    folder = webshards(tmp_path / "shards")
    found = read_folder(folder / "{000..001}.tar")
    assert len(found.pictures) == 8 and [path.name for path in found.containers] == ["000.tar", "001.tar"]
    assert write_ledger(found).files == {"used": 8, "description": 16, "container": 2}
    assert len(read_folder(folder / "002.tar").pictures) == 2
    with pytest.raises(InputError, match=r"003\.tar does not exist \(2 of 5 are missing\)"):
        read_folder(folder / "{000..004}.tar")
    with pytest.raises(InputError, match="is no pattern"):
        read_folder(folder / "{000..004.tar")


def test_capitals_of_an_ending_make_no_difference_in_a_shard(tmp_path: Path) -> None:
    place = tar(
        tmp_path / "a.tar",
        ("1.PNG", png((1, 0, 0))),
        ("1.TXT", b"one"),
        ("2.PNG", png((2, 0, 0))),
        ("2.JSON", b'{"text": "two", "n": 2}'),
    )
    found = read_folder(place)
    assert [picture.captions for picture in found.pictures] == [("one",), ("two",)] and found.problems == ()
    assert found.pictures[1].attributes == {"n": 2}


def test_shards_in_folders_that_are_named_as_splits_are_in_them(tmp_path: Path) -> None:
    for place, number in (("train/0.tar", 1), ("test/0.tar", 2), ("val.tar", 3), ("train/test.tar", 4)):
        said = b'{"text": "x", "split": "kept"}' if number == 4 else b'{"text": "x"}'
        tar(tmp_path / place, ("test/1.png", png((number, 0, 0))), ("test/1.json", said))
    found = {picture.file.relative_to(tmp_path).as_posix(): picture.split for picture in read_folder(tmp_path).pictures}
    assert found == {"train/0.tar": "train", "test/0.tar": "test", "val.tar": "train", "train/test.tar": "kept"}


def test_members_that_are_named_from_the_root_stand_below_the_shard(tmp_path: Path) -> None:
    place = tar(tmp_path / "a.tar", ("/x/1.png", png((1, 0, 0))), ("/x/1.txt", b"one"))
    (picture,) = read_folder(place).pictures
    assert picture.path == place / "x/1.png" and picture.captions == ("one",) and picture.read() == png((1, 0, 0))


def test_every_member_is_used_or_listed_and_the_counts_add_up(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    tar(
        folder / "a.tar",
        ("1.png", png((1, 0, 0))),
        ("1.txt", b"one\n\nuno"),
        ("2.png", png((2, 0, 0))),
        ("2.json", b"{torn"),
        ("3.png", png((3, 0, 0))),
        ("4.txt", b"no picture"),
        ("5.jpg", b"no jpeg"),
        ("5.txt", b"five"),
        ("6.png", png((6, 0, 0))),
        ("6.second.png", png((7, 0, 0))),
        ("6.json", b'{"text": "six", "split": null}'),
        ("6.cls", b"6"),
        ("1.png", png((9, 0, 0))),
        ("7.png", png((7, 0, 0))),
        ("7.txt", b"caf\xe9"),
        ("._1.png", b"x"),
    )
    with tarfile.open(folder / "a.tar", "a") as file:
        link = tarfile.TarInfo("8.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        file.addfile(link)
    cut = tar(folder / "b.tar", ("1.png", png((1, 1, 1))), ("1.txt", b"whole"), ("2.png", b"y" * 4000))
    cut.write_bytes(cut.read_bytes()[:3000])
    (folder / "c.tar.gz").write_bytes(b"\x1f\x8b")
    (folder / "notes.txt").write_text("call home")
    (folder / ".hidden").write_text("")
    found = read_folder(folder)
    assert [picture.path.relative_to(folder).as_posix() for picture in found.pictures] == [
        "a.tar/1.png",
        "a.tar/5.jpg",
        "a.tar/6.png",
        "b.tar/1.png",
    ]
    assert found.pictures[0].captions == ("one", "uno") and found.pictures[0].read() == png((1, 0, 0))
    why = {problem.path.relative_to(folder).as_posix(): problem.reason for problem in found.problems}
    for name, words in {
        "a.tar/1.png#2": "holds 1.png more than once; the first is used",
        "a.tar/2.json": "2.json is not JSON",
        "a.tar/2.png": "2.json is not JSON",
        "a.tar/3.png": "no caption has its key 3; add 3.txt",
        "a.tar/4.txt": "no picture has its key 4",
        "a.tar/6.second.png": "a second picture of 6; 6.png is used",
        "a.tar/6.cls": "neither a picture",
        "a.tar/7.txt": "not UTF-8",
        "a.tar/7.png": "not UTF-8",
        "a.tar/8.png": "a link",
        "a.tar/._1.png": "starts with a dot",
        "b.tar": "after 2 members, which are used",
        "c.tar.gz": "compressed",
        "notes.txt": "no tar shard",
    }.items():
        assert words in why.pop(name)
    assert not why
    ledger = write_ledger(found, 8)
    assert sum(ledger.files.values()) == 17 + 2 + 5  # members of each tar that can be told, files of the folder
    assert ledger.files == {
        "used": 3,
        "description": 4,
        "container": 1,
        "without caption": 3,
        "unreadable": 5,
        "not a picture": 6,
        "hidden": 2,
    }
    assert write_page(ledger).count("data:image/jpeg") >= 3
    assert [problem.path.name for problem in load_pixels(found, 8, tmp_path / "cache").problems] == ["5.jpg"]


def test_shards_without_a_caption_and_places_that_are_none_are_refused(tmp_path: Path) -> None:
    tar(tmp_path / "s" / "a.tar", ("red_apple.png", png((1, 2, 3))))
    with pytest.raises(InputError, match=r"no captioned pictures.*add red_apple\.txt"):
        read_folder(tmp_path / "s")
    assert read_folder(tmp_path / "s", "names").pictures[0].captions == ("red apple",)
    (tmp_path / "s" / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match="is no whole, uncompressed tar"):
        read_folder(tmp_path / "s")
    with pytest.raises(InputError, match=r"owner/emoji does not exist here, and no hub is reached.*save_to_disk"):
        read_folder(Path("owner/emoji"))


def saved(folder: Path, parts: bool = False) -> Path:
    """A folder that the datasets package wrote."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = {"picture": datasets.Image(), "text": datasets.Value("string"), "style": datasets.Value("string")}
    images = [Image.new("RGB", (8, 8), (20 * n, 0, 0)) for n in range(6)]
    columns = {"picture": images, "text": [f"shade {n}" if n != 4 else "" for n in range(6)], "style": ["noto"] * 6}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    if parts:
        datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(folder)
    else:
        table.save_to_disk(folder, num_shards=2)
    return folder


def test_rows_of_a_saved_data_set_are_pictures(tmp_path: Path) -> None:
    folder = read_folder(saved(tmp_path / "set"))
    assert [picture.captions[0] for picture in folder.pictures] == [f"shade {n}" for n in (0, 1, 2, 3, 5)]
    assert folder.pictures[3].path == tmp_path / "set" / "data-00001-of-00002.arrow" / "row 0"
    assert folder.pictures[0].attributes == {"style": "noto"}
    (problem,) = folder.problems
    assert problem.path.name == "row 1" and problem.kind == "without caption"
    named = Picture(problem.path, ("a shade",), problem.split, stored=problem.stored)  # as fine-tuning names it
    assert named.split == "train" and load_pixels([named], 8, tmp_path / "named").array[0, 0, 0, 0] == 80
    pixels = load_pixels(folder, 8, tmp_path / "cache")
    assert pixels.array[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 100]
    ledger = write_ledger(folder, 8)
    assert ledger.files == {"used": 5, "description": 2, "container": 2, "without caption": 1}


def test_a_row_without_its_picture_costs_a_line_not_the_run(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    columns = {"image": [Image.new("RGB", (8, 8), (20, 0, 0)), None], "text": ["a shade", "nothing"]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "set")
    folder = read_folder(tmp_path / "set")
    pixels = load_pixels(folder, 8, tmp_path / "cache")
    assert pixels.array[:, 0, 0, 0].tolist() == [20] and [p.captions for p in pixels.pictures] == [("a shade",)]
    (problem,) = pixels.problems
    assert problem.path.name == "row 1" and "its row holds no picture" in problem.reason
    ledger = write_ledger(folder, 8)
    assert ledger.files["used"] == ledger.files["unreadable"] == 1
    assert any("its row holds no picture" in entry.reason for entry in ledger.entries)


def test_parts_of_a_saved_data_set_are_splits(tmp_path: Path) -> None:
    folder = read_folder(saved(tmp_path / "set", parts=True))
    assert len(folder.select("train")) == 5 and len(folder.select("test")) == 1
    assert write_ledger(folder).remarks == {"duplicate": 1, "in two splits": 1}
    assert sum(write_ledger(folder).files.values()) == 7 + len(
        [p for p in (tmp_path / "set").rglob("*") if p.is_file()]
    )


def test_a_saved_data_set_without_pictures_captions_or_sense_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "words")
    with pytest.raises(InputError, match="no column of pictures, only text"):
        read_folder(tmp_path / "words")
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))]}, features=features).save_to_disk(tmp_path / "mute")
    with pytest.raises(InputError, match="no column of captions, only image"):
        read_folder(tmp_path / "mute")
    (tmp_path / "words" / "dataset_info.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read by datasets"):
        read_folder(tmp_path / "words")
    with pytest.raises(InputError, match="rows, which have no names"):
        read_folder(tmp_path / "mute", "names")


@pytest.mark.slow
def test_doctor_takes_shards_and_a_run_those_at_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [json.loads(line) for line in (ICONS / "metadata.jsonl").read_text().splitlines()]
    chosen = [entry for entry in entries if entry["split"] == "test"][:2]
    chosen += [entry for entry in entries if entry["split"] == "train"][:14]
    members = []
    for number, entry in enumerate(chosen):
        members.append((f"{number:04d}.webp", (ICONS / entry.pop("file_name")).read_bytes()))
        members.append((f"{number:04d}.json", json.dumps(entry).encode()))
    for number in range(2):
        tar(tmp_path / "set" / f"{number}.tar", *members[16 * number : 16 * (number + 1)])
    pattern = str(tmp_path / "set" / "{0..1}.tar")
    done = verb("doctor", pattern, "--json", tmp_path / "ledger.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "ledger.json").read_text())["files"] == {
        "used": 16,
        "description": 16,
        "container": 2,
    }
    recipe = tmp_path / "tiny.toml"
    recipe.write_text((ROOT / "tests" / "data" / "tiny.toml").read_text().replace("batch = 32", "batch = 8"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    with Served(tmp_path / "set") as served:
        done = verb("train", recipe, "--data", f"{served.url}/{{0..1}}.tar", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"held out, from {served.url}/{{0..1}}.tar" in done.stderr and sorted(served.fetched) == ["0.tar", "1.tar"]
    assert "14 pictures to train on, 2 held out" in done.stderr
    assert "data: 34 files: 16 used, 16 description, 2 container" in done.stderr
