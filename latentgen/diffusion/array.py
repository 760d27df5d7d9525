"""The one place that knows what an array is: a Python float, a NumPy array or a torch tensor.

Nothing here imports torch: a tensor's own namespace is asked for through `array_api_compat`. NumPy 2 is such a
namespace itself; array_api_compat's copy of it imports all of NumPy's rooms, a tenth of a second at every start.
"""

import math
from typing import Any

import array_api_compat
import numpy as np

Array = Any  # a NumPy array or a torch tensor; the state x is whatever the network takes
Level = Any  # a logSNR (or a time): a Python float, or an array of shape (B,) with one for each row

NUMBERS = (float, int, np.floating, np.integer)
_NAMESPACES: dict[type, Any] = {}


def is_number(value: Any) -> bool:
    """Whether `value` is a plain number rather than an array (NumPy scalars count as numbers)."""
    return isinstance(value, NUMBERS)


def namespace(value: Any) -> Any:
    """The array namespace of `value`; a plain number has NumPy's. That of a type is looked up once."""
    found = _NAMESPACES.get(type(value))
    if found is None:
        numpy = is_number(value) or isinstance(value, np.ndarray)
        found = _NAMESPACES[type(value)] = np if numpy else array_api_compat.array_namespace(value)
    return found


def exp(value: Any) -> Any:
    """e**value, of the kind and dtype given."""
    return math.exp(value) if is_number(value) else namespace(value).exp(value)


def log(value: Any) -> Any:
    """Natural logarithm, of the kind and dtype given."""
    return math.log(value) if is_number(value) else namespace(value).log(value)


def sqrt(value: Any) -> Any:
    """Square root, of the kind and dtype given."""
    return math.sqrt(value) if is_number(value) else namespace(value).sqrt(value)


def sin(value: Any) -> Any:
    """Sine, of the kind and dtype given."""
    return math.sin(value) if is_number(value) else namespace(value).sin(value)


def atan(value: Any) -> Any:
    """Arc tangent, of the kind and dtype given."""
    return math.atan(value) if is_number(value) else namespace(value).atan(value)


def clamp(value: Any, low: float, high: float) -> Any:
    """`value` held inside [low, high], of the kind and dtype given."""
    if is_number(value):
        return min(max(float(value), low), high)
    return namespace(value).clip(value, low, None if high == math.inf else high)


def like(values: Any, model: Array) -> Array:
    """Host numbers as an array of `model`'s library, dtype and device."""
    if isinstance(model, np.ndarray):
        return np.asarray(values).astype(model.dtype, copy=False)
    xp = namespace(model)
    return xp.asarray(values, dtype=model.dtype, device=model.device)


def increase(x: Array, share: Any, y: Array) -> Array:
    """x + share·y, in x's own memory: a tensor does it in one pass (`add_`), an array in two."""
    if is_number(share) and hasattr(x, "add_"):
        return x.add_(y, alpha=float(share))
    x += share * y
    return x


def column(level: Level, x: Array) -> Any:
    """A level (B,) shaped (B, 1, …, 1) and typed as x, so that it multiplies x; a plain number is returned as it is."""
    if is_number(level):
        return float(level)
    xp = namespace(x)
    return xp.reshape(xp.astype(level, x.dtype, copy=False), (-1,) + (1,) * (x.ndim - 1))
