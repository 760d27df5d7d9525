"""What people who know diffusers write first: what means the same here is taken, and the rest has a line of its own."""

from collections.abc import Mapping
from typing import Any

from latentgen.errors import InputError

WORDS: Mapping[str, tuple[str, ...]] = {  # place -> arguments of diffusers there, and what other programs name so
    "from_pretrained": (
        *("torch_dtype", "device_map", "low_cpu_mem_usage", "scheduler", "unet", "vae", "text_encoder"),
        *("text_encoder_2", "safety_checker", "requires_safety_checker", "feature_extractor", "image_encoder"),
        *("use_safetensors", "variant", "revision", "local_files_only", "custom_pipeline"),
    ),
    "load_lora": ("weight_name", "adapter_name"),
    "a call": (
        *("return_dict", "callback_on_step_end_tensor_inputs", "cross_attention_kwargs", "callback", "callback_steps"),
        *("image", "mask_image", "strength", "ip_adapter_image", "sigmas", "prompt_2", "negative_prompt_2"),
        *("original_size", "target_size", "crops_coords_top_left", "denoising_end", "num_images", "cfg_scale"),
        *("scale", "steps", "n"),
    ),
}
TAKEN: Mapping[str, tuple[Any, ...]] = {  # word -> the values of it, beside None, that change nothing
    "return_dict": (True,),
    "callback_on_step_end_tensor_inputs": (["latents"], ("latents",)),
    "requires_safety_checker": (False,),
    "use_safetensors": (True,),
    "local_files_only": (False,),
    "low_cpu_mem_usage": (True, False),
}
_OPENING = "give device= and dtype= to from_pretrained"
_MEMORY = "give batch= to the call, or leave it at 'auto', which takes what memory there is"
_TILES = "give vae_tiling=True to the call; large pictures have it by themselves"
_LORAS = "load_lora(path, weight=, name=), set_lora_weight, unload_lora, fuse_lora and unfuse_lora are what there is"
_SCHEDULER = "give sampler= to the call; pipe.scheduler is the config that the weights came with"
_PICTURES = "this pipeline draws from noise alone; give latents= to begin elsewhere"
_PARTS = "open a weights folder with from_pretrained, or objects at hand with from_parts"
HINTS: Mapping[str, str] = {  # word -> what is written instead
    "return_dict": "leave it away; out.images is also out[0]",
    "callback_on_step_end_tensor_inputs": "the callback is given the latents alone; write ['latents'], or nothing",
    "cross_attention_kwargs": "the scale of a LoRA is load_lora(path, weight=), or set_lora_weight(name, weight)",
    "callback": "it is callback_on_step_end(pipe, index, time, {'latents': x}) here",
    "callback_steps": "callback_on_step_end is called after every step",
    "image": _PICTURES,
    "mask_image": _PICTURES,
    "strength": _PICTURES,
    "ip_adapter_image": _PICTURES,
    "sigmas": "give timesteps=, those to denoise at",
    "prompt_2": "both text encoders of Stable Diffusion XL read the one prompt",
    "negative_prompt_2": "both text encoders of Stable Diffusion XL read the one negative prompt",
    "original_size": "height= and width= are what the network is told",
    "target_size": "height= and width= are what the network is told",
    "crops_coords_top_left": "height= and width= are what the network is told",
    "denoising_end": "set pipe.interrupt = True from callback_on_step_end to end early",
    "num_images": "it is num_images_per_prompt",
    "cfg_scale": "it is guidance_scale",
    "scale": "it is guidance_scale of a call, and load_lora(path, weight=) of a LoRA",
    "steps": "it is num_inference_steps",
    "n": "it is num_images_per_prompt",
    "torch_dtype": "it is dtype= here, as dtype='float16'",
    "device_map": "give device=, one device for the whole",
    "safety_checker": "there is none; write safety_checker=None, or nothing",
    "requires_safety_checker": "there is no safety checker; leave it away",
    "feature_extractor": "there is no safety checker, which alone has a use for it",
    "image_encoder": _PICTURES,
    "use_safetensors": "only .safetensors files are opened, no pickles; leave it away",
    "variant": "which files there are is seen; say what to compute in with dtype=",
    "revision": "fetch the revision first, and give its folder",
    "local_files_only": "set HF_HUB_OFFLINE=1 in the environment",
    "low_cpu_mem_usage": "weights are never in memory twice; leave it away",
    "scheduler": _SCHEDULER,
    "custom_pipeline": _PARTS,
    "weight_name": "name the file in the path: load_lora(folder + '/' + file)",
    "adapter_name": "it is name=",
    "to": _OPENING,
    "cuda": _OPENING,
    "cpu": _OPENING,
    "half": _OPENING,
    "device": f"{_OPENING}; pipe.machine says what it runs on",
    "dtype": f"{_OPENING}; pipe.machine says what it computes in",
    "unet": f"its network is pipe.network; {_PARTS}",
    "vae": f"its autoencoder is pipe.latent; {_PARTS}",
    "text_encoder": f"its text encoder is pipe.text; {_PARTS}",
    "text_encoder_2": f"its text encoders are pipe.text; {_PARTS}",
    "tokenizer": f"its text encoder is pipe.text; {_PARTS}",
    "components": _PARTS,
    "config": "what the weights say is pipe.terms, pipe.scheduler and pipe.weights",
    "load_lora_weights": _LORAS,
    "unload_lora_weights": _LORAS,
    "set_adapters": _LORAS,
    "get_active_adapters": _LORAS,
    "delete_adapters": _LORAS,
    "disable_lora": _LORAS,
    "enable_lora": _LORAS,
    "set_progress_bar_config": "there is no bar; callback_on_step_end is told of each step",
    "progress_bar": "there is no bar; callback_on_step_end is told of each step",
    "enable_vae_tiling": _TILES,
    "disable_vae_tiling": "give vae_tiling=False to the call",
    "enable_vae_slicing": _MEMORY,
    "disable_vae_slicing": _MEMORY,
    "enable_attention_slicing": _MEMORY,
    "enable_model_cpu_offload": _MEMORY,
    "enable_sequential_cpu_offload": _MEMORY,
    "enable_xformers_memory_efficient_attention": "attention is fused already; leave it away",
    "enable_freeu": "guidance_scale, guidance_interval, guidance_projection and pag_scale are what steers a picture",
    "encode_prompt": "pipe.text.encode([prompt]) gives the states",
    "save_pretrained": "latentgen.checkpoint.save_pipeline writes the parts; a folder that was opened is saved already",
    "_guidance_scale": "a callback steers by the latents it returns, and stops with pipe.interrupt = True",
    "guidance_scale": "give guidance_scale= to the call",
    "num_timesteps": "give num_inference_steps= to the call",
    "_num_timesteps": "give num_inference_steps= to the call",
}


def take(place: str, others: Mapping[str, Any]) -> None:
    """Let arguments of diffusers pass that change nothing here; an InputError says what to write for the rest.

    place: of `WORDS`. Raises TypeError, as Python does, for words that nobody knows there.
    """
    for word, value in others.items():
        if word not in WORDS[place]:
            raise TypeError(f"{place} got an unexpected keyword argument {word!r}")
        same = any(type(value) is type(own) and value == own for own in TAKEN.get(word, ()))
        if value is not None and not same:
            raise InputError(f"{place} takes no {word}: {HINTS[word]}")


def lacking(name: str) -> str:
    """What an AttributeError says of an attribute that a pipeline has not."""
    return f"a Pipeline has no {name!r}" + (f": {HINTS[name]}" if name in HINTS else "")
