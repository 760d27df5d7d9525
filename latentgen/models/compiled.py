"""torch.compile of a U-Net: fewer, larger kernels, and on a GPU one CUDA graph a step. It pays for many pictures."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from latentgen.errors import InputError


def why_no_compiling(device: torch.device) -> str | None:
    """What torch.compile lacks here, or None: a C++ compiler on a CPU, Triton on a GPU."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "the package triton is not installed"
    if device.type != "cpu":
        return f"it compiles for a CPU or an NVIDIA GPU, not for {device.type!r}"
    named = os.environ.get("CXX", "").split() or ["clang++" if sys.platform == "darwin" else "g++"]
    return None if shutil.which(named[0]) else f"there is no C++ compiler {named[0]!r}; install one or name it in CXX"


def check_compiling(device: torch.device) -> None:
    """Raise an InputError where torch.compile cannot work, before weights are loaded."""
    reason = why_no_compiling(device)
    if reason is not None:
        raise InputError(f"compile cannot be used: {reason}; without it the same pictures come from the torch engine")


@dataclass(eq=False)
class Compiled:
    """A U-Net's call, compiled at the first one and anew for other sizes; in CUDA graphs ("reduce-overhead") on a GPU.

    It computes with the module's own weights, so LoRAs loaded later count too. What it gives is copied: a CUDA graph
    writes its next output into the same place.
    """

    unet: Any

    def __post_init__(self) -> None:
        self._gpu = self.unet.device.type == "cuda"
        self._inner: Callable[..., Any] = torch.compile(self.unet, mode="reduce-overhead" if self._gpu else "default")

    def __call__(self, *args: Any, **told: Any) -> tuple[torch.Tensor, ...]:
        """What the U-Net gives. Raises InputError with one line where the compiler fails."""
        if self._gpu:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            given: tuple[torch.Tensor, ...] = self._inner(*args, **told)
        except torch._dynamo.exc.TorchDynamoException as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise InputError(f"compile failed: {lines[0].strip()}; render without it") from error
        return tuple(value.clone() for value in given) if self._gpu else given

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is compiled anew, of the copied U-Net."""
        return Compiled, (self.unet,)


compiled = Compiled
