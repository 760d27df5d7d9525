"""Networks to ONNX graphs that hold no weights: each initializer is a place inside the folder's own safetensors.

A safetensors file is a header and then raw bytes, so a tensor there is an ONNX external tensor at an offset. What is
stored in half precision stays so on the disk: a Cast follows it, and ONNX Runtime computes the float32 constant once,
when it loads the graph. What stands in no file (few small constants) is held by the graph itself; weights that LoRAs
changed lie in a safetensors file of their own beside it, as a graph of more than 2 GB cannot be saved.
"""

import hashlib
import io
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from latentgen.checkpoint import Checkpoint, check_safetensors, open_folder
from latentgen.checkpoint.tensors import save_tensors
from latentgen.checkpoint.write import TEXT
from latentgen.durable import sha256, write_file
from latentgen.models.loading import load_module, quiet
from latentgen.models.lora.layers import module_loras
from latentgen.models.onnx.lighten import attend_in_one_node, say_reshapes, split_text
from latentgen.models.onnx.places import (
    CHANGED,
    GRAPHS,
    LAYOUT,
    SECOND,
    TOLD,
    cache_folder,
    fused_folder,
    graph_paths,
    layout,
    skipping_path,
    weights_folder,
)
from latentgen.models.onnx.session import FUSED, OUTSIDE
from latentgen.models.onnx.widen import wide
from latentgen.models.text import states_of

OPSET = 18
NOWHERE = "changed"  # the file of weights that are to be written yet
STORED = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}


class Stored(NamedTuple):
    """A tensor's place: file, first byte and number of bytes there, and how it is stored (a TensorProto type)."""

    file: str
    offset: int
    length: int
    kind: int


class States(nn.Module):
    """ids (N, L) int64 -> a tower's states (N, L, D), and (N, P) where it projects; as `models.text` gives them."""

    def __init__(self, tower: nn.Module, *, raw: bool, skip: int) -> None:
        super().__init__()
        self.tower, self.raw, self.skip = tower, raw, skip

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, L) -> (N, L, D)[, (N, P)]."""
        out = self.tower(input_ids=ids, output_hidden_states=self.raw or self.skip > 0)
        states = states_of(self.tower, out, raw=self.raw, skip=self.skip)
        pooled = getattr(out, "text_embeds", None)
        return (states,) if pooled is None else (states, pooled)


class RawOutput(nn.Module):
    """sample (B, C, h, w), timestep (B,), encoder_hidden_states (B, L, D) -> the U-Net's raw output (B, C', h, w).

    names: of what it is told besides: Stable Diffusion XL's text_embeds (B, P) and time_ids (B, 6), and a
    guidance-distilled network's timestep_cond (B, D).
    """

    def __init__(self, unet: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.unet, self.names = unet, names

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor, *added: torch.Tensor
    ) -> torch.Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        more = dict(zip(self.names, added, strict=True))
        told = {"timestep_cond": more.pop("timestep_cond", None), "added_cond_kwargs": more or None}
        out: torch.Tensor = self.unet(sample, timestep, states, return_dict=False, **told)[0]
        return out


class Pixels(nn.Module):
    """latents (B, C, h, w), in the autoencoder's own unit -> pixels (B, 3, H, W) in about [−1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.first = vae.post_quant_conv if vae.config.get("use_post_quant_conv", True) else nn.Identity()

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, 3, H, W)."""
        pixels: torch.Tensor = self.decoder(self.first(latents))
        return pixels


def write_graphs(folder: Path) -> None:
    """Write the graph of each network of a weights folder beside its weights."""
    checkpoint = open_folder(folder, verify=False)
    _write(checkpoint, graph_paths(folder, checkpoint.has_second))


def export_to_cache(checkpoint: Checkpoint) -> dict[str, Path]:
    """The graphs of a checkpoint that has none, exported into the user's cache; each is written aside and renamed."""
    paths = graph_paths(cache_folder(checkpoint), checkpoint.has_second)
    _write(checkpoint, paths, again=False)
    return paths


def export_skipping(checkpoint: Checkpoint, part: str, skip: int) -> Path:
    """The graph of a text encoder without its last `skip` layers, exported into the user's cache."""
    made, _ = _exported(checkpoint, part, skip=skip)
    path = skipping_path(checkpoint, part, skip)
    write_file(path, made.SerializeToString())
    return path


