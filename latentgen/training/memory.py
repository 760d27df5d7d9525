"""What is said where a stage finds not enough memory: the settings that help, by the names of their keys."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from latentgen.errors import InputError, is_no_memory
from latentgen.training.loop import LoopSettings, Objective, recomputing


def table_of(name: str) -> str:
    """Where the loop's settings of a stage stand in a recipe; "" for a fine-tuning run, which has no tables."""
    return {"finetune": "", "pixels": "in [train] "}.get(name, f"in [{name}.train] ")


@contextmanager
def saying_what_saves(
    name: str, objective: Objective, settings: LoopSettings, accelerator: Accelerator
) -> Iterator[None]:
    """Inside, a step of a stage that finds not enough memory raises InputError, which says what would need less."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not is_no_memory(error):
            raise
        part, tuned = settings.batch // (accelerator.num_processes * settings.accumulate), name == "finetune"
        same = [f"raise accumulate, which is {settings.accumulate}"] if objective.splits and part > 1 else []
        if not (tuned or settings.activation_checkpointing) and any(recomputing(objective.module)):
            same.append("set activation_checkpointing = true")
        less = f"lower batch, or size{'' if tuned else ' in [data]'}"
        advice = f"{' or '.join(same)}, which changes no result, or {less}" if same else less
        pictures = f"{part} picture{'s' if part > 1 else ''}"
        raise InputError(f"{name}: not enough memory for {pictures} at a time; {table_of(name)}{advice}") from error
