"""How much is computed at a time: rows of a batch, and tiles of a large picture, so that memory stays bounded.

Samplers walk the whole batch: its latents are small. What is large are the activations of the U-Net, of the decoder
and of the text encoder, and those see a group of rows at a time. NumPy arrays and torch tensors alike; no torch here.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsIndex

from latentgen.diffusion.array import Array, namespace
from latentgen.diffusion.denoiser import Condition, Network
from latentgen.errors import InputError
from latentgen.models.lengths import Rows, groups, in_order, parts_of
from latentgen.values import shown, whole

MOST = 8  # pictures at a time on a CPU: past a few, more at a time is no faster there
SHARE = 0.5  # of the memory that is free, for activations
MARGIN = 2.5  # of the estimate, for what engines hold besides
UNKNOWN = 1 << 30  # bytes taken to be free where nothing says
PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")  # where Linux tells of memory and of control groups
# of a control group: its limit, what is used of it, and the cache of files in that, which goes where memory is wanted
SECOND_GROUP = ("memory.max", "memory.current", "inactive_file")
FIRST_GROUP = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
TEXTS = 32  # chunks of a context encoded at a time
TOLD = 256 << 20  # bytes of cross-attention's keys and values that are kept from step to step
PLAIN = 1024  # places up to which attention may hold its scores: on more, engines and training fuse it
WHOLE = 1536 * 1024  # pixels up to which a picture is decoded whole unless tiles are asked for
OVERLAP = 0.25  # of a tile, blended with its neighbour


def in_groups(network: Network, rows: int) -> Network:
    """The network, evaluated at most `rows` rows of the batch at a time, and those alone whose texts are of one length.

    The groups of a condition are the same objects for as long as it is, so that a network knows them again. The times
    of each are a part of the times of all, by which a network knows how many rows there are in all.
    """
    last: list[tuple[Condition, list[tuple[Rows, Condition]]]] = []

    def grouped(x: Array, time: Array, condition: Condition) -> Array:
        if len(x) <= rows and condition.mask is None:
            return network(x, time, condition)
        if not last or last[0][0] is not condition:
            last[:] = [(condition, list(groups(condition, len(x), rows)))]
        places, conditions = zip(*last[0][1], strict=True)
        outs = [
            network(x[part], own, shown)
            for part, own, shown in zip(places, parts_of(time, places), conditions, strict=True)
        ]
        return in_order(outs, places)

    return grouped


@dataclass(eq=False)
class Kept:
    """What was computed of the latest conditions, by name, within `room` bytes; used longest ago goes first.

    A walk uses its groups of rows in turn, at every step. Of one that does not fit, each would make the other go before
    its next turn: what this step or the one before it used therefore stays, and the rest is not kept.
    """

    room: int = TOLD
    _held: list[tuple[Any, dict[str, Array], int]] = field(default_factory=list)  # key, arrays, step of the last use
    _step: int = 0
    _mark: Any = None

    def at(self, mark: Any) -> None:
        """A network is evaluated at a step, which `mark` tells from the one before."""
        if mark != self._mark:
            self._step, self._mark = self._step + 1, mark

    def find(self, same: Callable[[Any], bool]) -> dict[str, Array] | None:
        """What is kept under the key that is the same."""
        for place, (key, arrays, _) in enumerate(self._held):
            if same(key):
                del self._held[place]
                self._held.insert(0, (key, arrays, self._step))
                return arrays
        return None

    def keep(self, key: Any, arrays: dict[str, Array]) -> None:
        """Keep it if there is room, or room can be made."""
        room = self.room - _bytes(arrays)
        while self._held and self.bytes > room >= 0 and self._held[-1][2] < self._step - 1:
            self._held.pop()
        if self.bytes <= room:
            self._held.insert(0, (key, arrays, self._step))

    @property
    def bytes(self) -> int:
        """How many are kept."""
        return sum(_bytes(arrays) for _, arrays, _ in self._held)


def _bytes(arrays: Mapping[str, Array]) -> int:
    return sum(int(each.nbytes) for each in arrays.values())


def of_one_walk(network: Network) -> Network:
    """The network that computes but once what is the same at every step of a walk; itself where it cannot."""
    walk = getattr(network, "walk", None)
    return network if walk is None else walk()


def caching(cached: Callable[[int], Network] | None, every: int) -> Network:
    """The network of one walk that keeps deep features. Raises InputError where there is none."""
    if cached is None:
        raise InputError("feature_cache needs the torch engine, and a U-Net of two levels or more")
    return cached(every)


def encoded(encode: Callable[[Array], Sequence[Array]], ids: Array) -> list[Array]:
    """The outputs of a text encoder for ids (N, L), `TEXTS` chunks at a time."""
    parts = [encode(ids[first : first + TEXTS]) for first in range(0, len(ids), TEXTS)]
    if len(parts) == 1:
        return list(parts[0])
    xp = namespace(parts[0][0])
    return [xp.concat(column, axis=0) for column in zip(*parts, strict=True)]


def decoded(decode: Callable[[Array], Array], latents: Array, rows: int, tile: int | None = None) -> Iterator[Array]:
    """Pixels (B', 3, H, W) of `rows` latents (B, C, h, w) after the other; tile: the side in latents, None is whole."""
    for first in range(0, len(latents), rows):
        group = latents[first : first + rows]
        yield decode(group) if tile is None or max(group.shape[2:]) <= tile else tiled(decode, group, tile)


def tiled(decode: Callable[[Array], Array], latents: Array, tile: int) -> Array:
    """Pixels (B, 3, H, W) from tiles of `tile` latents a side, a quarter shared with each neighbour and blended.

    The tiles and the linear blend are those of diffusers' `enable_tiling`. What differs from the whole picture is that
    the decoder's normalisation and attention see a tile only.
    """
    xp = namespace(latents)
    height, width = latents.shape[2:]
    stride = int(tile * (1 - OVERLAP))
    above: list[Array] = []
    bands = []
    for top in range(0, height, stride):
        row: list[Array] = []
        blended: list[Array] = []
        for place, left in enumerate(range(0, width, stride)):
            part = latents[:, :, top : top + tile, left : left + tile]
            pixels = decode(part)
            factor = pixels.shape[2] // part.shape[2]
            extent, kept = int(tile * factor * OVERLAP), tile * factor - int(tile * factor * OVERLAP)
            if above:
                pixels = _blend(above[place], pixels, extent, axis=2)
            if row:
                pixels = _blend(row[-1], pixels, extent, axis=3)
            row.append(pixels)
            blended.append(pixels[:, :, :kept, :kept])
        above = row
        bands.append(xp.concat(blended, axis=3))
    return xp.concat(bands, axis=2)


def _blend(before: Array, after: Array, extent: int, axis: int) -> Array:
    """`after`, its first `extent` lines along the axis fading in over the last ones of `before`."""
    xp = namespace(after)
    extent = min(before.shape[axis], after.shape[axis], extent)
    shape = [1] * 4
    shape[axis] = extent
    ramp = xp.reshape(xp.arange(extent, dtype=after.dtype, device=after.device) / extent, shape)
    lines = [slice(None)] * 4
    ends, starts, rest = (
        (*lines[:axis], part, *lines[axis + 1 :])
        for part in (slice(before.shape[axis] - extent, None), slice(extent), slice(extent, None))
    )
    faded = before[ends] * (1 - ramp) + after[starts] * ramp
    return xp.concat([faded, after[rest]], axis=axis)


def tile_of(vae: Mapping[str, Any], factor: int, height: int, width: int, tiling: bool | None) -> int | None:
    """The side of a tile in latents, what the autoencoder was trained on; None where the picture is decoded whole.

    tiling: None is tiles for pictures of more than `WHOLE` pixels.
    """
    if tiling is False or (tiling is None and height * width <= WHOLE):
        return None
    return max(int(vae.get("sample_size") or 512) // factor, 8)


def pictures_at_a_time(batch: SupportsIndex | str, need: int, count: int, device: Any = "cpu") -> int:
    """How many pictures are computed at a time. batch: a number, or "auto", by memory.

    need: bytes of one picture. count: pictures in all. Raises InputError for anything else.
    """
    if isinstance(batch, str) and batch == "auto":
        on_host = str(device).partition(":")[0] == "cpu"
        fit = int(SHARE * free_bytes(device)) // max(need, 1)
        return max(1, min(fit, count, MOST if on_host else count))
    try:
        return min(whole("the batch", batch, 1), count)
    except InputError as error:
        raise InputError(f"the batch is {shown(batch)}; it must be 'auto' or a whole number, 1 or more") from error


def free_bytes(device: Any = "cpu") -> int:
    """Memory that can be had: what is free on a GPU, or what Linux says is available, within its control groups.

    What torch holds of a GPU and does not use is free; so is what a group holds of files that were read.
    """
    if str(device).startswith("cuda") and "torch" in sys.modules:
        cuda = sys.modules["torch"].cuda
        return int(cuda.mem_get_info(device)[0] + cuda.memory_reserved(device) - cuda.memory_allocated(device))
    found = [*_free_in_groups()]
    if "MemAvailable" in (told := _numbers(PROC / "meminfo")):
        found.append(told["MemAvailable"] * 1024)
    return min(found, default=UNKNOWN)


def _free_in_groups() -> Iterator[int]:
    """The bytes that are left of the limit of each control group this process is in, of either version."""
    for line in _text(PROC / "self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        root, names = (GROUPS, SECOND_GROUP) if number == "0" else (GROUPS / "memory", FIRST_GROUP)
        group = root / path.lstrip("/")
        for place in (each for each in (group, *group.parents) if each.is_relative_to(root)):
            limit, used = (_text(place / name).strip() for name in names[:2])
            if limit.isdecimal() and used.isdecimal():
                cached = _numbers(place / "memory.stat").get(names[2], 0)
                yield max(int(limit) - max(int(used) - cached, 0), 0)


def _numbers(file: Path) -> dict[str, int]:
    """The numbers that a file of Linux's tells, by name."""
    rows = (line.replace(":", " ").split() for line in _text(file).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _text(file: Path) -> str:
    """What a file holds; nothing where it cannot be read."""
    try:
        return file.read_text()
    except OSError:
        return ""


def need_of(
    unet: Mapping[str, Any], vae: Mapping[str, Any], height: int, width: int, guided: bool, tokens: int = 77
) -> int:
    """Bytes of activations of one picture of height × width latents, float32: the larger of U-Net and decoder.

    An estimate from the configs: of the U-Net the skip connections and, at the level where it is largest, what one
    layer holds at a time, attention's scores included up to `PLAIN` places; of the decoder its widest level at the full
    size, and the scores of its one attention; both times `MARGIN` (measured of weights/icons in ONNX Runtime: 4.5 MiB a
    picture where 5.1 are estimated). Added are the keys and values of a text of so many tokens, which are held all the
    while (2.5 MiB there).
    """
    widths = [int(width_) for width_ in unet["block_out_channels"]]
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim") or 8
    layers = unet.get("layers_per_block") or 2
    skips = largest = 0
    for level, channels in enumerate(widths):
        area = -(-height // 2**level) * -(-width // 2**level)
        deep = int(layers if isinstance(layers, int) else layers[level])
        skips += (deep + 1) * channels * area
        attends = "CrossAttn" in str((unet.get("down_block_types") or ["CrossAttn"] * len(widths))[level])
        held = attends and area <= PLAIN
        scores = 2 * int(heads if isinstance(heads, int) else heads[level]) * area**2 if held else 0
        largest = max(largest, 14 * channels * area + scores)
    sides = [int(width_) for width_ in vae["block_out_channels"]]
    scale = 4 ** (len(sides) - 1)
    pixels = 4 * max(sides[:2]) * height * width * scale + 2 * (height * width) ** 2
    rows = 2 if guided else 1
    return round(4 * MARGIN) * max(rows * (skips + largest), pixels) + rows * told_bytes(unet, tokens)


def told_bytes(unet: Mapping[str, Any], tokens: int) -> int:
    """Bytes of the keys and values of all cross-attention layers for one text of so many tokens, float32."""
    widths = [int(width) for width in unet["block_out_channels"]]

    def every(one: Any) -> list[Any]:
        return [one] * len(widths)

    kinds = [unet.get(f"{way}_block_types") or every("CrossAttn") for way in ("down", "up")]
    deep = unet.get("transformer_layers_per_block") or 1
    back = unet.get("reverse_transformer_layers_per_block")  # the way up, from the deepest level on
    layers, depths, climbs = (
        [each if isinstance(each, int) else max(each) for each in (told if isinstance(told, Sequence) else every(told))]
        for told in (unet.get("layers_per_block") or 2, deep, list(reversed(back)) if back else deep)
    )
    middle = str(unet.get("mid_block_type", "CrossAttn"))
    numbers = depths[-1] * widths[-1] if "CrossAttn" in middle else 0
    for level, width in enumerate(widths):
        down, up = ("CrossAttn" in str(types[place]) for types, place in zip(kinds, (level, -1 - level), strict=True))
        numbers += (down * layers[level] * depths[level] + up * (layers[level] + 1) * climbs[level]) * width
    return 2 * 4 * tokens * numbers
