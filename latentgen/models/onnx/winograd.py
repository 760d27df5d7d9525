"""3×3 convolutions with fewer multiplications: Winograd's F(m×m, 3×3), Lavin & Gray 2016 (arXiv:1509.09308).

Tiles of m×m outputs come from (m + 2)×(m + 2) inputs through as many products, where computing each output by itself
takes 9 m²: 2.25 times as many for m = 2, 4 times for m = 4. A network's graph is rewritten when it is made ready for
this CPU; what lies beside the weights stays as it is. All of it is ONNX Runtime's own operators: the transforms are
products with small matrices, in channels-last form, the products themselves one grouped 1×1 convolution. The price is
memory, (m + 2)² / 9 of the weights and the tiles themselves, so both are bounded, and a last digit or so (a test).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.5**0.5, -(0.5**0.5), 2.0**0.5, -(2.0**0.5))}  # and infinity
BLOCK = 16  # channels are a multiple of it, as ONNX Runtime's blocks of channels are of 8 or 16
ROWS = 2  # at a time: a guided picture's
READ, MOVED = 40, 200  # what reading a weight, and moving a number of a transform, costs in operations
LOADED = 10  # what a byte of weights costs: 200 to be hashed and mapped, in a process of 20 evaluations
BUFFER = 32 << 20  # bytes that the tiles of one may take, of which some copies are held at once
LEAST = 0.05  # of all that such convolutions cost: less is not saved at all
SHARE, FREE = 1 / 8, 48 << 20  # of all weights, and in bytes in any case, what the larger ones may take besides
INT64 = np.int64
USUAL: dict[str, Any] = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1}  # where nothing is said
KEPT = USUAL | {"pads": [1] * 4, "kernel_shape": [3, 3]}  # keeps the size
RESHAPING = ("AveragePool", "ConvTranspose", "DepthToSpace", "MaxPool", "Pad", "SpaceToDepth", "Slice", "Tile")


class Matrices(NamedTuple):
    """y = out · [(kernel · g) ⊙ (into · d)] is the correlation of d (m + 2) with g (3): m values; in float64.

    one: numbers whose transform is all ones, (m + 2): out · one = 1.
    """

    into: np.ndarray
    kernel: np.ndarray
    out: np.ndarray
    one: np.ndarray


@cache
def matrices(m: int) -> Matrices:
    """Toom and Cook's, by evaluation at `POINTS[m]` and infinity; transposed, a product becomes a correlation.

    The points for m = 4 are ±√½ and ±√2: a fifth of the error of ±1 and ±2.
    """
    points = np.array(POINTS[m])

    def values(count: int) -> np.ndarray:  # of a polynomial of so many coefficients
        return np.vstack([points[:, None] ** np.arange(count), np.eye(count)[-1:]])

    out = values(m).T
    return Matrices(np.linalg.inv(values(m + 2)).T, values(3), out, np.linalg.pinv(out) @ np.ones(m))


def transformed(weight: np.ndarray, m: int) -> np.ndarray:
    """A convolution's weights (O, I, 3, 3) for tiles of m, float32 ((m + 2)² · O, I, 1, 1)."""
    kernel = matrices(m).kernel
    both = np.kron(kernel, kernel)
    found = np.empty((len(both), *weight.shape[:2]), np.float32)
    for k in range(0, len(weight), 64):  # in float64 a few at a time
        part = weight[k : k + 64].reshape(-1, 9).astype(np.float64)
        found[:, k : k + 64] = (both @ part.T).reshape(len(both), -1, weight.shape[1])
    return found.reshape(-1, weight.shape[1], 1, 1)


class Level(NamedTuple):
    """Where tensors have the same sides: how often these were halved, and since which enlargement (a tensor's name).

    A U-Net enlarges to the sides of what it joins, which is said in numbers; what is just doubled can have others.
    """

    halved: int
    since: str = ""


