"""Verbs of the command line in processes of their own that are there at once.

They are forked from a server that has imported what training takes, which costs a new interpreter six seconds. All
else is as a person runs it: another process, its own folder, environment and outputs, an exit code, and signals. How
long an interpreter's start takes, and what it imports, is not for these tests.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(
    [
        "latentgen.cli",
        "latentgen.continuation",
        "latentgen.rehearsal",
        "latentgen.finetuning.run",
        "latentgen.pipeline",
        "transformers.models.clip.modeling_clip",
        "transformers.models.clip.tokenization_clip",
        "diffusers.models.unets.unet_2d_condition",
        "peft",
    ]
)


class Verb:
    """`latentgen` with these arguments, running; of `subprocess.Popen` what the tests ask."""

    def __init__(self, *arguments: object, cwd: Path = ROOT, environment: Mapping[str, str] | None = None) -> None:
        self._outputs = tempfile.TemporaryDirectory(prefix="verb-")
        self.stdout, self.stderr = (Path(self._outputs.name) / name for name in ("stdout", "stderr"))
        given = ["latentgen", *map(str, arguments)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}
        self._process = FORKING.Process(
            target=_become, args=(given, str(cwd), environment, str(self.stdout), str(self.stderr))
        )
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 600) -> int:
        """The exit code, once it has ended."""
        self._process.join(seconds)
        code = self._process.exitcode
        assert code is not None, f"still running after {seconds} s"
        return code

    def signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def lines(self) -> Iterator[str]:
        """What it says on standard error, line by line as it says them, until it ends."""
        held = ""
        while not self.stderr.exists():
            assert self.poll() is None
            time.sleep(0.01)
        with self.stderr.open(encoding="utf-8") as stream:
            while True:
                ended = self.poll() is not None
                held += stream.read()
                *whole, held = held.split("\n")
                yield from whole
                if ended:
                    return
                time.sleep(0.01)

    def done(self) -> subprocess.CompletedProcess[str]:
        """Waits; the exit code and all that it said."""
        code = self.wait()
        said, told = (path.read_text(encoding="utf-8") for path in (self.stdout, self.stderr))
        self._outputs.cleanup()
        return subprocess.CompletedProcess([], code, said, told)


def verb(*arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
    """`latentgen` with these arguments, from the repository, to its end. settings: environment variables."""
    return Verb(*arguments, environment=settings).done()


def _become(given: list[str], cwd: str, environment: dict[str, str], *outputs: str) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # as the environment says now
    for number, path in enumerate(outputs, 1):
        target = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        os.dup2(target, number)
        os.close(target)
    from latentgen.cli import main

    sys.argv = given
    main()
