"""A weights folder is read when it is whole and refused in one line when it is not; only safetensors are opened."""

import errno
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import logging as of_diffusers
from safetensors.torch import load_file, save_file
from transformers.utils import logging as of_transformers

from latentgen import InputError, Pipeline, checkpoint
from latentgen.checkpoint import default_weights, find, open_checkpoint, open_folder, places, save_pipeline
from latentgen.checkpoint.tensors import save_tensors
from latentgen.convert import convert
from latentgen.diffusion.schedule.reading import plan_for
from latentgen.models.engine import EngineNote
from latentgen.models.onnx.export import write_graphs
from latentgen.request import Assumed

UNET = "unet/diffusion_pytorch_model.safetensors"
DDIM = {"_class_name": "DDIMScheduler"}


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "tiny")


def unlisted(folder: Path) -> Path:
    """Without its manifest, as folders made elsewhere are."""
    (folder / "manifest.json").unlink()
    return folder


def test_a_whole_folder_opens_and_says_what_it_holds(folder: Path) -> None:
    opened = open_folder(folder)
    assert opened.index["safety_checker"] == [None, None] and opened.index["requires_safety_checker"] is False
    assert opened.weights["unet"] == (folder / UNET,)
    assert opened.extras["defaults"]["sampler"] == "ddim"
    assert opened.config("scheduler")["clip_sample"] is False


