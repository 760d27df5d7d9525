"""scripts/bound_and_ode.py: the run's own figures again, and the ODE's from the bound's own start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentgen.pixels.build import train

ROOT = Path(__file__).resolve().parents[2]


def ran(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/bound_and_ode.py"), *map(str, arguments)]
    there = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=there, timeout=240, check=False)


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_the_columns_are_the_runs_figures_and_add_up(objective: str, recipe: Path, bars: Path, tmp_path: Path) -> None:
    folder = train(recipe, tmp_path / "out", bars, lambda line: None, objective=objective)
    done = ran(folder, "--data", bars)
    assert done.returncode == 0, done.stderr
    cells = [float(cell.split("±")[0]) for cell in done.stdout.splitlines()[-1].split("|")[2:-1]]
    kept = json.loads((folder / "metrics.json").read_text())["likelihood"]
    between, ode, decoder, bound, whole, uniform = cells
    assert bound == pytest.approx(kept["bound_total"], abs=2e-3) and uniform == pytest.approx(kept["ode"], abs=2e-3)
    assert bound == pytest.approx(between + decoder, abs=2e-3) and whole == pytest.approx(ode + decoder, abs=2e-3)


def test_a_folder_of_other_weights_costs_one_line(bars: Path, tmp_path: Path) -> None:
    done = ran(tmp_path, "--data", bars)
    assert done.returncode == 2 and done.stderr.startswith("bound_and_ode: ") and done.stderr.count("\n") == 1


def test_pictures_of_other_classes_and_weights_without_a_recipe_cost_one_line(
    recipe: Path, bars: Path, tmp_path: Path
) -> None:
    folder = train(recipe, tmp_path / "out", bars, lambda line: None)
    table = bars / "metadata.jsonl"
    table.write_text(table.read_text().replace('"a bar"', '"a zebra"'))
    done = ran(folder, "--data", bars)
    said = f"bound_and_ode: 'a bar' is a class of {bars} or of {folder} alone; give the pictures it was trained on\n"
    assert (done.returncode, done.stderr) == (2, said)
    (folder / "manifest.json").unlink()
    (folder / "recipe.json").unlink()
    done = ran(folder, "--data", bars)
    assert done.returncode == 2 and "recipe.json cannot be read as JSON" in done.stderr
    assert done.stderr.startswith("bound_and_ode: ") and done.stderr.count("\n") == 1
