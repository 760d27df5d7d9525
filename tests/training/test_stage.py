"""A stage of a run: what it keeps, writes and says on the way, and how it stops."""

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from latentgen.checkpoint import open_checkpoint
from latentgen.errors import InputError
from latentgen.models.loading import load_part
from latentgen.training.averages import gamma_of, stored
from latentgen.training.contention import Contention
from latentgen.training.draw import Draw
from latentgen.training.features import FeatureTerms
from latentgen.training.log import entries
from latentgen.training.loop import LoopSettings, TrainState
from latentgen.training.memory import saying_what_saves
from latentgen.training.snapshots import Snapshots
from latentgen.training.stage import Pace, Report, run_stage, settings_fingerprint
from latentgen.tuning import averages
from tests.training.test_features import COUNT
from tests.training.test_features import objective as with_features
from tests.training.test_loop import SETTINGS, Regression

ROOT = Path(__file__).parents[2]


def test_what_may_change_in_the_middle_of_a_run_makes_no_other_run() -> None:
    what = LoopSettings(steps=10, batch=4, rate=1e-3)
    told = settings_fingerprint(what)
    free: list[dict[str, Any]] = [{"steps": 20}, {"accumulate": 2}, {"activation_checkpointing": True}]
    for change in [*free, {"kept_averages": 3}]:
        assert settings_fingerprint(replace(what, **change)) == told, change
    others: list[dict[str, Any]] = [{"rate": 2e-3}, {"optimizer": "sgd"}, {"ema": 0.5}, {"averages": (0.1,)}]
    for change in [*others, {"decay_shape": "cosine"}, {"batch": 8}, {"weight_decay": 0.5}]:
        assert settings_fingerprint(replace(what, **change)) != told, change


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "unet",
            {},
            "unet: not enough memory for 4 pictures at a time; in [unet.train] raise accumulate, which is 1 or set "
            "activation_checkpointing = true, which changes no result, or lower batch, or size in [data]",
        ),
        (
            "pixels",
            {"accumulate": 4},
            "pixels: not enough memory for 1 picture at a time; in [train] set activation_checkpointing = true, which "
            "changes no result, or lower batch, or size in [data]",
        ),
        (
            "vae",
            {"activation_checkpointing": True, "accumulate": 4},
            "vae: not enough memory for 1 picture at a time; in [vae.train] lower batch, or size in [data]",
        ),
        (
            "finetune",
            {"accumulate": 2},
            "finetune: not enough memory for 2 pictures at a time; raise accumulate, which is 2, which changes no "
            "result, or lower batch, or size",
        ),
    ],
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_too_little_memory_is_one_line_that_names_the_keys_that_help(
    tmp_path: Path,
    parts: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    name: str,
    change: dict[str, Any],
    said: str,
) -> None:
    learned = with_features(copy.deepcopy(parts["unet"]), FeatureTerms())

    def short(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(learned, "loss", short)
    settings = replace(SETTINGS, batch=4, **change)
    given = {"seed": 1, "gate": {}, "pace": Pace(), "report": lambda line: None}
    with pytest.raises(InputError) as refused:
        run_stage(name, learned, settings, tmp_path, Accelerator(), **given)
    assert str(refused.value) == said


def test_too_little_memory_is_said_of_what_one_process_computes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator()
    monkeypatch.setattr(Accelerator, "num_processes", 4)
    for batch, said in ((16, "for 4 pictures at a time; in [unet.train] raise accumulate"), (4, "for 1 picture at")):
        saying = saying_what_saves("unet", Regression(), replace(SETTINGS, batch=batch), accelerator)
        with pytest.raises(InputError) as refused, saying:
            raise MemoryError
        assert str(refused.value).startswith(f"unet: not enough memory {said}")


def test_what_compares_the_pictures_of_a_batch_is_not_told_to_take_it_in_parts(tmp_path: Path) -> None:
    class Short(Regression):
        splits = False

        def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
            raise MemoryError

    given = {"seed": 1, "gate": {}, "pace": Pace(), "report": lambda line: None}
    with pytest.raises(InputError) as refused:
        run_stage("clip", Short(), replace(SETTINGS, accumulate=1), tmp_path, Accelerator(), **given)
    assert str(refused.value).endswith("at a time; in [clip.train] lower batch, or size in [data]")


def test_a_stage_keeps_its_averages_and_a_stopped_one_keeps_the_same_to_the_bit(tmp_path: Path) -> None:
    settings = replace(SETTINGS, averages=(0.05, 0.2), kept_averages=3)
    weights: list[dict[str, Tensor]] = []

    class Watched(Regression):
        """Remembers its weights at each step; asks the run to stop at one."""

        stop = 0

        def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
            weights.append({name: weight.detach().clone() for name, weight in self.module.named_parameters()})
            if draw.step and draw.step == self.stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(items, draw)

    def run(folder: Path, stop: int = 0) -> dict[str, float]:
        objective, pace = Watched(), Pace(log_seconds=0, save_seconds=1e9, validate_steps=10)
        objective.stop = stop
        given = {"seed": 1, "gate": {}, "pace": pace, "report": lambda line: None}
        return dict(run_stage("toy", objective, settings, folder, Accelerator(), **given))

    run(tmp_path / "whole")
    kept = stored(tmp_path / "whole" / "averages")
    assert [(each.step, each.width) for each in kept] == [(s, w) for s in (10, 20, 30) for w in (0.05, 0.2)]
    for each in kept[:4]:  # against the power function itself: step s counts as its integral from s - 1 to s
        edges = (np.arange(each.step + 1) / each.step) ** (gamma_of(each.width) + 1)
        for name, value in load_file(each.path).items():
            expected = sum(w * step[name].double() for w, step in zip(np.diff(edges), weights[1:], strict=False))
            torch.testing.assert_close(value.double(), expected, atol=1e-3, rtol=2e-3)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=13)
    assert [each.step for each in stored(tmp_path / "cut" / "averages")] == [10, 10]
    run(tmp_path / "cut")
    for each in kept:
        again = tmp_path / "cut" / each.path.relative_to(tmp_path / "whole")
        assert again.read_bytes() == each.path.read_bytes()


