"""The judge that comes along, and those by path."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentgen.diffusion.noise import normal
from latentgen.errors import InputError
from latentgen.evaluation.efficientnet import EfficientNetLite0, same_padding
from latentgen.evaluation.encoders import default_judge, open_judge
from latentgen.evaluation.inception import InceptionV3


def test_the_default_judge_gives_what_an_independent_implementation_gave() -> None:
    """The numbers are of the package efficientnet-lite-pytorch 0.1.0 with its own weights, in fp32."""
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    waves = torch.stack([torch.sin(x / 9), torch.cos(y / 7), torch.sin((x + y) / 11)])[None]
    features = EfficientNetLite0.load(default_judge() / "model.safetensors")(waves)[0]
    assert features.shape == (1280,)
    top = features.topk(6)
    assert top.indices.tolist() == [71, 31, 674, 66, 343, 403]
    expected = [5.768685, 5.155959, 4.761003, 4.638375, 4.306952, 4.190994]
    assert top.values.tolist() == pytest.approx(expected, abs=0.02)  # convolutions are stored in fp16
    assert float(features.mean()) == pytest.approx(0.2113991, rel=0.005)
    assert float(features.norm()) == pytest.approx(25.312269, rel=0.005)


def numbered() -> dict[str, torch.Tensor]:
    """Weights for an Inception v3 from counters: the same everywhere."""
    state = InceptionV3().state_dict()
    for k, (name, value) in enumerate(state.items()):
        if name.endswith("num_batches_tracked"):
            continue
        drawn = torch.from_numpy(normal(1, k, tuple(value.shape)))
        if name.endswith("conv.weight"):
            drawn *= (2 / value[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            drawn = 1 + 0.1 * drawn.abs()
        else:
            drawn = 0.1 * drawn + name.endswith("bn.weight")
        value.copy_(drawn)
    return state


def test_a_torn_inception_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04 a .pth by another name")
    (tmp_path / "config.json").write_text('{"model_type": "inception-v3"}')
    with pytest.raises(InputError, match="holds no Inception v3: "):
        open_judge(tmp_path)


def test_inception_gives_what_an_independent_implementation_gave(tmp_path: Path) -> None:
    """The numbers are of torch-fidelity 0.4.0's extractor, which resizes as TensorFlow did, on these weights."""
    weights = numbered()
    (tmp_path / "config.json").write_text('{"model_type": "inception-v3"}')
    with pytest.raises(InputError, match="safetensors"):
        open_judge(tmp_path)
    save_file({**weights, "fc.weight": torch.zeros(1008, 2048)}, tmp_path / "model.safetensors")
    judge = open_judge(tmp_path)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    pixels = torch.stack([(3 * x + y) % 256, (x * y) % 256, (5 * y + 2 * x) % 256], -1)[None].to(torch.uint8)
    features = torch.from_numpy(judge.features(pixels.numpy()))[0]
    assert judge.name == "inception-v3" and features.shape == (2048,)
    top = features.topk(6)
    assert top.indices.tolist() == [1975, 1194, 988, 2014, 63, 364]
    assert top.values.tolist() == pytest.approx([2.1164, 1.9125, 1.8583, 1.6569, 1.6479, 1.6330], abs=2e-3)
    assert float(features.mean()) == pytest.approx(0.2475135, rel=1e-3)
    assert float(features.norm()) == pytest.approx(18.759460, rel=1e-3)
    learned = (value for name, value in weights.items() if name.endswith(("weight", "bias")))
    assert sum(value.numel() for value in learned) == 21_785_568  # Szegedy et al. 2016, without the classifier
    del weights["Mixed_7c.branch1x1.conv.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        InputError, match=r"no Inception v3 as FID takes it: Mixed_7c\.branch1x1\.conv\.weight is missing"
    ):
        open_judge(tmp_path)


@pytest.mark.parametrize(("side", "expected"), [(128, (0, 1)), (97, (1, 1)), (7, (1, 1))])
def test_the_odd_pixel_of_padding_comes_after(side: int, expected: tuple[int, int]) -> None:
    assert same_padding(side, 3, 2) == expected


def test_features_come_from_the_cache_and_a_torn_part_is_made_anew(tmp_path: Path) -> None:
    judge = open_judge()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    first = judge.features(pixels, tmp_path)
    (kept,) = tmp_path.glob("*.npy")
    assert np.array_equal(judge.features(pixels, tmp_path), first)
    for torn in (b"torn", b""):
        kept.write_bytes(torn)
        assert np.allclose(judge.features(pixels, tmp_path), first)


def test_clip_and_dinov2_are_read_by_path(tmp_path: Path, parts: dict[str, Any]) -> None:
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = parts["tokenizer"]
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": words.eos_token_id}
    vision = {**small, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    words.save_pretrained(tmp_path / "clip")
    dino = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(dino).save_pretrained(tmp_path / "dino")
    pixels = np.zeros((2, 32, 32, 3), np.uint8)
    clip = open_judge(tmp_path / "clip")
    assert clip.features(pixels).shape == (2, 12)
    assert clip.texts is not None
    assert clip.texts(["a red apple", "a cat"]).shape == (2, 12)
    assert open_judge(tmp_path / "dino").features(pixels).shape == (2, 16)


def test_what_is_no_judge_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no judge at"):
        open_judge(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "efficientnet-lite0"}))
    with pytest.raises(InputError, match="never pickles"):
        open_judge(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 16)
    with pytest.raises(InputError, match="holds no EfficientNet"):
        open_judge(tmp_path)
