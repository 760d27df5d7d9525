"""A pipeline folder in diffusers' layout is written: whole or not at all, and so that stock diffusers opens it."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentgen.checkpoint.folder import STEMS, read_json
from latentgen.durable import write_folder
from latentgen.errors import InputError

if TYPE_CHECKING:
    import torch

TEXT = ("text_encoder", "text_encoder_2")
LOCAL = ("is_local", "local_files_only", "name_or_path")  # where a tokenizer was loaded from is nobody's business


def save_pipeline(
    folder: str | Path,
    *,
    tokenizer: Any,
    text_encoder: Any,
    vae: Any,
    unet: Any,
    scheduler_config: Mapping[str, Any],
    tokenizer_2: Any = None,
    text_encoder_2: Any = None,
    force_zeros_for_empty_prompt: bool = True,
    extra_files: Mapping[str, bytes | str] | None = None,
    dtype: str = "fp16",
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write a pipeline folder that latentgen and diffusers' `from_pretrained` both open.

    tokenizer: CLIPTokenizer. text_encoder: CLIPTextModel. vae: AutoencoderKL. unet: UNet2DConditionModel.
    scheduler_config: what scheduler_config.json shall say, `_class_name` included; clip_sample is off if it is not
    there, or diffusers would clip latents to [-1, 1] as soon as somebody changes to DDIM. tokenizer_2, text_encoder_2
    (CLIPTextModelWithProjection), force_zeros_for_empty_prompt: Stable Diffusion XL's. extra_files: relative path
    -> what it holds (latentgen.json, the resolved recipe, metrics, a licence note). dtype: "fp16" or "fp32", of what
    is stored. finish: called on the folder while it still lies aside; what it adds (ONNX graphs) is part of it.
    The folder is written aside and swapped into place whole; see `durable.write_folder`.
    """
    if (tokenizer_2 is None) != (text_encoder_2 is None):
        raise InputError("tokenizer_2 and text_encoder_2 come together (Stable Diffusion XL); give both or neither")
    modules = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "vae": vae, "unet": unet}
    networks = {part: module for part, module in modules.items() if module is not None}
    tokenizers = {"tokenizer": tokenizer, "tokenizer_2": tokenizer_2}

    def write(aside: Path) -> None:
        write_pipeline(
            aside,
            tensors={part: partial(_stored_state, part, network, dtype) for part, network in networks.items()},
            configs={part: _config(part, network) for part, network in networks.items()},
            tokenizers={part: words for part, words in tokenizers.items() if words is not None},
            scheduler_config={"clip_sample": False, **scheduler_config},
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            extra_files=extra_files,
        )
        if finish is not None:
            finish(aside)

    return write_folder(Path(folder), write)


def write_pipeline(
    aside: Path,
    *,
    tensors: Mapping[str, Callable[[], Mapping[str, "torch.Tensor"]]],
    configs: Mapping[str, Mapping[str, Any]],
    tokenizers: Mapping[str, Any],
    scheduler_config: Mapping[str, Any],
    force_zeros_for_empty_prompt: bool = True,
    extra_files: Mapping[str, bytes | str] | None = None,
) -> None:
    """Fill an empty folder. tensors: for each network, what gives its tensors, called one network after another."""
    from safetensors.torch import save

    for part, config in configs.items():
        (aside / part).mkdir()
        _write_bytes(aside / part / f"{STEMS[part]}.safetensors", save(dict(tensors[part]()), {"format": "pt"}))
        _write_json(aside / part / "config.json", config)
    for part, tokenizer in tokenizers.items():
        _write_tokenizer(aside / part, tokenizer)
    _write_json(aside / "scheduler/scheduler_config.json", scheduler_config)
    index = _index(str(scheduler_config["_class_name"]), "text_encoder_2" in configs, force_zeros_for_empty_prompt)
    _write_json(aside / "model_index.json", index)
    for name, content in (extra_files or {}).items():
        _write_bytes(aside / name, content.encode() if isinstance(content, str) else content)


def stored(part: str, tensors: Mapping[str, "torch.Tensor"], dtype: str | None) -> dict[str, "torch.Tensor"]:
    """Tensors in the storage type "fp16" or "fp32" (None keeps each one's own), on the host, known to be finite."""
    import torch

    kinds = {"fp16": torch.float16, "fp32": torch.float32, None: None}
    if dtype not in kinds:
        raise InputError(f"weights are stored as fp16 or fp32, not {dtype!r}")
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu()
        value = value.to(kinds[dtype] or value.dtype) if value.is_floating_point() else value
        if dtype and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{part}: {name} is not finite in {dtype}; the training diverged, nothing was written")
        kept[name] = value.contiguous()
    return kept


def _stored_state(part: str, network: Any, dtype: str | None) -> dict[str, "torch.Tensor"]:
    return stored(part, dict(_named(part, network)), dtype)


def _named(part: str, network: Any) -> Iterator[tuple[str, "torch.Tensor"]]:
    """State names that every release reads: transformers 5 has dropped CLIP's `text_model.` in memory, not on disk."""
    for name, tensor in network.state_dict().items():
        if part in TEXT:
            if name.endswith("position_ids"):
                continue
            name = name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
        yield name, tensor


def _config(part: str, network: Any) -> dict[str, Any]:
    """A network's config.json, without the place it was loaded from.

    transformers 5 loads in the dtype that is named here: float32, as diffusers loads the other two.
    """
    config: dict[str, Any] = json.loads((network.config if part in TEXT else network).to_json_string())
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "_pre_quantization_dtype")}
    return {**config, "architectures": [type(network).__name__], "dtype": "float32"} if part in TEXT else config


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """The tokenizer in both forms: tokenizer.json, and the vocab.json and merges.txt that older releases read.

    How the last text was padded and cut, which it keeps in itself, is not written.
    """
    words = copy.deepcopy(tokenizer)
    words.backend_tokenizer.no_padding()
    words.backend_tokenizer.no_truncation()
    words.save_pretrained(folder)
    config = read_json(folder / "tokenizer_config.json")
    _write_json(folder / "tokenizer_config.json", {key: value for key, value in config.items() if key not in LOCAL})
    model = read_json(folder / "tokenizer.json")["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    _write_json(folder / "vocab.json", model["vocab"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def _index(scheduler: str, second: bool, force_zeros: bool) -> dict[str, Any]:
    from diffusers import __version__

    first = {
        "_class_name": "StableDiffusionXLPipeline" if second else "StableDiffusionPipeline",
        "_diffusers_version": __version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    xl = {
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": force_zeros,
        "add_watermarker": False,
    }
    return {**first, **(xl if second else {"requires_safety_checker": False, "safety_checker": [None, None]})}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _write_bytes(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
