"""Whether other programs take the cores that a run's threads wait for each other on: then fewer threads are faster.

A step on a CPU is thousands of products that all threads finish together, so a thread that has to wait for its core
keeps the others waiting too. Two runs with two threads each on two cores have a twentieth of the rate of one alone;
with a thread each they have half of it.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch

TASKS = Path("/proc/self/task")
NOTICED = 0.25  # of a core's time that threads stood in line for one
LEAST = 10.0  # seconds before it is judged


class Contention:
    """Watches from when it is made, on Linux; elsewhere it has nothing to say.

    threads: that compute together. least: seconds before it judges.
    """

    def __init__(self, threads: int, least: float = LEAST, tasks: Path = TASKS) -> None:
        self._threads, self._least, self._tasks = threads, least, tasks
        self._began, self._waited = time.monotonic(), self._all_waited()

    @classmethod
    def on(cls, device: torch.device, least: float = LEAST) -> Contention:
        """That of a run on this device, of which a GPU's computes on no core."""
        return cls(torch.get_num_threads() if device.type == "cpu" else 1, least)

    def line(self) -> str | None:
        """What is wrong and what to do, for people; None where nothing is, where it is not known yet or said before."""
        spent, waited = time.monotonic() - self._began, self._all_waited()
        if self._threads < 2 or waited is None or self._waited is None or spent < self._least:
            return None
        cores = (waited - self._waited) / spent
        self._began, self._waited = self._began + spent, waited
        if cores < NOTICED:
            return None
        threads, self._threads = self._threads, 0
        fewer = max(1, threads - math.ceil(cores))
        return (
            f"other programs take {cores:.1f} of the {threads} cores that this run computes on, and its threads wait "
            f"for each other; it is faster with OMP_NUM_THREADS={fewer}, or without those programs"
        )

    def _all_waited(self) -> float | None:
        """Seconds that all threads of this process were ready to run and had no core; None where that is not told."""
        try:
            found = [_waited(task) for task in self._tasks.iterdir()]
        except OSError:
            return None
        told = [seconds for seconds in found if seconds is not None]
        return sum(told) if told else None


def _waited(task: Path) -> float | None:
    """Of one thread (proc_pid_schedstat(5), the second number, in nanoseconds); None of one that has just ended."""
    try:
        return int((task / "schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
