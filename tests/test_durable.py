"""What is written is whole or not there: a full disk, a kill or a refusal leaves the old file or folder as it was."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from latentgen import durable
from latentgen.durable import (
    alone,
    check_writable,
    new_place,
    recover,
    remove_leftovers,
    write_file,
    write_folder,
    write_free,
)
from latentgen.errors import InputError
from latentgen.stopping import stop_at_once

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


@pytest.mark.skipif(os.name != "posix", reason="fifos")
def test_what_is_no_plain_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "null")
    with pytest.raises(InputError, match=r"cannot write .*null: it is no plain file"):
        write_file(tmp_path / "null", b"data")
    assert (tmp_path / "null").is_fifo() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("links", [True, False])
def test_of_many_who_want_one_name_each_gets_its_own_and_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:  # as on FAT
        monkeypatch.setattr(os, "link", none)
    (tmp_path / "0").write_bytes(b"there before")
    names = [str(number) for number in range(17)]
    with ThreadPoolExecutor(8) as pool:
        placed = list(pool.map(lambda k: write_free(tmp_path, names, f"of {k}".encode()), range(16)))
    assert sorted(path.name for path in placed) == sorted(names[1:])
    assert contents(tmp_path) == {"0": b"there before"} | {p.name: f"of {k}".encode() for k, p in enumerate(placed)}
    with pytest.raises(InputError, match="no name is free in"):
        write_free(tmp_path, names, b"one more")
    assert len(list(tmp_path.iterdir())) == 17


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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_a_new_place_is_written_by_one_process_alone_and_nothing_lies_beside_it_then(tmp_path: Path) -> None:
    file, folder = tmp_path / "below/model.safetensors", tmp_path / "below/model"
    with new_place(file):
        for target in (file, folder):  # the tokenizers of the one go into the other
            with pytest.raises(InputError, match=f"another latentgen writes {target} now; wait"), new_place(target):
                pass
        with new_place(tmp_path / "below/model.2"):
            pass
        file.touch()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    with pytest.raises(InputError, match=f"{file} is already there; name a new place"), new_place(file):
        pass
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    with new_place(folder), pytest.raises(InputError, match="another latentgen writes"), new_place(folder):
        pass
    with pytest.raises(InputError, match="cannot be made"), new_place(tmp_path / "other/below/model"):
        raise InputError("cannot be made")
    assert [path.name for path in tmp_path.iterdir()] == ["below"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
@pytest.mark.parametrize("anew", [False, True])
def test_a_lock_that_was_taken_away_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    import fcntl

    def late(*_: Any) -> None:
        (tmp_path / ".model.lock").rename(tmp_path / "old.lock")  # held open all the same
        if anew:
            (tmp_path / ".model.lock").touch()

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(InputError, match="another latentgen writes"), new_place(tmp_path / "model"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EWOULDBLOCK])
def test_where_there_are_no_locks_a_new_place_is_written_and_a_run_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import fcntl

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if number == errno.ENOLCK:
        with new_place(tmp_path / "below/model"):
            pass
        assert not list(tmp_path.iterdir())
    else:
        with pytest.raises(InputError, match="another latentgen writes"), new_place(tmp_path / "below/model"):
            pass
    with pytest.raises(InputError, match="another run trains in "), alone(tmp_path / "run"):
        pass


def test_on_windows_no_lock_lies_beside_a_new_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with new_place(tmp_path / "below/model"):
        assert not list((tmp_path / "below").iterdir())  # what is open cannot be removed there
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["", ".", "..", "/", "nowhere/.."])
def test_a_folder_without_a_name_of_its_own_is_no_new_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is already there; name a new place"), new_place(Path(place)):
        pass
    assert not list(tmp_path.iterdir())


def test_that_nothing_can_be_written_is_said_where_nothing_can_be_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "exists", lambda _: False)  # as on a drive of Windows that is not there
    with pytest.raises(InputError, match=f"cannot write into {tmp_path}: there is no /; name another place"):
        check_writable(tmp_path)
    monkeypatch.setattr(Path, "exists", refuse)  # as below a folder that may not be searched
    with pytest.raises(InputError, match=f"cannot write {tmp_path}: Permission denied"):
        check_writable(tmp_path)


def test_ctrl_c_in_an_import_ends_at_once_only_where_nothing_is_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ctrl_c_in_import_of: Callable[[str], None]
) -> None:
    def met(*_: object) -> None:
        importlib.import_module("interrupted")

    ctrl_c_in_import_of("interrupted")
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "folder", met)
    with pytest.raises(KeyboardInterrupt), new_place(tmp_path / "below/model"):
        met()
    with pytest.raises(SystemExit, match="130"):
        met()
    monkeypatch.setattr(os, "fsync", met)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "file", b"one")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_what_ignores_ctrl_c_or_has_its_own_way_with_it_is_left_alone(handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        stop_at_once()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


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
