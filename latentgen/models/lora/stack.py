"""Several adapters at once over the networks of a pipeline: weights are always the originals plus what is loaded now.

Nothing is ever subtracted: a change of weight, a removal and an unfusing start from the original bits.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Never, Protocol

import numpy as np

from latentgen.errors import InputError
from latentgen.models.lora.file import Lora, read_lora
from latentgen.models.lora.names import index
from latentgen.models.lora.update import Update
from latentgen.values import as_path, finite, shown

Place = tuple[str, str]  # (part, layer)
KEYS = ("path", "weight", "name", "known_as")  # of a LoRA that a pipeline is opened with: what `Loras.load` takes


class WordsBeside(UserWarning):
    """The file of a LoRA holds new words too, which loading the LoRA does not teach."""


class Layers(Protocol):
    """One network, whichever engine runs it, as far as its linear and convolutional layers and norms are concerned.

    A layer's name with `names.BIAS` after it stands for its bias, in every method.
    """

    def names(self) -> Mapping[str, Iterable[str]]:
        """Layer -> its names in the LDM layout, none or more."""

    def read(self, layer: str) -> np.ndarray:
        """A layer's original weight, float32: (out, in), (out, in, kh, kw), or (out,) of norms and biases."""

    def largest(self, layer: str) -> float:
        """The largest number that a layer's weight can hold."""

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
        weight, name, known_as = _weight(weight), _name(name), _name(known_as, "known_as")
        lora = read_lora(path)
        name = self._called(name, lora)
        self.loaded[name] = Loaded(lora, _said(path, known_as), weight or 1.0, self._places(lora))
        try:
            if not self._use(self.loaded[name].places):
                raise InputError(f"{lora.path} changes nothing: its updates are nought, or lost in the weights' type")
            if not weight:
                self.set_weight(name, weight)
        except BaseException:
            self.unload(name)
            raise
        _say_words(lora)
        return name

    def unload(self, name: str | None = None) -> None:
        """Take an adapter out again, or (None) all of them; the weights are as if it had never been there.

        Interrupted, those that may still be in use stay listed, and the same call takes them out.
        """
        gone = list(self.loaded) if name is None else [self._known(name)]
        for each in gone:
            self.loaded[each].weight = 0.0
        self._use(dict.fromkeys(place for each in gone for place in self.loaded[each].places))
        for each in gone:
            del self.loaded[each]

    def set_weight(self, name: str, weight: float) -> None:
        """Give a loaded adapter another weight; 0 is off. Raises InputError, and changes nothing, for none."""
        loaded = self.loaded[self._known(name)]
        before = loaded.weight
        try:
            loaded.weight = _weight(weight)
            self._use(loaded.places)
        except BaseException:
            loaded.weight = before
            self._use(loaded.places)
            raise

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
            lora = read_lora(one["path"])
            said, weight = _said(one["path"], one.get("known_as")), _weight(one.get("weight", 1.0))
            named.loaded[named._called(one.get("name"), lora)] = Loaded(lora, said, weight, {})
            _say_words(lora)
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
                    with np.errstate(over="ignore", invalid="ignore"):  # of which the check below tells
                        change = np.float32(one.weight) * update.delta(base)
                except ValueError as error:
                    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in update.tensors.values())
                    raise InputError(
                        f"{one.lora.path} is for another model: {update.key} and those beside it ({shapes}) "
                        f"do not fit a layer of shape {tuple(base.shape)}"
                    ) from error
                total = change if total is None else total + change
            changed = None if base is None or total is None else base + total
            if changed is not None and not np.abs(changed).max(initial=0) <= self.parts[part].largest(layer):
                weighed = ", ".join(
                    f"{shown(name)} at {one.weight:g}" for name, one in self.loaded.items() if one.weight
                )
                raise InputError(f"with {weighed} the weights of {layer} are too large for their type; weigh it less")
            yield layer, changed

    def _known(self, name: str) -> str:
        if _name(name) not in self.loaded:
            there = ", ".join(map(shown, self.loaded)) or "none"
            raise InputError(f"no LoRA named {shown(name)} is loaded; there are: {there}")
        return name

    def _called(self, name: str | None, lora: Lora) -> str:
        """The name that an adapter gets here: the one given, or its file's, numbered where that is taken."""
        if name is not None and name in self.loaded:
            raise InputError(f"a LoRA named {shown(name)} is loaded already; give another name, or unload it first")
        if name is not None:
            return name
        number, free = 1, lora.name
        while free in self.loaded:
            number += 1
            free = f"{lora.name}-{number}"
        return free


