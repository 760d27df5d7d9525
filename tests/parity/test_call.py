"""What else a call may ask, as diffusers' pipelines name it (clip_skip, timesteps, eta), and what has other names."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentgen import InputError, Pipeline, hints
from latentgen.checkpoint import open_checkpoint
from latentgen.diffusion.noise import Noise
from latentgen.models.engine import EngineNote
from latentgen.models.onnx.places import skipping_path

TOLERANCE = 2e-3  # in [0, 1]
TIMES = [999, 850, 736, 645, 545]
COMMON: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 5.0, "output_type": "np"}


def latents(seeds: list[int]) -> torch.Tensor:
    return torch.from_numpy(Noise(seeds).initial((4, 8, 8)))


def theirs_of(folder: Path) -> Any:
    """diffusers' pipeline; it looks for a CLIP tower's last norm where transformers before 5 had it."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if not hasattr(pipe.text_encoder, "text_model"):
        object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    return pipe


@pytest.mark.parametrize("family", ["folder", "two", "xl"])
@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_layers_left_away_make_the_picture_of_diffusers(
    request: pytest.FixtureRequest, family: str, engine: str
) -> None:
    place = request.getfixturevalue(family)
    theirs = theirs_of(place)
    given = COMMON | {"latents": latents([3]), "height": 32, "width": 32, "negative_prompt": "blue rain"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineNote)
        ours = Pipeline.from_pretrained(place, engine=engine)
        whole = ours("a red apple", **given).images
        for skip in range(1, ours.terms.skippable + 1):
            expected = theirs("a red apple", clip_skip=skip, **given).images
            found = ours("a red apple", clip_skip=skip, **given)
            np.testing.assert_allclose(found.images, expected, atol=TOLERANCE)
            assert np.abs(found.images - whole).max() > TOLERANCE and found.settings["clip_skip"] == skip
        np.testing.assert_array_equal(ours("a red apple", clip_skip=0, **given).images, whole)
    with pytest.raises(InputError, match=f"can do without {ours.terms.skippable} layers at most"):
        ours("a red apple", clip_skip=ours.terms.skippable + 1)


def test_a_shorter_text_encoder_is_exported_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = COMMON | {"seed": 3, "clip_skip": 1}
    with pytest.warns(EngineNote, match="without the last 1 layer is exported once"):
        first = Pipeline.from_pretrained(folder)("a red apple", **given)
    assert first.settings["engine"] == "onnx"
    assert skipping_path(open_checkpoint(folder), "text_encoder", 1).is_file()
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineNote)
        again = Pipeline.from_pretrained(folder)("a red apple", **given)
    np.testing.assert_array_equal(again.images, first.images)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m", "ddpm"])
