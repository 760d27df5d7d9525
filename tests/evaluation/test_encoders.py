"""The judge that comes along, and those by path."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentgen.errors import InputError
from latentgen.evaluation.efficientnet import EfficientNetLite0, same_padding
from latentgen.evaluation.encoders import default_judge, open_judge


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


@pytest.mark.parametrize(("side", "expected"), [(128, (0, 1)), (97, (1, 1)), (7, (1, 1))])
def test_the_odd_pixel_of_padding_comes_after(side: int, expected: tuple[int, int]) -> None:
    assert same_padding(side, 3, 2) == expected


def test_features_come_from_the_cache_and_a_torn_part_is_made_anew(tmp_path: Path) -> None:
    judge = open_judge()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    first = judge.features(pixels, tmp_path)
    (kept,) = tmp_path.glob("*.npy")
    assert np.array_equal(judge.features(pixels, tmp_path), first)
    kept.write_bytes(b"torn")
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
