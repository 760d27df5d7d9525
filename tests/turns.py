"""Threads that meet where they would disturb each other: what waits for its turn is known without waiting for it."""

from threading import Event, RLock


class Awaited:
    """A lock that tells when somebody has to wait for it."""

    def __init__(self, told: Event) -> None:
        self.lock, self.told = RLock(), told

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            self.told.set()
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
