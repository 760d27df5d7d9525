"""Pipeline: a prompt becomes a condition, noise becomes latents under it, and latents become pixels.

Ho et al. 2020 (diffusion), Rombach et al. 2022 (in the latents of an autoencoder, conditioned by cross-attention),
Ho & Salimans 2022 (classifier-free guidance). `Pipeline.__call__` is the method: encode, draw, denoise, decode.
Argument names are those of diffusers' StableDiffusionPipeline; torch is imported when weights are loaded, not before.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, SupportsFloat, SupportsIndex

import numpy as np
import PIL

from latentgen import __version__
from latentgen.checkpoint import check_prediction, find, open_checkpoint
from latentgen.conditions import PromptCut as PromptCut
from latentgen.conditions import conditions_of
from latentgen.diffusion.array import Array
from latentgen.diffusion.denoiser import Denoiser, Network
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.sampling import SAMPLERS
from latentgen.diffusion.schedule.plan import from_config
from latentgen.diffusion.schedule.reading import as_pipelines_take, config_of, known
from latentgen.errors import InputError
from latentgen.guiding import check_weaker, computing, engine_of, guided_as, snapshot_of, steered, under_way, walks_of
from latentgen.image import Picture, to_bytes
from latentgen.models.engine import Engine, open_engine
from latentgen.models.finite import check_finite
from latentgen.models.lora import Loras, TakesLoras
from latentgen.models.memory import caching, decoded, in_groups, need_of, of_one_walk, pictures_at_a_time, tile_of
from latentgen.models.words import TakesWords
from latentgen.output import Output, as_tensor, identity, on_host, picture_settings
from latentgen.request import Assumed, Request, Terms, assumed, check_call, read_request, way_of
from latentgen.request import terms_of as terms_of
from latentgen.values import finite, flag

if TYPE_CHECKING:
    from latentgen.models.latent import Latent
    from latentgen.models.onnx.session import OnnxLatent
    from latentgen.models.onnx.text import OnnxText, TwoOnnxTexts
    from latentgen.models.text import TextEncoder, TwoTextEncoders

OnStepEnd = Callable[["Pipeline", int, float, dict[str, Array]], dict[str, Array] | None]


@dataclass(eq=False)
class Pipeline(TakesLoras, TakesWords):
    """A text encoder, a denoising network and an autoencoder, with the schedule they were trained in.

    scheduler: a diffusers scheduler config. terms: what the weights allow and their defaults. weights, machine: what
    is said of them in the settings.
    """

    text: "TextEncoder | TwoTextEncoders | OnnxText | TwoOnnxTexts"
    network: Network
    latent: "Latent | OnnxLatent"
    scheduler: Mapping[str, Any]
    terms: Terms
    weights: Mapping[str, Any] | None = None
    machine: Mapping[str, Any] | None = None
    loras: Loras | None = None
    perturbed: Network | None = None
    cached: Callable[[int], Network] | None = None
    words: list[dict[str, Any]] = field(default_factory=list)  # the new words it was taught, as the settings say them
    told: Mapping[str, Any] = field(default_factory=dict)  # tokenizer, prediction_type: what it was opened with
    _torch: Callable[[], Engine] | None = field(default=None, repr=False)  # what the engine here cannot do, this can

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
        tokenizer: str | Path | None = None,
        prediction_type: str | None = None,
        engine: str = "auto",
        threads: SupportsIndex | None = None,
        loras: Sequence[str | Path | Mapping[str, Any]] = (),
        compile: bool = False,
        **others: Never,
    ) -> "Pipeline":
        """Open a Stable Diffusion 1, 2 or XL checkpoint, or (None) the embedded default.

        path: a weights folder in diffusers' layout, a single .safetensors file in the original one, or a hub id.
        device: where it runs; None is the first GPU, else the CPU. dtype: what it computes in; None is float16 on a
        GPU and float32 on a CPU, to which half-precision storage is widened. tokenizer: a CLIP tokenizer's folder, for
        a single file, which holds none. prediction_type: "epsilon" or "v_prediction" instead of what the scheduler's
        config says; of single files of Stable Diffusion 2 nothing tells, and v is assumed. engine: "onnx" (ONNX
        Runtime, on a CPU, arrays are NumPy's), "torch", or "auto", which is onnx where it can run this and torch where
        it cannot, or once a LoRA or perturbed attention is asked for. threads: of a CPU; None is one for each core;
        those of torch are the process's, and a picture's settings say how many there were.
        loras: to open it with, each a path or `load_lora`'s arguments; so "onnx" can run them too, fused into graphs of
        their own, whose export is kept in the cache. compile: torch.compile of the U-Net, in the torch engine.
        others: arguments of diffusers that change nothing here (hints.py). Raises InputError with one line.
        """
        _take("from_pretrained", others)
        checkpoint = open_checkpoint(find(path), tokenizer=tokenizer, verify=False)  # the engine does
        terms = terms_of(checkpoint)
        if prediction_type is not None:
            Prediction(prediction_type)  # known, before anything is loaded
            check_prediction(checkpoint.folder, checkpoint.config("scheduler"), prediction_type)
        for line in assumed(checkpoint, prediction_type):
            warnings.warn(line, Assumed, stacklevel=2)
        where: dict[str, Any] = {"dtype": dtype, "threads": threads, "loras": loras}
        opened = open_engine(checkpoint, engine, device=device, compile=compile, **where)
        pipe = cls(
            **vars(opened),
            scheduler=as_pipelines_take(checkpoint.config("scheduler"), checkpoint.has_second)
            | ({"prediction_type": prediction_type} if prediction_type else {}),
            terms=terms,
            weights=identity(checkpoint, path),
            told=({} if tokenizer is None else {"tokenizer": Path(tokenizer).as_posix()})
            | ({} if prediction_type is None else {"prediction_type": prediction_type}),
        )
        if engine == "auto" and opened.machine["engine"] == "onnx":
            pipe._torch = partial(open_engine, checkpoint, "torch", device="cpu", **where)
        return pipe

    @classmethod
    def from_parts(
        cls,
        *,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        unet: Any,
        scheduler_config: Any,
        extras: Mapping[str, Any] | None = None,
    ) -> "Pipeline":
        """From objects at hand (a training run's, say), as `checkpoint.save_pipeline` takes them.

        scheduler_config: or diffusers' scheduler itself. extras: what latentgen.json would hold. The modules are in
        eval mode, on one device; no gradient is recorded.
        """
        from latentgen.models.feature_cache import feature_caches
        from latentgen.models.latent import Latent
        from latentgen.models.lora.layers import module_loras
        from latentgen.models.network import perturbed_network, unet_network
        from latentgen.models.text import TextEncoder

        scheduler = config_of(scheduler_config)
        sampler = from_config(known(scheduler)).sampler
        terms = Terms.read(unet.config, vae.config, [text_encoder.config.to_dict()], sampler, extras)
        network = unet_network(unet, gradients=False)
        return cls(
            TextEncoder(tokenizer, text_encoder),
            network,
            Latent(vae),
            scheduler,
            terms,
            loras=module_loras(unet=unet, text_encoder=text_encoder),
            perturbed=perturbed_network(unet),
            cached=feature_caches(network),
        )

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: SupportsIndex | None = None,
        guidance_scale: SupportsFloat | None = None,
        guidance_rescale: SupportsFloat = 0.0,
        guidance_interval: Iterable[float] | None = None,
        guidance_projection: Iterable[float | None] | None = None,
        condition_annealing: Iterable[float] | None = None,
        pag_scale: SupportsFloat = 0.0,
        weaker: "Pipeline | None" = None,
        weaker_scale: SupportsFloat = 2.0,
        height: SupportsIndex | None = None,
        width: SupportsIndex | None = None,
        num_images_per_prompt: SupportsIndex = 1,
        seed: SupportsIndex | Iterable[SupportsIndex] | None = None,
        sampler: str | None = None,
        generator: Any = None,
        latents: Array | None = None,
        prompt_embeds: Array | None = None,
        negative_prompt_embeds: Array | None = None,
        pooled_prompt_embeds: Array | None = None,
        negative_pooled_prompt_embeds: Array | None = None,
        prompt_weights: bool | np.bool_ = True,
        max_embeddings_multiples: SupportsIndex | None = None,
        clip_skip: SupportsIndex | None = None,
        timesteps: Iterable[float] | None = None,
        eta: SupportsFloat = 0.0,
        batch: SupportsIndex | str = "auto",
        vae_tiling: bool | np.bool_ | None = None,
        feature_cache: SupportsIndex = 1,
        output_type: str = "pil",
        callback_on_step_end: OnStepEnd | None = None,
        **others: Never,
    ) -> Output:
        """Render one picture for each prompt, times num_images_per_prompt.

        What is not said is taken from the weights' own defaults. guidance_scale: w of Ho & Salimans as diffusers counts
        it; 1 or less is off. guidance_rescale: phi of Lin et al. 2023. guidance_interval: the part of the steps, from 0
        (noise) to 1 (clean), in which guidance acts (Kynkäänniemi et al. 2024). guidance_projection: eta and norm, or
        eta, norm and momentum, of adaptive projected guidance (Sadat et al. 2025). condition_annealing: (low, high,
        scale) of CADS (Sadat et al. 2024), which noises the condition at times above low, wholly above high, so that
        pictures of a prompt differ more. pag_scale: perturbed-attention guidance in the middle block (Ahn et al. 2024);
        0 is off. weaker, weaker_scale: autoguidance away from a weaker snapshot of the same model (Karras et al. 2024),
        1 being off; it is shown this pipeline's condition. negative_prompt: None is none, which for Stable Diffusion XL
        is all zeros, and "" the empty text, encoded. height, width: pixels, multiples of the latent factor. seed: s
        gives picture k the seed s + k, a list names each, None draws fresh ones, reported in `seeds`; picture k is the
        picture of its own seed rendered alone. sampler: a name of `diffusion.sampling.SAMPLERS`. generator: torch
        generators instead of a seed, drawn from as diffusers does. latents: unit noise (B, C, h, w) to start from.
        prompt_embeds, negative_prompt_embeds: states (P, L, D) instead of texts; for Stable Diffusion XL with
        pooled_prompt_embeds, negative_pooled_prompt_embeds (P, D). prompt_weights: read `(word:1.3)`, `[word]` and
        BREAK as the web UI does (models/prompt.py); False takes brackets as text, as diffusers does.
        max_embeddings_multiples: how many contexts long a prompt may be (1 cuts it as diffusers does); None is as long
        as it is, each chunk of a context encoded on its own. clip_skip: how many layers at its end the text encoder
        reads the prompt without; as in diffusers the negative prompt is read with all. timesteps: those to denoise at,
        falling, one for each step (Sabour et al. 2024), instead of the sampler's own. eta: of the noise that DDIM puts
        back, 0 to 1. batch: pictures the networks compute at a time, or "auto", as many as the free memory holds; the
        last bits of a picture can depend on it. vae_tiling: decode in tiles with blended seams; None does so above
        1536·1024 pixels. feature_cache: n computes the deep layers at every n-th step only (Ma et al. 2024); 1 is off.
        output_type: "pil", "np" (B, H, W, 3), "pt" (B, 3, H, W), both in [0, 1], or "latent" (B, C, h, w).
        callback_on_step_end(pipe, index, time, {"latents": x}) is called after each step and may return other latents.
        others: arguments of diffusers that change nothing here (hints.py).
        Raises InputError, one line, for what cannot be rendered; warns (PromptCut) of words that are cut.
        """
        arrays = {"latents": latents, "prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        arrays |= {"pooled_prompt_embeds": pooled_prompt_embeds}
        arrays |= {"negative_pooled_prompt_embeds": negative_pooled_prompt_embeds}
        _take("a call", others)
        check_call(output_type, callback_on_step_end, **arrays)
        tiling = None if vae_tiling is None else flag("vae_tiling", vae_tiling)
        if latents is not None and height is None and width is None and len(latents.shape) == 4:
            height, width = (int(side) * self.terms.factor for side in latents.shape[2:])
        request = read_request(
            self.terms,
            SAMPLERS,
            prompt,
            negative_prompt,
            steps=num_inference_steps,
            guidance=guidance_scale,
            rescale=guidance_rescale,
            height=height,
            width=width,
            n=num_images_per_prompt,
            seed=seed,
            sampler=sampler,
            embedded=None if prompt_embeds is None else (*prompt_embeds.shape, 1)[0],
            prompt_weights=prompt_weights,
            max_embeddings_multiples=max_embeddings_multiples,
            interval=guidance_interval,
            projection=guidance_projection,
            annealing=condition_annealing,
            pag=pag_scale,
            feature_cache=feature_cache,
            clip_skip=clip_skip,
            timesteps=timesteps,
            eta=eta,
        )
        pictures_at_a_time(batch, 1, 1)  # that it is a number or "auto", before another engine is opened
        weaker_scale = finite("weaker_scale", weaker_scale, 0.0, math.inf)
        if weaker is not None:
            check_weaker(weaker, self)
        plan, knots = way_of(self.scheduler, request)
        noise = self._noise(request, generator, seed)
        cached = request.feature_cache > 1
        lacking = (request.pag and self.perturbed is None) or (cached and self.cached is None)
        if lacking or (request.clip_skip and not self.text.skips):
            self._use_torch()
        if weaker is not None and engine_of(weaker) != engine_of(self):
            self._use_torch()
            weaker._use_torch()
        given = (prompt_embeds, pooled_prompt_embeds), (negative_prompt_embeds, negative_pooled_prompt_embeds)
        own = copy(self)  # its parts as they are now: a callback, or another thread, may have it change engines
        at_a_time = own.at_a_time(request, batch)
        condition, negative = conditions_of(own, request, *given)
        x = own._draw(request, noise, latents) * float(plan.initial_scale(knots[0]))
        rows = at_a_time * (1 if negative is None else 2)
        network = caching(own.cached, request.feature_cache) if cached else of_one_walk(own.network)
        denoiser = Denoiser(in_groups(network, rows), plan.schedule, plan.prediction)
        snapshot = None if weaker is None else snapshot_of(weaker, own, rows), weaker_scale
        told = (condition, negative), rows, noise, own.perturbed, snapshot
        denoise = guided_as(request, plan, knots, denoiser, *told)
        with under_way(self) as walk:
            x, turned = steered(self, walk, plan, denoise, x, knots, noise, callback_on_step_end)
        check_finite(x, "latents", (own.machine or {}).get("dtype"))
        brought = {"generator": generator, "weaker": weaker} | arrays
        if turned:
            brought["interrupt" if callback_on_step_end is None else "callback_on_step_end"] = True
        settings = own._settings(request, sorted(key for key, value in brought.items() if value is not None))
        settings |= {"at_a_time": at_a_time} if at_a_time < len(request) else {}
        settings |= {} if tiling is None else {"vae_tiling": tiling}
        settings |= {"feature_cache": request.feature_cache} if cached else {}
        return own._decode(x, request, output_type, settings, at_a_time)

    def at_a_time(self, request: Request, batch: SupportsIndex | str = "auto") -> int:
        """How many pictures the networks compute at a time: a number, or "auto", as the free memory allows."""
        height, width = request.height // self.terms.factor, request.width // self.terms.factor
        need = need_of(*self.terms.configs, height, width, request.scale > 1, self.text.length)
        return pictures_at_a_time(batch, need, len(request), self.latent.device)

    def _noise(self, request: Request, generator: Any, seed: Any) -> Any:
        """Where randomness comes from: one stream for each picture's seed, or the caller's torch generators."""
        if generator is None:
            return Noise(request.seeds)
        if seed is not None:
            raise InputError("a seed and a generator were both given; give one of them")
        from latentgen.models.latent import GeneratorNoise

        return GeneratorNoise.of(generator, len(request))

    def _draw(self, request: Request, noise: Any, latents: Array | None) -> Array:
        """Standard normal latents (B, C, height/factor, width/factor), drawn on the host or brought."""
        factor = self.terms.factor
        shape = (self.terms.channels, request.height // factor, request.width // factor)
        if latents is None:
            return self.latent.array(noise.initial(shape))
        if tuple(latents.shape) != (len(request), *shape):
            raise InputError(f"latents have shape {tuple(latents.shape)}; it must be {(len(request), *shape)}")
        return self.latent.array(latents)

    def _decode(self, x: Array, request: Request, output_type: str, settings: dict[str, Any], at_a_time: int) -> Output:
        """Latents as the kind of picture that was asked for, with the settings that make it again."""
        if output_type == "latent":
            return Output(x, request.seeds, settings)
        tiling, sides = settings.get("vae_tiling"), (request.height, request.width)
        tile = tile_of(self.terms.configs[1], self.terms.factor, *sides, tiling)
        parts = decoded(self.latent.decode, x, at_a_time, tile)  # (B', 3, H, W) in [0, 1]
        groups = (check_finite(pixels, "pixels") for pixels in parts)
        if output_type == "pt":
            return Output(as_tensor(groups), request.seeds, settings)
        if output_type == "np":
            return Output(np.concatenate([on_host(pixels) for pixels in groups]), request.seeds, settings)
        rows = enumerate(row for pixels in groups for row in to_bytes(on_host(pixels)))
        return Output([Picture.of(row, picture_settings(settings, k)) for k, row in rows], request.seeds, settings)

    def _settings(self, request: Request, brought: list[str]) -> dict[str, Any]:
        return {
            **request.settings,
            **({"negative_said": True} if request.said and not all(request.negatives) else {}),
            "weights": self.weights,
            **self.told,
            "latentgen": __version__,
            "pillow": PIL.__version__,
            **computing(self),
            **({"loras": self.loras.settings()} if self.loras is not None and self.loras.loaded else {}),
            **({"words": list(self.words)} if self.words else {}),
            **({"brought": brought} if brought else {}),
        }

    def _use_torch(self) -> None:
        """Go on with torch, where the engine was left to be chosen and what is asked for takes torch."""
        if self._torch is None:
            return
        from latentgen.models.loading import one_at_a_time

        with one_at_a_time():
            if self._torch is not None:  # no other thread was here first
                vars(self).update({**vars(self._torch()), "_torch": None})  # at once, whoever takes a copy

    def _loras(self) -> Loras:
        if self.loras is None:
            self._use_torch()
        return super()._loras()

    def _loaded(self) -> Loras:
        fused = (self.machine or {}).get("loras")
        return Loras({}) if self.loras is None and not fused else self._loras()

    @property
    def interrupt(self) -> bool:
        """Set to True, a call ends after its step: the own one from a callback, from another thread all under way."""
        return any(walk.interrupted for walk in walks_of(self))

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        for walk in walks_of(self):
            walk.interrupted = bool(value)

    _interrupt = interrupt  # as diffusers' callbacks write it

    if not TYPE_CHECKING:  # by themselves checkers know which attributes there are

        def __setattr__(self, name: str, value: Any) -> None:
            if not hasattr(type(self), name) and name not in self.__dataclass_fields__:
                from latentgen.hints import HINTS

                if name in HINTS or get_close_matches(name, ["interrupt"], cutoff=0.8):  # what would do nothing here
                    self.__getattr__(name)
            super().__setattr__(name, value)

        def __getattr__(self, name: str) -> Never:
            from latentgen.hints import lacking

            raise AttributeError(lacking(name), name=name, obj=self)

    def __copy__(self) -> "Pipeline":
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        return made


def _take(place: str, others: Mapping[str, Any]) -> None:
    """What is the same here as in diffusers passes; the rest is said."""
    if others:
        from latentgen.hints import take

        take(place, others)
