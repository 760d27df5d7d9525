"""Killed at ten random moments in any stage, a run ends in the weights of one that nobody disturbed, to the bit."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.forked import Verb

ROOT = Path(__file__).parents[1]
ICONS = ROOT / "tests" / "data" / "icons"
KILLS = 10


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

    def attempt(
        name: str, order: Sequence[str] = (), until: int | None = None, moment: float = 0
    ) -> tuple[list[str], int]:
        """What a run said, and its exit code. It is killed when it has said the line that is asked for (or a later
        one, or that its stage was done before) and a moment has passed; without one it runs to its end."""
        run, said = Verb("train", recipe, "--data", data, "--out", tmp_path / name), list[str]()
        for line in run.lines():
            said.append(line.strip().split(",")[0])
            if until is not None and (
                (said[-1] in order and order.index(said[-1]) >= until)
                or said[-1].startswith(order[until].split(":")[0] + ": done before")
            ):
                time.sleep(moment)
                run.signal(signal.SIGKILL)
                break
        return said, run.wait()

    said, code = attempt("whole")
    assert code == 0, said
    order = list(dict.fromkeys(said))
    last = next(number for number, line in enumerate(order) if "wrote" in line)
    choose = random.Random(int.from_bytes(os.urandom(4), "big"))
    moments = sorted(choose.randrange(last) for _ in range(KILLS))
    stages = []
    for until in moments:
        said, code = attempt("killed", order, until, choose.random() * 0.2)
        assert code == -signal.SIGKILL, (moments, said, code)
        stages.append(said[-1].split(":")[0])
    said, code = attempt("killed")
    assert code == 0, (moments, said)
    weights = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors"))
    assert len(weights) == 3 and len(stages) == KILLS
    for path in weights:
        assert (tmp_path / "killed" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), (path, moments)
