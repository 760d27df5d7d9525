"""Every verb of the command line, as a person runs it: paths on standard output, one line and code 2 for a mistake."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from latentgen import __version__, cli
from latentgen.cli import rendering
from latentgen.cli.parts import PATH, read_values
from latentgen.diffusion.sampling import SAMPLERS
from latentgen.errors import InputError
from latentgen.image import read_settings

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "tests" / "data" / "icons"
FAST = ["--steps", "2"]


class Ran(NamedTuple):
    code: int
    out: list[str]
    err: str


def command() -> list[str]:
    """The installed `latentgen`, or what it calls."""
    script = shutil.which("latentgen", path=str(Path(sys.executable).parent))
    return [script] if script else [sys.executable, "-m", "latentgen.cli"]


def shell(*arguments: object) -> Ran:
    """In a process of its own, with pipes for output."""
    ran = subprocess.run([*command(), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=120)
    return Ran(ran.returncode, ran.stdout.splitlines(), ran.stderr)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """In this process, which has imported torch already."""

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["latentgen", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Ran(code, captured.out.splitlines(), captured.err)

    return call


def refused(ran: Ran, line: str) -> None:
    """Exit code 2, nothing on standard output, one line that says `line`."""
    assert ran.code == 2, ran
    assert ran.out == []
    assert ran.err.startswith("latentgen: ") and ran.err.count("\n") == 1
    assert line in ran.err


# --- as a person runs it


def test_the_version_is_that_of_the_package() -> None:
    assert shell("--version") == Ran(0, [f"latentgen {__version__}"], "")
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert told["project"]["dynamic"] == ["version"]
    assert told["tool"]["hatch"]["version"]["path"] == "latentgen/__init__.py"


def test_the_samplers_are_listed_with_their_sources() -> None:
    said = shell("samplers")
    assert said.code == 0 and not said.err
    names = {line.split()[0] for line in said.out if line and not line.startswith(" ")}
    assert set(SAMPLERS) <= names
    assert any("Lu et al." in line for line in said.out)


@pytest.mark.parametrize("verb", [[], ["render"], ["replay"], ["train"]])
def test_help_shows_examples_and_imports_little(verb: list[str]) -> None:
    ran = shell(*verb, "--help")
    assert ran.code == 0 and "latentgen" in "".join(ran.out)
    assert not verb or f"latentgen {verb[0]} " in "\n".join(ran.out)
    code = f"""
import sys
before = set(sys.modules)
import atexit
from latentgen import cli
heavy = {{"torch", "diffusers", "transformers", "numpy", "hashlib", "json", "ctypes", "secrets", "latentgen.durable"}}
heavy -= before
atexit.register(lambda: print("heavy:", *sorted(heavy & set(sys.modules)), "end"))
sys.argv = ["latentgen", *{verb!r}, "--help"]
cli.main()
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120).stdout
    assert "heavy: end" in said
    if not verb:
        assert shell().out == ran.out


def test_render_and_replay_in_a_pipe_print_only_the_path_and_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "apple.png"
    rendered = shell("render", "a red apple", "--seed", 7, "--out", target, "--weights", folder, *FAST)
    assert rendered == Ran(0, [str(target)], "")
    replayed = shell("replay", target)
    again = target.with_name("apple-replay.png")
    assert replayed == Ran(0, [str(again)], "latentgen: the same file, byte for byte\n")
    assert again.read_bytes() == target.read_bytes()
    assert read_settings(target)["seed"] == 7


def test_stopping_leaves_whole_pictures_and_exits_130(folder: Path, tmp_path: Path) -> None:
    arguments = ["render", "a red apple", "--n", "5000", "--out", str(tmp_path / "many"), "--weights", str(folder)]
    process = subprocess.Popen(
        [*command(), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    waited = time.monotonic() + 60
    while time.monotonic() < waited and not list((tmp_path / "many").glob("*.png")):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"latentgen: stopped\n")
    written = list((tmp_path / "many").iterdir())
    assert written and all(read_settings(path) for path in written)


def test_a_mistake_in_a_train_call_gets_one_line(tmp_path: Path) -> None:
    refused(shell("train", tmp_path / "none.toml"), "none.toml")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fly"], "No such command 'fly'"),
        (["render"], "Missing argument 'PROMPT'"),
        (["render", "a", "--stepz", "3"], "--steps"),
        (["render", "a", "--steps", "many"], "Invalid value for '--steps'"),
        (["render", "a", "--weights", "nowhere"], "no weights folder at nowhere"),
        (["replay", "nowhere.png"], "no picture at nowhere.png"),
        (["replay", "pyproject.toml"], "cannot be read as a picture"),
    ],
)
def test_a_mistake_in_the_shell_gets_one_line_and_exit_code_2(arguments: list[str], line: str) -> None:
    refused(shell(*arguments), line)


