"""The ONNX engine's graphs: kept ready in the cache and never torn, and a U-Net in two, the text's computed once."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

from latentgen import InputError, Pipeline
from latentgen.checkpoint import open_checkpoint, open_folder, save_pipeline
from latentgen.convert import convert
from latentgen.durable import alone
from latentgen.models.engine import EngineNote
from latentgen.models.memory import told_bytes
from latentgen.models.onnx import export, session
from latentgen.models.onnx.ready import Ready, widened_size
from latentgen.models.onnx.session import Told
from latentgen.models.onnx.widen import BFLOAT16, FLOAT, FLOAT16, widened


def both(engines: dict[str, Pipeline], prompt: Any, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (B, H, W, 3) of both engines."""
    found = [engines[name](prompt, output_type="np", **arguments).images for name in ("onnx", "torch")]
    assert [type(each) for each in found] == [np.ndarray] * 2 and found[0].dtype == np.float32
    assert found[1].std() > 0.01
    return found[0], found[1]


# --- graphs that are kept ready


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/latentgen/onnx/ready"


def pixels_of(folder: Path) -> np.ndarray:
    output = Pipeline.from_pretrained(folder, engine="onnx")("a red apple", seed=1, num_inference_steps=3)
    return np.asarray(output.images[0])


def test_a_graph_made_ready_is_kept_and_gives_the_same_picture_bit_for_bit(folder: Path, own_cache: Path) -> None:
    first = pixels_of(folder)
    kept = {path: path.stat().st_mtime_ns for path in own_cache.rglob("*") if path.is_file()}
    assert {path.name for path in kept} == {"graph.onnx", "weights.bin", "hashes.json"} and len(kept) == 12
    np.testing.assert_array_equal(pixels_of(folder), first)
    assert {path: path.stat().st_mtime_ns for path in own_cache.rglob("*") if path.is_file()} == kept


def half_graph(folder: Path, kind: int) -> bytes:
    """y = x·Wᵀ + b + u, W turned and b being numbers of one kind in a file; v, too, which is an output twice."""
    random = np.random.default_rng(0)
    values = {"w": random.standard_normal((600, 500)), "b": random.standard_normal(600), "v": np.ones((3, 2))}
    kinds = {FLOAT: torch.float32, FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}
    nodes, weights, start = [], [], 16
    with (folder / "w.bin").open("wb") as file:
        file.write(b"0" * start)
        for name, each in values.items():
            stored = torch.from_numpy(each).to(kinds[kind])
            raw = stored.view(torch.uint8).numpy().tobytes()
            file.write(raw)
            tensor = onnx.TensorProto(name=name, data_type=kind, dims=each.shape)
            if kind == FLOAT:
                tensor.name = f"{name}:float32"
            else:
                nodes.append(helper.make_node("Cast", [name], [f"{name}:float32"], to=FLOAT))
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", "w.bin"), ("offset", start), ("length", len(raw))):
                tensor.external_data.add(key=key, value=str(value))
            weights.append(tensor)
            start += len(raw)
    nodes += [
        helper.make_node("Transpose", ["w:float32"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["product"]),
        helper.make_node("Add", ["product", "b:float32"], ["sum"]),
        helper.make_node("Add", ["sum", "u"], ["y"]),
        helper.make_node("Transpose", ["v:float32"], ["z"]),
        helper.make_node("Identity", ["v:float32"], ["plain"]),
    ]
    weights.append(numpy_helper.from_array(np.full(600, 2, np.float32), "u"))
    told = [helper.make_tensor_value_info(name, FLOAT, None) for name in ("x", "y", "z", "plain")]
    graph = helper.make_graph(nodes, "half", told[:1], told[1:], weights)
    opset = [helper.make_opsetid("", 17)]
    made: bytes = helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    return made


def computed(graph: bytes, folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.random.default_rng(1).standard_normal((2, 500)).astype(np.float32)})


@pytest.mark.parametrize("kind", [FLOAT, FLOAT16, BFLOAT16])
def test_weights_widened_beforehand_give_the_same_numbers_to_the_bit(tmp_path: Path, kind: int) -> None:
    graph, place = half_graph(tmp_path, kind), tmp_path / "wide"
    place.mkdir()
    made = widened(graph, tmp_path, place)
    for found, expected in zip(computed(made, place), computed(graph, tmp_path), strict=True):
        np.testing.assert_array_equal(found, expected)
    left = onnx.load_model_from_string(made).graph
    assert {tensor.data_type for tensor in left.initializer} == {FLOAT}
    assert [node.op_type for node in left.node] == ["MatMul", "Add", "Add", "Transpose", "Identity"]
    (tmp_path / "w.bin").write_bytes(b"short")
    with pytest.raises((OSError, ValueError)):
        widened(graph, tmp_path, place)