def test_steps_at_times_of_ones_own_make_the_picture_of_diffusers(folder: Path, sampler: str) -> None:
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

    kinds = {"euler": EulerDiscreteScheduler, "dpmpp-2m": DPMSolverMultistepScheduler, "ddpm": DDPMScheduler}
    theirs, ours = theirs_of(folder), Pipeline.from_pretrained(folder)
    theirs.scheduler = kinds[sampler].from_config(theirs.scheduler.config)
    given = {"guidance_scale": 5.0, "output_type": "np", "timesteps": TIMES}
    generators = [torch.Generator().manual_seed(11) for _ in range(2)]
    expected = theirs("a red apple", generator=generators[0], **given).images
    found = ours("a red apple", generator=generators[1], sampler=sampler, **given)
    np.testing.assert_allclose(found.images, expected, atol=TOLERANCE)
    assert found.settings["num_inference_steps"] == 5 and list(found.settings["timesteps"]) == TIMES
    usual = ours("a red apple", generator=torch.Generator().manual_seed(11), sampler=sampler, **COMMON).images
    assert np.abs(found.images - usual).max() > TOLERANCE


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_noise_that_ddim_puts_back_is_that_of_diffusers(folder: Path, eta: float) -> None:
    from diffusers import DDIMScheduler

    theirs, ours = theirs_of(folder), Pipeline.from_pretrained(folder)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    generators = [torch.Generator().manual_seed(11) for _ in range(3)]
    expected = theirs("a red apple", generator=generators[0], eta=eta, **COMMON).images
    found = ours("a red apple", generator=generators[1], eta=eta, sampler="ddim", **COMMON)
    np.testing.assert_allclose(found.images, expected, atol=TOLERANCE)
    without = ours("a red apple", generator=generators[2], sampler="ddim", **COMMON).images
    assert np.abs(found.images - without).max() > TOLERANCE and found.settings["eta"] == eta


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"clip_skip": -1}, "clip_skip is -1"),
        ({"clip_skip": 1.5}, "must be a whole number"),
        ({"timesteps": []}, "must fall from step to step"),
        ({"timesteps": 5}, "num_inference_steps is 3 and there are 1 timesteps"),
        ({"timesteps": [10, 20]}, "must fall from step to step"),
        ({"timesteps": [1200, 500, 20]}, "the schedule has 0 to 999"),
        ({"timesteps": [900, "x", 20]}, "a timestep is 'x'"),
        ({"eta": 0.5, "sampler": "euler"}, "only the sampler 'ddim' has one"),
        ({"eta": 2, "sampler": "ddim"}, "from 0 to 1"),
        ({"latents": "noise"}, "latents: 'noise' \\(str\\); it must be an array"),
        ({"callback_on_step_end": 3}, "it must be a function"),
        ({"weaker": "weights/old"}, "it must be a Pipeline"),
        ({"generator": 42}, "it must be a torch.Generator"),
        ({"seed": np.arange(3)}, "3 seeds for 1 pictures"),
        ({"seed": np.array(1.5)}, "must be a whole number"),
        ({"prompt": None, "prompt_embeds": np.zeros((0, 11, 32), "f")}, "hold no prompt"),
        ({"prompt": None, "prompt_embeds": np.zeros((1, 11, 7), "f")}, "must be \\(prompts, tokens, 16\\)"),
        ({"prompt": None, "prompt_embeds": np.zeros((1, 11), "f")}, "must be \\(prompts, tokens, 16\\)"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Pipeline.from_pretrained(folder)(**{"prompt": "a red apple", "num_inference_steps": 3, **wrong})


def test_pooled_embeddings_are_looked_at(xl: Path) -> None:
    pipe, states = Pipeline.from_pretrained(xl), np.zeros((1, 11, 36), "f")
    for pooled, said in (([[0.0] * 12], "it must be an array"), (np.zeros((2, 12), "f"), "must be \\(1, width\\)")):
        with pytest.raises(InputError, match=f"pooled_prompt_embeds.*{said}"):
            pipe(prompt_embeds=states, pooled_prompt_embeds=pooled, num_inference_steps=2)


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_pooled_embeddings_beside_a_prompt_are_used(xl: Path, engine: str) -> None:
    pipe = Pipeline.from_pretrained(xl, engine=engine, device="cpu")
    common = {"num_inference_steps": 2, "seed": 1, "output_type": "np", "guidance_scale": 3.0}
    pooled = np.random.default_rng(0).standard_normal((1, 12)).astype("f")
    plain = pipe("a red apple", **common).images
    for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        found = pipe("a red apple", **{name: pooled}, **common)
        assert np.abs(found.images - plain).max() > 1e-4 and found.settings["brought"] == [name]


def test_weights_that_read_no_pooled_embeddings_refuse_them(folder: Path) -> None:
    with pytest.raises(InputError, match="pooled_prompt_embeds are for Stable Diffusion XL"):
        Pipeline.from_pretrained(folder)("a", pooled_prompt_embeds=np.zeros((1, 16), "f"), num_inference_steps=2)


def test_seeds_may_be_an_array_and_a_callbacks_latents_of_another_kind(folder: Path) -> None:
    for engine in ("onnx", "torch"):
        pipe = Pipeline.from_pretrained(folder, engine=engine)
        call = {"num_inference_steps": 2, "output_type": "np"}
        one, other = (pipe(["a red apple"] * 2, seed=seed, **call) for seed in ([3, 4], torch.tensor([3, 4])))
        np.testing.assert_array_equal(one.images, other.images)
        given = {"onnx": torch.zeros(1, 4, 8, 8), "torch": np.zeros((1, 4, 8, 8))}[engine]
        steered = pipe("a red apple", seed=3, callback_on_step_end=lambda *_, given=given: {"latents": given}, **call)
        assert np.abs(steered.images - one.images[:1]).max() > 1e-2


# --- words of diffusers


def test_words_of_diffusers_that_change_nothing_are_taken(folder: Path) -> None:
    opening = {"safety_checker": None, "requires_safety_checker": False, "use_safetensors": True, "torch_dtype": None}
    pipe = Pipeline.from_pretrained(folder, **opening)
    calling = {"return_dict": True, "cross_attention_kwargs": None, "callback_on_step_end_tensor_inputs": ["latents"]}
    out = pipe("a red apple", seed=1, num_inference_steps=2, **calling)
    assert out[0] is out.images and len([*out]) == 1


def test_other_words_of_diffusers_get_one_line_that_says_ours(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder)
    for word, value, ours in (
        ("return_dict", False, "out.images is also out"),
        ("cross_attention_kwargs", {"scale": 0.5}, "set_lora_weight"),
        ("callback_on_step_end_tensor_inputs", ["latents", "prompt_embeds"], "latents alone"),
        ("callback", print, "callback_on_step_end"),
        ("image", np.zeros((4, 4)), "latents="),
        ("sigmas", [1.0], "timesteps="),
        ("prompt_2", "a", "the one prompt"),
    ):
        with pytest.raises(InputError, match=f"a call takes no {word}: .*{ours}"):
            pipe("a", num_inference_steps=2, **{word: value})
    for word, value, ours in (
        ("torch_dtype", torch.float16, "dtype="),
        ("variant", "fp16", "dtype="),
        ("safety_checker", print, "there is none"),
        ("local_files_only", True, "HF_HUB_OFFLINE"),
        ("scheduler", print, "sampler="),
    ):
        with pytest.raises(InputError, match=f"from_pretrained takes no {word}: .*{ours}"):
            Pipeline.from_pretrained(folder, **{word: value})  # type: ignore[arg-type]
    for word, ours in (("weight_name", "in the path"), ("adapter_name", "name=")):
        with pytest.raises(InputError, match=f"load_lora takes no {word}: .*{ours}"):
            pipe.load_lora("folder", **{word: "style"})  # type: ignore[arg-type]


def test_every_word_that_is_not_taken_has_its_line() -> None:
    assert not {word for words in hints.WORDS.values() for word in words} - hints.HINTS.keys()
    assert not hints.TAKEN.keys() - hints.HINTS.keys()


def test_words_that_nobody_knows_are_pythons_own_errors(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder)
    with pytest.raises(TypeError, match="unexpected keyword argument 'gudance_scale'"):
        pipe("a", gudance_scale=3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="from_pretrained got an unexpected keyword argument 'cfg_scale'"):
        Pipeline.from_pretrained(folder, cfg_scale=3.0)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match=r"a Pipeline has no 'nonsense'$"):
        pipe.nonsense()
    with pytest.raises(AttributeError, match=r"a Pipeline has no 'interupt'$"):
        pipe.interupt = True


