"""A stage of a run: what it keeps, writes and says on the way, and how it stops."""

import copy
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from latentgen.checkpoint import open_checkpoint
from latentgen.training.averages import gamma_of, stored
from latentgen.training.draw import Draw
from latentgen.training.features import FeatureTerms
from latentgen.training.loop import LoopSettings
from latentgen.training.stage import Pace, run_stage
from latentgen.tuning import averages
from tests.training.test_features import COUNT
from tests.training.test_features import objective as with_features
from tests.training.test_loop import SETTINGS, Regression


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


def test_averages_kept_beside_an_alignment_are_those_of_the_unet(
    parts: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    targets = np.random.default_rng(1).standard_normal((COUNT, 16, 8)).astype(np.float16)
    made = with_features(copy.deepcopy(parts["unet"]).requires_grad_(True), FeatureTerms(align=0.5), targets)
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
