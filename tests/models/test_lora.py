"""LoRA files: in every form people have, the picture is that of diffusers with PEFT, and nothing is left behind."""

import copy
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentgen import InputError, Pipeline
from latentgen.checkpoint import open_checkpoint
from latentgen.durable import sha256
from latentgen.models.lora import Lora, Loras, Update, read_lora, write_kohya
from latentgen.models.lora.file import is_adapter
from latentgen.models.lora.layers import ModuleLayers, module_loras
from latentgen.models.lora.names import index
from latentgen.models.lora.stack import Loaded, WordsBeside
from latentgen.models.onnx.places import fused_folder

TOLERANCE = 2e-4  # in [0, 1]; what is promised is 2e-3
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "proj_in", "conv_shortcut", "time_emb_proj"]
CALL: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
BARE = f"^{LAYER.removeprefix('unet.')}"  # as diffusers writes the keys of patterns
ANCHORED: dict[str, Any] = {"r": 3, "lora_alpha": 4, "alpha_pattern": {BARE: 32}, "rank_pattern": {BARE: 2}}


def state(pipe: Pipeline) -> dict[str, torch.Tensor]:
    assert pipe.loras is not None
    parts = pipe.loras.parts.items()
    return {f"{part}.{name}": layers._weight(name).clone() for part, layers in parts for name in layers.names()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def opened(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder, engine="torch")


@pytest.fixture
def pipe(opened: Pipeline) -> Iterator[Pipeline]:
    before = state(opened)
    yield opened
    opened.unfuse_lora()
    opened.unload_lora()
    assert same(before, state(opened))  # whatever a test did, it can be taken out again to the bit


def ours(pipe: Pipeline, prompt: str = "a red apple", **more: Any) -> np.ndarray:
    return pipe(prompt, seed=3, **CALL, **more).images[0]


@pytest.fixture(scope="module")
def diffusers_pipe(folder: Path) -> Callable[[], Any]:
    def make() -> Any:
        from diffusers import StableDiffusionPipeline

        theirs = StableDiffusionPipeline.from_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        return theirs

    return make


def theirs(pipe: Any) -> np.ndarray:
    from latentgen.diffusion.noise import Noise

    latents = torch.from_numpy(Noise([3]).initial((4, 8, 8)))
    return pipe("a red apple", latents=latents, **CALL).images[0]


def random(model: torch.nn.Module, seed: int) -> None:
    """An adapter as if it had been trained: every tensor of it is something."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if "magnitude" in name:
            tensor.data *= 1 + 0.2 * torch.rand(tensor.shape, generator=generator)
        elif any(kind in name for kind in ("lora_", "hada_", "lokr_")):
            tensor.data = 0.25 * torch.randn(tensor.shape, generator=generator)


@pytest.fixture(scope="module")
def trained(diffusers_pipe: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder with pytorch_lora_weights.safetensors, as diffusers' training scripts save it."""

    def make(seed: int, text: bool = True, **settings: Any) -> Path:
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict

        pipe = diffusers_pipe()
        folder = tmp_path_factory.mktemp("lora")
        config = {"r": 3, "lora_alpha": 6, "target_modules": ATTENTION, **settings}
        pipe.unet.add_adapter(LoraConfig(**config))
        pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "v_proj", "fc1"]))
        random(pipe.unet, seed)
        random(pipe.text_encoder, seed + 1)
        tower = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.text_encoder))
        pipe.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(pipe.unet),
            text_encoder_lora_layers=tower if text else None,
            unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
            text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict() if text else None,
        )
        return folder

    return make


@pytest.fixture(scope="module")
def first(trained: Callable[..., Path]) -> Path:
    return trained(1)


@pytest.fixture(scope="module")
def second(trained: Callable[..., Path]) -> Path:
    return trained(10, text=False, target_modules=[*ATTENTION, *CONVOLUTIONS], lora_alpha=2)