def test_attributes_of_diffusers_say_ours_and_are_not_there(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder)
    for name, ours in {
        "to": "from_pretrained",
        "load_lora_weights": "load_lora",
        "set_progress_bar_config": "callback_on_step_end",
        "enable_vae_tiling": "vae_tiling=True",
        "enable_model_cpu_offload": "batch=",
        "device": "pipe.machine",
        "unet": "pipe.network",
    }.items():
        assert not hasattr(pipe, name)
        with pytest.raises(AttributeError, match=f"a Pipeline has no '{name}': .*{ours}"):
            getattr(pipe, name)
    with pytest.raises(AttributeError, match=r"interrupt = True"):
        pipe._guidance_scale = 0.0
    pipe.mine = "of its user's"
    assert copy.deepcopy(pipe).mine == pipe.mine  # no attribute is looked for in vain


def test_a_callback_stops_as_diffusers_says(folder: Path) -> None:
    seen = []

    def stop(stopped: Pipeline, index: int, *_: Any) -> None:
        seen.append(index)
        stopped._interrupt = index == 1

    out = Pipeline.from_pretrained(folder)("a", num_inference_steps=4, seed=1, callback_on_step_end=stop)
    assert seen == [0, 1] and out.settings["brought"] == ["callback_on_step_end"]
