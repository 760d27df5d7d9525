"""Networks that ONNX Runtime computes, on a CPU, on NumPy arrays; no torch."""

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at import: nothing is recorded or sent, no id is left
import onnxruntime

from latentgen.checkpoint import Checkpoint
from latentgen.diffusion.array import Array
from latentgen.diffusion.denoiser import Condition, Network
from latentgen.durable import sha256
from latentgen.errors import InputError
from latentgen.models.memory import Kept
from latentgen.models.onnx.places import CHANGED, LAYOUT, layout, weights_folder
from latentgen.models.onnx.ready import PACKED, WEIGHTS, Ready, widened_size

UNET_INPUTS = {"sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond"}
FUSED = ".fused.safetensors"  # beside a graph, instead of its own ending: the weights that LoRAs changed
SIDE = 32  # of the latents, where a U-Net's config says none
OUTSIDE = 1024  # bytes from which a weight lies beside the ready graph, where it can be mapped
SPIN = "1000"  # microseconds; left to themselves, a new session's threads wait busily for as long as it is loaded
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # where a graph's weights are looked for


_BEGUN: dict[tuple[Path, int], Future[Any]] = {}  # by a ready copy and threads: sessions that are being opened


class GraphUnfit(InputError):
    """A graph that does not belong to the weights it lies beside, or cannot be loaded with them."""


class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
    """A session that copies of a pipeline share, as it remembers nothing; it cannot be sent to another process."""

    def __deepcopy__(self, _: Any) -> "Session":
        """Itself."""
        return self

    def __reduce__(self) -> Any:
        """Raises InputError."""
        raise InputError("a pipeline that ONNX Runtime computes cannot be pickled; open it in each process")


def cores(threads: int | None = None) -> int:
    """How many threads compute: as asked, or OMP_NUM_THREADS, or one for each core this process may use."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if threads:
        return threads
    if said.isdecimal() and int(said):
        return int(said)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    names = (Path(f"/sys/devices/system/cpu/cpu{k}/topology/thread_siblings_list") for k in allowed)
    siblings = [name.read_text() if name.is_file() else str(name) for name in names]
    return len(set(siblings))  # two threads of one core share its arithmetic


def begin_session(pool: ThreadPoolExecutor, checkpoint: Checkpoint, part: str, graph: Path, threads: int) -> None:
    """Begin to open the ready copy of a network's graph, if there is one, for the next `open_session` of it."""
    ready = Ready.of(checkpoint, part, graph, graph.read_bytes(), str(onnxruntime.__version__))
    if ready is not None:
        _BEGUN[ready.folder, threads] = pool.submit(_open_ready, ready, threads)


def open_session(checkpoint: Checkpoint, part: str, graph: Path, threads: int) -> Any:
    """A session of the graph of one network: from its ready copy, else made ready and kept (ready.py).

    A ready copy is opened without reading the checkpoint's weights, whose hashes the caller compares meanwhile; before
    one is made they are compared here. Raises GraphUnfit where the checkpoint's weights do not fit the graph.
    """
    held = graph.read_bytes()
    ready = Ready.of(checkpoint, part, graph, held, str(onnxruntime.__version__))

    def make(path: Path) -> None:
        _checked_session(checkpoint, part, graph, held, threads, path)
        checkpoint.verify()  # no copy is kept of weights that changed meanwhile

    begun = None if ready is None else _BEGUN.pop((ready.folder, threads), None)
    kept = begun.result() if begun is not None else None if ready is None else _open_ready(ready, threads)
    if kept is None:
        checkpoint.verify()
        if ready is not None and ready.make(make, widened_size(checkpoint, part)):
            kept = _open_ready(ready, threads)
    return _checked_session(checkpoint, part, graph, held, threads, None) if kept is None else kept


def _open_ready(ready: Ready, threads: int) -> Any:
    """A session of a ready copy; None where there is no whole one."""
    return ready.open(lambda path: _session(str(path), threads, optimised=True))


def _checked_session(
    checkpoint: Checkpoint, part: str, graph: Path, held: bytes, threads: int, keep: Path | None
) -> Any:
    """A session of a graph (its bytes, and where they lie) and of the weights it points to.

    keep: where it is left for later sessions, which read it in less memory than this one would take to compute.
    """
    weights, fused, side = weights_folder(checkpoint, part), graph.with_suffix(FUSED), None
    if part == "unet":  # the others are evaluated once a picture
        said = checkpoint.config(part).get("sample_size") or SIDE
        side = min(said) if isinstance(said, list) else int(said)
    wrong = f"{graph} cannot be run with the weights in {weights}"
    from latentgen.models.onnx.widen import in_tiles, widened

    try:
        if keep is None:
            whole, given = in_tiles(held, weights, fused, side)
            session = _session(whole, threads, weights=weights, fused=fused, given=given)
        else:
            whole = widened(held, weights, keep.parent, fused, side)
            packed = widened_size(checkpoint, part) <= PACKED
            session = _session(whole, threads, weights=keep.parent, keep=keep, packed=packed)
    except Exception as error:  # ONNX Runtime has an exception for each status, all of them bare
        reason = " ".join(str(error).split())
        raise GraphUnfit(f"{wrong}: {reason}; remove it") from error
    said = session.get_modelmeta().custom_metadata_map
    if said.get(LAYOUT) != layout(checkpoint, part):
        raise GraphUnfit(f"{wrong}: it was made for others; remove it")
    if CHANGED in said and sha256(fused) != said[CHANGED]:
        raise GraphUnfit(f"{wrong}: {fused.name} beside it is not what was written with it; remove it")
    return session


