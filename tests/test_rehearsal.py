"""What `--dry-run` says of a stage's size."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentgen.build import train
from latentgen.errors import InputError
from latentgen.models.pixel import pixel_unet
from latentgen.recipe import Train
from latentgen.rehearsal import check_gate, disk_of, gflop_of, measure, rehearse
from latentgen.training.draw import Draw
from latentgen.training.loop import LoopSettings

WIDTH = 64
PRODUCT = 2 * WIDTH * WIDTH / 1e9  # GFLOP of one row through a square matrix


class HalfFrozen:
    """A frozen matrix before a trained one."""

    splits = True
    judge = ("loss", -1)
    weights = np.ones(16)

    def __init__(self) -> None:
        self.module: nn.Module = nn.Linear(WIDTH, WIDTH)
        self._frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        self.held = torch.zeros(0)  # what was held goes first
        self.held = torch.ones(2**20 * self.mib // 4)  # bytes are written, so that they count
        return {"loss": self.module(self._frozen(torch.ones(len(items), WIDTH))).mean()}

    mib = 0

    def validate(self) -> Mapping[str, float]:
        """Nothing is learned."""
        return {"validation_loss": 1.0}

    def sheet(self) -> None:
        """Nothing to see."""


def test_what_is_frozen_has_no_backward_pass() -> None:
    objective = HalfFrozen()

    found = gflop_of(objective, LoopSettings(steps=1, batch=4, rate=1e-3), Accelerator(cpu=True))

    assert found == pytest.approx(3 * PRODUCT)  # two forward, and the gradient of the trained weights
    assert all(weight.grad is None for weight in objective.module.parameters())


class Recomputing(nn.Linear):
    """A matrix whose product is computed again in the backward pass, where that is asked for and it is taught."""

    again = False

    def enable_gradient_checkpointing(self) -> None:
        self.again = True

    def forward(self, x: Tensor) -> Tensor:
        if self.again and self.training:
            recomputed: Tensor = checkpoint(self._squared, x, use_reentrant=False)
            return recomputed
        return self._squared(x)

    def _squared(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def test_what_is_computed_again_is_measured_so() -> None:
    plain = Train(steps=10, batch=4, rate=1e-3, warmup=1)
    asked = plain.model_copy(update={"activation_checkpointing": True})
    for what, products in ((plain, 3), (asked, 4)):
        objective = HalfFrozen()
        objective.module = Recomputing(WIDTH, WIDTH).eval()
        found = measure("half", objective, what, {}, Accelerator(cpu=True))
        assert found.gflop == pytest.approx(products * PRODUCT)
    with pytest.raises(InputError, match="half has nothing to recompute; set activation_checkpointing = false"):
        measure("half", HalfFrozen(), asked, {}, Accelerator(cpu=True))


def test_blocks_that_cannot_be_computed_again_are_refused_in_one_line() -> None:
    objective = HalfFrozen()
    objective.module = pixel_unet("convnext", channels=(8,), layers=1, side=8, picture_channels=1, classes=2, patch=2)
    asked = Train(steps=10, batch=4, rate=1e-3, warmup=1, activation_checkpointing=True)
    with pytest.raises(InputError, match="half has nothing to recompute"):
        measure("half", objective, asked, {}, Accelerator(cpu=True))


def test_a_rate_that_blows_up_is_a_line() -> None:
    what = Train(steps=10, batch=4, rate=1e38, warmup=1)
    with pytest.raises(InputError, match=r"half: the loss or its gradient was not finite 20 steps .*; lower the rate$"):
        measure("half", HalfFrozen(), what, {}, Accelerator(cpu=True))


def test_a_place_that_is_taken_is_refused_in_a_dry_run(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("of mine")
    with pytest.raises(InputError, match="letter exists and is no result of this command; name another place"):
        rehearse(Path(__file__).parent / "data" / "tiny.toml", tmp_path / "letter", None, lambda _: None)


@pytest.mark.parametrize("begin", [rehearse, train])
def test_an_optimizer_that_is_not_installed_is_refused_before_the_hours(
    begin: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe, lines = tmp_path / "mine.toml", list[str]()
    tiny = Path(__file__).parent / "data" / "tiny.toml"
    recipe.write_text(tiny.read_text().replace("[unet.train]", '[unet.train]\noptimizer = "adamw-8bit"'))
    with pytest.raises(InputError, match="needs the package bitsandbytes; install it, or choose"):
        begin(recipe, tmp_path / "out", None, lines.append)
    assert not lines


def test_a_gate_that_names_no_figure_is_refused_before_the_hours() -> None:
    figures = {"retrieval": 0.5, "validation_loss": 1.0, "steps": 0.0}
    check_gate("clip", {"retrieval": 0.9, "max_validation_loss": 0.1}, figures)
    with pytest.raises(InputError, match=r"gate of clip names 'retreival'.*; did you mean 'retrieval'"):
        check_gate("clip", {"retrieval": 0.1, "retreival": 0.1}, figures)
    with pytest.raises(InputError, match=r"names 'max_psnr'.*; there is retrieval, validation_loss, steps"):
        check_gate("clip", {"max_psnr": 1}, figures)
    what = Train(steps=10, batch=4, rate=1e-3, warmup=1)
    with pytest.raises(InputError, match="did you mean 'validation_loss'"):
        measure("half", HalfFrozen(), what, {"max_validaton_loss": 2.0}, Accelerator(cpu=True))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is counted anew on Linux alone")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the peak of a GPU is another")
def test_the_memory_of_a_stage_is_its_own() -> None:
    what = Train(steps=10, batch=4, rate=1e-3, warmup=1)
    large, small = HalfFrozen(), HalfFrozen()
    large.mib = 256
    first = measure("large", large, what, {}, Accelerator(cpu=True))
    del large.held
    second = measure("small", small, what, {}, Accelerator(cpu=True))
    if not second.alone:
        assert " so far" in second.line()
        pytest.skip("the kernel does not let the peak be counted anew")
    assert first.memory - second.memory == pytest.approx(256, abs=64)


def test_the_disk_is_that_of_the_checkpoints_the_best_and_the_averages_and_of_one_while_it_is_written() -> None:
    weights = WIDTH * (WIDTH + 1)
    objective = HalfFrozen()
    plain = measure("half", objective, Train(steps=10, batch=4, rate=1e-3, warmup=1), {}, Accelerator(cpu=True))
    checkpoint = 4 * (4 * weights + 2)  # weights, average, two moments, a count for each of two tensors
    assert plain.checkpoint * 2**20 == pytest.approx(checkpoint)
    assert plain.disk * 2**20 == pytest.approx(2 * checkpoint + 4 * weights)
    assert disk_of([plain, plain]) * 2**20 == pytest.approx(5 * checkpoint + 8 * weights)
    more = Train(steps=10, batch=4, rate=1e-3, warmup=1, averages=(0.05, 0.1), kept_averages=3)
    kept = measure("half", objective, more, {}, Accelerator(cpu=True))
    assert kept.disk * 2**20 == pytest.approx(2 * (checkpoint + 8 * weights) + 4 * weights + 2 * 2 * 4 * weights)


def test_the_names_of_gates_and_samplers_are_looked_at_in_a_dry_run(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from latentgen.cli import app

    tiny = (Path(__file__).parent / "data" / "tiny.toml").read_text()
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tiny.replace("chance = 0.01", "chanse = 0.01"))
    refused = CliRunner().invoke(app, ["train", str(recipe), "--dry-run"])
    assert isinstance(refused.exception, InputError)
    assert "gate of clip names 'chanse'" in str(refused.exception) and "'chance'" in str(refused.exception)
    recipe.write_text(tiny.replace('sampler = "dpmpp-2m"', 'sampler = "dpmpp2m"'))
    refused = CliRunner().invoke(app, ["train", str(recipe), "--dry-run"])
    assert isinstance(refused.exception, InputError) and "did you mean 'dpmpp-2m'" in str(refused.exception)
