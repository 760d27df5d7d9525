"""The floating-point types that networks compute in, by name; no torch is needed to know them."""

from typing import Any

from latentgen.errors import InputError

FULL = ("float32", "float16", "bfloat16")
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def type_name(dtype: Any) -> str:
    """ "bf16", "bfloat16" and torch.bfloat16 are "bfloat16". Raises InputError for what is none of `FULL`."""
    said = str(dtype).removeprefix("torch.")
    name = SHORT.get(said, said)
    if name not in FULL:
        raise InputError(f"dtype {said!r} is not known; it can be one of: {', '.join([*FULL, *SHORT])}")
    return name
