"""Folders become single files and single files folders, and render the same."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentgen import InputError, Pipeline
from latentgen.checkpoint import open_checkpoint, write_single
from latentgen.cli import app
from latentgen.convert import convert
from latentgen.durable import new_place
from latentgen.request import terms_of


def picture(place: Path) -> np.ndarray:
    return Pipeline.from_pretrained(place, engine="torch")(
        "the green frog", negative_prompt="rain", seed=5, num_inference_steps=3, guidance_scale=4.0, output_type="np"
    ).images


def there_and_back(folder: Path, tmp_path: Path) -> None:
    file, difference = convert(folder, tmp_path / "one.safetensors")
    assert difference <= 1e-5
    back, _ = convert(file, tmp_path / "back")
    np.testing.assert_array_equal(picture(file), picture(folder))
    np.testing.assert_array_equal(picture(back), picture(folder))
    for part in ("unet", "vae", "text_encoder"):
        (before,), (after,) = (list((place / part).glob("*.safetensors")) for place in (folder, back))
        one, other = load_file(before), load_file(after)
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_file_may_be_read_by_whoever_may_read_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    file, _ = convert(folder, tmp_path / "one.safetensors")
    assert file.stat().st_mode == (tmp_path / "one/tokenizer/vocab.json").stat().st_mode


def test_stable_diffusion_1_goes_there_and_back(folder: Path, tmp_path: Path) -> None:
    there_and_back(folder, tmp_path)


def test_stable_diffusion_2_goes_there_and_back(two: Path, tmp_path: Path) -> None:
    there_and_back(two, tmp_path)


def test_stable_diffusion_xl_goes_there_and_back(xl: Path, tmp_path: Path) -> None:
    there_and_back(xl, tmp_path)


def test_a_file_beside_the_folder_it_came_from_has_its_tokenizer_there(xl: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(xl, tmp_path / "model")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    file, _ = convert(folder, tmp_path / "model.safetensors")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    np.testing.assert_array_equal(picture(file), picture(folder))


def test_another_pipeline_of_the_files_name_is_left_alone(folder: Path, two: Path, tmp_path: Path) -> None:
    other = shutil.copytree(two, tmp_path / "model")
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"model, where the tokenizers of .* go, holds something else; name another"):
        convert(folder, tmp_path / "model.safetensors")
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_a_tokenizers_own_files_are_laid_beside_the_file(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "source", ignore=shutil.ignore_patterns("manifest.json"))
    (tmp_path / "source/tokenizer/notes.md").write_text("words")
    convert(tmp_path / "source", tmp_path / "one.safetensors")
    (tmp_path / "one.safetensors").unlink()
    laid = {path.relative_to(tmp_path / "one").as_posix() for path in (tmp_path / "one").rglob("*.*")}
    names = ("merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json")
    assert laid == {f"tokenizer/{name}" for name in names}
    convert(tmp_path / "source", tmp_path / "one.safetensors")  # the same files there again


@pytest.mark.parametrize("difference", [1.0, 2e-5, InputError("cannot be opened")])
def test_what_renders_otherwise_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, difference: float | InputError
) -> None:
    def compared(*_: Any) -> float:
        if isinstance(difference, float):
            return difference
        raise difference

    monkeypatch.setattr("latentgen.convert._difference", compared)
    with pytest.raises(InputError, match=r"renders otherwise than|cannot be opened"):
        convert(folder, tmp_path / "one.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["decoder.conv_in", "encoder.conv_in", "quant_conv"])
def test_an_autoencoder_that_is_written_otherwise_is_seen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = write_single._original

    def lost(*given: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for ldm, value in whole(*given):
            yield ldm, torch.zeros_like(value) if ldm.startswith(name) else value

    monkeypatch.setattr(write_single, "_original", lost)
    with pytest.raises(InputError, match="renders otherwise than"):
        convert(folder, tmp_path / "one.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_latentgen_json_says_goes_there_and_back(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    defaults = {"num_inference_steps": 4, "guidance_scale": 3.0, "sampler": "euler", "guidance_interval": [0.2, 0.8]}
    extras = {"defaults": defaults, "sample_size": 24, "notes": "é"}
    folder = make_folder("told", extra_files={"latentgen.json": json.dumps(extras)})
    file, _ = convert(folder, tmp_path / "one.safetensors")
    back, _ = convert(file, tmp_path / "back")
    found = [open_checkpoint(place) for place in (folder, file, back)]
    assert [each.extras for each in found] == [extras] * 3
    assert len({terms_of(each) for each in found}) == 1
    (folder / "latentgen.json").unlink()
    (folder / "manifest.json").unlink()
    plain, _ = convert(convert(folder, tmp_path / "two.safetensors")[0], tmp_path / "plain")
    assert not (plain / "latentgen.json").exists()


def test_a_folder_that_came_back_opens_in_diffusers(folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    file, _ = convert(folder, tmp_path / "one.safetensors")
    back, _ = convert(file, tmp_path / "back")
    theirs = StableDiffusionPipeline.from_pretrained(back)
    assert type(theirs.unet).__name__ == "UNet2DConditionModel"


@pytest.mark.parametrize(
    ("target", "line"),
    [
        (lambda folder, tmp_path: tmp_path / "other", "is a folder already; name a .safetensors file"),
        (lambda folder, tmp_path: folder, "is already there; name a new place"),
    ],
)
def test_what_cannot_be_converted_gets_one_line(
    folder: Path, tmp_path: Path, target: Callable[[Path, Path], Path], line: str
) -> None:
    with pytest.raises(InputError, match=line):
        convert(folder, target(folder, tmp_path))


def test_what_another_process_is_converting_into_is_left_to_it(folder: Path, tmp_path: Path) -> None:
    for source, name in ((folder, "one.safetensors"), (tmp_path / "two.safetensors", "one")):
        with (
            new_place(tmp_path / "one"),
            pytest.raises(InputError, match=f"another latentgen writes .*{name} now; wait"),
        ):
            convert(source, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_what_is_not_proven_is_removed_where_ctrl_c_meets_an_import(
    folder: Path, tmp_path: Path, ctrl_c_in_import_of: Callable[[str], None]
) -> None:
    ctrl_c_in_import_of("latentgen.models.latent")  # after it is written
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "deep/one.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_the_source_has_no_use_for_is_refused_before_anything_is_written(
    folder: Path, make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("latentgen.convert.write_single")
    target, words = tmp_path / "one.safetensors", folder / "tokenizer"
    with pytest.raises(InputError, match=r"has a tokenizer of its own, as folders have; leave the one at .* away"):
        convert(folder, target, tokenizer=words)
    with pytest.raises(InputError, match="has a tokenizer of its own"):
        Pipeline.from_pretrained(folder, tokenizer=words)
    flow = make_folder("flow", _class_name="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(
        InputError, match="flow matching, which predicts the flow; leave prediction_type 'epsilon' away"
    ):
        convert(flow, target, prediction_type="epsilon")
    with pytest.raises(InputError, match="flow matching, which predicts the flow"):
        Pipeline.from_pretrained(flow, prediction_type="v_prediction")
    with pytest.raises(InputError, match="no adapter; leave away --base, which names the weights"):
        app(["convert", str(folder), str(target), "--base", str(folder)], standalone_mode=False)
    with pytest.raises(InputError, match="no weights folder at nosuch"):
        app(["convert", "nosuch", str(target), "--base", str(folder)], standalone_mode=False)
    adapter = tmp_path / "lora.safetensors"
    save_file(
        {"unet.conv_in.lora.down.weight": torch.ones(1, 4), "unet.conv_in.lora.up.weight": torch.ones(4, 1)}, adapter
    )
    for option in (["--tokenizer", str(words)], ["--prediction-type", "epsilon"]):
        with pytest.raises(InputError, match="is an adapter; leave away --tokenizer and --prediction-type"):
            app(["convert", str(adapter), str(target), *option], standalone_mode=False)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_a_network_the_original_layout_has_no_names_for_is_said(
    parts: dict[str, Any], make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from diffusers import UNet2DConditionModel

    from latentgen.checkpoint import save_pipeline

    told = {**parts["unet"].config, "addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    told = {key: value for key, value in told.items() if not key.startswith("_")}
    folder = make_folder("pooled")
    config = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}
    shutil.rmtree(folder)
    save_pipeline(folder, **{**parts, "unet": UNet2DConditionModel(**told)}, scheduler_config=config)
    with pytest.raises(InputError, match="has no place in the original layout"):
        convert(folder, tmp_path / "one.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_autoencoder_with_the_old_names_of_its_attention_is_converted(folder: Path, tmp_path: Path) -> None:
    old = shutil.copytree(folder, tmp_path / "old")
    (old / "manifest.json").unlink()
    file = old / "vae/diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for new, once in names.items():
        for name in [name for name in tensors if f".attentions.0.{new}." in name]:
            tensors[name.replace(f".{new}.", f".{once}.")] = tensors.pop(name)
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, file, {"format": "pt"})
    made, difference = convert(old, tmp_path / "one.safetensors")
    assert difference <= 1e-5
    np.testing.assert_array_equal(picture(made), picture(folder))
