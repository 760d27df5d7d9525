"""3×3 convolutions in tiles: the numbers of those computed plainly, at any size, and no more memory than said."""

import itertools
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch.nn import functional

from latentgen import Pipeline
from latentgen.checkpoint import open_folder, save_pipeline
from latentgen.models.engine import EngineNote
from latentgen.models.onnx import winograd
from latentgen.models.onnx.export import write_graphs
from latentgen.models.onnx.widen import FLOAT, FLOAT16, in_tiles, widened
from latentgen.models.onnx.winograd import matrices, rewrite, transformed

FOLDER = "session.model_external_initializers_file_folder_path"


@pytest.mark.parametrize("m", [2, 4])
def test_the_matrices_are_of_a_correlation_exactly(m: int) -> None:
    d, g = (np.random.default_rng(m).standard_normal(size) for size in (m + 2, 3))
    into, kernel, out, one = matrices(m)
    np.testing.assert_allclose(out @ ((kernel @ g) * (into @ d)), np.correlate(d, g), atol=1e-13)
    np.testing.assert_allclose(out @ one, np.ones(m), atol=1e-13)
    assert transformed(np.ones((5, 7, 3, 3), np.float32), m).shape == ((m + 2) ** 2 * 5, 7, 1, 1)


def network(place: Path, kind: int, channels: int = 128, between: str = "") -> bytes:
    """x -> a -> b (half the side) -> c -> d (twice) -> e, each 3×3; a to d with biases. Weights lie in w.bin.

    between: an operator that b's output goes through first.
    """
    random = np.random.default_rng(0)
    nodes, weights, data = [], [], b"start"
    names = {"a": "x", "b": "a", "c": "b", "d": "twice", "e": "d"}
    for name in names:
        for part, shape in (("w", (channels, channels, 3, 3)), ("b", (channels,))):
            values = random.standard_normal(shape) / (3 * channels**0.5 if part == "w" else 1)
            if (name, part) == ("e", "b"):
                continue
            stored = values.astype(np.float16 if kind == FLOAT16 else np.float32)
            told = f"{name}.{part}"
            tensor = onnx.TensorProto(name=told, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
            for key, value in (("location", "w.bin"), ("offset", len(data)), ("length", stored.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            data += stored.tobytes()
            weights.append(tensor)
            if kind == FLOAT16:
                nodes.append(helper.make_node("Cast", [told], [f"{told}:float32"], to=FLOAT))
    (place / "w.bin").write_bytes(data)
    weights.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    if between:
        nodes.append(helper.make_node(between, ["b"], ["b:2"], kernel_shape=[2, 2], strides=[2, 2]))
        names["c"] = "b:2"
    suffix = ":float32" if kind == FLOAT16 else ""
    for name, source in names.items():
        if name == "d":
            nodes.append(helper.make_node("Resize", ["c", "", "scales"], ["twice"], mode="nearest"))
        inputs = [source, f"{name}.w{suffix}", *([f"{name}.b{suffix}"] if name != "e" else [])]
        steps = [2, 2] if name == "b" else [1, 1]
        nodes.append(helper.make_node("Conv", inputs, [name], kernel_shape=[3, 3], pads=[1] * 4, strides=steps))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "n", [value("sample", FLOAT, ["b", channels, "h", "w"])], [value("e", FLOAT, None)], weights
    )
    graph.node.insert(0, helper.make_node("Identity", ["sample"], ["x"]))
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    ).SerializeToString()
    return made


def run(graph: bytes, folder: Path, x: np.ndarray, given: dict[str, np.ndarray] | None = None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(FOLDER, str(folder))
    held = [onnxruntime.OrtValue.ortvalue_from_numpy(values) for values in (given or {}).values()]
    if given:
        options.add_external_initializers(list(given), held)
    found: np.ndarray = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]).run(
        None, {"sample": x}
    )[0]
    return found