def _session(
    graph: str | bytes,
    threads: int,
    *,
    weights: Path | None = None,
    fused: Path | None = None,
    given: Mapping[str, np.ndarray] | None = None,
    optimised: bool = False,
    keep: Path | None = None,
    packed: bool = False,
) -> Any:
    """A session as every network here has it. optimised: the graph is as ONNX Runtime left it at `keep`.

    fused: where the weights that LoRAs changed are, if there are any; given: others that lie in no file, by name.
    packed: whether weights are kept as their kernels read them, too.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # threads that wait, for their session's next run or its first, would take the cores from what runs now
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN)
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if weights is not None:
        options.add_session_config_entry(WEIGHTS_FOLDER, str(weights.resolve()))
    own = dict(given or {})
    if fused is not None and fused.is_file():
        from safetensors.numpy import load_file

        from latentgen.models.onnx.winograd import weights_name

        own |= {name: values for name, values in load_file(fused).items() if weights_name(name) not in own}
    held = give_weights(options, own)
    if keep is not None:
        # it computes nothing: weights are laid out for kernels only where they are kept so
        name = "session.save_external_prepacked_constant_initializers" if packed else "session.disable_prepacking"
        options.add_session_config_entry(name, "1")
        options.optimized_model_filepath = str(keep)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(OUTSIDE)
        )
    session = Session(graph, options, providers=["CPUExecutionProvider"])
    session.given = held
    return session


def give_weights(options: Any, weights: Mapping[str, np.ndarray]) -> Any:
    """Let a session take these as the weights of those names, wherever the graph says that they lie.

    Returns what must live for as long as the session: it reads them where they are.
    """
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()}
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    return values


@dataclass(eq=False)
class Told:
    """What a U-Net's steps need of the text, computed once for each text and not at each step: `TOLD` as a session.

    kept: of the latest conditions it is remembered, from call to call, by what they hold.
    """

    session: Any
    kept: Kept = field(default_factory=Kept)

    def __post_init__(self) -> None:
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The step graph's further inputs, by name, from a U-Net's own."""
        self.kept.at(float(given["timestep"][0]))
        told = self.kept.find(lambda texts: all(np.array_equal(texts[name], given[name]) for name in self.inputs))
        if told is None:
            texts = {name: np.array(given[name]) for name in self.inputs}
            told = dict(zip(self.outputs, self.session.run(self.outputs, texts), strict=True))
            self.kept.keep(texts, told)
        return told


def onnx_network(session: Any, told: Told | None = None) -> Network:
    """A U-Net's session as a Network: x (B, C, h, w), time (B,), states (B, L, D) -> (B, C', h, w), in x's type.

    told: of a U-Net in two graphs, the one of the text. Raises GraphUnfit where the two do not fit each other.
    """
    wanted = {value.name for value in session.get_inputs()}
    if wanted - UNET_INPUTS - set(told.outputs if told is not None else ()):
        raise GraphUnfit("the U-Net's two ONNX graphs, model.onnx and told.onnx, are not of each other; remove both")

    def network(x: Array, time: Array, condition: Condition) -> Array:
        assert condition.states is not None, "a U-Net with cross-attention needs text states"
        values = {"sample": x, "timestep": time, "encoder_hidden_states": condition.states}
        if condition.pooled is not None:  # Stable Diffusion XL
            values |= {"text_embeds": condition.pooled, "time_ids": condition.sizes}
        if condition.guided is not None:
            values["timestep_cond"] = condition.guided
        given = {name: np.asarray(value, dtype=np.float32) for name, value in values.items()}
        if told is not None:
            given |= told(given)
        (out,) = session.run(None, {name: value for name, value in given.items() if name in wanted})
        return out.astype(x.dtype, copy=False)

    return network


def on_host(values: Any) -> np.ndarray:
    """Numbers of any kind, a torch tensor's too, as a float32 NumPy array of its own."""
    return np.array(values.detach().float().cpu().numpy() if hasattr(values, "detach") else values, dtype=np.float32)


@dataclass(frozen=True)
class OnnxLatent:
    """The decoder of an AutoencoderKL; the latents are (vae's − shift_factor) · scaling_factor, as in `Latent`."""

    session: Any
    config: Mapping[str, Any]

    @classmethod
    def load(cls, checkpoint: Checkpoint, graph: Path, threads: int) -> "OnnxLatent":
        """The decoder of a weights folder."""
        return cls(open_session(checkpoint, "vae", graph, threads), checkpoint.config("vae"))

    @property
    def device(self) -> str:
        """Where it computes."""
        return "cpu"

    @property
    def scale(self) -> float:
        """What the autoencoder's own latents are multiplied by."""
        return float(self.config.get("scaling_factor", 0.18215))  # diffusers' default

    @property
    def shift(self) -> float:
        """What is taken from the autoencoder's own latents first."""
        return float(self.config.get("shift_factor") or 0.0)

    def array(self, host: Any) -> np.ndarray:
        """Host numbers (an array of any kind) as float32."""
        return on_host(host)

    def decode(self, latents: Array) -> np.ndarray:
        """Pixels (B, 3, H, W), float32 in [0, 1], from latents (B, C, H/factor, W/factor)."""
        inner = np.asarray(latents / self.scale + self.shift, dtype=np.float32)
        (pixels,) = self.session.run(None, {"latents": inner})
        return np.clip(pixels * np.float32(0.5) + np.float32(0.5), 0, 1)


def machine(threads: int) -> dict[str, Any]:
    """What besides the settings decides a picture's last bits, as `loading.machine` says it of torch."""
    version = str(onnxruntime.__version__)
    return {"engine": "onnx", "onnxruntime": version, "device": "cpu", "dtype": "float32", "threads": threads}
