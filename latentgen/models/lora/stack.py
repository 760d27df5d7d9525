"""Several adapters at once over the networks of a pipeline: weights are always the originals plus what is loaded now.

Nothing is ever subtracted: a change of weight, a removal and an unfusing start from the original bits.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latentgen.errors import InputError
from latentgen.models.lora.file import Lora, read_lora
from latentgen.models.lora.names import index
from latentgen.models.lora.update import Update

Place = tuple[str, str]  # (part, layer)


class Layers(Protocol):
    """One network, whichever engine runs it, as far as its linear and convolutional layers are concerned."""

    def names(self) -> Mapping[str, Iterable[str]]:
        """Layer -> its names in the LDM layout, none or more."""

    def read(self, layer: str) -> np.ndarray:
        """A layer's original weight, float32: (out, in), or (out, in, kh, kw)."""

    def use(self, changes: Iterable[tuple[str, np.ndarray | None]]) -> int:
        """Compute with these weights from now on; None is the original. Returns how many differ from those before."""

    def fuse(self) -> None:
        """Make the weights in use the network's own, with the originals kept aside."""

    def unfuse(self) -> None:
        """Give the network its own weights back, to the bit; those in use stay in use, beside them."""


@dataclass
class Loaded:
    """An adapter in use, and where each of its updates goes."""

    lora: Lora
    path: str
    weight: float
    places: dict[Place, Update]


@dataclass(eq=False)
class Loras:
    """The adapters of a pipeline, by name. parts: "unet", "text_encoder" … -> its layers."""

    parts: Mapping[str, Layers]
    loaded: dict[str, Loaded] = field(default_factory=dict)
    fused: bool = False

    def load(
        self, path: str | Path, weight: float = 1.0, name: str | None = None, *, known_as: str | None = None
    ) -> str:
        """Read an adapter file or folder and use it; returns its name. known_as: the path that the settings say.

        Raises InputError, and changes nothing, for a file that cannot be used, is for another model, or has no effect.
        """
        weight = _weight(weight)
        lora = read_lora(path)
        if name is not None and name in self.loaded:
            raise InputError(f"a LoRA named {name!r} is loaded already; give another name, or unload it first")
        name = name if name is not None else self._free(lora.name)
        said = Path(path).as_posix() if known_as is None else known_as
        self.loaded[name] = Loaded(lora, said, weight or 1.0, self._places(lora))
        try:
            if not self._use(self.loaded[name].places):
                raise InputError(f"{lora.path} changes nothing: its updates are nought, or lost in the weights' type")
            if not weight:
                self.set_weight(name, weight)
        except BaseException:
            self._use(self.loaded.pop(name).places)
            raise
        return name

    def unload(self, name: str | None = None) -> None:
        """Take an adapter out again, or (None) all of them; the weights are as if it had never been there."""
        for gone in list(self.loaded) if name is None else [self._known(name)]:
            self._use(self.loaded.pop(gone).places)

    def set_weight(self, name: str, weight: float) -> None:
        """Give a loaded adapter another weight; 0 is off."""
        loaded = self.loaded[self._known(name)]
        loaded.weight = _weight(weight)
        self._use(loaded.places)

    def fuse(self) -> None:
        """Make what is loaded part of the networks' own weights; later changes go the same way until `unfuse`."""
        for layers in self.parts.values():
            layers.fuse()
        self.fused = True

    def unfuse(self) -> None:
        """Give the networks their own weights back, to the bit; what is loaded stays in use beside them."""
        for layers in self.parts.values():
            layers.unfuse()
        self.fused = False

    @classmethod
    def told(cls, loras: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the settings say of adapters that are fused already; of each, what `load` takes."""
        named = cls({})
        for one in loras:
            lora, path = read_lora(one["path"]), Path(one["path"]).as_posix()
            name = one.get("name") or named._free(lora.name)
            named.loaded[name] = Loaded(lora, one.get("known_as") or path, _weight(one.get("weight", 1.0)), {})
        return named.settings()

    def settings(self) -> list[dict[str, Any]]:
        """What a picture's settings say of each."""
        return [
            {"name": name, "path": one.path, "weight": one.weight, "sha256": one.lora.sha256}
            for name, one in self.loaded.items()
        ]

    def _places(self, lora: Lora) -> dict[Place, Update]:
        known = index({part: layers.names() for part, layers in self.parts.items()})
        places: dict[Place, Update] = {}
        for layer, update in lora.updates.items():
            if layer not in known:
                raise InputError(
                    f"{lora.path} is for another model: {update.key} has no layer here "
                    f"({sum(other not in known for other in lora.updates)} of {len(lora.updates)} have none)"
                )
            if known[layer] in places:
                raise InputError(f"{lora.path} names one layer twice: {places[known[layer]].key} and {update.key}")
            places[known[layer]] = update
        return places

    def _use(self, places: Iterable[Place]) -> int:
        """Compute the layers anew, and hand them over; how many have changed."""
        by_part: dict[str, list[str]] = {}
        for part, layer in places:
            by_part.setdefault(part, []).append(layer)
        changed = sum(self.parts[part].use(self._changes(part, names)) for part, names in by_part.items())
        if self.fused:
            self.fuse()
        return changed

    def _changes(self, part: str, layers: Iterable[str]) -> Iterator[tuple[str, np.ndarray | None]]:
        for layer in layers:
            base, total = None, None
            for one in self.loaded.values():
                update = one.places.get((part, layer))
                if update is None or not one.weight:
                    continue
                base = self.parts[part].read(layer) if base is None else base
                try:
                    change = np.float32(one.weight) * update.delta(base)
                except ValueError as error:
                    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in update.tensors.values())
                    raise InputError(
                        f"{one.lora.path} is for another model: {update.key} and those beside it ({shapes}) "
                        f"do not fit a layer of shape {tuple(base.shape)}"
                    ) from error
                total = change if total is None else total + change
            yield layer, None if base is None or total is None else base + total

    def _known(self, name: str) -> str:
        if name not in self.loaded:
            there = ", ".join(map(repr, self.loaded)) or "none"
            raise InputError(f"no LoRA named {name!r} is loaded; there are: {there}")
        return name

    def _free(self, name: str) -> str:
        number, free = 1, name
        while free in self.loaded:
            number += 1
            free = f"{name}-{number}"
        return free


