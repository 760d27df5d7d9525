"""The network is the U-Net itself, in its own type, with gradients only where they are wanted."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, get_ident
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentgen import Pipeline
from latentgen.checkpoint import open_folder
from latentgen.diffusion.denoiser import Condition
from latentgen.models import network as networks
from latentgen.models.feature_cache import FeatureCache
from latentgen.models.lora.layers import module_loras
from latentgen.models.network import channels_last, load_unet, perturbed_network, unet_network
from tests.turns import Awaited

X, TIME = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 999.0])
CONDITION = Condition(states=torch.randn(2, 16, 16))


def test_the_output_is_the_unets_at_each_rows_own_time(parts: dict[str, Any]) -> None:
    network = unet_network(parts["unet"])
    out = network(X, TIME, CONDITION)
    for row in range(2):
        with torch.no_grad():
            expected = parts["unet"](X[row : row + 1], TIME[row], CONDITION.states[row : row + 1]).sample
        torch.testing.assert_close(out[row : row + 1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("training", "asked", "recorded"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True)],
)
def test_gradients_are_recorded_in_training_mode_or_as_asked(
    parts: dict[str, Any], training: bool, asked: bool | None, recorded: bool
) -> None:
    unet = copy.deepcopy(parts["unet"]).train(training)
    assert unet_network(unet, gradients=asked)(X, TIME, CONDITION).requires_grad is recorded
    with torch.no_grad():
        assert not unet_network(unet, gradients=asked)(X, TIME, CONDITION).requires_grad


def test_a_half_precision_unet_answers_in_the_type_of_x(parts: dict[str, Any]) -> None:
    half = copy.deepcopy(parts["unet"]).to(torch.bfloat16)
    out = unet_network(half)(X, TIME, CONDITION)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, unet_network(parts["unet"])(X, TIME, CONDITION), atol=0.1, rtol=0.1)


# --- keys and values of the text, once for a walk

CALL: dict[str, Any] = {"num_inference_steps": 4, "seed": 1, "output_type": "np", "guidance_scale": 3.0}
PROMPTS = ["a red apple", "a blue bird", "the green frog"]


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder, engine="torch")


def told_layers(pipe: Pipeline) -> list[Any]:
    """to_k and to_v of each cross-attention."""
    unet: Any = pipe.network.unet  # type: ignore[attr-defined]
    return [layer for name, layer in unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]


def at_every_step(pipe: Pipeline, prompts: Any, call: dict[str, Any]) -> np.ndarray:
    """The pictures where nothing is taken over."""
    network = pipe.network
    pipe.network = lambda *given: network(*given)
    try:
        images: np.ndarray = pipe(prompts, **call).images
    finally:
        pipe.network = network
    return images


@pytest.mark.parametrize(
    ("more", "groups"),
    [
        ({}, 1),
        ({"guidance_scale": 1.0}, 1),
        ({"batch": 1}, 3),
        ({"sampler": "heun"}, 1),
        ({"guidance_interval": (0.0, 0.5)}, 2),  # of both conditions, then of the prompt's alone
        ({"condition_annealing": (0.1, 0.99, 0.2)}, 4),  # another condition at each step
    ],
)
def test_keys_and_values_are_computed_once_for_all_steps_and_the_picture_is_the_same_to_the_bit(
    pipe: Pipeline, more: dict[str, Any], groups: int
) -> None:
    layers, counted = told_layers(pipe), []
    expected = at_every_step(pipe, PROMPTS, CALL | more)
    for layer in layers:
        layer.forward = lambda states, layer=layer: counted.append(1) or type(layer).forward(layer, states)
    try:
        found = pipe(PROMPTS, **(CALL | more)).images
        assert len(counted) == groups * len(layers)
        assert all(isinstance(layer.__dict__.get("forward"), type(lambda: 0)) for layer in layers)  # as it was before
    finally:
        for layer in layers:
            del layer.forward
    np.testing.assert_array_equal(found, expected)


def test_they_are_taken_over_under_perturbed_attention_too(pipe: Pipeline) -> None:
    more = {"pag_scale": 2.0}
    np.testing.assert_array_equal(pipe(PROMPTS, **(CALL | more)).images, at_every_step(pipe, PROMPTS, CALL | more))
    assert not any("forward" in layer.__dict__ for layer in told_layers(pipe))


@pytest.mark.parametrize("batch", [1, 3])
def test_they_are_taken_over_where_deep_features_are(pipe: Pipeline, batch: int) -> None:
    call = {**CALL, "num_inference_steps": 6, "batch": batch}
    found, cached = pipe(PROMPTS, feature_cache=2, **call).images, pipe.cached
    pipe.cached = lambda every: FeatureCache(pipe.network.unet, pipe.network, every)  # type: ignore[attr-defined]
    expected = pipe(PROMPTS, feature_cache=2, **call).images
    pipe.cached = cached
    np.testing.assert_array_equal(found, expected)


def test_a_lora_loaded_or_taken_out_during_a_walk_counts_from_then_on(pipe: Pipeline, tmp_path: Path) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {
        f"{layer}.lora.{name}.weight": torch.randn(shape) for name, shape in (("down", (2, 16)), ("up", (16, 2)))
    }
    save_file(tensors, tmp_path / "a.safetensors")

    def change(here: Pipeline, index: int, _: float, __: Any) -> None:
        if index == 0:
            here.load_lora(tmp_path / "a.safetensors", 2.0)
        if index == 1:
            here.fuse_lora()
            here.set_lora_weight("a", 4.0)
        if index == 2:
            here.unfuse_lora()
            here.unload_lora()

    call = {**CALL, "callback_on_step_end": change}
    found = pipe(PROMPTS, **call).images
    np.testing.assert_array_equal(found, at_every_step(pipe, PROMPTS, call))
    assert np.abs(found - pipe(PROMPTS, **CALL).images).max() > 1e-4
    pipe.load_lora(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(pipe(PROMPTS, **CALL).images, at_every_step(pipe, PROMPTS, CALL))
    pipe.unload_lora()


def test_a_walk_in_training_or_compiled_is_the_network_itself(parts: dict[str, Any]) -> None:
    unet = copy.deepcopy(parts["unet"])
    plain = unet_network(unet)
    assert plain.walk() is not plain
    for network in (unet_network(unet, run=unet), unet_network(unet, gradients=True), unet_network(unet.train())):
        assert network.walk() is network


def test_channels_lie_where_a_unet_answers_fastest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for wide in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda wide=wide: {"avx512_f": wide})
        unet = load_unet(open_folder(folder), torch.device("cpu"), torch.float32)
        assert unet.down_blocks[0].resnets[0].conv1.weight.is_contiguous() == wide
        last = load_unet(open_folder(folder), torch.device("cpu"), torch.float32, compiled=True).conv_in.weight
        assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
        found.append(unet_network(unet)(X, TIME, CONDITION))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    assert channels_last(torch.device("cuda"))


# --- a U-Net that two threads compute with

OTHER = Condition(states=torch.randn(2, 16, 16))


def beside(
    unet: Any, first: Callable[[], Any], second: Callable[[], Any], at: torch.nn.Module | None = None
) -> tuple[Any, Any]:
    """What both give where the second comes as the first is inside: it is through, or it waits for its turn.

    at: the module that the first is about to call then; None is the middle of the U-Net.
    """
    inside, come = Event(), Event()
    networks._LOCKS[unet], own = Awaited(come), get_ident()

    def wait(*_: object) -> None:
        if get_ident() == own and not inside.is_set():
            inside.set()
            assert come.wait(20)

    def then() -> Any:
        assert inside.wait(20)
        try:
            return second()
        finally:
            come.set()

    hook = (at or unet.mid_block).register_forward_pre_hook(wait)
    try:
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(then)
            return first(), other.result()
    finally:
        hook.remove()
        del networks._LOCKS[unet]


@pytest.mark.parametrize("walking", [True, False])
def test_perturbed_attention_is_not_that_of_who_computes_beside_it(parts: dict[str, Any], walking: bool) -> None:
    unet = copy.deepcopy(parts["unet"])
    perturbed, plain = perturbed_network(unet), unet_network(unet)
    expected = perturbed(X, TIME, CONDITION), plain(X, TIME, OTHER)
    second = plain.walk() if walking else plain
    found = beside(unet, partial(perturbed, X, TIME, CONDITION), partial(second, X, TIME, OTHER))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_copy_that_is_made_while_another_thread_computes_is_whole(parts: dict[str, Any]) -> None:
    unet = copy.deepcopy(parts["unet"])
    plain = unet_network(unet)
    _, twin = beside(unet, partial(plain.walk(), X, TIME, CONDITION), partial(copy.deepcopy, plain))
    torch.testing.assert_close(twin(X, TIME, OTHER), plain(X, TIME, OTHER), rtol=0, atol=0)


class Called(torch.nn.Module):
    """A network as a module, which is called before the network waits for its turn."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, *given: Any) -> Any:
        return self.network(*given)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("step", [0, 1])