def kohya(pipe: Pipeline, file: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A file as kohya's scripts write it: linear layers, 1x1 and 3x3 convolutions, both networks, alphas."""
    assert pipe.loras is not None
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for part, layers in pipe.loras.parts.items():
        for name, shape in ((name, layers.read(name).shape) for name in layers.names()):
            wanted = (*ATTENTION, *CONVOLUTIONS, "proj_out", "ff.net.2", "q_proj", "out_proj", "fc2", "conv2")
            if not name.endswith(wanted):
                continue
            prefix, full = ("lora_unet", name) if part == "unet" else ("lora_te", f"text_model.{name}")
            key = f"{prefix}_{full.replace('text_model.text_model.', 'text_model.').replace('.', '_')}"
            down, up = (4, *shape[1:]), (shape[0], 4, *((1, 1) if len(shape) == 4 else ()))
            tensors[f"{key}.lora_down.weight"] = 0.2 * torch.randn(down, generator=generator)
            tensors[f"{key}.lora_up.weight"] = 0.2 * torch.randn(up, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, file)
    return file


def test_a_lora_that_diffusers_saved_makes_the_picture_it_makes_there(
    pipe: Pipeline, first: Path, diffusers_pipe: Callable[[], Any]
) -> None:
    plain = ours(pipe)
    there = diffusers_pipe()
    there.load_lora_weights(first, adapter_name="one")
    name = pipe.load_lora(first)
    assert name == first.name
    np.testing.assert_allclose(ours(pipe), theirs(there), atol=TOLERANCE)
    assert np.abs(ours(pipe) - plain).max() > 0.02
    there.set_adapters(["one"], [0.4])
    pipe.set_lora_weight(name, 0.4)
    np.testing.assert_allclose(ours(pipe), theirs(there), atol=TOLERANCE)
    pipe.set_lora_weight(name, 0)
    np.testing.assert_array_equal(ours(pipe), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_of_kohyas_form_makes_the_picture_that_diffusers_makes_of_it(
    pipe: Pipeline, diffusers_pipe: Callable[[], Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    plain, file = ours(pipe), kohya(pipe, tmp_path / "style.safetensors", dtype=dtype)
    there = diffusers_pipe()
    there.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="one")
    there.set_adapters(["one"], [0.7])
    pipe.load_lora(file, weight=0.7)
    got = ours(pipe)
    np.testing.assert_allclose(got, theirs(there), atol=TOLERANCE if dtype == torch.float32 else 2e-3)
    assert np.abs(got - plain).max() > 0.02


def test_a_pattern_that_is_anchored_at_the_networks_own_names_is_heard(
    pipe: Pipeline, trained: Callable[..., Path], diffusers_pipe: Callable[[], Any]
) -> None:
    made = trained(20, text=False, **ANCHORED)
    there = diffusers_pipe()
    there.load_lora_weights(made)
    pipe.load_lora(made)
    np.testing.assert_allclose(ours(pipe), theirs(there), atol=TOLERANCE)


@pytest.mark.parametrize("tower", ["", "text_model."])
def test_a_text_encoders_pattern_is_heard_with_and_without_the_towers_name(tower: str, tmp_path: Path) -> None:
    layer = "encoder.layers.0.self_attn.q_proj"
    settings = {"text_encoder.lora_alpha": 1, "text_encoder.alpha_pattern": {f"^{tower}{layer}": 8}}
    for form in (f"text_encoder.{layer}", f"text_encoder.text_model.{layer}"):
        save_file(pair(form), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
        assert read_lora(tmp_path / "a.safetensors").updates[form].scale == 8 / 2


def test_two_at_once_and_fused_are_the_pictures_of_diffusers(
    pipe: Pipeline, first: Path, second: Path, diffusers_pipe: Callable[[], Any]
) -> None:
    there = diffusers_pipe()
    for name, folder in (("one", first), ("two", second)):
        there.load_lora_weights(folder, adapter_name=name)
    there.set_adapters(["one", "two"], [0.8, -0.5])
    before = state(pipe)
    pipe.load_lora(first, 0.8, name="one")
    pipe.load_lora(second, -0.5, name="two")
    unfused = ours(pipe)
    np.testing.assert_allclose(unfused, theirs(there), atol=TOLERANCE)
    assert same(before, state(pipe))  # beside the weights, not in them
    pipe.fuse_lora()
    np.testing.assert_array_equal(ours(pipe), unfused)
    assert not same(before, state(pipe))
    there.fuse_lora()
    np.testing.assert_allclose(ours(pipe), theirs(there), atol=TOLERANCE)
    pipe.unfuse_lora()
    assert same(before, state(pipe))
    np.testing.assert_array_equal(ours(pipe), unfused)


def test_what_is_taken_out_leaves_what_is_loaded_as_if_alone(pipe: Pipeline, first: Path, second: Path) -> None:
    before, plain = state(pipe), ours(pipe)
    pipe.load_lora(second, name="two")
    alone = ours(pipe)
    pipe.load_lora(first, name="one")
    both = ours(pipe)
    pipe.unload_lora("one")
    np.testing.assert_array_equal(ours(pipe), alone)
    pipe.fuse_lora()
    np.testing.assert_array_equal(ours(pipe), alone)
    pipe.load_lora(first, name="one")  # fused as well
    np.testing.assert_allclose(ours(pipe), both, atol=1e-5)
    pipe.set_lora_weight("two", 0)
    pipe.set_lora_weight("two", 1)
    np.testing.assert_allclose(ours(pipe), both, atol=1e-5)
    assert pipe.loras is not None and not any(layers._used for layers in pipe.loras.parts.values())
    pipe.unload_lora()
    assert same(before, state(pipe))
    np.testing.assert_array_equal(ours(pipe), plain)


KINDS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 3, "lora_alpha": 4, "alpha_pattern": {"to_q": 9}, "rank_pattern": {"to_k": 2}},
    "LoRA, anchored": ANCHORED,
    "rsLoRA": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "DoRA": {"r": 3, "lora_alpha": 4, "use_dora": True},
    "LoHaConfig": {"r": 3, "alpha": 2},
    "LoHa, effective": {"r": 3, "alpha": 2, "use_effective_conv2d": True},
    "LoKrConfig": {"r": 2, "alpha": 3, "decompose_both": True, "decompose_factor": 4},
    "LoKr, whole": {"r": 64, "alpha": 3},
    "LoKr, effective": {"r": 2, "alpha": 3, "use_effective_conv2d": True, "decompose_factor": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_that_peft_saves_does_what_it_does_there(
    parts: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    import copy

    import peft

    others = dict.fromkeys(("rsLoRA", "DoRA", "LoRA, anchored"), "LoraConfig")
    name = kind if kind.endswith("Config") else others.get(kind, kind[:4] + "Config")
    config = getattr(peft, name)(target_modules=[*ATTENTION, *CONVOLUTIONS], **KINDS[kind])
    unet = copy.deepcopy(parts["unet"])
    made = peft.get_peft_model(copy.deepcopy(unet), config)
    random(made, 5)
    made.save_pretrained(tmp_path)
    x, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = unet(x, 500, states).sample
        expected = made.eval()(x, 500, states).sample
        loras = module_loras(unet=unet)
        loras.load(tmp_path)
        got = unet(x, 500, states).sample
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert (got - plain).abs().max() > 1e-2
        loras.unload()
        assert torch.equal(unet(x, 500, states).sample, plain)


def test_lycoris_forms_equal_their_equations(tmp_path: Path) -> None:
    """LoCon in Tucker's form, LoKr with both factors whole, a difference, and DoRA by rows and by columns."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    module = torch.nn.ModuleDict(
        {"conv": torch.nn.Conv2d(4, 6, 3), "line": torch.nn.Linear(4, 4), "other": torch.nn.Linear(6, 4)}
    )
    module.requires_grad_(False)
    conv, line, other = (module[name].weight.clone() for name in ("conv", "line", "other"))
    down, mid, up = made(2, 4, 1, 1), made(2, 2, 3, 3), made(6, 2, 1, 1)
    x = made(1, 4, 5, 5)
    middle = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), mid)
    expected = torch.nn.functional.conv2d(x, conv, module["conv"].bias) + 0.5 * torch.nn.functional.conv2d(middle, up)
    tensors = {"conv.lora_down.weight": down, "conv.lora_mid.weight": mid, "conv.lora_up.weight": up}
    tensors["conv.alpha"] = torch.tensor(1.0)
    k1, k2 = made(2, 2), made(2, 2)
    tensors |= {"line.lokr_w1": k1, "line.lokr_w2": k2, "line.alpha": torch.tensor(77.0)}  # two whole factors: no scale
    low, high, magnitude = made(1, 6), made(4, 1), made(1, 6).abs()
    tensors |= {"other.lora_down.weight": low, "other.lora_up.weight": high, "other.dora_scale": magnitude}
    save_file({f"lora_unet_{key}": tensor for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    loras = module_loras(unet=module)
    loras.load(tmp_path / "a.safetensors")
    torch.testing.assert_close(module["conv"](x), expected, atol=1e-5, rtol=1e-5)
    eye = torch.eye(4)
    torch.testing.assert_close(module["line"](eye) - module["line"].bias, (line + torch.kron(k1, k2)).T)
    whole = other + high @ low
    columns = whole * (magnitude / whole.norm(dim=0, keepdim=True))
    torch.testing.assert_close(module["other"](torch.eye(6)) - module["other"].bias, columns.T)
    loras.set_weight("a", 0.5)
    torch.testing.assert_close(module["other"](torch.eye(6)) - module["other"].bias, ((columns + other) / 2).T)
    save_file(
        {"lora_unet_other.diff": high @ low, "lora_unet_other.dora_scale": made(4, 1)}, tmp_path / "b.safetensors"
    )
    loras.unload()
    loras.load(tmp_path / "b.safetensors")
    torch.testing.assert_close(
        (module["other"](torch.eye(6)) - module["other"].bias).T.norm(dim=1, keepdim=True),
        load_file(tmp_path / "b.safetensors")["lora_unet_other.dora_scale"].abs(),
    )


# What LyCORIS' full and train_norm and ComfyUI's LoraSave make: by its name here, a parameter's change in the file.
PLAIN = {
    "unet.conv_in.weight": "lora_unet_conv_in.diff",
    "unet.conv_in.bias": "lora_unet_conv_in.diff_b",
    "unet.conv_norm_out.weight": "lora_unet_conv_norm_out.w_norm",
    "unet.conv_norm_out.bias": "lora_unet_conv_norm_out.b_norm",
    "unet.down_blocks.0.resnets.0.norm1.weight": "diffusion_model.input_blocks.1.0.in_layers.0.diff",
    "unet.down_blocks.0.resnets.0.norm1.bias": "diffusion_model.input_blocks.1.0.in_layers.0.diff_b",
    f"{LAYER.removesuffix('to_q')}to_out.0.bias": f"{LAYER.removesuffix('to_q')}to_out.0.diff_b",
    "text_encoder.final_layer_norm.weight": "text_encoders.clip_l.transformer.text_model.final_layer_norm.diff",
    "text_encoder.final_layer_norm.bias": "lora_te_text_model_final_layer_norm.b_norm",
    "text_encoder.encoder.layers.0.mlp.fc1.bias": "lora_te_text_model_encoder_layers_0_mlp_fc1.diff_b",
}


def of_norms_and_biases(pipe: Pipeline, file: Path) -> dict[str, torch.Tensor]:
    """The changes, by the names of PLAIN; written into a file, a low rank beside one of them."""
    generator, parameters = torch.Generator().manual_seed(0), state(pipe)
    changes = {
        name: 0.3 * torch.randn(parameters[name.removesuffix(".weight")].shape, generator=generator) for name in PLAIN
    }
    save_file({PLAIN[name]: change for name, change in changes.items()} | pair(high=16, size=0.1), file)
    return changes


def test_changes_of_norms_and_biases_are_added_weighed_and_taken_out(
    pipe: Pipeline, diffusers_pipe: Callable[[], Any], tmp_path: Path
) -> None:
    plain, before, there = ours(pipe), state(pipe), diffusers_pipe()
    changes = of_norms_and_biases(pipe, tmp_path / "full.safetensors")
    changes[f"{LAYER}.weight"] = torch.full((16, 16), 0.1 * 2)  # of ones, of rank 2
    with torch.no_grad():
        for name, change in changes.items():
            part, _, own = name.partition(".")
            (weight,) = (held for key, held in getattr(there, part).named_parameters() if f".{key}".endswith(f".{own}"))
            weight.add_(0.5 * change)
    pipe.load_lora(tmp_path / "full.safetensors", 0.5)
    changed = ours(pipe)
    np.testing.assert_allclose(changed, theirs(there), atol=TOLERANCE)
    assert np.abs(changed - plain).max() > 0.02 and same(before, state(pipe))
    pipe.fuse_lora()
    np.testing.assert_array_equal(ours(pipe), changed)
    assert not same(before, state(pipe))
    pipe.set_lora_weight("full", 0)
    np.testing.assert_array_equal(ours(pipe), plain)
    pipe.set_lora_weight("full", 0.5)
    np.testing.assert_array_equal(ours(pipe), changed)
    pipe.unfuse_lora()
    assert same(before, state(pipe))
    np.testing.assert_array_equal(ours(pipe), changed)
    pipe.unload_lora()
    np.testing.assert_array_equal(ours(pipe), plain)


def test_changes_of_norms_and_biases_are_in_fused_graphs_and_in_kohyas_form(
    pipe: Pipeline, folder: Path, tmp_path: Path
) -> None:
    of_norms_and_biases(pipe, tmp_path / "full.safetensors")
    pipe.load_lora(tmp_path / "full.safetensors")
    expected = ours(pipe)
    pipe.unload_lora()
    graphs = Pipeline.from_pretrained(folder, engine="onnx", loras=[{"path": tmp_path / "full.safetensors"}])
    np.testing.assert_allclose(ours(graphs), expected, atol=1e-3)
    write_kohya(tmp_path / "full.safetensors", tmp_path / "kohya.safetensors")
    assert all(key.startswith("lora_") for key in load_file(tmp_path / "kohya.safetensors"))
    pipe.load_lora(tmp_path / "kohya.safetensors")
    np.testing.assert_allclose(ours(pipe), expected, atol=1e-5)


def test_half_precision_weights_come_back_to_the_bit(folder: Path, first: Path) -> None:
    half = Pipeline.from_pretrained(folder, dtype="bfloat16")
    before, plain = state(half), ours(half)
    half.load_lora(first)
    changed = ours(half)
    assert np.abs(changed - plain).max() > 0.02
    half.fuse_lora()
    np.testing.assert_array_equal(ours(half), changed)
    assert not same(before, state(half))
    half.unfuse_lora()
    assert same(before, state(half))
    half.unload_lora()
    np.testing.assert_array_equal(ours(half), plain)


def test_the_settings_name_what_is_loaded(pipe: Pipeline, first: Path) -> None:
    assert "loras" not in pipe("a", seed=0, num_inference_steps=1).settings
    pipe.load_lora(first, 0.5, name="style")
    (said,) = pipe("a", seed=0, num_inference_steps=1).of(0)["loras"]
    assert (said["name"], said["path"], said["weight"]) == ("style", first.as_posix(), 0.5)
    assert said["sha256"] == read_lora(first).sha256
    json.dumps(said)
    assert pipe.load_lora(first) == first.name and pipe.load_lora(first) == f"{first.name}-2"


def test_a_peft_folder_is_known_by_its_settings_too_and_a_single_file_by_itself(folder: Path, tmp_path: Path) -> None:
    file = written(tmp_path, pair(), "adapter_model.safetensors")
    assert read_lora(tmp_path).sha256 == sha256(file)
    places = set()
    for alpha in (4, 16):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": alpha}))
        assert read_lora(tmp_path).sha256 == read_lora(file).sha256 != sha256(file)
        places.add(fused_folder(open_checkpoint(folder), [{"path": tmp_path}]))
    assert len(places) == 2


def written(folder: Path, tensors: dict[str, torch.Tensor], name: str = "a.safetensors") -> Path:
    save_file(tensors, folder / name)
    return folder / name


def pair(layer: str = LAYER, wide: int = 16, high: int = 16, size: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_A.weight": torch.ones(2, wide), f"{layer}.lora_B.weight": size * torch.ones(high, 2)}


BAD: list[tuple[dict[str, torch.Tensor], str]] = [
    (
        pair("unet.down_blocks.7.attn.to_q"),
        "another model: unet.down_blocks.7.attn.to_q.lora_A.weight has no layer here",
    ),
    (pair() | pair("text_encoder_2.x"), "text_encoder_2.x.lora_A.weight has no layer here .1 of 2 have none"),
    (pair(wide=768, high=320), "is for another model: .*attn1.to_q.lora_A.weight and those beside it"),
    (pair(wide=8, high=32), "is for another model"),  # the same number of elements
    (pair() | {"emb_params": torch.ones(2)}, "holds emb_params, which is no part of a LoRA"),
    (pair() | {f"{LAYER}.diff_b": torch.ones(16)}, "to_q.diff_b has no layer here .1 of 2 have none"),
    ({"unet.conv_in.diff_b": torch.ones(3)}, "conv_in.diff_b and those beside it .* do not fit a layer of shape .16,."),
    (pair() | {f"{LAYER}.lora_B.bias": torch.ones(2)}, "to_q.lora_B.bias, which is no part of a LoRA"),
    ({f"{LAYER}.lora_A.weight": torch.ones(2, 16)}, "make no LoRA"),
    (pair(size=0.0), "changes nothing"),
    (pair(size=float("nan")), "is not finite"),
    (pair() | {f"{LAYER}.alpha": torch.ones(2)}, "to_q.alpha has shape .2,., which no LoRA's has"),
    ({}, "holds no tensors"),
]


@pytest.mark.parametrize(("tensors", "line"), BAD, ids=[line[:30] for _, line in BAD])
def test_a_file_that_cannot_be_used_gets_one_line_and_changes_nothing(
    pipe: Pipeline, first: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], line: str
) -> None:
    pipe.load_lora(first)
    before = ours(pipe)
    file = written(tmp_path, tensors)
    for weight in (1.0, 0.0):
        with pytest.raises(InputError, match=line) as caught:
            pipe.load_lora(file, weight)
        assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(ours(pipe), before)
    assert pipe.loras is not None and list(pipe.loras.loaded) == [first.name]


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": "x"},
        {"lora_alpha": [1]},
        {"lora_alpha": math.nan},
        {"lora_alpha": 2, "r": "two"},
        {"lora_alpha": 2, "alpha_pattern": [1]},
        {"lora_alpha": 2, "alpha_pattern": {"(": 1}},
    ],
)
def test_settings_of_a_lora_that_cannot_be_used_are_one_line(settings: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path, pair(), "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=f"the rank or alpha that is told of {LAYER} cannot be used") as caught:
        read_lora(tmp_path)
    assert "\n" not in str(caught.value)


def test_metadata_that_is_no_table_says_nothing(tmp_path: Path) -> None:
    save_file(pair(), tmp_path / "a.safetensors", {"lora_adapter_metadata": "[]"})
    (update,) = read_lora(tmp_path / "a.safetensors").updates.values()
    assert update.scale == 1


def test_new_words_in_the_file_of_a_lora_are_said_and_kept(pipe: Pipeline, tmp_path: Path) -> None:
    word = {"bundle_emb.<mine>.string_to_param.*": torch.ones(2, 16), "bundle_emb.b.emb_params": torch.ones(1, 16)}
    alone, both = written(tmp_path, pair(), "alone.safetensors"), written(tmp_path, pair() | word)
    assert is_adapter(both)
    with pytest.warns(WordsBeside, match=r"holds new words too, '<mine>', 'b'; --word .*a.safetensors .* teaches them"):
        pipe.load_lora(both)
    got = ours(pipe)
    pipe.unload_lora()
    pipe.load_lora(alone)
    np.testing.assert_array_equal(got, ours(pipe))
    write_kohya(both, tmp_path / "kohya.safetensors")
    kept = load_file(tmp_path / "kohya.safetensors")
    assert {key for key in kept if key.startswith("bundle_emb")} == {*word}
    with pytest.raises(InputError, match="holds no tensors; it is no LoRA"):
        pipe.load_lora(written(tmp_path, word))


def test_a_lora_of_another_width_is_refused(pipe: Pipeline, trained: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(kohya(pipe, tmp_path / "kohya.safetensors"))
    key = next(key for key in tensors if "attn2_to_k.lora_down" in key)
    tensors[key] = torch.ones(4, 1024)  # of a model with a wider text encoder
    with pytest.raises(InputError, match=rf"is for another model: {key}"):
        pipe.load_lora(written(tmp_path, tensors))


def test_other_things_than_loras_get_one_line(pipe: Pipeline, first: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"x")
    (tmp_path / "torn.safetensors").write_bytes((first / "pytorch_lora_weights.safetensors").read_bytes()[:-7])
    for path, line in {
        "a.pt": "is a pickle",
        "torn.safetensors": "torn",
        "none.safetensors": "no LoRA at",
        ".": "holds no LoRA",
    }.items():
        with pytest.raises(InputError, match=line):
            pipe.load_lora(tmp_path / path)
    pipe.load_lora(first, name="one")
    with pytest.raises(InputError, match="named 'one' is loaded already"):
        pipe.load_lora(first, name="one")
    with pytest.raises(InputError, match="no LoRA named 'two' is loaded; there are: 'one'"):
        pipe.unload_lora("two")
    for weight, line in ((float("inf"), "is inf; it must be a number from"), ("much", "must be a number")):
        with pytest.raises(InputError, match=line):
            pipe.set_lora_weight("one", weight)  # type: ignore[arg-type]


def test_attention_processors_of_old_and_the_original_layouts_names_are_known() -> None:
    layers = {
        "unet": {"down_blocks.1.attentions.0.proj_in": ["input_blocks.4.1.proj_in"]},
        "text_encoder_2": {"q": []},
        "text_encoder": {"v": []},
    }
    known = index(layers)
    place = ("unet", "down_blocks.1.attentions.0.proj_in")
    assert known["lora_unet_input_blocks_4_1_proj_in"] == known["lora_unet_down_blocks_1_attentions_0_proj_in"] == place
    assert known["diffusion_model.input_blocks.4.1.proj_in"] == place
    assert known["lora_te2_text_model_q"] == known["text_encoder_2.text_model.q"] == ("text_encoder_2", "q")
    assert "lora_te1_text_model_q" not in known
    assert (
        known["clip_h.text_model.v"] == known["text_encoders.clip_l.transformer.text_model.v"] == ("text_encoder", "v")
    )


def test_old_attention_processor_files_load_as_in_diffusers(
    pipe: Pipeline, diffusers_pipe: Callable[[], Any], tmp_path: Path
) -> None:
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor"
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in ("to_q", "to_out"):
        tensors[f"{stem}.{name}_lora.down.weight"] = torch.randn(2, 16, generator=generator)
        tensors[f"{stem}.{name}_lora.up.weight"] = torch.randn(16, 2, generator=generator)
    file = written(tmp_path, tensors)
    there = diffusers_pipe()
    there.load_lora_weights(tmp_path, weight_name=file.name)
    pipe.load_lora(file)
    np.testing.assert_allclose(ours(pipe), theirs(there), atol=TOLERANCE)


def test_a_stack_needs_no_torch() -> None:
    """The mathematics is NumPy's, so that any engine's networks can be changed."""

    class Plain:
        def __init__(self) -> None:
            self.used: dict[str, np.ndarray | None] = {}

        def names(self) -> dict[str, list[str]]:
            return {"a": []}

        def read(self, layer: str) -> np.ndarray:
            return np.eye(3, dtype=np.float32)

        def largest(self, layer: str) -> float:
            return math.inf

        def use(self, changes: Any) -> int:
            self.used = dict(changes)
            return len(self.used)

        def fuse(self) -> None: ...

        def unfuse(self) -> None: ...

    part = Plain()
    update = Update.of("k", {"down": np.ones((1, 3)), "up": np.ones((3, 1))}, alpha=0.5)
    stack = Loras({"unet": part})
    stack.loaded["x"] = Loaded(Lora(Path("x"), "", {"a": update}), "x", 1.0, {("unet", "a"): update})
    stack.set_weight("x", 2.0)
    np.testing.assert_array_equal(part.used["a"], np.eye(3) + 1.0)
    stack.unload()
    assert part.used == {"a": None}
    assert isinstance(ModuleLayers(torch.nn.Linear(2, 2)).read(""), np.ndarray)


# --- interrupted, or given what cannot be


def is_interrupted(call: Callable[[], Any], line: int) -> bool:
    """Whether a call was interrupted, before the line of that number that it runs of layers.py and stack.py."""
    left = [line]

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(("lora/layers.py", "lora/stack.py")):
            return None
        left[0] -= event == "line"
        if not left[0]:
            raise KeyboardInterrupt  # once: Python takes the trace away
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("then", [("unfuse", "unload"), ("unload", "unfuse"), ("fuse", "unfuse", "unload")])
@pytest.mark.parametrize("change", ["load", "set", "unload", "fuse", "unfuse", "load fused", "unload fused"])
def test_wherever_a_change_is_interrupted_the_weights_come_back(
    change: str, then: tuple[str, ...], tmp_path: Path
) -> None:
    layers = {f"unet.{name}": pair(f"unet.{name}", 3, 3) for name in "ab"}
    file, x = written(tmp_path, layers["unet.a"] | layers["unet.b"]), torch.ones(1, 3)
    module = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in "ab"}).requires_grad_(False)
    own, plain = copy.deepcopy(module.state_dict()), [one(x) for one in module.values()]
    for line in count(1):
        stack = Loras({"unet": ModuleLayers(module)})
        if not change.startswith("load"):
            stack.load(file, name="x")
        if change == "unfuse" or change.endswith("fused"):
            stack.fuse()
        calls: dict[str, Callable[[], Any]] = {"fuse": stack.fuse, "unfuse": stack.unfuse, "unload": stack.unload}
        calls |= {"load": lambda stack=stack: stack.load(file, name="x")}  # type: ignore[misc]
        calls |= {"set": lambda stack=stack: stack.set_weight("x", 2.0)}  # type: ignore[misc]
        if interrupted := is_interrupted(calls[change.split()[0]], line):
            for each in then:
                calls[each]()
        stack.unfuse()
        stack.unload()
        assert same(own, module.state_dict()), line
        assert all(torch.equal(one(x), before) for one, before in zip(module.values(), plain, strict=True)), line
        if not interrupted:
            break
    assert line > 5


def test_what_is_interrupted_as_it_is_taken_out_is_listed_until_it_is_out(
    pipe: Pipeline, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ours(pipe)
    pipe.load_lora(first, name="x")
    bind, left = ModuleLayers._bind, iter([None, None])

    def some(layers: ModuleLayers, name: str) -> None:
        if next(left, "over") == "over":
            raise KeyboardInterrupt
        bind(layers, name)

    monkeypatch.setattr(ModuleLayers, "_bind", some)
    with pytest.raises(KeyboardInterrupt):
        pipe.unload_lora("x")
    monkeypatch.undo()
    assert pipe.loras is not None and list(pipe.loras.loaded) == ["x"]
    pipe.unload_lora("x")
    np.testing.assert_array_equal(ours(pipe), plain)


def test_a_weight_under_which_numbers_run_over_is_refused_and_changes_nothing(
    pipe: Pipeline, first: Path, tmp_path: Path
) -> None:
    pipe.load_lora(first, name="x")
    before = ours(pipe)
    for weight in (1e40, -1e40, 10**400):
        with pytest.raises(InputError, match="a LoRA's weight is"):
            pipe.load_lora(first, weight)
    with pytest.raises(InputError, match=r"with 'x' at 1, 'y' at 3e\+38 the weights of .* are too large"):
        pipe.load_lora(written(tmp_path, pair(size=100.0)), 3e38, "y")
    with pytest.raises(InputError, match=r"with 'x' at 3e\+38 the weights of .* are too large for their type"):
        pipe.set_lora_weight("x", 3e38)
    assert pipe.loras is not None and [one.weight for one in pipe.loras.loaded.values()] == [1.0]
    np.testing.assert_array_equal(ours(pipe), before)
    half = Loras({"unet": ModuleLayers(torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3)}).half())})
    with pytest.raises(InputError, match="too large for their type"):
        half.load(written(tmp_path, pair("unet.a", 3, 3)), 1e5)


def test_names_and_paths_of_another_kind_get_one_line(pipe: Pipeline, first: Path) -> None:
    wrong: list[Any] = [3, None, {}, b"x", [first], "a" * 5000, "a\0b"]
    for path in wrong:
        with pytest.raises(InputError, match="a LoRA's path is"):
            pipe.load_lora(path)
    unnamed: Any = ["x"]
    for call in (lambda: pipe.load_lora(first, 1, unnamed), lambda: pipe.unload_lora(unnamed)):
        with pytest.raises(InputError, match=r"a LoRA's name is \['x'\]; it must be a string"):
            call()
    with pytest.raises(InputError, match=r"a LoRA's name is \['x'\]"):
        pipe.set_lora_weight(unnamed, 1)
    with pytest.raises(InputError, match=r"a LoRA's known_as is \['x'\]; it must be a string"):
        pipe.load_lora(first, known_as=unnamed)
    with pytest.raises(InputError, match=r"no LoRA named 'x+… is loaded"):
        pipe.unload_lora("x" * 3000)


def test_two_loras_of_one_name_are_refused_where_they_are_fused_already_too(first: Path) -> None:
    both = [{"path": first, "name": "x", "weight": weight} for weight in (1.0, 0.5)]
    with pytest.raises(InputError, match="a LoRA named 'x' is loaded already; give another name"):
        Loras.told(both)
    unnamed = [{"path": first, "weight": weight} for weight in (1.0, 0.5)]
    names = [(one["name"], one["weight"]) for one in Loras.told(unnamed)]
    assert names == [(first.name, 1.0), (f"{first.name}-2", 0.5)]
    assert [one["name"] for one in Loras.told([{"path": first, "name": ""}])] == [""]


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_what_a_pipeline_is_opened_with_is_a_list_of_paths_or_of_what_load_lora_takes(
    folder: Path, first: Path, engine: str
) -> None:
    wrong: list[tuple[Any, str]] = [
        (3, "loras is 3; it must be a list of paths, or of mappings with the keys path, weight, name, known_as"),
        ((one for one in [first]), "loras is <generator"),
        ([3], "loras holds 3; each must be a path, or a mapping with the keys path, weight"),
        ([{"weight": 1}], "loras holds a mapping with ['weight']; each must"),
        ([{"path": str(first), "wieght": 1}], "loras holds a mapping with ['path', 'wieght']; each must"),
        ([{"path": first, "weight": "a"}], "a LoRA's weight is 'a'"),
        ([{"path": 3}], "a LoRA's path is 3"),
        ([{"path": first, "name": 3}], "a LoRA's name is 3"),
        ([{"path": first, "known_as": first}], "a LoRA's known_as is"),
    ]
    for loras, line in wrong:
        with pytest.raises(InputError, match=re.escape(line)):
            Pipeline.from_pretrained(folder, engine=engine, device="cpu", loras=loras)
    right: list[Any] = [first, str(first), [first], {"path": first}, [{"path": str(first), "weight": 1}]]
    for loras in right:
        pipe = Pipeline.from_pretrained(folder, engine=engine, device="cpu", loras=loras)
        assert pipe.loras is not None and [one.weight for one in pipe.loras.loaded.values()] == [1.0]
    assert Pipeline.from_pretrained(folder, engine="torch", loras=None).loras is not None  # type: ignore[arg-type]
