"""Pipeline: seeds name pictures, callbacks steer, every output type agrees, and bad input gets one line."""

import copy
import json
import math
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from latentgen import InputError, Output, Pipeline, __version__
from latentgen.checkpoint import save_pipeline
from latentgen.diffusion.sampling import OWN_STEPS, SAMPLERS
from latentgen.diffusion.schedule.reading import plan_for
from latentgen.image import describe, read_settings
from latentgen.pipeline import PromptCut
from latentgen.render import replay

STEPS = {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder, engine="torch")


def pixels(output: Output) -> np.ndarray:
    return np.stack([np.asarray(image) for image in output.images])


def test_each_picture_of_a_batch_is_the_picture_of_its_own_seed_rendered_alone(pipe: Pipeline) -> None:
    prompts = ["a red apple", "a blue bird", "a green frog"]
    together = pipe(prompts, seed=40, output_type="np", **STEPS)
    assert together.seeds == (40, 41, 42)
    for k, prompt in enumerate(prompts):
        alone = pipe(prompt, seed=40 + k, output_type="np", **STEPS)
        assert alone.seeds == (40 + k,)
        np.testing.assert_allclose(alone.images[0], together.images[k], atol=1e-5)


def test_listed_seeds_name_each_picture_and_the_latents_are_equal_to_the_bit(pipe: Pipeline) -> None:
    heard: dict[int, Any] = {}
    seen: list[Any] = []

    def network(x: Any, *given: Any) -> Any:
        seen.append(x.clone())
        return pipe.network(x, *given)

    def first(_: Pipeline, index: int, __: float, values: dict[str, Any]) -> None:
        heard.setdefault(index, values["latents"].clone())

    call: dict[str, Any] = {"guidance_scale": 1.0, "callback_on_step_end": first, **STEPS}
    own = replace(pipe, network=network)
    own("a red apple", seed=[7, 3], num_images_per_prompt=2, **call)
    both, drawn = heard.pop(0), seen[0]
    heard.clear()
    seen.clear()
    own("a red apple", seed=3, **call)
    assert torch.equal(seen[0][0], drawn[1])
    torch.testing.assert_close(heard[0][0], both[1], atol=1e-5, rtol=0)


def test_a_fresh_seed_is_reported_and_makes_the_same_pictures_again(pipe: Pipeline) -> None:
    first, second = pipe("a red apple", **STEPS), pipe("a red apple", **STEPS)
    assert first.seeds != second.seeds
    again = pipe("a red apple", seed=first.seeds[0], **STEPS)
    np.testing.assert_array_equal(pixels(first), pixels(again))


def test_the_weights_own_defaults_are_used_and_written_down(pipe: Pipeline) -> None:
    output = pipe("a red apple", seed=0)
    assert output.images[0].size == (32, 32)
    said = output.of(0)
    assert (said["num_inference_steps"], said["guidance_scale"], said["sampler"]) == (4, 3.0, "ddim")
    assert (said["prompt"], said["negative_prompt"], said["seed"]) == ("a red apple", "", 0)
    assert said["latentgen"] == __version__
    json.dumps(output.settings)


def test_a_saved_picture_holds_its_settings(pipe: Pipeline, tmp_path: Path) -> None:
    output = pipe(["a red apple", "café 猫"], seed=5, negative_prompt="blue", **STEPS)
    output.images[1].save(tmp_path / "cat.png")
    settings = read_settings(tmp_path / "cat.png")
    assert settings == json.loads(json.dumps(output.of(1)))
    assert (settings["prompt"], settings["seed"], settings["batch"]["row"]) == ("café 猫", 6, 1)
    with Image.open(tmp_path / "cat.png") as image:
        assert image.info["parameters"].startswith("café 猫\nNegative prompt: blue\nSteps: 3, Sampler: ddim")
        np.testing.assert_array_equal(np.asarray(image), np.asarray(output.images[1]))


