"""Two processes (gloo) make one step together: what one of them meets, both know; what one sees, both count."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from latentgen import rehearsal
from latentgen.errors import InputError
from latentgen.training.features import FeatureTerms
from latentgen.training.loop import LoopSettings, TrainState, fit
from latentgen.training.stage import Pace, run_stage
from tests.training.test_features import COUNT
from tests.training.test_features import objective as with_features
from tests.training.test_loop import SETTINGS, Regression

ROOT = Path(__file__).parents[2]
SPREAD = LoopSettings(steps=3, batch=4, rate=1e-3, warmup=1, optimizer="sgd", betas=(0.0, 0.9))
LARGE = LoopSettings(steps=3, batch=512, rate=1e-2, warmup=1, optimizer="sgd", betas=(0.0, 0.9))


def trained(objective: Any, settings: LoopSettings) -> TrainState:
    state = TrainState.start(objective.module, settings)
    for _ in fit(objective, state, settings, Accelerator(), seed=1):
        pass
    return state


def dispersed(unet: Path) -> dict[str, torch.Tensor]:
    """The weights of a U-Net whose middle was dispersed for three steps, from those in a folder."""
    from diffusers import UNet2DConditionModel

    made = with_features(UNet2DConditionModel.from_pretrained(unet), FeatureTerms(disperse=0.5))
    return {name: value.contiguous() for name, value in trained(made, SPREAD).tensors()["model"].items()}


def broken_on_one(accelerator: Accelerator, in_parts: bool) -> dict[str, Any]:
    """A run where the loss of the second process, not its gradient, is not finite at one step; what this one saw."""
    from torch.distributed.fsdp import fully_shard

    objective = Regression()
    objective.added = {4: float("nan")} if accelerator.process_index == 1 else {}
    if in_parts:
        objective.module = nn.Sequential(*objective.module).to(memory_format=torch.contiguous_format)
        fully_shard(objective.module)
    state = trained(objective, SETTINGS)
    weights = state.tensors()["model"].values()
    return {"skipped": state.skipped, "sum": sum(float(value.double().sum()) for value in weights)}


def refused_in_parts(unet: Path) -> str:
    from diffusers import UNet2DConditionModel
    from torch.distributed.fsdp import fully_shard

    made = UNet2DConditionModel.from_pretrained(unet)
    fully_shard(made)
    targets = np.zeros((COUNT, 16, 8), np.float16)
    try:
        with_features(made, FeatureTerms(align=0.5), targets)
    except InputError as error:
        return str(error)
    return "accepted"


class Stopping(Regression):
    """Asks its own process, the second, to stop in the middle of a step."""

    def loss(self, items: np.ndarray, draw: Any) -> Any:
        if draw.step == 6 and Accelerator().process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(items, draw)


def stopped(folder: Path) -> bool:
    given: dict[str, Any] = {"seed": 1, "gate": {}, "pace": Pace(log_seconds=0), "report": lambda line: None}
    try:
        run_stage("toy", Stopping(), SETTINGS, folder, Accelerator(), **given)
    except KeyboardInterrupt:
        return True
    return False


def measured(accelerator: Accelerator) -> int:
    """Steps that a dry run measures where the time is up for the second process alone."""
    rehearsal.SECONDS = 0.0 if accelerator.process_index else 1e9
    objective = Regression()
    state = TrainState.start(objective.module, SETTINGS)
    rehearsal.samples_per_second(objective, state, SETTINGS, accelerator)
    return state.step


def together(place: Path) -> None:
    """What each of the two processes does; it leaves what it found beside the U-Net it was given."""
    accelerator = Accelerator()
    found: dict[str, Any] = {"broken": broken_on_one(accelerator, False), "parts": broken_on_one(accelerator, True)}
    weights = dispersed(place / "unet")
    large = {name: value.contiguous() for name, value in trained(Regression(), LARGE).tensors()["model"].items()}
    found["refused"] = refused_in_parts(place / "unet")
    found["stopped"] = stopped(place / "stage")
    found["measured"] = measured(accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_file(weights, place / "dispersed.safetensors")
        save_file(large, place / "large.safetensors")
    (place / f"{accelerator.process_index}.json").write_text(json.dumps(found))


def launched(*arguments: object, **settings: str) -> str:
    """What two processes that torchrun starts say on standard error; they have to end well."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    settings |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, *launch, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stderr


@pytest.fixture(scope="module")
def place(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes found: 0.json and 1.json, the weights they ended in, a stage that stopped."""
    folder = tmp_path_factory.mktemp("two")
    parts["unet"].save_pretrained(folder / "unet")
    (folder / "each.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.training.test_two_processes import together\n"
        "together(Path(sys.argv[1]))\n"
    )
    launched(folder / "each.py", folder)
    return folder


@pytest.fixture(scope="module")
def found(place: Path) -> list[dict[str, Any]]:
    return [json.loads((place / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["broken", "parts"])
def test_a_loss_that_is_not_finite_on_one_process_is_skipped_on_both(found: list[dict[str, Any]], how: str) -> None:
    assert [each[how]["skipped"] for each in found] == [1, 1]
    assert found[0][how]["sum"] == found[1][how]["sum"] and np.isfinite(found[0][how]["sum"])


@pytest.mark.slow
def test_features_are_dispersed_over_the_whole_batch(place: Path, found: list[dict[str, Any]]) -> None:
    start = load_file(next((place / "unet").glob("*.safetensors")))
    alone, shared = dispersed(place / "unet"), load_file(place / "dispersed.safetensors")
    moved = {name: value - start[name] for name, value in alone.items() if name.startswith("mid_block")}
    size = sum(float(value.square().sum()) for value in moved.values()) ** 0.5
    apart = sum(float((shared[name] - alone[name]).square().sum()) for name in moved) ** 0.5
    assert size > 0 and apart < 1e-3 * size


@pytest.mark.slow
def test_a_large_batch_gives_the_same_weights_whoever_draws_its_noise(place: Path, found: list[dict[str, Any]]) -> None:
    alone, shared = trained(Regression(), LARGE).tensors()["model"], load_file(place / "large.safetensors")
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_alignment_beside_a_unet_in_parts_is_refused(found: list[dict[str, Any]]) -> None:
    assert all("align does not work on a U-Net in parts (FSDP)" in each["refused"] for each in found)


@pytest.mark.slow
def test_when_one_process_is_asked_to_stop_both_do_and_their_step_is_saved(
    place: Path, found: list[dict[str, Any]]
) -> None:
    assert [each["stopped"] for each in found] == [True, True]
    (kept,) = (place / "stage" / "checkpoints").glob("step-*")
    assert kept.name == "step-00000007"


@pytest.mark.slow
def test_when_the_time_of_one_process_is_up_both_have_measured_enough(found: list[dict[str, Any]]) -> None:
    assert [each["measured"] for each in found] == [rehearsal.WARM + 1] * 2


@pytest.mark.slow
def test_two_processes_rehearse_a_recipe_and_leave_nothing(tmp_path: Path) -> None:
    recipe, out = ROOT / "tests" / "data" / "tiny.toml", tmp_path / "out"
    said = launched("-m", "latentgen", "train", recipe, "--dry-run", "--out", out, TMPDIR=str(tmp_path))
    for stage in ("clip", "vae", "unet", "decoder"):
        assert said.count(f"{stage}: ") == 1
    assert said.count(f"would write {out}") == 1 and not list(tmp_path.glob("latentgen-*")) and not out.exists()
