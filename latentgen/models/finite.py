"""No picture is black because numbers ran over: what a walk or a decoder gives is looked at once, when it is done."""

from typing import Any

from latentgen.diffusion.array import namespace
from latentgen.errors import InputError


def check_finite(values: Any, what: str, dtype: str | None = None) -> Any:
    """The values (B, …) themselves; an InputError that names the pictures where some are infinite or no numbers.

    what: "latents" or "pixels". dtype: of the network that gave them, where that may be the reason.
    """
    whole = namespace(values).isfinite(values).reshape(len(values), -1).all(1).tolist()
    if all(whole):
        return values
    count, wrong = len(whole), [str(k + 1) for k, fine in enumerate(whole) if not fine]
    of = "the picture" if count == 1 else f"picture{'s' * (len(wrong) > 1)} {', '.join(wrong)} of {count}"
    why = "its network overflows in float16; take bfloat16 or float32 (--dtype bfloat16)"
    if dtype != "float16":
        why = "the weights are damaged, or the guidance, or what was brought, is out of all measure"
    raise InputError(f"{of} would be black: the {what} are no finite numbers; {why}")
