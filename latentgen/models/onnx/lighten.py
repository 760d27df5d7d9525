"""What a U-Net's graph computes at every step, made less: the same numbers from fewer nodes.

Attention is one node of ONNX Runtime's own. Targets of reshapes are constants where they can be said so, and what
counted them goes. What depends on the text alone (cross-attention's keys and values, pooled text) is a graph of its
own, to be computed once for all steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from latentgen.models.onnx.session import WEIGHTS_FOLDER, give_weights

EACH_STEP = ("sample", "timestep")  # a U-Net's inputs that change from step to step
CONTRIB = "com.microsoft"


class MultiHead(torch.autograd.Function):
    """Attention as one node: com.microsoft.MultiHeadAttention."""

    @staticmethod
    def forward(
        _: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, scale: float
    ) -> torch.Tensor:
        """(B, N, D), (B, L, D), (B, L, D) -> (B, N, D)."""
        q, k, v = (each.reshape(*each.shape[:2], heads, -1).transpose(1, 2) for each in (query, key, value))
        return functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)

    @staticmethod
    def symbolic(graph: Any, query: Any, key: Any, value: Any, heads: int, scale: float) -> Any:
        """The node."""
        node = graph.op(f"{CONTRIB}::MultiHeadAttention", query, key, value, num_heads_i=heads, scale_f=scale)
        node.setType(query.type())
        return node


class OneNodeAttention:
    """A diffusers attention processor whose attention is one node."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        """(B, N, D)[, (B, L, E)] -> (B, N, D)."""
        told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(told), attn.to_v(told)
        mixed = MultiHead.apply(query, key, value, attn.heads, float(attn.scale))  # type: ignore[no-untyped-call]
        found: torch.Tensor = attn.to_out[0](mixed)
        return found


def attend_in_one_node(network: Any) -> None:
    """Give each plain attention layer of a module the processor above; others keep theirs."""
    for layer in network.modules():
        if hasattr(layer, "set_processor") and hasattr(layer, "to_q") and _is_plain(layer):
            layer.set_processor(OneNodeAttention())


def _is_plain(layer: Any) -> bool:
    extras = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")
    none = all(getattr(layer, name, None) in (None, False) for name in extras)
    return none and not layer.residual_connection and float(layer.rescale_output_factor) == 1.0


# --- reshapes


def say_reshapes(
    made: onnx.ModelProto,
    weights: Path,
    probes: Sequence[Mapping[str, np.ndarray]],
    changed: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Give each Reshape a constant target where one gives the same shape for all probes, and drop what is then unused.

    A target's entry is a number that is always the same, 0 (the input's own entry at that place), or, once, −1.
    weights: the folder of the external data. probes: inputs whose free axes all differ. changed: weights by name that
    stand in no file.
    """
    graph = made.graph
    held = {tensor.name for tensor in graph.initializer}
    reshapes = [node for node in graph.node if node.op_type == "Reshape" and node.input[1] not in held]
    seen = [_shapes(made, weights, reshapes, probe, changed or {}) for probe in probes]
    said = []
    for k, node in enumerate(reshapes):
        target = _target([found[k] for found in seen])
        if target is not None:
            node.input[1] = f"{node.output[0]}:target"
            value = numpy_helper.from_array(np.array(target, np.int64))
            said.append(helper.make_node("Constant", [], [node.input[1]], value=value))
    nodes = [*said, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    prune(graph)


def _shapes(
    made: onnx.ModelProto,
    weights: Path,
    reshapes: Sequence[onnx.NodeProto],
    probe: Mapping[str, np.ndarray],
    changed: Mapping[str, np.ndarray],
) -> list[tuple[list[int], list[int]]]:
    """The shapes that come into each Reshape and those asked of it, as one probe has them."""
    asked = onnx.ModelProto()
    asked.CopyFrom(made)
    names = []
    for k, node in enumerate(reshapes):
        asked.graph.node.append(helper.make_node("Shape", [node.input[0]], [f"into:{k}"]))
        asked.graph.node.append(helper.make_node("Identity", [node.input[1]], [f"asked:{k}"]))
        names += [f"into:{k}", f"asked:{k}"]
    asked.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(WEIGHTS_FOLDER, str(weights.resolve()))
    given = give_weights(options, changed)
    session = onnxruntime.InferenceSession(asked.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = [[int(side) for side in values] for values in session.run(names, dict(probe))]
    del session, given  # in this order
    return list(zip(found[::2], found[1::2], strict=True))


def _target(seen: Sequence[tuple[list[int], list[int]]]) -> list[int] | None:
    """A constant target that fits all; None where there is none."""
    target = []
    for place in range(len(seen[0][1])):
        wanted = [asked[place] for _, asked in seen]
        own = [into[place] if place < len(into) else None for into, _ in seen]
        if len(set(wanted)) == 1 and wanted[0] != 0:
            target.append(wanted[0])
        else:
            target.append(0 if own == wanted else -1)
    return target if target.count(-1) <= 1 else None


def prune(graph: onnx.GraphProto) -> None:
    """Drop the nodes and initializers that no output needs."""
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input) - {""}
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(weights)


# --- what depends on the text alone


def split_text(made: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A U-Net's graph in two: from the text what each step needs of it, and the step.

    The first's outputs are the second's inputs, under the same names, beside `EACH_STEP`.
    """
    graph = made.graph
    inputs = [value.name for value in graph.input]
    told = set(inputs) - set(EACH_STEP)  # tensors that depend on the text and on nothing that changes
    changing = set(EACH_STEP) & set(inputs)
    for node in graph.node:
        if changing & set(node.input) or (node.op_type == "Shape" and told & set(node.input)):
            changing |= set(node.output)
        elif told & set(node.input):
            told |= set(node.output)
    handed = list(dict.fromkeys(name for name in _read(graph, changing) if name in told))
    text, step = onnx.ModelProto(), onnx.ModelProto()
    for part, given, out in (
        (text, [name for name in inputs if name in told], handed),
        (step, [name for name in inputs if name in changing], None),
    ):
        part.CopyFrom(made)
        kept = [value for value in graph.input if value.name in given]
        del part.graph.input[:]
        part.graph.input.extend(kept)
        if out is None:
            part.graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in handed)
            nodes = [node for node in part.graph.node if not told & set(node.output)]
            del part.graph.node[:]
            part.graph.node.extend(nodes)
        else:
            del part.graph.output[:]
            part.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in out)
        prune(part.graph)
    return text, step


def _read(graph: onnx.GraphProto, changing: set[str]) -> Iterator[str]:
    """What the nodes of the step read."""
    for node in graph.node:
        if changing & set(node.output):
            yield from node.input
