"""What is asked of a pipeline, checked: every prompt, size and number can be rendered, or one line says why not."""

import difflib
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np

from latentgen.checkpoint import Checkpoint, SingleFile, refuse_other_kinds
from latentgen.diffusion.schedule.plan import Plan, from_config
from latentgen.diffusion.schedule.reading import SCHEDULERS, is_known, known, plan_for
from latentgen.errors import InputError
from latentgen.values import check_array, finite, flag, kind, listed, shown, whole

Projected = tuple[float, float | None] | tuple[float, float | None, float]  # eta, norm and momentum
LARGEST_SEED = 2**64 - 1
LARGEST_SIDE = MOST_PICTURES = 2**16  # pixels, and pictures of a prompt: more than any memory holds
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Terms:
    """What a set of weights allows, and what it takes where nothing is said.

    factor: pixels to a latent along each side. channels: latent channels. size: pixels along each side of the pictures
    it was trained on. steps, guidance, sampler, interval: its own defaults. configs: the U-Net's and the autoencoder's.
    skippable: how many layers of the text encoder can be left away at most.
    """

    factor: int
    channels: int
    size: int
    sampler: str
    steps: int = 20
    guidance: float = 5.0
    interval: tuple[float, float] | None = None
    configs: tuple[Mapping[str, Any], Mapping[str, Any]] = field(default=({}, {}), repr=False, compare=False)
    skippable: int = 0

    @classmethod
    def read(
        cls,
        unet: Mapping[str, Any],
        vae: Mapping[str, Any],
        towers: Sequence[Mapping[str, Any]],
        sampler: str,
        extras: Mapping[str, Any] | None = None,
    ) -> "Terms":
        """From the networks' configs, the sampler their scheduler names, and what latentgen.json adds."""
        extras = extras or {}
        defaults = extras.get("defaults") or {}
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        trained = unet.get("sample_size") or 64
        latent = trained if isinstance(trained, int) else max(trained)
        return cls(
            factor=factor,
            channels=int(vae["latent_channels"]),
            size=int(extras.get("sample_size") or latent * factor),
            sampler=str(defaults.get("sampler") or sampler),
            steps=int(defaults.get("num_inference_steps") or cls.steps),
            guidance=float(defaults.get("guidance_scale", cls.guidance)),
            interval=_interval(defaults["guidance_interval"]) if defaults.get("guidance_interval") else None,
            configs=(unet, vae),
            # of Stable Diffusion XL's pair the last layers are not read anyhow
            skippable=min(int(tower.get("num_hidden_layers", 12)) for tower in towers) - (len(towers) > 1),
        )

    @property
    def told(self) -> int:
        """In how many numbers a guidance-distilled U-Net is told the guidance scale; 0 for others."""
        return int(self.configs[0].get("time_cond_proj_dim") or 0)


class Assumed(UserWarning):
    """What a checkpoint does not say, or says in words that are not known, and what is taken instead."""


def assumed(checkpoint: Checkpoint, prediction_type: str | None = None) -> list[str]:
    """A line for each thing that is assumed of a checkpoint. prediction_type: what is known of it already."""
    lines = []
    if prediction_type is None and isinstance(checkpoint, SingleFile) and checkpoint.assumes_v:
        lines.append(
            f"{checkpoint.folder}: nothing in it says what its U-Net predicts, and v is assumed; where pictures are "
            "noise or grey, say prediction_type='epsilon' (--prediction-type epsilon)"
        )
    scheduler = checkpoint.config("scheduler")
    if not is_known(scheduler):
        lines.append(
            f"{checkpoint.folder}: its scheduler {scheduler['_class_name']!r} is not known; its betas and prediction "
            "are read as DDIM's"
        )
    return lines


def terms_of(checkpoint: Checkpoint) -> Terms:
    """What a checkpoint allows, from its small files; an InputError where they are not whole or do not fit together."""
    unet, vae, towers = checkpoint.config("unet"), checkpoint.config("vae"), towers_of(checkpoint)
    try:
        sampler = from_config(known(checkpoint.config("scheduler"))).sampler
        terms = Terms.read(unet, vae, towers, sampler, checkpoint.extras)
        refuse_other_kinds(checkpoint.folder, unet, terms.channels)
        width = sum(int(tower.get("hidden_size", 0)) for tower in towers)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{checkpoint.folder}: a config cannot be used ({error!r}); put the published one") from error
    if checkpoint.has_second and any(terms.configs[1].get(name) for name in ("latents_mean", "latents_std")):
        raise InputError(
            f"{checkpoint.folder}: its autoencoder moves each channel (latents_mean), which is not read yet"
        )
    if unet.get("cross_attention_dim") != width:
        widths = f"{unet.get('cross_attention_dim')} where the text encoder gives {width}"
        raise InputError(f"{checkpoint.folder}: the U-Net attends to a width of {widths}; they are of different models")
    return terms


