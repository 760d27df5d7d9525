"""The loop: rates, averages, refused gradients; and a run that stopped ends where one that did not ends, to the bit."""

import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from latentgen import InputError
from latentgen.training.draw import Draw
from latentgen.training.loop import PATIENCE, LoopSettings, NotFinite, Progress, TrainState, fit
from latentgen.training.optimizer import OPTIMIZERS, check_optimizers
from latentgen.training.snapshots import Snapshots
from latentgen.training.stage import Pace, run_stage
from tests.forked import Verb, verb

ROOT = Path(__file__).parents[2]
SETTINGS = LoopSettings(steps=30, batch=4, rate=1e-2, warmup=5, ema=0.9)


class Regression:
    """Noisy regression by a small convolution; `bad` steps have a loss that is not finite."""

    splits = True
    judge = ("weight", 1)

    def __init__(self, bad: frozenset[int] = frozenset()) -> None:
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 2, 1)]
        self.module: nn.Module = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.weights = np.ones(11)
        self.data = torch.randn(11, 2, 6, 6)
        self.bad = bad
        self.added: dict[int, float] = {}  # what is added to the loss of some steps

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        x = self.data[items]
        loss = (self.module(x + draw.normal(2, 6, 6)) - x).square().mean() + self.added.get(draw.step, 0.0)
        return {"loss": loss * math.nan if draw.step in self.bad else loss}

    def validate(self) -> Mapping[str, float]:
        return {"weight": float(next(self.module.parameters()).detach().sum())}

    def sheet(self) -> Image.Image | None:
        return None


def start(bad: frozenset[int] = frozenset(), settings: LoopSettings = SETTINGS) -> tuple[Regression, TrainState]:
    objective = Regression(bad)
    return objective, TrainState.start(objective.module, settings)


def flat(state: TrainState) -> dict[str, Tensor]:
    return {f"{file}/{name}": value for file, part in state.tensors().items() for name, value in part.items()}


def test_each_part_of_a_batch_has_masks_of_its_own_and_a_resumed_run_the_same() -> None:
    class Dropping(Regression):
        def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
            masks.append(torch.rand(4))
            return super().loss(items, draw)

    runs: list[list[Tensor]] = []
    for first in (0, 1):
        masks: list[Tensor] = []
        objective = Dropping()
        state = TrainState.start(objective.module, SETTINGS)
        state.step = first
        for _ in fit(objective, state, replace(SETTINGS, steps=3, accumulate=2), Accelerator(), seed=1):
            pass
        runs.append(masks)
    whole, resumed = runs
    assert len({tuple(mask.tolist()) for mask in whole}) == len(whole) == 6
    assert all(torch.equal(one, other) for one, other in zip(whole[2:], resumed, strict=True))


def test_the_rate_rises_stays_and_falls_to_nothing() -> None:
    settings = LoopSettings(steps=100, batch=1, rate=2.0, warmup=10, decay=0.25)
    rates = [settings.rate_at(step) for step in range(101)]
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10)
    assert rates[10:76] == [2.0] * 66
    np.testing.assert_allclose(rates[75:], 2.0 * np.arange(25, -1, -1) / 25)
    assert LoopSettings(steps=100, batch=1, rate=2.0, warmup=1, decay=0.0).rate_at(99) == 2.0


def test_the_average_follows_the_weights_after_a_warm_up() -> None:
    objective, state = start()
    expected = {name: weight.detach().clone() for name, weight in objective.module.named_parameters()}
    for progress in fit(objective, state, SETTINGS, Accelerator(), seed=1):
        decay = min(SETTINGS.ema, (1 + progress.step) / (10 + progress.step))
        for name, weight in objective.module.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach()
    for name, value in state.average.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)


