"""Pipeline: a prompt becomes a condition, noise becomes latents under it, and latents become pixels.

Ho et al. 2020 (diffusion), Rombach et al. 2022 (in the latents of an autoencoder, conditioned by cross-attention),
Ho & Salimans 2022 (classifier-free guidance). `Pipeline.__call__` is the method: encode, draw, denoise, decode.
Argument names are those of diffusers' StableDiffusionPipeline; torch is imported when weights are loaded, not before.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL

from latentgen import __version__
from latentgen.checkpoint import find, open_checkpoint
from latentgen.diffusion.array import Array
from latentgen.diffusion.denoiser import Condition, Denoiser, Network, told_scale
from latentgen.diffusion.noise import Noise
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.sampling import SAMPLERS
from latentgen.diffusion.schedule.plan import from_config
from latentgen.diffusion.schedule.reading import as_pipelines_take, known
from latentgen.errors import InputError
from latentgen.guiding import engine_of, guided_as, snapshot_of, steered
from latentgen.image import Picture, to_bytes
from latentgen.models.engine import Engine, open_engine
from latentgen.models.finite import check_finite
from latentgen.models.lengths import check_embeds, encoded_apart, of_one_length
from latentgen.models.lora import Loras, TakesLoras
from latentgen.models.memory import caching, decoded, in_groups, need_of, of_one_walk, pictures_at_a_time, tile_of
from latentgen.models.words import TakesWords
from latentgen.output import Output, as_tensor, identity, on_host, picture_settings
from latentgen.request import Assumed, Projected, Request, Terms, assumed, check_call, read_request, way_of
from latentgen.request import terms_of as terms_of

if TYPE_CHECKING:
    from latentgen.models.latent import Latent
    from latentgen.models.onnx.session import OnnxLatent
    from latentgen.models.onnx.text import OnnxText, TwoOnnxTexts
    from latentgen.models.text import TextEncoder, TwoTextEncoders

Given = tuple[Any, Any]  # states and pooled states that somebody brought, or None
OnStepEnd = Callable[["Pipeline", int, float, dict[str, Array]], dict[str, Array] | None]


class PromptCut(UserWarning):
    """A prompt is longer than what may be read of it: the message says which words are not seen."""


@dataclass(eq=False)
class Pipeline(TakesLoras, TakesWords):
    """A text encoder, a denoising network and an autoencoder, with the schedule they were trained in.

    scheduler: a diffusers scheduler config. terms: what the weights allow and their defaults. weights, machine: what
    is said of them in the settings. `interrupt = True`, set from a callback, ends the run after that step.
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
    interrupt: bool = False
    words: list[dict[str, Any]] = field(default_factory=list)  # the new words it was taught, as the settings say them
    told: Mapping[str, Any] = field(default_factory=dict)  # tokenizer, prediction_type: what it was opened with
    _steered: bool = field(default=False, repr=False)  # whether a callback changed the course of the last call
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
        threads: int | None = None,
        loras: Sequence[Mapping[str, Any]] = (),
        compile: bool = False,
    ) -> "Pipeline":
        """Open a Stable Diffusion 1, 2 or XL checkpoint, or (None) the embedded default.

        path: a weights folder in diffusers' layout, a single .safetensors file in the original one, or a hub id.
        device: where it runs; None is the first GPU, else the CPU. dtype: what it computes in; None is float16 on a
        GPU and float32 on a CPU, to which half-precision storage is widened. tokenizer: a CLIP tokenizer's folder, for
        a single file, which holds none. prediction_type: "epsilon" or "v_prediction" instead of what the scheduler's
        config says; of single files of Stable Diffusion 2 nothing tells, and v is assumed. engine: "onnx" (ONNX
        Runtime, on a CPU, arrays are NumPy's), "torch", or "auto", which is onnx where it can run this and torch where
        it cannot, or once a LoRA or perturbed attention is asked for. threads: of a CPU; None is one for each core.
        loras: to open it with, each the arguments of `load_lora`; so "onnx" can run them too, fused into graphs of
        their own, whose export is kept in the cache. compile: torch.compile of the U-Net, in the torch engine.
        Raises InputError with one line.
        """
        checkpoint = open_checkpoint(find(path), tokenizer=tokenizer, verify=False)  # the engine does
        terms = terms_of(checkpoint)
        if prediction_type is not None:
            Prediction(prediction_type)  # known, before anything is loaded
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
        scheduler_config: Mapping[str, Any],
        extras: Mapping[str, Any] | None = None,
    ) -> "Pipeline":
        """From objects at hand (a training run's, say), as `checkpoint.save_pipeline` takes them.

        extras: what latentgen.json would hold. The modules are in eval mode, on one device; no gradient is recorded.
        """
        from latentgen.models.latent import Latent
        from latentgen.models.lora.layers import module_loras
        from latentgen.models.network import unet_network
        from latentgen.models.text import TextEncoder

        sampler = from_config(known(scheduler_config)).sampler
        terms = Terms.read(unet.config, vae.config, [text_encoder.config.to_dict()], sampler, extras)
        network = unet_network(unet, gradients=False)
        loras = module_loras(unet=unet, text_encoder=text_encoder)
        return cls(TextEncoder(tokenizer, text_encoder), network, Latent(vae), scheduler_config, terms, loras=loras)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_projection: Projected | None = None,
        condition_annealing: tuple[float, float, float] | None = None,
        pag_scale: float = 0.0,
        weaker: "Pipeline | None" = None,
        weaker_scale: float = 2.0,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        sampler: str | None = None,
        generator: Any = None,
        latents: Array | None = None,
        prompt_embeds: Array | None = None,
        negative_prompt_embeds: Array | None = None,
        pooled_prompt_embeds: Array | None = None,
        negative_pooled_prompt_embeds: Array | None = None,
        prompt_weights: bool = True,
        max_embeddings_multiples: int | None = None,
        clip_skip: int | None = None,
        timesteps: Sequence[float] | None = None,
        eta: float = 0.0,
        batch: int | str = "auto",
        vae_tiling: bool | None = None,
        feature_cache: int = 1,
        output_type: str = "pil",
        callback_on_step_end: OnStepEnd | None = None,
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
        Raises InputError, one line, for what cannot be rendered; warns (PromptCut) of words that are cut.
        """
        arrays = {"latents": latents, "prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
        arrays |= {"pooled_prompt_embeds": pooled_prompt_embeds}
        arrays |= {"negative_pooled_prompt_embeds": negative_pooled_prompt_embeds}
        check_call(output_type, callback_on_step_end, **arrays)
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
            embedded=None if prompt_embeds is None else len(prompt_embeds),
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
        cached = request.feature_cache > 1
        lacking = (request.pag and self.perturbed is None) or (cached and self.cached is None)
        if lacking or (request.clip_skip and not self.text.skips):
            self._use_torch()
        if isinstance(weaker, Pipeline) and engine_of(weaker) != engine_of(self):
            self._use_torch()
            weaker._use_torch()
        at_a_time = self.at_a_time(request, batch)
        plan, knots = way_of(self.scheduler, request)
        noise = self._noise(request, generator, seed)
        self.interrupt = self._steered = False

        given = (prompt_embeds, pooled_prompt_embeds), (negative_prompt_embeds, negative_pooled_prompt_embeds)
        condition, negative = self._encode(request, *given)
        x = self._draw(request, noise, latents) * float(plan.initial_scale(knots[0]))
        rows = at_a_time * (1 if negative is None else 2)
        network = caching(self.cached, request.feature_cache) if cached else of_one_walk(self.network)
        denoiser = Denoiser(in_groups(network, rows), plan.schedule, plan.prediction)
        snapshot = None if weaker is None else snapshot_of(weaker, self, rows), weaker_scale
        told = (condition, negative), rows, noise, self.perturbed, snapshot
        x = steered(self, plan, guided_as(request, plan, knots, denoiser, *told), x, knots, noise, callback_on_step_end)
        check_finite(x, "latents", (self.machine or {}).get("dtype"))
        brought = {"generator": generator, "weaker": weaker, "callback_on_step_end": self._steered or None} | arrays
        settings = self._settings(request, sorted(key for key, value in brought.items() if value is not None))
        settings |= {"at_a_time": at_a_time} if at_a_time < len(request) else {}
        settings |= {} if vae_tiling is None else {"vae_tiling": vae_tiling}
        settings |= {"feature_cache": feature_cache} if cached else {}
        return self._decode(x, request, output_type, settings, at_a_time)

    def at_a_time(self, request: Request, batch: int | str = "auto") -> int:
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

    def _encode(self, request: Request, given: Given, given_negative: Given) -> tuple[Condition, Condition | None]:
        """The condition (B, L, D) and, where guidance is on, the one to be guided away from."""
        for text in dict.fromkeys((*request.prompts, *request.negatives)):
            self._say_what_is_cut(text, request)
        condition = self._states(request, request.prompts, given, "prompt_embeds", request.clip_skip)
        if request.told:
            guided = np.tile(told_scale(request.guidance, request.told), (len(request), 1))
            condition = replace(condition, guided=self.latent.array(guided))
        if request.scale <= 1:
            return condition, None
        if given_negative[0] is not None and any(request.negatives):
            raise InputError("a negative prompt and negative_prompt_embeds were both given; give one of them")
        negative = self._states(request, request.negatives, given_negative, "negative_prompt_embeds")
        if given_negative[0] is None and not request.said and hasattr(self.text, "empty"):
            empty = self.text.empty(negative)
            brought = empty.pooled if given_negative[1] is None else negative.pooled
            negative = replace(negative, states=empty.states, pooled=brought)
        return of_one_length(condition, negative)

    def _states(self, request: Request, prompts: Sequence[str], given: Given, name: str, skip: int = 0) -> Condition:
        states, pooled = given
        width, count = self.terms.configs[0].get("cross_attention_dim"), len(request)
        check_embeds(name, count // request.each, width, states, pooled)
        states, pooled = (None if e is None else e[[k * len(e) // count for k in range(count)]] for e in given)
        if states is None:
            how: dict[str, Any] = {"weights": request.prompt_weights, "limit": request.max_embeddings_multiples}
            chunks = {text: len(self.text.lay(text, **how).chunks) for text in dict.fromkeys(prompts)}
            read = partial(self.text.encode, **how, skip=skip)
            told = encoded_apart(read, prompts, [chunks[text] for text in prompts])
            told = told if pooled is None else self.text.given(told.states, pooled)
        else:
            told = self.text.given(states, pooled)
        if told.pooled is None:
            return told
        size = (request.height, request.width)
        sizes = np.tile(np.array([*size, 0, 0, *size], dtype=np.float32), (len(request), 1))
        return replace(told, sizes=self.latent.array(sizes))

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
            "prompt": list(request.prompts),
            "negative_prompt": list(request.negatives),
            "seed": list(request.seeds),
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "guidance_rescale": request.rescale,
            "guidance_interval": request.interval,
            "guidance_projection": request.projection,
            **request.seldom,
            "pag_scale": request.pag,
            "sampler": request.sampler,
            "height": request.height,
            "width": request.width,
            "prompt_weights": request.prompt_weights,
            "max_embeddings_multiples": request.max_embeddings_multiples,
            **({"negative_said": True} if request.said and not all(request.negatives) else {}),
            "weights": self.weights,
            **self.told,
            "latentgen": __version__,
            "pillow": PIL.__version__,
            **(self.machine or {}),
            **({"loras": self.loras.settings()} if self.loras is not None and self.loras.loaded else {}),
            **({"words": list(self.words)} if self.words else {}),
            **({"brought": brought} if brought else {}),
        }

    def _use_torch(self) -> None:
        """Go on with torch, where the engine was left to be chosen and what is asked for takes torch."""
        if self._torch is not None:
            for name, value in vars(self._torch()).items():
                setattr(self, name, value)
            self._torch = None

    def _loras(self) -> Loras:
        if self.loras is None:
            self._use_torch()
        return super()._loras()

    def _say_what_is_cut(self, text: str, request: Request) -> None:
        laid = self.text.lay(text, weights=request.prompt_weights, limit=request.max_embeddings_multiples)
        if laid.lost:
            counted = f"the prompt has {laid.count} tokens, of which {laid.used} are used"
            warnings.warn(f"{counted}; not seen: {laid.lost!r}", PromptCut, stacklevel=4)
