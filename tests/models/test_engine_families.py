"""ONNX Runtime runs Stable Diffusion XL and single files too, from weights where they are; torch's pictures."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentgen import InputError, Pipeline
from latentgen.checkpoint import check_safetensors, open_checkpoint
from latentgen.convert import convert
from latentgen.image import read_settings
from latentgen.models.engine import EngineNote
from latentgen.models.onnx.places import cache_folder, find_graphs
from latentgen.render import Order, render, replay

pytestmark = pytest.mark.filterwarnings("ignore:.*exported once")
PROMPTS = ["a red apple", "a (blue:1.3) bird BREAK noto"]
CALL: dict[str, Any] = {"num_inference_steps": 3, "seed": 2, "height": 24, "width": 40, "output_type": "np"}
CALLS = [
    {"guidance_scale": 4.0, "negative_prompt": "rain"},
    {"guidance_scale": 4.0},
    {"guidance_scale": 1.0},
]


def differ(place: Path) -> list[float]:
    """The largest differences between the engines' pictures."""
    one, other = (Pipeline.from_pretrained(place, engine=engine) for engine in ("onnx", "torch"))
    assert one.machine is not None and one.machine["engine"] == "onnx"
    found = []
    for given in CALLS:
        pictures = [pipe(PROMPTS, **CALL, **given).images for pipe in (one, other)]
        assert pictures[1].std() > 0.03
        found.append(float(np.abs(pictures[0] - pictures[1]).max()))
    return found


def test_xl_is_the_picture_of_torch(xl: Path) -> None:
    assert max(differ(xl)) < 1e-3
    pipe = Pipeline.from_pretrained(xl, engine="onnx")
    told = pipe.text.encode(PROMPTS, weights=True, limit=None)
    assert told.states is not None and told.pooled is not None
    given = {"prompt_embeds": told.states, "pooled_prompt_embeds": told.pooled, "guidance_scale": 1.0}
    np.testing.assert_allclose(pipe(**given, **CALL).images, pipe(PROMPTS, **CALL, guidance_scale=1.0).images)