def test_a_run_with_dropout_that_goes_on_ends_in_the_bits_of_one_that_did_not_stop() -> None:
    def begin() -> tuple[Regression, TrainState]:
        objective = Regression()
        objective.module = nn.Sequential(*objective.module, nn.Dropout(0.5))
        return objective, TrainState.start(objective.module, SETTINGS)

    objective, whole = begin()
    for _ in fit(objective, whole, SETTINGS, Accelerator(), seed=3):
        torch.rand(5)  # whoever draws between the steps changes nothing
    objective, state = begin()
    for progress in fit(objective, state, SETTINGS, Accelerator(), seed=3):
        if progress.step == 13:
            break
    kept = {file: {name: value.clone() for name, value in part.items()} for file, part in state.tensors().items()}
    objective, resumed = begin()
    resumed.load(kept, 13)
    torch.manual_seed(99)
    assert [progress.step for progress in fit(objective, resumed, SETTINGS, Accelerator(), seed=3)][-1] == 30
    for name, value in flat(whole).items():
        assert torch.equal(value, flat(resumed)[name]), name


def test_swapping_the_average_twice_changes_nothing() -> None:
    objective, state = start()
    for _ in fit(objective, state, SETTINGS, Accelerator(), seed=1):
        pass
    before = {name: value.clone() for name, value in flat(state).items()}
    state.swap_average()
    assert torch.equal(objective.module.get_parameter("0.weight"), before["average/0.weight"])
    state.swap_average()
    assert all(torch.equal(value, before[name]) for name, value in flat(state).items())


def test_every_step_says_what_it_did() -> None:
    objective, state = start()
    progress = list(fit(objective, state, SETTINGS, Accelerator(), seed=1))
    assert [p.step for p in progress] == list(range(1, 31))
    assert [p.rate for p in progress] == [SETTINGS.rate_at(step) for step in range(30)]
    assert all(math.isfinite(p.norm) and p.norm > 0 for p in progress)
    assert np.mean([p.losses["loss"] for p in progress[-5:]]) < np.mean([p.losses["loss"] for p in progress[:5]])


@pytest.mark.parametrize("stop", [1, 7, 29])
def test_a_run_that_was_stopped_ends_in_the_same_weights_to_the_bit(tmp_path: Path, stop: int) -> None:
    objective, whole = start()
    for _ in fit(objective, whole, SETTINGS, Accelerator(), seed=1):
        pass

    objective, first = start()
    for progress in fit(objective, first, SETTINGS, Accelerator(), seed=1):
        if progress.step == stop:
            break
    Snapshots(tmp_path).save(first)
    objective, second = start()
    torch.randn(5)  # what else drew numbers in the new process is no matter
    Snapshots(tmp_path).restore(second)
    assert second.step == stop
    steps = [progress.step for progress in fit(objective, second, SETTINGS, Accelerator(), seed=1)]
    assert steps == list(range(stop + 1, 31))
    expected, found = flat(whole), flat(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_gradients_that_are_not_finite_never_reach_the_weights() -> None:
    objective, state = start(frozenset({3, 4, 11}))
    before: dict[str, Tensor] = {}
    for progress in fit(objective, state, SETTINGS, Accelerator(), seed=1):
        now = flat(state)
        if progress.step - 1 in objective.bad:
            assert not math.isfinite(progress.norm)
            assert all(torch.equal(value, before[name]) for name, value in now.items())
        before = {name: value.clone() for name, value in now.items()}
    assert state.skipped == 3
    assert all(torch.isfinite(value).all() for value in flat(state).values())


def test_a_loss_that_is_not_finite_never_reaches_the_weights_even_where_its_gradient_is() -> None:
    objective, state = start()
    objective.added = {3: math.inf, 8: math.nan}
    before: dict[str, Tensor] = {}
    for progress in fit(objective, state, SETTINGS, Accelerator(), seed=1):
        unchanged = all(torch.equal(value, before.get(name, value + 1)) for name, value in flat(state).items())
        assert unchanged == (progress.step - 1 in objective.added) == (not math.isfinite(progress.norm))
        before = {name: value.clone() for name, value in flat(state).items()}
    assert state.skipped == 2


def test_a_step_along_a_huge_gradient_is_as_long_as_the_clipped_one() -> None:
    """Of a loss c·w, by plain descent: the weights move by rate · clip along -c / |c|, whatever the length of c."""
    settings = LoopSettings(
        steps=2, batch=1, rate=0.1, warmup=1, decay=0.0, clip=0.5, optimizer="sgd", betas=(0.0, 0.9), weight_decay=0.0
    )
    for length, moved in ((1e6, 0.1 * 0.5), (0.02, 0.1 * 0.02)):  # the second is within the bound, and left alone
        objective, state = start(settings=settings)
        weights = list(objective.module.parameters())
        direction = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)) for weight in weights]
        size = torch.stack([part.square().sum() for part in direction]).sum().sqrt()
        before = [weight.detach().clone() for weight in weights]

        def loss(items: np.ndarray, draw: Draw, c: list[Tensor] = direction, a: Tensor = length / size) -> Any:
            return {"loss": torch.stack([(a * p * w).sum() for p, w in zip(c, weights, strict=True)]).sum()}  # noqa: B023

        objective.loss = loss  # type: ignore[method-assign]
        progress = next(fit(objective, state, settings, Accelerator(), seed=1))
        assert progress.norm == pytest.approx(length, rel=1e-4)  # of the whole gradient, as it was
        for weight, old, part in zip(weights, before, direction, strict=True):
            torch.testing.assert_close(weight.detach(), old - moved * part / size, atol=1e-6, rtol=1e-5)


