"""scripts/compare_keys.py: variants side by side are all of one recipe, one seed, one length and the same data."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from latentgen.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import compare_keys

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """As if it trained: it leaves what `compare_keys` looks for."""

    recipe: Recipe
    out: Path
    folder: Path
    report: Callable[[object], None]

    def all(self) -> Path:
        self.out.mkdir(parents=True)
        (self.out / "manifest.json").write_text("{}")
        (self.out / "recipe.json").write_text(json.dumps(self.recipe.model_dump(mode="json")))
        self.report(f"trained on {self.folder}")
        return self.out


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """compared(*options): what was said on standard error, by a script that trains and judges nothing."""
    monkeypatch.setattr(compare_keys, "Run", Run)
    monkeypatch.setattr(compare_keys, "evaluate", lambda *_: SimpleNamespace(figures={}))

    def ran(*options: object, code: int = 0) -> str:
        told = ["--out", str(tmp_path / "keys"), "--only", "plain", *map(str, options)]
        assert compare_keys.main(told) == code
        return capsys.readouterr().err

    return ran


def test_what_is_done_is_not_done_again(compared: Callable[..., str]) -> None:
    assert "trained on data/icons" in compared()
    assert "trained" not in compared()
    assert compared("--only", "plain;min-snr").count("trained on") == 1


@pytest.mark.parametrize(
    "changed",
    [
        ("--steps", 1200),
        ("--seed", 1),
        ("--data", "tests/data/icons"),
        ("--recipe", ROOT / "pipelines" / "speedrun.toml"),
    ],
)
def test_what_was_trained_in_another_way_is_not_put_beside_it(
    changed: tuple[str, object], compared: Callable[..., str], tmp_path: Path
) -> None:
    compared()
    before = (tmp_path / "keys/plain/recipe.json").read_bytes()
    said = compared("--only", "min-snr;plain", *changed, code=2)
    assert said == (
        f"compare_keys: {tmp_path}/keys/plain was trained by another recipe or on other data; give another --out\n"
    )  # before the other was trained
    assert (tmp_path / "keys/plain/recipe.json").read_bytes() == before
    assert f"trained on {changed[1] if changed[0] == '--data' else 'data/icons'}" in compared(
        *changed, "--out", tmp_path / "other"
    )


def test_a_recipe_of_another_kind_costs_one_line(compared: Callable[..., str]) -> None:
    said = compared("--recipe", ROOT / "pipelines" / "fashion.toml", code=2)
    assert said.startswith("compare_keys: recipe ") and "is of kind 'pixels'" in said and said.count("\n") == 1
