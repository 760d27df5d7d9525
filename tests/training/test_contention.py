"""A run that other programs keep from its cores says so, once; one that has them says nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from latentgen.training import contention
from latentgen.training.contention import Contention

ROOT = Path(__file__).parents[2]


def tasks(place: Path, *waited: float) -> Path:
    """A folder as the kernel has it: of each thread seconds computed, seconds waited, turns."""
    for number, seconds in enumerate(waited):
        (place / str(number)).mkdir(parents=True, exist_ok=True)
        (place / str(number) / "schedstat").write_text(f"{10**12} {round(seconds * 1e9)} 7\n")
    return place


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(contention.time, "monotonic", lambda: now[0])
    return now


def test_it_says_how_many_cores_are_taken_and_how_many_threads_are_left(tmp_path: Path, clock: list[float]) -> None:
    seen = Contention(8, tasks=tasks(tmp_path, 3.0, 5.0))
    clock[0] += contention.LEAST - 1
    tasks(tmp_path, 30.0, 50.0)
    assert seen.line() is None  # too soon to tell
    clock[0] = 120.0
    (tmp_path / "ended").mkdir()  # a thread that has gone since it was listed
    tasks(tmp_path, 3.0 + 14.0, 5.0 + 10.0, 4.0)  # a thread more, and 28 seconds waited in 20
    line = seen.line()
    assert line is not None and "take 1.4 of the 8 cores" in line and "OMP_NUM_THREADS=6" in line
    clock[0] = 140.0
    tasks(tmp_path, 37.0, 35.0, 24.0)
    assert seen.line() is None  # it was said


def test_it_is_of_now_and_not_of_the_whole_run(tmp_path: Path, clock: list[float]) -> None:
    seen = Contention(2, tasks=tasks(tmp_path, 0.0))
    clock[0] += 1000
    assert seen.line() is None
    clock[0] += 20
    tasks(tmp_path, 20.0)
    line = seen.line()
    assert line is not None and "take 1.0 of the 2 cores" in line and "OMP_NUM_THREADS=1" in line


@pytest.mark.parametrize(("threads", "share"), [(2, contention.NOTICED - 0.01), (1, 1.0)])
def test_a_run_with_its_cores_or_with_one_thread_says_nothing(
    tmp_path: Path, clock: list[float], threads: int, share: float
) -> None:
    seen = Contention(threads, tasks=tasks(tmp_path, 0.0))
    clock[0] += 20
    tasks(tmp_path, 20 * share)
    assert seen.line() is None


def test_where_the_kernel_does_not_tell_nothing_is_said(tmp_path: Path, clock: list[float]) -> None:
    for place in (tmp_path / "absent", tasks(tmp_path, 0.0)):
        seen = Contention(2, tasks=place)
        (tmp_path / "0" / "schedstat").write_text("no numbers\n")
        clock[0] += 20
        assert seen.line() is None


@pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="no kernel that tells what threads wait for")
def test_two_threads_on_one_core_are_noticed_in_earnest() -> None:
    script = """
import os, time, torch
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(2)
from latentgen.training.contention import Contention
seen = Contention.on(torch.device("cpu"), 1.0)
a, until = torch.randn(400, 400), time.monotonic() + 3
while time.monotonic() < until:
    a @ a
print(seen.line())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "of the 2 cores" in done.stdout and "OMP_NUM_THREADS=1" in done.stdout