def run(
    folder: Path,
    objective: Regression,
    steps: int,
    seconds: float = 0.0,
    report: Report = lambda line: None,
    **paced: Any,
) -> None:
    pace = Pace(**{"log_seconds": seconds, "save_seconds": 1e9, "validate_steps": 10, **paced})
    given: dict[str, Any] = {"seed": 1, "gate": {}, "pace": pace, "report": report}
    run_stage("toy", objective, replace(SETTINGS, steps=steps), folder, Accelerator(), **given)


def strict(line: str) -> dict[str, Any]:
    """A line as any reader of JSON would read it."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return dict(json.loads(line, parse_constant=refuse))


def test_the_log_has_the_figures_of_every_step_and_says_which_were_skipped(tmp_path: Path) -> None:
    run(tmp_path, Regression(frozenset({4, 7})), 30, seconds=1e9)
    told = [strict(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in told if "norm" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 31))
    skipped = [entry for entry in steps if entry.get("skipped")]
    assert [(entry["step"], entry["loss"], entry["norm"]) for entry in skipped] == [(5, None, None), (8, None, None)]
    assert all(entry["loss"] > 0 and entry["norm"] > 0 for entry in steps if entry not in skipped)
    assert [entry["step"] for entry in told if "weight" in entry] == [10, 20, 30]
    assert (tmp_path / "log.jsonl").stat().st_size < 100 * 33


def test_a_log_is_read_as_if_nobody_had_killed_its_run(tmp_path: Path) -> None:
    run(tmp_path / "whole", Regression(), 30)
    run(tmp_path / "cut", Regression(), 20)  # its checkpoint is of step 20
    log = tmp_path / "cut" / "log.jsonl"
    stale = "".join(json.dumps({"step": step, "loss": 99.0, "norm": 1.0}) + "\n" for step in (21, 22))
    log.write_text(log.read_text() + stale + '{"step": 23, "lo')  # steps that were lost; the last line is torn
    run(tmp_path / "cut", Regression(), 30)
    expected, found = entries(tmp_path / "whole" / "log.jsonl"), entries(log)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    assert all("norm" in entry or "weight" in entry for entry in found)
    for name in ("loss", "norm"):  # of steps whose rate is the same
        both = [[entry[name] for entry in told if name in entry and entry["step"] <= 14] for told in (found, expected)]
        assert both[0] == both[1]
    assert max(entry["loss"] for entry in found if "loss" in entry) < 99


FULL = """
import json, resource, sys
from pathlib import Path
from PIL import Image
from tests.training.test_loop import Regression
from tests.training.test_stage import run