def export_fused(checkpoint: Checkpoint, loras: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
    """The graphs of a checkpoint with LoRAs fused, exported into the user's cache.

    loras: what `Loras.load` takes of each. Weights that they change lie beside the graphs; all others where they did.
    Raises InputError for a LoRA that cannot be used.
    """
    modules = {part: _module(checkpoint, part) for part in ("unet", *TEXT[: 1 + checkpoint.has_second])}
    adapters = module_loras(**modules)
    for one in loras:
        adapters.load(**one)
    adapters.fuse()
    paths = graph_paths(fused_folder(checkpoint, loras), checkpoint.has_second)
    _write(checkpoint, paths, modules, again=False)
    return paths


def _write(
    checkpoint: Checkpoint, paths: Mapping[str, Path], modules: Mapping[str, Any] | None = None, *, again: bool = True
) -> None:
    """Write every graph to its place. modules: as `graphs` takes them. again: also where there is one."""
    for part in (part for part in paths if part != TOLD):
        own = (part, TOLD) if part == "unet" else (part,)
        if again or not all(paths[name].is_file() for name in own):
            changed: dict[str, np.ndarray] = {}
            for name, made in graphs(checkpoint, part, (modules or {}).get(part), changed).items():
                _put_beside(made, changed, paths[name].with_suffix(FUSED))
                write_file(paths[name], made.SerializeToString())


def graphs(
    checkpoint: Checkpoint, part: str, network: Any = None, changed: dict[str, np.ndarray] | None = None
) -> dict[str, onnx.ModelProto]:
    """The graph of one network, a key of `GRAPHS` or `SECOND`; of the U-Net also `TOLD`, which its own then needs.

    Batch, tokens and size are free. network: the module itself, where it computes with other weights than those stored.
    changed: is given those weights, by name, for which the graph then has no place yet; None is that the graph holds
    them.
    """
    made, inputs = _exported(checkpoint, part, network, changed if network is not None else None)
    if part != "unet":
        return {part: made}
    say_reshapes(made, weights_folder(checkpoint, part), _probes(inputs), changed or {})
    told, step = split_text(made)
    return {TOLD: told, part: step}


def _put_beside(made: onnx.ModelProto, changed: Mapping[str, np.ndarray], file: Path) -> None:
    """Write those of the changed weights that a graph uses into a safetensors file, and let the graph point there.

    The graph says the file's hash, by which a copy that is kept ready is known to be of these very weights.
    """
    own = {tensor.name: tensor for tensor in made.graph.initializer if tensor.name in changed}
    if not own:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}.writing")
    try:
        save_tensors({name: np.ascontiguousarray(changed[name]) for name in own}, aside)
        header = check_safetensors(aside)
        with aside.open("rb") as opened:
            start = 8 + int.from_bytes(opened.read(8), "little")
            os.fsync(opened.fileno())
        for name, tensor in own.items():
            first, last = header[name]["data_offsets"]
            place = Stored(file.name, start + first, last - first, TensorProto.FLOAT)
            tensor.CopyFrom(_outside(name, tuple(tensor.dims), place))
        made.metadata_props.add(key=CHANGED, value=sha256(aside))
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _probes(inputs: Mapping[str, torch.Tensor]) -> list[dict[str, np.ndarray]]:
    """Inputs of a U-Net of three batches, sizes and lengths, no two of them alike; `inputs` is another."""
    side = inputs["sample"].shape[2]
    sizes = ((1, 2 * side + 1, side + 2, 5), (3, side, 3 * side + 1, 11), (4, side + 5, 2 * side, 13))
    shapes = {"sample": (2, 3), "encoder_hidden_states": (1,)}
    probes = []
    for batch, height, width, tokens in sizes:
        free = {"sample": (height, width), "encoder_hidden_states": (tokens,)}
        probe = {}
        for name, value in inputs.items():
            shape = [batch, *value.shape[1:]]
            for axis, length in zip(shapes.get(name, ()), free.get(name, ()), strict=True):
                shape[axis] = length
            probe[name] = np.full(shape, 0.5, np.float32)
        probes.append(probe)
    return probes


def _exported(
    checkpoint: Checkpoint,
    part: str,
    network: Any = None,
    changed: dict[str, np.ndarray] | None = None,
    skip: int = 0,
) -> tuple[onnx.ModelProto, dict[str, torch.Tensor]]:
    """The graph of one network as it is traced, and what it was traced with. changed: as `graphs` takes it."""
    assert part in GRAPHS | SECOND
    module, inputs, axes = _traced(part, network or _module(checkpoint, part), raw=checkpoint.has_second, skip=skip)
    outputs = ["out", "pooled"] if part in SECOND else ["out"]
    with torch.no_grad(), _silent(), io.BytesIO() as buffer:
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            export_params=False,  # weights become inputs by name: the graph is small however large the network
            do_constant_folding=False,  # so that each weight stays as it is stored; ONNX Runtime folds at load
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_axes=axes,
        )
        made = onnx.load_from_string(buffer.getvalue())
    _point(made.graph, set(inputs), module.state_dict(), _stored(checkpoint.weights[part]), changed)
    made.metadata_props.add(key=LAYOUT, value=layout(checkpoint, part))
    return made, inputs


def _module(checkpoint: Checkpoint, part: str) -> Any:
    """One network as torch's module, float32 on the host."""
    with quiet():
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    kind = kinds.get(part, CLIPTextModelWithProjection)
    return load_module(kind, checkpoint, part, torch.device("cpu"), torch.float32)


