"""The two engines behind a pipeline: ONNX Runtime (the default on a CPU; no torch is imported) and torch.

An engine is opened from a checkpoint and gives what a pipeline holds: the text encoder, the network, the autoencoder.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, SupportsIndex

from latentgen.checkpoint import Checkpoint
from latentgen.diffusion.denoiser import Network
from latentgen.errors import InputError
from latentgen.models.lora import Loras
from latentgen.models.lora.stack import read_loras
from latentgen.models.onnx.places import (
    TOLD,
    cache_folder,
    find_graphs,
    fused_folder,
    skipping_path,
    speaks_for_gpu,
    why_not,
)
from latentgen.values import flag, shown, whole

ENGINES = ("auto", "onnx", "torch")
MOST_THREADS = 1024  # of a computation: more than any machine has cores for, and few enough to be started


class EngineNote(UserWarning):
    """What a person should know of the engine: graphs are exported, or it is another engine than the default."""


@dataclass(frozen=True)
class Engine:
    """What runs a checkpoint. machine: what the settings say of it. loras, perturbed, cached: None where it cannot.

    cached: every -> the network of one walk, with its deep features taken over between every so many steps.
    """

    text: Any
    network: Network
    latent: Any
    machine: dict[str, Any]
    loras: Loras | None = None
    perturbed: Network | None = None
    cached: Callable[[int], Network] | None = None


def open_engine(
    checkpoint: Checkpoint,
    engine: str = "auto",
    *,
    device: Any = None,
    dtype: Any = None,
    threads: SupportsIndex | None = None,
    loras: Sequence[str | Path | Mapping[str, Any]] = (),
    compile: bool = False,
) -> Engine:
    """Open a checkpoint with an engine of `ENGINES`.

    "auto" is ONNX Runtime on a CPU in float32, else torch; where graphs are neither in the folder nor in the cache they
    are exported once, which takes torch. loras: see `read_loras`. With LoRAs "auto" is torch, unless graphs with the
    same ones fused are in the cache, where "onnx" puts them. compile: the U-Net with torch.compile, which is torch's
    (`open_torch`). A checkpoint that is not verified yet is, before anything is made of its weights. Raises InputError
    where "onnx" is asked for and cannot be, and for torn weights.
    """
    threads = None if threads is None else whole("threads", threads, 1, MOST_THREADS)
    if not isinstance(engine, str) or engine not in ENGINES:
        raise InputError(f"engine {shown(engine)} is not known; it can be one of: {', '.join(ENGINES)}")
    adapters = read_loras(loras)
    compile = flag("compile", compile)
    if compile and engine == "onnx":
        raise InputError("compile is the torch engine's; take engine 'torch' or 'auto' with it")
    if compile:
        return open_torch(checkpoint, device, dtype, threads, adapters, compile=True)
    elsewhere = None if engine == "torch" else _elsewhere(device, dtype)
    reason = elsewhere or (None if engine == "torch" else why_not(checkpoint))
    if engine == "onnx" and reason is not None:
        raise InputError(f"engine 'onnx' cannot run {checkpoint.folder}: {reason}; leave the engine to be chosen")
    if engine == "torch" or elsewhere is not None or (engine == "auto" and _has_gpu(device)):
        return open_torch(checkpoint, device, dtype, threads, adapters)
    if reason is not None:
        said = f"ONNX Runtime cannot run {checkpoint.folder}: {reason}; torch runs it instead"
        warnings.warn(said, EngineNote, stacklevel=3)
        return open_torch(checkpoint, device, dtype, threads, adapters)
    if adapters and engine == "auto" and not find_graphs(fused_folder(checkpoint, adapters), checkpoint.has_second):
        return open_torch(checkpoint, device, dtype, threads, adapters)
    try:
        return open_fused(checkpoint, adapters, threads) if adapters else open_onnx(checkpoint, threads)
    except InputError as error:
        if engine == "onnx":
            raise
        checkpoint.verify()  # torn weights are nobody's to run
        opened = open_torch(checkpoint, device, dtype, threads, adapters)
        warnings.warn(f"{error}; torch runs it instead", EngineNote, stacklevel=3)  # where it does
        return opened


def open_torch(
    checkpoint: Checkpoint,
    device: Any = None,
    dtype: Any = None,
    threads: int | None = None,
    loras: Sequence[Mapping[str, Any]] = (),
    compile: bool = False,
) -> Engine:
    """The checkpoint's own modules, of diffusers and transformers, computing with the LoRAs given.

    compile: the U-Net with torch.compile, but for perturbed attention and the feature cache, which reach into it.
    """
    from latentgen.models import loading
    from latentgen.models.compiled import check_compiling, compiled
    from latentgen.models.feature_cache import feature_caches
    from latentgen.models.latent import Latent
    from latentgen.models.lora.layers import tower_loras
    from latentgen.models.network import load_unet, perturbed_network, unet_network
    from latentgen.models.text import load_text

    place = loading.choose_device(device)
    if compile:
        check_compiling(place)
    checkpoint.verify()
    loading.use_threads(threads)
    kind = loading.choose_dtype(dtype, place)
    if slow := loading.slow_here(kind, place):
        warnings.warn(slow, EngineNote, stacklevel=3)
    with loading.one_at_a_time():
        text, unet = load_text(checkpoint, place, kind), load_unet(checkpoint, place, kind, compiled=compile)
        network, adapters = unet_network(unet), tower_loras(unet, (tower.model for tower in text.towers))
        for one in loras:
            adapters.load(**one)
        latent = Latent.load(checkpoint, place, kind)
    return Engine(
        text=text,
        network=unet_network(unet, run=compiled(unet)) if compile else network,
        latent=latent,
        machine=loading.machine(place, kind) | ({"compile": True} if compile else {}),
        loras=adapters,
        perturbed=perturbed_network(unet),
        cached=feature_caches(network),
    )


def open_onnx(checkpoint: Checkpoint, threads: int | None = None) -> Engine:
    """The checkpoint's graphs; where it has none, or they are of other weights, the cache's, exported first."""
    from latentgen.models.onnx.session import GraphUnfit

    own = find_graphs(checkpoint.folder, checkpoint.has_second)
    if own is None:
        return _open_kept(checkpoint, "has no ONNX graphs", threads)
    try:
        return _run(checkpoint, own, threads)
    except GraphUnfit as error:
        try:
            return _open_kept(checkpoint, "has ONNX graphs that do not fit it", threads)
        except InputError:
            raise error from None


def open_fused(checkpoint: Checkpoint, loras: Sequence[Mapping[str, Any]], threads: int | None = None) -> Engine:
    """The checkpoint's graphs with LoRAs fused into their weights; from the cache, else exported into it first."""
    engine = _open_kept(checkpoint, "has no ONNX graphs with these LoRAs", threads, loras)
    with suppress(OSError):  # used now, so that others make room first
        os.utime(fused_folder(checkpoint, loras))
    return replace(engine, machine={**engine.machine, "loras": Loras.told(loras)})