def test_output_types_hold_the_same_picture(pipe: Pipeline) -> None:
    outputs = {
        kind: pipe("a red apple", seed=1, output_type=kind, **STEPS).images for kind in ("pil", "np", "pt", "latent")
    }
    assert outputs["np"].shape == (1, 32, 32, 3) and outputs["np"].dtype == np.float32
    assert outputs["pt"].shape == (1, 3, 32, 32) and outputs["latent"].shape == (1, 4, 8, 8)
    np.testing.assert_array_equal(outputs["pt"].numpy().transpose(0, 2, 3, 1), outputs["np"])
    np.testing.assert_array_equal(np.asarray(outputs["pil"][0]), (outputs["np"][0] * 255).round().astype(np.uint8))
    torch.testing.assert_close(pipe.latent.decode(outputs["latent"]), outputs["pt"])


def test_a_sampler_that_cannot_be_steered_says_so(pipe: Pipeline) -> None:
    common = {"seed": 1, "sampler": "probability-flow", "output_type": "np"}
    plain = pipe("a red apple", **common).images
    assert np.isfinite(plain).all() and plain.std() > 0.01
    np.testing.assert_array_equal(pipe("a red apple", callback_on_step_end=lambda *_: None, **common).images, plain)
    with pytest.raises(InputError, match="cannot go on from other latents"):
        pipe("a red apple", callback_on_step_end=lambda *_: {"latents": _[3]["latents"] * 0.5}, **common)


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - OWN_STEPS))
def test_every_sampler_renders_from_a_latent_checkpoint_and_a_callback_can_steer_it(
    pipe: Pipeline, sampler: str
) -> None:
    def halve(_: Pipeline, index: int, __: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * 0.5} if index == 0 else values

    def keep(_: Pipeline, __: int, ___: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"].clone()}

    common = {"seed": 1, "sampler": sampler, "output_type": "np", "guidance_scale": 2.0, "num_inference_steps": 4}
    plain = pipe("a red apple", **common).images
    assert np.isfinite(plain).all() and plain.std() > 0.01
    np.testing.assert_array_equal(pipe("a red apple", callback_on_step_end=keep, **common).images, plain)
    assert np.abs(pipe("a red apple", callback_on_step_end=halve, **common).images - plain).max() > 1e-3


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_a_callback_that_writes_into_the_latents_steers_and_is_named_in_the_settings(folder: Path, engine: str) -> None:
    pipe = Pipeline.from_pretrained(folder, engine=engine, device="cpu")

    def halve(_: Pipeline, __: int, ___: float, values: dict[str, Any]) -> dict[str, Any]:
        values["latents"] *= 0.5
        return values

    common = {"seed": 1, "output_type": "np", **STEPS}
    plain, steered = pipe("a red apple", **common), pipe("a red apple", callback_on_step_end=halve, **common)
    assert np.abs(steered.images - plain.images).max() > 1e-3
    assert steered.settings["brought"] == ["callback_on_step_end"]
    kept = pipe("a red apple", callback_on_step_end=lambda *told: told[3], **common)
    np.testing.assert_array_equal(kept.images, plain.images)
    assert "brought" not in kept.settings


def test_the_sampler_that_chooses_its_own_steps_walks_each_picture_alone(pipe: Pipeline) -> None:
    common: dict[str, Any] = {"sampler": "probability-flow", "output_type": "np", "guidance_scale": 2.0}
    common |= {"condition_annealing": (0.3, 0.8, 0.2), "negative_prompt": "blue"}
    prompts, times = ["a red apple", "a blue fish"], []
    both = pipe(prompts, seed=7, callback_on_step_end=lambda *told: times.append(told[2]), **common).images
    for k, text in enumerate(prompts):
        np.testing.assert_allclose(both[k], pipe(text, seed=7 + k, **common).images[0], atol=1e-5)
    rises = [k for k in range(1, len(times)) if times[k] > times[k - 1]]
    assert len(rises) == 1 and times[rises[0]] == times[0]  # from noise to clean, and once more


def test_a_callback_can_stop_the_run_and_is_then_named_in_the_settings(pipe: Pipeline) -> None:
    indices = []

    def stop(stopped: Pipeline, index: int, time: float, _: dict[str, Any]) -> None:
        indices.append((index, time))
        stopped.interrupt = index == 1

    output = pipe("a red apple", seed=1, callback_on_step_end=stop, **STEPS)
    assert [index for index, _ in indices] == [0, 1]
    assert indices[0][1] > indices[1][1]
    assert output.settings["brought"] == ["callback_on_step_end"]
    assert "brought" not in pipe("a red apple", seed=1, callback_on_step_end=lambda *_: None, **STEPS).settings
    assert "brought" not in pipe("a red apple", seed=1, **STEPS).settings


def test_a_run_that_is_stopped_from_outside_says_so_in_its_settings(pipe: Pipeline, tmp_path: Path) -> None:
    evaluations = []

    def network(*given: Any) -> Any:  # where another thread may set it
        evaluations.append(len(given))
        own.interrupt = len(evaluations) == 2
        return pipe.network(*given)

    own = replace(pipe, network=network)
    output = own("a red apple", seed=1, **STEPS)
    assert len(evaluations) == 2 and output.settings["brought"] == ["interrupt"]
    output.images[0].save(tmp_path / "a.png")
    with pytest.raises(InputError, match="made with interrupt given from outside"):
        replay(tmp_path / "a.png")


def test_what_stops_the_call_of_one_thread_stops_no_other(pipe: Pipeline) -> None:
    plain = pixels(pipe("a red apple", seed=1, **STEPS))
    both, stopped = threading.Barrier(2), threading.Event()
    made: dict[str, Output] = {}

    def stop(own: Pipeline, *_: Any) -> None:
        both.wait(20)  # two calls are under way
        own.interrupt = True
        stopped.set()

    def go_on(own: Pipeline, index: int, *_: Any) -> None:
        if index == 0:
            both.wait(20)
        assert stopped.wait(20) and not own.interrupt

    def call(name: str, callback: Any) -> None:
        made[name] = pipe("a red apple", seed=1, callback_on_step_end=callback, **STEPS)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(call, *given) for given in (("stopped", stop), ("whole", go_on))]:
            done.result()
    assert made["stopped"].settings["brought"] == ["callback_on_step_end"]
    np.testing.assert_array_equal(pixels(made["whole"]), plain)
    assert "brought" not in made["whole"].settings