@dataclass(frozen=True)
class Found:
    """A convolution that can be rewritten: its node, the tensor that holds its weights, channels, and its place."""

    node: Any
    tensor: Any
    outputs: int
    inputs: int
    level: Level
    side: int  # as far as the config says

    def more(self, m: int) -> int:
        """How many bytes its weights take besides in tiles of m; 1 is the convolution as it is."""
        return 4 * self.outputs * self.inputs * ((m + 2) ** 2 - 9)

    def buffer(self, m: int) -> int:
        """How many bytes its tiles of m take."""
        return int(4 * ROWS * self.side**2 * ((m + 2) / m) ** 2 * max(self.outputs, self.inputs))

    def cost(self, m: int) -> float:
        """About how long it takes in tiles of m, in operations. By measurements on two cores with AVX512."""
        weights, places, spread = self.outputs * self.inputs, ROWS * self.side**2, ((m + 2) / m) ** 2
        cost = 2 * spread * places * weights + READ * (m + 2) ** 2 * weights
        if m > 1:
            across = (m + 2) * self.side / m  # rows of the matrices that make tiles of a side
            cost += MOVED * spread * places * (self.inputs + self.outputs)
            cost += 2 * places * self.inputs * across * (2 + 2 / m)
        return cost


def rewrite(made: Any, side: int) -> dict[str, int]:
    """Rewrite those convolutions of a network's graph, an ONNX model, that are worth it.

    side: of what comes in, at the size the network was trained at; any other is computed as well. Returns by the
    tensors' names m: their values are to be `transformed`, and are then the weights of the name that `weights_name`
    gives.
    """
    graph = made.graph
    found = list(_convolutions(graph, side))
    stored = sum(4 * prod(tensor.dims) for tensor in graph.initializer)
    tiles = _chosen(found, max(FREE, int(SHARE * stored)))
    writer = _Writer()
    chosen = {each.node.output[0]: each for each in found if each.tensor.name in tiles}
    for node in list(graph.node):
        each = chosen.get(node.output[0])
        if each is None:
            writer.nodes.append(node)
        else:
            writer.convolution(each, tiles[each.tensor.name])
    del graph.node[:]
    graph.node.extend(writer.nodes)
    return tiles


def _chosen(found: Sequence[Found], left: int) -> dict[str, int]:
    """Of which tensors the weights are for which tiles: first what saves most for a byte, until none are left."""
    offers = []
    for k, each in enumerate(found):
        for before, m in ((1, 2), (1, 4), (2, 4)):
            saved, more = each.cost(before) - each.cost(m), each.more(m) - each.more(before)
            if saved > LOADED * more and each.buffer(m) <= BUFFER:
                offers.append((saved / more, more, k, before, m))
    now = [1] * len(found)
    for _, more, k, before, m in sorted(offers, key=lambda offer: -offer[0]):
        if now[k] == before and more <= left:
            now[k], left = m, left - more
    saved = sum(each.cost(1) - each.cost(m) for each, m in zip(found, now, strict=True))
    if saved < LEAST * sum(each.cost(1) for each in found):
        return {}
    return {each.tensor.name: m for each, m in zip(found, now, strict=True) if m > 1}


def weights_name(name: str) -> str:
    """What the transformed weights of a tensor are called."""
    return f"{name}:tiles"


