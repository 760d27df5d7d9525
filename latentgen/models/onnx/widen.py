"""Weights as float32 in a file, tensor by tensor, before ONNX Runtime makes a graph ready.

Left to itself it widens and turns them one after the other in memory and keeps the most of both: 2.2 times what the
weights take in float32. Weights that lie widened on the disk are mapped, and it needs 1.2 times. Convolutions that are
computed in tiles (winograd.py) have their weights transformed on the way.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentgen.models.onnx.ready import WIDE
from latentgen.models.onnx.winograd import rewrite, transformed, weights_name

FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16  # of ONNX's TensorProto, which is slow to import
ALIGNED = 64  # bytes


def widened(graph: bytes, weights: Path, folder: Path, fused: Path | None = None, side: int | None = None) -> bytes:
    """The graph with each weight outside it, and the Cast and the Transpose that follow, as one of float32.

    weights: the folder of the graph's external data; fused: the file of what of it lies elsewhere; folder: where `WIDE`
    is written; side: as `rewrite` takes it, None of a network whose convolutions stay. Raises OSError or ValueError
    where the files do not hold what the graph says.
    """
    import onnx

    made = onnx.load_model_from_string(graph)
    tiles = rewrite(made, side) if side is not None else {}
    users: dict[str, list[Any]] = defaultdict(list)
    for node in made.graph.node:
        for name in node.input:
            users[name].append(node)
    outputs = {value.name for value in made.graph.output}
    kept, said = [], set()  # what is an initializer then; the names that nodes need not compute any more
    with (folder / WIDE).open("wb") as file:
        for tensor in made.graph.initializer:
            if not tensor.external_data:
                kept.append(tensor)
                continue
            name = tensor.name
            values = _values(tensor, weights, fused)
            if tensor.data_type != FLOAT:
                if not _is_cast(users[name]):
                    raise ValueError(f"{name} is of half precision and is not widened")
                name = users[name][0].output[0]
                said.add(name)
            if name not in outputs and [node.op_type for node in users[name]] == ["Transpose"]:
                (turn,) = users[name]
                values, name = values.transpose(_order(turn, values.ndim)), turn.output[0]
                said.add(name)
            if tensor.name in tiles:
                values, name = transformed(values, tiles[tensor.name]), weights_name(tensor.name)
            file.write(bytes(-file.tell() % ALIGNED))
            start = file.tell()
            file.write(np.ascontiguousarray(values).tobytes())
            kept.append(_outside(name, values, start))
    nodes = [node for node in made.graph.node if not said & set(node.output)]
    del made.graph.node[:], made.graph.initializer[:]
    made.graph.node.extend(nodes)
    made.graph.initializer.extend(kept)
    whole: bytes = made.SerializeToString()
    return whole


def in_tiles(
    graph: bytes, weights: Path, fused: Path | None = None, side: int | None = None
) -> tuple[bytes, dict[str, np.ndarray]]:
    """The graph as `widened` computes it, for where nothing can be written; and the weights it then needs, by name.

    All others stay where they are.
    """
    if side is None:
        return graph, {}
    import onnx

    made = onnx.load_model_from_string(graph)
    tiles = rewrite(made, side)
    given, kept = {}, []
    for tensor in made.graph.initializer:
        if tensor.name in tiles:
            name = weights_name(tensor.name)
            given[name] = transformed(_values(tensor, weights, fused), tiles[tensor.name])
            kept.append(_outside(name, given[name], 0))
        else:
            kept.append(tensor)
    nodes = [node for node in made.graph.node if node.op_type != "Cast" or node.input[0] not in tiles]
    del made.graph.node[:], made.graph.initializer[:]
    made.graph.node.extend(nodes)
    made.graph.initializer.extend(kept)
    return made.SerializeToString(), given


def _values(tensor: Any, weights: Path, fused: Path | None) -> np.ndarray:
    """The values of a tensor outside the graph as float32."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    outer = fused if fused is not None and place["location"] == fused.name else weights / place["location"]
    return wide(_mapped(outer, place), tensor.data_type).reshape(tuple(tensor.dims))


def _outside(name: str, values: np.ndarray, start: int) -> Any:
    """A tensor of float32 that lies in `WIDE`."""
    import onnx

    tensor = onnx.TensorProto(name=name, data_type=FLOAT, dims=values.shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", WIDE), ("offset", start), ("length", values.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def wide(raw: np.ndarray, kind: int) -> np.ndarray:
    """Stored bytes as float32 numbers; kind: of ONNX's TensorProto, one of the three."""
    if kind == BFLOAT16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f4" if kind == FLOAT else "<f2").astype(np.float32)


def _is_cast(nodes: Sequence[Any]) -> bool:
    """Whether all that is done with a weight is to widen it."""
    if [node.op_type for node in nodes] != ["Cast"]:
        return False
    return any(each.name == "to" and each.i == FLOAT for each in nodes[0].attribute)


def _order(node: Any, count: int) -> list[int]:
    """The axes of a Transpose; without any they are turned round."""
    axes = [list(each.ints) for each in node.attribute if each.name == "perm"]
    return axes[0] if axes else list(reversed(range(count)))


def _mapped(file: Path, place: dict[str, str]) -> np.ndarray:
    start, length = int(place.get("offset", 0)), int(place.get("length", 0))
    return np.memmap(file, np.uint8, "r", start, (length or file.stat().st_size - start,))
