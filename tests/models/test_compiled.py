"""torch.compile of the U-Net: the pictures of the torch engine, and one line where it cannot work."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentgen.checkpoint import save_pipeline
from latentgen.errors import InputError
from latentgen.models.compiled import Compiled, compiled, why_no_compiling
from latentgen.models.network import unet_network
from latentgen.pipeline import Pipeline
from latentgen.render import Order, render
from tests.conftest import SCHEDULE

LACKS = why_no_compiling(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(LACKS is not None, reason=f"torch.compile cannot work here: {LACKS}")
def test_the_compiled_unet_renders_the_pictures_of_the_torch_engine(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel
    from torch._dynamo.utils import counters

    unet = UNet2DConditionModel(  # one level: compiling takes a second for each kernel
        sample_size=8,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=16,
    )
    folder = save_pipeline(
        tmp_path / "w",
        **{**parts, "unet": unet.eval()},
        scheduler_config={**SCHEDULE, "_class_name": "DDIMScheduler"},
    )
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    call = {"num_inference_steps": 3, "guidance_scale": 4.0, "seed": 3, "output_type": "np"}
    plain = Pipeline.from_pretrained(folder, engine="torch", device="cpu")("a red apple", **call)
    counters.clear()
    pipe = Pipeline.from_pretrained(folder, device="cpu", compile=True)
    quick = pipe("a red apple", **call)
    assert counters["stats"]["unique_graphs"] > 0
    assert np.abs(quick.images - plain.images).max() < 1e-3
    assert quick.settings["engine"] == "torch" and quick.settings["compile"] is True
    assert "compile" not in plain.settings


def test_it_is_the_torch_engines(folder: Path) -> None:
    with pytest.raises(InputError, match="compile is the torch engine's"):
        Pipeline.from_pretrained(folder, engine="onnx", compile=True)


def test_without_a_compiler_one_line_says_so_and_nothing_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    order = Order(["a red apple"], steps=2, engine="torch", compile=True)
    with pytest.raises(InputError, match="there is no C\\+\\+ compiler 'no-such-compiler'") as refused:
        list(render(order, tmp_path / "new", str(folder)))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "new").exists()


def test_what_the_compiler_cannot_do_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("first line\nsecond line")

    if LACKS is not None:
        pytest.skip(LACKS)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    pipe = Pipeline.from_pretrained(folder, device="cpu", compile=True)
    with pytest.raises(InputError, match=r"^compile failed: first line; render without it$"):
        pipe("a red apple", num_inference_steps=1)


def test_a_copy_is_compiled_of_its_own_unet(parts: dict[str, Any]) -> None:
    network = unet_network(parts["unet"], run=compiled(parts["unet"]))
    twin = copy.deepcopy(network)
    assert isinstance(twin.run, Compiled) and twin.run.unet is twin.unet is not network.unet
