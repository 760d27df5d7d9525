"""The ONNX Runtime engine: torch's pictures from the same weights, stored once, and no torch imported."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save

from latentgen import InputError, Pipeline
from latentgen.checkpoint import check_safetensors, open_folder, read_manifest, save_pipeline
from latentgen.image import read_settings
from latentgen.models import create, loading
from latentgen.models.engine import Engine, EngineNote, open_engine
from latentgen.models.network import unet_network
from latentgen.models.onnx.export import write_graphs
from latentgen.models.onnx.places import GRAPHS, cache_folder, find_graphs
from latentgen.models.onnx.session import cores, open_session
from latentgen.render import Order, render, replay
from tests.turns import Awaited

ROOT = Path(__file__).parents[2]
TEXTS = [
    "",
    "a red apple",
    "café  猫 😀\n\tit's 2024!!",
    "<|endoftext|> a <|startoftext|>",
    "(a:1.3) [b] \\(c\\)",
    "an umbrella " * 12,
    "\x00\u200b\u00a0Ünïcode ﬁ",
]


@pytest.fixture(scope="module")
def engines(folder: Path) -> dict[str, Pipeline]:
    return {name: Pipeline.from_pretrained(folder, engine=name) for name in ("onnx", "torch")}


def both(engines: dict[str, Pipeline], prompt: Any, **arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (B, H, W, 3) of both engines."""
    found = [engines[name](prompt, output_type="np", **arguments).images for name in ("onnx", "torch")]
    assert [type(each) for each in found] == [np.ndarray] * 2 and found[0].dtype == np.float32
    assert found[1].std() > 0.01
    return found[0], found[1]


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m", "euler", "heun", "unipc", "euler-ancestral", "ddpm", "lcm"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_both_engines_give_the_same_picture(engines: dict[str, Pipeline], sampler: str, guidance: float) -> None:
    one, other = both(engines, "a red apple", seed=3, sampler=sampler, guidance_scale=guidance, num_inference_steps=6)
    np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (20, 28)])
def test_they_do_in_batches_and_at_any_size(engines: dict[str, Pipeline], height: int, width: int) -> None:
    prompts = ["a red apple", "a (blue:1.3) bird BREAK noto", "a green frog " * 8]
    arguments = {"height": height, "width": width, "negative_prompt": "rain", "guidance_rescale": 0.5}
    one, other = both(engines, prompts, seed=1, num_inference_steps=4, **arguments)
    assert one.shape == (3, height, width, 3)
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_they_do_with_embeddings_latents_and_generators_that_are_brought(engines: dict[str, Pipeline]) -> None:
    states = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    arguments = {"prompt_embeds": states, "latents": torch.from_numpy(noise), "num_inference_steps": 3}
    one, other = both(engines, None, **arguments)
    np.testing.assert_allclose(one, other, atol=1e-3)
    drawn = [
        engines[name](
            "a bird", generator=torch.Generator().manual_seed(1), sampler="euler-ancestral", output_type="pt"
        ).images
        for name in ("onnx", "torch")
    ]
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-3, rtol=0)


def test_callbacks_are_given_float32_arrays_and_steer(engines: dict[str, Pipeline]) -> None:
    heard = []

    def halve(_: Pipeline, index: int, __: float, values: dict[str, Any]) -> dict[str, Any]:
        heard.append((type(values["latents"]), values["latents"].dtype))
        return {"latents": values["latents"] * 0.5} if index == 0 else values

    pipe = engines["onnx"]
    plain = pipe("a red apple", seed=1, output_type="np").images
    steered = pipe("a red apple", seed=1, output_type="np", callback_on_step_end=halve).images
    assert heard == [(np.ndarray, np.float32)] * 4
    assert np.abs(plain - steered).max() > 1e-3


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_are_read_as_clip_reads_them(engines: dict[str, Pipeline], text: str) -> None:
    ours, theirs = engines["onnx"].text, engines["torch"].text
    assert ours.window == theirs.window
    assert ours.tokens(text) == theirs.tokens(text)
    for weights in (False, True):
        assert ours.lay(text, weights=weights, limit=None) == theirs.lay(text, weights=weights, limit=None)
    one, other = (each.encode([text, "a bird"], limit=1).states for each in (ours, theirs))
    np.testing.assert_allclose(one, other.numpy(), atol=1e-4)


