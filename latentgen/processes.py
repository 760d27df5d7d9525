"""Processes that share one piece of work, as `accelerate launch` and `torchrun` start them.

Each needs its number and how many there are, which the environment says; what the first decides (fresh seeds, free
file names) and what it must know of the others (that they are done) goes through the launcher's key-value store. No
process group is made. A process of its own imports no torch here.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

from latentgen.errors import InputError
from latentgen.stopping import half_done

T = TypeVar("T")
MEETING = timedelta(minutes=10)  # until all processes have started and the first has decided
GOODBYE = timedelta(minutes=1)
PATIENCE = timedelta(days=30)  # until all are done; where one is killed its launcher ends the others


@dataclass
class Processes:
    """This process among `count`. rank: its number among all; local_rank, local_count: on this machine; node: which.

    store: what torch.distributed calls a Store; None where there is one process.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    node: int = 0
    store: Any = field(default=None, repr=False)
    _turn: int = field(default=0, repr=False)  # keys are of one piece of work

    def share(self, items: Sequence[T]) -> list[T]:
        """What of the items is this process's: every `count`-th, from its own number on."""
        return list(items[self.rank :: self.count])

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first process decides, in all of them; plain JSON. Raises the first one's InputError in all."""
        self._turn += 1
        if self.count == 1:
            return decide()
        if self.rank:
            self._wait("decided", MEETING)
            told = json.loads(self.store.get(self._key("decided")))
            if "refused" in told:
                self._set(f"heard-{self.rank}", "done")
                raise _said(told["refused"])
            return told["decided"]
        try:
            decided = decide()
        except BaseException as error:
            self.store.set(self._key("decided"), json.dumps({"refused": str(error) or type(error).__name__}))
            self._heard()
            raise
        self.store.set(self._key("decided"), json.dumps({"decided": decided}))
        return decided

    @contextmanager
    def first_here_first(self) -> Iterator[None]:
        """Inside, the first process of a machine goes before the others, which find in the cache what it put there."""
        name = f"first-{self.node}"
        if self.local_rank:
            self._wait(name, PATIENCE)
        try:
            yield
        finally:
            if not self.local_rank:
                self._set(name, "done")

    @contextmanager
    def to_the_end(self) -> Iterator[dict[str, Any]]:
        """Inside, this process's own share is done; the first leaves when all have, or raises where one has not.

        Yields a dictionary for what is done, plain JSON; the first's holds what all have put in, once it has left.
        """
        done: dict[str, Any] = {}
        try:
            with nullcontext() if self.store is None else half_done():
                yield done
        except BaseException:
            self._set(f"ended-{self.rank}", json.dumps(None))
            raise
        self._set(f"ended-{self.rank}", json.dumps(done))
        for other in range(1, self.count) if self.rank == 0 else ():
            self._wait(f"ended-{other}", PATIENCE)
            told = json.loads(self.store.get(self._key(f"ended-{other}")))
            if told is None:
                raise InputError(f"process {other} of {self.count} ended before its pictures were written; it says why")
            done.update(told)

    def _heard(self) -> None:
        """Stay, as the keeper of the store may, until the others know; not for long, as one may never start."""
        for other in range(1, self.count):
            try:
                self._wait(f"heard-{other}", GOODBYE)
            except InputError:
                return

    def _key(self, name: str) -> str:
        return f"latentgen/{self._turn}/{name}"

    def _set(self, name: str, value: str) -> None:
        if self.store is not None:
            try:
                self.store.set(self._key(name), value)
            except RuntimeError:  # the process that keeps the store has gone; there is nobody left to tell
                return

    def _wait(self, name: str, long: timedelta) -> None:
        try:
            self.store.wait([self._key(name)], long)
        except RuntimeError as error:
            raise InputError(f"process {self.rank} of {self.count} waited for the others in vain ({name})") from error


def started() -> Processes:
    """This process as its launcher's environment describes it; alone where nothing says otherwise.

    LOCAL_RANK, which launchers alone set, tells a launched process from one in a shell of a cluster. Raises InputError
    where the environment contradicts itself or the others cannot be reached.
    """
    if "LOCAL_RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return Processes()
    rank, count, local = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    here = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else count
    if not 0 <= rank < count or not 0 <= local < here:
        raise InputError(f"RANK {rank} of WORLD_SIZE {count}, LOCAL_RANK {local} of {here}: there is no such process")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise InputError(f"WORLD_SIZE is {count} and {name} is not set; start with accelerate launch or torchrun")
    from torch.distributed.rendezvous import rendezvous

    try:
        store = next(rendezvous("env://", rank, count, timeout=MEETING))[0]
    except (RuntimeError, ValueError) as error:
        raise InputError(f"process {rank} of {count} cannot reach the others: {str(error).splitlines()[0]}") from error
    node = os.environ.get("GROUP_RANK", "")
    return Processes(rank, count, local, here, int(node) if node.isdecimal() else rank // here, store)


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise InputError(f"{name} is {value!r}; a launcher sets it to a whole number")
    return int(value)


def _said(line: str) -> InputError:
    """The first process's error in another one, which need not say it again."""
    error = InputError(line)
    error.said = True
    return error
