"""Fine-tuning: a finished pipeline learns from somebody's captioned pictures, and what it learned is proved before it
is saved.

settings.py says what can be asked for and chooses the rest; examples.py reads the pictures; base.py opens the weights
that are started from; methods.py makes the weights that are trained; objective.py is what they are trained to do;
prior.py is what the starting weights did before; prove.py saves, loads anew and compares; run.py is the whole of it.
"""

from typing import TYPE_CHECKING, Any

from latentgen.finetuning.settings import METHODS, Finetune

if TYPE_CHECKING:
    from latentgen.finetuning.run import finetune

__all__ = ["METHODS", "Finetune", "finetune"]


def __getattr__(name: str) -> Any:
    if name != "finetune":
        raise AttributeError(f"module 'latentgen.finetuning' has no attribute {name!r}")
    from latentgen.finetuning.run import finetune  # here, since it imports torch: settings are checked without it

    return finetune
