"""Single files of others say nothing of their networks: shapes and family tell, and the picture is the folder's."""

import json
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentgen import InputError, Pipeline, cli
from latentgen.checkpoint import CLIP, OPENCLIP, SingleFile, open_checkpoint, save_pipeline
from latentgen.checkpoint.keys import from_diffusers, prefix
from latentgen.checkpoint.shapes import Family, configs_of
from latentgen.convert import convert
from latentgen.image import read_settings
from latentgen.models import loading
from latentgen.render import replay
from latentgen.request import Assumed
from tests.conftest import CONTEXT, SCHEDULE, padded_with_word_0
from tests.turns import Awaited

TEXT = "cond_stage_model.transformer.text_model."
HEAD = 64  # the narrowest tower that shapes can tell the heads of


def tower(tokenizer: Any, openclip: bool = False, projected: bool = False, layers: int = 3) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HEAD,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=CONTEXT,
        hidden_act="gelu" if openclip else "quick_gelu",
        projection_dim=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def networks(family: Family, words: Any, layers: int = 3) -> dict[str, Any]:
    """Random networks of a family, small where its shapes leave a choice."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(4)
    told: dict[str, Any] = {"attention_head_dim": 8, "cross_attention_dim": HEAD}
    parts: dict[str, Any] = {"tokenizer": words, "text_encoder": tower(words, layers=layers)}
    if family is Family.SD2:
        told |= {"attention_head_dim": (1, 2), "use_linear_projection": True}
        parts = {"tokenizer": padded_with_word_0(words), "text_encoder": tower(words, openclip=True, layers=layers)}
    if family is Family.SDXL:
        told |= {"attention_head_dim": (1, 2), "use_linear_projection": True, "cross_attention_dim": 2 * HEAD}
        told |= {"transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time"}
        told |= {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 24 + 6 * 256}
        parts["tokenizer_2"] = padded_with_word_0(words)
        parts["text_encoder_2"] = tower(words, openclip=True, projected=True)
    first = "DownBlock2D" if family is Family.SDXL else "CrossAttnDownBlock2D"
    last = "CrossAttnDownBlock2D" if family is Family.SDXL else "DownBlock2D"
    unet = UNet2DConditionModel(
        sample_size={Family.SD1: 64, Family.SD2: 96, Family.SDXL: 128}[family],
        block_out_channels=(64, 128),
        down_block_types=(first, last),
        up_block_types=(last.replace("Down", "Up"), first.replace("Down", "Up")),
        layers_per_block=1,
        **told,
    )
    with torch.no_grad():  # so that the prompt matters
        for name, weight in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
                weight.mul_(4)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        scaling_factor=0.13025 if family is Family.SDXL else 0.18215,
    )
    return {**parts, "unet": unet.eval(), "vae": vae.eval()}


@pytest.fixture(scope="module")
def plain(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(a family's folder, the single file of it whose header says nothing); layers: of the first text tower."""
    made: dict[Any, tuple[Path, Path]] = {}

    def make(family: Family, layers: int = 3) -> tuple[Path, Path]:
        if (family, layers) not in made:
            place = tmp_path_factory.mktemp("plain")
            config: dict[str, Any] = {**SCHEDULE, "_class_name": "DDIMScheduler"}
            if family is Family.SDXL:
                config = {**SCHEDULE, "_class_name": "EulerDiscreteScheduler"}
            if family is Family.SD2:
                config["prediction_type"] = "v_prediction"
            given = networks(family, parts["tokenizer"], layers)
            folder = save_pipeline(place / "folder", **given, scheduler_config=config)
            file, _ = convert(folder, place / "one.safetensors")
            made[family, layers] = folder, strip(file)
        return made[family, layers]

    return make