def exact(place: Path, kind: int, x: np.ndarray, channels: int = 128) -> np.ndarray:
    """What `network` makes of x, in float64."""
    stored = np.frombuffer((place / "w.bin").read_bytes()[5:], np.float16 if kind == FLOAT16 else np.float32)
    values = torch.from_numpy(stored.astype(np.float64))
    count, size = 9 * channels**2, 9 * channels**2 + channels
    y = torch.from_numpy(x).double()
    for k in range(5):
        weight = values[k * size : k * size + count].reshape(channels, channels, 3, 3)
        bias = values[k * size + count : (k + 1) * size] if k < 4 else None
        if k == 3:
            y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
        y = functional.conv2d(y, weight, bias, stride=2 if k == 1 else 1, padding=1)
    found: np.ndarray = y.numpy()
    return found


@pytest.mark.parametrize("kind", [FLOAT, FLOAT16])
@pytest.mark.parametrize("m", [2, 4])
def test_a_network_in_tiles_gives_the_numbers_of_float64_at_every_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int, m: int
) -> None:
    monkeypatch.setattr(winograd, "_chosen", lambda found, *_: {each.tensor.name: m for each in found})
    graph, place, side = network(tmp_path, kind), tmp_path / "wide", 32
    place.mkdir()
    assert rewrite(onnx.load_from_string(graph), side) == dict.fromkeys(["a.w", "c.w", "d.w", "e.w"], m)
    made = widened(graph, tmp_path, place, side=side)
    within, given = in_tiles(graph, tmp_path, side=side)
    for batch, height, width in ((1, 16, 16), (2, 8, 20), (3, 17, 18), (1, 5, 3), (2, 1, 1), (1, 33, 30)):
        x = np.random.default_rng(height).standard_normal((batch, 128, height, width)).astype(np.float32)
        found, plain, truth = run(made, place, x), run(graph, tmp_path, x), exact(tmp_path, kind, x)
        assert found.shape == plain.shape == truth.shape
        np.testing.assert_allclose(found, truth, atol=2e-5)
        np.testing.assert_allclose(plain, truth, atol=2e-5)
        np.testing.assert_array_equal(run(within, tmp_path, x, given), found)


def test_small_and_thin_convolutions_are_left_as_they_are(tmp_path: Path) -> None:
    found = {}
    for channels, side in ((128, 4), (128, 512), (32, 32), (128, 32)):
        made = onnx.load_from_string(network(tmp_path, FLOAT, channels))
        found[channels, side] = sorted(rewrite(made, side))
    assert found == {(128, 4): [], (128, 512): [], (32, 32): [], (128, 32): ["a.w", "c.w", "d.w", "e.w"]}


@pytest.mark.parametrize("between", ["AveragePool", "MaxPool"])
def test_behind_what_changes_sizes_otherwise_nothing_is_rewritten(tmp_path: Path, between: str) -> None:
    place = tmp_path / "wide"
    place.mkdir()
    graph = network(tmp_path, FLOAT, between=between)
    assert set(rewrite(onnx.load_from_string(graph), 32)) == {"a.w"}
    x = np.random.default_rng(0).standard_normal((1, 128, 19, 32)).astype(np.float32)
    made = widened(graph, tmp_path, place, side=32)
    np.testing.assert_allclose(run(made, place, x), run(graph, tmp_path, x), atol=2e-5)


def test_what_the_weights_take_besides_is_bounded_and_worth_its_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = network(tmp_path, FLOAT, 256)
    sizes = []
    for share, free in ((10.0, 0), (0.8, 0), (0.0, 4_000_000), (0.0, 0)):
        monkeypatch.setattr(winograd, "SHARE", share)
        monkeypatch.setattr(winograd, "FREE", free)
        place = tmp_path / f"wide-{share}-{free}"
        place.mkdir()
        widened(graph, tmp_path, place, side=32)
        sizes.append((place / "widened.bin").stat().st_size)
        stored = (tmp_path / "w.bin").stat().st_size
        assert sizes[-1] <= stored + max(share * stored, free) + 64 * 10
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4 and sizes[-1] == pytest.approx(stored, abs=640)
    monkeypatch.undo()
    chosen = []
    for name, value in (("LOADED", 0), ("LOADED", 10), ("LOADED", 100), ("BUFFER", 1 << 20)):
        with monkeypatch.context() as patch:
            patch.setattr(winograd, name, value)
            chosen.append(len(rewrite(onnx.load_from_string(graph), 16)))
    assert chosen == [4, 3, 0, 0]


