"""Processes share the pictures of one `latentgen render`: the files of one process, said once, by the first."""

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from latentgen.errors import InputError
from latentgen.image import read_settings
from latentgen.processes import Processes, started

ROOT = Path(__file__).parents[1]
RENDER = ["-m", "latentgen.cli", "render"]
PROMPTS = ["a red apple", "a blue bird", "a red apple"]
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def start(command: list[str], **settings: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **settings}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def two(arguments: list[str], **settings: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of both processes, started by hand as a launcher does."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= settings
    both = [start([*RENDER, *arguments], RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")]
    ended = []
    for process in both:
        out, err = process.communicate(timeout=120)
        ended.append((process.returncode, out, err))
    return ended


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("batch", ["1", "2"])
def test_torchrun_gives_the_files_of_one_process_byte_for_byte_and_the_first_says_them(
    folder: Path, tmp_path: Path, batch: str
) -> None:
    asked = [*PROMPTS, "-n", "2", "--seed", "7", "--steps", "2", "--batch", batch, "--weights", str(folder)]
    one = start([*RENDER, *asked, "--out", str(tmp_path / "one")])
    assert one.wait(120) == 0
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    shared = start([*launcher, *RENDER, *asked, "--out", str(tmp_path / "two")])
    out, err = shared.communicate(timeout=120)
    assert shared.returncode == 0, err
    alone = one.communicate()[0]
    assert len(alone.splitlines()) == 6
    assert out == alone.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    assert held(tmp_path / "one") == held(tmp_path / "two")


def test_each_process_renders_its_part_and_all_agree_on_fresh_seeds_and_free_names(
    folder: Path, tmp_path: Path
) -> None:
    asked = [*PROMPTS[:2], "--steps", "2", "--weights", str(folder), "--out", str(tmp_path / "new"), "--batch", "auto"]
    (code, out, err), (other_code, other_out, other_err) = two(asked)
    assert (code, other_code) == (0, 0), err + other_err
    paths = [Path(line) for line in out.splitlines()]
    seeds = [read_settings(path)["seed"] for path in paths]
    assert other_out == "" and seeds[1] == seeds[0] + 1
    assert [path.name for path in paths] == [f"a-red-apple-{seeds[0]}.png", f"a-blue-bird-{seeds[1]}.png"]
    assert sorted(paths) == sorted((tmp_path / "new").iterdir())


def test_what_cannot_be_rendered_is_said_once_and_ends_both(folder: Path, tmp_path: Path) -> None:
    ended = two(["a red apple", "--steps", "0", "--weights", str(folder), "--out", str(tmp_path / "none")])
    assert [code for code, _, _ in ended] == [2, 2]
    assert [out for _, out, _ in ended] == ["", ""]
    assert ended[0][2].startswith("latentgen: --steps is 0") and ended[0][2].count("\n") == 1
    assert ended[1][2] == ""
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "there is no such process"),
        ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
    ],
)
def test_an_environment_that_no_launcher_makes_gets_one_line(
    environment: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=line):
        started()


def test_a_process_that_no_launcher_started_is_alone_though_its_cluster_names_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert (started().rank, started().count) == (0, 1)


class Kept(dict[str, bytes]):
    """What processes say to one another, where none has to wait."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def wait(self, keys: list[str], _: object) -> None:
        assert set(keys) <= set(self)


def test_the_first_process_knows_in_the_end_what_each_has_done_and_that_one_has_not() -> None:
    store = Kept()
    first, second = (Processes(rank, 2, store=store) for rank in range(2))
    with second.to_the_end() as done:
        done["1"] = "a-2.png"
    with first.to_the_end() as done:
        done["0"] = "a.png"
    assert done == {"0": "a.png", "1": "a-2.png"}
    with pytest.raises(ZeroDivisionError), second.to_the_end():
        raise ZeroDivisionError
    with pytest.raises(InputError, match="process 1 of 2 ended before its pictures were written"), first.to_the_end():
        pass


def test_who_is_stopped_in_an_import_tells_the_others_and_one_alone_ends_at_once(
    ctrl_c_in_import_of: Callable[[str], None],
) -> None:
    ctrl_c_in_import_of("interrupted")
    store = Kept()
    with pytest.raises(KeyboardInterrupt), Processes(1, 2, store=store).to_the_end():
        importlib.import_module("interrupted")
    assert list(store.values()) == [b"null"]
    with pytest.raises(SystemExit, match="130"), Processes().to_the_end():
        importlib.import_module("interrupted")
