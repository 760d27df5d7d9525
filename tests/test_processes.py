"""Two processes share a batch and end in the weights of one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.forked import Verb, verb

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "tiny.toml"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run(command: list[str], code: int = 0, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= settings
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert bool(done.returncode) == bool(code), done.stderr  # the launcher turns any failure of a process into 1
    return done


def kill_a_rank(recipe: Path, out: Path) -> int:
    """Two processes; the second is killed once a checkpoint of the U-Net stands. What the launcher ended with."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [sys.executable, *launch, "-m", "latentgen.cli", "train", str(recipe), "--out", str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as launched:
        until = time.monotonic() + 300
        while not any(out.with_name(f"{out.name}.training").glob("unet-*/checkpoints/step-*")):
            assert launched.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        ranks = [process for process in psutil.Process(launched.pid).children() if "train" in process.cmdline()]
        next(each for each in ranks if each.environ()["RANK"] == "1").kill()
        return launched.wait(timeout=120)


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
    """To the bit where one process computes the batch in the same two parts: then every sum has the same order.

    In parts (FSDP 2) they have another one, and CLIP compares the whole batch with itself. Then sums differ by
    rounding, which Adam makes large where a gradient is nothing but rounding (the bias of a key in attention): the
    weights are compared as a whole.
    """
    text = TINY.read_text().replace("log_seconds = 1\n", "log_seconds = 0\n")
    in_parts = text.replace("[vae.train]\n", "[vae.train]\naccumulate = 2\n")
    for stage in ("unet", "decoder"):
        in_parts = in_parts.replace(f"[{stage}.train]\n", f"[{stage}.train]\naccumulate = 2\n")
    recipes = {"one": in_parts, "clip": text.replace("chance = 0.01", "chance = 2"), "two": text}
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.toml").write_text(recipe)

    def asked(name: str) -> list[str]:
        return ["train", str(tmp_path / f"{name}.toml"), "--out", str(tmp_path / name)]

    def by_itself(name: str) -> str:
        done = verb(*asked(name), ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
        return done.stderr

    def of_two(name: str, **settings: str) -> list[subprocess.CompletedProcess[str]]:
        told = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        told |= {"MASTER_PORT": str(free_port()), **settings}  # what a launcher tells them
        ranks = [Verb(*asked(name), environment={**told, "RANK": str(k), "LOCAL_RANK": str(k)}) for k in range(2)]
        return [rank.done() for rank in ranks]

    def train(name: str, code: int = 0, **settings: str) -> subprocess.CompletedProcess[str]:
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        if name == "two":  # accelerate's launcher, which calls every device that is shared out a GPU
            launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
            launch += ["--main_process_port", str(free_port()), "--mixed_precision", "no", "--dynamo_backend", "no"]
        return run([sys.executable, *launch, "-m", "latentgen.cli", *asked(name)], code, **settings)

    by_itself("one")
    one = tmp_path / "one.training"

    stopped = train("clip", code=2)  # its gate cannot hold: it stops there
    assert "clip does not pass its gate" in stopped.stderr
    alone, shared = weights(one, "clip"), weights(tmp_path / "clip.training", "clip")
    np.testing.assert_allclose(norms(tmp_path / "clip.training", "clip")[:3], norms(one, "clip")[:3], rtol=1e-4)
    assert float((shared - alone).norm() / alone.norm()) < 1e-4

    two = tmp_path / "two.training"
    for made in ("tokenizer", "clip"):
        (place,) = one.glob(f"{made}-*")
        shutil.copytree(place, two / place.name)
    done = train("two")
    assert "2 process(es)" in done.stderr and done.stderr.count("vae: starts") == 1
    assert "clip: done before" in done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "two")]
    for stage in ("vae", "unet", "decoder"):
        assert torch.equal(weights(two, stage), weights(one, stage)), stage

    parts = tmp_path / "parts.training"  # the U-Net in parts over both, as accelerate's configuration of FSDP says
    for made in ("tokenizer", "clip", "vae"):
        (place,) = two.glob(f"{made}-*")
        shutil.copytree(place, parts / place.name)
    (tmp_path / "parts.toml").write_text(text)
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    refused = of_two("parts", **(fsdp | {"FSDP_VERSION": "1"}))
    assert all(rank.returncode == 2 and "set fsdp_version: 2" in rank.stderr for rank in refused)
    assert [rank.returncode for rank in of_two("parts", **fsdp)] == [0, 0]
    np.testing.assert_allclose(norms(parts, "unet"), norms(one, "unet"), rtol=1e-4)
    alone, shared = weights(one, "unet"), weights(parts, "unet")
    assert float((shared - alone).norm() / alone.norm()) < 1e-4
    head, tail = text.split("[unet.train]\n")
    (tmp_path / "parts.toml").write_text(head + "[unet.train]\n" + tail.replace("steps = 16", "steps = 18", 1))
    assert "unet: goes on from step 16 of 18" in by_itself("parts")  # whole again, in one process

    lost = tmp_path / "lost.training"  # one of two processes dies: all stop, and one goes on from what was saved
    for made in ("tokenizer", "clip", "vae"):
        (place,) = two.glob(f"{made}-*")
        shutil.copytree(place, lost / place.name)
    longer = tail.replace("steps = 16", "steps = 4000", 1).replace("[pace]\n", "[pace]\nsave_seconds = 0\n")
    (tmp_path / "lost.toml").write_text(head + "[unet.train]\n" + longer)
    assert kill_a_rank(tmp_path / "lost.toml", tmp_path / "lost") != 0
    (checkpoints,) = lost.glob("unet-*/checkpoints")
    step = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))
    shorter = tail.replace("steps = 16", f"steps = {step + 2}", 1)
    (tmp_path / "lost.toml").write_text(head + "[unet.train]\n" + shorter)
    assert f"unet: goes on from step {step} of {step + 2}" in by_itself("lost")
