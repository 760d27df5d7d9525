"""Two processes share a batch and end in the weights of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "tiny.toml"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def norms(training: Path, stage: str) -> list[float]:
    """The norm of the whole batch's gradient, step after step."""
    (log,) = training.glob(f"{stage}-*/log.jsonl")
    return [entry["norm"] for entry in map(json.loads, log.read_text().splitlines()) if "norm" in entry]


def weights(training: Path, stage: str) -> torch.Tensor:
    """The averaged weights at the end of a stage, as one vector."""
    found = sorted(training.glob(f"{stage}-*/checkpoints/step-*/average.safetensors"))[-1]
    return torch.cat([value.flatten() for _, value in sorted(load_file(found).items())])


@pytest.mark.slow
def test_two_processes_end_in_the_weights_of_one(tmp_path: Path) -> None:
    """Up to rounding, which Adam makes large where a gradient is nothing: so weights are compared as a whole."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY.read_text().replace("log_seconds = 1\n", "log_seconds = 0\n"))
    train = ["-m", "latentgen.cli", "train", str(recipe), "--out"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    run([sys.executable, *train, str(tmp_path / "one")])
    done = run([sys.executable, *launch, *train, str(tmp_path / "two")])
    assert "2 process(es)" in done.stderr and done.stderr.count("vae: starts") == 1
    assert done.stdout.splitlines() == [str(tmp_path / "two")]
    one, two = tmp_path / "one.training", tmp_path / "two.training"
    for stage, near in (("clip", 1e-4), ("vae", 5e-3), ("unet", 5e-3)):
        np.testing.assert_allclose(norms(two, stage)[:3], norms(one, stage)[:3], rtol=5e-3)
        expected = weights(one, stage)
        assert float((weights(two, stage) - expected).norm() / expected.norm()) < near, stage