def strip(file: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    """The file without what its header says of us."""
    tensors = load_file(file)
    if change is not None:
        change(tensors)
    save_file(tensors, file, {"format": "pt"})
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    return file


def picture(place: Path, **options: Any) -> np.ndarray:
    call = {"negative_prompt": "rain!", "seed": 5, "num_inference_steps": 3, "guidance_scale": 4.0}
    pipe = Pipeline.from_pretrained(place, engine="torch", **options)
    return pipe("the green frog", height=32, width=24, output_type="np", **call).images


@pytest.mark.parametrize("family", Family)
def test_a_file_that_says_nothing_is_read_by_its_shapes(
    plain: Callable[..., tuple[Path, Path]], family: Family
) -> None:
    folder, file = plain(family)
    whole, alone = open_checkpoint(folder), open_checkpoint(file)
    assert set(whole.weights) == set(alone.weights)
    for part in (*alone.weights, "scheduler"):
        here, there = alone.config(part), whole.config(part)
        assert {key: there.get(key, value) for key, value in here.items() if key not in UNSAID} == {
            key: value for key, value in here.items() if key not in UNSAID
        }, part
    expected = picture(folder)
    assert expected.std() > 0.03
    np.testing.assert_array_equal(picture(file), expected)


UNSAID = ("projection_dim", "pad_token_id", "sample_size")  # what neither shapes nor pictures depend on


def stock_tokenizer(folder: Path) -> Path:
    """As OpenAI's CLIP has it, padded with its end mark; its tokenizer.json says so too."""
    words = json.loads((folder / "vocab.json").read_text())
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        said = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps({**said, "pad_token": "<|endoftext|>"}))
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["padding"] = {"strategy": {"Fixed": CONTEXT}, "direction": "Right", "pad_to_multiple_of": None}
    whole["padding"] |= {"pad_id": words["<|endoftext|>"], "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize("family", [Family.SD2, Family.SDXL])
def test_a_file_beside_a_stock_tokenizer_becomes_a_folder_that_pads_as_openclip_does(
    plain: Callable[..., tuple[Path, Path]], tmp_path: Path, family: Family
) -> None:
    from transformers import CLIPTokenizer

    folder, file = plain(family)
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    stock_tokenizer(tmp_path / "tokenizer")
    shutil.copy(file, tmp_path / "model.safetensors")
    made, _ = convert(tmp_path / "model.safetensors", tmp_path / "made")
    expected = picture(folder)
    np.testing.assert_array_equal(picture(made), expected)
    last = made / ("tokenizer_2" if family is Family.SDXL else "tokenizer")
    assert CLIPTokenizer.from_pretrained(last).pad_token_id == 0
    assert json.loads((last / "tokenizer.json").read_text())["padding"]["pad_id"] == 0
    if family is Family.SDXL:
        assert CLIPTokenizer.from_pretrained(made / "tokenizer").pad_token == "<|endoftext|>"
    onnx = Pipeline.from_pretrained(made, engine="onnx")
    call = {"negative_prompt": "rain!", "seed": 5, "num_inference_steps": 3, "guidance_scale": 4.0}
    found = onnx("the green frog", height=32, width=24, output_type="np", **call).images
    np.testing.assert_allclose(found, expected, atol=1e-3)


# --- Stable Diffusion 2 runs OpenCLIP's tower without its last layer, which a file may hold or not


@pytest.mark.parametrize("layers", [3, 23])
def test_a_tower_without_its_last_layer_loses_none(plain: Callable[..., tuple[Path, Path]], layers: int) -> None:
    folder, file = plain(Family.SD2, layers)
    assert open_checkpoint(file).config("text_encoder")["num_hidden_layers"] == layers
    np.testing.assert_array_equal(picture(file), picture(folder))


@pytest.mark.parametrize(("layers", "projection"), [(3, True), (23, True), (23, False)])
def test_a_whole_tower_is_run_without_its_last_layer(
    plain: Callable[..., tuple[Path, Path]], tmp_path: Path, layers: int, projection: bool
) -> None:
    folder, file = plain(Family.SD2, layers)

    def whole(tensors: dict[str, torch.Tensor]) -> None:
        start = "cond_stage_model.model."
        last = f"{start}transformer.resblocks.{layers - 1}."
        for name in [name for name in tensors if name.startswith(last)]:
            tensors[name.replace(f".{layers - 1}.", f".{layers}.")] = torch.ones_like(tensors[name])
        if projection:
            tensors |= {f"{start}text_projection": torch.ones(HEAD, HEAD), f"{start}logit_scale": torch.ones(())}

    copy = tmp_path / file.name
    copy.write_bytes(file.read_bytes())
    strip(copy, whole)
    assert open_checkpoint(copy, tokenizer=folder).config("text_encoder")["num_hidden_layers"] == layers
    np.testing.assert_array_equal(picture(copy, tokenizer=folder), picture(folder))


# --- the real families, from shapes alone, against the configs that were published

ATTENDS = ["CrossAttnDownBlock2D"] * 3
UNETS: dict[Family, dict[str, Any]] = {
    Family.SD1: {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [*ATTENDS, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    Family.SD2: {
        "sample_size": 96,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [*ATTENDS, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    Family.SDXL: {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", *ATTENDS[:2]],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
MARKS = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
OPENAI = {**MARKS, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
OPENAI |= {"hidden_act": "quick_gelu", "projection_dim": 768}
VIT_H = {**MARKS, "hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096}
BIG_G = {**MARKS, "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120}
TEXTS: dict[Family, dict[str, dict[str, Any]]] = {
    Family.SD1: {"text_encoder": OPENAI},
    Family.SD2: {"text_encoder": {**VIT_H, "hidden_act": "gelu", "projection_dim": 512}},
    Family.SDXL: {
        "text_encoder": OPENAI,
        "text_encoder_2": {**BIG_G, "hidden_act": "gelu", "projection_dim": 1280},
    },
}
VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
SCALES = {Family.SD1: (512, 0.18215), Family.SD2: (512, 0.18215), Family.SDXL: (1024, 0.13025)}


def published(family: Family) -> dict[str, dict[str, Any]]:
    size, scale = SCALES[family]
    return {"unet": UNETS[family], "vae": {**VAE, "sample_size": size, "scaling_factor": scale}, **TEXTS[family]}


def built(part: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A published network's tensors, which take no memory, under diffusers' names."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        if part in ("unet", "vae"):
            kind = UNet2DConditionModel if part == "unet" else AutoencoderKL
            return dict(kind.from_config(config).state_dict())
        tower = CLIPTextModelWithProjection if part.endswith("_2") else CLIPTextModel
        state = tower(CLIPTextConfig(**config)).state_dict()
    names = {name: name if name.startswith("text_") else f"text_model.{name}" for name in state}
    return {names[name]: value for name, value in state.items() if not name.endswith("position_ids")}


@pytest.mark.parametrize("family", Family)
def test_shapes_of_the_real_families_give_the_published_configs(family: Family) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for part, config in published(family).items():
        second = part == "text_encoder_2" or (part == "text_encoder" and family is Family.SD2)
        form = OPENCLIP if second else CLIP
        start = prefix(part, family is Family.SDXL, form)
        told = {"layers_per_block": 2, **config}
        for tie in from_diffusers(part, list(state := built(part, config)), told, form):
            size = tuple(state[tie.diffusers].shape)
            turned = {"flat": (*size, 1, 1), "transposed": size[::-1], "third": (3 * size[0], *size[1:])}
            shapes[start + tie.ldm] = turned.get(tie.form, size)
    if family is Family.SD2:  # as published: the whole tower
        start = "cond_stage_model.model."
        layer = f"{start}transformer.resblocks."
        shapes |= {
            name.replace("resblocks.22.", "resblocks.23."): size for name, size in shapes.items() if layer in name
        }
        shapes |= {f"{start}text_projection": (1024, 1024), f"{start}logit_scale": ()}
    assert Family.of(shapes) is family
    found = json.loads(json.dumps(configs_of(shapes, family, Path("file"))))
    for part, config in published(family).items():
        assert {key: found[part].get(key) for key in config} == config, part
        defaults = {"use_linear_projection": False, "in_channels": 4, "out_channels": 4, "layers_per_block": 2}
        for key, value in defaults.items() if part == "unet" else ():
            assert found[part][key] == config.get(key, value)
    expected = {"SD2": "v_prediction"}.get(family.name, "epsilon")
    scheduler = found["scheduler"]
    assert scheduler["prediction_type"] == expected
    table = ("scaled_linear", 0.00085, 0.012, 1000)
    keys = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
    assert tuple(scheduler[key] for key in keys) == table


# --- what is told of a file beside it is part of a picture's settings


def test_a_replay_opens_with_the_tokenizer_and_the_prediction_of_the_picture(
    plain: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, file = plain(Family.SD2)
    alone = shutil.copy(file, tmp_path / "alone.safetensors")
    told = {"tokenizer": folder / "tokenizer", "prediction_type": "epsilon"}
    pipe = Pipeline.from_pretrained(alone, engine="torch", **told)
    call = {"seed": 5, "num_inference_steps": 2, "height": 32, "width": 32}
    made = pipe("the green frog", **call).images[0]
    (tmp_path / "a.png").write_bytes(made.png())
    settings = read_settings(tmp_path / "a.png")
    assert settings["tokenizer"] == (folder / "tokenizer").as_posix() and settings["prediction_type"] == "epsilon"
    target, remarks = replay(tmp_path / "a.png")
    assert remarks == ["the same file, byte for byte"] and target.read_bytes() == made.png()


@pytest.mark.parametrize("there", [(), ("vocab.json",), ("text.txt",)])
def test_a_folder_without_a_tokenizer_in_it_is_refused_as_one(
    plain: Callable[..., tuple[Path, Path]], tmp_path: Path, there: tuple[str, ...]
) -> None:
    for name in there:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=f"no tokenizer folder at {tmp_path}; give the folder that holds tokenizer"):
        open_checkpoint(plain(Family.SD1)[1], tokenizer=tmp_path)


def test_a_picture_of_a_folder_that_was_named_a_tokenizer_it_did_not_use_is_made_again(
    folder: Path, tmp_path: Path
) -> None:
    made = Pipeline.from_pretrained(folder, engine="torch")("the green frog", seed=5, num_inference_steps=2).images[0]
    made.settings["tokenizer"] = (folder / "tokenizer").as_posix()  # as pictures once said
    (tmp_path / "a.png").write_bytes(made.png())
    target, remarks = replay(tmp_path / "a.png")
    assert remarks == ["the new file differs from the old one"]  # which says less
    with Image.open(target) as new, Image.open(tmp_path / "a.png") as old:
        assert np.array_equal(np.asarray(new), np.asarray(old))


def test_merges_are_part_of_a_fingerprint_where_they_are_read(
    plain: Callable[..., tuple[Path, Path]], parts: dict[str, Any], tmp_path: Path
) -> None:
    file = shutil.copy(plain(Family.SD1)[1], tmp_path / "model.safetensors")
    words = tmp_path / "tokenizer"
    parts["tokenizer"].save_pretrained(words)
    shutil.copy(Path(parts["tokenizer"].vocab_file), words)
    prints = []
    for text in ("#version: 0.2\n", "#version: 0.2\na p\n"):
        (words / "merges.txt").write_text(text)
        prints.append(open_checkpoint(file).fingerprint)
    assert prints[0] == prints[1]  # tokenizer.json holds its own
    (words / "tokenizer.json").unlink()
    for text in ("#version: 0.2\n", "#version: 0.2\na p\n"):
        (words / "merges.txt").write_text(text)
        prints.append(open_checkpoint(file).fingerprint)
    assert len(set(prints)) == 3


def test_that_v_is_assumed_of_stable_diffusion_2_is_said_where_nothing_else_is_told(
    plain: Callable[..., tuple[Path, Path]],
) -> None:
    folder, file = plain(Family.SD2)
    with pytest.warns(Assumed, match="what its U-Net predicts, and v is assumed") as caught:
        Pipeline.from_pretrained(file, engine="torch")
    assert len([each for each in caught if each.category is Assumed]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", Assumed)
        Pipeline.from_pretrained(file, engine="torch", prediction_type="v_prediction")
        Pipeline.from_pretrained(folder, engine="torch")
        Pipeline.from_pretrained(plain(Family.SD1)[1], engine="torch")
    with pytest.raises(InputError, match="unknown prediction type 'noise'"):
        Pipeline.from_pretrained(file, prediction_type="noise")


def test_the_command_line_opens_a_file_as_it_is_told(
    plain: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, file = plain(Family.SD2)
    alone = shutil.copy(file, tmp_path / "alone.safetensors")

    def run(*arguments: object) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["latentgen", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    call = [
        "render",
        "the green frog",
        "--weights",
        alone,
        "--steps",
        2,
        "--size",
        32,
        "--seed",
        5,
        "--engine",
        "torch",
    ]
    call += ["--tokenizer", folder / "tokenizer", "--out", tmp_path / "a.png"]
    code, said = run(*call)
    assert code == 0 and said.count("\n") == 1 and "v is assumed" in said
    assert run(*call, "--prediction-type", "epsilon") == (0, "")
    settings = read_settings(tmp_path / "a.png")
    assert settings["prediction_type"] == "epsilon" and settings["tokenizer"] == (folder / "tokenizer").as_posix()
    code, said = run(*call, "--prediction-type", "noise")
    assert code == 2 and said.startswith("latentgen: unknown prediction type 'noise'; it can be one of: ")
    made = ["convert", alone, tmp_path / "made", "--tokenizer", folder / "tokenizer", "--prediction-type"]
    assert run(*made, "noise") == (
        2,
        "latentgen: --prediction-type 'noise' is not known; it can be epsilon or v_prediction\n",
    )
    code, said = run(*made, "epsilon")
    assert code == 0 and "assumed" not in said
    scheduler = json.loads((tmp_path / "made/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "epsilon"
    run("convert", tmp_path / "made", tmp_path / "again.safetensors", "--prediction-type", "v_prediction")
    assert open_checkpoint(tmp_path / "again.safetensors").config("scheduler")["prediction_type"] == "v_prediction"


# What people's files hold besides under the networks' prefixes: of their training, and of CLIP's tower of pictures.
LEFT = ("first_stage_model.loss.logvar", "first_stage_model.model_ema.decay", "model_ema.decay")
OF_PICTURES = ("text_projection.weight", "logit_scale", "visual_projection.weight", "vision_model.pre_layrnorm.bias")
FIRST = {
    Family.SD1: (TEXT.removesuffix("text_model."), OF_PICTURES),
    Family.SD2: ("cond_stage_model.model.", ("visual.proj", "logit_scale")),
    Family.SDXL: ("conditioner.embedders.0.transformer.", OF_PICTURES),
}


@pytest.mark.parametrize("family", Family)
def test_what_a_network_has_no_use_for_is_passed_over(
    plain: Callable[..., tuple[Path, Path]], family: Family, tmp_path: Path
) -> None:
    folder, file = plain(family)
    copy = Path(shutil.copyfile(file, tmp_path / "more.safetensors"))
    start, names = FIRST[family]
    more = (*LEFT, *(start + name for name in names))
    strip(copy, lambda tensors: tensors.update({name: torch.ones(3) for name in more}))
    np.testing.assert_array_equal(picture(copy, tokenizer=folder), picture(file))


@pytest.mark.parametrize(
    "name", ["model.diffusion_model.control.weight", "first_stage_model.encoder.more.weight", TEXT + "more.weight"]
)
def test_what_a_network_may_have_use_for_is_refused(
    plain: Callable[..., tuple[Path, Path]], name: str, tmp_path: Path
) -> None:
    folder, file = plain(Family.SD1)
    copy = Path(shutil.copyfile(file, tmp_path / "more.safetensors"))
    strip(copy, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(InputError, match=name.rpartition(".")[0].rpartition(".")[2]):
        Pipeline.from_pretrained(copy, tokenizer=folder, engine="torch")


@pytest.mark.parametrize(
    ("family", "gone", "said"),
    [
        (Family.SD1, "first_stage_model.", "is not whole: it holds no autoencoder; name one that was not pruned"),
        (Family.SD2, "cond_stage_model.", "holds no text encoder; name"),
        (Family.SDXL, "conditioner.embedders.1.", "holds no second text encoder; name"),
        (Family.SD1, ("first_stage_model.", "cond_stage_model."), "holds no autoencoder and no text encoder; name"),
        (Family.SD1, "first_stage_model.encoder.down.", "'first_stage_model.encoder.down.0' missing; fetch it again"),
    ],
)
def test_what_a_file_was_pruned_of_is_named(
    plain: Callable[..., tuple[Path, Path]], family: Family, gone: Any, said: str, tmp_path: Path
) -> None:
    tensors = {name: value for name, value in load_file(plain(family)[1]).items() if not name.startswith(gone)}
    save_file(tensors, tmp_path / "pruned.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=re.escape(said)):
        open_checkpoint(tmp_path / "pruned.safetensors")


def test_a_file_of_another_frame_is_refused(plain: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    _, file = plain(Family.SDXL)
    copy = Path(shutil.copyfile(file, tmp_path / "edm.safetensors"))
    strip(copy, lambda tensors: tensors.update({"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}))
    with pytest.raises(InputError, match="was trained in EDM's frame"):
        Pipeline.from_pretrained(copy)


def test_a_file_is_read_in_one_thread_while_another_opens_weights(
    plain: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries let every new weight of the process be without numbers while they read a folder."""
    from accelerate import init_empty_weights

    inside, come, through = Event(), Event(), Event()
    monkeypatch.setattr(loading, "LOADING", Awaited(come))
    tensors = SingleFile.tensors

    def read(checkpoint: SingleFile, part: str) -> Any:
        inside.set()
        assert come.wait(20)
        return tensors(checkpoint, part)

    def second() -> None:
        assert inside.wait(20)
        with loading.quiet(), init_empty_weights():
            come.set()
            assert through.wait(20)

    folder, file = plain(Family.SD1)
    checkpoint = open_checkpoint(file, tokenizer=folder / "tokenizer")
    monkeypatch.setattr(SingleFile, "tensors", read)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second)
        try:
            vae = loading.load_part(checkpoint, "vae")
        finally:
            through.set()
        other.result()
    assert not any(weight.is_meta for weight in vae.parameters())
