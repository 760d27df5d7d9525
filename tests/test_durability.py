"""Killed at ten random moments in any stage, a run ends in the weights of one that nobody disturbed, to the bit."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ICONS = ROOT / "tests" / "data" / "icons"
KILLS = 10
# Runs a recipe in children that are forked after the imports, so that a start costs no ten seconds. A child is killed
# when it has said the line it is asked to (or a later one, or that its stage was done before) and a moment has passed;
# without a line it runs to its end.
DRIVER = """
import json, os, select, signal, sys, time
from pathlib import Path
import diffusers, transformers, torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer
from latentgen import build
recipe, data = map(Path, sys.argv[1:])

def named(line):
    return line.split(",")[0]

def attempt(out, order=None, until=None, moment=0.0):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        code = 1
        try:
            build.train(recipe, Path(out), data, lambda line: os.write(writer, (line + "\\n").encode()))
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    said = []
    with os.fdopen(reader) as lines:
        for line in lines:
            said.append(named(line.strip()))
            if until is not None and (
                (said[-1] in order and order.index(said[-1]) >= until)
                or said[-1].startswith(order[until].split(":")[0] + ": done before")
            ):
                time.sleep(moment)
                os.kill(child, signal.SIGKILL)
                break
    _, status = os.waitpid(child, 0)
    return said, os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status

for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps(attempt(**asked)), flush=True)
"""


def small(folder: Path) -> tuple[Path, Path]:
    """A recipe that saves after every step and says so, and sixteen pictures."""
    text = (ROOT / "tests" / "data" / "tiny.toml").read_text()
    text = text.replace("steps = 12", "steps = 5").replace("steps = 16", "steps = 5").replace("batch = 32", "batch = 8")
    text = text.replace("batch = 8", "batch = 4").replace("num_inference_steps = 4", "num_inference_steps = 1")
    text = text.replace("log_seconds = 1", "log_seconds = 0\nsave_seconds = 0").replace("steps = 8\n", "steps = 2\n")
    recipe, data = folder / "small.toml", folder / "data"
    recipe.write_text(text.replace('["a red apple, noto emoji style", "a cat, noto emoji style"]', '["a cat"]'))
    entries = [json.loads(line) for line in (ICONS / "metadata.jsonl").read_text().splitlines()]
    chosen = [entry for entry in entries if entry["split"] == "test"][:2]
    chosen += [entry for entry in entries if entry["split"] == "train"][:14]
    for entry in chosen:
        (data / entry["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ICONS / entry["file_name"], data / entry["file_name"])
    (data / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in chosen))
    return recipe, data


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_run_killed_at_ten_random_moments_ends_in_the_same_weights_to_the_bit(tmp_path: Path) -> None:
    recipe, data = small(tmp_path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(recipe), str(data)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdin is not None and driver.stdout is not None

    def attempt(name: str, **asked: object) -> tuple[list[str], bool, int]:
        assert driver.stdin is not None and driver.stdout is not None
        driver.stdin.write(json.dumps({"out": str(tmp_path / name), **asked}) + "\n")
        driver.stdin.flush()
        said, killed, status = json.loads(driver.stdout.readline())
        return said, killed, status

    try:
        said, killed, status = attempt("whole")
        assert status == 0, said
        order = list(dict.fromkeys(said))
        last = next(number for number, line in enumerate(order) if "wrote" in line)
        choose = random.Random(int.from_bytes(os.urandom(4), "big"))
        moments = sorted(choose.randrange(last) for _ in range(KILLS))
        stages = []
        for until in moments:
            said, killed, status = attempt("killed", order=order, until=until, moment=choose.random() * 0.2)
            assert killed, (moments, said, status)
            stages.append(said[-1].split(":")[0])
        said, killed, status = attempt("killed")
        assert status == 0, (moments, said)
    finally:
        driver.stdin.close()
        driver.wait(60)
    weights = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors"))
    assert len(weights) == 3 and len(stages) == KILLS
    for path in weights:
        assert (tmp_path / "killed" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), (path, moments)