def test_a_copy_gives_the_picture_that_is_made_without_any(
    folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pixels_of(folder)
    copies = sorted(own_cache.iterdir())
    monkeypatch.setattr("latentgen.models.onnx.ready.ROOM", 0)
    monkeypatch.setattr("latentgen.models.onnx.ready.machine_code", lambda: "another machine")
    np.testing.assert_array_equal(pixels_of(folder), first)
    assert sorted(own_cache.iterdir()) == copies and len(copies) == 4


@pytest.mark.parametrize("file", ["graph.onnx", "weights.bin", "hashes.json"])
@pytest.mark.parametrize("torn", ["cut", "changed"])
def test_a_torn_copy_is_not_used_but_made_anew(folder: Path, own_cache: Path, file: str, torn: str) -> None:
    first = pixels_of(folder)
    path = max(own_cache.glob(f"*-unet/{file}"), key=lambda path: path.with_name("weights.bin").stat().st_size)
    held = path.read_bytes()
    place = len(held) // 2
    path.write_bytes(held[:place] if torn == "cut" else held[:place] + bytes([held[place] ^ 64]) + held[place + 1 :])
    np.testing.assert_array_equal(pixels_of(folder), first)
    files = json.loads(path.with_name("hashes.json").read_text())
    made = {name: path.with_name(name).read_bytes() for name in ("graph.onnx", "weights.bin")}
    assert {name: f"{zlib.crc32(each):08x}" for name, each in made.items()} == files


def test_torn_weights_are_refused_though_ready_copies_of_them_are_kept(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    pixels_of(copy)
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-5] ^= 64
    file.write_bytes(whole)
    for engine in ("auto", "onnx", "torch"):
        with pytest.raises(InputError, match=r"is not the file the manifest names \(its SHA-256 differs\)"):
            Pipeline.from_pretrained(copy, engine=engine)


def test_nothing_is_kept_of_torn_weights(folder: Path, tmp_path: Path, own_cache: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-5] ^= 64
    file.write_bytes(whole)
    with pytest.raises(InputError, match="SHA-256 differs"):
        Pipeline.from_pretrained(copy, engine="onnx")
    assert not [path for path in own_cache.rglob("*") if path.is_file()]


def test_no_other_weights_are_taken_for_those_that_were_opened(folder: Path, tmp_path: Path, own_cache: Path) -> None:
    """Neither for a picture nor for a copy that is kept under the name of the old ones."""
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("manifest.json"))
    call: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "output_type": "np"}
    pipe = Pipeline.from_pretrained(copy, device="cpu")
    file, copies = copy / "text_encoder/model.safetensors", sorted(own_cache.iterdir())
    before, old = file.stat(), file.read_bytes()
    new = {name: value + 0.1 if value.is_floating_point() else value for name, value in load_file(file).items()}
    save_file(new, file, {"format": "pt"})
    for asked in ({"clip_skip": 1}, {"pag_scale": 2.0}):
        with pytest.raises(InputError, match="the weights changed since they were opened; open them again"):
            pipe("a red apple", **call, **asked)
    assert sorted(own_cache.iterdir()) == copies
    file.write_bytes(old)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.warns(EngineNote, match="without the last 1 layer"):
        found = pipe("a red apple", clip_skip=1, **call).images
    expected = Pipeline.from_pretrained(folder, engine="torch")("a red apple", clip_skip=1, **call).images
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_nothing_is_kept_of_weights_that_change_while_they_are_made_ready(
    folder: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("manifest.json"))
    whole = session._checked_session

    def changed(*given: Any) -> Any:
        os.utime(copy / "unet/diffusion_pytorch_model.safetensors")
        return whole(*given)

    monkeypatch.setattr(session, "_checked_session", changed)
    with pytest.raises(InputError, match="the weights changed since they were opened"):
        Pipeline.from_pretrained(copy, engine="onnx")
    assert not [path for path in own_cache.rglob("*") if path.is_file()]


def test_copies_of_a_cache_that_can_only_be_read_are_used(
    folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pixels_of(folder)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "utime", refused)
    np.testing.assert_array_equal(pixels_of(folder), first)


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(folder: Path, own_cache: Path) -> None:
    code = """
import os, signal, sys
from latentgen import Pipeline
from latentgen.models.onnx import ready
ready.crc32 = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # written, and not yet in its place
Pipeline.from_pretrained(sys.argv[1], engine="onnx")
"""
    killed = subprocess.run([sys.executable, "-c", code, str(folder)], timeout=120)
    left = list(own_cache.glob(".*.writing"))
    assert killed.returncode == -signal.SIGKILL and left
    begun = own_cache / ".begun.writing"  # and not held yet
    begun.mkdir()
    with alone(own_cache / ".other.writing"):
        for path in (*left, own_cache / ".other.writing"):
            os.utime(path, (1, 1))
        pixels_of(folder)
        assert {path.name for path in own_cache.glob(".*.writing")} == {".begun.writing", ".other.writing"}
    assert len([path for path in own_cache.iterdir() if (path / "hashes.json").is_file()]) == 4


