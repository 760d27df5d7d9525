"""The proof of what was fine-tuned, on schedulers that draw noise, and on those that stock diffusers cannot walk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from latentgen import InputError, finetune
from tests.finetuning.test_finetune import FAST, picture

RANDOM = {
    "EulerAncestralDiscreteScheduler": {},
    "DDPMScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"},
}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    for k in range(4):
        picture((200, 20 + k, 20), k).save(place / f"{k}.png")
        (place / f"{k}.txt").write_text("a red apple")
    return place


def scheduled(folder: Path, place: Path, **changes: Any) -> Path:
    """The weights under another scheduler."""
    shutil.copytree(folder, place)
    file = place / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    index = place / "model_index.json"
    told = json.loads(index.read_text())
    told["scheduler"] = ["diffusers", json.loads(file.read_text())["_class_name"]]
    index.write_text(json.dumps(told))
    (place / "manifest.json").unlink(missing_ok=True)
    return place


@pytest.mark.parametrize("name", RANDOM)
def test_a_scheduler_that_draws_noise_is_proved_all_the_same(
    name: str, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    base = scheduled(folder, tmp_path / "base", _class_name=name, **RANDOM[name])
    out = finetune(pictures, base=base, out=tmp_path / "mine", **FAST)
    proof = json.loads((out / "metrics.json").read_text())["proof"]
    assert proof["saved"] <= 1e-5 and proof["stock"] <= 1e-3 < proof["changed"]
    with pytest.raises(InputError, match="changed nothing"):
        finetune(pictures, base=base, out=tmp_path / "other", **{**FAST, "rate": 1e-12})


def test_what_stock_diffusers_cannot_walk_is_kept_and_said(folder: Path, pictures: Path, tmp_path: Path) -> None:
    base = scheduled(folder, tmp_path / "base", _class_name="FlowMatchEulerDiscreteScheduler", shift=1.0)
    lines: list[str] = []
    out = finetune(pictures, base=base, out=tmp_path / "mine", **{**FAST, "report": lines.append})
    proof = json.loads((out / "metrics.json").read_text())["proof"]
    assert proof["saved"] <= 2e-3 < proof["changed"] and proof["stock"] is None
    assert any("knows no rectified flow" in line for line in lines)
