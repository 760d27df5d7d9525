"""Builds the icon data set: emoji of several foundries as captioned pictures, from pinned and verified npm packages.

    python scripts/build_icons.py                  # data/icons: 128 px, nine styles, about two minutes
    python scripts/build_icons.py --sample         # tests/data/icons: 64 px, two dozen everyday concepts

Needs the npm client for the first download and `resvg-py` (pip install "latentgen[icons]"). What comes out is an
ordinary captioned folder: images/<style>/<code point>.webp (RGB on white, lossless), metadata.jsonl, NOTICE, and
build.json, which says from what it was made.
"""

import argparse
import difflib
import hashlib
import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from icon_captions import captions, without_colours
from icon_names import CLOCK_FACES, Concept, Files, Names, codepoint, read_names
from icon_sources import MISNAMED, NAME_PACKAGES, PACKAGES, SAMPLE_CONCEPTS, STYLES, TABLE_PACKAGES, Style, notice
from PIL import Image
from rich.console import Console
from rich.progress import Progress, TaskID

from latentgen.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = tuple(
    ROOT / "scripts" / f"{name}.py" for name in ("build_icons", "icon_captions", "icon_names", "icon_sources")
)
NEAR_DUPLICATE = 4e-4  # mean squared difference of two pictures at 16x16 in [0, 1], below which they are one
FLAG_STYLE = "twemoji"  # the one style that shows the flags
HELD_OUT_ONE_IN = 20
HELD_OUT_STYLES = 4  # a pair is held out only if its concept comes in three other styles too


@dataclass(frozen=True)
class Options:
    """What was asked for; `styles` empty means all, `limit` 0 means no limit."""

    out: Path
    cache: Path
    size: int = 128
    styles: tuple[str, ...] = ()
    limit: int = 0
    share_alike: bool = False
    sample: bool = False


@dataclass(frozen=True)
class Drawing:
    """One drawing of a package that shows a wanted concept: SVG text, or the bytes of a picture."""

    concept: Concept
    name: str
    content: str | bytes


@dataclass(frozen=True)
class Icon:
    """One picture of the set."""

    concept: Concept
    style: Style
    source_name: str

    @property
    def file_name(self) -> str:
        return f"images/{self.style.name}/{self.concept.codepoint}.webp"

    @property
    def label(self) -> str:
        """As its style shows it."""
        return without_colours(self.concept.label) if self.style.mono else self.concept.label


# ---- packages


def read_package(name: str, cache: Path) -> dict[str, bytes]:
    """The files of one pinned package by their path in it; downloaded once into `cache`, verified every time."""
    version, expected = PACKAGES[name]
    tarball = cache / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not tarball.is_file():
        _download(f"{name}@{version}", tarball)
    found = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if found != expected:
        raise InputError(
            f"{tarball}: expected sha256 {expected}, found {found}; delete the file to have it fetched again"
        )
    with tarfile.open(tarball) as archive:
        files = ((member.name, archive.extractfile(member)) for member in archive if member.isfile())
        return {name.split("/", 1)[1]: file.read() for name, file in files if file is not None}


