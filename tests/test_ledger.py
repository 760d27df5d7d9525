"""The ledger accounts for every file on the disk; alike pictures are found; pages and tables say it."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentgen.data import (
    Buckets,
    CaptionedFolder,
    Ledger,
    count_tokens,
    hold_out,
    read_folder,
    write_ledger,
    write_page,
)
from latentgen.data.decode import Opener
from latentgen.data.ledger import Entry
from latentgen.data.survey import difference_hash
from tests.forked import verb

ROOT = Path(__file__).parents[1]
ICONS = ROOT / "tests" / "data" / "icons"


def scene(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A smooth random picture, as unlike another seed's as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def put(path: Path, image: Image.Image, caption: str | None = "a scene", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)  # type: ignore[arg-type]
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with every case there is."""
    root = tmp_path / "mine"
    put(root / "plain.png", scene(1))
    put(root / "copy.bmp", scene(1))  # the same pixels in another format
    put(root / "near.jpg", scene(1).resize((48, 48)), quality=85)
    put(root / "sub" / "wide.png", scene(2, (128, 64)), "a very wide scene of many words indeed")
    put(root / "small.png", scene(3, (16, 16)))
    first, second = scene(4), scene(5)
    put(root / "moving.gif", first, append_images=[second], save_all=True)
    glass = scene(6).convert("RGBA")
    glass.putalpha(128)
    put(root / "glass.png", glass)
    put(root / "silent.png", scene(7), None)
    put(root / "empty.png", scene(8), "  \n")
    torn = put(root / "torn.png", scene(9, (256, 256)))
    torn.write_bytes(torn.read_bytes()[:2000])
    put(root / "fake.png", scene(10)).write_text("no picture")
    (root / "notes.txt").write_text("call home")
    (root / "scan.pdf").write_bytes(b"%PDF")
    (root / ".DS_Store").write_bytes(b"x")
    put(root / ".thumbs" / "a.png", scene(11), None)
    return root


def entry(ledger: Ledger, name: str) -> Entry:
    (found,) = (entry for entry in ledger.entries if entry.file == name)
    return found


def test_counts_add_up_to_the_files_on_the_disk(folder: Path) -> None:
    ledger = write_ledger(read_folder(folder), 32)
    on_disk = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(ledger.files.values()) == len(on_disk) == len(ledger.entries)
    assert {entry.file for entry in ledger.entries} == {path.relative_to(folder).as_posix() for path in on_disk}
    assert ledger.files == {
        "used": 7,
        "description": 10,
        "without caption": 2,
        "unreadable": 2,
        "not a picture": 2,
        "hidden": 2,
    }
    assert "empty.txt is empty" in entry(ledger, "empty.png").reason
    assert "no caption file beside it" in entry(ledger, "silent.png").reason
    assert "truncated" in entry(ledger, "torn.png").reason
    assert json.loads(ledger.as_json())["total"] == len(on_disk)


def test_each_remark_says_how_much(folder: Path) -> None:
    ledger = write_ledger(read_folder(folder), 32)
    wide = entry(ledger, "sub/wide.png")
    assert wide.remarks == ("cropped",) and wide.lost == 0.5
    assert "50% of 128 x 64 is lost" in wide.words()
    small = entry(ledger, "small.png")
    assert small.remarks == ("upscaled",) and small.scale == 2
    assert entry(ledger, "moving.gif").facts.frames == 2
    assert entry(ledger, "glass.png").remarks == ("transparent",)
    assert entry(ledger, "plain.png").duplicate_of == "copy.bmp"
    assert entry(ledger, "near.jpg").near == "copy.bmp"
    assert entry(ledger, "copy.bmp").remarks == ()
    assert ledger.remarks["duplicate"] == ledger.remarks["near duplicate"] == 1
    assert "upscaled" not in write_ledger(read_folder(folder)).remarks


def test_the_difference_hash_is_the_sign_of_brightness_to_the_right() -> None:
    ramp = np.repeat(np.arange(9, dtype=np.uint8)[None] * 20, 8, axis=0)
    assert difference_hash(Image.fromarray(ramp)) == 0
    assert difference_hash(Image.fromarray(ramp[:, ::-1])) == 2**64 - 1
    grid = np.zeros((8, 9), np.uint8)
    grid[0, 0] = 255  # the first bit of all
    assert difference_hash(Image.fromarray(grid)) == 2**63


