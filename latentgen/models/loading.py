"""From a weights folder's part to a torch module: where it runs, in which type, and nothing said but one line."""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch

from latentgen.checkpoint import Checkpoint, SingleFile, variant_of
from latentgen.errors import InputError
from latentgen.models.precision import type_name
from latentgen.values import shown

# the instructions that make a half type's products faster than float32's, as torch names them; any of them
HALF = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}

LOADING = RLock()  # while the libraries load they change torch, and their own settings, for all threads


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Inside, no other thread loads, and what is made are plain tensors, which outlast torch's inference mode."""
    with LOADING, torch.inference_mode(False):
        yield


def choose_device(device: Any = None) -> torch.device:
    """The device asked for, or the best there is: of several processes each has the GPU of its LOCAL_RANK.

    Raises InputError for one that is not there.
    """
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        own = os.environ.get("LOCAL_RANK", "")
        return torch.device(f"cuda:{int(own) % torch.cuda.device_count()}" if own.isdecimal() else "cuda")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except TypeError as error:
        raise InputError(f"device is {shown(device)}; it must be a device's name, as 'cpu'") from error
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {shown(device)} is not here ({str(error).splitlines()[0]}); try 'cpu'") from error
    if chosen.type == "meta":
        raise InputError(f"device {shown(device)} holds no numbers, so that nothing can be rendered; try 'cpu'")
    return chosen


def choose_dtype(dtype: Any, device: torch.device) -> torch.dtype:
    """The type networks compute in: as asked, or float16 on a GPU and float32 on a CPU (half types are slow there)."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    found: torch.dtype = getattr(torch, type_name(dtype))
    return found


def has_bf16() -> bool:
    """Whether bf16 products are in the hardware here; where they are not, a CPU takes hundreds of times longer."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _multiplies(torch.bfloat16)


def slow_here(dtype: torch.dtype, device: torch.device) -> str | None:
    """What to say of a half type on a CPU that has no instructions for it; None where there is nothing to say."""
    if device.type != "cpu" or dtype not in HALF or _multiplies(dtype):
        return None
    name = str(dtype).removeprefix("torch.")
    return f"this CPU has no instructions for {name} products, and takes many times as long as in float32"


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of a half type."""
    return any(capabilities().get(name) for name in HALF[dtype])


def capabilities() -> Mapping[str, Any]:
    """What this CPU can do, as torch names it: {} where torch does not say."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


@one_at_a_time()
def load_module(kind: Any, checkpoint: Checkpoint, part: str, device: torch.device, dtype: torch.dtype) -> Any:
    """One network of a folder, `kind` being its diffusers or transformers class: frozen, in eval mode, on the device.

    Half-precision storage is widened where `dtype` is wider. Raises InputError where the file does not fit its config.
    """
    if isinstance(checkpoint, SingleFile):
        return _from_single(kind, checkpoint, part, dtype).to(device).requires_grad_(False).eval()
    folder = checkpoint.folder / part
    how: dict[str, Any] = {"dtype" if part.startswith("text_encoder") else "torch_dtype": dtype}
    how |= {"local_files_only": True, "use_safetensors": True, "variant": variant_of(checkpoint.weights[part][0])}
    try:
        with quiet():  # what does not fit is said here
            module, report = kind.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **how)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__
        raise InputError(f"{folder} does not fit its config.json: {reason}") from error
    if mismatched := sorted(report["mismatched_keys"]):
        name, held, wanted = mismatched[0]
        raise InputError(f"{folder} does not fit its config.json: {name} is {tuple(held)}, and {tuple(wanted)} by it")
    missing = sorted(name for name in report["missing_keys"] if not name.endswith("position_ids"))
    if missing:
        raise InputError(f"{folder} is not whole: its weights lack {missing[0]} ({len(missing)} tensors in all)")
    return module.to(device).requires_grad_(False).eval()


def load_part(checkpoint: Checkpoint, part: str) -> Any:
    """The network of one part ("unet", "vae", "text_encoder"), in float32 on the CPU: as training wants it."""
    with quiet():
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    kinds |= {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    return load_module(kinds[part], checkpoint, part, torch.device("cpu"), torch.float32)


def without_weights(checkpoint: Checkpoint, part: str) -> Any:
    """The network that a part's config tells of, "unet" or "vae", on the meta device: no weights are read.

    Raises InputError for a config that is none of such a network.
    """
    with quiet():
        from diffusers import AutoencoderKL, UNet2DConditionModel
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    try:
        with quiet(), torch.device("meta"):
            return kind.from_config(checkpoint.config(part))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"{checkpoint.folder}: the config of {part} is of no {kind.__name__} ({error})") from error


def _from_single(kind: Any, checkpoint: SingleFile, part: str, dtype: torch.dtype) -> Any:
    """One network of a single file, on the host."""
    config, place = checkpoint.config(part), f"{checkpoint.folder}: {part}"
    try:
        with quiet(), torch.device("meta"):
            module = kind(kind.config_class(**config)) if part.startswith("text_encoder") else kind.from_config(config)
        given = {name: value.to(dtype) for name, value in checkpoint.tensors(part).items()}
        if not any(name.startswith("text_model.") for name in module.state_dict()):  # transformers 5 has it no more
            given = {name.removeprefix("text_model."): value for name, value in given.items()}
        report = module.load_state_dict(given, strict=False, assign=True)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"{place} does not fit what its shapes say: {str(error).strip().splitlines()[-1]}") from error
    missing = [name for name in report.missing_keys if not name.endswith("position_ids")]
    if missing or report.unexpected_keys:
        name, what = (missing[0], "lacks") if missing else (report.unexpected_keys[0], "has besides")
        raise InputError(f"{place} is no network as known: it {what} {name}")
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta and name.endswith("position_ids"):
            holder = module.get_submodule(name.rpartition(".")[0])
            holder.register_buffer("position_ids", torch.arange(buffer.shape[-1])[None], persistent=False)
    return module


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What besides the settings decides a picture's last bits: torch, the device, the type, the number of threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return {
        "engine": "torch",
        "torch": str(torch.__version__),
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
    }


def use_threads(threads: int | None) -> None:
    """Compute with as many CPU threads as a picture was made with: sums are split, and rounded, accordingly."""
    if isinstance(threads, int) and threads > 0 and threads != torch.get_num_threads():
        torch.set_num_threads(threads)


@contextmanager
def quiet() -> Iterator[None]:
    """The libraries' progress bars and remarks off, as they were afterwards. In one thread at a time."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    with LOADING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = (of_diffusers, of_transformers)
        before = [(kind, kind.get_verbosity(), kind.is_progress_bar_enabled()) for kind in kinds]
        try:
            for kind in kinds:
                kind.set_verbosity(logging.CRITICAL)
                kind.disable_progress_bar()
            yield
        finally:
            for kind, level, bars in before:
                kind.set_verbosity(level)
                if bars:
                    kind.enable_progress_bar()
