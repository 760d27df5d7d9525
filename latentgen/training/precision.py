"""The accelerator of a run: devices, processes, and the precision that matrix products are computed in."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from latentgen.models.loading import has_bf16


def accelerator_for(precision: str) -> Accelerator:
    """accelerate's, in "bf16", "fp32", or ("auto") bf16 where the hardware multiplies it.

    accelerate keeps one precision for a process; a run after another may have its own.
    """
    asked = "bf16" if precision == "bf16" or (precision == "auto" and has_bf16()) else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != asked:
        AcceleratorState._reset_state()
    torch.backends.cudnn.benchmark = True  # shapes are the same from step to step
    return Accelerator(mixed_precision=asked)