def test_a_callback_may_wait_for_another_threads_call_and_two_pipelines_for_each_other(pipe: Pipeline) -> None:
    other, both = copy.copy(pipe), threading.Barrier(2)

    def call(one: Pipeline, two: Pipeline) -> Output:
        def nested(_: Pipeline, index: int, *__: Any) -> None:
            if index == 0:
                both.wait(20)
                two("a blue bird", seed=2, **STEPS)

        return one("a red apple", seed=1, callback_on_step_end=nested, **STEPS)

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(call, *given) for given in ((pipe, other), (other, pipe))]
        assert [len(each.result(60).images) for each in done] == [1, 1]


def test_another_thread_stops_all_calls_that_are_under_way(pipe: Pipeline) -> None:
    steps = []

    def call(stopped: Pipeline, index: int, *_: Any) -> None:
        steps.append(index)
        thread = threading.Thread(target=lambda: setattr(stopped, "interrupt", True))
        thread.start()
        thread.join()

    assert pipe("a", seed=1, callback_on_step_end=call, **STEPS).settings["brought"] == ["callback_on_step_end"]
    pipe.interrupt = True  # of no call
    assert not pipe.interrupt and "brought" not in pipe("a", seed=1, **STEPS).settings
    assert steps == [0]


def test_a_call_from_a_callback_leaves_the_outer_one_as_it_was(pipe: Pipeline) -> None:
    heard = []

    def stop(stopped: Pipeline, *_: Any) -> None:
        stopped.interrupt = True

    def nested(outer: Pipeline, index: int, *_: Any) -> None:
        heard.append(index)
        outer.interrupt = index == 1
        inner = outer("a blue bird", seed=2, callback_on_step_end=stop if index == 0 else None, **STEPS)
        assert inner.settings.get("brought") == (["callback_on_step_end"] if index == 0 else None)

    output = pipe("a red apple", seed=1, callback_on_step_end=nested, **STEPS)
    assert heard == [0, 1] and output.settings["brought"] == ["callback_on_step_end"]