def test_near_copies_of_icons_are_found_and_other_icons_are_not(tmp_path: Path) -> None:
    pictures = [p for p in read_folder(ICONS).pictures if p.attributes["style"] == "noto"][:12]
    for number, picture in enumerate(pictures):
        image = Opener().open(picture).image
        put(tmp_path / f"{number:02}a.png", image)
        put(tmp_path / f"{number:02}b.jpg", image.resize((100, 100)), quality=80)
    ledger = write_ledger(read_folder(tmp_path))
    near = {entry.file: entry.near for entry in ledger.entries if entry.near}
    assert near == {f"{number:02}b.jpg": f"{number:02}a.png" for number in range(len(pictures))}


def test_equal_pictures_in_two_splits_are_told(tmp_path: Path) -> None:
    lines = []
    for name, split in (("a", "train"), ("b", "test")):
        put(tmp_path / f"{name}.png", scene(1), None)
        lines.append(json.dumps({"file_name": f"{name}.png", "text": "x", "split": split}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert write_ledger(read_folder(tmp_path)).remarks == {"duplicate": 1, "in two splits": 1}


def test_a_second_survey_opens_only_what_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = folder.parent / "survey.json"
    first = write_ledger(read_folder(folder), 32, kept=kept)
    opened: list[str] = []
    real = Opener.open

    def spy(self: Opener, picture, draft=None):  # type: ignore[no-untyped-def]
        opened.append(picture.path.name)
        return real(self, picture, draft)

    monkeypatch.setattr(Opener, "open", spy)
    assert write_ledger(read_folder(folder), 32, kept=kept).as_json() == first.as_json()
    assert sorted(opened) == ["fake.png", "torn.png"]  # what cannot be read is tried again
    opened.clear()
    put(folder / "small.png", scene(12, (40, 40)))
    os.utime(folder / "small.png", ns=(1, 1))
    changed = write_ledger(read_folder(folder), 32, kept=kept)
    assert sorted(opened) == ["fake.png", "small.png", "torn.png"]
    assert entry(changed, "small.png").remarks == ()
    opened.clear()
    write_ledger(read_folder(folder), 32, "black", kept)
    assert len(opened) >= 9  # another background, other pixels


def test_captions_that_are_cut_and_words_that_are_split_are_counted(folder: Path) -> None:
    ledger = write_ledger(read_folder(folder))
    texts = {caption for entry in ledger.entries for caption in entry.captions}
    counted = count_tokens(ledger, {text: len(text.split()) + 2 for text in texts}, 6, lambda ws: [len(w) for w in ws])
    wide = entry(counted, "sub/wide.png")
    assert (wide.cut, wide.longest) == (1, 10) and wide.remarks == ("cropped", "caption cut")
    assert counted.remarks["caption cut"] == 1 and counted.context == 6
    assert counted.split_words[0] == ("indeed", 6, 1)


def test_the_page_holds_its_pictures_and_needs_nothing_beside_it(folder: Path) -> None:
    (folder / "<b>.png").write_bytes((folder / "plain.png").read_bytes())
    page = write_page(write_ledger(read_folder(folder), 32))
    assert page.count("data:image/jpeg;base64,") >= 9
    for word in ("50% of 128 x 64 is lost", "same pixels as copy.bmp", "silent.png", "torn.png", "&lt;b&gt;.png"):
        assert word in page
    assert "<b>.png" not in page and "http" not in page and 'src="/' not in page


def test_every_box_of_a_sheet_is_in_the_ledger_and_what_does_not_fit_is_shown(tmp_path: Path) -> None:
    root = tmp_path / "d"
    put(root / "sheet.png", scene(1, (96, 64)), None)
    put(root / "small.png", scene(2, (16, 16)), None)
    boxes = {(0, 0, 40, 40): "large", (40, 0, 60, 20): "small", (60, 0, 96, 36): "", (0, 40, 4, 44): "smallest"}
    rows: list[dict[str, object]] = [{"file_name": "sheet.png", "text": t, "box": list(b)} for b, t in boxes.items()]
    rows += [{**rows[0], "text": "again"}, {"file_name": "small.png", "text": "a small one"}]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    ledger = write_ledger(read_folder(root), 32, buckets=Buckets.square(32, False))
    assert {(e.file, e.box): e.status for e in ledger.entries if e.status != "description"} == {
        ("sheet.png", (0, 0, 40, 40)): "used",
        ("sheet.png", (40, 0, 60, 20)): "does not fit",
        ("sheet.png", (60, 0, 96, 36)): "without caption",
        ("sheet.png", (0, 40, 4, 44)): "does not fit",
        ("small.png", None): "does not fit",
    }
    assert ledger.files == {"used": 1, "description": 1, "does not fit": 1}  # one status a file
    assert [e.again for e in ledger.entries if e.status == "used"] == [True]
    page = write_page(ledger)
    assert page.count("<figure><img") == page.count("<figure>") == 6  # the used one is shown twice, as named again


def test_pictures_are_held_out_by_their_names_alone(tmp_path: Path) -> None:
    for number in range(200):
        put(tmp_path / f"{number}.png", Image.new("L", (1, 1)))
    folder = read_folder(tmp_path)
    held = {picture.path.name for picture in hold_out(folder, "test", 0.1).select("test")}
    assert 8 <= len(held) <= 34  # three standard deviations about 20
    fewer = CaptionedFolder(tmp_path, folder.pictures[::2], ())
    assert {p.path.name for p in hold_out(fewer, "test", 0.1).select("test")} == held & {
        p.path.name for p in fewer.pictures
    }
    assert hold_out(folder, "test", 0) is folder
    two = CaptionedFolder(tmp_path, folder.pictures[:2], ())
    for part in (1e-9, 0.999):
        assert len(hold_out(two, "test", part).select("test")) == 1
    marked = hold_out(folder, "test", 0.1)
    assert hold_out(marked, "test", 0.5) is marked


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return verb("doctor", *arguments, COLUMNS="160")


def test_the_verb_prints_writes_and_refuses(folder: Path) -> None:
    table, page = folder.parent / "out" / "ledger.json", folder.parent / "ledger.html"
    recipe = ROOT / "tests" / "data" / "tiny.toml"
    done = run(str(folder), "--recipe", str(recipe), "--json", str(table), "--html", str(page))
    assert done.returncode == 0, done.stderr
    told = json.loads(table.read_text())
    assert told["size"] == 32 and sum(told["files"].values()) == told["total"] == 25
    assert "25  files" in done.stdout and "without caption" in done.stdout and "torn.png" in done.stdout
    assert page.read_text().startswith("<!doctype html>")
    assert told["context"] is None and "no tokenizer was at hand" in done.stdout
    refused = run(str(folder / "none"))
    assert refused.returncode == 2 and refused.stderr.startswith("latentgen: ") and "does not exist" in refused.stderr
    named = run(str(folder), "--captions", "names")
    assert named.returncode == 0 and "9  pictures" in named.stdout


def test_the_verb_replaces_its_own_reports_alone(folder: Path) -> None:
    table, page = folder.parent / "ledger.json", folder.parent / "ledger.html"
    table.touch()
    asked = [str(folder), "--json", str(table), "--html", str(page)]
    assert run(*asked).returncode == 0
    written = page.read_text(), table.read_text()
    (folder / "more.txt").write_text("more")
    assert run(*asked).returncode == 0
    assert page.read_text() != written[0] and table.read_text() != written[1]
    for option, there in (("--json", page), ("--html", table), ("--html", folder / "plain.png"), ("--json", folder)):
        refused = run(str(folder), option, str(there))
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not refused.stdout
        assert f"{there} is " in refused.stderr and "name another place" in refused.stderr
    with Image.open(folder / "plain.png") as picture:
        picture.load()
    table.write_text("")
    (folder.parent / "link").symlink_to(folder.parent)
    for same in (table, folder.parent / "link" / table.name):
        both = run(str(folder), "--json", str(table), "--html", str(same))
        assert both.returncode == 2 and both.stderr.endswith("name two files\n") and not table.read_text()


def test_the_verb_says_before_it_looks_that_a_report_cannot_be_written(folder: Path) -> None:
    plain = folder / "plain.txt"
    for option in ("--json", "--html"):
        refused = run(str(folder / "nowhere"), option, str(plain / "report"))
        assert refused.returncode == 2 and f"{plain} is a file, not a folder" in refused.stderr


def test_the_verb_counts_with_the_tokenizer_of_weights(folder: Path) -> None:
    from tokenizers import Tokenizer

    (folder / "plain.txt").write_text("an apple " * 20 + "Xylophones, zwxqj-fgh")
    table = folder.parent / "ledger.json"
    done = run(str(folder), "--weights", str(ROOT / "weights" / "icons"), "--json", str(table))
    assert done.returncode == 0, done.stderr
    told = json.loads(table.read_text())
    (plain,) = (entry for entry in told["entries"] if entry["file"] == "plain.png")
    counted = Tokenizer.from_file(str(ROOT / "weights" / "icons" / "tokenizer" / "tokenizer.json"))
    counted.no_truncation()
    assert plain["longest_caption"] == len(counted.encode((folder / "plain.txt").read_text()).ids)
    assert told["context"] == 32 and told["remarks"]["caption cut"] == 1 and plain["captions_cut"] == 1
    assert told["words_split_most"][0]["word"] == "zwxqj-fgh" and "zwxqj-fgh" in done.stdout
    refused = run(str(folder), "--weights", str(folder))
    assert refused.returncode == 2 and "holds no folder tokenizer" in refused.stderr