def _say_words(lora: Lora) -> None:
    if lora.words:
        words = ", ".join(map(repr, lora.words))
        said = f"{lora.path} holds new words too, {words}; --word {lora.path} (load_textual_inversion) teaches them"
        warnings.warn(said, WordsBeside, stacklevel=1)  # of one place, so that it is said once


class TakesLoras:
    """What a pipeline can do with LoRAs. loras: None where the engine that runs it takes none.

    _torch: opens one that does, where there is a choice.
    """

    loras: Loras | None
    _torch: Any

    def load_lora(
        self,
        path: str | Path,
        weight: float = 1.0,
        name: str | None = None,
        *,
        known_as: str | None = None,
        **others: Never,
    ) -> str:
        """Use a LoRA, LoCon, LoHa, LoKr or DoRA file (.safetensors) or its folder, beside those loaded; gives its name.

        weight: 1 is as it was trained. known_as: the path that pictures' settings say, where it is not `path`.
        Raises InputError, one line, for a file that is no such thing, is for another model, or has no effect.
        """
        if others:
            from latentgen.hints import take

            take("load_lora", others)
        if self.loras is None and self._torch is not None:  # before another engine is opened for it
            _weight(weight)
            _name(name)
            _name(known_as, "known_as")
            read_lora(path)
        return self._loras().load(path, weight, name, known_as=known_as)

    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA out again, or (None) all: the weights are the original ones to the bit."""
        self._loaded().unload(name)

    def set_lora_weight(self, name: str, weight: float) -> None:
        """Weigh a loaded LoRA anew; 0 is off, 1 is as it was trained."""
        self._loaded().set_weight(name, weight)

    def fuse_lora(self) -> None:
        """Make what is loaded part of the modules' own weights (to save them, say). Rendering is equally fast."""
        self._loras().fuse()

    def unfuse_lora(self) -> None:
        """Give the modules their own weights back, to the bit; what is loaded stays in use."""
        self._loaded().unfuse()

    def _loras(self) -> Loras:
        if self.loras is None:
            raise InputError("this engine takes no LoRA; open the pipeline with engine='torch'")
        return self.loras

    def _loaded(self) -> Loras:
        """As `_loras`, where something may be loaded or fused; to see that, any engine will do."""
        return self._loras()


def _weight(value: Any) -> float:
    most = float(np.finfo(np.float32).max)
    return finite("a LoRA's weight", value, -most, most)


def _name(value: Any, what: str = "name") -> Any:
    if value is not None and not isinstance(value, str):
        raise InputError(f"a LoRA's {what} is {shown(value)}; it must be a string")
    return value


def _said(path: str | Path, known_as: str | None) -> str:
    """The path that the settings say."""
    return Path(path).as_posix() if known_as is None else known_as


def read_loras(loras: Any) -> list[dict[str, Any]]:
    """What a pipeline is opened with, one or several, as what `Loras.load` takes of each; a path alone is one too.

    Raises InputError for what is none of it.
    """
    given = [loras] if isinstance(loras, str | PathLike | Mapping) else [] if loras is None else loras
    keys = ", ".join(KEYS)
    if not isinstance(given, Sequence):
        raise InputError(f"loras is {shown(loras)}; it must be a list of paths, or of mappings with the keys {keys}")
    found = [{"path": one} if isinstance(one, str | PathLike) else one for one in given]
    for one in found:
        if not isinstance(one, Mapping) or "path" not in one or not one.keys() <= set(KEYS):
            held = f"a mapping with {shown([*one])}" if isinstance(one, Mapping) else shown(one)
            raise InputError(f"loras holds {held}; each must be a path, or a mapping with the keys {keys}")
        as_path("a LoRA's path", one["path"])
        _name(one.get("name"))
        _name(one.get("known_as"), "known_as")
    return [{**one, "weight": _weight(one.get("weight", 1.0))} for one in found]