def test_a_loop_that_stays_broken_says_so() -> None:
    objective, state = start(frozenset(range(2, 60)))
    with pytest.raises(NotFinite, match="20 steps in a row, up to step 22"):
        for _ in fit(objective, state, replace(SETTINGS, steps=60), Accelerator(), seed=1):
            pass
    assert state.skipped == PATIENCE


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_the_same_weights(parts: int) -> None:
    ends = []
    for accumulate in (1, parts):
        objective, state = start()
        for _ in fit(objective, state, replace(SETTINGS, accumulate=accumulate), Accelerator(), seed=1):
            pass
        ends.append(flat(state))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=2e-5, rtol=1e-4)


def test_parts_must_divide_the_batch_and_the_loss_must_allow_them() -> None:
    objective, state = start()
    with pytest.raises(InputError, match="a batch of 4 does not divide among 1 process"):
        next(fit(objective, state, replace(SETTINGS, accumulate=3), Accelerator(), seed=1))
    objective.splits = False
    with pytest.raises(InputError, match="leave its accumulate at 1"):
        next(fit(objective, state, replace(SETTINGS, accumulate=2), Accelerator(), seed=1))


def test_the_rate_falls_by_a_cosine_where_asked() -> None:
    settings = LoopSettings(steps=100, batch=1, rate=2.0, warmup=10, decay=0.25, decay_shape="cosine")
    falling = [settings.rate_at(step) for step in range(75, 101)]
    np.testing.assert_allclose(falling, 1 + np.cos(np.pi * np.arange(26) / 25), atol=1e-12)


