"""A ledger as one HTML page that needs nothing beside it: counts, and what there is to see of each kind."""

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path

from latentgen.data.decode import CannotDecode, Opener
from latentgen.data.ledger import REMARKS, STATUSES, Entry, Ledger
from latentgen.data.picture import Picture
from latentgen.data.remote import as_told
from latentgen.durable import write_file
from latentgen.page import document, sheet, table

SIDE = 96  # of the small pictures, in pixels: about 3 KB each
SHOWN = 48  # of each kind; the ledger's JSON holds all


def write_page(ledger: Ledger) -> str:
    """The page. Opens again the pictures that it shows; reads nothing else."""
    small = _thumbnails(ledger)
    words = {**STATUSES, **REMARKS}
    kinds: list[tuple[str, list[Entry]]] = [
        (remark, [entry for entry in ledger.entries if remark in entry.remarks]) for remark in REMARKS
    ]
    left_out = [status for status in STATUSES if status not in ("used", "description", "container")]
    kinds = [(s, [entry for entry in ledger.entries if entry.status == s]) for s in left_out] + kinds
    kinds.append(("used", [entry for entry in ledger.entries if entry.status == "used"]))
    name = html.escape(as_told(ledger.root))
    size = f"{ledger.size} x {ledger.size} pixels" if ledger.size else "squares of their own size"
    body = [
        f"<h1>{name}</h1><p>{sum(ledger.files.values())} files. Pictures become {size}; transparent ones lie on "
        f"{html.escape(ledger.background)}.</p>",
        _counts("files", ledger.files),
        _counts("pictures", {"used": ledger.pictures, **ledger.remarks}),
        _words(ledger),
    ]
    for kind, entries in kinds:
        if entries:
            more = f"; {SHOWN} of them are shown" if len(entries) > SHOWN else ""
            body.append(f"<h2>{kind}: {len(entries)}{more}</h2><p>{html.escape(words[kind])}</p>")
            body.append(sheet(_figure(ledger, entry, small) for entry in entries[:SHOWN]))
    return document(as_told(ledger.root), body)


def keep_ledger(ledger: Ledger, folder: Path) -> Path:
    """Writes ledger.json and ledger.html into a folder, the page anew only when the ledger has changed; the page."""
    table, page = folder / "ledger.json", folder / "ledger.html"
    told = ledger.as_json().encode(errors="backslashreplace")  # names of files need not be UTF-8
    if not (table.is_file() and page.is_file() and table.read_bytes() == told):
        write_file(page, write_page(ledger).encode())
        write_file(table, told)
    return page


def _counts(of: str, counts: dict[str, int]) -> str:
    words = {**STATUSES, **REMARKS}
    rows = (
        f"<tr><td>{name}</td><td class=number>{count}</td><td class=what>{html.escape(words[name])}</td></tr>"
        for name, count in counts.items()
    )
    return f"<h2>{of}</h2>{table(rows)}"


def _words(ledger: Ledger) -> str:
    if not ledger.split_words:
        return ""
    rows = (
        f"<tr><td>{html.escape(word)}</td><td class=number>{parts}</td><td class=number>{times}</td></tr>"
        for word, parts, times in ledger.split_words
    )
    head = "<tr><th>word</th><th>tokens</th><th>times</th></tr>"
    return f"<h2>words that the tokenizer splits most</h2>{table([head, *rows])}"


def _figure(ledger: Ledger, entry: Entry, small: Callable[[Entry], str]) -> str:
    caption = html.escape(entry.captions[0]) if entry.captions else ""
    file = html.escape(entry.file).replace("/", "/<wbr>")
    lines = [f"<b>{file}</b>", caption, html.escape(entry.words())]
    return f"<figure>{small(entry)}<figcaption>{'<br>'.join(line for line in lines if line)}</figcaption></figure>"


def _thumbnails(ledger: Ledger) -> Callable[[Entry], str]:
    """Entry -> an <img>, or nothing for what cannot be shown; each picture is made once, when first asked for."""
    opener = Opener(ledger.background)
    made: dict[tuple[str, object], str] = {}

    def show(entry: Entry) -> str:
        key = (entry.file, entry.box)
        if entry.status not in ("used", "without caption", "does not fit"):
            return ""
        if key not in made:
            picture = Picture(ledger.root / entry.file, (), box=entry.box, stored=entry.stored)
            made[key] = _thumbnail(opener, picture)
        return made[key]

    return show


def _thumbnail(opener: Opener, picture: Picture) -> str:
    try:
        image = opener.open(picture, SIDE).image
    except CannotDecode:
        return ""
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width={image.width} height={image.height} alt="">'
