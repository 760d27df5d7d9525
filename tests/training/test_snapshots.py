"""Checkpoints: what was written comes back to the bit; what was torn or altered is refused by name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from latentgen import durable
from latentgen.errors import InputError
from latentgen.training.loop import LoopSettings, TrainState
from latentgen.training.snapshots import Snapshots

SETTINGS = LoopSettings(steps=10, batch=2, rate=0.1, warmup=1)


def state_at(step: int) -> TrainState:
    torch.manual_seed(step)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)).to(memory_format=torch.channels_last)
    state = TrainState.start(net, SETTINGS)
    for _ in range(2):
        net(torch.randn(1, 3, 5, 5)).square().sum().backward()
        state.optimizer.step()
    state.update_average(0.5)
    state.step, state.skipped = step, 1
    return state


def equal(one: TrainState, other: TrainState) -> bool:
    ours, theirs = one.tensors(), other.tensors()
    return (one.step, one.skipped) == (other.step, other.skipped) and all(
        ours[file].keys() == theirs[file].keys()
        and all(torch.equal(ours[file][name], theirs[file][name]) for name in ours[file])
        for file in ("model", "average", "optimizer")
    )


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    kept = state_at(3)
    Snapshots(tmp_path).save(kept)
    back = state_at(0)
    assert not equal(kept, back)
    assert Snapshots(tmp_path).restore(back) == []
    assert equal(kept, back)


def test_how_often_it_went_back_and_its_slower_rate_come_back(tmp_path: Path) -> None:
    kept, back = state_at(3), state_at(0)
    kept.retreats, kept.slowed = 2, 0.25
    Snapshots(tmp_path).save(kept)
    Snapshots(tmp_path).restore(back)
    assert (back.retreats, back.slowed) == (2, 0.25)


def test_a_folder_without_checkpoints_changes_nothing(tmp_path: Path) -> None:
    state = state_at(1)
    assert Snapshots(tmp_path / "none").restore(state) == []
    assert equal(state, state_at(1))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, keep=2)
    for step in (1, 2, 3):
        snapshots.save(state_at(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def torn(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def altered(folder: Path) -> None:
    file = folder / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def lost(folder: Path) -> None:
    (folder / "average.safetensors").unlink()


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": ')


def odd_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": {}}')


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (torn, "model"),
        (altered, "optimizer"),
        (lost, "average"),
        (no_manifest, "manifest"),
        (odd_manifest, "manifest"),
        (empty_manifest, "manifest"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    tmp_path: Path, damage: object, named: str
) -> None:
    snapshots = Snapshots(tmp_path)
    for step in (4, 5):
        snapshots.save(state_at(step))
    assert callable(damage)
    damage(tmp_path / "step-00000005")
    back = state_at(0)
    refused = snapshots.restore(back)
    assert equal(back, state_at(4))
    assert len(refused) == 1 and "step-00000005" in refused[0] and named in refused[0]
    assert (tmp_path / "step-00000005").is_dir()  # nothing is removed by reading


def test_what_was_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    snapshots.save(state_at(4))
    aside = tmp_path / ".step-00000005.writing"
    aside.mkdir()
    (aside / "model.safetensors").write_bytes(b"half")
    back = state_at(0)
    assert snapshots.restore(back) == []
    assert back.step == 4


def test_what_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    snapshots.save(state_at(4))
    broken = state_at(5)
    with torch.no_grad():
        broken.average["0.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"0\.weight is not finite at step 5"):
        snapshots.save(broken)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_moments_that_are_not_finite_are_never_saved_and_numbers_that_are_large_are(tmp_path: Path) -> None:
    broken = state_at(5)
    weight = broken.module.get_parameter("0.weight")
    broken.optimizer.state[weight]["exp_avg"].fill_(1e30)  # its square is beyond float32
    Snapshots(tmp_path).save(broken)
    broken.optimizer.state[weight]["exp_avg_sq"][0, 0, 0, 0] = float("inf")
    broken.step = 6
    with pytest.raises(InputError, match=r"exp_avg_sq of 0\.weight is not finite at step 6"):
        Snapshots(tmp_path).save(broken)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def lying(path: Path) -> None:
    """A disk that says it has what it has lost."""
    if path.suffix == ".safetensors":
        path.write_bytes(path.read_bytes()[:-5])


def test_nothing_is_removed_before_its_successor_is_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = Snapshots(tmp_path, keep=1)
    snapshots.save(state_at(4))
    snapshots.save_best(state_at(4), "loss", 0.4, -1)
    monkeypatch.setattr(durable, "_sync", lying)
    with pytest.raises(InputError, match="does not read back"):
        snapshots.save(state_at(5))
    with pytest.raises(InputError, match="does not read back"):
        snapshots.save_best(state_at(5), "loss", 0.3, -1)
    back = state_at(0)
    snapshots.restore(back)
    assert equal(back, state_at(4))
    assert snapshots.best_step() == 4


def test_torn_checkpoints_are_not_kept_in_place_of_whole_ones(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    for step in (4, 5):
        snapshots.save(state_at(step))
    torn(tmp_path / "step-00000004")
    no_manifest(tmp_path / "step-00000005")
    again = Snapshots(tmp_path)
    fresh = state_at(0)
    assert len(again.restore(fresh)) == 2 and fresh.step == 0
    left = []
    for step in (1, 2, 3, 5, 6):
        again.save(state_at(step))
        back = state_at(0)
        Snapshots(tmp_path).restore(back)
        assert equal(back, state_at(step))
        left.append([int(path.name.removeprefix("step-")) for path in sorted(tmp_path.glob("step-*"))])
    assert left == [[1, 4, 5], [1, 2, 4, 5], [2, 3, 4, 5], [3, 4, 5], [5, 6]]


def test_the_best_weights_are_kept_beside_the_newest(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    kept = [snapshots.save_best(state_at(step), "loss", value, -1) for step, value in ((1, 0.5), (2, 0.3), (3, 0.4))]
    assert kept == [True, True, False]
    found = load_file(tmp_path / "best" / "average.safetensors")
    assert all(torch.equal(found[name], value) for name, value in state_at(2).average.items())
    assert Snapshots(tmp_path).save_best(state_at(4), "psnr", 20.0, 1)  # another figure: no comparison
    assert Snapshots(tmp_path).save_best(state_at(5), "psnr", 21.0, 1)
    assert not Snapshots(tmp_path).save_best(state_at(6), "psnr", 20.5, 1)


@pytest.mark.parametrize(("sign", "worse"), [(-1, float("nan")), (1, float("nan")), (1, float("inf"))])
def test_a_figure_that_is_not_finite_is_never_the_best(tmp_path: Path, sign: int, worse: float) -> None:
    snapshots = Snapshots(tmp_path)
    assert not snapshots.save_best(state_at(1), "loss", worse, sign)
    assert snapshots.save_best(state_at(2), "loss", 0.3, sign)
    assert not snapshots.save_best(state_at(3), "loss", worse, sign)
    assert snapshots.best_step() == 2


def test_weights_that_are_not_finite_are_never_the_best(tmp_path: Path) -> None:
    snapshots, broken = Snapshots(tmp_path), state_at(3)
    snapshots.save_best(state_at(2), "loss", 0.3, -1)
    broken.average["0.weight"][0, 0, 0, 0] = float("inf")
    with pytest.raises(InputError, match=r"0\.weight is not finite at step 3"):
        snapshots.save_best(broken, "loss", 0.2, -1)
    assert snapshots.best_step() == 2
