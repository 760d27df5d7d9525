"""New networks, with random weights, in the forms Stable Diffusion pipelines are made of.

diffusers and transformers are imported where a network is made, not here: they take seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from latentgen.checkpoint import read_json
from latentgen.errors import InputError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

START, END, SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"


def tokenizer(captions: Iterable[str], vocabulary: int, context: int) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's form (Radford et al. 2021, section 2.4) learned from captions.

    Ids: 256 bytes, the same 256 at a word's end, the merges in the order learned, start, end. So any text can be
    written in it. `context` is the longest text in tokens, start and end included. Raises InputError for a vocabulary
    too small to hold the bytes.
    """
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    fixed = 2 * len(alphabet) + 2
    if vocabulary <= fixed:
        raise InputError(f"a vocabulary of {vocabulary} cannot hold the {fixed} byte and end tokens; give more")
    form = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(unk_token=END, continuing_subword_prefix="", end_of_word_suffix=SUFFIX))
    bpe.normalizer, bpe.pre_tokenizer = form.normalizer, form.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        min_frequency=2,
        initial_alphabet=alphabet,
        end_of_word_suffix=SUFFIX,
        special_tokens=[],
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]][: vocabulary - fixed]
    words = [*alphabet, *(byte + SUFFIX for byte in alphabet), *("".join(merge) for merge in merges), START, END]
    ids = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=context)


def read_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer that `save_pretrained` left in a folder; its context is one that the tower beside it can read."""
    from transformers import CLIPTokenizer

    words: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    tower = folder.with_name("text_encoder") / "config.json"
    if tower.is_file():
        words.model_max_length = min(words.model_max_length, int(read_json(tower).get("max_position_embeddings", 77)))
    return words


def clip(
    words: CLIPTokenizer, *, size: int, patch: int, width: int, heads: int, text_layers: int, image_layers: int
) -> CLIPModel:
    """A CLIP (Radford et al. 2021) of two towers of one width; pictures (B, 3, size, size) in [-1, 1]."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    text = {
        **tower,
        "num_hidden_layers": text_layers,
        "vocab_size": len(words),
        "max_position_embeddings": words.model_max_length,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "projection_dim": width,
    }
    vision = {
        **tower,
        "num_hidden_layers": image_layers,
        "image_size": size,
        "patch_size": patch,
        "projection_dim": width,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def text_tower(model: CLIPModel) -> CLIPTextModel:
    """The text tower alone, as Stable Diffusion pipelines hold it; a copy of the weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tower = CLIPTextModel(CLIPTextConfig(**model.config.text_config.to_dict()))
    tower.load_state_dict(_tower_weights(model, tower))
    return tower.eval()


def _tower_weights(model: CLIPModel, tower: CLIPTextModel) -> dict[str, torch.Tensor]:
    held = model.text_model.state_dict()
    prefix = "text_model." if next(iter(tower.state_dict())).startswith("text_model.") else ""
    return {prefix + name: value.detach().clone() for name, value in held.items()}


def autoencoder(*, channels: Sequence[int], latent_channels: int, layers: int, groups: int, size: int) -> AutoencoderKL:
    """An `AutoencoderKL` (Rombach et al. 2022, section 3.1) whose latents are 2^(len(channels) - 1) times smaller.

    Convolutional throughout (no attention in the middle), so that it takes any size.
    """
    from diffusers import AutoencoderKL

    count = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=groups,
        sample_size=size,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def unet(
    *,
    channels: Sequence[int],
    layers: int,
    head_width: int,
    latent_channels: int,
    latent_size: int,
    text_width: int,
    pooled: bool = False,
    dropout: float = 0.0,
) -> UNet2DConditionModel:
    """A U-Net with cross-attention on the text at every level (Rombach et al. 2022, section 3.3).

    pooled: the text states, pooled by attention, are added to the time embedding too (Saharia et al. 2022, section
    2.3): each block is told the whole caption, not only what its places ask for. Stock pipelines need not know.
    dropout: of what the blocks' second convolutions take, in training.
    """
    from diffusers import UNet2DConditionModel

    count = len(channels)
    heads = max(heads for heads in range(1, max(1, text_width // 64) + 1) if text_width % heads == 0)
    whole = {"addition_embed_type": "text", "addition_embed_type_num_heads": heads}
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * count,
        up_block_types=("CrossAttnUpBlock2D",) * count,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        # diffusers reads `attention_head_dim` as the number of heads of its attention blocks (its issue 2011)
        attention_head_dim=tuple(width // head_width for width in channels),
        cross_attention_dim=text_width,
        dropout=dropout,
        **(whole if pooled else {}),
    ).to(memory_format=torch.channels_last)
