"""The price of a way to render is what the network is really given; the search finds what is best; defaults hold."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latentgen import Pipeline, cli
from latentgen.checkpoint import open_checkpoint, write_defaults
from latentgen.errors import InputError
from latentgen.evaluation.encoders import Encoder
from latentgen.evaluation.metrics import kid_figure
from latentgen.evaluation.run import Artist
from latentgen.pipeline import terms_of
from latentgen.training import averages as kept
from latentgen.tuning import averages
from latentgen.tuning.grid import TRIED, Candidate, evaluations, grid
from latentgen.tuning.report import lines
from latentgen.tuning.run import Bench, Order, Tuned, rounds_of, tune
from latentgen.tuning.search import KernelDistance, Unlikeness, halve, rate

ICONS = Path(__file__).parent / "data" / "icons"


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny weights, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


@pytest.fixture(scope="module")
def counted(folder: Path) -> tuple[Pipeline, list[int]]:
    """A pipeline whose network answers 0, and how many rows it was given at each call."""
    pipe, rows = Pipeline.from_pretrained(folder), list[int]()

    def network(x: Any, time: Any, condition: Any) -> Any:
        rows.append(len(x))
        return 0 * x

    pipe.network = network
    return pipe, rows


@pytest.mark.parametrize("sampler", TRIED)
def test_the_price_is_what_the_network_is_given(counted: tuple[Pipeline, list[int]], sampler: str) -> None:
    pipe, rows = counted
    for guidance, interval in ((1.0, None), (3.0, None), (3.0, (0.0, 0.6)), (3.0, (0.2, 0.8))):
        rows.clear()
        told = {"num_inference_steps": 5, "guidance_scale": guidance, "guidance_interval": interval}
        pipe("a cat", seed=1, sampler=sampler, output_type="latent", **told)  # type: ignore[arg-type]
        assert evaluations(pipe.scheduler, sampler, 5, guidance, interval) == sum(rows)


def test_every_candidate_is_within_its_budget_and_one_step_more_is_not(folder: Path) -> None:
    scheduler = open_checkpoint(folder).config("scheduler")
    for each in grid(scheduler, 12):
        assert each.evaluations == evaluations(scheduler, each.sampler, each.steps, each.guidance, each.interval) <= 12
        assert evaluations(scheduler, each.sampler, each.steps + 1, each.guidance, each.interval) > 12


def test_a_budget_that_fits_no_sampler_is_one_line(folder: Path) -> None:
    with pytest.raises(InputError, match="is 3, in which no sampler takes 2 steps; the least that fits is 4"):
        grid(open_checkpoint(folder).config("scheduler"), 3, guidances=(3.0,), intervals=(None,))


def test_the_search_finds_the_candidate_whose_renderings_are_the_real_pictures() -> None:
    random = np.random.default_rng(0)
    real = random.standard_normal((200, 16))
    fresh = random.standard_normal((48, 16))
    looked: list[tuple[float, int]] = []

    def look(shift: float, count: int) -> np.ndarray:
        looked.append((shift, count))
        return fresh[:count] + shift

    shifts = [2.0, 1.0, 0.0, 0.6, 3.0, 1.5, 4.0, 5.0, 0.8]
    found = halve(shifts, look, KernelDistance(real), [8, 16, 48])
    assert found[0].candidate == 0 and found[0].behind == (0, 0, 0) and found[0].low <= 0.05
    assert sorted(each.candidate for each in found) == sorted(shifts)
    assert [count for _, count in looked] == [8] * 9 + [16] * 3 + [48] * 2
    assert found[1].told_apart and found[1].pictures == 48


def test_candidates_that_are_alike_are_not_told_apart_and_differences_are_tighter_than_figures() -> None:
    random = np.random.default_rng(1)
    own = random.standard_normal((64, 8))
    noise = random.standard_normal((64, 8))
    few = rate(["a", "b"], [own[:2] + 1, own[:2] - 1], KernelDistance(own), 2)
    assert all(np.isfinite([each.low, each.high, *each.behind]).all() for each in few)
    rated = rate(["a", "b"], [own + noise, own + noise + 0.01 * random.standard_normal((64, 8))], Unlikeness(own), 64)
    assert not rated[1].told_apart
    assert rated[1].behind[2] - rated[1].behind[1] < 0.2 * (rated[1].high - rated[1].low)


def test_the_kernel_distance_of_the_search_is_the_figure_of_the_evaluation() -> None:
    x, y = np.random.default_rng(2).standard_normal((2, 30, 8))
    ours = KernelDistance(y)(x + 0.5, np.ones((1, 30)))[0]
    assert ours == pytest.approx(kid_figure(x + 0.5, y).value, rel=1e-9)


def test_rounds_grow_to_all_pictures() -> None:
    assert rounds_of(48) == [8, 16, 32, 48] and rounds_of(6) == [6] and rounds_of(32) == [8, 16, 32]


def test_defaults_are_used_and_the_folder_still_verifies(own: Path) -> None:
    (own / "notes.txt").write_text("mine")
    before = Pipeline.from_pretrained(own)("a cat", seed=1, output_type="np")
    told = {"num_inference_steps": 3, "guidance_scale": 2.0, "sampler": "heun", "guidance_interval": (0.2, 0.8)}
    write_defaults(own, told, notes={"tuned": {"evaluations": 9}})
    open_checkpoint(own)  # hashes of the manifest
    assert (own / "notes.txt").read_text() == "mine"
    extras = json.loads((own / "latentgen.json").read_text())
    assert extras["sample_size"] == 32 and extras["tuned"] == {"evaluations": 9}
    pipe = Pipeline.from_pretrained(own)
    out = pipe("a cat", seed=1, output_type="np")
    assert {key: out.settings[key] for key in told} == told
    assert np.array_equal(out.images, pipe("a cat", seed=1, output_type="np", **told).images)  # type: ignore[arg-type]
    assert not np.array_equal(out.images, before.images)
    old = {"num_inference_steps": 4, "guidance_scale": 3.0, "sampler": "ddim", "guidance_interval": (0.0, 1.0)}
    again = pipe("a cat", seed=1, output_type="np", **old)  # type: ignore[arg-type]
    assert np.array_equal(again.images, before.images) and again.settings["guidance_interval"] is None
    write_defaults(own, {"guidance_interval": None})
    assert "guidance_interval" not in json.loads((own / "latentgen.json").read_text())["defaults"]


def test_what_was_rendered_before_tuning_is_replayed_to_the_byte(own: Path, tmp_path: Path) -> None:
    from latentgen.render import Order, render, replay

    (picture,) = render(Order(["a cat"], seed=2), tmp_path / "a.png", str(own))
    write_defaults(own, {"num_inference_steps": 2, "guidance_interval": (0.0, 0.5)})
    again, remarks = replay(picture, tmp_path / "b.png")
    assert again.read_bytes() == picture.read_bytes(), remarks
    write_defaults(own, {"num_inference_steps": 4})
    whole, part = Order(["a cat"], seed=2, guidance_interval=(0.0, 1.0)), Order(["a cat"], seed=2)
    (same,), (other,) = (render(order, tmp_path / f"{n}.png", str(own)) for n, order in enumerate((whole, part)))
    assert Image.open(same).tobytes() == Image.open(picture).tobytes() != Image.open(other).tobytes()


def test_diffusers_opens_the_folder_as_before(own: Path) -> None:
    from diffusers import StableDiffusionPipeline

    def rendered() -> np.ndarray:
        pipe = StableDiffusionPipeline.from_pretrained(own, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        return np.asarray(pipe("a cat", num_inference_steps=2, generator=noise, output_type="np").images)

    before = rendered()
    write_defaults(own, {"num_inference_steps": 3, "sampler": "heun"})
    assert np.array_equal(rendered(), before)


def ended(own: Path, stage: str, steps: int) -> Path:
    """The place for averages of a run that ended in these weights."""
    figures = {"validation_loss": 0.5 / steps, "steps": float(steps)}
    place = own.with_name("own.training") / stage / "averages"
    place.mkdir(parents=True)
    place.with_name("done.json").write_text(json.dumps({"figures": figures}))
    (own / "metrics.json").write_text(json.dumps({"unet": {**figures, "parts_before": [{"steps": 3.0}]}}))
    return place


def test_another_average_is_written_with_graphs_that_say_the_same(own: Path, tmp_path: Path) -> None:
    """Kept averages of two widths whose weights are known; the folder renders the synthesised ones on both engines."""
    checkpoint = open_checkpoint(own)
    state = {name: value.float() for name, value in load_file(checkpoint.weights["unet"][0]).items()}
    place = ended(own, "unet-1", 100)
    for step in (50, 100):
        kept.store(place, step, {width: {k: v * (1 + width) for k, v in state.items()} for width in (0.05, 0.1)})
    found = averages.find_averages(open_checkpoint(own))
    assert len(found) == 4
    assert set(averages.widths_near(found)) == {0.025, 0.05, 0.075, 0.1, 0.15, 0.2}
    tensors = averages.weights_of(checkpoint, found, 0.1)
    name = next(iter(state))
    assert torch.allclose(tensors[name].float(), (state[name].half() * 1.1).float(), atol=2e-3)
    old = open_checkpoint(own).fingerprint
    write_defaults(own, {}, lambda aside: averages.put(aside, tensors))
    assert open_checkpoint(own).fingerprint != old
    one, other = (
        Pipeline.from_pretrained(own, engine=name)("a cat", seed=1, output_type="np") for name in ("onnx", "torch")
    )
    assert np.allclose(one.images, other.images, atol=1e-3)
    trial = averages.trial(open_checkpoint(own), tensors, tmp_path / "trial")
    assert open_checkpoint(trial).fingerprint == open_checkpoint(own).fingerprint


def test_averages_of_another_network_are_refused(own: Path) -> None:
    kept.store(ended(own, "unet-1", 10), 10, {0.1: {"x": torch.ones(2)}})
    checkpoint = open_checkpoint(own)
    with pytest.raises(InputError, match="of another network"):
        averages.weights_of(checkpoint, averages.find_averages(checkpoint), 0.1)


def test_averages_are_those_of_the_run_that_ended_in_these_weights(own: Path) -> None:
    said: list[str] = []
    mine = ended(own, "unet-2", 16)
    kept.store(own.with_name("own.training") / "unet-1" / "averages", 8, {0.1: {"x": torch.ones(2)}})
    assert averages.find_averages(open_checkpoint(own), said.append) == []
    assert len(said) == 1 and "did not end in these weights" in said[0]
    for step in (8, 16, 32):  # a longer run that missed its gate left the last
        kept.store(mine, step, {0.1: {"x": torch.ones(2)}})
    kept.store(own.with_name("own.training") / "unet-3" / "averages", 2, {0.1: {"x": torch.ones(2)}})
    found = averages.find_averages(open_checkpoint(own), said.append)
    assert [(each.step, each.path.parent.parent) for each in found] == [(8, mine), (16, mine)] and len(said) == 1
    (own / "metrics.json").unlink()
    assert averages.find_averages(open_checkpoint(own)) == []


@pytest.mark.parametrize("affordable", [True, False])
def test_defaults_that_are_the_best_over_all_pictures_stay_where_they_can_be_paid_for(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, affordable: bool
) -> None:
    """Of the first eight pictures they are the worst."""
    checkpoint = open_checkpoint(own)
    terms = terms_of(checkpoint)
    told = (terms.sampler, terms.steps, terms.guidance)
    price = evaluations(checkpoint.config("scheduler"), *told, terms.interval)

    def look(_: Bench, candidate: Candidate, count: int) -> np.ndarray:
        mine = (candidate.sampler, candidate.steps, candidate.guidance) == told
        return np.where(np.arange(48) < 8, 2.0, 0.0)[:count, None] if mine else np.ones((count, 1))

    def mean(features: np.ndarray, draws: np.ndarray) -> np.ndarray:
        return np.asarray(draws @ features[:, 0] / draws.sum(1))

    captions, judge = [str(number) for number in range(48)], Encoder("none", "", np.asarray)
    artist = Artist(Pipeline.from_pretrained(own), checkpoint.fingerprint, {}, 0, tmp_path, print)
    bench = Bench(checkpoint, artist, judge, captions, "a figure", mean, tmp_path, print, [], {})
    monkeypatch.setattr(Bench, "of", lambda *_: bench)
    monkeypatch.setattr(Bench, "look", look)
    order, before = Order(ICONS, price if affordable else price - 1), (own / "latentgen.json").read_bytes()

    def full(_: Tuned) -> None:
        raise InputError("the disk is full")

    with pytest.raises(InputError, match="the disk is full"):
        tune(own, order, tmp_path, print, keep=full)
    assert (own / "latentgen.json").read_bytes() == before
    found = tune(own, order, tmp_path, print)
    settings = Pipeline.from_pretrained(own)("a cat", seed=1).settings
    kept_to = (settings["sampler"], settings["num_inference_steps"], settings["guidance_scale"]) == told
    assert found.rated[0].value == 1 and found.before.value == pytest.approx(1 / 3)
    assert kept_to == affordable == any("nothing is better" in line for line in lines(found))
    noted = json.loads((own / "latentgen.json").read_text())["tuned"]
    assert noted["value"] == (found.before.value if affordable else 1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str, str]]:
    def call(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["latentgen", "tune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return call


@pytest.mark.slow
def test_tune_writes_what_it_says_and_goes_on_from_its_cache(
    run: Callable[..., tuple[object, str, str]], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "t.json"
    arguments = (own, "--data", ICONS, "--evaluations", 6, "--pictures", 9, "--out", out)
    arguments += ("--samplers", "ddim,heun", "--guidances", "1,3")
    before = (own / "latentgen.json").read_bytes()
    code, said, errors = run(*arguments, "--dry-run")
    assert code == 0, errors
    assert (own / "latentgen.json").read_bytes() == before and "is as it was" in said
    chosen = json.loads(out.read_text())["chosen"]
    monkeypatch.setattr(Pipeline, "__call__", lambda *_, **__: pytest.fail("rendered again"))
    code, said, errors = run(*arguments)
    monkeypatch.undo()
    assert code == 0, errors
    assert json.loads(out.read_text())["chosen"] == chosen and "before:" in said and "chosen:" in said
    settings = Pipeline.from_pretrained(own)("a cat", seed=1).settings
    assert settings["num_inference_steps"] == chosen["steps"] and settings["sampler"] == chosen["sampler"]
    assert settings["guidance_scale"] == chosen["guidance"]
    assert json.loads((own / "latentgen.json").read_text())["tuned"]["evaluations"] == 6
    assert chosen["evaluations"] <= 6
    open_checkpoint(own)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--evaluations", 1], "no sampler takes 2 steps; the least that fits is 2"),
        (["--evaluations", 9, "--figure", "beauty"], "it can be one of: kid, unlikeness"),
        (["--evaluations", 9, "--samplers", "dmpp-2m"], "did you mean 'dpmpp-2m'"),
        (["--evaluations", 9, "--samplers", "probability-flow"], "differs from picture to picture"),
        (["--evaluations", 9, "--out", "t.html"], "is no .json"),
        (["--evaluations", 9, "--guidances", "0.5"], "numbers of 1 or more"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(
    run: Callable[..., tuple[object, str, str]], own: Path, tmp_path: Path, arguments: list[object], line: str
) -> None:
    out = [] if "--out" in arguments else ["--out", tmp_path / "t.json"]
    code, _, said = run(own, "--data", ICONS, *out, *arguments)
    assert code == 2 and line in said
    assert len(said.strip().splitlines()) == 1


def test_a_file_that_is_no_table_of_tune_is_not_replaced(
    run: Callable[..., tuple[object, str, str]], own: Path, tmp_path: Path
) -> None:
    out = tmp_path / "t.json"
    for there in ('{"name": "mine"}', "[]"):
        out.write_text(there)
        code, _, said = run(own, "--data", ICONS, "--out", out, "--evaluations", 9)
        assert code == 2 and said.count("\n") == 1 and "t.json is there and is no such report" in said
        assert out.read_text() == there and not out.with_suffix(".cache").exists()