@pytest.mark.parametrize("name", ["adafactor", "sgd", "muon"])
def test_other_optimisers_learn_and_resume_to_the_bit(tmp_path: Path, name: str) -> None:
    settings = replace(SETTINGS, optimizer=name, rate=0.1)
    objective, whole = start(settings=settings)
    losses = [p.losses["loss"] for p in fit(objective, whole, settings, Accelerator(), seed=1)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    objective, first = start(settings=settings)
    for progress in fit(objective, first, settings, Accelerator(), seed=1):
        if progress.step == 11:
            break
    Snapshots(tmp_path).save(first)
    objective, second = start(settings=settings)
    Snapshots(tmp_path).restore(second)
    for _ in fit(objective, second, settings, Accelerator(), seed=1):
        pass
    assert all(torch.equal(value, flat(second)[key]) for key, value in flat(whole).items())


class EightBit(torch.optim.Optimizer):
    """Descent that keeps what bitsandbytes' optimisers keep: a count of Python's, moments in 8 bits, a shared table."""

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        self.table = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state |= {"step": 0, "scale": 1.5, "unused": None, "state1": torch.full_like(weight, 128).byte()}
                    state |= {"qmap1": self.table, "absmax1": torch.zeros(3)}
                assert isinstance(state["step"], int) and isinstance(state["scale"], float)
                assert state["state1"].dtype == torch.uint8
                state["step"] += 1
                momentum = 0.5 * state["qmap1"][state["state1"].long()] + weight.grad.clamp(-0.5, 0.5)
                state["state1"] = ((momentum + 1) * 127.5).round().byte()
                state["absmax1"] += 1 / state["step"]
                weight -= group["lr"] * state["scale"] * momentum


def test_an_optimiser_of_eight_bits_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "eight", lambda groups, what: EightBit(groups, what.rate))  # type: ignore[arg-type]
    settings = replace(SETTINGS, optimizer="eight")
    objective, whole = start(settings=settings)
    for progress in fit(objective, whole, settings, Accelerator(), seed=1):
        if progress.step == 11:
            Snapshots(tmp_path).save(whole)
    objective, second = start(settings=settings)
    Snapshots(tmp_path).restore(second)
    assert second.step == 11
    for _ in fit(objective, second, settings, Accelerator(), seed=1):
        pass
    expected, found = flat(whole), flat(second)
    assert expected.keys() == found.keys() and expected["numbers/step/0.weight"].item() == 30
    assert all(torch.equal(value, found[key]) and value.dtype == found[key].dtype for key, value in expected.items())


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(InputError, match="unknown optimizer 'adam'; it can be one of: adamw"):
        start(settings=replace(SETTINGS, optimizer="adam"))


