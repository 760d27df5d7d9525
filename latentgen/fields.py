"""What settings that people write consist of: kinds of numbers, and one line for the first that is not right."""

import difflib
import math
import re
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, ValidationInfo

from latentgen.errors import InputError


def as_number(value: object) -> object:
    """What a setting that is a number was given, as it is. Raises ValueError for true and false."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number; write one")
    return value


def _no_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("nan is no number; write one")
    return value


Whole = Annotated[int, BeforeValidator(as_number)]
Number = Annotated[float, BeforeValidator(as_number)]
Endless = Annotated[float, Field(allow_inf_nan=True), AfterValidator(_no_nan), BeforeValidator(as_number)]
Positive = Annotated[Whole, Field(ge=1)]
Above = Annotated[Number, Field(gt=0)]
Amount = Annotated[Number, Field(ge=0)]
Part = Annotated[Number, Field(ge=0, le=1)]
Below = Annotated[Number, Field(ge=0, lt=1)]  # a part, but not all
Scale = Annotated[Number, Field(ge=0.5, le=2)]
Model = TypeVar("Model", bound=BaseModel)
WRITTEN = "written"


def is_written(info: ValidationInfo) -> bool:
    """Whether what is validated is what a person wrote, and not what a run stored, which need not hear of it."""
    return bool((info.context or {}).get(WRITTEN))


def explained(model: type[Model], values: Any, where: str, *, written: bool = False) -> Model:
    """The values as the model has them. Raises InputError, naming the key, for the first thing that is not right.

    written: they are what a person wrote, not what a run stored; keys without effect are refused then (`is_written`).
    """
    try:
        return model.model_validate(values, context={WRITTEN: written})
    except ValidationError as error:
        raise InputError(f"{where}: {_explain(error, model)}") from None


def _explain(error: ValidationError, whole: type[BaseModel]) -> str:
    """The first thing wrong, in words, unknown keys first: they are most often the cause of the rest."""
    flaw, *rest = sorted(error.errors(), key=lambda flaw: flaw["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in flaw["loc"])
    more = f" (and {len(rest)} more)" if rest else ""
    if flaw["type"] == "extra_forbidden":
        *section, key = (str(part) for part in flaw["loc"])
        known = _keys(whole, section)
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        right = f"did you mean {near[0]!r}?" if near else f"it can be one of: {', '.join(known)}"
        place = f"[{'.'.join(section)}]" if section else "the top level"
        return f"unknown key {key!r} in {place}; {right}{more}"
    if flaw["type"] == "missing":
        return f"{where} is missing; write it{more}"
    if flaw["type"] == "value_error":  # said by a section of itself
        return f"{where + ': ' if where else ''}{flaw['ctx']['error']}{more}"
    hint = _near(flaw["input"], flaw["ctx"]["expected"]) if flaw["type"] == "literal_error" else ""
    return f"{where or 'the whole'} is {flaw['input']!r}: {flaw['msg'][0].lower()}{flaw['msg'][1:]}{hint}{more}"


def _near(given: object, expected: str) -> str:
    """The word nearest to what was given, of those that pydantic lists in quotes."""
    near = difflib.get_close_matches(str(given), re.findall(r"'([^']*)'", expected), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _keys(whole: type[BaseModel], section: list[str]) -> list[str]:
    """The keys a section may hold."""
    model: Any = whole
    for name in section:
        field = model.model_fields.get(name)
        if field is None:
            return []
        kinds = [field.annotation, *get_args(field.annotation)]
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if model is None:
            return []
    return [field.alias or name for name, field in model.model_fields.items()]
