"""Both benchmarks run, with a tiny folder, and say both engines' rates and the ratio."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


def ran(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    there = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=there, timeout=240, check=False)


def test_the_render_benchmark_says_both_times_and_that_the_pictures_agree(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "render.json"
    done = ran("benchmark_render.py", "--weights", folder, "--steps", 2, "--rounds", 1, "--repeats", 1, "--json", out)
    assert done.returncode == 0, done.stderr
    for said in (
        "latentgen",
        "diffusers",
        "warm picture",
        "shell to picture",
        "peak memory",
        "ratio",
        "of --help beyond",
    ):
        assert said in done.stdout
    result = json.loads(out.read_text())
    started = result["start_seconds"]
    assert set(started) == {"import", "--help"} and all(set(figure) == {"latentgen"} for figure in started.values())
    assert 0 < started["--help"]["latentgen"] < 30 and abs(started["import"]["latentgen"]) < 30
    assert result["largest_difference"] < 1e-3
    for figure in ("seconds_least", "seconds_median", "shell_seconds", "peak_mib"):
        assert all(result[figure][engine] > 0 for engine in ("latentgen", "diffusers"))
    assert result["ratio"] == pytest.approx(
        result["seconds_median"]["diffusers"] / result["seconds_median"]["latentgen"]
    )


def test_the_training_benchmark_says_both_rates(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    done = ran("benchmark_train.py", "--weights", folder, "--batch", 4, "--steps", 2, "--rounds", 1, "--json", out)
    assert done.returncode == 0, done.stderr
    for said in (
        "latentgen",
        "diffusers",
        "samples a second",
        "GFLOP/s",
        "a large matrix product, float32",
        "share of that of the U-Net",
        "waiting for data",
        "ratio",
    ):
        assert said in done.stdout
    result = json.loads(out.read_text())
    rates = result["samples_per_second"]
    assert result["ratio"] == pytest.approx(rates["latentgen"] / rates["diffusers"])
    for engine in ("latentgen", "diffusers"):
        assert result["gflops"][engine] > 0
        assert result["peak_gflops_fp32"][engine] > result["gflops"][engine]
        best = "peak_gflops_bf16" if "peak_gflops_bf16" in result else "peak_gflops_fp32"
        assert result["share_of_peak"][engine] == pytest.approx(result["gflops"][engine] / result[best][engine])
        assert 0 < result["waiting"][engine] < 1


def test_a_folder_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    done = ran("benchmark_train.py", "--weights", tmp_path / "none", "--rounds", 1)
    assert done.returncode == 2
    assert done.stderr.startswith("latentgen: no weights folder at")
    assert len(done.stderr.splitlines()) == 1


def test_the_feature_cache_is_said_with_its_price(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.json"
    asked = ("--weights", folder, "--steps", 3, "--rounds", 1, "--repeats", 2, "--json", out)
    done = ran("benchmark_render.py", *asked, "--feature-cache", 2)
    assert done.returncode == 0, done.stderr
    assert "times as fast; PSNR to the pictures without it" in done.stdout and "(2 pictures)" in done.stdout
    result = json.loads(out.read_text())
    assert {name: len(each) for name, each in result["seconds"].items()} == {"without": 2, "with": 2}
    assert f"{result['ratio']:.2f} times as fast" in done.stdout and len(result["psnr"]) == 2


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("render", "--dtype bfloat16 --compile", "--dtype and --compile are not measured together; give one of them"),
        ("render", "--feature-cache 2 --compile", "--feature-cache and --compile are not measured together"),
        ("render", "--feature-cache 2 --dtype float16", "--feature-cache and --dtype are not measured together"),
        ("samplers", "--runs 0", "--steps, --runs and --batch must be 1 or more"),
        ("samplers", "--steps 0", "--steps, --runs and --batch must be 1 or more"),
        ("samplers", "--batch 0", "--steps, --runs and --batch must be 1 or more"),
    ],
)
def test_what_is_not_measured_is_said_in_one_line(script: str, options: str, said: str) -> None:
    done = ran(f"benchmark_{script}.py", *options.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"latentgen: {said}") and done.stderr.count("\n") == 1


def test_a_half_type_is_said_with_its_gain_and_its_price(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    asked = ("--weights", folder, "--steps", 2, "--rounds", 1, "--repeats", 1, "--batch", 2, "--json", out)
    done = ran("benchmark_render.py", *asked, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "bfloat16 gains" in done.stdout and "diffusers-bfloat16" in done.stdout and "PSNR" in done.stdout
    result = json.loads(out.read_text())
    (pair,) = result["pairs"]
    assert result["ratios"]["bfloat16 gains"] == pair["latentgen"]["median"] / pair["latentgen-bfloat16"]["median"]
    psnr = result["rows"]["PSNR to the first, dB, worst"]
    assert 20 < psnr["latentgen-bfloat16"] < 90 and psnr["diffusers"] > 60  # the one rounds to eight bits


def test_compiling_is_said_with_its_gain_beside_diffusers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # which takes minutes, and has tests of its own
    out = tmp_path / "result.json"
    asked = ("--weights", folder, "--steps", 2, "--rounds", 1, "--repeats", 1, "--compile", "--json", out)
    done = ran("benchmark_render.py", *asked)
    assert done.returncode == 0, done.stderr
    assert "compiling gains" in done.stdout and "diffusers-compiled" in done.stdout
    result = json.loads(out.read_text())
    (pair,) = result["pairs"]
    assert result["ratios"]["compiling gains"] == pair["torch"]["median"] / pair["torch-compiled"]["median"]
    assert 0 < result["largest_difference"] < 1e-3  # four computations of one picture


def test_the_speedrun_judges_held_out_captions_and_does_not_start_where_something_is(
    folder: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(folder, weights)
    asked = ("--data", ROOT / "tests/data/icons", "--out", weights)
    done = ran("speedrun.py", "--judge-only", *asked)
    assert done.returncode in (0, 1), done.stderr
    told = json.loads(done.stdout)
    rank, low, high = told["rank"]
    assert 0 < low < rank < high < 1 and low < 0.5 < high  # random weights are at chance
    assert told["reached"] == (rank <= told["asked"]) == (done.returncode == 0) and told["seconds"] is None
    refused = ran("speedrun.py", *asked)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and "move it away" in refused.stderr


def test_what_the_benchmark_beside_stable_diffusion_cpp_cannot_do_is_said_in_one_line() -> None:
    done = ran("benchmark_sdcpp.py", "--steps", 0)
    assert done.returncode == 2
    assert done.stderr == "latentgen: --steps and --rounds must be 1 or more\n"