class Drawing(Regression):
    def sheet(self):
        return Image.effect_noise((120, 120), 90)

said = {}
cases = ("log", Regression(), 12_000), ("sheet", Drawing(), 9_000), ("state", Regression(), 800)
for name, objective, limit in cases:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        run(Path(sys.argv[1]) / name, objective, 400, save_seconds=0, validate_steps=50)
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(said))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit that Linux has")
def test_a_disk_that_takes_no_more_stops_the_run_with_one_line_and_the_last_checkpoint_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    for name, place in (("log", "log.jsonl"), ("sheet", "sheets/toy-0000050.png"), ("state", "checkpoints/")):
        assert said[name].startswith(f"InputError: cannot write {tmp_path / name}/{place}"), said
        assert "File too large" in said[name] and "\n" not in said[name]
    for name, least in (("log", 100), ("sheet", 49)):
        objective = Regression()
        state = TrainState.start(objective.module, SETTINGS)
        assert Snapshots(tmp_path / name / "checkpoints").restore(state) == []
        assert state.step >= least


def test_averages_kept_beside_an_alignment_are_those_of_the_unet(folder: Path, tmp_path: Path) -> None:
    targets = np.random.default_rng(1).standard_normal((COUNT, 16, 8)).astype(np.float16)
    unet = load_part(open_checkpoint(folder), "unet").float().requires_grad_(True)
    made = with_features(unet, FeatureTerms(align=0.5), targets)
    settings = LoopSettings(steps=4, batch=2, rate=1e-3, warmup=1, averages=(0.1,), kept_averages=2)
    given: dict[str, Any] = {"seed": 1, "gate": {}, "pace": Pace(validate_steps=4), "report": lambda line: None}
    run_stage("unet", made, settings, tmp_path, Accelerator(), **given)
    kept = stored(tmp_path / "averages")
    assert [each.step for each in kept] == [2, 4]
    checkpoint = open_checkpoint(folder)
    found = averages.weights_of(checkpoint, kept, 0.1)
    assert found.keys() == load_file(checkpoint.weights["unet"][0]).keys()
    expected = load_file(kept[-1].path)  # one of its own step and width is itself
    for name, value in found.items():
        torch.testing.assert_close(value.float(), expected[f"unet.{name}"].float(), atol=1e-3, rtol=1e-3)


def test_a_sheet_that_cannot_be_drawn_is_said_and_ends_no_run(tmp_path: Path) -> None:
    class Unseen(Regression):
        """Has nothing to show."""

        def sheet(self) -> Image.Image | None:
            raise InputError("the picture would be black")

    said: list[str] = []
    pace = Pace(log_seconds=1e9, save_seconds=1e9, validate_steps=10)
    given: dict[str, Any] = {"seed": 1, "gate": {}, "pace": pace, "report": said.append}
    figures = run_stage("toy", Unseen(), SETTINGS, tmp_path, Accelerator(), **given)
    assert figures["steps"] == SETTINGS.steps
    assert [line for line in said if "no sheet" in line] == [
        f"toy: step {step}, no sheet: the picture would be black" for step in range(10, SETTINGS.steps + 1, 10)
    ]


def test_a_run_that_has_to_wait_for_its_cores_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Contention, "on", lambda device: Contention(2, 0.0, tmp_path))
    (tmp_path / "1").mkdir()

    class Waiting(Regression):
        """Whose thread stands in line for a thousand seconds more at each step."""

        def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
            (tmp_path / "1" / "schedstat").write_text(f"0 {10**12 * (draw.step + 1)} 0\n")
            return super().loss(items, draw)

    lines: list[str] = []
    (tmp_path / "1" / "schedstat").write_text("0 0 0\n")
    run(tmp_path / "run", Waiting(), 30, report=lines.append)
    assert sum(line.startswith("toy: other programs take") and "OMP_NUM_THREADS=1" in line for line in lines) == 1
