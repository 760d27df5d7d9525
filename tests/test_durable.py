"""What is written is whole or not there: a full disk, a kill or a refusal leaves the old file or folder as it was."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from latentgen import durable
from latentgen.durable import alone, recover, remove_leftovers, write_file, write_folder
from latentgen.errors import InputError

ROOT = Path(__file__).parents[1]


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def writer(text: str) -> Any:
    def write(aside: Path) -> None:
        (aside / "part").mkdir()
        (aside / "part/weights").write_text(text)

    return write


def test_a_file_is_replaced_whole_and_its_folder_is_made(tmp_path: Path) -> None:
    target = tmp_path / "new/folder/file.png"
    write_file(target, b"one")
    os.link(target, tmp_path / "old.png")
    write_file(target, b"two")
    assert contents(tmp_path) == {"new/folder/file.png": b"two", "old.png": b"one"}  # never written into


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "file.png", b"one")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"no space left on the disk while writing .*file\.png"):
        write_file(tmp_path / "file.png", b"two")
    assert contents(tmp_path) == {"file.png": b"one"}


def test_a_place_that_cannot_be_written_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot write"):
        write_file(tmp_path / "file/below.png", b"")
    with pytest.raises(InputError, match="cannot write"):
        write_file(tmp_path, b"")


def test_a_folder_is_replaced_whole_with_a_manifest_of_what_was_written(tmp_path: Path) -> None:
    write_folder(tmp_path / "w", writer("one"))
    write_folder(tmp_path / "w", writer("two"))
    found = contents(tmp_path)
    manifest = json.loads(found.pop("w/manifest.json"))
    assert found == {"w/part/weights": b"two"}
    assert manifest["files"] == {"part/weights": "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"}
    assert manifest["sizes"] == {"part/weights": 3}


def test_a_full_disk_leaves_the_old_folder_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "w", writer("one"))
    before = contents(tmp_path)
    with pytest.raises(InputError, match="no space left on the disk"):
        write_folder(tmp_path / "w", full)
    monkeypatch.setattr(durable, "_sync", full)
    with pytest.raises(InputError, match="no space left on the disk"):
        write_folder(tmp_path / "w", writer("two"))
    assert contents(tmp_path) == before


def test_what_is_not_in_the_old_manifest_is_carried_over_and_never_replaced(tmp_path: Path) -> None:
    write_folder(tmp_path / "w", writer("one"))
    (tmp_path / "w/state").mkdir()
    (tmp_path / "w/state/step").write_text("7")
    write_folder(tmp_path / "w", writer("two"))
    assert (tmp_path / "w/state/step").read_text() == "7"
    assert (tmp_path / "w/part/weights").read_text() == "two"
    (tmp_path / "w/manifest.json").unlink()
    with pytest.raises(InputError, match="was not written by latentgen and would be replaced"):
        write_folder(tmp_path / "w", writer("three"))
    assert (tmp_path / "w/part/weights").read_text() == "two"


def test_an_empty_folder_and_who_may_read_are_carried_over_too(tmp_path: Path) -> None:
    (tmp_path / "w/.git/refs").mkdir(parents=True)
    (tmp_path / "w").chmod(0o750)
    write_folder(tmp_path / "w", writer("one"))
    assert (tmp_path / "w/.git/refs").is_dir() and (tmp_path / "w").stat().st_mode & 0o777 == 0o750


def test_an_error_of_the_writer_leaves_the_old_folder(tmp_path: Path) -> None:
    def fail(aside: Path) -> None:
        writer("two")(aside)
        raise RuntimeError("no")

    write_folder(tmp_path / "w", writer("one"))
    before = contents(tmp_path)
    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "w", fail)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_both_ways_to_swap_end_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    write_folder(tmp_path / "w", writer("one"))
    write_folder(tmp_path / "w", writer("two"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w"]
    assert (tmp_path / "w/part/weights").read_text() == "two"


def test_a_swap_cut_between_its_two_renames_is_put_back(tmp_path: Path) -> None:
    write_folder(tmp_path / "w", writer("one"))
    (tmp_path / "w").rename(tmp_path / ".w.old")
    recover(tmp_path / "w")
    assert (tmp_path / "w/part/weights").read_text() == "one"


def test_a_folder_behind_a_link_is_replaced_where_it_stands(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", writer("one"))
    (tmp_path / "link").symlink_to("real")
    write_folder(tmp_path / "link", writer("two"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/part/weights").read_text() == "two"


def test_a_killed_write_leaves_the_old_folder_and_the_next_one_clears_up(tmp_path: Path) -> None:
    write_folder(tmp_path / "w", writer("one"))
    code = (
        "import sys, time; from pathlib import Path; from latentgen.durable import write_folder\n"
        "def write(aside):\n"
        "    (aside / 'part').mkdir(); (aside / 'part/weights').write_text('tw')\n"
        "    print('writing', flush=True); time.sleep(60)\n"
        "write_folder(Path(sys.argv[1]), write)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "w")], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "w/part/weights").read_text() == "one"
    write_folder(tmp_path / "w", writer("two"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w"]


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit that Linux has")
def test_what_the_disk_refuses_to_safetensors_is_one_line(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; import numpy as np\n"
        "from safetensors.numpy import save_file; from latentgen.durable import write_folder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try:\n"
        "    write_folder(Path(sys.argv[1]), lambda aside: save_file({'x': np.zeros(10_000)}, aside / 'x.st'))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)"
    )
    write_folder(tmp_path / "w", writer("one"))
    before = contents(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith(f"InputError cannot write {tmp_path / 'w'}: File too large"), ran.stdout
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "said", ["I/O error: No space left on device (os error 28)", "IoError(Os { code: 28, kind: X })"]
)
def test_a_full_disk_is_known_by_what_safetensors_says(tmp_path: Path, said: str) -> None:
    def write(aside: Path) -> None:
        raise SafetensorError(f"Error while serializing: {said}")

    with pytest.raises(InputError, match="no space left on the disk"):
        write_folder(tmp_path / "w", write)
    with pytest.raises(SafetensorError, match="of its own"), durable.saying_what_failed(tmp_path):
        raise SafetensorError("of its own")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_a_folder_that_another_process_holds_is_refused_until_it_ends(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from latentgen.durable import alone
with alone(Path({str(tmp_path)!r})):
    print("held", flush=True)
    input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as run:
        assert run.stdout is not None and run.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another run trains in "), alone(tmp_path):
            pass
        run.kill()
    with alone(tmp_path):
        pass


def test_what_killed_processes_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    left = [
        "cache/.latents-1.npy.123",
        "cache/.pixels.json.9",
        "unet/checkpoints/.step-00000002.writing/state.json",
    ]
    kept = [".lock", "cache/latents-1.npy", "unet/checkpoints/step-00000001/model.safetensors", "cache/.survey.json"]
    for name in (*left, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    remove_leftovers(tmp_path)
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert there == set(kept)