def test_a_generators_picture_names_no_seed_for_people(pipe: Pipeline) -> None:
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    said = [
        describe(pipe("a red apple", **given, **STEPS).of(0))
        for given in ({"seed": 3}, {"generator": torch.Generator().manual_seed(3)}, {"latents": noise})
    ]
    assert ["Seed" in line for line in said] == [True, False, False]


def test_the_settings_say_how_many_threads_computed(folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        pipe = Pipeline.from_pretrained(folder, engine="torch", device="cpu", threads=2)
        assert pipe("a", **STEPS).settings["threads"] == 2
        Pipeline.from_pretrained(folder, engine="torch", device="cpu", threads=1)  # of the process
        assert torch.get_num_threads() == pipe("a", **STEPS).settings["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_a_count_of_threads_of_numpys_kind_can_be_saved(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder, device="cpu", threads=np.int64(1))
    assert pipe("a", seed=1, **STEPS).images[0].png().startswith(b"\x89PNG")


def test_guidance_of_one_costs_one_evaluation_a_step(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    network = pipe.network
    monkeypatch.setattr(
        pipe, "network", lambda x, time, condition: (rows.append(len(x)), network(x, time, condition))[1]
    )
    pipe("a red apple", guidance_scale=1.0, **STEPS)
    pipe("a red apple", guidance_scale=2.0, **STEPS)
    assert rows == [1, 1, 1, 2, 2, 2]


def test_words_beyond_the_context_are_counted_and_shown(pipe: Pipeline) -> None:
    prompt = "a red apple on a white table and a blue bird and the green frog in the rain with an umbrella"
    with pytest.warns(PromptCut) as caught:
        pipe(prompt, seed=0, max_embeddings_multiples=1, **STEPS)
    (warning,) = [entry for entry in caught if entry.category is PromptCut]
    line = str(warning.message)
    assert f"{pipe.text.count(prompt)} tokens, of which 16 are used" in line
    cut = pipe.text.cut(prompt)
    assert cut and prompt.endswith(cut) and repr(cut) in line
    kept = prompt.removesuffix(cut).strip()
    assert pipe.text.count(kept) <= 16 < pipe.text.count(f"{kept} {cut.split()[0]}")
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptCut)
        pipe(kept, seed=0, max_embeddings_multiples=1, **STEPS)
        pipe(prompt, seed=0, **STEPS)  # as long as it is


def test_latents_that_are_brought_give_the_size(pipe: Pipeline) -> None:
    noise = np.random.default_rng(0).standard_normal((1, 4, 6, 10)).astype(np.float32)
    assert pipe("a red apple", latents=noise, **STEPS).images[0].size == (40, 24)
    untouched = noise.copy()
    pipe(
        "a red apple", latents=torch.from_numpy(noise), callback_on_step_end=lambda *_: {"latents": _[3]["latents"] * 0}
    )
    np.testing.assert_array_equal(noise, untouched)


def test_generators_one_for_each_picture_make_each_picture_its_own(pipe: Pipeline) -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = pipe(["a red apple"] * 2, generator=generators(1, 2), output_type="np", **STEPS).images
    alone = pipe("a red apple", generator=generators(2), output_type="np", **STEPS).images
    np.testing.assert_allclose(both[1], alone[0], atol=1e-5)


LATENTS = np.zeros((2, 4, 8, 8), dtype=np.float32)
BAD = [
    ({"prompt": []}, "the list of prompts is empty"),
    ({"prompt": None}, "the prompt is missing"),
    ({"prompt": 7}, "the prompt is 7"),
    ({"prompt": ["a", 3]}, "prompt 2 is 3"),
    ({"prompt": "a", "negative_prompt": ["b", "c"]}, "2 negative prompts for 1 prompts"),
    ({"prompt": "a", "negative_prompt": 3}, "the negative prompt is 3"),
    ({"prompt": "a", "sampler": "dpm++2m"}, "did you mean 'dpmpp-2m'"),
    ({"prompt": "a", "sampler": "Euler a"}, "did you mean 'euler"),
    ({"prompt": "a", "height": 30}, "height 30 is not a multiple of 4; the nearest that are: 28 and 32"),
    ({"prompt": "a", "width": 3}, "width 3 is not a multiple of 4; the nearest that are: 4"),
    ({"prompt": "a", "width": 0}, "width is 0"),
    ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps is 0; it must be 1 or more"),
    ({"prompt": "a", "num_inference_steps": -3}, "num_inference_steps is -3"),
    ({"prompt": "a", "num_inference_steps": 2.5}, "num_inference_steps is 2.5; it must be a whole number"),
    ({"prompt": "a", "num_inference_steps": 1001}, "1001 steps are more than the 1000 levels"),
    ({"prompt": "a", "guidance_scale": math.nan}, "guidance_scale is nan"),
    ({"prompt": "a", "guidance_scale": math.inf}, "guidance_scale is inf"),
    ({"prompt": "a", "guidance_scale": "high"}, "guidance_scale is 'high'"),
    ({"prompt": "a", "guidance_rescale": 2}, "guidance_rescale is 2; it must be a number from 0 to 1"),
    ({"prompt": "a", "seed": [1, 2]}, "2 seeds for 1 pictures"),
    ({"prompt": "a", "seed": -1}, "seed is -1"),
    ({"prompt": "a", "seed": 2**64}, "is too large"),
    ({"prompt": "a", "seed": 1, "generator": torch.Generator()}, "a seed and a generator"),
    ({"prompt": "a", "generator": [torch.Generator()] * 3}, "3 generators for 1 pictures"),
    ({"prompt": "a", "max_embeddings_multiples": 0}, "max_embeddings_multiples is 0; it must be 1 or more"),
    ({"prompt": "(a:101)"}, "the prompt weighs 'a' by 101; weights go from -100 to 100"),
    ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    ({"prompt": "a", "latents": LATENTS}, r"latents have shape \(2, 4, 8, 8\); it must be \(1, 4, 8, 8\)"),
    ({"prompt": "a", "output_type": "jpg"}, "output_type 'jpg' is not known"),
    ({"prompt": "a", "prompt_embeds": np.zeros((1, 16, 16))}, "a prompt and prompt_embeds"),
    ({"prompt_embeds": np.zeros((16, 16))}, r"prompt_embeds has shape \(16, 16\)"),
    ({"prompt": ["a", "b"], "num_images_per_prompt": 3, "negative_prompt_embeds": np.zeros((3, 16, 16))}, "1 or 2"),
    ({"prompt": "caf\udce9"}, r"the prompt 'caf\\udce9' is not valid Unicode"),
    ({"prompt": "a", "negative_prompt": ["\ud800"]}, "is not valid Unicode"),
    ({"prompt": "a", "vae_tiling": 2}, "vae_tiling is 2; it must be True or False"),
    ({"prompt": "a", "vae_tiling": ""}, "vae_tiling is ''; it must be"),
    ({"prompt": "a", "vae_tiling": "yes"}, "vae_tiling is 'yes'; it must be"),
    ({"prompt": "a", "vae_tiling": np.ones(2)}, "vae_tiling is array"),
    ({"prompt": "a", "prompt_weights": np.ones((2, 2))}, "prompt_weights is array"),
    ({"prompt": "a", "batch": np.ones((2, 2))}, "the batch is array"),
    ({"prompt": "a", "output_type": np.array(["pil", "np"])}, "output_type array.* is not known"),
    ({"prompt": "a", "sampler": np.array(["a", "b"])}, "unknown sampler array"),
    ({"prompt": "a", "latents": np.full((1, 4, 8, 8), "x")}, "latents has numbers of type <U1"),
    ({"prompt": "a", "latents": torch.zeros(1, 4, 8, 8, dtype=torch.complex64)}, "latents has .* torch.complex64"),
    ({"prompt": "a", "latents": np.float32(1)}, r"latents have shape \(\)"),
    ({"prompt_embeds": np.zeros((1, 0, 16))}, r"prompt_embeds has shape \(1, 0, 16\)"),
    ({"prompt_embeds": np.float32(1)}, r"prompt_embeds has shape \(\)"),
    ({"prompt": "a", "guidance_scale": 10**400}, "too large to compute with"),
    ({"prompt": "a", "guidance_scale": torch.ones(2)}, "guidance_scale is tensor"),
    ({"prompt": "a", "num_inference_steps": -(10**5000)}, "num_inference_steps is a int; it must be 1 or more"),
    ({"prompt": "a", "clip_skip": 10**5000}, "clip_skip is a int; this text encoder can do without"),
    ({"prompt": "a", "num_inference_steps": 10**5000}, "a int steps are more than the 1000 levels"),
    ({"prompt": "a", "height": 10**5000 + 1}, "height is a int; it must be from 1 to 65536"),
    ({"prompt": "a", "width": 10**5000}, "width is a int; it must be from 1 to 65536"),
    ({"prompt": "a", "num_images_per_prompt": 10**5000}, "num_images_per_prompt is a int; it must be from 1 to"),
    ({"prompt": "a", "timesteps": [9], "num_inference_steps": 10**5000}, "num_inference_steps is a int and there"),
    ({"prompt": "a", "timesteps": range(500)}, r"timesteps are \[0, 1.*…; they must fall"),
    ({"prompt": "a", "guidance_interval": [0.5] * 400}, r"guidance_interval is \[0.5.*…; it must be"),
    ({"prompt": "a", "guidance_projection": np.ones((40, 9))}, r"guidance_projection is \[array.*…; it must be"),
    ({"prompt": "a", "condition_annealing": np.ones((40, 9))}, r"condition_annealing is \[array.*…; it must be"),
    ({"prompt": "a", "seed": b"1"}, "seed is b'1'; it must be a whole number"),
    ({"prompt": "a", "weaker_scale": "x"}, "weaker_scale is 'x'; it must be a number"),
    ({"prompt": "a", "weaker_scale": None}, "weaker_scale is None; it must be a number"),
    ({"prompt": "a", "weaker_scale": math.nan}, "weaker_scale is nan; it must be a number"),
    ({"prompt": "a", "weaker_scale": -5}, "weaker_scale is -5; it must be a number"),
    ({"prompt": "a", "sampler": "DPMSolverMultistepScheduler"}, "did you mean 'dpmpp-2m' or 'dpmpp-2m-sde'"),
    ({"prompt": "a", "sampler": DDIMScheduler()}, "did you mean 'ddim'"),
]


def test_a_number_says_yes_and_no_too(pipe: Pipeline) -> None:
    given = [pipe("a", seed=1, vae_tiling=said, **STEPS) for said in (0, False, 1)]
    assert [out.settings["vae_tiling"] for out in given] == [False, False, True]
    np.testing.assert_array_equal(pixels(given[0]), pixels(given[1]))


@pytest.mark.parametrize(("arguments", "line"), BAD, ids=[line[:40] for _, line in BAD])
def test_bad_input_gets_one_line(pipe: Pipeline, arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line) as caught:
        pipe(arguments.pop("prompt", None), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_no_picture_is_black_because_numbers_ran_over(folder: Path, engine: str) -> None:
    pipe = Pipeline.from_pretrained(folder, engine=engine, device="cpu")
    noise = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    noise[1, 0, 0, 0] = np.nan
    call: dict[str, Any] = {"latents": noise, "output_type": "np", **STEPS}
    with pytest.raises(
        InputError, match=r"^picture 2 of 3 would be black: the latents are no finite numbers"
    ) as caught:
        pipe(["a", "b", "c"], **call)
    assert "\n" not in str(caught.value)
    noise[0] = np.inf
    with pytest.raises(InputError, match=r"^pictures 1, 2 of 3 would be black"):
        pipe(["a", "b", "c"], **call | {"output_type": "latent"})
    assert np.isfinite(pipe("c", **call | {"latents": noise[2:]}).images).all()


def test_a_network_that_overflows_in_float16_says_which_type_does_not(parts: dict[str, Any], tmp_path: Path) -> None:
    unet = copy.deepcopy(parts["unet"])
    with torch.no_grad():  # what the first layer gives is more than float16 holds, and the norms take its size away
        unet.conv_in.weight.mul_(2e5)
        unet.conv_in.weight.clamp_(-6e4, 6e4)
    config = {"_class_name": "DDIMScheduler"}
    folder = save_pipeline(tmp_path / "w", **{**parts, "unet": unet}, scheduler_config=config)
    call: dict[str, Any] = {"seed": 1, "output_type": "np", "guidance_scale": 3.0, **STEPS}
    half, wide = (Pipeline.from_pretrained(folder, engine="torch", dtype=dtype) for dtype in ("fp16", "bf16"))
    with pytest.raises(InputError, match="overflows in float16; take bfloat16 or float32"):
        half("a red apple", **call)
    assert wide("a red apple", **call).images.std() > 0.01


def test_an_autoencoder_that_gives_no_numbers_is_said(parts: dict[str, Any]) -> None:
    vae = copy.deepcopy(parts["vae"])
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] = math.nan
    pipe = Pipeline.from_parts(**{**parts, "vae": vae}, scheduler_config={"_class_name": "DDIMScheduler"})
    with pytest.raises(InputError, match="the picture would be black: the pixels are no finite numbers; the weights"):
        pipe("a red apple", seed=1, **STEPS)


@pytest.mark.parametrize("kind", ["False", "True"])
def test_yes_and_no_of_numpys_kind_are_taken_and_can_be_saved(pipe: Pipeline, kind: str) -> None:
    said = {"vae_tiling": np.bool_(kind == "True"), "prompt_weights": np.bool_(kind == "True"), "batch": np.int64(2)}
    output = pipe("a", seed=1, **said, **STEPS)
    assert output.settings["vae_tiling"] is (kind == "True") and output.images[0].png()


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        (lambda told: {"latent": told["latents"]}, "returned a mapping of latent; it must return None or"),
        (lambda told: {**told, "prompt_embeds": 1}, "a mapping of latents, prompt_embeds; it must return None or"),
        (lambda told: told["latents"], r"returned tensor.* \(Tensor\); it must return None or"),
        (lambda _: [1], r"returned \[1\] \(list\); it must return None or {'latents': array}"),
        (lambda _: {"latents": None}, "returned as latents: missing; it must be an array"),
        (lambda _: {"latents": np.full((1, 4, 8, 8), "x")}, "has numbers of type <U1"),
    ],
)
def test_a_callback_that_returns_what_cannot_be_used_gets_one_line(pipe: Pipeline, returned: Any, line: str) -> None:
    with pytest.raises(InputError, match=line) as caught:
        pipe("a", callback_on_step_end=lambda *told: returned(told[3]), **STEPS)
    assert "\n" not in str(caught.value)


