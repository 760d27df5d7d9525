"""Tensors into a safetensors file, as readable as every other file."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np


def save_tensors(tensors: Mapping[str, Any], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write torch's or NumPy's tensors, dense ones, into `file`, with the mode that the umask gives a new file.

    safetensors itself makes files that none but their owner may read.
    """
    if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save_file
    else:
        from safetensors.torch import save_file
    file.touch()
    mode = file.stat().st_mode
    save_file(dict(tensors), file, None if metadata is None else dict(metadata))
    if file.stat().st_mode != mode:
        with suppress(OSError):  # some network drives refuse it
            file.chmod(mode)