@pytest.mark.parametrize("family", ["folder", "two", "xl"])
def test_a_single_file_is_run_from_the_file_itself(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    file, _ = convert(request.getfixturevalue(family), tmp_path / "one.safetensors")
    assert max(differ(file)) < 1e-3
    checkpoint = open_checkpoint(file)
    graphs = find_graphs(cache_folder(checkpoint), checkpoint.has_second)
    assert graphs is not None
    header = check_safetensors(file)
    stored = sum(
        last - first
        for name, entry in header.items()
        if name != "__metadata__"
        for first, last in [entry["data_offsets"]]
    )
    held = 0
    for graph in graphs.values():
        made = onnx.load(graph, load_external_data=False)
        outside = [each for each in made.graph.initializer if each.external_data]
        assert outside and {each.external_data[0].value for each in outside} == {file.name}
        held += sum(len(each.raw_data) for each in made.graph.initializer)
    assert held < 0.05 * stored  # a transposed projection, and constants; all else lies in the file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pipeline.from_pretrained(file, engine="onnx")  # exported once


def test_a_converted_folder_has_its_graphs(xl: Path, tmp_path: Path) -> None:
    file, _ = convert(xl, tmp_path / "one.safetensors")
    back, _ = convert(file, tmp_path / "back")
    assert find_graphs(back, second=True) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = Pipeline.from_pretrained(back, engine="onnx")
    assert pipe("a bird", **CALL).settings["engine"] == "onnx"


def lora(file: Path, seed: int) -> Path:
    """A LoRA of one layer of the U-Net."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"down": torch.randn(2, 16, generator=generator), "up": torch.randn(16, 2, generator=generator)}
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    save_file({f"{layer}.lora.{name}.weight": 2 * tensor for name, tensor in tensors.items()}, file)
    return file


def torch_weight(folder: Path, loras: Any) -> torch.Tensor:
    """The weight that `lora` changes, as the torch engine computes with it."""
    pipe = Pipeline.from_pretrained(folder, engine="torch", loras=loras)
    pipe.fuse_lora()
    layers: Any = pipe._loras().parts["unet"]
    weight: torch.Tensor = layers._layers["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"].weight
    return weight.detach()


def test_loras_are_fused_into_graphs_of_their_own_and_give_the_picture_of_torch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one, two = lora(tmp_path / "one.safetensors", 1), lora(tmp_path / "two.safetensors", 2)
    loras = [{"path": one, "weight": 0.7}, {"path": two, "weight": -0.5}]
    assert Pipeline.from_pretrained(folder, loras=loras)("a", **CALL).settings["engine"] == "torch"
    with pytest.warns(EngineNote, match="has no ONNX graphs with these LoRAs: they are exported once into"):
        fused = Pipeline.from_pretrained(folder, engine="onnx", loras=loras)
    other = Pipeline.from_pretrained(folder, engine="torch")
    for each in loras:
        other.load_lora(**each)  # type: ignore[arg-type]
    found, expected = (pipe(PROMPTS, **CALL, **CALLS[0]) for pipe in (fused, other))
    np.testing.assert_allclose(found.images, expected.images, atol=1e-3)
    assert found.settings["loras"] == expected.settings["loras"] and found.settings["engine"] == "onnx"
    plain = Pipeline.from_pretrained(folder, engine="onnx")(PROMPTS, **CALL, **CALLS[0]).images
    assert np.abs(plain - found.images).max() > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Pipeline.from_pretrained(folder, device="cpu", loras=loras)  # the cache's, without being asked for
    assert again("a", **CALL).settings["engine"] == "onnx"
    with pytest.raises(InputError, match="clip_skip is for the text encoder as it is stored"):
        fused("a", clip_skip=1, **CALL)
    assert again("a", clip_skip=1, **CALL).settings["engine"] == "torch"  # which has LoRAs and can skip
    (place,) = (tmp_path / "cache").glob("latentgen/onnx/*-fused/unet")
    (beside,) = place.glob("*.safetensors")
    graphs = [onnx.load(file, load_external_data=False).graph for file in place.glob("*.onnx")]
    weights = [each for graph in graphs for each in graph.initializer]
    assert not [each for each in weights if len(each.raw_data) > 512]
    changed = [each for each in weights if each.external_data and each.external_data[0].value == beside.name]
    assert [tuple(each.dims) for each in changed] == [(16, 16)]  # the one weight that is changed
    (values,) = load_file(beside).values()
    assert torch.equal(values, torch_weight(folder, loras))
    again.load_lora(one, 0.1)  # goes on with torch, and with those it was opened with
    said = again("a", **CALL).settings
    assert said["engine"] == "torch" and [each["weight"] for each in said["loras"]] == [0.7, -0.5, 0.1]


def test_graphs_with_other_loras_of_the_same_layers_are_not_taken_for_each_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs differ in the hash of the weights beside them alone; whether copies are kept ready or not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = [lora(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    found = {}
    for room in (6 << 30, 0):
        monkeypatch.setattr("latentgen.models.onnx.ready.ROOM", room)
        for file in files:
            pipe = Pipeline.from_pretrained(folder, engine="onnx", loras=[{"path": file, "weight": 0.7}])
            found[room, file] = pipe(PROMPTS, **CALL, **CALLS[0]).images
    assert np.abs(found[6 << 30, files[0]] - found[6 << 30, files[1]]).max() > 1e-2
    shutil.rmtree(tmp_path / "cache/latentgen/onnx/ready")
    for file in files:
        np.testing.assert_array_equal(found[0, file], found[6 << 30, file])
        pipe = Pipeline.from_pretrained(folder, engine="onnx", loras=[{"path": file, "weight": 0.7}])
        np.testing.assert_array_equal(pipe(PROMPTS, **CALL, **CALLS[0]).images, found[0, file])


def test_a_picture_with_loras_on_onnx_replays_to_the_byte(folder: Path, tmp_path: Path) -> None:
    file = lora(tmp_path / "one.safetensors", 3)
    order = Order(["a red apple"], steps=2, seed=1, loras=[(str(file), 0.5)], engine="onnx")
    (picture,) = render(order, tmp_path / "a.png", str(folder))
    assert read_settings(picture)["engine"] == "onnx"
    _, remarks = replay(picture)
    assert remarks == ["the same file, byte for byte"]