def test_what_is_stored_is_half_precision_and_names_no_place_of_this_machine(folder: Path) -> None:
    from safetensors.torch import load_file

    for name in (UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert {tensor.dtype for tensor in load_file(folder / name).values()} == {torch.float16}
    assert all(name.startswith("text_model.") for name in load_file(folder / "text_encoder/model.safetensors"))
    for path in folder.rglob("*.json"):
        assert str(folder.parent) not in path.read_text() and "/tmp" not in path.read_text()


def test_a_folder_saved_twice_is_the_same_to_the_byte(parts: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    extras = {"latentgen.json": (folder / "latentgen.json").read_bytes()}
    parts["tokenizer"]("a text", padding="max_length", truncation=True, max_length=9)  # which it keeps in itself
    again = save_pipeline(tmp_path / "again", **parts, scheduler_config=config, extra_files=extras, finish=write_graphs)
    assert (again / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


def test_the_fingerprint_follows_what_decides_a_picture_and_nothing_else(copy: Path) -> None:
    before = open_folder(copy).fingerprint
    (copy / "README.md").write_text("words")
    moved = copy.rename(copy.with_name("moved"))
    assert open_folder(moved).fingerprint == before
    assert open_folder(unlisted(moved)).fingerprint == before  # read through instead of looked up
    for name in (".DS_Store", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"):
        (moved / "unet" / name).write_bytes(b"not read")
    (moved / "unet/diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    assert open_folder(moved).fingerprint == before
    config = moved / "scheduler/scheduler_config.json"
    config.write_text(config.read_text().replace("0.012", "0.013"))
    assert open_folder(moved).fingerprint != before


def test_fp32_storage_and_a_wrong_name_for_it(parts: dict[str, Any], tmp_path: Path) -> None:
    save_pipeline(tmp_path / "w", **parts, scheduler_config=DDIM, dtype="fp32")
    loaded = Pipeline.from_pretrained(tmp_path / "w", engine="torch")
    state = parts["text_encoder"].state_dict()
    for name, tensor in loaded.text.model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], atol=0, rtol=0)
    with pytest.raises(InputError, match="fp16 or fp32"):
        save_pipeline(tmp_path / "v", **parts, scheduler_config=DDIM, dtype="int8")


def test_a_folder_in_fp16_naming_opens(copy: Path) -> None:
    unlisted(copy)
    for part in ("text_encoder", "vae", "unet"):
        stem = checkpoint.STEMS[part]
        (copy / part / f"{stem}.safetensors").rename(copy / part / f"{stem}.fp16.safetensors")
    assert Pipeline.from_pretrained(copy)("a red apple", seed=1, num_inference_steps=2).seeds == (1,)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_network_in_shards_opens_and_says_nothing(
    copy: Path, parts: dict[str, Any], variant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    unlisted(copy)
    (copy / "unet/diffusion_pytorch_model.safetensors").unlink()
    parts["unet"].save_pretrained(copy / "unet", variant=variant, max_shard_size="100KB")
    opened = open_folder(copy)
    assert len(opened.weights["unet"]) > 1 and opened.variant == variant
    capsys.readouterr()
    one, other = opened.fingerprint, (copy / "unet").glob("*.index*.json")
    whole = Pipeline.from_pretrained(copy, engine="torch")("a red apple", seed=1, num_inference_steps=2)
    assert whole.seeds == (1,) and capsys.readouterr().err == ""
    for kind in (of_diffusers, of_transformers):
        assert kind.is_progress_bar_enabled()  # as before
    (index,) = other
    index.write_text(index.read_text() + " ")
    assert open_folder(copy).fingerprint != one  # it is read


def test_weights_of_eight_bits_are_left_to_torch(copy: Path) -> None:
    unlisted(copy)
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    small = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(file).items()}
    save_file(small, file, {"format": "pt"})
    with pytest.warns(EngineNote, match="its weights are stored as F8_E4M3; torch runs it instead"):
        pipe = Pipeline.from_pretrained(copy)
    found = pipe("a red apple", seed=1, num_inference_steps=2, output_type="np")
    assert found.settings["engine"] == "torch" and np.isfinite(found.images).all()


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    data = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(data[:-100])


def cut_in_header(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:100])


def empty(folder: Path) -> None:
    (folder / UNET).write_bytes(b"")


def garble(folder: Path) -> None:
    (folder / UNET).write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!" + b"\0" * 10)


def flip(folder: Path) -> None:
    data = bytearray((folder / UNET).read_bytes())
    data[-1] ^= 1
    (folder / UNET).write_bytes(data)


def pickle(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")


def rewrite(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | values))

    return change


def broken_json(folder: Path) -> None:
    (folder / "vae/config.json").write_text('{"_class_name": ')


def list_json(folder: Path) -> None:
    (folder / "unet/config.json").write_text("[]")


BROKEN: list[tuple[Callable[[Path], Any], bool, str]] = [
    (remove("model_index.json"), False, "is no pipeline folder: it holds no model_index.json"),
    (remove(UNET), False, f"is not whole: {UNET} is missing"),
    (remove("unet/config.json"), False, "is not whole: unet/config.json is missing"),
    (remove("scheduler/scheduler_config.json"), False, "is not whole: scheduler/scheduler_config.json is missing"),
    (remove("tokenizer/merges.txt"), True, "its manifest names tokenizer/merges.txt, which is missing"),
    (cut, False, "is torn: [0-9]+ bytes where its header promises"),
    (cut, True, "is torn"),
    (cut_in_header, False, "is torn: 100 bytes are no whole safetensors file"),
    (empty, False, "is torn: 0 bytes"),
    (garble, False, "is torn"),
    (flip, True, "is not the file the manifest names"),
    (pickle, False, r"diffusion_pytorch_model\.bin is a pickle"),
    (broken_json, False, "vae/config.json cannot be read as JSON"),
    (list_json, False, "should hold a JSON object, not a list"),
    (rewrite("model_index.json", unet=["diffusers", "FluxTransformer2DModel"]), False, "whose unet is Flux"),
    (
        rewrite("model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
        False,
        "text_encoder_2 is CLIPTextModel; one with CLIPTextModelWithProjection is wanted",
    ),
    (
        rewrite("scheduler/scheduler_config.json", _class_name="FooScheduler", beta_start=None),
        False,
        "scheduler 'FooScheduler'",
    ),
    (rewrite("unet/config.json", in_channels=9), False, "an inpainting model .its U-Net takes 9 channels in"),
    (rewrite("unet/config.json", cross_attention_dim=99), False, "attends to a width of 99"),
    (
        rewrite("unet/config.json", block_out_channels=[16, 64]),
        False,
        r"does not fit its config.json: down_blocks.1.resnets.0.conv1.bias is \(32,\), and \(64,\) by it",
    ),
    (
        rewrite("text_encoder/config.json", max_position_embeddings=77),
        False,
        r"embeddings.position_embedding.weight is \(16, 16\), and \(77, 16\) by it",
    ),
    (rewrite("unet/config.json", layers_per_block=2), False, "its weights lack|does not fit"),
    (rewrite("text_encoder/config.json", num_hidden_layers=3), False, "its weights lack|does not fit"),
    (lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{}"), False, "tokenizer"),
    (lambda folder: (folder / "vae/config.json").write_text("{}"), False, r"tiny: a config .*KeyError\('block_out"),
    (rewrite("vae/config.json", latent_channels=None), False, "tiny: a config cannot be used .TypeError"),
    (rewrite("unet/config.json", sample_size=math.inf), False, "tiny: a config cannot be used .TypeError"),
    (rewrite("unet/config.json", in_channels=[4]), False, "tiny: a config cannot be used .TypeError"),
    (rewrite("text_encoder/config.json", hidden_size="x"), False, "tiny: a config cannot be used .ValueError"),
    (rewrite("scheduler/scheduler_config.json", beta_start=-1), False, "tiny: a config cannot be used .ValueError"),
    (rewrite("latentgen.json", sample_size=math.inf), False, "tiny: a config cannot be used .OverflowError"),
    (rewrite("latentgen.json", defaults="x"), False, "tiny: a config cannot be used .AttributeError"),
    (rewrite("latentgen.json", defaults={"guidance_scale": "x"}), False, "tiny: a config cannot be used .ValueError"),
    (rewrite("latentgen.json", defaults={"guidance_interval": [2, 1]}), False, "guidance_interval is 2; it must be"),
]


@pytest.mark.parametrize(("damage", "listed", "line"), BROKEN)
def test_a_folder_that_is_not_whole_gets_one_line(
    copy: Path, damage: Callable[[Path], Any], listed: bool, line: str
) -> None:
    if not listed:
        unlisted(copy)
    damage(copy)
    with warnings.catch_warnings(record=True) as said, pytest.raises(InputError, match=line) as caught:
        Pipeline.from_pretrained(copy)
    assert "\n" not in str(caught.value)
    assert not any("torch runs it instead" in str(each.message) for each in said)  # it does not


UNKNOWN = {"model.diffusion_model.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
ENDLESS = {"text_encoder": {}, "vae": {"latent_channels": math.inf}, "unet": {}, "scheduler": {}}


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ([1], "is torn"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["a", "b"]}}, "is torn"),
        ({"a": {"dtype": "F32", "data_offsets": [0, 0]}}, "is torn"),
        ({"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 0]}}, "is torn"),
        ({"a": {"dtype": "F32", "shape": ["b"], "data_offsets": [0, 0]}}, "is torn"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, math.inf]}}, "is torn"),
        ({**UNKNOWN, "__metadata__": 3}, "is torn"),
        ({**UNKNOWN, "__metadata__": {"latentgen": "{"}}, "tells no configs that can be used"),
        ({**UNKNOWN, "__metadata__": {"latentgen": "[1]"}}, "tells no configs that can be used"),
        ({**UNKNOWN, "__metadata__": {"latentgen": '{"configs": {"unet": {}, "vae": {}}}'}}, "tells no configs"),
        ({**UNKNOWN, "__metadata__": {"latentgen": json.dumps({"configs": ENDLESS})}}, "tells no configs"),
        ({**UNKNOWN, "__metadata__": {"latentgen": "{}"}}, "is not whole"),
    ],
)
def test_a_header_of_a_file_that_cannot_be_read_is_one_line(header: Any, line: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match=line) as caught:
        open_checkpoint(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_a_scheduler_that_is_not_known_but_for_its_betas_is_read_as_ddim_and_said(copy: Path) -> None:
    unlisted(copy)
    call: dict[str, Any] = {"seed": 1, "num_inference_steps": 3, "output_type": "latent"}
    (copy / "latentgen.json").unlink()
    before = Pipeline.from_pretrained(copy, engine="torch")
    rewrite("scheduler/scheduler_config.json", _class_name="KDPM2DiscreteScheduler")(copy)
    with pytest.warns(Assumed, match="its scheduler 'KDPM2DiscreteScheduler' is not known; its betas and") as caught:
        pipe = Pipeline.from_pretrained(copy, engine="torch")
    assert len([each for each in caught if each.category is Assumed]) == 1
    assert pipe.terms.sampler == "ddim"
    for sampler in (None, "dpmpp-2m", "heun"):
        found, expected = (each("a red apple", sampler=sampler, **call).images for each in (pipe, before))
        assert torch.equal(found, expected)
    scheduler = json.loads((copy / "scheduler/scheduler_config.json").read_text())
    del scheduler["clip_sample"]  # which such a class has not; DDIM's own default would clip latents
    assert plan_for(scheduler, "ddim").clip is None


def test_what_is_no_folder_gets_one_line(folder: Path, tmp_path: Path) -> None:
    near = folder.with_name("tinny")
    for place, line in [
        (tmp_path / "nothing", "no weights folder at"),
        (near, f"did you mean {folder}"),
        (folder / "model_index.json", "is a file; give the folder"),
    ]:
        with pytest.raises(InputError, match=line):
            open_folder(find(place))
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(InputError, match="is a pickle"):
        open_checkpoint(find(tmp_path / "model.ckpt"))


def test_a_hub_name_that_cannot_be_reached_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="someone/something is no folder here, and the hub cannot give it") as caught:
        find("someone/something")
    assert "\n" not in str(caught.value)


