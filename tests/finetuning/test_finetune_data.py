"""The script that makes the picture sets of `prove_finetune.py`."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import finetune_data


def pictures(folder: Path, style: str, notice: str) -> Path:
    """A red heart as scripts/build_icons.py writes it."""
    folder.mkdir()
    row = {"file_name": "heart.png", "codepoint": "2764", "label": "red heart", "style": style, "split": "train"}
    row |= {"group": "smileys-emotion"}
    Image.new("RGB", (8, 8), "red").save(folder / row["file_name"])
    rows = [{**row, "style": f"{style}-{turn}", "captions": ["a red heart"]} for turn in range(3)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (folder / "NOTICE").write_text(notice, encoding="utf-8")
    return folder


def test_pictures_of_others_keep_their_notice_word_for_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whose = {"icons": "By Ann, MIT.\n", "openmoji": "HfG Schwäbisch Gmünd, CC BY-SA 4.0.\n"}
    sources = {name: pictures(tmp_path / name, name, notice) for name, notice in whose.items()}
    told = [part for name, folder in sources.items() for part in (f"--{name}", str(folder))]
    monkeypatch.setattr(sys, "argv", ["finetune_data", *told, "--out", str(tmp_path / "out")])
    assert finetune_data.main() == 0
    for made, source in (("style", "openmoji"), ("swapped", "icons")):
        notice = (tmp_path / "out" / made / "NOTICE").read_text(encoding="utf-8")
        assert notice.endswith(f"\n\n{whose[source]}")
    assert not (tmp_path / "out" / "subject" / "NOTICE").exists()  # drawn by the script itself