def _open_kept(
    checkpoint: Checkpoint, why: str, threads: int | None, loras: Sequence[Mapping[str, Any]] = ()
) -> Engine:
    """The graphs of the user's cache; exported into it first where they are not there, or are damaged."""
    from latentgen.models.onnx.session import GraphUnfit

    place = fused_folder(checkpoint, loras) if loras else cache_folder(checkpoint)
    graphs = find_graphs(place, checkpoint.has_second)
    if graphs is not None:
        try:
            return _run(checkpoint, graphs, threads, fused=bool(loras))
        except GraphUnfit:
            why = "has ONNX graphs in the cache that cannot be run"
            for path in graphs.values():
                path.unlink(missing_ok=True)
    return _run(checkpoint, _exported(checkpoint, why, place, loras), threads, fused=bool(loras))


def _run(checkpoint: Checkpoint, graphs: Mapping[str, Path], threads: int | None, fused: bool = False) -> Engine:
    """A checkpoint's graphs as an engine: opened side by side, while the weights' hashes are compared.

    fused: whether they are of other weights than the checkpoint's, of which no shorter text encoder is made.
    """
    from latentgen.models.onnx import session
    from latentgen.models.onnx.text import OnnxText, TwoOnnxTexts

    count = session.cores(threads)
    shorter = None if fused else partial(_shorter, checkpoint, count)
    with ThreadPoolExecutor(4) as pool:
        unet = pool.submit(session.open_session, checkpoint, "unet", graphs["unet"], count)
        whole = pool.submit(checkpoint.verify)
        told = pool.submit(session.open_session, checkpoint, "unet", graphs[TOLD], count) if TOLD in graphs else None
        latent = pool.submit(session.OnnxLatent.load, checkpoint, graphs["vae"], count)
        if checkpoint.has_second:
            text: Future[Any] = pool.submit(TwoOnnxTexts.load, checkpoint, graphs, count, shorter)
        else:
            text = pool.submit(OnnxText.load, checkpoint, graphs["text_encoder"], count, shorter=shorter)
        whole.result()  # what is wrong with the weights is said before what follows from it
    return Engine(
        text=text.result(),
        network=session.onnx_network(unet.result(), session.Told(told.result()) if told is not None else None),
        latent=latent.result(),
        machine=session.machine(count),
    )