def test_the_default_is_what_is_shipped_the_packages_own_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "latentgen"
    monkeypatch.setattr(places, "PACKAGE", package)
    with pytest.raises(InputError, match="no embedded weights here"):
        default_weights()
    for place in (tmp_path / "weights/icons", package / "weights/icons"):
        place.mkdir(parents=True)
        (place / "model_index.json").write_text("{}")
        assert default_weights() == place


def test_a_full_disk_while_saving_leaves_the_old_folder(
    parts: dict[str, Any], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = open_folder(copy).fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(InputError, match="no space left on the disk while writing"):
            save_pipeline(copy, **parts, scheduler_config=DDIM)
    assert open_folder(copy).fingerprint == before
    assert [path.name for path in copy.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_saved_tensors_may_be_read_by_whom_the_umask_lets(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        save_tensors({"a": torch.arange(3)}, tmp_path / "torch.safetensors", {"format": "pt"})
        save_tensors({"a": np.arange(3)}, tmp_path / "numpy.safetensors")
    finally:
        os.umask(before)
    for name in ("torch", "numpy"):
        file = tmp_path / f"{name}.safetensors"
        assert file.stat().st_mode & 0o777 == mode
        assert load_file(file)["a"].tolist() == [0, 1, 2]


def test_tensors_are_saved_where_modes_cannot_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "chmod", refuse)  # as on some network drives
    save_tensors({"a": np.arange(3)}, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]


def test_weights_that_are_not_finite_are_not_saved(parts: dict[str, Any], tmp_path: Path) -> None:
    import copy as copying

    unet = copying.deepcopy(parts["unet"])
    with torch.no_grad():
        unet.conv_in.bias[0] = 1e6  # more than fp16 holds
    with pytest.raises(InputError, match=r"unet: conv_in\.bias is not finite in fp16"):
        save_pipeline(tmp_path / "w", **{**parts, "unet": unet}, scheduler_config=DDIM)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("listed", [True, False])
def test_weights_that_are_written_anew_are_said_by_who_opened_the_old_ones(copy: Path, listed: bool) -> None:
    if not listed:
        unlisted(copy)
    opened = open_folder(copy)
    (copy / "README.md").write_text("words")
    (copy / "unet/model.onnx").touch()
    opened.verify()
    weights = (copy / UNET).read_bytes()
    (copy / UNET).write_bytes(weights)
    with pytest.raises(InputError, match="the weights changed since they were opened; open them again") as caught:
        opened.verify()
    assert "\n" not in str(caught.value)
    open_folder(copy).verify()


def test_a_single_file_that_is_written_anew_is_said_too(folder: Path, tmp_path: Path) -> None:
    file, _ = convert(folder, tmp_path / "one.safetensors")
    opened = open_checkpoint(file)
    opened.verify()
    file.write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"one\.safetensors: the weights changed since they were opened"):
        opened.verify()