def test_a_unet_told_the_caption_as_a_whole_is_exported_too(parts: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = create.unet(
        channels=(32, 64), layers=1, head_width=16, latent_channels=4, latent_size=8, text_width=16, pooled=True
    )
    with torch.no_grad():  # pooled text that is small beside the time would prove nothing
        unet.add_embedding.proj.weight.mul_(20)
    config = {"_class_name": "DDIMScheduler"}
    folder = save_pipeline(
        tmp_path / "w", **{**parts, "unet": unet.eval()}, scheduler_config=config, finish=write_graphs
    )
    found = {name: Pipeline.from_pretrained(folder, engine=name) for name in ("onnx", "torch")}
    for prompt in ("a red apple", ["a bird", "a green frog " * 8]):
        one, other = both(found, prompt, seed=1, num_inference_steps=4, height=24, width=32)
        np.testing.assert_allclose(one, other, atol=1e-3)


# --- weights stand in one place


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_graphs_hold_no_weights_and_point_to_each_where_it_is_stored(
    parts: dict[str, Any], tmp_path: Path, dtype: str
) -> None:
    folder = save_pipeline(
        tmp_path / "w", **parts, scheduler_config={"_class_name": "DDIMScheduler"}, dtype=dtype, finish=write_graphs
    )
    assert {f"{part}/{name}" for part, name in GRAPHS.items()} <= set(read_manifest(folder)["files"])
    for part, name in GRAPHS.items():
        made = onnx.load(folder / part / name, load_external_data=False)
        file = open_folder(folder).weights[part][0]
        header = check_safetensors(file)
        start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        stored = {start + entry["data_offsets"][0]: entry for key, entry in header.items() if key != "__metadata__"}
        assert made.graph.initializer
        for tensor in made.graph.initializer:
            assert tensor.data_location == onnx.TensorProto.EXTERNAL and not tensor.raw_data
            place = {entry.key: entry.value for entry in tensor.external_data}
            entry = stored[int(place["offset"])]
            assert place["location"] == file.name
            assert int(place["length"]) == entry["data_offsets"][1] - entry["data_offsets"][0]
            assert entry["dtype"] == {"fp16": "F16", "fp32": "F32"}[dtype]
        constants = [attribute.t for node in made.graph.node for attribute in node.attribute if attribute.HasField("t")]
        assert max((len(tensor.raw_data) for tensor in constants), default=0) <= 8 * 256
    found = {engine: Pipeline.from_pretrained(folder, engine=engine) for engine in ("onnx", "torch")}
    one, other = both(found, "a red apple", seed=1, num_inference_steps=3)
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_without_the_safetensors_a_graph_does_not_load(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    checkpoint = open_folder(copy)
    checkpoint.weights["unet"][0].unlink()
    with pytest.raises(InputError, match=r"cannot be run with the weights in .*unet") as caught:
        open_engine(checkpoint, "onnx")
    assert "\n" not in str(caught.value)


def test_graphs_of_other_weights_are_not_run_but_made_anew(
    make_folder: Callable[..., Path], parts: dict[str, Any], tmp_path: Path
) -> None:
    """A file whose tensors lie elsewhere would be read as numbers that are no weights."""
    copy = tmp_path / "copy"
    shutil.copytree(make_folder(graphs=True), copy)
    (copy / "manifest.json").unlink()
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    state = {name: value.half().contiguous() for name, value in parts["unet"].state_dict().items()}
    file.write_bytes(save({"before": torch.zeros(64), **state}, {"format": "pt"}))
    with pytest.warns(EngineNote, match="has ONNX graphs that do not fit it: they are exported once into"):
        changed = Pipeline.from_pretrained(copy, engine="onnx")
    plain = Pipeline.from_pretrained(copy, engine="torch")
    one, other = both({"onnx": changed, "torch": plain}, "a red apple", seed=1, num_inference_steps=3)
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_weights_are_the_same_weights_with_and_without_graphs(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.onnx", "manifest.json"))
    assert open_folder(copy).fingerprint == open_folder(folder).fingerprint


def test_a_folder_without_graphs_is_exported_once_into_the_cache_and_left_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.onnx", "manifest.json"))
    before = sorted(copy.rglob("*"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.warns(EngineNote, match="has no ONNX graphs: they are exported once into") as caught:
        first = Pipeline.from_pretrained(copy)
    assert len([each for each in caught if each.category is EngineNote]) == 1
    graphs = find_graphs(cache_folder(open_folder(copy)))
    assert graphs is not None and all(
        path.is_relative_to(tmp_path / "cache/latentgen/onnx") for path in graphs.values()
    )
    assert sum(path.stat().st_size for path in graphs.values()) < 2_000_000
    times = [path.stat().st_mtime_ns for path in graphs.values()]
    for wrong in ("2", 1.5, -1, 0, True, 10**10):  # with which no graph can be run
        for engine in ("auto", "torch"):
            with pytest.raises(InputError, match=f"threads is {wrong!r}; it must be"):
                Pipeline.from_pretrained(copy, engine=engine, threads=wrong)  # type: ignore[arg-type]
    moved = copy.rename(tmp_path / "moved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Pipeline.from_pretrained(moved)
    assert [path.stat().st_mtime_ns for path in graphs.values()] == times
    assert [path.relative_to(copy) for path in before] == sorted(path.relative_to(moved) for path in moved.rglob("*"))
    assert first.machine == again.machine and first.machine is not None and first.machine["engine"] == "onnx"
    pictures = [pipe("a red apple", seed=1, output_type="np").images for pipe in (first, again)]
    np.testing.assert_array_equal(*pictures)


# --- which engine


def test_the_engine_is_chosen_by_what_is_asked_for(folder: Path) -> None:
    engine = {
        said: Pipeline.from_pretrained(folder, **dict([said])).machine
        for said in [("engine", "auto"), ("device", "cpu"), ("dtype", "float32"), ("dtype", "bfloat16")]
    }
    engine["device", "cpu:0"] = Pipeline.from_pretrained(folder, device="cpu:0").machine
    names = [found["engine"] for found in engine.values() if found is not None]
    expected = "torch" if torch.cuda.is_available() else "onnx"
    assert names == [expected, "onnx", expected, "torch", "onnx"]


def test_what_takes_torch_is_done_by_torch_where_the_engine_was_left_to_be_chosen(folder: Path) -> None:
    pipe, plain = Pipeline.from_pretrained(folder, device="cpu"), Pipeline.from_pretrained(folder, engine="torch")
    arguments = {"seed": 1, "pag_scale": 2.0, "output_type": "np", "num_inference_steps": 3}
    output = pipe("a red apple", **arguments)
    assert output.settings["engine"] == "torch"
    np.testing.assert_array_equal(output.images, plain("a red apple", **arguments).images)


def test_what_is_refused_or_does_nothing_opens_no_other_engine(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    call: dict[str, Any] = {"num_inference_steps": 2}
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("no LoRA at no-such", lambda: pipe.load_lora("no-such.safetensors")),
        ("no LoRA named 'x' is loaded", lambda: pipe.set_lora_weight("x", 1.0)),
        ("no LoRA named 'x' is loaded", lambda: pipe.unload_lora("x")),
        ("no embedding at no-such", lambda: pipe.load_textual_inversion("no-such.safetensors")),
        ("the batch is 0", lambda: pipe("a", pag_scale=1.0, batch=0, **call)),
        ("it must be a Pipeline", lambda: pipe("a", feature_cache=2, weaker=3, **call)),  # type: ignore[arg-type]
        ("a seed and a generator", lambda: pipe("a", pag_scale=1.0, seed=1, generator=torch.Generator(), **call)),
    ]
    for line, does in refused:
        with pytest.raises(InputError, match=line):
            does()
    pipe.unload_lora()
    pipe.unfuse_lora()
    assert pipe.machine is not None and pipe.machine["engine"] == "onnx"


def test_a_call_ends_with_the_engine_that_it_began_with(folder: Path) -> None:
    pipe, torchs = (Pipeline.from_pretrained(folder, engine=engine, device="cpu") for engine in ("auto", "torch"))
    taken = [field.name for field in fields(Engine)]
    pipe._torch = lambda: Engine(**{name: getattr(torchs, name) for name in taken})

    def told(own: Pipeline, index: int, *_: Any) -> None:
        if index == 0:
            own.fuse_lora()  # which takes torch

    plain = pipe("a", seed=1, num_inference_steps=2, output_type="np")
    out = pipe("a", seed=1, num_inference_steps=2, output_type="np", callback_on_step_end=told)
    np.testing.assert_array_equal(out.images, plain.images)
    assert out.settings["engine"] == "onnx" and pipe.machine is not None and pipe.machine["engine"] == "torch"


def test_what_onnx_cannot_do_gets_one_line_where_it_was_asked_for(
    engines: dict[str, Pipeline], folder: Path, tmp_path: Path
) -> None:
    pipe = engines["onnx"]
    with pytest.raises(InputError, match="pag_scale needs a network"):
        pipe("a", pag_scale=1.0)
    with pytest.raises(InputError, match="open the pipeline with engine='torch'"):
        pipe.load_lora("x.safetensors")
    with pytest.raises(InputError, match="computes on a CPU, not on 'cuda'"):
        Pipeline.from_pretrained(folder, engine="onnx", device="cuda")
    with pytest.raises(InputError, match="in float32, not in 'float16'"):
        Pipeline.from_pretrained(folder, engine="onnx", dtype=torch.float16)
    with pytest.raises(InputError, match="engine 'tensorrt' is not known"):
        Pipeline.from_pretrained(folder, engine="tensorrt")


def test_a_fall_back_to_torch_on_a_cpu_is_said_with_its_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("manifest.json"))
    config = copy / "text_encoder/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_attention_mask": True}))
    with pytest.warns(EngineNote, match="its text encoder is told of padding; torch runs it instead") as caught:
        pipe = Pipeline.from_pretrained(copy, device="cpu")
    assert len([each for each in caught if each.category is EngineNote]) == 1
    assert pipe.machine is not None and pipe.machine["engine"] == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineNote)
        Pipeline.from_pretrained(copy, engine="torch")  # asked for: nothing to say
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
        Pipeline.from_pretrained(copy, device="cpu", dtype="bfloat16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with pytest.warns(EngineNote, match="this CPU has no instructions for bfloat16 products"):
        Pipeline.from_pretrained(copy, device="cpu", dtype="bf16")


def test_threads_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (cores(5), cores()) == (5, 3)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cores() >= 1


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_a_replay_is_by_the_engine_that_rendered(folder: Path, tmp_path: Path, engine: str) -> None:
    order = Order(["a red apple", "a blue bird"], steps=2, seed=1, batch=2, engine=engine)
    _, second = render(order, tmp_path / "a.png", str(folder))
    settings = read_settings(second)
    assert settings["engine"] == engine and ("torch" in settings) == (engine == "torch")
    target, remarks = replay(second)
    assert remarks == ["the same file, byte for byte"] and target.read_bytes() == second.read_bytes()


def test_threads_that_wait_for_their_sessions_next_run_take_no_time_of_the_others(folder: Path) -> None:
    """They spin for 40 ms after a run, and before the first one, where nobody tells them not to."""
    open_session(open_folder(folder), "vae", folder / "vae/decoder.onnx", threads=2)  # made ready
    session = open_session(open_folder(folder), "vae", folder / "vae/decoder.onnx", threads=2)
    for _ in range(2):
        used = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - used < 0.01
        session.run(None, {"latents": np.zeros((4, 4, 64, 64), np.float32)})


@pytest.mark.parametrize("stock", [False, True], ids=["tokenizer.json", "vocab.json and merges.txt"])
def test_the_command_line_renders_and_replays_without_torch(folder: Path, tmp_path: Path, stock: bool) -> None:
    if stock:
        folder = shutil.copytree(
            folder, tmp_path / "stock", ignore=shutil.ignore_patterns("tokenizer.json", "manifest.json")
        )
    target = tmp_path / "apple.png"
    code = """
import atexit, sys
from latentgen import cli
heavy = {"torch", "diffusers", "transformers", "accelerate", "peft", "pydantic", "rich", "onnx"}  # the last once
atexit.register(lambda: print("heavy:", *sorted(heavy & set(sys.modules)), "end"))
sys.argv = ["latentgen", *sys.argv[1:]]
cli.main()
"""
    rendering = ["render", "a red apple", "--engine", "onnx", "--steps", "2", "--out", target, "--weights", folder]
    for arguments, loaded in ((rendering, " onnx"), (rendering, ""), (["replay", target], "")):
        ran = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=120,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.splitlines()[-1] == f"heavy:{loaded} end"
    assert read_settings(target)["engine"] == "onnx"
    kept = sorted(path.relative_to(tmp_path / "cache").parts[:3] for path in (tmp_path / "cache").rglob("*.*"))
    assert set(kept) == {("latentgen", "onnx", "ready")}  # the folder has graphs; ONNX Runtime has no record of its use


def test_damaged_weights_of_fused_loras_are_not_run_but_made_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name, random = "lora_unet_mid_block_attentions_0_proj_in", torch.Generator().manual_seed(0)
    state = {f"{name}.lora_down.weight": torch.randn(2, 32, 1, 1, generator=random)}
    state |= {f"{name}.lora_up.weight": torch.randn(32, 2, 1, 1, generator=random)}
    file = tmp_path / "lora.safetensors"
    file.write_bytes(save(state))

    def pixels() -> np.ndarray:
        pipe = Pipeline.from_pretrained(folder, engine="onnx", loras=[{"path": file}])
        return pipe("a red apple", seed=1, num_inference_steps=2, output_type="np").images

    with pytest.warns(EngineNote, match="has no ONNX graphs with these LoRAs"):
        first = pixels()
    (beside,) = (tmp_path / "cache").glob("latentgen/onnx/*-fused/unet/*.safetensors")
    whole = beside.read_bytes()
    for damaged in (whole[:-500] + bytes(500), whole[:-500]):
        beside.write_bytes(damaged)
        np.testing.assert_array_equal(pixels(), first)  # of the copies that are kept
        shutil.rmtree(tmp_path / "cache/latentgen/onnx/ready")
        with pytest.warns(EngineNote, match="has ONNX graphs in the cache that cannot be run"):
            np.testing.assert_array_equal(pixels(), first)
        assert beside.read_bytes() == whole


# --- several threads, and copies

CALL: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "output_type": "np"}


def test_the_libraries_are_silent_for_one_thread_at_a_time_and_then_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second thread comes while the first is inside, and leaves after it."""
    import transformers.utils.logging as remarks

    with loading.quiet():
        pass  # the libraries, when they are imported, have filters of their own
    inside, come, left = Event(), Event(), Event()
    monkeypatch.setattr(loading, "LOADING", Awaited(come))
    before = list(warnings.filters), remarks.get_verbosity(), remarks.is_progress_bar_enabled()

    def second() -> None:
        assert inside.wait(20)
        with loading.quiet():
            come.set()
            assert left.wait(20)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second)
        with loading.quiet():
            inside.set()
            assert come.wait(20)
        left.set()
        other.result()
    assert (list(warnings.filters), remarks.get_verbosity(), remarks.is_progress_bar_enabled()) == before


def test_two_threads_that_need_torch_open_it_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, come, opened = Event(), Event(), list[Any]()
    monkeypatch.setattr(loading, "LOADING", Awaited(come))
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    make = pipe._torch
    assert make is not None

    def once() -> Any:
        opened.append(1)
        if len(opened) == 1:
            inside.set()
            assert come.wait(20)
        return make()

    def second() -> None:
        assert inside.wait(20)
        pipe._use_torch()
        come.set()

    pipe._torch = once
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second)
        pipe._use_torch()
        other.result()
    assert opened == [1] and pipe.machine is not None and pipe.machine["engine"] == "torch"


def test_weights_that_were_opened_in_torchs_inference_mode_are_rendered_with_everywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentgen.models.network.channels_last", lambda _: True)  # weights are moved once more
    plain = Pipeline.from_pretrained(folder, engine="torch")("a red apple", **CALL).images
    with torch.inference_mode():
        opened = Pipeline.from_pretrained(folder, engine="torch")
        assert not any(weight.is_inference() for weight in opened.network.unet.parameters())  # type: ignore[attr-defined]
        given = copy.deepcopy(opened.network.unet)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(opened("a red apple", **CALL).images, plain)
    np.testing.assert_array_equal(opened("a red apple", **CALL).images, plain)
    assert all(weight.is_inference() for weight in given.parameters())  # somebody's own
    opened.network = unet_network(given)
    np.testing.assert_array_equal(opened("a red apple", **CALL).images, plain)


@pytest.mark.parametrize("way", ["copied", "sent"])
def test_a_copy_computes_with_its_own_weights_in_every_way(engines: dict[str, Pipeline], way: str) -> None:
    pipe = engines["torch"]
    ways = [CALL, CALL | {"pag_scale": 2.0}, CALL | {"feature_cache": 2}]
    before = [pipe("a red apple", **call).images for call in ways]
    twin = copy.deepcopy(pipe) if way == "copied" else pickle.loads(pickle.dumps(pipe))
    for call, expected in zip(ways, before, strict=True):
        np.testing.assert_array_equal(twin("a red apple", **call).images, expected)
    with torch.no_grad():
        twin.network.unet.conv_out.weight.mul_(0.5)
    for call, expected in zip(ways, before, strict=True):
        assert np.abs(twin("a red apple", **call).images - expected).max() > 1e-4
        np.testing.assert_array_equal(pipe("a red apple", **call).images, expected)
    network = twin.network.unet
    assert twin.perturbed.unet is network and twin.cached.network.unet is network


def test_what_onnx_runtime_computes_is_copied_but_not_sent(engines: dict[str, Pipeline]) -> None:
    pipe = engines["onnx"]
    twin = copy.deepcopy(pipe)
    np.testing.assert_array_equal(twin("a red apple", **CALL).images, pipe("a red apple", **CALL).images)
    with pytest.raises(InputError, match="cannot be pickled; open it in each process"):
        pickle.dumps(pipe)