class TakesLoras:
    """What a pipeline can do with LoRAs. loras: None where the engine that runs it takes none."""

    loras: Loras | None

    def load_lora(
        self, path: str | Path, weight: float = 1.0, name: str | None = None, *, known_as: str | None = None
    ) -> str:
        """Use a LoRA, LoCon, LoHa, LoKr or DoRA file (.safetensors) or its folder, beside those loaded; gives its name.

        weight: 1 is as it was trained. known_as: the path that pictures' settings say, where it is not `path`.
        Raises InputError, one line, for a file that is no such thing, is for another model, or has no effect.
        """
        return self._loras().load(path, weight, name, known_as=known_as)

    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA out again, or (None) all: the weights are the original ones to the bit."""
        self._loras().unload(name)

    def set_lora_weight(self, name: str, weight: float) -> None:
        """Weigh a loaded LoRA anew; 0 is off, 1 is as it was trained."""
        self._loras().set_weight(name, weight)

    def fuse_lora(self) -> None:
        """Make what is loaded part of the modules' own weights (to save them, say). Rendering is equally fast."""
        self._loras().fuse()

    def unfuse_lora(self) -> None:
        """Give the modules their own weights back, to the bit; what is loaded stays in use."""
        self._loras().unfuse()

    def _loras(self) -> Loras:
        if self.loras is None:
            raise InputError("this engine takes no LoRA; open the pipeline with engine='torch'")
        return self.loras


def _weight(value: Any) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"a LoRA's weight is {value!r}; it must be a number") from error
    if not math.isfinite(weight):
        raise InputError(f"a LoRA's weight is {weight:g}; it must be a finite number")
    return weight
