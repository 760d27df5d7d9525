"""An adapter that was trained here goes into kohya's form, and changes the same there, here and in diffusers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from latentgen import InputError, Pipeline
from latentgen.checkpoint import open_folder
from latentgen.checkpoint.write import TEXT
from latentgen.durable import new_place
from latentgen.models.adapters import add_adapter, layers_of, text_layers, write_adapter
from latentgen.models.loading import load_part
from latentgen.models.lora import kohya, write_kohya
from latentgen.models.lora.file import is_adapter
from latentgen.models.lora.names import KOHYA

CALL: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}


def adapter(folder: Path, kind: str, out: Path, targets: str = "all", text: bool = False) -> Path:
    """An adapter with numbers that change something."""
    opened = open_folder(folder)
    networks = {"unet": load_part(opened, "unet")}
    if text:
        networks |= {part: load_part(opened, part) for part in TEXT[: 1 + opened.has_second]}
    for part, network in networks.items():
        add_adapter(network, kind, 2, layers_of(network, targets) if part == "unet" else text_layers(network), 0)
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if weight.requires_grad and "magnitude" not in name:
                    weight.add_(torch.randn_like(weight) * 0.1)
    out.mkdir()
    write_adapter(out, kind, networks)
    return out


def picture(folder: Path, lora: Path | None) -> np.ndarray:
    pipe = Pipeline.from_pretrained(folder, engine="torch")
    if lora is not None:
        pipe.load_lora(lora)
    return pipe("a red apple", seed=3, **CALL).images


@pytest.mark.parametrize(("kind", "text"), [("lora", False), ("lora", True), ("dora", False), ("lokr", False)])
def test_the_same_picture_in_both_forms(kind: str, text: bool, folder: Path, tmp_path: Path) -> None:
    made = adapter(folder, kind, tmp_path / "mine", text=text)
    assert is_adapter(made) and not is_adapter(folder)
    file = tmp_path / "mine.safetensors"
    assert write_kohya(made, file) <= 1e-6
    assert is_adapter(file)
    expected = picture(folder, made)
    assert np.abs(expected - picture(folder, None)).max() > 2e-3
    np.testing.assert_allclose(picture(folder, file), expected, atol=1e-4)


def test_magnitudes_of_a_layers_inputs_stay_what_they_are(folder: Path, tmp_path: Path) -> None:
    """DoRA as LyCORIS writes it where the norms are of the inputs: (1, in), of a convolution (1, in, 1, 1)."""
    unet = load_part(open_folder(folder), "unet")
    block, tensors = "down_blocks.0.attentions.0.transformer_blocks.0", {}
    for name in (f"{block}.ff.net.2", f"{block}.attn2.to_q", "down_blocks.0.resnets.0.conv1"):
        out, wide, *kernel = unet.get_submodule(name).weight.shape
        start, ones = f"unet.{name}", [1] * len(kernel)
        tensors[f"{start}.lora_down.weight"] = 0.2 * torch.randn(2, wide, *kernel)
        tensors[f"{start}.lora_up.weight"] = 0.2 * torch.randn(out, 2, *ones)
        tensors[f"{start}.dora_scale"] = 0.5 + torch.rand(1, wide, *ones)
    save_file(tensors, tmp_path / "mine.safetensors")
    file = tmp_path / "kohya.safetensors"
    assert write_kohya(tmp_path / "mine.safetensors", file) <= 1e-6
    expected = picture(folder, tmp_path / "mine.safetensors")
    assert np.abs(expected - picture(folder, None)).max() > 2e-3
    np.testing.assert_allclose(picture(folder, file), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [InputError, ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_file_that_could_not_be_read_back(
    kind: type[BaseException], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, file = adapter(folder, "lora", tmp_path / "mine"), tmp_path / "mine.safetensors"

    def failing(*_: Any) -> float:
        assert (tmp_path / ".mine.writing.safetensors").is_file()
        raise kind

    monkeypatch.setattr(kohya, "_apart", failing)
    with pytest.raises(kind):
        write_kohya(made, file)
    assert not list(tmp_path.glob("*.safetensors"))
    (tmp_path / "note").touch()
    with pytest.raises(InputError, match=f"cannot write {tmp_path / 'note/mine.safetensors'}: "):
        write_kohya(made, tmp_path / "note/mine.safetensors")


@pytest.mark.parametrize("text", [False, True])
def test_diffusers_reads_it(text: bool, folder: Path, tmp_path: Path) -> None:
    made = adapter(folder, "lora", tmp_path / "mine", targets="attention", text=text)
    file = tmp_path / "mine.safetensors"
    write_kohya(made, file)
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for lora in (made, file):
        theirs.load_lora_weights(lora)
        found.append(theirs("a red apple", latents=noise, **CALL).images)
        theirs.unload_lora_weights()
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)


def test_xl_has_the_original_layouts_names_and_two_text_encoders(xl: Path, tmp_path: Path) -> None:
    made = adapter(xl, "lora", tmp_path / "mine", targets="attention", text=True)
    file = tmp_path / "mine.safetensors"
    with pytest.raises(InputError, match="--base"):
        write_kohya(made, file)
    assert not file.exists()
    assert write_kohya(made, file, xl) <= 1e-6
    names = set(load_file(file))
    assert any(name.startswith("lora_unet_input_blocks_") for name in names)
    for start in ("lora_unet_middle_block_1", "lora_te1_text_model_encoder", "lora_te2_text_model_encoder"):
        assert any(name.startswith(start) for name in names), start
    expected = picture(xl, made)
    assert np.abs(expected - picture(xl, None)).max() > 2e-3
    np.testing.assert_allclose(picture(xl, file), expected, atol=1e-4)
    theirs = StableDiffusionXLPipeline.from_pretrained(xl)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for lora in (None, made, file):
        if lora is not None:
            theirs.load_lora_weights(lora)
        found.append(theirs("a red apple", latents=noise, height=32, width=32, **CALL).images)
        theirs.unload_lora_weights()
    assert np.abs(found[1] - found[0]).max() > 2e-3
    np.testing.assert_allclose(found[2], found[1], atol=1e-4)


def test_tensors_that_do_not_fit_each_other_are_one_line(tmp_path: Path) -> None:
    tensors = {"unet.conv_in.lora_A.weight": torch.ones(2, 4), "unet.conv_in.lora_B.weight": torch.ones(4, 3)}
    save_file(tensors, tmp_path / "mine.safetensors")
    with pytest.raises(InputError, match=r"conv_in.lora_A.weight and those beside it .* do not fit each other"):
        write_kohya(tmp_path / "mine.safetensors", tmp_path / "kohya.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_a_base_that_names_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    made, file = adapter(folder, "lora", tmp_path / "mine"), tmp_path / "mine.safetensors"
    with pytest.raises(InputError, match="is not Stable Diffusion XL, whose adapters alone need a base; leave --base"):
        write_kohya(made, file, folder)
    with new_place(file), pytest.raises(InputError, match=r"another latentgen writes .*mine\.safetensors now"):
        write_kohya(made, file)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_xl_adapter_in_kohyas_form_is_fused_into_the_graphs(xl: Path, tmp_path: Path) -> None:
    made = adapter(xl, "lora", tmp_path / "mine", text=True)
    file = tmp_path / "mine.safetensors"
    write_kohya(made, file, xl)
    graphs = Pipeline.from_pretrained(xl, engine="onnx", loras=[{"path": str(file)}])
    np.testing.assert_allclose(graphs("a red apple", seed=3, **CALL).images, picture(xl, file), atol=1e-3)


def test_what_is_in_kohyas_form_already_keeps_its_names(folder: Path, xl: Path, tmp_path: Path) -> None:
    for place, base in ((folder, None), (xl, xl)):
        made = adapter(place, "lora", tmp_path / place.name, text=True)
        file, again = tmp_path / f"{place.name}.safetensors", tmp_path / f"{place.name}-again.safetensors"
        write_kohya(made, file, base)
        write_kohya(file, again, base)
        one, other = load_file(file), load_file(again)
        assert one.keys() == other.keys()
        np.testing.assert_allclose(picture(place, again), picture(place, file), atol=1e-4)


def test_a_text_encoders_own_names_and_the_original_layouts_are_known(folder: Path, xl: Path, tmp_path: Path) -> None:
    made = adapter(folder, "lora", tmp_path / "mine", text=True) / "pytorch_lora_weights.safetensors"
    start = "text_encoder."
    text = {name.removeprefix(start): value for name, value in load_file(made).items() if name.startswith(start)}
    assert text and all(name.startswith("text_model.") for name in text)
    save_file({f"base_model.model.{name}": value for name, value in text.items()}, tmp_path / "text.safetensors")
    write_kohya(tmp_path / "text.safetensors", tmp_path / "kohya.safetensors")
    assert all(name.startswith("lora_te_text_model_") for name in load_file(tmp_path / "kohya.safetensors"))
    np.testing.assert_allclose(
        picture(folder, tmp_path / "kohya.safetensors"), picture(folder, tmp_path / "text.safetensors"), atol=1e-4
    )
    write_kohya(adapter(xl, "lora", tmp_path / "xl"), tmp_path / "xl.safetensors", xl)
    layer = "lora_unet_middle_block_1_proj_in"
    held = {name: value for name, value in load_file(tmp_path / "xl.safetensors").items() if name.startswith(layer)}
    ldm = {name.replace(layer, "diffusion_model.middle_block.1.proj_in"): value for name, value in held.items()}
    assert ldm
    save_file(ldm, tmp_path / "ldm.safetensors")
    write_kohya(tmp_path / "ldm.safetensors", tmp_path / "back.safetensors", xl)
    assert load_file(tmp_path / "back.safetensors").keys() == held.keys()


@pytest.mark.parametrize("form", [("unet.", "{}."), ("diffusion_model.", "text_encoders.{}.transformer.")])
@pytest.mark.parametrize("second", [False, True])
def test_the_names_that_omi_and_comfyui_write_are_known(
    form: tuple[str, str], second: bool, folder: Path, xl: Path, tmp_path: Path
) -> None:
    place, base = (xl, xl) if second else (folder, None)
    made = adapter(place, "lora", tmp_path / "mine", targets="attention", text=True)
    write_kohya(made, tmp_path / "kohya.safetensors", base)
    loras, there = Pipeline.from_pretrained(place, engine="torch").loras, {}
    assert loras is not None
    for layer, (original,) in ((layer, named) for layer, named in loras.parts["unet"].names().items() if named):
        there |= {f"lora_unet_{name.replace('.', '_')}": form[0] + original for name in (layer, original)}
    for part, clip in (("text_encoder", "clip_l"), *([("text_encoder_2", "clip_g")] if second else [])):
        for layer in loras.parts[part].names():
            name = f"text_model.{layer.removeprefix('text_model.')}"
            there[f"{KOHYA[part][-1 if second else 0]}_{name.replace('.', '_')}"] = form[1].format(clip) + name
    held = {tuple(name.split(".", 1)): value for name, value in load_file(tmp_path / "kohya.safetensors").items()}
    save_file({f"{there[layer]}.{name}": v for (layer, name), v in held.items()}, tmp_path / "other.safetensors")
    expected = picture(place, tmp_path / "kohya.safetensors")
    np.testing.assert_array_equal(picture(place, tmp_path / "other.safetensors"), expected)
    write_kohya(tmp_path / "other.safetensors", tmp_path / "back.safetensors", base)
    np.testing.assert_allclose(picture(place, tmp_path / "back.safetensors"), expected, atol=1e-6)
