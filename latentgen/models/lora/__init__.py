"""LoRA and its kin: small files that change a network's weights, loaded by name, weighed, fused and taken out again.

file.py reads what people have (PEFT, diffusers, kohya, LyCORIS), update.py is the mathematics of each kind, names.py
finds the layer that a key means, stack.py holds several at once over any engine's networks, layers.py is torch's. Only
the last one imports torch.
"""

from latentgen.models.lora.file import Lora, read_lora
from latentgen.models.lora.kohya import write_kohya
from latentgen.models.lora.stack import Layers, Loras, TakesLoras
from latentgen.models.lora.update import Update

__all__ = ["Layers", "Lora", "Loras", "TakesLoras", "Update", "read_lora", "write_kohya"]