def test_a_damaged_graph_in_the_cache_is_exported_once_more(folder: Path, tmp_path: Path, own_cache: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.onnx", "manifest.json"))
    call: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "clip_skip": 1, "output_type": "np"}
    with pytest.warns(EngineNote, match="exported once"):
        first = Pipeline.from_pretrained(copy, engine="onnx")("a red apple", **call).images
    graphs = {path: path.read_bytes() for path in own_cache.parent.glob("*/*/*.onnx") if "ready" not in path.parts}
    assert {path.name for path in graphs} >= {"model.onnx", "told.onnx", "decoder.onnx", "skip-1.onnx"}
    for path, held in graphs.items():
        path.write_bytes(held[: len(held) // 2])
    shutil.rmtree(own_cache)
    with pytest.warns(EngineNote, match="has ONNX graphs in the cache that cannot be run: they are exported once into"):
        pipe = Pipeline.from_pretrained(copy, device="cpu")
    with pytest.warns(EngineNote, match="without the last 1 layer is exported once"):
        again = pipe("a red apple", **call)
    assert again.settings["engine"] == "onnx"
    np.testing.assert_array_equal(again.images, first)
    assert {path: path.read_bytes() for path in graphs} == graphs


def test_a_cache_that_cannot_be_written_is_done_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert pixels_of(folder).std() > 1


def test_without_a_home_folder_weights_with_graphs_render_and_others_say_what_lacks(
    folder: Path, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert pixels_of(folder).std() > 1
    with pytest.raises(InputError, match="no home folder to keep caches in; set XDG_CACHE_HOME"):
        pixels_of(make_folder("without-graphs"))


def test_the_copies_used_longest_ago_make_room(folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels_of(folder)
    old = {path.name: path for path in own_cache.iterdir()}
    for path in old.values():
        os.utime(path, (1, 1))
    size = sum(path.stat().st_size for path in own_cache.rglob("*") if path.is_file())
    monkeypatch.setattr("latentgen.models.onnx.ready.ROOM", size)
    monkeypatch.setattr("latentgen.models.onnx.ready.machine_code", lambda: "another machine")
    pixels_of(folder)
    left = {path.name for path in own_cache.iterdir()}
    assert len(left) == 4 and not left & set(old)


def test_what_was_opened_lately_stays_though_it_was_made_first(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (Ready(own_cache / f"{k}-unet", own_cache / "graph.onnx") for k in range(3))
    for made in (first, second):
        assert made.make(lambda path: path.write_bytes(b"a graph"), 0)
        os.utime(made.folder, (1, 1 + (made is second)))
    assert first.open(Path.read_bytes) == b"a graph"
    size = sum(path.stat().st_size for path in own_cache.rglob("*") if path.is_file())
    monkeypatch.setattr("latentgen.models.onnx.ready.ROOM", size)
    assert third.make(lambda path: path.write_bytes(b"a graph"), 0)
    assert [each.folder.is_dir() for each in (first, second, third)] == [True, False, True]


def test_copies_of_another_version_of_onnx_runtime_are_not_taken(
    folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels_of(folder)
    old = {path.name for path in own_cache.iterdir()}
    monkeypatch.setattr(onnxruntime, "__version__", "0.0.0")
    pixels_of(folder)
    assert len({path.name for path in own_cache.iterdir()} - old) == len(old) == 4


def test_graphs_with_loras_fused_make_room_too_but_those_in_use(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentgen.models.onnx.ready.ROOM", 0)
    used, other = (own_cache.parent / f"{name}-2-fused/unet/model.onnx" for name in ("used", "other"))
    for graph in (used, other):
        graph.parent.mkdir(parents=True)
        graph.write_bytes(b"a graph")
    assert Ready(own_cache / "0-unet", used).make(lambda path: path.touch(), 0)
    assert (own_cache / "0-unet").is_dir() and used.is_file() and not other.exists()


@pytest.mark.parametrize("stored", ["fp32", "fp16", "one file", "one file of xl"])
def test_a_networks_size_is_that_of_its_own_weights_in_float32(
    parts: dict[str, Any], xl: Path, tmp_path: Path, stored: str
) -> None:
    place = xl
    if "xl" not in stored:
        dtype = "fp16" if stored == "fp16" else "fp32"
        config = {"_class_name": "DDIMScheduler"}
        place = save_pipeline(tmp_path / "w", **parts, scheduler_config=config, dtype=dtype)
    folder = open_folder(place)
    numbers = {
        part: sum(value.numel() for value in load_file(file).values()) for part, (file,) in folder.weights.items()
    }
    checkpoint = open_checkpoint(convert(place, tmp_path / "one.safetensors")[0]) if "file" in stored else folder
    found = {part: widened_size(checkpoint, part) for part in checkpoint.weights}
    assert found == {part: pytest.approx(4 * count, rel=0.01) for part, count in numbers.items()}


# --- the U-Net's two graphs


def test_what_depends_on_the_text_alone_is_computed_once_for_all_steps(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder, engine="onnx")
    counted: list[int] = []
    cells = [cell.cell_contents for cell in getattr(pipe.network, "__closure__", ())]
    told = next(each for each in cells if isinstance(each, Told))
    inner = told.session.run

    def run(*given: Any) -> Any:
        counted.append(1)
        return inner(*given)

    told.session = SimpleNamespace(run=run)
    pipe(["a red apple", "a blue bird"], seed=1, num_inference_steps=6, batch=1)
    assert len(counted) == 2
    pipe(["a red apple", "a blue bird"], seed=1, num_inference_steps=6, batch=1)
    assert len(counted) == 2
    step = onnx.load(folder / "unet/model.onnx", load_external_data=False).graph
    text = onnx.load(folder / "unet/told.onnx", load_external_data=False).graph
    named = [{tensor.name for tensor in graph.initializer} for graph in (step, text)]
    assert not named[0] & named[1] and any("attn2" in name for name in named[0])
    keys = [value.name for value in text.output if "to_k" in value.name or "to_v" in value.name]
    assert len(keys) == 2 * sum(node.op_type == "MultiHeadAttention" for node in step.node) // 2
    assert {value.name for value in step.input} == {"sample", "timestep"} | {value.name for value in text.output}


def test_what_is_told_is_held_within_bytes_however_many_groups_there_are(folder: Path) -> None:
    prompts = ["a red apple", "a blue bird", "the green frog", "an orange cat"]
    pictures = []
    for groups in (10.0, 2.5, 0.5):
        pipe = Pipeline.from_pretrained(folder, engine="onnx")
        cells = [cell.cell_contents for cell in getattr(pipe.network, "__closure__", ())]
        told = next(each for each in cells if isinstance(each, Told))
        told.kept.room = int(groups * 2 * told_bytes(pipe.terms.configs[0], 16))  # two rows a group
        pictures.append(pipe(prompts, seed=1, num_inference_steps=3, batch=1, output_type="np").images)
        distinct = 3  # four groups, of which two are of no text, twice
        assert told.kept.bytes == min(int(groups), distinct) * 2 * told_bytes(pipe.terms.configs[0], 16)
    np.testing.assert_array_equal(pictures[1], pictures[0])
    np.testing.assert_array_equal(pictures[2], pictures[0])


def test_a_folder_whose_unet_is_one_graph_renders_as_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("manifest.json", "told.onnx"))
    checkpoint = open_folder(copy)
    whole, _ = export._exported(checkpoint, "unet", None)
    (copy / "unet/model.onnx").write_bytes(whole.SerializeToString())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        older = Pipeline.from_pretrained(copy, engine="onnx")
    one, other = both({"onnx": older, "torch": Pipeline.from_pretrained(folder, engine="torch")}, "a bird", seed=2)
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_a_step_graph_without_its_text_graph_is_not_run(folder: Path, tmp_path: Path, own_cache: Path) -> None:
    assert not own_cache.exists()  # so that what is exported is not there already
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("manifest.json", "told.onnx"))
    with pytest.warns(EngineNote, match="do not fit it: they are exported once into"):
        again = Pipeline.from_pretrained(copy, engine="onnx")
    one, other = both({"onnx": again, "torch": Pipeline.from_pretrained(folder, engine="torch")}, "a bird", seed=2)
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_reshapes_say_their_targets_where_constants_can(folder: Path) -> None:
    graph = onnx.load(folder / "unet/model.onnx", load_external_data=False).graph
    constants = {node.output[0] for node in graph.node if node.op_type == "Constant"}
    made = {output: node.op_type for node in graph.node for output in node.output}
    counted = [made[node.input[1]] for node in graph.node if node.op_type == "Reshape"]
    assert counted and set(counted) <= {"Constant", "Shape"} | {"Concat"}
    assert sum(kind == "Constant" for kind in counted) > len(counted) / 2 and constants