def _convolutions(graph: Any, side: int) -> Iterator[Found]:
    """The 3×3 convolutions that keep the size, whose weights nothing else reads and whose level is known."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    source = {node.output[0]: node for node in graph.node}
    readers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    levels = {value.name: Level(0) for value in graph.input if value.name == "sample"}
    for node in graph.node:
        known = [levels[name] for name in node.input if name in levels]
        if not known or node.op_type == "Shape":
            continue
        told = {each.name: (list(each.ints) or each.i) for each in node.attribute}
        level = _level(node, told, known[0])
        if level is None:
            continue
        levels.update(dict.fromkeys(node.output, level))
        if node.op_type != "Conv" or not _is(KEPT, told):
            continue
        weight = node.input[1]
        cast = source.get(weight)
        tensor = tensors.get(cast.input[0] if cast is not None and cast.op_type == "Cast" else weight)
        if tensor is None or not tensor.external_data or {readers[weight], readers[tensor.name]} != {1}:
            continue
        outputs, inputs, *kernel = tensor.dims
        if kernel == [3, 3] and outputs % BLOCK == inputs % BLOCK == 0:
            yield Found(node, tensor, outputs, inputs, level, int(side / 2**level.halved))


def _level(node: Any, told: Mapping[str, Any], level: Level) -> Level | None:
    """The level of what a node makes of a level; None where it is not known."""
    if node.op_type == "Conv":
        kept = (KEPT, KEPT | {"kernel_shape": [1, 1], "pads": [0] * 4})
        if any(_is(form, told) for form in kept):
            return level
        return level._replace(halved=level.halved + 1) if _is(KEPT | {"strides": [2, 2]}, told) else None
    if node.op_type == "Resize":
        by_sides = len(node.input) > 3 and node.input[3]
        return Level(level.halved - 1, level.since if by_sides else node.output[0])
    return None if node.op_type in RESHAPING else level


def _is(form: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    """Whether a convolution's attributes, as far as they are said, are of a form."""
    return all(told.get(name, USUAL.get(name)) == value for name, value in form.items())


