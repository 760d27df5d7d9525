"""scripts/fashion_families.py: one command trains the families, draws them side by side and prints their table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def ran(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/fashion_families.py"), *map(str, arguments)]
    there = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=there, timeout=240, check=False)


@pytest.mark.slow
def test_the_families_stand_side_by_side_and_what_is_done_is_not_done_again(
    recipe: Path, bars: Path, tmp_path: Path
) -> None:
    sheet = tmp_path / "new" / "families.png"
    options = ("--recipe", recipe, "--data", bars, "--out", tmp_path / "runs", "--sheet", sheet)
    done = ran(*options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "| family | prior | diffusion | reconstruction | bound | ODE |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["DDPM", "VE/NCSN", "VDM", "rectified flow"]
    with Image.open(sheet) as drawn:
        assert drawn.width > 2 * 2 * 8 * 2
    again = ran(*options)
    assert again.stdout == done.stdout
    assert again.stderr.count("done before") == 4


def test_a_sheet_that_cannot_be_written_is_refused_before_the_hours(recipe: Path, bars: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = ("--recipe", recipe, "--data", bars, "--out", tmp_path / "runs", "--sheet", tmp_path / "file/sheet.png")
    done = ran(*options)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    assert done.stderr.startswith("fashion_families: ") and done.stderr.count("\n") == 1


def test_a_family_that_there_is_not_costs_one_line(tmp_path: Path) -> None:
    done = ran("--only", "gan", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "fashion_families: no family 'gan'; there is ddpm, ve, vdm, flow"
