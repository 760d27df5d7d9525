"""The smaller scripts: what cannot be used costs one line and code 2, before anything is computed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import build_judge

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        ("draw_sheet", "--weights nosuch", "no weights folder at nosuch"),
        ("draw_sheet", "--scale 0", "--scale is 0; give 1 or more"),
        ("prove_finetune", "style --concepts 0", "--concepts is 0; give 2 or more"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(script: str, options: str, said: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *options.split(), "--out", str(tmp_path / "out")]
    there = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=there, cwd=tmp_path, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: ") and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (1, f"pip could not fetch {build_judge.PACKAGE} (ERROR: No matching distribution); is there a network?"),
        (0, "judge.whl has another hash than the one this was written for; nothing was read"),
    ],
)
def test_a_judge_that_cannot_be_fetched_costs_one_line_and_the_one_there_stays(
    code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pip(command: list[str], **_: object) -> SimpleNamespace:
        Path(command[-1], "judge.whl").write_bytes(b"of somebody else")
        return SimpleNamespace(returncode=code, stderr="WARNING: Retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(build_judge.subprocess, "run", pip)
    (tmp_path / "model.safetensors").write_bytes(b"the one there")
    assert build_judge.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"build_judge: {said}\n"
    assert (tmp_path / "model.safetensors").read_bytes() == b"the one there"