def test_deep_features_are_those_of_their_own_walk(parts: dict[str, Any], step: int, early: bool) -> None:
    """The first step remembers them, the second takes them over: another thread computes during either.

    early: it comes when the layers are changed, and the network is not called yet.
    """
    unet = copy.deepcopy(parts["unet"])
    plain = unet_network(unet)
    called = Called(plain.walk())
    alone, shared = FeatureCache(unet, plain.walk(), 2), FeatureCache(unet, called, 2)
    for number, time in enumerate((torch.full((2,), 900.0), torch.full((2,), 800.0))):
        expected, others = alone(X, time, CONDITION), plain(X + 1, TIME, OTHER)
        if number != step:
            torch.testing.assert_close(shared(X, time, CONDITION), expected, rtol=0, atol=0)
            continue
        first, second = partial(shared, X, time, CONDITION), partial(plain, X + 1, TIME, OTHER)
        found = beside(unet, first, second, called if early else None)
        torch.testing.assert_close(found, (expected, others), rtol=0, atol=0)


def test_a_lora_that_is_loaded_while_another_thread_computes_stays_in_use(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{layer}.lora_{name}.weight": torch.ones(shape) for name, shape in (("A", (2, 16)), ("B", (16, 2)))}
    save_file(tensors, tmp_path / "a.safetensors")
    unet, alone = (copy.deepcopy(parts["unet"]) for _ in range(2))
    walk, loras = unet_network(unet).walk(), module_loras(unet=unet)
    module_loras(unet=alone).load(tmp_path / "a.safetensors")
    beside(unet, partial(walk, X, TIME, CONDITION), partial(loras.load, tmp_path / "a.safetensors"))
    expected = unet_network(alone)(X, TIME, CONDITION)
    torch.testing.assert_close(unet_network(unet)(X, TIME, CONDITION), expected, rtol=0, atol=0)
