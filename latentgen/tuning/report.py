"""What a search found, as lines for people."""

from collections.abc import Iterator

from latentgen.tuning.grid import Candidate
from latentgen.tuning.run import Tuned
from latentgen.tuning.search import Rated

SHOWN = 12


def lines(found: Tuned) -> Iterator[str]:
    """The last round and what came next to it, the averages, the defaults before, and the choice."""
    yield f"{found.figure}, lower is better; 95% over captions, and how far behind the best of its round"
    for each in found.rated[:SHOWN]:
        yield line(each)
    for each in found.widths:
        yield line(each)
    yield f"before: {line(found.before)}"
    last = found.widths or found.rated
    near = [each for each in last[1:] if each.pictures == last[0].pictures and not each.told_apart]
    if near:
        yield f"{len(near)} others of the last round cannot be told from the best with {last[0].pictures} pictures"
    kept = "; the defaults there were, nothing is better over all pictures" if found.kept else ""
    yield f"chosen: {found.chosen.words()}: {found.chosen.evaluations} evaluations a picture{kept}"


def line(rated: Rated[Candidate]) -> str:
    """One candidate."""
    one = rated.candidate
    behind = "best" if rated.behind == (0.0, 0.0, 0.0) else "+{:.3g} [{:.3g}, {:.3g}]".format(*rated.behind)
    value = f"{rated.value:8.4f} [{rated.low:.4f}, {rated.high:.4f}]"
    return f"{value} of {rated.pictures:3}  {behind:28} {one.evaluations:3} evaluations  {one.words()}"
