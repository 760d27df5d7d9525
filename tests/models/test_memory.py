"""What is computed at a time: any number of pictures in bounded memory, and tiles of large ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from latentgen import InputError, Pipeline
from latentgen.checkpoint import open_folder
from latentgen.diffusion.denoiser import Condition
from latentgen.image import read_settings
from latentgen.models import memory
from latentgen.models.latent import Latent
from latentgen.models.network import load_unet
from latentgen.render import Order, render, replay

PROMPTS = ["a red apple", "a blue bird", "the green frog", "an orange cat", "rain"]
CALL: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "guidance_scale": 3.0, "output_type": "np"}


class Watched:
    """A network that remembers the rows of each evaluation."""

    def __init__(self, network: Any) -> None:
        self.network, self.rows = network, []  # type: ignore[var-annotated]

    def __call__(self, x: Any, time: Any, condition: Condition) -> Any:
        assert len(x) == len(time) == len(condition)
        self.rows.append(len(x))
        return self.network(x, time, condition)


@pytest.mark.parametrize("engine", ["onnx", "torch"])
@pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral"])
def test_the_networks_see_no_more_than_a_batch_and_pictures_stay_the_same(
    folder: Path, engine: str, sampler: str
) -> None:
    pipe = Pipeline.from_pretrained(folder, engine=engine)
    together = pipe(PROMPTS, batch=5, sampler=sampler, **CALL)
    pipe.network = watched = Watched(pipe.network)
    parted = pipe(PROMPTS, batch=2, sampler=sampler, **CALL)
    assert watched.rows == [4, 4, 2] * 2  # guided: two rows a picture
    np.testing.assert_allclose(parted.images, together.images, atol=1e-5)
    assert parted.settings["at_a_time"] == 2 and "at_a_time" not in together.settings


@pytest.mark.parametrize("output_type", ["pt", "pil", "latent"])
def test_every_kind_of_output_is_whole(folder: Path, output_type: str) -> None:
    pipe = Pipeline.from_pretrained(folder, engine="torch")
    call = {**CALL, "output_type": output_type}
    one, other = (pipe(PROMPTS, batch=batch, **call).images for batch in (2, 5))
    assert len(one) == len(other) == 5
    if output_type == "pil":
        one, other = ([np.asarray(each).astype(int) for each in side] for side in (one, other))
    assert max(float(abs(a - b).max()) for a, b in zip(one, other, strict=True)) <= (
        1 if output_type == "pil" else 1e-4
    )


def test_the_batch_is_chosen_by_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device="cpu": 1000)
    assert memory.pictures_at_a_time("auto", 100, 50) == 5
    assert memory.pictures_at_a_time("auto", 10_000, 50) == 1
    assert memory.pictures_at_a_time("auto", 1, 50) == memory.MOST
    assert memory.pictures_at_a_time("auto", 1, 50, "cuda:0") == 50
    assert memory.pictures_at_a_time(3, 10_000, 50) == 3
    for wrong in (0, "many", 1.5, True):
        with pytest.raises(InputError, match="it must be 'auto' or a whole number"):
            memory.pictures_at_a_time(wrong, 1, 1)  # type: ignore[arg-type]
    monkeypatch.undo()
    assert memory.free_bytes() > 1 << 20


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_free_within_each_control_group_and_but_for_what_is_held_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    mib = 1 << 20
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    names = ("memory.max", "memory.current", "inactive_file") if version == 2 else names
    groups = tmp_path / "groups"
    root = groups if version == 2 else groups / "memory"

    def group(place: str, limit: int | str, used: int, cached: int) -> None:
        (root / place).mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, used, f"anon 5\n{names[2]} {cached}"), strict=False):
            (root / place / ("memory.stat" if name == names[2] else name)).write_text(f"{value}\n")

    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8192 kB\n")
    line = "0::/outer/inner" if version == 2 else "5:cpu,memory:/outer/inner"
    (tmp_path / "self/cgroup").write_text(f"7:pids:/\n{line}\n")
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(memory, "GROUPS", groups)
    assert memory.free_bytes() == 8 * mib  # no group is seen from here
    group("outer/inner", "max" if version == 2 else 2**63 - 4096, 3 * mib, 0)
    assert memory.free_bytes() == 8 * mib
    group("outer", 7 * mib, 6 * mib, 4 * mib)
    assert memory.free_bytes() == 5 * mib
    group("outer/inner", 4 * mib, 3 * mib, mib)
    assert memory.free_bytes() == 2 * mib
    group("", mib, 3 * mib, mib)
    assert memory.free_bytes() == 0


def test_what_torch_holds_of_a_gpu_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, told in {"mem_get_info": (100, 1000), "memory_reserved": 70, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, told=told: told)
    assert memory.free_bytes("cuda:0") == 150


def test_the_need_grows_with_the_picture_and_with_guidance() -> None:
    unet = {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8}
    vae = {"block_out_channels": [128, 256, 512, 512]}
    small, large = (memory.need_of(unet, vae, side, side, True) for side in (32, 64))
    assert small < large / 3 and memory.need_of(unet, vae, 64, 64, False) < large
    assert 1 << 29 < large < 1 << 33  # Stable Diffusion 1 at 512 px: some GiB


def test_the_need_is_more_than_what_is_held_and_no_more_than_three_times_that() -> None:
    """MiB of what both engines held at most, of one picture, guided: neither holds the scores of 4096 places."""
    none = {"block_out_channels": [1], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    unet = {"block_out_channels": [320], "attention_head_dim": 8, "layers_per_block": 1, "mid_block_type": None}
    held = [(memory.need_of(unet, none, 64, 64, True), 294)]
    vae = {"block_out_channels": [128, 256, 512, 512]}  # Stable Diffusion's
    held += [(memory.need_of(none, vae, side, side, True), most) for side, most in ((32, 310), (48, 596), (64, 1018))]
    assert all(most << 20 < need < 3 * most << 20 for need, most in held)


def test_what_is_told_of_a_text_is_counted_as_the_layers_give_it(folder: Path, xl: Path) -> None:
    for place in (folder, xl):
        unet = load_unet(open_folder(place), torch.device("cpu"), torch.float32)
        found: list[int] = []
        for name, layer in unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                layer.register_forward_hook(lambda _, __, out, found=found: found.append(out.nbytes))  # type: ignore[misc]
        states = torch.randn(1, 11, unet.config.cross_attention_dim)
        added = {"text_embeds": torch.randn(1, 12), "time_ids": torch.zeros(1, 6)} if place == xl else None
        with torch.no_grad():
            unet(torch.randn(1, 4, 8, 8), 5, states, added_cond_kwargs=added)
        assert memory.told_bytes(unet.config, 11) == sum(found) > 0
        vae = {"block_out_channels": [1]}  # so that the U-Net decides
        need = [memory.need_of(unet.config, vae, 8, 8, True, tokens) for tokens in (11, 22)]
        assert need[1] - need[0] == 2 * sum(found)  # guided: two rows a picture


def test_as_much_of_a_walk_is_kept_as_fits_and_an_older_one_goes() -> None:
    kept, computed = memory.Kept(room=3 * 80), []

    def walk(name: str, groups: int, first: int, steps: int) -> list[int]:
        """How many groups are computed at each step."""
        counts = []
        for step in range(first, first + steps):
            computed.clear()
            for group in range(groups):
                kept.at(step)
                key = f"{name}{group}"
                found = kept.find(lambda other, key=key: other == key)  # type: ignore[misc]
                if found is None:
                    computed.append(key)
                    found = {"keys": np.full(5, hash(key) % 97, np.float64), "values": np.zeros(5)}
                    kept.keep(key, found)
                assert found["keys"][0] == hash(key) % 97 and kept.bytes <= kept.room
            counts.append(len(computed))
        return counts

    assert walk("a", 3, 0, 4) == [3, 0, 0, 0]
    assert walk("a", 3, 10, 2) == [0, 0]  # the same prompts again
    assert walk("b", 5, 20, 5) == [5, 5, 2, 2, 2]  # what the walk before used goes once it is two steps old
    assert walk("c", 1, 30, 4) == [1, 1, 0, 0]
    whole = memory.Kept(room=79)
    whole.keep("a", {"keys": np.zeros(10)})
    assert whole.bytes == 0


def test_many_texts_are_encoded_some_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ("onnx", "torch"):
        pipe = Pipeline.from_pretrained(folder, engine=engine)
        whole = pipe.text.encode(PROMPTS).states
        monkeypatch.setattr(memory, "TEXTS", 2)
        np.testing.assert_allclose(pipe.text.encode(PROMPTS).states, whole, atol=1e-5)
        monkeypatch.undo()


@pytest.mark.parametrize(("height", "width"), [(96, 96), (80, 136)])
def test_tiles_are_those_of_diffusers(height: int, width: int) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.7,
    ).eval()
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.2)  # pixels inside [−1, 1]: ours are cut to that before the blend
    latents = torch.randn(2, 4, height // 2, width // 2)
    latent = Latent(vae)
    tile = memory.tile_of(vae.config, 2, height, width, True)
    assert tile == 32 and memory.tile_of(vae.config, 2, height, width, None) is None
    assert memory.tile_of(vae.config, 2, 2048, 2048, None) == 32
    (found,) = memory.decoded(latent.decode, latents, 2, tile)
    vae.enable_tiling()
    with torch.no_grad():
        expected = (vae.decode(latents / 0.7).sample * 0.5 + 0.5).clamp(0, 1)
    assert found.shape == (2, 3, height, width)
    assert float(expected.min()) > 0 and float(expected.max()) < 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    on_host = memory.tiled(lambda part: latent.decode(torch.from_numpy(part)).numpy(), latents.numpy(), tile)
    vae.disable_tiling()
    np.testing.assert_allclose(on_host, found, atol=1e-6)


def test_tiles_of_one_number_have_no_seams() -> None:
    flat = memory.tiled(lambda part: np.repeat(np.repeat(part, 2, 2), 2, 3), np.full((1, 3, 40, 29), 0.25), 16)
    assert flat.shape == (1, 3, 80, 58)
    np.testing.assert_allclose(flat, 0.25, rtol=1e-12)


def test_both_engines_decode_the_same_tiles_and_a_tiled_picture_replays_to_the_byte(
    folder: Path, tmp_path: Path
) -> None:
    found = []
    call = {**CALL, "height": 96, "width": 64, "vae_tiling": True}
    for engine in ("onnx", "torch"):
        pipe = Pipeline.from_pretrained(folder, engine=engine)
        tiled = pipe(PROMPTS[:2], **call)
        assert tiled.settings["vae_tiling"] is True
        found.append(tiled.images)
    np.testing.assert_allclose(*found, atol=1e-3)
    whole = pipe(PROMPTS[:2], **{**call, "vae_tiling": False}).images
    assert np.abs(whole - found[1]).max() > 1e-2  # a random decoder normalises each tile by itself
    picture = tmp_path / "a.png"
    made = pipe(PROMPTS, batch=2, **{**call, "output_type": "pil"}).images[4]
    picture.write_bytes(made.png())
    settings = read_settings(picture)
    assert (settings["at_a_time"], settings["vae_tiling"]) == (2, True)
    _, remarks = replay(picture, tmp_path / "b.png", str(folder))
    assert remarks[0] == "the same file, byte for byte"


def test_an_order_takes_a_batch_by_memory(folder: Path, tmp_path: Path) -> None:
    order = Order(PROMPTS[:3], steps=2, seed=1, batch="auto", engine="torch")
    first, *_ = render(order, tmp_path, str(folder))
    assert read_settings(first)["batch"]["prompt"] == PROMPTS[:3]
    with pytest.raises(InputError, match="batch is 'most'"):
        list(render(Order(["a"], batch="most"), tmp_path, str(folder)))


def test_a_unet_with_other_depths_on_the_way_up_is_counted_by_its_deepest_layers() -> None:
    plain = {"block_out_channels": [32, 64], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
    plain |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 2, "mid_block_type": None}
    nested = plain | {"transformer_layers_per_block": [1, [2, 4]]}
    back = {"reverse_transformer_layers_per_block": [[4, 4, 10], 1]}
    # a text's keys and values, float32: two layers of 4 down, three of 4 or 10 up, 64 wide
    assert memory.told_bytes(nested, 1) == 8 * 64 * (2 * 4 + 3 * 4)
    assert memory.told_bytes(nested | back, 1) == 8 * 64 * (2 * 4 + 3 * 10)
