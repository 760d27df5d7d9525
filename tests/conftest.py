"""Fixtures: a tiny random Stable Diffusion folder, with a real CLIP-form tokenizer trained on a few lines of text."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import json
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest

from latentgen.checkpoint import save_pipeline
from latentgen.models.onnx.export import write_graphs
from latentgen.stopping import stop_at_once

CORPUS = [
    "a red apple on a white table",
    "a blue bird, noto emoji style",
    "a smiling face with heart eyes, 3d fluent emoji",
    "the green frog and the yellow car in the rain",
    "an orange cat sleeping under a purple umbrella",
]
CONTEXT = 16  # tokens; short, so that tests can overrun it
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def clip_tokenizer(folder: Path) -> Any:
    """A byte-level BPE in CLIP's form: bytes, bytes that end a word, merges, then the start and end marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator((word for line in CORPUS for word in line.split()), trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT)


def tiny_parts(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Random networks of a Stable Diffusion's shape, some thousand parameters each; factor 4."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer(folder)
    torch.manual_seed(seed)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
        scaling_factor=0.7,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=16,
    )
    with torch.no_grad():  # a random U-Net answers to its condition only faintly; make the prompt matter
        for name, weight in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
                weight.mul_(4)
    return {"tokenizer": tokenizer, "text_encoder": text.eval(), "vae": vae.eval(), "unet": unet.eval()}


LONGEST = ("test_finetune", "test_train_end_to_end", "test_processes", "test_benchmarks", "test_compiled")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that processes which share the tests end together."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the tests' own, for graphs that are exported."""
    place = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(place)
    return place


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """tokenizer, text_encoder, vae and unet, as `save_pipeline` takes them."""
    return tiny_parts(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def make_folder(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_folder(name, **scheduler): a weights folder of the tiny parts under a scheduler config."""

    def make(
        name: str = "tiny", *, extra_files: dict[str, str] | None = None, graphs: bool = False, **scheduler: Any
    ) -> Path:
        config = {"_class_name": "DDIMScheduler", **SCHEDULE, **scheduler}
        place = tmp_path_factory.mktemp("weights") / name
        finish = write_graphs if graphs else None
        return save_pipeline(place, **parts, scheduler_config=config, extra_files=extra_files, finish=finish)

    return make


@pytest.fixture(scope="session")
def folder(make_folder: Callable[..., Path]) -> Path:
    """A tiny epsilon-prediction weights folder with defaults and ONNX graphs of its own."""
    defaults = {"defaults": {"num_inference_steps": 4, "guidance_scale": 3.0, "sampler": "ddim"}, "sample_size": 32}
    return make_folder(extra_files={"latentgen.json": json.dumps(defaults)}, graphs=True)


def tower(tokenizer: Any, width: int, projected: bool = False) -> Any:
    """A random CLIP text tower with OpenCLIP's activation."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu",
        projection_dim=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def padded_with_word_0(tokenizer: Any) -> Any:
    """As OpenCLIP pads, and so the folders of Stable Diffusion 2 and of XL's second tower."""
    other = copy.deepcopy(tokenizer)
    other.pad_token = "!"
    return other


@pytest.fixture(scope="session")
def xl(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion XL folder, as we save it."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    words = parts["tokenizer"]
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=16 + 20,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
    ).eval()
    return save_pipeline(
        tmp_path_factory.mktemp("xl") / "xl",
        tokenizer=words,
        text_encoder=tower(words, 16),
        tokenizer_2=padded_with_word_0(words),
        text_encoder_2=tower(words, 20, projected=True),
        vae=parts["vae"],
        unet=unet,
        scheduler_config={**SCHEDULE, "_class_name": "EulerDiscreteScheduler"},
    )


@pytest.fixture(scope="session")
def two(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion 2 folder: v-prediction, OpenCLIP's form of text tower."""
    import torch

    torch.manual_seed(2)
    words = padded_with_word_0(parts["tokenizer"])
    given = {**parts, "tokenizer": words, "text_encoder": tower(words, 16)}
    config = {**SCHEDULE, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    return save_pipeline(tmp_path_factory.mktemp("two") / "two", **given, scheduler_config=config)


@pytest.fixture
def ctrl_c_in_import_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Told a module's name: who imports it next meets the command's Ctrl-C. SystemExit is its end at once."""

    def of(name: str) -> None:
        class Watch(MetaPathFinder):
            def find_spec(self, found: str, *_: Any) -> None:
                if found == name:
                    signal.raise_signal(signal.SIGINT)

        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "meta_path", [Watch(), *sys.meta_path])

    monkeypatch.setattr(os, "_exit", sys.exit)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stop_at_once()
    yield of
    signal.signal(signal.SIGINT, before)
