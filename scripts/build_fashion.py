"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017) as a captioned folder: 70,000 garments of 28 x 28 grey pixels.

usage: python scripts/build_fashion.py [--out data/fashion] [--cache FOLDER] [--limit N]

The pictures come from Debian's package `dataset-fashion-mnist` (MIT), fetched by `apt-get download` and unpacked by
`dpkg-deb -x`, neither of which needs root. A thousand lie in each PNG, uncropped and unpadded; every line of
metadata.jsonl names one by its box.
"""

import argparse
import gzip
import json
import math
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from latentgen.durable import write_folder
from latentgen.errors import InputError

ROOT = Path(__file__).parents[1]
PACKAGE = "dataset-fashion-mnist"
PLACE = "usr/share/datasets/fashion-mnist"
SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
CLASSES = (
    *("a t-shirt", "trousers", "a pullover", "a dress", "a coat"),
    *("a sandal", "a shirt", "a sneaker", "a bag", "an ankle boot"),
)
SIDE, COLUMNS, A_SHEET = 28, 40, 1000
NOTICE = """Fashion-MNIST: 70,000 pictures of garments, 28 x 28 grey pixels, ten classes.
Source: https://github.com/zalandoresearch/fashion-mnist, by way of Debian's package dataset-fashion-mnist.
Xiao, Rasul, Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, 2017.

The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

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


def fetch(cache: Path) -> Path:
    """The folder of the package's four IDX files, downloaded and unpacked below `cache` unless it is there."""
    unpacked = cache / PACKAGE / PLACE
    names = [f"{stem}-{kind}-ubyte.gz" for stem, _ in SPLITS.values() for kind in ("images-idx3", "labels-idx1")]
    if not all((unpacked / name).is_file() for name in names):
        cache.mkdir(parents=True, exist_ok=True)
        _run(["apt-get", "-q", "download", PACKAGE], cache)
        archive = max(cache.glob(f"{PACKAGE}_*.deb"), key=lambda path: path.stat().st_mtime)
        _run(["dpkg-deb", "-x", archive.name, PACKAGE], cache)
    missing = [name for name in names if not (unpacked / name).is_file()]
    if missing:
        raise InputError(f"the package {PACKAGE} does not hold {missing[0]}; look for it in {unpacked}")
    return unpacked


def _run(command: Sequence[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise InputError(
            f"{command[0]} is not here; on a Debian system it is, or put the files of {PACKAGE} into "
            f"{folder / PACKAGE / PLACE}"
        )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise InputError(f"{' '.join(command)} failed: {said[-1]}; try apt-get update first")


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes: magic 0x0000 08 rank, the sides as big-endian 32-bit numbers, the data.

    Raises InputError where it is not whole.
    """
    torn = InputError(f"{path} is no whole IDX file of bytes; remove it and run again")
    try:
        data = gzip.decompress(path.read_bytes())
        zero, kind, rank = struct.unpack(">HBB", data[:4])
        sides = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    except (gzip.BadGzipFile, EOFError, zlib.error, struct.error):
        raise torn from None
    if zero or kind != 8 or len(data) != 4 + 4 * rank + math.prod(sides):
        raise torn
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(sides)


def write(folder: Path, source: Path, limit: int = 0) -> str:
    """Fill an empty folder: sheets, metadata.jsonl, NOTICE. limit: the most pictures of each split (0: all)."""
    (folder / "images").mkdir()
    lines: list[str] = []
    counts = {}
    for split, (stem, expected) in SPLITS.items():
        pictures, labels = (
            read_idx(source / f"{stem}-images-idx3-ubyte.gz"),
            read_idx(source / f"{stem}-labels-idx1-ubyte.gz"),
        )
        if pictures.shape != (expected, SIDE, SIDE) or labels.shape != (expected,) or labels.max() >= len(CLASSES):
            raise InputError(f"{source}: {stem} is not Fashion-MNIST ({pictures.shape} pictures); fetch it anew")
        kept = limit or expected
        lines += [json.dumps(entry) for entry in _sheets(folder, split, pictures[:kept], labels[:kept])]
        counts[split] = min(kept, expected)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "NOTICE").write_text(NOTICE, encoding="utf-8")
    size = sum(path.stat().st_size for path in (folder / "images").iterdir())
    return ", ".join(f"{count:,} {split}" for split, count in counts.items()) + f" pictures ({size / 1e6:.1f} MB)"


def _sheets(folder: Path, split: str, pictures: np.ndarray, labels: np.ndarray) -> Iterator[dict[str, object]]:
    """Writes the pictures of one split, a thousand a PNG, and yields their lines."""
    for start in range(0, len(pictures), A_SHEET):
        part = pictures[start : start + A_SHEET]
        rows = -(-len(part) // COLUMNS)
        sheet = np.zeros((rows * SIDE, COLUMNS * SIDE), np.uint8)
        name = f"images/{split}-{start // A_SHEET:02d}.png"
        for place, (picture, label) in enumerate(zip(part, labels[start:], strict=False)):
            y, x = place // COLUMNS * SIDE, place % COLUMNS * SIDE
            sheet[y : y + SIDE, x : x + SIDE] = picture
            box = [x, y, x + SIDE, y + SIDE]
            yield {
                "file_name": name,
                "box": box,
                "text": CLASSES[label],
                "label": int(label),
                "split": split,
            }
        Image.fromarray(sheet).save(folder / name, optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; 0, or 2 after one line on standard error."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=ROOT / "data/fashion", help="the folder to build (data/fashion)")
    options.add_argument("--cache", type=Path, default=Path.home() / ".cache/latentgen/debian", help="for the package")
    options.add_argument("--limit", type=int, default=0, help="at most so many pictures of each split (0: all)")
    given = options.parse_args(arguments)
    try:
        if given.limit < 0:
            raise InputError(f"--limit {given.limit} is negative; give 0 for all pictures")
        source, said = fetch(given.cache), ""

        def fill(folder: Path) -> None:
            nonlocal said
            said = write(folder, source, given.limit)

        write_folder(given.out, fill)
    except (InputError, OSError) as error:
        print(f"build_fashion: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
