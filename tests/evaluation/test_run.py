"""`latentgen evaluate` on the tiny weights, whole; and what it refuses."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from latentgen import cli
from latentgen.evaluation.encoders import open_judge

ICONS = Path(__file__).parents[1] / "data" / "icons"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str]]:
    def call(*arguments: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["latentgen", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    return call


@pytest.mark.slow
def test_an_evaluation_writes_a_page_and_figures_and_goes_on_from_its_cache(
    run: Callable[..., tuple[object, str]], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    arguments = (folder, "--data", ICONS, "--out", out, "--pictures", 6, "--steps", 2, "--compare", folder)
    arguments += ("--guidances", "1,3", "--step-counts", "2,3", "--curve-pictures", 4)
    code, said = run(*arguments)
    assert code == 0, said
    page = out.read_text()
    assert "<svg" in page
    assert "their intervals leave these as they are" in page
    assert "http" not in page.replace("http-equiv", "")
    (found, again) = json.loads(out.with_suffix(".json").read_text())
    assert found["figures"] == again["figures"]
    assert found["figures"]["style by the probe (real pictures)"]["count"] == 6
    names = {
        "style by the probe",
        "Fréchet distance",
        "KID",
        "recall",
        "memorised",
        "validation loss",
        "reconstruction: PSNR, dB",
    }
    assert names <= set(found["figures"])
    assert all(figure["count"] > 0 for figure in found["figures"].values())
    assert len(found["levels"]) == 10
    assert [[p["value"] for p in curve["points"]] for curve in found["sweeps"]] == [[1, 3], [2, 3]]
    assert found["settings"]["num_inference_steps"] == 2 and found["settings"]["sampler"] == "ddim"
    assert said.count("curves: guidance_scale") == 4 and "over steps" in page
    assert "rendering" in said
    code, said = run(*arguments)
    assert code == 0, said
    assert "rendering" not in said


@pytest.mark.slow
def test_where_inception_judges_the_frechet_distance_is_the_fid(
    run: Callable[..., tuple[object, str]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = replace(open_judge(), name="inception-v3")
    monkeypatch.setattr("latentgen.evaluation.run.open_judge", lambda *_: judge)
    code, said = run(folder, "--data", ICONS, "--out", tmp_path / "r.html", "--pictures", 3, "--steps", 1)
    assert code == 0, said
    (found,) = json.loads((tmp_path / "r.json").read_text())
    assert {"FID", "FID (training pictures)"} <= set(found["figures"])
    assert not [name for name in found["figures"] if "Fréchet" in name]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--pictures", 1], "an evaluation needs 3 or more"),
        (["--out", "report.pdf"], "is no .html"),
        (["--out", Path(__file__) / "r.html"], "test_run.py is a file, not a folder"),
        (["--guidances", "1,b"], "--guidances is '1,b'"),
        (["--step-counts", "0"], "whole numbers of 1 or more"),
        (["--curve-pictures", 1], "a curve needs 2 or more"),
        (["--judge", "nowhere"], "no judge at nowhere"),
        (["--seed", -1], "--seed is -1"),
        (["--data", "nowhere"], "nowhere does not exist"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    run: Callable[..., tuple[object, str]], folder: Path, tmp_path: Path, arguments: list[object], line: str
) -> None:
    data = [] if "--data" in arguments else ["--data", ICONS]
    out = [] if "--out" in arguments else ["--out", tmp_path / "r.html"]
    code, said = run(folder, *data, *out, *arguments)
    assert code == 2
    assert line in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["r.html", "r.json"])
def test_a_file_that_is_no_report_is_not_replaced(
    run: Callable[..., tuple[object, str]], folder: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("[1]")
    code, said = run(folder, "--data", ICONS, "--out", tmp_path / "r.html")
    assert code == 2 and said.count("\n") == 1 and f"{name} is there and is no such report" in said
    assert [path.read_text() for path in tmp_path.iterdir()] == ["[1]"]