def towers_of(checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
    """The configs of its text encoder, or of both."""
    names = ("text_encoder", "text_encoder_2") if checkpoint.has_second else ("text_encoder",)
    return [checkpoint.config(name) for name in names]


@dataclass(frozen=True)
class Request:
    """A whole, checked order: `prompts`, `negatives` and `seeds` have one entry for each picture.

    said: whether a negative prompt was given at all, be it the empty text. told: as the terms'. timesteps: one for each
    step, instead of the sampler's own spacing. each: pictures of a prompt, side by side.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    rescale: float
    sampler: str
    height: int
    width: int
    prompt_weights: bool = True
    max_embeddings_multiples: int | None = None
    interval: tuple[float, float] | None = None
    projection: Projected | None = None
    annealing: tuple[float, float, float] | None = None
    pag: float = 0.0
    said: bool = False
    feature_cache: int = 1
    told: int = 0
    clip_skip: int = 0
    timesteps: tuple[float, ...] | None = None
    eta: float = 0.0
    each: int = 1

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def seldom(self) -> dict[str, Any]:
        """The settings that few pictures have, and that those without do not name."""
        told = {"condition_annealing": self.annealing, "clip_skip": self.clip_skip, "timesteps": self.timesteps}
        return {name: value for name, value in (told | {"eta": self.eta}).items() if value}

    @property
    def settings(self) -> dict[str, Any]:
        """What a picture's settings say of it; prompts and seeds as lists."""
        return {
            "prompt": list(self.prompts),
            "negative_prompt": list(self.negatives),
            "seed": list(self.seeds),
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "guidance_rescale": self.rescale,
            "guidance_interval": self.interval,
            "guidance_projection": self.projection,
            **self.seldom,
            "pag_scale": self.pag,
            "sampler": self.sampler,
            "height": self.height,
            "width": self.width,
            "prompt_weights": self.prompt_weights,
            "max_embeddings_multiples": self.max_embeddings_multiples,
        }

    @property
    def scale(self) -> float:
        """Of classifier-free guidance: 1, which is off, where the network itself is told the scale."""
        return 1.0 if self.told else max(self.guidance, 1.0)


def read_request(
    terms: Terms,
    samplers: Iterable[str],
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None = None,
    *,
    steps: SupportsIndex | None = None,
    guidance: SupportsFloat | None = None,
    rescale: SupportsFloat = 0.0,
    height: SupportsIndex | None = None,
    width: SupportsIndex | None = None,
    n: SupportsIndex = 1,
    seed: SupportsIndex | Iterable[SupportsIndex] | None = None,
    sampler: str | None = None,
    embedded: int | None = None,
    prompt_weights: bool | np.bool_ = True,
    max_embeddings_multiples: SupportsIndex | None = None,
    interval: Iterable[float] | None = None,
    projection: Iterable[float | None] | None = None,
    annealing: Iterable[float] | None = None,
    pag: SupportsFloat = 0.0,
    feature_cache: SupportsIndex = 1,
    clip_skip: SupportsIndex | None = None,
    timesteps: Iterable[float] | None = None,
    eta: SupportsFloat = 0.0,
) -> Request:
    """Check an order against what the weights allow, and fill in what was not said.

    Prompts come n times each, the copies of one prompt side by side. An integer seed gives picture k the seed
    seed + k; a list names each; None draws a fresh first one. embedded: how many prompts came as embeddings instead.
    Raises InputError, one line that says what is wrong and what would be right.
    """
    pictures = whole("num_images_per_prompt", n, 1, MOST_PICTURES)
    prompts = _prompts(prompt, embedded)
    negatives = _negatives(negative_prompt, len(prompts))
    count = len(prompts) * pictures
    if terms.told and any(negatives):
        raise InputError(
            "these weights are told the guidance scale and know no negative prompt; leave the negative prompt out"
        )
    walked = None if timesteps is None else _timesteps(listed(timesteps), steps)
    named = nearest_sampler(terms.sampler if sampler is None else sampler, samplers)
    return Request(
        prompts=tuple(text for text in prompts for _ in range(pictures)),
        negatives=tuple(text for text in negatives for _ in range(pictures)),
        seeds=_seeds(seed, count),
        steps=len(walked) if walked else whole("num_inference_steps", terms.steps if steps is None else steps, 1),
        guidance=finite("guidance_scale", terms.guidance if guidance is None else guidance, 0.0, math.inf),
        rescale=finite("guidance_rescale", rescale, 0.0, 1.0),
        sampler=named,
        height=_side("height", terms.size if height is None else height, terms.factor),
        width=_side("width", terms.size if width is None else width, terms.factor),
        prompt_weights=flag("prompt_weights", prompt_weights),
        max_embeddings_multiples=None
        if max_embeddings_multiples is None
        else whole("max_embeddings_multiples", max_embeddings_multiples, 1),
        interval=terms.interval if interval is None else _interval(listed(interval)),
        projection=None if projection is None else _projection(listed(projection)),
        annealing=None if annealing is None else _annealing(listed(annealing)),
        pag=finite("pag_scale", pag, 0.0, math.inf),
        said=negative_prompt is not None,
        feature_cache=whole("feature_cache", feature_cache, 1),
        told=terms.told,
        clip_skip=_skip(clip_skip, terms.skippable),
        timesteps=walked,
        eta=_eta(eta, named),
        each=pictures,
    )


def way_of(scheduler: Mapping[str, Any], request: Request) -> tuple[Plan, np.ndarray]:
    """How a request's pictures are denoised under a diffusers scheduler config: the plan, and its knots."""
    plan = plan_for(scheduler, request.sampler)
    if request.eta:
        plan = replace(plan, options={**plan.options, "eta": request.eta})
    return plan, plan.knots(request.steps, spacing=request.timesteps)


def check_call(output_type: str, callback: Any, **arrays: Any) -> None:
    """Raises InputError for a kind of output, a callback or arrays that are none; None is what was not brought."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type {shown(output_type)} is not known; it can be one of: {', '.join(OUTPUT_TYPES)}")
    if callback is not None and not callable(callback):
        raise InputError(f"callback_on_step_end is {kind(callback)}; it must be a function of four arguments")
    for name, value in arrays.items():
        if value is not None:
            check_array(name, value)


def _interval(parts: Sequence[float]) -> tuple[float, float] | None:
    """None for the whole of the way: guidance is then not bounded at all."""
    ends = tuple(finite("guidance_interval", part, 0.0, 1.0) for part in parts)
    if len(ends) != 2 or ends[0] >= ends[1]:
        raise InputError(
            f"guidance_interval is {shown(list(parts))}; it must be two parts of the way, as (0.1, 0.8): "
            "0 is noise, 1 clean"
        )
    return None if ends == (0.0, 1.0) else (ends[0], ends[1])


def _projection(parts: Sequence[float | None]) -> Projected:
    if len(parts) not in (2, 3) or parts[0] is None or (parts[-1] is None and len(parts) == 3):
        raise InputError(
            f"guidance_projection is {shown(list(parts))}; it must be (eta, norm) or (eta, norm, momentum), as "
            "(0, 15) or (0, None, -0.5)"
        )
    norm = None if parts[1] is None else finite("guidance_projection's norm", parts[1], 1e-6, math.inf)
    eta = finite("guidance_projection's eta", parts[0], 0.0, 1.0)
    return (eta, norm) if len(parts) == 2 else (eta, norm, finite("its momentum", parts[2], -0.99, 0.99))


def _timesteps(parts: Sequence[Any], steps: Any) -> tuple[float, ...]:
    """Falling ones; that the schedule has them is seen where it is known."""
    walked = tuple(finite("a timestep", part, 0.0, math.inf) for part in parts)
    if not walked or any(later >= earlier for earlier, later in pairwise(walked)):
        raise InputError(f"timesteps are {shown(list(parts))}; they must fall from step to step, as [999, 850, 736]")
    if steps is not None and whole("num_inference_steps", steps, 1) != len(walked):
        said = f"num_inference_steps is {shown(steps)} and there are {len(walked)} timesteps"
        raise InputError(f"{said}; leave the former away")
    return walked


def _skip(clip_skip: Any, most: int) -> int:
    """How many layers of the text encoder are left away, at most `most`."""
    skip = 0 if clip_skip is None else whole("clip_skip", clip_skip, 0)
    if skip > most:
        raise InputError(f"clip_skip is {shown(skip)}; this text encoder can do without {most} layers at most")
    return skip


def _eta(value: Any, sampler: str) -> float:
    eta = finite("eta", value, 0.0, 1.0)
    if eta and sampler != "ddim":
        raise InputError(f"eta is {eta:g}, and only the sampler 'ddim' has one; {sampler!r} is as noisy as it is")
    return eta


def _annealing(parts: Sequence[float]) -> tuple[float, float, float]:
    if len(parts) != 3:
        raise InputError(
            f"condition_annealing is {shown(list(parts))}; it must be (low, high, scale), as (0.6, 0.9, 0.1): "
            "the times between which noise of that scale fades from the condition"
        )
    low, high = (finite("condition_annealing's times", part, 0.0, 1.0) for part in parts[:2])
    if low >= high:
        raise InputError(f"condition_annealing's times are {low:g} and {high:g}; the lower one comes first")
    return low, high, finite("condition_annealing's scale", parts[2], 0.0, math.inf)


def nearest_sampler(name: str, samplers: Iterable[str]) -> str:
    """The name itself where it is known; else an InputError with the nearest, or those of diffusers' scheduler."""
    known = sorted(samplers)
    if isinstance(name, str) and name in known:
        return name
    near = [own for own in known if SCHEDULERS.get(own, {}).get("_class_name") in (str(name), type(name).__name__)]
    said = str(name).lower().replace("_", "-").replace("+", "p")
    near = near or difflib.get_close_matches(said, known, n=1, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise InputError(f"unknown sampler {shown(name)}; {hint}there are: {', '.join(known)}")


def _prompts(prompt: str | Sequence[str] | None, embedded: int | None) -> tuple[str, ...]:
    if embedded == 0:
        raise InputError("prompt_embeds hold no prompt; give one row or more")
    if embedded is not None:
        if prompt is not None:
            raise InputError("a prompt and prompt_embeds were both given; give one of them")
        return ("",) * embedded
    if isinstance(prompt, str):
        return _readable((prompt,))
    if prompt is None or not isinstance(prompt, Sequence):
        raise InputError(f"the prompt is {kind(prompt)}; it must be a string or a list of strings")
    if not prompt:
        raise InputError("the list of prompts is empty; give one prompt or more")
    for position, text in enumerate(prompt):
        if not isinstance(text, str):
            raise InputError(f"prompt {position + 1} is {kind(text)}; every prompt must be a string")
    return _readable(prompt)


def _negatives(negative: str | Sequence[str] | None, prompts: int) -> tuple[str, ...]:
    if negative is None or isinstance(negative, str):
        return _readable((negative or "",)) * prompts
    if not isinstance(negative, Sequence) or not all(isinstance(text, str) for text in negative):
        raise InputError(f"the negative prompt is {kind(negative)}; it must be a string or a list of strings")
    if len(negative) != prompts:
        raise InputError(f"{len(negative)} negative prompts for {prompts} prompts; give one for all, or one for each")
    return _readable(negative)


def _readable(texts: Sequence[str]) -> tuple[str, ...]:
    """The texts, if all are Unicode: what a shell hands on of other codes is not."""
    torn = next((text for text in texts if text.encode(errors="ignore").decode() != text), None)
    if torn is not None:
        raise InputError(f"the prompt {shown(torn)} is not valid Unicode; write it in UTF-8")
    return tuple(texts)


def _seeds(seed: Any, count: int) -> tuple[int, ...]:
    if seed is None:
        seed = secrets.randbits(32)
    if hasattr(seed, "tolist"):  # numbers of an array's or a tensor's kind
        seed = seed.tolist()
    if not isinstance(seed, Iterable) or isinstance(seed, bytes | bytearray | str):
        first = whole("seed", seed, 0)
        seeds = tuple(range(first, first + count))
    else:
        seeds = tuple(whole("a seed", each, 0) for each in seed)
        if len(seeds) != count:
            raise InputError(f"{len(seeds)} seeds for {count} pictures; give one for each, or a single first one")
    if max(seeds) > LARGEST_SEED:
        raise InputError(f"seed {shown(max(seeds))} is too large; a seed is a whole number from 0 to 2**64 − 1")
    return seeds


def _side(name: str, value: Any, factor: int) -> int:
    size = whole(name, value, 1, LARGEST_SIDE)
    if size % factor:
        low, high = size // factor * factor, (size // factor + 1) * factor
        near = f"{low} and {high}" if low else str(high)
        raise InputError(f"{name} {size} is not a multiple of {factor}; the nearest that are: {near}")
    return size
