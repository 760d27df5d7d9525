"""torch.compile of a U-Net: fewer, larger kernels, and on a GPU one CUDA graph a step. It pays for many pictures."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
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


def compiled(unet: Any) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A U-Net's call, compiled at the first one and anew for other sizes; in CUDA graphs ("reduce-overhead") on a GPU.

    It computes with the module's own weights, so LoRAs loaded later count too. What it gives is copied: a CUDA graph
    writes its next output into the same place. Raises InputError with one line where the compiler fails.
    """
    gpu = unet.device.type == "cuda"
    inner: Callable[..., Any] = torch.compile(unet, mode="reduce-overhead" if gpu else "default")

    def run(*args: Any, **told: Any) -> tuple[torch.Tensor, ...]:
        if gpu:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            given = inner(*args, **told)
        except torch._dynamo.exc.TorchDynamoException as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise InputError(f"compile failed: {lines[0].strip()}; render without it") from error
        return tuple(value.clone() for value in given) if gpu else given

    return run
