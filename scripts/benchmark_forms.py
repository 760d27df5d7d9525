"""Weights folders of random numbers in forms that benchmarks are asked for: speed does not depend on the weights.

    python scripts/benchmark_forms.py 50m FOLDER [--graphs]

50m: a U-Net of 51 M weights at 16×16 latents (128 px), 5.7 GFLOP a forward pass of one row, with a small autoencoder
and CLIP. sd15: the three networks of Stable Diffusion 1.5 in their sizes, at 256 px. 50m-sd: the U-Net of 50m with the
autoencoder and CLIP of sd15, as somebody trains one who takes them from a checkpoint. Tokenizers are small ones.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmark_process import ROOT, guarded, run

from latentgen.errors import InputError

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CONTEXT, VOCABULARY = 77, 600
WORDS = ("a red apple", "a blue bird", "a smiling face", "a green car")
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
FORMS: dict[str, dict[str, dict[str, Any]]] = {
    "50m": {
        "unet": {"channels": (128, 256, 384), "blocks": (CROSS, CROSS, PLAIN), "heads": (4, 8, 12), "side": 16},
        "vae": {"channels": (32, 64, 128, 128), "layers": 1, "groups": 16},
        "text": {"width": 384, "layers": 4, "heads": 6, "vocabulary": VOCABULARY},
    },
    "sd15": {
        "unet": {"channels": (320, 640, 1280, 1280), "blocks": (CROSS, CROSS, CROSS, PLAIN), "heads": 8, "side": 32},
        "vae": {"channels": (128, 256, 512, 512), "layers": 2, "groups": 32},
        "text": {"width": 768, "layers": 12, "heads": 12, "vocabulary": 49408},
    },
}
FORMS["50m-sd"] = {**FORMS["sd15"], "unet": FORMS["50m"]["unet"]}
NAMES = ("icons", *FORMS)  # icons: the embedded weights


def form_folder(form: str, weights: str | None, scratch: Path, *, graphs: bool) -> str | None:
    """The folder of a form, made in `scratch` by a process of its own, so that this one imports no torch; its engine's
    copies go there too and not into the user's cache. "icons" is whatever `weights` says, None the embedded ones."""
    if form == "icons":
        return weights
    if weights is not None:
        raise InputError(f"--weights and --form {form} were both given; give one of them")
    place = scratch / form
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    script = str(ROOT / "scripts" / "benchmark_forms.py")
    run([sys.executable, script, form, str(place), *(["--graphs"] if graphs else [])])
    return str(place)


def make(form: str, folder: Path, graphs: bool) -> None:
    """Write one form as a weights folder, with ONNX graphs or without."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from latentgen.checkpoint import save_pipeline
    from latentgen.models import create
    from latentgen.models.onnx.export import write_graphs

    torch.manual_seed(0)
    unet, vae, text = (FORMS[form][part] for part in ("unet", "vae", "text"))
    words = create.tokenizer(WORDS, VOCABULARY, CONTEXT)
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    blocks, levels = unet["blocks"], len(vae["channels"])
    save_pipeline(
        folder,
        tokenizer=words,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=text["vocabulary"],
                hidden_size=text["width"],
                intermediate_size=4 * text["width"],
                num_hidden_layers=text["layers"],
                num_attention_heads=text["heads"],
                max_position_embeddings=CONTEXT,
                **ends,
            )
        ),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=vae["channels"],
            layers_per_block=vae["layers"],
            norm_num_groups=vae["groups"],
            latent_channels=4,
            sample_size=unet["side"] * 2 ** (levels - 1),
        ),
        unet=UNet2DConditionModel(
            sample_size=unet["side"],
            block_out_channels=unet["channels"],
            down_block_types=blocks,
            up_block_types=tuple(block.replace("Down", "Up") for block in reversed(blocks)),
            attention_head_dim=unet["heads"],
            cross_attention_dim=text["width"],
        ),
        scheduler_config=SCHEDULER,
        finish=write_graphs if graphs else None,
    )


def picture_flops(folder: Path, guided: bool) -> dict[str, float]:
    """Operations of a step of the U-Net and of one decoding, for one picture; two rows a step with guidance.

    Counted on tensors without data, with plain attention, whose products are all counted.
    """
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from torch.utils.flop_counter import FlopCounterMode

    configs = {part: json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae")}
    with torch.device("meta"), torch.no_grad():
        unet, vae = UNet2DConditionModel.from_config(configs["unet"]), AutoencoderKL.from_config(configs["vae"])
        for network in (unet, vae):
            network.set_attn_processor(AttnProcessor())
        side, rows = unet.config.sample_size, 2 if guided else 1
        x, states = torch.zeros(rows, unet.config.in_channels, side, side), unet.config.cross_attention_dim
        with FlopCounterMode(display=False) as step:
            unet(x, torch.zeros(rows), torch.zeros(rows, CONTEXT, states))
        with FlopCounterMode(display=False) as decoding:
            vae.decode(x[:1])
    return {"step": float(step.get_total_flops()), "decoding": float(decoding.get_total_flops())}


def matrix_peak(dtype: Any = None, rounds: int = 8) -> float:
    """Operations a second of the fastest of some matrix products. dtype: None is float32 on a CPU, float16 on a GPU."""
    import time

    import torch

    gpu = torch.cuda.is_available()
    side = 8192 if gpu else 2048
    dtype = dtype or (torch.float16 if gpu else torch.float32)
    a = torch.randn(side, side, device="cuda" if gpu else "cpu", dtype=dtype)
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ a
        if gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return 2 * side**3 / min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=tuple(FORMS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--graphs", action="store_true", help="with ONNX graphs beside the weights")
    asked = parser.parse_args()
    make(asked.form, asked.folder, asked.graphs)


if __name__ == "__main__":
    guarded(main)