def test_a_callback_that_returns_latents_of_another_shape_gets_one_line(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="the callback returned latents of shape"):
        pipe("a", callback_on_step_end=lambda *_: {"latents": torch.zeros(1)}, **STEPS)


def test_parts_at_hand_make_the_pipeline_that_their_folder_makes(parts: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    here = Pipeline.from_parts(**parts, scheduler_config=config)
    opened = Pipeline.from_pretrained(folder, engine="torch")
    arguments = {"seed": 2, "output_type": "np", "guidance_scale": 3.0, **STEPS}
    # the folder holds fp16, so the two agree as far as that rounding
    np.testing.assert_allclose(
        here("a red apple", **arguments).images, opened("a red apple", **arguments).images, atol=0.02
    )
    assert here.terms.sampler == "ddim" and here.terms.size == 32


def test_parts_at_hand_can_be_perturbed_and_cached_as_those_of_a_folder(parts: dict[str, Any], folder: Path) -> None:
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    here = Pipeline.from_parts(**parts, scheduler_config=DDIMScheduler(**config))  # diffusers' own, or its config
    opened = Pipeline.from_pretrained(folder, engine="torch", dtype="float32")
    for given in ({"pag_scale": 2.0}, {"feature_cache": 2}):
        arguments = {"seed": 2, "output_type": "np", "guidance_scale": 3.0, **STEPS, **given}
        np.testing.assert_allclose(
            here("a red apple", **arguments).images, opened("a red apple", **arguments).images, atol=0.02
        )
    assert here.scheduler["_class_name"] == "DDIMScheduler"
    with pytest.raises(InputError, match="scheduler_config is a int; it must be"):
        Pipeline.from_parts(**parts, scheduler_config=3)


def test_another_sampler_never_clips_latents_that_the_config_does_not() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "variance_type": None, "solver_type": "midpoint"}
    for sampler in ("ddim", "ddpm", "unipc", "lcm"):
        assert plan_for(config, sampler).clip is None
    assert plan_for({**config, "clip_sample": True}, "ddim").clip == 1.0