def _traced(
    part: str, network: Any, *, raw: bool, skip: int
) -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    """A network as it is traced, inputs to trace it with, and their free axes.

    raw: whether text is encoded as Stable Diffusion XL takes it. skip: layers that are left away for it. The sides are
    odd, so that the U-Net is traced on the way on which each upsampling goes to the size of what it joins, which is
    right for every size.
    """
    square = {0: "batch", 2: "height", 3: "width"}
    if part.startswith("text_encoder"):
        ids = torch.zeros(2, int(network.config.max_position_embeddings), dtype=torch.int64)
        return States(network, raw=raw, skip=skip), {"ids": ids}, {"ids": {0: "batch", 1: "tokens"}}
    with quiet():
        from diffusers.models.attention_processor import AttnProcessor
    network.set_attn_processor(AttnProcessor())
    if part == "vae":
        return Pixels(network), {"latents": torch.randn(2, network.config.latent_channels, 5, 7)}, {"latents": square}
    attend_in_one_node(network)
    depth = 2 ** len(network.config.block_out_channels)
    inputs = {
        "sample": torch.randn(2, network.config.in_channels, depth + 1, depth + 3),
        "timestep": torch.tensor([3.0, 500.0]),
        "encoder_hidden_states": torch.randn(2, 7, int(network.config.cross_attention_dim)),
    }
    if network.config.addition_embed_type == "text_time":
        pooled = network.config.projection_class_embeddings_input_dim - 6 * network.config.addition_time_embed_dim
        inputs |= {"text_embeds": torch.randn(2, pooled), "time_ids": torch.full((2, 6), 64.0)}
    if network.config.time_cond_proj_dim:
        inputs["timestep_cond"] = torch.randn(2, int(network.config.time_cond_proj_dim))
    free: dict[str, dict[int, str]] = {name: {0: "batch"} for name in inputs}
    whole = RawOutput(network, list(inputs)[3:])
    return whole, inputs, free | {"sample": square, "encoder_hidden_states": {0: "batch", 1: "tokens"}}


@contextmanager
def _silent() -> Iterator[None]:
    """Without the exporter's remarks, which are about its own future."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _digest(values: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(values, dtype="<f4").view(np.uint8).data).digest()


def _stored(files: tuple[Path, ...]) -> dict[bytes, Stored]:
    """Where the tensors of safetensors files lie, by what they hold as float32."""
    places: dict[bytes, Stored] = {}
    for file in files:
        header = check_safetensors(file)
        with file.open("rb") as opened:
            start = 8 + int.from_bytes(opened.read(8), "little")
        raw = np.memmap(file, dtype=np.uint8, mode="r")
        for name, entry in header.items():
            kind = STORED.get(entry["dtype"]) if name != "__metadata__" else None
            if kind is None:
                continue
            first, last = (start + offset for offset in entry["data_offsets"])
            parts = 3 if ".in_proj_" in name else 1  # OpenCLIP stacks queries, keys and values
            size = (last - first) // parts
            for start_of in range(first, last, size or 1):
                stored = Stored(file.name, start_of, size, kind)
                places.setdefault(_digest(wide(raw[start_of : start_of + size], kind)), stored)
    return places


def _point(
    graph: onnx.GraphProto,
    inputs: set[str],
    state: Mapping[str, torch.Tensor],
    places: Mapping[bytes, Stored],
    changed: dict[str, np.ndarray] | None,
) -> None:
    """Turn the weights among a graph's inputs into initializers that point into the files; unused ones go.

    changed: is given those that stand in no file and are not small.
    """
    used = {name for node in graph.node for name in node.input}
    kept = [value for value in graph.input if value.name in inputs]
    weights = [value.name for value in graph.input if value.name not in inputs and value.name in used]
    del graph.input[:]
    graph.input.extend(kept)
    casts, renamed = [], {}
    for name in weights:
        values = state[name].numpy()
        place = places.get(_digest(values)) if values.dtype == np.float32 else None
        if place is None and changed is not None and values.dtype == np.float32 and values.nbytes >= OUTSIDE:
            changed[name] = values
            graph.initializer.append(_outside(name, values.shape, Stored(NOWHERE, 0, values.nbytes, TensorProto.FLOAT)))
            continue
        if place is None:
            graph.initializer.append(numpy_helper.from_array(values, name))
            continue
        graph.initializer.append(_outside(name, values.shape, place))
        if place.kind != TensorProto.FLOAT:
            renamed[name] = f"{name}:float32"
            casts.append(helper.make_node("Cast", [name], [renamed[name]], to=TensorProto.FLOAT))
    for node in graph.node:
        node.ClearField("name")
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _outside(name: str, shape: tuple[int, ...], place: Stored) -> TensorProto:
    """An initializer whose bytes lie in a safetensors file."""
    tensor = TensorProto(name=name, data_type=place.kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", place.file), ("offset", place.offset), ("length", place.length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