@dataclass
class _Writer:
    """The nodes of a graph that is written anew, and what of them is shared: sizes and matrices of each level."""

    nodes: list[Any] = field(default_factory=list)
    shared: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def convolution(self, each: Found, m: int) -> None:
        """x (B, I, h, w) -> (B, O, h, w), as the node it stands for."""
        x, y, n = each.node.input[0], each.node.output[0], (m + 2) ** 2
        level = self.level(x, each.level)
        height, width = (self.tiles(level, axis, m) for axis in "hw")
        add = _Named(self, y)
        # (B, I, h, w) -> (B, h, w I): channels last; then along h, and along w: (B tiles, 1, r, w, I), (.., r, r, I)
        flat = add("Transpose", add("Reshape", x, self.given([0, each.inputs, -1])), perm=[0, 2, 1])
        rows = add("Reshape", flat, self.target("rows", level, [0, "h", -1]))
        down = add("MatMul", self.matrix(level, "h", m), rows)
        along = add("Reshape", down, self.target("along", level, [-1, 1, m + 2, "w", each.inputs]))
        both = add("Reshape", add("MatMul", self.matrix(level, "w", m), along), self.given([1, 1, -1, n * each.inputs]))
        # the products, as many groups as there are places in a tile: (1, n I, 1, tiles) -> (1, n O, 1, tiles)
        inputs = [add("Transpose", both, perm=[0, 3, 1, 2]), weights_name(each.tensor.name)]
        inputs += [self.bias(name, m) for name in each.node.input[2:]]
        products = add("Transpose", add("Conv", *inputs, group=n, kernel_shape=[1, 1]), perm=[0, 2, 3, 1])
        # back: (tiles, n, O) -> (tiles, m m, O) -> (B, h, w, O), of which what lies beyond the edge goes
        out = np.kron(matrices(m).out, matrices(m).out).astype(np.float32)
        outs = add("MatMul", self.given(out), add("Reshape", products, self.given([-1, n, each.outputs])))
        outs = add("Reshape", outs, self.target("outs", level, [-1, width, m, m * each.outputs]))
        outs = add("Transpose", outs, perm=[0, 2, 1, 3])
        whole = add("Reshape", outs, self.target("whole", level, [-1, (height, m), (width, m), each.outputs]))
        ends = self.target("ends", level, ["h", "w"])
        cut = add("Slice", whole, self.given([0, 0]), ends, self.given([1, 2]))
        last = add("Transpose", add("Reshape", cut, self.given([0, -1, each.outputs])), perm=[0, 2, 1])
        self.node("Reshape", [last, self.target("back", level, [0, 0, "h", "w"])], y)

    def level(self, x: str, level: Level) -> str:
        """Sizes of a level, by the first tensor that is there; how they are called."""
        name = f"winograd:{level.halved}:{level.since}"
        if ("level", level) not in self.shared:
            self.shared["level", level] = name
            for axis, start in (("h", 2), ("w", 3)):
                self.node("Shape", [x], f"{name}:{axis}", start=start, end=start + 1)
        return name

    def tiles(self, level: str, axis: str, m: int) -> str:
        """How many tiles of m an axis of a level has, (1,)."""
        key = f"{level}:{axis}:{m}"
        if ("tiles", key) not in self.shared:
            self.shared["tiles", key] = key
            self.node("Add", [f"{level}:{axis}", self.given([m - 1])], f"{key}:up")
            self.node("Div", [f"{key}:up", self.given([m])], key)
        return key

    def matrix(self, level: str, axis: str, m: int) -> str:
        """What takes an axis of a level to its tiles' transforms: for h (tiles r, h), for w (1, tiles, 1, r, w)."""
        tiles, r = self.tiles(level, axis, m), m + 2
        key = f"{tiles}:matrix"
        if ("matrix", key) in self.shared:
            return key
        self.shared["matrix", key] = key
        add = _Named(self, key)
        zero, one = (self.given(np.array(value, INT64)) for value in (0, 1))
        places, starts = (
            add("Range", zero, add("Squeeze", size, self.given([0])), one) for size in (f"{level}:{axis}", tiles)
        )
        firsts = add("Unsqueeze", add("Mul", starts, self.given([m])), self.given([1]))
        at = add("Add", add("Sub", places, firsts), self.given([2]))  # 1 is a tile's first place, r its last
        table = np.zeros((r + 2, r), np.float32)
        table[1:-1] = matrices(m).into.T
        rows = add("Clip", at, zero, self.given(np.array(r + 1, INT64)))
        found = add("Transpose", add("Gather", self.given(table), rows), perm=[0, 2, 1])  # (tiles, r, places)
        shape: list[Any] = [-1, axis] if axis == "h" else [1, -1, 1, r, axis]
        self.node("Reshape", [found, self.target("matrix", level, shape)], key)
        return key

    def target(self, name: str, level: str, parts: Sequence[Any]) -> str:
        """A shape: numbers, "h" and "w" of a level, how many tiles an axis has, and (those, times)."""
        key = ("target", name, level, *parts)
        if key not in self.shared:
            self.shared[key] = f"{level}:{name}:{len(self.shared)}"
            add = _Named(self, self.shared[key])
            terms = []
            for part in parts:
                if isinstance(part, int):
                    terms.append(self.given([part]))
                elif isinstance(part, tuple):
                    terms.append(add("Mul", part[0], self.given([part[1]])))
                else:
                    terms.append(f"{level}:{part}" if part in ("h", "w") else part)
            self.node("Concat", terms, self.shared[key], axis=0)
        return self.shared[key]

    def bias(self, name: str, m: int) -> str:
        """A bias (O,) among the products ((m + 2)² O,), so that each output has it once."""
        key = f"{name}:tiles:{m}"
        if ("bias", key) not in self.shared:
            self.shared["bias", key] = key
            one = matrices(m).one
            spread = _Named(self, key)("Mul", self.given(np.kron(one, one).astype(np.float32)[:, None]), name)
            self.node("Reshape", [spread, self.given([-1])], key)
        return key

    def given(self, value: Any) -> str:
        """A constant."""
        from onnx import numpy_helper

        array = np.asarray(value, None if isinstance(value, np.ndarray) else INT64)
        key = ("given", array.dtype.str, array.shape, array.tobytes())
        if key not in self.shared:
            self.shared[key] = f"winograd:{len(self.shared)}"
            self.node("Constant", [], self.shared[key], value=numpy_helper.from_array(array))
        return self.shared[key]

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        """One more node."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))


@dataclass
class _Named:
    """Nodes of which nobody else needs the names."""

    writer: _Writer
    start: str
    count: int = 0

    def __call__(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """One more node, its output's name."""
        self.count += 1
        name = f"{self.start}:{self.count}"
        self.writer.node(kind, inputs, name, **attributes)
        return name