def test_a_device_or_dtype_that_is_not_there_gets_one_line(folder: Path) -> None:
    with pytest.raises(InputError, match="device 'cuda:99' is not here"):
        Pipeline.from_pretrained(folder, device="cuda:99")
    with pytest.raises(InputError, match="dtype 'int8' is not known"):
        Pipeline.from_pretrained(folder, dtype="int8")
    with pytest.raises(InputError, match=r"device is \['cpu'\]; it must be a device's name"):
        Pipeline.from_pretrained(folder, device=["cpu"])
    with pytest.raises(InputError, match="device 'meta' holds no numbers"):
        Pipeline.from_pretrained(folder, device="meta")
    for wrong in ("cpu:nonsense", "cpu:"):
        with pytest.raises(InputError, match=f"device '{wrong}' is not here"):
            Pipeline.from_pretrained(folder, device=wrong)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"engine": np.array(["a", "b"])}, "engine array.* is not known; it can be one of: auto"),
        ({"compile": np.ones(2)}, "compile is array.*; it must be True or False"),
        ({"prediction_type": np.array(["a", "b"])}, "unknown prediction type array"),
        ({"device": np.ones((40, 9))}, "device is array.*…; it must be a device's name"),
        ({"path": np.ones((9, 9))}, "the weights' path is array.*…; it must be a path"),
        ({"loras": np.ones((40, 9))}, "loras is array.*…; it must be a list"),
        ({"loras": [{"path": "a", "weight": np.ones((20, 20))}]}, "a LoRA's weight is array.*…; it must be a number"),
        ({"loras": [{"path": "a", "name": np.ones((20, 20))}]}, "a LoRA's name is array.*…; it must be a string"),
    ],
)
def test_what_a_pipeline_cannot_be_opened_with_gets_one_line(folder: Path, given: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=line) as caught:
        Pipeline.from_pretrained(**{"path": folder} | given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_importing_latentgen_or_its_pipeline_imports_nothing_heavy() -> None:
    code = (
        "import sys, latentgen; light = set(sys.modules); latentgen.Pipeline; latentgen.cli if 0 else None;"
        "import latentgen.pipeline, latentgen.render, latentgen.cli;"
        "heavy = {'torch', 'diffusers', 'transformers', 'safetensors', 'tokenizers', 'accelerate', 'pydantic'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert not {'numpy', 'PIL', 'click', 'rich'} & light"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("path", [3, b"x", ["weights"], {}, True, "a" * 5000, "a\0b", "\ud800"])
def test_weights_at_what_is_no_path_get_one_line(path: Any) -> None:
    with pytest.raises(InputError, match=r"^the weights' path is ") as refused:
        Pipeline.from_pretrained(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200
