"""LoRAs on the command line: used, written into the PNG, found again by a replay, and refused where they are others."""

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from latentgen import Pipeline, cli
from latentgen.image import read_settings

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"


def lora(file: Path, seed: int, layer: str = LAYER) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"down": torch.randn(2, 16, generator=generator), "up": torch.randn(16, 2, generator=generator)}
    save_file({f"{layer}.lora.{name}.weight": 2 * tensor for name, tensor in tensors.items()}, file)
    return file


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["latentgen", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


def test_loras_are_used_recorded_replayed_and_refused_where_they_are_others(
    run: Callable[..., tuple[int, str]], folder: Path, tmp_path: Path
) -> None:
    one, two = lora(tmp_path / "one.safetensors", 1), lora(tmp_path / "t:o.safetensors", 2)
    call = ["render", "a red apple", "--steps", 2, "--seed", 1, "--weights", folder]
    assert run(*call, "--out", tmp_path / "plain.png") == (0, "")
    assert run(*call, "--out", tmp_path / "a.png", "--lora", f"{one}:0.7", "--lora", two) == (0, "")
    said = read_settings(tmp_path / "a.png")["loras"]
    assert [(each["name"], each["path"], each["weight"]) for each in said] == [
        ("one", one.as_posix(), 0.7),
        ("t:o", two.as_posix(), 1.0),
    ]
    assert "loras" not in read_settings(tmp_path / "plain.png")
    pipe = Pipeline.from_pretrained(folder, engine="torch")
    pipe.load_lora(one, 0.7)
    pipe.load_lora(two)
    expected = np.asarray(pipe("a red apple", num_inference_steps=2, seed=1).images[0])
    with Image.open(tmp_path / "a.png") as picture, Image.open(tmp_path / "plain.png") as plain:
        np.testing.assert_array_equal(np.asarray(picture), expected)
        assert not np.array_equal(np.asarray(plain), expected)

    same = (0, "latentgen: the same file, byte for byte\n")
    assert run("replay", tmp_path / "a.png", "--out", tmp_path / "b.png") == same
    moved = tmp_path / "moved.safetensors"
    shutil.move(one, moved)
    code, line = run("replay", tmp_path / "a.png", "--out", tmp_path / "c.png")
    assert code == 2 and "was made with LoRA one (" in line and "not found at" in line and line.count("\n") == 1
    assert run("replay", tmp_path / "a.png", "--out", tmp_path / "c.png", "--lora", moved) == same
    other = lora(tmp_path / "other.safetensors", 4)
    for picture, made_with in (("a.png", "one ("), ("plain.png", "none")):
        code, line = run("replay", tmp_path / picture, "--out", tmp_path / "d.png", "--lora", other)
        assert code == 2 and f"--lora {other} is not of {tmp_path / picture}, which was made with {made_with}" in line
    lora(one, 3)
    code, line = run("replay", tmp_path / "a.png", "--out", tmp_path / "d.png")
    assert code == 2 and "is another (" in line and not (tmp_path / "d.png").exists()


def test_a_peft_folder_is_found_again_by_a_replay_until_its_settings_are_others(
    run: Callable[..., tuple[int, str]], folder: Path, tmp_path: Path
) -> None:
    lora(tmp_path / "adapter_model.safetensors", 1)
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    call = ["render", "a red apple", "--steps", 2, "--seed", 1, "--weights", folder, "--lora", tmp_path]
    assert run(*call, "--out", tmp_path / "a.png") == (0, "")
    same = (0, "latentgen: the same file, byte for byte\n")
    assert run("replay", tmp_path / "a.png", "--out", tmp_path / "b.png") == same
    settings.write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    code, line = run("replay", tmp_path / "a.png", "--out", tmp_path / "c.png")
    assert code == 2 and "is another (" in line and not (tmp_path / "c.png").exists()


def test_what_cannot_be_a_lora_gets_one_line(run: Callable[..., tuple[int, str]], folder: Path, tmp_path: Path) -> None:
    call = ["render", "a red apple", "--steps", 2, "--weights", folder, "--out", tmp_path / "a.png", "--lora"]
    other = lora(tmp_path / "other.safetensors", 1, "unet.down_blocks.9.to_v")
    for given, words in {
        str(tmp_path / "none.safetensors"): "no LoRA at",
        f"{other}:0.5": "is for another model",
        f"{other}:nan": "a LoRA's weight is nan",
    }.items():
        code, line = run(*call, given)
        assert code == 2 and words in line and line.count("\n") == 1, line
    assert not (tmp_path / "a.png").exists()
