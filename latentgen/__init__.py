"""latentgen: train, fine-tune and run a latent text-to-image model of your own.

    from latentgen import Pipeline
    Pipeline.from_pretrained()("a red apple", seed=7).images[0].save("apple.png")

Names are imported when first asked for (PEP 562), so that `import latentgen` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentgen.errors import InputError
    from latentgen.finetuning import finetune
    from latentgen.output import Output
    from latentgen.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["InputError", "Output", "Pipeline", "__version__", "finetune"]

_HOMES = {
    "InputError": "latentgen.errors",
    "Output": "latentgen.output",
    "Pipeline": "latentgen.pipeline",
    "finetune": "latentgen.finetuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentgen' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