# --- a pipeline


@pytest.fixture(scope="module")
def wide(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose U-Net has channels enough."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    more = {"sample_size": 16, "block_out_channels": (192, 256), "attention_head_dim": 32}
    unet = UNet2DConditionModel.from_config(dict(parts["unet"].config) | more).eval()
    place = tmp_path_factory.mktemp("wide") / "weights"
    config = {"_class_name": "DDIMScheduler"}
    return save_pipeline(place, **parts | {"unet": unet}, scheduler_config=config, finish=write_graphs)


def grouped(path: Path) -> set[int]:
    """The groups of the convolutions of a graph that is kept ready."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return {each.i for node in nodes if node.op_type == "Conv" for each in node.attribute if each.name == "group"}


def test_a_pipeline_in_tiles_gives_torchs_pictures_with_a_copy_kept_or_none(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = list(itertools.product((32, 64, 72), (64, 36)))
    found: dict[str, list[np.ndarray]] = {}
    for name in ("made", "kept", "none", "torch"):
        if name == "none":
            shutil.rmtree(tmp_path / "cache")
            monkeypatch.setattr("latentgen.models.onnx.ready.ROOM", 0)
        pipe = Pipeline.from_pretrained(wide, engine="torch" if name == "torch" else "onnx")
        found[name] = [
            pipe("a red apple", seed=3, num_inference_steps=4, height=height, width=width, output_type="np").images
            for height, width in sizes
        ]
        if name == "made":
            ready = (tmp_path / "cache").rglob("*-unet/graph.onnx")  # of the text's graph too
            assert 36 in set().union(*map(grouped, ready))
    for k, truth in enumerate(found["torch"]):
        assert truth.std() > 0.01
        np.testing.assert_allclose(found["made"][k], truth, atol=1e-4)
        np.testing.assert_array_equal(found["kept"][k], found["made"][k])
        np.testing.assert_array_equal(found["none"][k], found["made"][k])


def test_convolutions_that_a_lora_changes_are_in_tiles_too(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    shapes = {"down": (2, 192, 3, 3), "up": (192, 2, 1, 1)}
    layer = "unet.down_blocks.0.resnets.0.conv2.lora"
    values = {f"{layer}.{name}.weight": torch.randn(shape, generator=generator) / 9 for name, shape in shapes.items()}
    save_file(values, tmp_path / "lora.safetensors")
    found = {}
    for name, loras in (("plain", []), ("kept", ["lora"]), ("none", ["lora"]), ("torch", ["lora"])):
        if name == "none":
            shutil.rmtree(tmp_path / "cache/latentgen/onnx/ready")
            monkeypatch.setattr("latentgen.models.onnx.ready.ROOM", 0)
        given = [{"path": tmp_path / f"{each}.safetensors"} for each in loras]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EngineNote)
            pipe = Pipeline.from_pretrained(wide, engine="torch" if name == "torch" else "onnx", loras=given)
        found[name] = pipe("a red apple", seed=3, num_inference_steps=4, output_type="np").images
    (place,) = (tmp_path / "cache").glob("latentgen/onnx/*-fused/unet")
    (changed,) = load_file(next(place.glob("*.safetensors")))
    assert changed in rewrite(onnx.load(place / "model.onnx", load_external_data=False), 16)
    assert np.abs(found["plain"] - found["torch"]).max() > 1e-2
    np.testing.assert_allclose(found["kept"], found["torch"], atol=1e-4)
    np.testing.assert_array_equal(found["none"], found["kept"])


def test_the_graphs_beside_the_weights_stay_plain(wide: Path) -> None:
    graph = onnx.load(wide / "unet/model.onnx", load_external_data=False).graph
    assert not [node for node in graph.node if any(name.startswith("winograd") for name in node.output)]
    assert open_folder(wide).has_second is False