@pytest.mark.skipif(os.name != "posix", reason="pipes that end")
@pytest.mark.parametrize("verb", ["samplers", "doctor"])
def test_who_stops_reading_ends_the_command_quietly(tmp_path: Path, verb: str) -> None:
    arguments = [str(SAMPLE)] if verb == "doctor" else []
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        ran = subprocess.run([*command(), verb, *arguments], stdout=pipe, stderr=subprocess.PIPE, cwd=ROOT, timeout=120)
        assert (ran.returncode, ran.stderr) == (0, b"")
        ran = subprocess.run([*command(), "fly"], stdout=subprocess.PIPE, stderr=pipe, cwd=ROOT, timeout=120)
        assert (ran.returncode, ran.stdout) == (2, b"")


@pytest.mark.parametrize("reached", ["click", "latentgen.render"])
def test_ctrl_c_in_an_import_ends_the_command_whatever_would_have_met_it(folder: Path, reached: str) -> None:
    code = f"""
import runpy, signal, sys
from importlib.abc import MetaPathFinder

class Unlucky:
    def __del__(self):  # where an exception is lost
        signal.raise_signal(signal.SIGINT)

class Watch(MetaPathFinder):
    def find_spec(self, name, *_):
        if name == {reached!r}:
            Unlucky()

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Watch())
sys.argv = ["latentgen", "render", "a red apple", "--steps", "0", "--weights", {str(folder)!r}]
runpy.run_module("latentgen", run_name="__main__")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert Ran(ran.returncode, ran.stdout.splitlines(), ran.stderr) == Ran(130, [], "latentgen: stopped\n")


# --- in this process


NO_PATHS = {  # options and arguments that are text
    *("prompts", "size", "sampler", "batch", "negative", "timesteps", "engine", "dtype", "prediction_type"),
    *("only", "method", "token", "class_word", "like", "caption", "captions", "prompt", "split", "background"),
    *("figure", "concept", "guidances", "step_counts", "samplers"),
}


def test_the_home_folder_is_meant_by_its_sign_wherever_a_path_is_asked_for(
    run: Callable[..., Ran], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for verb, told in cli.app.commands.items():
        for parameter in told.params:
            if parameter.type.name == "text":
                assert parameter.name in NO_PATHS or (verb, parameter.name) == ("evaluate", "style")
            elif parameter.type.name == "path":
                assert str(parameter.type.convert("~/mine:0.5", parameter, None)) == f"{tmp_path}/mine:0.5"
    ran = run("render", "a", "--seed", 1, "--weights", folder, "--out=~/pictures", *FAST)
    assert ran.out == [str(tmp_path / "pictures" / "a-1.png")]
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    refused(run("render", "a", "--weights", folder, "--out=~nosuchuser/x"), "there is no home folder of that name")


def test_a_file_whose_name_begins_with_the_sign_of_the_home_folder_is_itself(
    run: Callable[..., Ran], folder: Path, rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(rendered, "~apple.png")
    Path("~tiny").symlink_to(folder, target_is_directory=True)
    again = tmp_path / "again.png"
    for weights in ("~tiny", "./~tiny"):
        assert run("replay", "~apple.png", "--weights", weights, "--out", again).out == [str(again)]
    (tmp_path / "~" / "a").mkdir(parents=True)  # made by mistake, mostly
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert PATH.convert("~/a", None, None) == tmp_path / "home" / "a"
    monkeypatch.setattr(sys, "platform", "win32")  # where any name has a home beside one's own
    assert PATH.convert("~a.png", None, None) == Path("~a.png")


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes")
def test_a_path_is_told_in_its_own_bytes_and_weights_want_utf8(folder: Path, tmp_path: Path) -> None:
    target = os.fsencode(tmp_path) + b"/caf\xe9.png"
    asked = [*command(), "render", "a", "--weights", str(folder), *FAST, "--out", target]
    ran = subprocess.run(asked, capture_output=True, cwd=ROOT, timeout=120, check=True)
    assert ran.stdout == target + b"\n" and Path(os.fsdecode(target)).is_file()
    refused(shell("render", "a", "--weights", os.fsdecode(b"caf\xe9")), "by a name that is not UTF-8; rename it")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--steps", "0"], "--steps is 0; it must be 1 or more"),
        (["--guidance", "nan"], "--guidance is nan"),
        (["--guidance-interval", "0.8", "0.2"], "--guidance-interval is [0.8, 0.2]; it must be two parts of the way"),
        (["--size", "30"], "--size 30 is not a multiple of 4; the nearest that are: 28 and 32"),
        (["--size", "30x32"], "--size 30 is not a multiple of 4"),
        (["--clip-skip", "99"], "--clip-skip is 99"),
        (["--eta", "2"], "--eta is 2"),
        (["--timesteps", "1,2"], "--timesteps are [1.0, 2.0]"),
        (["--size", "32x30x3"], "--size is '32x30x3'"),
        (["--size", "big"], "it must be pixels as 64, or WIDTHxHEIGHT as 96x64"),
        (["--sampler", "dpmpp2m"], "did you mean 'dpmpp-2m'?"),
        (["--n", "0"], "--n is 0"),
        (["--batch", "0"], "the batch is 0"),
        (["--dtype", "int8"], "--dtype 'int8' is not known; it can be one of: float32, float16, bfloat16"),
        (["--seed", "-1"], "--seed is -1"),
        (["--out", "a.jpg"], "a.jpg is no PNG"),
        (["--out", "/dev/null/a.png"], "/dev/null is a file, not a folder"),
    ],
)
def test_a_mistake_in_a_render_call_is_said_before_anything_is_loaded(
    run: Callable[..., Ran], folder: Path, arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentgen.render.Pipeline", None)
    refused(run("render", "a red apple", "--weights", folder, *arguments), line)


def test_pictures_in_a_folder_get_free_names_of_prompt_and_seed(
    run: Callable[..., Ran], folder: Path, tmp_path: Path
) -> None:
    call = ["render", "A red apple!", "…", "--seed", 7, "--out", tmp_path, "--weights", folder, *FAST]
    names = ["a-red-apple-7.png", "a-red-apple-8.png", "picture-9.png", "picture-10.png"]
    assert run(*call, "--n", 2).out == [str(tmp_path / name) for name in names]
    assert run(*call).out == [str(tmp_path / "a-red-apple-7-2.png"), str(tmp_path / "picture-8.png")]


def test_one_prompt_and_paths_that_are_strings_are_an_order_too(folder: Path, tmp_path: Path) -> None:
    from latentgen.render import Order, render

    made = [*render(Order("ab", steps=2, seed=1), str(tmp_path / "out"), folder)]
    assert made == [tmp_path / "out/ab-1.png"] and read_settings(made[0])["prompt"] == "ab"


def test_a_name_that_somebody_else_takes_meanwhile_is_left_to_them(
    run: Callable[..., Ran], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentgen import render

    paint = render.pictures

    def slow(*arguments: Any) -> list[Any]:
        (tmp_path / "a-red-apple-7.png").write_bytes(b"somebody else's")
        return paint(*arguments)

    monkeypatch.setattr(render, "pictures", slow)
    ran = run("render", "a red apple", "--seed", 7, "--n", 2, "--out", tmp_path, "--weights", folder, *FAST)
    assert ran.out == [str(tmp_path / name) for name in ("a-red-apple-7-2.png", "a-red-apple-8.png")]
    assert (tmp_path / "a-red-apple-7.png").read_bytes() == b"somebody else's"
    assert [read_settings(Path(line))["seed"] for line in ran.out] == [7, 8]
    assert len(list(tmp_path.iterdir())) == 3


def test_several_pictures_of_one_file_name_are_numbered_and_one_is_replaced(
    run: Callable[..., Ran], folder: Path, tmp_path: Path
) -> None:
    call = ["render", "a red apple", "--out", tmp_path / "a.png", "--weights", folder, "--size", "24x16", *FAST]
    assert run(*call, "--n", 2).out == [str(tmp_path / "a-1.png"), str(tmp_path / "a-2.png")]
    for _ in range(2):
        assert run(*call).out == [str(tmp_path / "a.png")]
    assert len(list(tmp_path.iterdir())) == 3
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (24, 16)


def test_a_picture_of_many_is_to_the_byte_the_picture_of_its_seed_alone(
    run: Callable[..., Ran], folder: Path, tmp_path: Path
) -> None:
    call = ["render", "a red apple", "--weights", folder, *FAST]
    run(*call, "--seed", 20, "--n", 3, "--out", tmp_path / "many.png")
    run(*call, "--seed", 22, "--out", tmp_path / "alone.png")
    assert (tmp_path / "many-3.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


def test_a_picture_of_a_batch_replays_to_the_byte_with_its_company(
    run: Callable[..., Ran], folder: Path, tmp_path: Path
) -> None:
    call = ["render", "a red apple", "a blue bird", "--negative", "grey", "--n", 2, "--batch", 3, "--seed", 1]
    run(*call, "--out", tmp_path / "a.png", "--weights", folder, "--sampler", "euler-ancestral", *FAST)
    assert len(read_settings(tmp_path / "a-2.png")["batch"]["seed"]) == 3
    assert "batch" not in read_settings(tmp_path / "a-4.png")
    for name in ("a-1", "a-2", "a-3", "a-4"):
        ran = run("replay", tmp_path / f"{name}.png", "--out", tmp_path / "again.png")
        assert ran == Ran(0, [str(tmp_path / "again.png")], "latentgen: the same file, byte for byte\n")
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / f"{name}.png").read_bytes()


def test_a_picture_in_another_type_says_so_and_is_made_again_in_it(
    run: Callable[..., Ran], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    call = ["render", "a red apple", "--seed", 1, "--weights", folder, *FAST]
    types = {"plain": [], "whole": ["--dtype", "fp32"], "half": ["--dtype", "bf16"]}
    for name, options in types.items():
        place = tmp_path / f"{name}.png"
        assert run(*call, *options, "--out", place) == Ran(0, [str(place)], "")
    said = [read_settings(tmp_path / f"{name}.png") for name in types]
    assert [each["dtype"] for each in said] == ["float32", "float32", "bfloat16"]
    assert said[0]["engine"] == said[1]["engine"] and said[2]["engine"] == "torch"
    plain, whole, half = (np.asarray(Image.open(tmp_path / f"{name}.png"), dtype=float) for name in types)
    np.testing.assert_array_equal(plain, whole)
    assert 0 < np.abs(plain - half).max() < 12  # of 255: eight bits of precision, over two steps
    assert run("replay", tmp_path / "half.png").err == "latentgen: the same file, byte for byte\n"
    refused(run(*call, "--dtype", "bf16", "--engine", "onnx"), "it computes in float32, not in 'bf16'")


def test_a_cut_prompt_is_said_on_standard_error(run: Callable[..., Ran], folder: Path, tmp_path: Path) -> None:
    call = ["render", "a red apple " * 9, "--out", tmp_path / "a.png", "--weights", folder, *FAST]
    ran = run(*call, "--max-chunks", 1, "--no-prompt-weights")
    assert ran.code == 0 and ran.err.startswith("latentgen: the prompt has ") and "not seen: '" in ran.err
    assert run(*call).err == ""
    assert run(*call, "--max-chunks", 0).err == "latentgen: --max-chunks is 0; it must be 1 or more\n"


def test_a_full_disk_leaves_the_old_picture(
    run: Callable[..., Ran], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a.png").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    ran = run("render", "a red apple", "--out", tmp_path / "a.png", "--weights", folder, *FAST)
    refused(ran, "no space left on the disk while writing")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("verb", ["render", "samplers", "--help"])
def test_output_with_no_room_is_said_in_one_line(folder: Path, tmp_path: Path, verb: str) -> None:
    arguments = ["a red apple", "--out", tmp_path / "a.png", "--weights", folder, *FAST] if verb == "render" else []
    with Path("/dev/full").open("w") as full:
        asked = [*command(), verb, *map(str, arguments)]
        ran = subprocess.run(asked, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120, check=False)
    refused(Ran(ran.returncode, [], ran.stderr), "cannot write the output: no space is left where it goes")
    assert (tmp_path / "a.png").is_file() == (verb == "render")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer"),
    ],
)
def test_too_little_memory_is_one_line_whoever_says_so(
    run: Callable[..., Ran], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise error

    called = ("latentgen.render.render", "latentgen.build.train", "latentgen.finetuning.finetune")
    for name in (*called, "latentgen.image.read_settings", "latentgen.convert.convert"):
        monkeypatch.setattr(name, short)
    refused(run("render", "a red apple", "--weights", folder), "not enough memory; render smaller pictures (--size)")
    tiny = ROOT / "tests" / "data" / "tiny.toml"
    refused(run("train", tiny), "not enough memory; lower size in [data], or batch in the [train] of the stage")
    refused(
        run("finetune", tmp_path, "--out", tmp_path / "mine"), "not enough memory; give a smaller --size or --batch"
    )
    refused(run("replay", tmp_path / "a.png"), "not enough memory; close other programs; size and batch are those")
    refused(run("convert", folder, tmp_path / "one.safetensors"), "not enough memory; close other programs\n")
    monkeypatch.setattr(cli.app, "make_context", short)
    refused(run("samplers"), "not enough memory; close other programs\n")


def test_an_error_of_the_system_is_a_line(
    run: Callable[..., Ran], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "two.png")

    monkeypatch.setattr("latentgen.render.render", closed)
    ran = run("render", "a red apple", "--weights", folder)
    refused(ran, "latentgen: two.png: Permission denied; name another place, or mend that")


def test_weights_may_be_the_folder_one_stands_in(
    run: Callable[..., Ran], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    ended = run("render", "a red apple", "--weights", ".", "--steps", "1", "--out", tmp_path / "apple.png")
    assert ended.code == 0 and (tmp_path / "apple.png").is_file()
    refused(run("render", "a", "--weights", "~nosuchuser/x"), "there is no home folder of that name")
    refused(run("replay", tmp_path / "apple.png", "--word", tmp_path / "nothere"), "--word")


def test_progress_is_drawn_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with rendering.progress_bar("rendering") as progress:
        assert progress is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with rendering.progress_bar("rendering") as progress:
        assert progress is not None
        progress(1, 2)


# --- replay


@pytest.fixture(scope="module")
def rendered(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from latentgen.render import Order, render

    order = Order(["a red apple"], seed=7, steps=2)
    (path,) = render(order, tmp_path_factory.mktemp("rendered") / "apple.png", str(folder))
    return path


def resave(picture: Path, target: Path, **changes: Any) -> Path:
    """The picture with other settings; a change to None takes the setting out."""
    settings = {**read_settings(picture), **changes}
    info = PngImagePlugin.PngInfo()
    info.add_text("latentgen", json.dumps({key: value for key, value in settings.items() if value is not None}))
    with Image.open(picture) as image:
        image.save(target, pnginfo=info)
    return target


def test_replay_refuses_other_weights_and_names_both(
    run: Callable[..., Ran], rendered: Path, make_folder: Callable[..., Path]
) -> None:
    other = make_folder("other", beta_end=0.013)
    ran = run("replay", rendered, "--weights", other)
    refused(ran, "was made with weights tiny (")
    assert "and other (" in ran.err


def test_replay_finds_moved_weights_by_name_and_gives_the_same_bytes(
    run: Callable[..., Ran], rendered: Path, folder: Path, tmp_path: Path
) -> None:
    settings = read_settings(rendered)
    lost = resave(rendered, tmp_path / "lost.png", weights={**settings["weights"], "path": "gone/away"})
    refused(run("replay", lost), "not found at gone/away; name their folder with --weights")
    moved = shutil.copytree(folder, tmp_path / "moved")
    ran = run("replay", rendered, "--weights", moved, "--out", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == rendered.read_bytes(), ran


@pytest.mark.skipif(os.name != "posix", reason="a pipe that has a name")
def test_a_place_of_no_plain_file_is_refused_before_anything_is_rendered(
    run: Callable[..., Ran], rendered: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "a-1.png").mkdir()
    monkeypatch.setattr("latentgen.render.Pipeline", None)  # which would load
    call = ["render", "a", "--weights", folder, *FAST]
    refused(run(*call, "--out", tmp_path / "pipe.png"), "pipe.png: it is no plain file; name another place")
    refused(run(*call, "--n", 2, "--out", tmp_path / "a.png"), "a-1.png: it is no plain file; name another place")
    refused(run("replay", rendered, "--out", tmp_path / "pipe.png"), "pipe.png: it is no plain file")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": None}, "its settings are not whole ('seed')"),
        ({"weights": None}, "its settings are not whole ('weights')"),
        ({"num_inference_steps": "many"}, "latentgen: num_inference_steps is 'many'"),  # not of an option it lacks
        ({"height": 30}, "latentgen: height 30 is not a multiple of 4"),
        ({"sampler": "fast"}, "unknown sampler 'fast'"),
        ({"batch": {"row": 9, "prompt": ["a"], "negative_prompt": [""], "seed": [1]}}, "its settings are not whole"),
        ({"brought": ["latents"]}, "was made with latents given from outside"),
    ],
)
def test_replay_of_settings_that_do_not_hold_gets_one_line(
    run: Callable[..., Ran], rendered: Path, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    refused(run("replay", resave(rendered, tmp_path / "odd.png", **changes)), line)
    assert [path.name for path in tmp_path.iterdir()] == ["odd.png"]


def test_a_replay_replaces_the_file_it_is_told_alone(run: Callable[..., Ran], rendered: Path, tmp_path: Path) -> None:
    own, old = shutil.copy(rendered, tmp_path / "apple.png"), tmp_path / "old"
    old.mkdir()
    for place in (old / "apple.png", tmp_path / "apple-replay.png", tmp_path / "told.png"):
        place.write_bytes(b"a drawing")
    assert run("replay", own, "--out", old).out == [str(old / "apple-2.png")]
    assert run("replay", own).out == [str(tmp_path / "apple-replay-2.png")]
    assert run("replay", own, "--out", tmp_path / "told.png").out == [str(tmp_path / "told.png")]
    kept = [path.name for path in tmp_path.rglob("*.png") if path.read_bytes() == b"a drawing"]
    assert sorted(kept) == ["apple-replay.png", "apple.png"]


def test_replay_says_what_has_changed_since(run: Callable[..., Ran], rendered: Path, tmp_path: Path) -> None:
    old = resave(rendered, tmp_path / "old.png", onnxruntime="1.0")
    ran = run("replay", old)
    assert ran.code == 0 and "onnxruntime was 1.0, is " in ran.err and "differs" in ran.err


def test_replay_computes_with_as_many_threads_as_the_picture_says(
    run: Callable[..., Ran], rendered: Path, tmp_path: Path
) -> None:
    threads = read_settings(rendered)["threads"] + 1
    run("replay", resave(rendered, tmp_path / "old.png", threads=threads), "--out", tmp_path / "again.png")
    assert read_settings(tmp_path / "again.png")["threads"] == threads


def test_what_few_pictures_ask_for_is_in_the_file_and_replayed(
    run: Callable[..., Ran], folder: Path, tmp_path: Path
) -> None:
    asked = ["--clip-skip", 1, "--timesteps", "900,500.5,20", "--eta", 0.5, "--sampler", "ddim", "--seed", 7]
    ran = run("render", "a red apple", *asked, "--out", tmp_path / "apple.png", "--weights", folder)
    assert ran.code == 0 and ran.out == [str(tmp_path / "apple.png")]
    told = read_settings(tmp_path / "apple.png")
    assert (told["clip_skip"], told["timesteps"], told["eta"]) == (1, [900, 500.5, 20], 0.5)
    assert told["num_inference_steps"] == 3
    assert run("replay", tmp_path / "apple.png").err.endswith("latentgen: the same file, byte for byte\n")
    before = (tmp_path / "apple.png").read_bytes()
    assert run("replay", tmp_path / "apple.png", "--out", tmp_path).out == [str(tmp_path / "apple-replay-2.png")]
    assert (tmp_path / "apple.png").read_bytes() == before
    for wrong, line in ((["--timesteps", "1200,20"], "the schedule has 0 to 999"), (["--steps", 1001], "1001 steps")):
        refused(run("render", "a", *wrong, "--weights", folder, "--out", tmp_path / "none.png"), line)
    assert not (tmp_path / "none.png").exists()


def test_values_are_read_strictly() -> None:
    assert read_values("1, 2,4.5", "--guidances", 0) == (1, 2, 4.5)
    assert read_values("5,10", "--step-counts", 1, whole=True) == (5, 10)
    for text in ("", "1,x", "nan", "-1", "inf"):
        with pytest.raises(InputError, match="--guidances is"):
            read_values(text, "--guidances", 0)
    for text in ("0", "2.5"):
        with pytest.raises(InputError, match="whole numbers of 1 or more"):
            read_values(text, "--step-counts", 1, whole=True)
