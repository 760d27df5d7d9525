"""Pictures are judged that a model was not trained on: those its own recipe holds out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from latentgen.checkpoint import open_checkpoint
from latentgen.cli import app
from latentgen.data import read_folder
from latentgen.errors import InputError
from latentgen.evaluation import run as evaluation
from latentgen.evaluation.division import Asked, Division, divided, division_of
from latentgen.evaluation.run import Artist, Order, evaluate
from latentgen.pipeline import terms_of
from latentgen.training.intake import divide, read_pictures
from latentgen.tuning import run as tuning
from latentgen.tuning.run import Bench
from latentgen.tuning.run import Order as Tuning

ICONS = Path(__file__).parents[1] / "data" / "icons"
RECIPE = {"folder": "pictures", "size": 32, "held_out": "test", "hold_out": 0.02, "captions": "files"}


@pytest.fixture(scope="module")
def unmarked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample with no picture marked as held out."""
    place = tmp_path_factory.mktemp("data") / "icons"
    shutil.copytree(ICONS, place)
    rows = [json.loads(line) for line in (place / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({key: value for key, value in row.items() if key != "split"}) for row in rows]
    (place / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def own(make_folder: Callable[..., Path]) -> Path:
    """Tiny weights with a recipe that holds three hundredths out."""
    recipe = {"name": "own", "data": {**RECIPE, "hold_out": 0.03}}
    files = {"recipe.json": json.dumps(recipe), "latentgen.json": json.dumps({"sample_size": 32})}
    return make_folder("own", extra_files=files)


class Unopened:
    """In the pipeline's place: enough was seen before anything is rendered."""

    machine = None

    def __init__(self, weights: Path) -> None:
        self.terms = terms_of(open_checkpoint(weights))

    from_pretrained = classmethod(lambda cls, weights: cls(weights))


def held_in_training(root: Path, place: Path, split: str, part: float) -> tuple[list[Path], list[Path]]:
    """What a training run holds out, and what it trains on."""
    folder, pixels, _ = read_pictures(root, 32, place, captions="files", background="white", held_out=split, part=part)
    data = divide(folder.root, pixels, split, {})
    return [picture.path for picture in data.held], [picture.path for picture in data.pictures]


@pytest.mark.parametrize(("split", "part"), [("test", 0.02), ("test", 0.2), ("val", 0.05)])
def test_what_is_judged_is_what_a_training_run_held_out(
    unmarked: Path, tmp_path: Path, split: str, part: float
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"data": {**RECIPE, "held_out": split, "hold_out": part}}))
    division, remark = division_of(tmp_path, Asked())
    assert division == Division(split, part) and remark == ""
    held, training = ([picture.path for picture in some] for some in divided(unmarked, division))
    assert (sorted(held), sorted(training)) == tuple(map(sorted, held_in_training(unmarked, tmp_path, split, part)))


def test_what_was_fine_tuned_whole_is_judged_by_what_that_run_held_out(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"data": RECIPE}))
    settings = {"method": "full", "held_out": "val", "hold_out": 0.0, "captions": "names", "background": "black"}
    (tmp_path / "finetune.json").write_text(json.dumps({"method": "full", "settings": settings}))
    division, remark = division_of(tmp_path, Asked())
    assert division == Division("val", 0.0, "names", "black")
    assert remark.endswith("its recipe says hold_out = 0.02, held_out = 'test'")  # which held other pictures out
    assert "was trained on" in division_of(tmp_path, Asked(part=0.02))[1]


@pytest.mark.parametrize(("first", "later"), [(0.02, 0.1), (0.1, 0.02)])
def test_what_was_fine_tuned_whole_is_judged_by_what_neither_run_was_trained_on(
    unmarked: Path, tmp_path: Path, first: float, later: float
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"data": {**RECIPE, "hold_out": first}}))
    settings = {"method": "full", "held_out": "test", "hold_out": later, "captions": "files", "background": "white"}
    (tmp_path / "finetune.json").write_text(json.dumps({"method": "full", "settings": settings}))
    division, remark = division_of(tmp_path, Asked())
    held = {picture.path for picture in divided(unmarked, division)[0]}
    both = [set(held_in_training(unmarked, tmp_path / "cache", "test", part)[0]) for part in (first, later)]
    assert held == both[0] & both[1] != both[0] | both[1] and remark == ""
    assert "was trained on" in division_of(tmp_path, Asked(part=0.1))[1]


def test_an_option_overrides_the_recipe_and_a_line_says_so_where_trained_pictures_are_judged(tmp_path: Path) -> None:
    assert division_of(tmp_path, Asked()) == (Division(), "")
    assert division_of(tmp_path, Asked(split="val")) == (Division("val"), "")
    (tmp_path / "recipe.json").write_text(json.dumps({"data": {**RECIPE, "background": "grey"}}))
    assert division_of(tmp_path, Asked(part=0.01)) == (Division("test", 0.01, "files", "grey"), "")
    for asked in (Asked(part=0.1), Asked(split="val")):
        _, remark = division_of(tmp_path, asked)
        assert remark.endswith("its recipe says hold_out = 0.02, held_out = 'test'")
    with pytest.raises(InputError, match="--hold-out is 1"):
        division_of(tmp_path, Asked(part=1.0))


def test_evaluate_and_tune_judge_on_what_the_recipe_holds_out(
    unmarked: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, _ = held_in_training(unmarked, tmp_path / "cache", "test", 0.03)
    captions = {picture.path: picture.captions[0] for picture in read_folder(unmarked).pictures}
    expected = sorted(captions[path] for path in held)
    assert 3 <= len(expected) < len(divided(unmarked, Division())[0])  # or a twentieth would do as well
    asked: list[str] = []

    def draw(_: Artist, captions: list[str]) -> None:
        asked.extend(captions)
        raise InputError("enough was seen")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="enough"):
        patch.setattr(Artist, "draw", draw)
        patch.setattr(evaluation, "Pipeline", Unopened)
        evaluate(own, Order(unmarked), tmp_path / "cache")
    assert sorted(asked) == expected
    lines: list[str] = []
    monkeypatch.setattr(tuning, "Pipeline", Unopened)
    bench = Bench.of(open_checkpoint(own), own, Tuning(unmarked, 4), tmp_path / "cache", lines.append)
    assert sorted(bench.captions) == expected and lines == []


def test_two_models_that_were_held_to_other_pictures_are_not_compared(
    unmarked: Path, own: Path, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_folder("another")  # it says nothing, so a twentieth
    with pytest.raises(InputError, match="hold other pictures out; say for both"):
        said = ["--data", unmarked, "--out", tmp_path / "r.html", "--compare", folder]
        app.main(["evaluate", *map(str, (own, *said))], standalone_mode=False)
