"""Ctrl-C while the program is still being imported, which Python's own way does not hold out.

A KeyboardInterrupt that comes in an import is lost or turned into something else where the module is one of C, or
where what it meets is a `__del__`; and before `main` has begun it is a traceback. So there the process ends there and
then, unless something is half done (`half_done`). Anywhere else it is a KeyboardInterrupt, as ever.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

IMPORTING = "<frozen importlib._bootstrap>"
STOPPED = 130  # the exit code, as shells have it
SHOW_CURSOR = b"\x1b[?25h"  # a bar hides it
_HALF_DONE: list[None] = []  # as many as there are at present


def stop_at_once() -> None:
    """From here on Ctrl-C in an import ends the process. What ignores it, or has its own way with it, is left alone."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with suppress(ValueError):  # no main thread
            signal.signal(signal.SIGINT, _stop)


@contextmanager
def half_done() -> Iterator[None]:
    """Inside, something is to be put away or told however it ends: Ctrl-C in an import is a KeyboardInterrupt too."""
    _HALF_DONE.append(None)
    try:
        yield
    finally:
        _HALF_DONE.pop()


def _stop(_: int, frame: FrameType | None) -> None:
    while frame is not None and not _HALF_DONE:
        if frame.f_code.co_filename == IMPORTING:
            with suppress(OSError):
                os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + b"latentgen: stopped\n")
            os._exit(STOPPED)
        frame = frame.f_back
    raise KeyboardInterrupt
