"""Fine-tuning: a finished pipeline learns from somebody's captioned pictures, and what it learned is proved before it
is saved.

settings.py says what can be asked for and chooses the rest; examples.py reads the pictures; base.py opens the weights
that are started from; methods.py makes the weights that are trained; objective.py is what they are trained to do;
prior.py is what the starting weights did before; prove.py saves, loads anew and compares; run.py is the whole of it.
"""

from latentgen.finetuning.run import finetune
from latentgen.finetuning.settings import METHODS, Finetune

__all__ = ["METHODS", "Finetune", "finetune"]
