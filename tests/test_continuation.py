"""What a run that goes on says of the training before it."""

import json
from pathlib import Path

import pytest
from PIL import Image

from latentgen import InputError
from latentgen.continuation import parts_before, refuse_itself
from latentgen.training.finish import extra_files

ROOT = Path(__file__).parents[1]


def test_every_part_is_listed_with_its_batch_and_rate() -> None:
    train = {"steps": 9999, "batch": 64, "rate": 1e-3, "warmup": 5}
    first = parts_before({"steps": 800.0, "validation_loss": 0.4}, train)
    assert first == [{"steps": 800.0, "batch": 64, "rate": 1e-3}]  # the steps that were trained, not those asked for
    again = {"steps": 100.0, "steps_before": 800.0, "parts_before": first}
    assert parts_before(again, {"batch": 32, "rate": 2e-4}) == [*first, {"steps": 100.0, "batch": 32, "rate": 2e-4}]


def test_of_metrics_with_a_sum_alone_the_sum_is_a_part_and_of_none_there_is_none() -> None:
    old = {"steps": 1950.0, "steps_before": 6300.0}
    found = parts_before(old, {"batch": 32, "rate": 7e-4})
    assert found == [{"steps": 6300.0}, {"steps": 1950.0, "batch": 32, "rate": 7e-4}]
    assert sum(part["steps"] for part in found) == 8250
    assert parts_before({}, {}) == []


def test_weights_are_not_replaced_by_what_goes_on_from_them(tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(tmp_path / "mine")
    for out in (tmp_path / "mine", tmp_path / "linked", tmp_path / "x" / ".." / "mine"):
        with pytest.raises(InputError, match="is what training goes on from, and would be replaced"):
            refuse_itself(tmp_path / "mine", out)
    refuse_itself(tmp_path / "mine", tmp_path / "more")


def test_the_card_tells_the_parts() -> None:
    parts = [{"steps": 6300.0}, {"steps": 1950.0, "batch": 32, "rate": 7e-4}]
    figures = {"unet": {"steps": 100.0, "steps_before": 8250.0, "parts_before": parts}, "vae": {"psnr": 25.2071}}
    files = extra_files(
        name="mine", recipe={}, figures=figures, defaults={}, size=32, data=ROOT, sheet=Image.new("RGB", (4, 4))
    )
    card = str(files["README.md"])
    assert "| unet | parts before | 6,300 steps, 1,950 steps of batch 32 at rate 0.0007 |" in card
    assert "| unet | steps before | 8,250 |" in card and "| vae | psnr | 25.21 |" in card
    assert json.loads(str(files["metrics.json"]))["unet"]["parts_before"] == parts