def _download(package: str, tarball: Path) -> None:
    """Fetches beside the cache and moves the whole file in, so that a torn download never stays."""
    tarball.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tarball.parent, prefix=".npm-") as aside:
        try:
            subprocess.run(
                ["npm", "pack", "--loglevel=error", "--pack-destination", aside, package],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        except FileNotFoundError:
            raise InputError(
                f"the npm client is not installed; install npm or put {tarball.name} into --cache"
            ) from None
        except subprocess.CalledProcessError as error:
            said = " ".join(line.removeprefix("npm error ") for line in error.stderr.splitlines()[:2])
            raise InputError(
                f"npm could not fetch {package} ({said or 'no reason given'}); is there a network?"
            ) from None
        (Path(aside) / tarball.name).replace(tarball)


# ---- drawings


def drawings(style: Style, files: Files, names: Names, options: Options) -> Iterator[Drawing]:
    """The drawings of one style that belong in the set, one for a concept, in the package's order."""
    seen: set[str] = set()
    corrected = MISNAMED.get(style.package, {})
    for key, name, content in _pictures(files) if style.holds_pictures else _vectors(files, names, options.size):
        concept = names.concepts.get(corrected.get(name, key or ""))
        if concept and concept.codepoint not in seen and wanted(concept, style, options.sample):
            seen.add(concept.codepoint)
            yield Drawing(concept, name, content)


def wanted(concept: Concept, style: Style, sample: bool = False) -> bool:
    """No skin tones, letters and keycaps; few clock faces; flags in one style only."""
    if concept.is_variant or concept.kind == "text" or (sample and concept.codepoint not in SAMPLE_CONCEPTS):
        return False
    if concept.kind == "clock":
        return concept.codepoint in CLOCK_FACES
    return concept.kind != "flag" or style.name == FLAG_STYLE


def _pictures(files: Files) -> Iterator[tuple[str | None, str, bytes]]:
    for path in sorted(files):
        if path.endswith(".webp"):
            yield codepoint(PurePosixPath(path).stem), PurePosixPath(path).name, files[path]


def _vectors(files: Files, names: Names, size: int) -> Iterator[tuple[str | None, str, str]]:
    """An Iconify package: SVG bodies by name, each set in the middle of a square view box."""
    icons = json.loads(files["icons.json"])
    own = {name: codepoint(written) for written, name in json.loads(files.get("chars.json", b"{}")).items()}
    for name, icon in icons["icons"].items():
        key = own.get(name)
        width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
        side = max(width, height)
        left, top = icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {side} {side}" width="{size}" height="{size}">{icon["body"]}</svg>'
        )
        yield key if key in names.concepts else names.codepoint(name), name, svg