def _shorter(checkpoint: Checkpoint, threads: int, part: str, skip: int) -> Any:
    """The session of a text encoder without its last layers; its graph is exported into the cache where it is not."""
    from latentgen.models.onnx.session import GraphUnfit, open_session

    checkpoint.verify()
    graph = skipping_path(checkpoint, part, skip)
    if graph.is_file():
        with suppress(GraphUnfit):  # a damaged one is exported again
            return open_session(checkpoint, part, graph, threads)
    left = f"the graph of its {part} without the last {skip} layer{'s' if skip > 1 else ''}"
    warnings.warn(f"{checkpoint.folder}: {left} is exported once into {graph.parent}", EngineNote, stacklevel=2)
    with _exporting(checkpoint):
        from latentgen.models.onnx.export import export_skipping

        export_skipping(checkpoint, part, skip)
    return open_session(checkpoint, part, graph, threads)


def _exported(checkpoint: Checkpoint, why: str, place: Path, loras: Sequence[Mapping[str, Any]]) -> dict[str, Path]:
    """The graphs, exported into the user's cache; an InputError where that cannot be."""
    checkpoint.verify()
    said = f"{checkpoint.folder} {why}: they are exported once into {place}"
    warnings.warn(said, EngineNote, stacklevel=2)
    with _exporting(checkpoint):
        from latentgen.models.onnx.export import export_fused, export_to_cache

        return export_fused(checkpoint, loras) if loras else export_to_cache(checkpoint)


@contextmanager
def _exporting(checkpoint: Checkpoint) -> Iterator[None]:
    """What the exporter raises as an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the exporter raises whatever its passes raise; torch can still run the model
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{checkpoint.folder} cannot be exported to ONNX: {line}") from error


def _elsewhere(device: Any, dtype: Any) -> str | None:
    """Why what was asked for is not ONNX Runtime's here: float32 on a CPU."""
    if device is not None and not re.fullmatch(r"cpu(:[0-9]+)?", str(device)):
        return f"it computes on a CPU, not on {shown(str(device))}"
    if dtype is not None and (said := str(dtype).removeprefix("torch.")) not in ("float32", "fp32"):
        return f"it computes in float32, not in {shown(said)}"
    return None


def _has_gpu(device: Any) -> bool:
    """Whether torch would find a GPU; torch is imported only where something speaks for one."""
    if device is not None or not ("torch" in sys.modules or speaks_for_gpu()):
        return False
    import torch

    return torch.cuda.is_available()
