"""Verbs of data: doctor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from latentgen.cli.parts import PATH, PLACE, check_report, console, say
from latentgen.cli.rendering import progress_bar
from latentgen.errors import InputError

if TYPE_CHECKING:
    from latentgen.data import Ledger

SHOWN = 12  # files named under the tables
LEDGER = r'\{\n "folder": ".*",\n "size": .*,\n "background": ".*",\n "context": '  # how a ledger's JSON begins
DOCTOR = """Examples:

latentgen doctor pictures/

latentgen doctor pictures/ --recipe my.toml --html doctor.html

latentgen doctor 'shards/{000..012}.tar'"""


def add(app: click.Group) -> None:
    """Give the command line these verbs."""
    app.command(epilog=DOCTOR)(doctor)


@click.argument(
    "folder", type=PATH, metavar="FOLDER", help="Captioned pictures: a folder, tar shards, a saved data set."
)
@click.option("--recipe", type=PATH, help="Look with its [data] section, and its tokenizer if it is trained.")
@click.option(
    "--weights", type=PLACE, help="A weights folder whose tokenizer counts the captions.", show_default="none"
)
@click.option(
    "--captions", help="files: tables and .txt; names: the pictures' names.", show_default="the recipe's, or files"
)
@click.option("--json", "json_file", type=PATH, help="Write the ledger there; nothing but an earlier one is replaced.")
@click.option("--html", "html_file", type=PATH, help="Write a page with pictures there, likewise.")
def doctor(
    folder: Path,
    recipe: Path | None,
    weights: str | None,
    captions: str | None,
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    """Account for every file of a folder: what is used, cropped, upscaled, twice there, unreadable, without caption.

    Nothing in the folder is changed.
    """
    from latentgen.data import Buckets, hold_out, read_folder, write_ledger, write_page
    from latentgen.durable import write_file
    from latentgen.page import BEGINS
    from latentgen.pixels.recipe import read_any_recipe
    from latentgen.recipe import Recipe

    for report, begins in ((json_file, LEDGER), (html_file, BEGINS)):
        if report is not None:
            check_report(report, begins)
    if json_file is not None and html_file is not None and json_file.resolve() == html_file.resolve():
        raise InputError(f"--json and --html are both {json_file}; name two files")
    what = read_any_recipe(recipe) if recipe is not None else None
    said = captions or (what.data.captions if what else "files")
    pictures = read_folder(folder, said, folders=what.data.folders if what else True)
    if pictures.remark:
        say(pictures.remark)
    size, background = (what.data.size, what.data.background) if what else (None, "white")
    buckets = None
    if what is not None:
        buckets = Buckets.square(what.data.size, what.data.upscale)
        if isinstance(what, Recipe) and what.data.buckets is not None:  # which depends on the networks' own steps
            from latentgen.foundations import buckets_of

            buckets = buckets_of(what)
        pictures = hold_out(pictures, what.data.held_out, what.data.hold_out)
    with progress_bar("looking") as progress:
        ledger = write_ledger(pictures, size, background, progress=progress, buckets=buckets)
    words = what if isinstance(what, Recipe) else None  # a pixel model has classes instead
    tokenizer = find_tokenizer(weights, words.name if words else None)
    if tokenizer is not None:
        ledger = count_with(tokenizer, ledger, words.tokenizer.context if words and weights is None else None)
    if json_file is not None:
        write_file(json_file, ledger.as_json().encode(errors="backslashreplace"))
    if html_file is not None:
        write_file(html_file, write_page(ledger).encode())
    print_ledger(ledger)
    for written in (json_file, html_file):
        if written is not None:
            say(f"wrote {written}")


def find_tokenizer(weights: str | None, name: str | None) -> Path | None:
    """A folder with a tokenizer: that of the weights, else of a recipe's run or of what it became; None if none is."""
    if weights is not None:
        place = Path(weights) / "tokenizer"
        if not place.is_dir():
            raise InputError(f"--weights {weights} holds no folder tokenizer; give a weights folder")
        return place
    if name is None:
        return None
    runs = Path("weights", f"{name}.training").glob("tokenizer-*/tokenizer_config.json")
    trained = sorted((path.parent for path in runs), key=lambda place: place.stat().st_mtime)
    finished = Path("weights", name, "tokenizer")
    return trained[-1] if trained else finished if finished.is_dir() else None


def count_with(place: Path, ledger: Ledger, context: int | None) -> Ledger:
    """The ledger with what the tokenizer in a folder does to its captions; context: its own if None."""
    from latentgen.data import count_tokens
    from latentgen.models.create import read_tokenizer

    words = read_tokenizer(place)
    texts = sorted({caption for entry in ledger.entries for caption in entry.captions})
    lengths = {text: len(ids) for text, ids in zip(texts, words(texts).input_ids, strict=True)}

    def pieces(asked: Sequence[str]) -> list[int]:
        return [len(ids) - 2 for ids in words(list(asked)).input_ids] if asked else []

    return count_tokens(ledger, lengths, context or words.model_max_length, pieces)


def print_ledger(ledger: Ledger) -> None:
    """Two tables, and the files that a person may want to look at."""
    from rich.markup import escape
    from rich.table import Table

    from latentgen.data.ledger import REMARKS, STATUSES
    from latentgen.data.remote import as_told

    out = console()
    files = ledger.files
    counts = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    counts.add_column(justify="right")
    counts.add_row(str(sum(files.values())), "files", f"in {escape(as_told(ledger.root))}", style="bold")
    for status, count in files.items():
        counts.add_row(str(count), status, STATUSES[status])
    counts.add_row()
    counts.add_row(str(ledger.pictures), "pictures", "are used; of these", style="bold")
    for remark, count in ledger.remarks.items():
        counts.add_row(str(count), remark, REMARKS[remark])
    if ledger.context is None:
        counts.add_row("", "caption cut", "not counted: no tokenizer was at hand (--weights)")
    out.print(counts)
    if ledger.split_words:
        worst = ", ".join(f"{word} ({parts})" for word, parts, _ in ledger.split_words[:SHOWN])
        out.print(f"\nwords that the tokenizer splits most, in tokens: {escape(worst)}")
    noted = [entry for entry in ledger.entries if entry.words()]
    noted.sort(key=lambda entry: entry.status in ("used", "not a picture"))
    if noted:
        named = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("file", "status", "what there is to know"):
            named.add_column(column, overflow="fold")
        for entry in noted[:SHOWN]:
            named.add_row(escape(entry.file), entry.status, escape(entry.words()))
        out.print()
        out.print(named)
        if len(noted) > SHOWN:
            out.print(f"… and {len(noted) - SHOWN} more: all are in the JSON file (--json)")