def test_an_optimizer_whose_package_is_installed_and_broken_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("raise ImportError('libcudart.so.13:\\n cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    said = 'install it, or choose "adamw" (libcudart.so.13: cannot open)'
    for use in (
        lambda: check_optimizers(["adamw", "adamw-8bit"]),
        lambda: start(settings=replace(SETTINGS, optimizer="adamw-8bit")),
    ):
        with pytest.raises(InputError, match=f"{re.escape(said)}$"):
            use()


def stage(folder: Path, settings: LoopSettings, gate: Mapping[str, float], lines: list[str]) -> Regression:
    objective = Regression()
    pace = Pace(log_seconds=0, save_seconds=0, validate_steps=10)
    run_stage("toy", objective, settings, folder, Accelerator(), seed=1, gate=gate, pace=pace, report=lines.append)
    return objective


def test_a_stage_that_is_done_is_not_done_again_and_goes_on_when_made_longer(tmp_path: Path) -> None:
    lines: list[str] = []
    first = stage(tmp_path, SETTINGS, {}, lines)
    lines.clear()
    again = stage(tmp_path, SETTINGS, {}, lines)
    assert len(lines) == 1 and "done before" in lines[0]
    for name, weight in first.module.state_dict().items():
        assert torch.equal(weight, again.module.state_dict()[name])
    lines.clear()
    stage(tmp_path, LoopSettings(**{**vars(SETTINGS), "steps": 35}), {}, lines)
    assert "goes on from step 30 of 35" in lines[0]
    with pytest.raises(InputError, match="already trained 35 steps"):
        stage(tmp_path, SETTINGS, {}, lines)


def test_where_other_captions_are_held_out_a_stage_that_is_done_is_judged_anew_without_a_step(tmp_path: Path) -> None:
    class Judged(Regression):
        truth, trained = 1.0, False

        def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
            self.trained = True
            return super().loss(items, draw)

        def validate(self) -> Mapping[str, float]:
            return {"weight": self.truth}

    def figures(truth: float, held_out: str) -> tuple[float, str]:
        objective, lines = Judged(), list[str]()
        objective.truth = truth
        pace = Pace(log_seconds=1e9, save_seconds=1e9, validate_steps=1000)
        given: dict[str, Any] = {"seed": 1, "gate": {}, "pace": pace, "report": lines.append, "held_out": held_out}
        found = run_stage("toy", objective, SETTINGS, tmp_path, Accelerator(), **given)["weight"]
        assert objective.trained == lines[0].startswith("toy: starts")
        return found, lines[0]

    assert figures(1.0, "")[0] == 1.0  # of a run that did not say yet what it held out
    found, line = figures(2.0, "these")
    assert found == 1.0 and "done before" in line
    (tmp_path / "done.json").unlink()
    assert figures(1.0, "these")[0] == 1.0
    assert figures(2.0, "these")[0] == 1.0
    found, line = figures(2.0, "others")
    assert found == 2.0 and "judged anew" in line
    assert figures(3.0, "others")[0] == 2.0


def test_a_gate_that_does_not_hold_stops_the_run_and_keeps_the_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not pass its gate: weight is .* below 1e\+09.*raise steps"):
        stage(tmp_path, SETTINGS, {"weight": 1e9}, [])
    with pytest.raises(InputError, match="above"):
        stage(tmp_path, SETTINGS, {"max_weight": -1e9}, [])
    with pytest.raises(InputError, match="'psnr', which is none of its figures: weight"):
        stage(tmp_path, SETTINGS, {"psnr": 1}, [])
    assert not (tmp_path / "done.json").exists()
    assert (tmp_path / "checkpoints" / "step-00000030").is_dir()


def test_a_stage_that_is_done_holds_the_gate_it_has_now(tmp_path: Path) -> None:
    lines: list[str] = []
    reached = stage(tmp_path, SETTINGS, {"weight": -1e9}, lines).validate()["weight"]
    stage(tmp_path, SETTINGS, {"weight": reached - 1e-3}, lines)
    with pytest.raises(InputError, match=r"toy does not pass its gate: weight is .* below .*raise steps"):
        stage(tmp_path, SETTINGS, {"weight": reached + 1}, lines)
    longer = replace(SETTINGS, steps=35)
    with pytest.raises(InputError, match=r"does not pass its gate.*after 35 steps"):
        stage(tmp_path, longer, {"weight": 1e9}, lines)
    further = stage(tmp_path, longer, {}, lines).validate()["weight"]
    assert abs(further - reached) > 1e-6  # or the next line would compare nothing
    assert json.loads((tmp_path / "done.json").read_text())["figures"]["weight"] == further


class Exploding(Regression):
    """Steps 20 to 45 are broken while the rate is above a bound: what too high a rate does."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound, self.rate = bound, math.inf

    def loss(self, items: np.ndarray, draw: Draw) -> Mapping[str, Tensor]:
        self.bad = frozenset(range(20, 46)) if self.rate > self.bound else frozenset()
        return super().loss(items, draw)


def test_a_stage_that_breaks_goes_back_to_its_last_good_checkpoint_with_a_lower_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentgen.training import stage as room

    objective, lines = Exploding(0.3 * SETTINGS.rate), []
    settings = replace(SETTINGS, steps=60, decay=0.0)
    seen: list[tuple[int, float, float]] = []

    def watched(*given: object, **named: object) -> object:
        objective.rate = settings.rate * given[1].slowed  # type: ignore[attr-defined]
        for progress in fit(*given, **named):  # type: ignore[arg-type]
            seen.append((progress.step, progress.rate, progress.norm))
            yield progress

    monkeypatch.setattr(room, "fit", watched)
    pace = Pace(log_seconds=0, save_seconds=0, validate_steps=10)
    figures = run_stage(
        "toy", objective, settings, tmp_path, Accelerator(), seed=1, gate={}, pace=pace, report=lines.append
    )
    said = [line for line in lines if "back to step" in line]
    assert len(said) == 2 and "back to step 20, the rate now 0.5 times" in said[0] and "0.25 times" in said[1]
    assert figures["skipped"] == 2 * PATIENCE and figures["steps"] == 60
    assert [step for step, _, _ in seen] == [*range(1, 41), *range(21, 41), *range(21, 61)]
    assert seen[-1][1] == pytest.approx(SETTINGS.rate / 4)
    assert all(torch.isfinite(value).all() for value in objective.module.state_dict().values())


def test_stopped_among_broken_steps_a_stage_goes_back_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentgen.training import stage as room

    settings, pace = replace(SETTINGS, steps=60, decay=0.0), Pace(log_seconds=1e9, save_seconds=0, validate_steps=100)

    def run(folder: Path, stop: int = 0) -> tuple[Exploding, list[str]]:
        objective, lines = Exploding(0.3 * SETTINGS.rate), list[str]()

        def watched(*given: Any, **named: Any) -> Iterator[Progress]:
            objective.rate = settings.rate * given[1].slowed
            for progress in fit(*given, **named):
                if progress.step == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield progress

        monkeypatch.setattr(room, "fit", watched)
        run_stage("toy", objective, settings, folder, Accelerator(), seed=1, gate={}, pace=pace, report=lines.append)
        return objective, lines

    whole, _ = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop=25)
    again, lines = run(tmp_path / "cut")
    assert "goes on from step 20 of 60" in lines[0]
    for name, weight in whole.module.state_dict().items():
        assert torch.equal(weight, again.module.state_dict()[name])


def test_a_stage_that_stays_broken_gives_up_with_a_line_and_keeps_what_was_good(tmp_path: Path) -> None:
    objective = Regression(frozenset(range(10, 90)))
    pace = Pace(log_seconds=0, save_seconds=0, validate_steps=100)
    with pytest.raises(InputError, match="after 3 retreats; lower the rate"):
        run_stage(
            "toy",
            objective,
            replace(SETTINGS, steps=90),
            tmp_path,
            Accelerator(),
            seed=1,
            gate={},
            pace=pace,
            report=lambda line: None,
        )
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))] == [
        "step-00000009",
        "step-00000010",
    ]


@pytest.mark.slow
def test_killed_in_the_middle_of_a_stage_a_run_ends_in_the_same_weights_to_the_bit(tmp_path: Path) -> None:
    text = (ROOT / "tests" / "data" / "tiny.toml").read_text()
    text = text.replace("log_seconds = 1\n", "log_seconds = 0\nsave_seconds = 0\n").replace("steps = 16", "steps = 24")
    assert "save_seconds = 0" in text
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(text)

    whole = verb("train", recipe, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    for stage_name in ("vae", "unet"):  # killed twice: once in each, after some steps and before the last
        run = Verb("train", recipe, "--out", tmp_path / "cut")
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            steps = sorted((tmp_path / "cut.training").glob(f"{stage_name}-*/checkpoints/step-*"))
            if steps and int(steps[-1].name.removeprefix("step-")) >= 3:
                break
            assert run.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        run.signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert not (tmp_path / "cut").exists()
    last = verb("train", recipe, "--out", tmp_path / "cut")
    assert last.returncode == 0, last.stderr
    assert "unet: goes on from step" in last.stderr and "vae: done before" in last.stderr
    for file in sorted((tmp_path / "whole").rglob("*.safetensors")):
        expected, found = load_file(file), load_file(tmp_path / "cut" / file.relative_to(tmp_path / "whole"))
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items()), file.name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's optimiser wants its counts there")
def test_on_a_gpu_a_run_goes_on_as_if_it_had_not_stopped() -> None:
    settings = LoopSettings(steps=4, batch=4, rate=1e-2, optimizer="adamw")
    states = []
    for stop in (4, 2):
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 4, device="cuda")
        state = TrainState.start(module, settings)
        for step in range(4):
            if step == stop:
                fresh = TrainState.start(torch.nn.Linear(4, 4, device="cuda"), settings)
                fresh.load(
                    {file: {n: v.cpu() for n, v in part.items()} for file, part in state.tensors().items()}, step
                )
                state, module = fresh, fresh.module  # type: ignore[assignment]
            module(torch.ones(4, 4, device="cuda") * step).square().mean().backward()
            state.optimizer.step()
            state.optimizer.zero_grad()
        states.append(module.weight.detach().cpu())
    torch.testing.assert_close(*states, rtol=0, atol=0)