def draw(content: str | bytes, size: int) -> Image.Image:
    """(size, size) RGB on white."""
    if isinstance(content, bytes):
        with Image.open(io.BytesIO(content)) as picture:
            over = picture.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        white.alpha_composite(over)
        return white.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    import resvg_py  # only here: whoever reads captions needs no renderer

    png = resvg_py.svg_to_bytes(  # dpi: files sized in points fail without it
        svg_string=content, background="#ffffff", skip_system_fonts=True, width=size, height=size, dpi=96.0
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


class Gallery:
    """The pictures of one style so far, at 16x16, to tell a near-duplicate."""

    def __init__(self, capacity: int) -> None:
        self._small = np.empty((capacity, 16 * 16 * 3), np.float32)
        self._count = 0

    def add(self, picture: Image.Image) -> bool:
        """Whether the picture is new; if so it is remembered."""
        small = np.asarray(picture.resize((16, 16), Image.Resampling.BOX), np.float32).reshape(-1) / 255
        if self._count and ((self._small[: self._count] - small) ** 2).mean(1).min() < NEAR_DUPLICATE:
            return False
        self._small[self._count] = small
        self._count += 1
        return True


def draw_style(style: Style, names: Names, options: Options, folder: Path, progress: Progress) -> list[Icon]:
    """Draws one style into `folder`; returns its pictures in order."""
    chosen = list(drawings(style, read_package(style.package, options.cache), names, options))
    if style.mono:
        apart = names.told_apart([drawing.concept for drawing in chosen])
        chosen = [drawing for drawing in chosen if drawing.concept.codepoint in apart]
    task: TaskID = progress.add_task(style.name, total=len(chosen))
    (folder / "images" / style.name).mkdir(parents=True)
    gallery, icons = Gallery(len(chosen)), []
    for drawing in chosen:
        picture = draw(drawing.content, options.size)
        progress.advance(task)
        if not gallery.add(picture):
            continue
        icon = Icon(drawing.concept, style, drawing.name)
        picture.save(folder / icon.file_name, "WEBP", lossless=True, quality=60, method=3)
        icons.append(icon)
        if len(icons) == options.limit:
            break
    return icons


# ---- the set


def is_held_out(icon: Icon, styles_of_concept: int) -> bool:
    """A thing known from at least three other styles whose pair with this style the hash sets aside for testing."""
    if icon.concept.kind != "object" or styles_of_concept < HELD_OUT_STYLES:
        return False
    digest = hashlib.sha1(f"{icon.concept.codepoint}|{icon.style.name}".encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % HELD_OUT_ONE_IN == 0


def metadata(icons: Sequence[Icon]) -> list[dict[str, Any]]:
    """The rows of metadata.jsonl."""
    styles = Counter(icon.concept.codepoint for icon in icons)
    owners: defaultdict[str, set[str]] = defaultdict(set)  # label -> the concepts that are called so, in any style
    for icon in icons:
        owners[icon.label].add(icon.concept.codepoint)
    taken = {key: {label for label, own in owners.items() if own - {key}} for key in styles}
    keyed = [(icon.concept.codepoint, icon) for icon in icons]
    return [_row(icon, is_held_out(icon, styles[key]), taken[key]) for key, icon in keyed]


def _row(icon: Icon, held_out: bool, taken: set[str]) -> dict[str, Any]:
    concept, style = icon.concept, icon.style
    said = captions(concept.label, concept.tags, concept.kind, style.phrase, mono=style.mono, taken=taken)
    return {
        "file_name": icon.file_name,
        "text": said[0],
        "captions": said,
        "split": "test" if held_out else "train",
        "label": icon.label,
        "style": style.name,
        "codepoint": concept.codepoint,
        "kind": concept.kind,
        "tags": concept.tags,
        "group": concept.group,
        "license": style.licence,
        "source": f"{style.package}@{PACKAGES[style.package][0]}",
        "source_name": icon.source_name,
    }


def build(options: Options, progress: Progress) -> str:
    """Builds the set, or finds it built already; returns a line that says what is there.

    It is written beside `options.out` and renamed into place whole, with what others put there. Raises InputError.
    """
    styles = choose_styles(options)
    made_from = _fingerprint(options, styles)
    if (said := _already_built(options.out, made_from)) is not None:
        return f"{said}; nothing to do"
    written = _written(options.out)
    aside = options.out.with_name(f".{options.out.name}.building")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        names = _names(options.cache)
        rows = metadata([icon for style in styles for icon in draw_style(style, names, options, aside, progress)])
        if not rows:
            raise InputError("no picture is left of what was asked for; ask for more styles")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (aside / "metadata.jsonl").write_text(lines, encoding="utf-8")
        (aside / "NOTICE").write_text(notice(styles, options.size), encoding="utf-8")
        said = _summary(rows, aside)
        build_note = {"said": said, "metadata": hashlib.sha256(lines.encode()).hexdigest(), "made_from": made_from}
        (aside / "build.json").write_text(json.dumps(build_note, indent=1) + "\n", encoding="utf-8")
        _put_in_place(aside, options.out, written)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return said


def choose_styles(options: Options) -> list[Style]:
    """The styles asked for, in the table's order; an unknown one is an InputError that names the nearest."""
    known = [style.name for style in STYLES]
    for name in options.styles:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1, 0)[0]
            raise InputError(f"there is no style {name}; did you mean {nearest}? All: {', '.join(known)}")
    asked = [style for style in STYLES if not options.styles or style.name in options.styles]
    left_out = [style.name for style in asked if style.share_alike and not options.share_alike]
    if options.styles and left_out:
        raise InputError(f"{', '.join(left_out)}: licensed share-alike, so left out; ask with --share-alike")
    return [style for style in asked if style.name not in left_out]


def _names(cache: Path) -> Names:
    tables = [json.loads(read_package(name, cache)["chars.json"]) for name in TABLE_PACKAGES]
    emojibase, emojilib = (read_package(name, cache) for name in NAME_PACKAGES)
    return read_names(emojibase, emojilib, tables)


def _fingerprint(options: Options, styles: Sequence[Style]) -> str:
    """Of everything the set depends on: the scripts, the packages, the renderer, the options."""
    try:
        tools = [f"{name} {importlib.metadata.version(name)}" for name in ("pillow", "resvg-py")]
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f'{error.name} is not installed; run pip install "latentgen[icons]"') from None
    asked = [options.size, options.limit, options.sample, *(style.name for style in styles)]
    digest = hashlib.sha256(json.dumps([tools, asked, dict(PACKAGES)]).encode())
    for script in SCRIPTS:
        digest.update(script.read_bytes())
    return digest.hexdigest()


