"""Pipeline: seeds name pictures, callbacks steer, every output type agrees, and bad input gets one line."""

import copy
import json
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen import InputError, Output, Pipeline, __version__
from latentgen.checkpoint import save_pipeline
from latentgen.diffusion.sampling import OWN_STEPS, SAMPLERS
from latentgen.diffusion.schedule.reading import plan_for
from latentgen.image import read_settings
from latentgen.pipeline import PromptCut

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
]


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


def test_importing_latentgen_or_its_pipeline_imports_nothing_heavy() -> None:
    code = (
        "import sys, latentgen; light = set(sys.modules); latentgen.Pipeline; latentgen.cli if 0 else None;"
        "import latentgen.pipeline, latentgen.render, latentgen.cli;"
        "heavy = {'torch', 'diffusers', 'transformers', 'safetensors', 'tokenizers', 'accelerate', 'pydantic'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "assert not {'numpy', 'PIL', 'click', 'rich'} & light"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
