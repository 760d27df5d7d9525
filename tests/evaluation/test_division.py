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
from tests.shards import png, tar

ICONS = Path(__file__).parents[1] / "data" / "icons"
RECIPE = {"folder": "pictures", "size": 32, "held_out": "test", "hold_out": 0.02, "captions": "files", "folders": True}


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


@pytest.mark.parametrize("kind", ["files", "shards", "rows"])
def test_the_division_is_the_same_by_whatever_path_the_pictures_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = tmp_path / "a" / "pictures"
    pictures = [(f"{k}.png", f"number {k}", png((k, 0, 0))) for k in range(30)]
    if kind == "rows":
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        columns = {
            "image": [{"bytes": data, "path": None} for *_, data in pictures],
            "text": [t for _, t, _ in pictures],
        }
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(place)
    for number, (name, text, data) in enumerate(pictures if kind == "files" else ()):
        folder = place / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(text)
    for part in range(3 if kind == "shards" else 0):
        own = pictures[part::3]
        both = [
            (f"{Path(name).stem}.{end}", data)
            for name, text, png in own
            for end, data in (("png", png), ("txt", text.encode()))
        ]
        tar(place / f"{part}.tar", *both)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "linked").symlink_to(place)
    shutil.copytree(place, tmp_path / "b" / "moved")
    monkeypatch.chdir(tmp_path / "b")
    roots = ["../a/pictures", f"{tmp_path}/b/../a/pictures/", "linked", "./linked/", tmp_path / "b" / "moved", "moved"]
    roots += [f"{root}/{{0..2}}.tar" for root in roots if kind == "shards"]
    found = [{each.captions for each in divided(Path(root), Division(part=0.3))[0]} for root in [place, *roots]]
    assert 3 <= len(found[0]) <= 20
    assert all(held == found[0] for held in found)


def test_what_was_fine_tuned_whole_is_judged_by_what_that_run_held_out(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"data": RECIPE}))
    settings = {"method": "full", "held_out": "val", "hold_out": 0.0, "captions": "names", "background": "black"}
    settings["folders"] = True
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
    settings["folders"] = True
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


def test_recipes_that_do_not_say_it_took_no_folder_for_a_split(tmp_path: Path) -> None:
    names = [f"{part}/{k}.png" for part, count in (("test", 34), ("train", 66)) for k in range(count)]
    for name in names:
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((0, 0, 0)))
        path.with_suffix(".txt").write_text(name)

    def held(**files: dict[str, object]) -> set[str]:
        weights = tmp_path / "-".join(files)
        weights.mkdir(exist_ok=True)
        for file, content in files.items():
            (weights / f"{file}.json").write_text(json.dumps(content))
        division, remark = division_of(weights, Asked())
        found, others = divided(tmp_path / "pictures", division)
        assert remark == "" and len(found) + len(others) == len(names)
        return {picture.captions[0] for picture in found}

    old = {key: value for key, value in RECIPE.items() if key != "folders"}
    by_hash, by_folder = held(recipe={"data": old}), held(recipe={"data": RECIPE})
    assert by_folder == {name for name in names if name.startswith("test/")} != by_hash and len(by_hash) < 10
    both = held(recipe={"data": old}, finetune={"method": "full", "settings": RECIPE})
    assert both == by_hash & by_folder  # what neither run was trained on


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