def _already_built(out: Path, made_from: str) -> str | None:
    """What the folder holds, if it is this very set; InputError if it is something else than a set of ours."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        note = json.loads((out / "build.json").read_text(encoding="utf-8"))
        return str(note["said"]) if note["made_from"] == made_from else None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{out} holds something that was not built here; name another --out or remove it") from None


def _written(out: Path) -> set[Path]:
    """What the build of a set wrote. Raises InputError where its table no longer says so."""
    if not (out / "build.json").is_file():
        return set()
    table = out / "metadata.jsonl"
    lines = table.read_text(encoding="utf-8", errors="replace") if table.is_file() else ""
    note = json.loads((out / "build.json").read_text(encoding="utf-8"))
    if hashlib.sha256(lines.encode()).hexdigest() != note.get("metadata"):
        raise InputError(f"{table} is not as it was built; name another --out or remove {out}")
    rows = (json.loads(line)["file_name"] for line in lines.splitlines())
    return {out / name for name in (*rows, table.name, "NOTICE", "build.json")}


def _put_in_place(aside: Path, out: Path, written: set[Path]) -> None:
    """Rename the new set into the old one's place, with what others put there: all but what was `written`.

    Raises InputError where a file of others stands where one of the set would go.
    """
    for path in out.rglob("*"):
        place = aside / path.relative_to(out)
        if path in written or (path.is_dir() and not path.is_symlink()):
            continue
        if place.exists():
            raise InputError(f"{path} was not built here and would be replaced; move it or name another --out")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, place, follow_symlinks=False)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    aside.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _summary(rows: Sequence[dict[str, Any]], folder: Path) -> str:
    size = sum(path.stat().st_size for path in (folder / "images").rglob("*.webp"))
    held_out = sum(row["split"] == "test" for row in rows)
    return (
        f"{len(rows):,} pictures of {len({row['codepoint'] for row in rows}):,} concepts in "
        f"{len({row['style'] for row in rows})} styles ({size / 1e6:.1f} MB), "
        f"{sum(len(row['captions']) for row in rows):,} captions, {held_out:,} pictures held out"
    )


def parse(arguments: Sequence[str] | None) -> Options:
    """The command line as Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder to build (data/icons; with --sample tests/data/icons)")
    parser.add_argument("--size", type=int, help="pixels of a side (128; with --sample 64)")
    parser.add_argument("--styles", default="", help="only these, separated by commas: noto,twemoji,...")
    parser.add_argument("--limit", type=int, default=0, help="at most so many pictures a style (0: all)")
    parser.add_argument("--share-alike", action="store_true", help="also the two styles under CC BY-SA 4.0")
    parser.add_argument("--sample", action="store_true", help="only two dozen everyday concepts: the tests' data set")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/latentgen/npm", help="for the tarballs")
    given = parser.parse_args(arguments)
    size = (64 if given.sample else 128) if given.size is None else given.size
    if not 16 <= size <= 1024:
        raise InputError(f"--size {size} is out of range; give 16 to 1024 pixels")
    if given.limit < 0:
        raise InputError(f"--limit {given.limit} is negative; give 0 for all pictures or how many a style")
    out = (given.out or ROOT / ("tests/data/icons" if given.sample else "data/icons")).resolve()
    styles = tuple(name.strip() for name in given.styles.split(",") if name.strip())
    return Options(out, given.cache, size, styles, given.limit, given.share_alike, given.sample)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; 0, or 2 after one line on standard error."""
    console = Console(stderr=True)
    bar = Progress(console=console, disable=not console.is_terminal)
    try:
        options = parse(arguments)
        with bar:
            said = build(options, bar)
    except (InputError, OSError) as error:
        print(f"build_icons: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
