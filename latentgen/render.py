"""From prompts to PNG files, and from a PNG file to the same file again.

A sum's last bits depend on what is summed beside it, so a picture rendered in a batch can differ from the same seed
rendered alone in a few of its 8-bit values. Here pictures are therefore rendered one by one unless a batch is asked
for, and a picture that was made in a batch names its company, which `replay` renders with it. Either way a replay on
the same machine gives the same file, byte for byte.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentgen.checkpoint import find, open_checkpoint
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.sampling import SAMPLERS
from latentgen.diffusion.schedule.reading import as_pipelines_take
from latentgen.durable import sha256, write_file
from latentgen.errors import InputError
from latentgen.image import read_settings
from latentgen.models.lora import read_lora
from latentgen.models.memory import pictures_at_a_time
from latentgen.models.precision import type_name
from latentgen.models.prompt import embedding_file
from latentgen.pipeline import Pipeline, terms_of
from latentgen.processes import Processes
from latentgen.request import Request, read_request, way_of

EACH = ("prompt", "negative_prompt", "seed")  # what each picture of a batch has of its own
GUIDING = (
    "guidance_interval", "guidance_projection", "condition_annealing", "pag_scale", "vae_tiling", "feature_cache",
    "clip_skip", "timesteps", "eta",
)  # fmt: skip
WHOLE = (0.0, 1.0)  # of the way: no interval
ALONE = Processes()
Progress = Callable[[int, int], None]  # (steps done, steps in all), over all pictures


@dataclass(frozen=True)
class Order:
    """What `latentgen render` was asked for; None is the weights' own default.

    size: (width, height) in pixels. batch: pictures at a time, or "auto", as many as memory holds. loras: (file or
    folder, weight) of each. words: files of new words' embeddings. feature_cache, vae_tiling, compile,
    guidance_interval, prediction_type, tokenizer, dtype, clip_skip, timesteps, eta: as the pipeline's.
    """

    prompts: Sequence[str]
    negative: str = ""
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None
    n: int = 1
    sampler: str | None = None
    batch: int | str = 1
    prompt_weights: bool = True
    max_embeddings_multiples: int | None = None
    loras: Sequence[tuple[str, float]] = ()
    engine: str = "auto"
    words: Sequence[str] = ()
    feature_cache: int = 1
    vae_tiling: bool | None = None
    compile: bool = False
    guidance_interval: tuple[float, float] | None = None
    prediction_type: str | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    clip_skip: int = 0
    timesteps: Sequence[float] | None = None
    eta: float = 0.0


def render(
    order: Order,
    out: Path | None = None,
    weights: str | None = None,
    progress: Progress | None = None,
    among: Processes = ALONE,
) -> Iterator[Path]:
    """Render an order into PNG files and yield each one's path as soon as it is whole on the disk.

    out: a .png file (numbered where there are several pictures; one that is there is replaced), or a folder, or None
    for the present folder; in a folder each picture gets a free name of its prompt and seed. Everything that can be
    known to be wrong is said, as an InputError, before any weights are loaded. among: the processes that share the
    pictures (`processes.started()`), all of which call this; each yields the paths of its own, but for the first, which
    yields all, in order, when all are written. Names and bytes are those of one process, but for the bytes of a batch
    of "auto", which is chosen anew in each.
    """
    request, targets = _planned(order, out, weights, among)
    loras = [{"path": path, "weight": weight} for path, weight in order.loras]
    with among.to_the_end():
        with among.first_here_first():
            told: dict[str, Any] = {key: getattr(order, key) for key in ("tokenizer", "prediction_type", "dtype")}
            pipe = Pipeline.from_pretrained(weights, engine=order.engine, loras=loras, compile=order.compile, **told)
        for path in order.words:
            pipe.load_textual_inversion(path)
        groups = _groups(pipe, request, order.batch, among)
        done, total = 0, sum(map(len, groups)) * request.steps
        for rows in groups:
            settings = _settings(request, order, rows)
            made = pictures(pipe, settings, progress, done, total)
            done += len(rows) * request.steps
            for row, picture in zip(rows, made, strict=True):
                write_file(targets[row], picture.png())
                if among.rank or among.count == 1:
                    yield targets[row]
    if among.rank == 0 and among.count > 1:
        yield from targets


def _planned(order: Order, out: Path | None, weights: str | None, among: Processes) -> tuple[Request, Sequence[Path]]:
    """The checked request and each picture's place; of several processes the first decides on fresh seeds and names."""

    def decide() -> dict[str, Any]:
        request = _request(order, weights, order.seed)
        pictures_at_a_time(order.batch, 1, 1)  # that it is a number or "auto"
        targets = places(out, request)
        for path, _ in order.loras:
            read_lora(path)
        return {"seeds": list(request.seeds), "places": list(map(str, targets))}

    decided = among.agree(decide)
    return _request(order, weights, decided["seeds"]), [Path(place) for place in decided["places"]]


def _request(order: Order, weights: str | None, seed: int | Sequence[int] | None) -> Request:
    if order.prediction_type is not None:
        Prediction(order.prediction_type)
    if order.dtype is not None:
        type_name(order.dtype)
    # its hashes are compared where it is loaded
    checkpoint = open_checkpoint(find(weights), tokenizer=order.tokenizer, verify=False)
    width, height = order.size or (None, None)
    request = read_request(
        terms_of(checkpoint),
        SAMPLERS,
        list(order.prompts),
        order.negative or None,
        steps=order.steps,
        guidance=order.guidance,
        height=height,
        width=width,
        n=order.n,
        seed=seed,
        sampler=order.sampler,
        prompt_weights=order.prompt_weights,
        interval=order.guidance_interval,
        max_embeddings_multiples=order.max_embeddings_multiples,
        feature_cache=order.feature_cache,
        clip_skip=order.clip_skip,
        timesteps=order.timesteps,
        eta=order.eta,
    )
    scheduler = as_pipelines_take(checkpoint.config("scheduler"), checkpoint.has_second)
    way_of(scheduler, request)  # that the schedule has such steps
    return request


def _groups(pipe: Pipeline, request: Request, batch: int | str, among: Processes) -> list[Sequence[int]]:
    """The rows that this process renders together, one group after another.

    Groups of a given size are shared out whole, so that each picture keeps its company. Those of "auto" have their size
    from the memory that is free, of which processes on one CPU have a part each; pictures are shared out one by one.
    """
    rows = range(len(request))
    each = pipe.at_a_time(request, batch)
    if batch != "auto" or among.count == 1:
        return among.share([rows[start : start + each] for start in range(0, len(rows), each)])
    own = among.share(rows)
    if str(pipe.latent.device).partition(":")[0] == "cpu":
        each = max(1, each // among.local_count)
    return [own[start : start + each] for start in range(0, len(own), each)]


def _settings(request: Request, order: Order, rows: Sequence[int]) -> dict[str, Any]:
    """What `pictures` takes to render these rows of a request."""
    return {
        "prompt": [request.prompts[row] for row in rows],
        "negative_prompt": [request.negatives[row] for row in rows],
        "seed": [request.seeds[row] for row in rows],
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "guidance_rescale": request.rescale,
        "guidance_interval": request.interval or WHOLE,
        "sampler": request.sampler,
        "height": request.height,
        "width": request.width,
        "prompt_weights": request.prompt_weights,
        "max_embeddings_multiples": request.max_embeddings_multiples,
        "feature_cache": request.feature_cache,
        "vae_tiling": order.vae_tiling,
        "clip_skip": request.clip_skip,
        "timesteps": request.timesteps,
        "eta": request.eta,
    }


def replay(
    picture: Path,
    out: Path | None = None,
    weights: str | None = None,
    progress: Progress | None = None,
    loras: Sequence[str] = (),
    words: Sequence[str] = (),
) -> tuple[Path, list[str]]:
    """Make a picture again from what its PNG says; out: a .png file, a folder, or None for NAME-replay.png beside it.

    loras, words: where its LoRAs and new words are now, in any order, if they are not where they were.
    Returns the new file and remarks: whether it is the same byte for byte, and what has changed if it is not. Raises
    InputError where the picture does not say enough, or the weights at hand are not those it was made with.
    """
    settings = read_settings(picture)
    target = replay_place(picture, out)
    try:
        made, changes = _again(settings, picture, weights, progress, loras, words)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{picture}: its settings are not whole ({error}); it cannot be made again") from error
    same = made == picture.read_bytes()
    write_file(target, made)
    return target, ["the same file, byte for byte"] if same else [*changes, "the new file differs from the old one"]


def pictures(
    pipe: Pipeline, settings: Mapping[str, Any], progress: Progress | None, done: int = 0, total: int | None = None
) -> list[Any]:
    """The pictures of one batch; `settings` holds what the PNG would say, lists of prompt, negative prompt and seed."""
    steps, count = settings["num_inference_steps"], len(settings["prompt"])

    def step(_: Pipeline, index: int, __: float, ___: Mapping[str, Any]) -> None:
        if progress is not None:
            progress(done + min(index + 1, steps) * count, steps * count if total is None else total)

    wanted = ("negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "sampler")
    arguments = {key: settings[key] for key in (*wanted, "height", "width", "seed")}
    if not any(settings["negative_prompt"]) and not settings.get("negative_said"):
        arguments["negative_prompt"] = None
    arguments |= {key: settings[key] for key in GUIDING if key in settings}  # which older pictures do not say
    arguments["guidance_interval"] = settings.get("guidance_interval") or WHOLE  # and not what the weights say by now
    # pictures of before there were weights and chunks say neither: their prompts were text, cut to the context
    arguments |= {
        key: settings.get(key, old) for key, old in (("prompt_weights", False), ("max_embeddings_multiples", 1))
    }
    arguments["batch"] = settings.get("at_a_time", count)  # sums round as they did then
    rendered: list[Any] = pipe(settings["prompt"], **arguments, callback_on_step_end=step).images
    return rendered


def places(out: Path | None, request: Request) -> list[Path]:
    """Where each picture goes. Raises InputError where nothing can be written there."""
    return places_of(out, request.prompts, request.seeds)


def places_of(out: Path | None, prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """`places` of so many pictures, each of a prompt and a seed."""
    if out is not None and out.suffix and not out.is_dir():
        if out.suffix.lower() != ".png":
            raise InputError(f"{out} is no PNG; pictures are written as .png, which holds how they were made")
        _check_writable(out.parent)
        if len(seeds) == 1:
            return [out]
        digits = len(str(len(seeds)))
        return [out.with_name(f"{out.stem}-{k + 1:0{digits}}{out.suffix}") for k in range(len(seeds))]
    folder = out or Path()
    _check_writable(folder)
    chosen: list[Path] = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        chosen.append(_free(folder, f"{slug(prompt)}-{seed}", chosen))
    return chosen


def replay_place(picture: Path, out: Path | None) -> Path:
    """Where a replayed picture goes."""
    target = out or picture.with_name(f"{picture.stem}-replay.png")
    if target.is_dir() or not target.suffix:
        target = target / picture.name
        if target.resolve() == picture.resolve():
            target = picture.with_name(f"{picture.stem}-replay.png")
    if target.suffix.lower() != ".png":
        raise InputError(f"{target} is no PNG; pictures are written as .png, which holds how they were made")
    _check_writable(target.parent)
    return target


def slug(prompt: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-_")[:40].rstrip("-_") or "picture"


def _free(folder: Path, stem: str, taken: Sequence[Path]) -> Path:
    """STEM.png, or the first of STEM-2.png, STEM-3.png … that is not there yet."""
    path, number = folder / f"{stem}.png", 1
    while path.exists() or path in taken:
        number += 1
        path = folder / f"{stem}-{number}.png"
    return path


def _check_writable(folder: Path) -> None:
    """Say now, rather than after the rendering, that nothing can be written there."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"cannot write into {folder}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"cannot write into {folder}: {existing} may not be written; name another place with --out")


def _loras_again(recorded: Sequence[Mapping[str, Any]], picture: Path, places: Sequence[str]) -> list[str]:
    """Where the LoRAs of a picture are now; an InputError where one is not there, or is another."""
    here = {known: place for place in places for known in _known(place)}
    found = []
    for lora in recorded:
        named = f"{picture} was made with LoRA {lora['name']} ({lora['sha256'][:12]})"
        place = here.get(lora["sha256"], lora["path"])
        if not Path(place).expanduser().exists():
            raise InputError(f"{named}, not found at {place}; name its file with --lora")
        known = _known(place)
        if lora["sha256"] not in known:
            raise InputError(f"{named}, and {place} is another ({known[0][:12]}); name the right file with --lora")
        found.append(place)
    return found


def _known(place: str) -> tuple[str, str]:
    """By what a picture knows a LoRA: its hash, and as older ones had it, its weights' alone."""
    lora = read_lora(place)
    return lora.sha256, sha256(lora.path)


def _words_again(settings: Mapping[str, Any], picture: Path, places: Sequence[str]) -> list[Path]:
    """Where the new words of a picture are now; an InputError where one is not there, or is another."""
    for place in places:
        if not embedding_file(place).is_file():
            raise InputError(f"--word {place} is not there; name the file of a new word, or its folder")
    here = {sha256(file): file for file in map(embedding_file, places)}
    found = []
    for known in settings.get("words") or ():
        named = f"{picture} was made with the word {known['word']} ({known['sha256'][:12]})"
        file = here.get(known["sha256"]) or embedding_file(known["path"])
        if not file.is_file() or sha256(file) != known["sha256"]:
            raise InputError(f"{named}, which is not at {known['path']}; name its file with --word")
        found.append(file)
    return found


def _again(
    settings: Mapping[str, Any],
    picture: Path,
    weights: str | None,
    progress: Progress | None,
    loras: Sequence[str],
    words: Sequence[str],
) -> tuple[bytes, list[str]]:
    """The bytes of a picture made again from its settings, and what of the machine has changed since."""
    if settings.get("kind") == "pixels":
        options = {"seed": "--seed", "steps": "--steps", "guidance": "--guidance", "sampler": "--sampler"}
        words = [word for key, option in options.items() if key in settings for word in (option, str(settings[key]))]
        command = shlex.join(("latentgen", "render", settings["prompt"], *words, "--weights", settings["folder"]))
        raise InputError(f"{picture} is a pixel model's, which replay does not make again; do: {command}")
    if settings.get("brought"):
        brought = ", ".join(settings["brought"])
        raise InputError(
            f"{picture} was made with {brought} given from outside, which no PNG holds; it cannot be replayed"
        )
    recorded = settings["weights"] or {}
    name, expected = str(recorded.get("name")), str(recorded.get("sha256"))
    folder = weights if weights is not None else recorded.get("path")
    told: dict[str, Any] = {key: settings.get(key) for key in ("tokenizer", "prediction_type")}
    try:
        checkpoint = open_checkpoint(find(folder), tokenizer=told["tokenizer"], verify=False)
    except InputError as error:
        if weights is None and folder is not None and not Path(folder).exists():
            raise InputError(
                f"{picture} was made with weights {name} ({expected[:12]}), not found at {folder}; "
                "name their folder with --weights"
            ) from error
        raise
    if checkpoint.fingerprint != expected:
        here = f"{checkpoint.folder.resolve().name} ({checkpoint.fingerprint[:12]})"
        raise InputError(
            f"{picture} was made with weights {name} ({expected[:12]}), and {here} are others; "
            "name the right folder with --weights"
        )
    placed = _loras_again(settings.get("loras") or (), picture, loras)
    company = settings.get("batch") or {"row": 0, **{key: [settings[key]] for key in EACH}}
    engine = str(settings.get("engine", "torch"))  # older pictures do not say, and are torch's
    loras_again = [
        {"path": place, "weight": lora["weight"], "name": lora["name"], "known_as": lora["path"]}
        for lora, place in zip(settings.get("loras") or (), placed, strict=True)
    ]
    asked: dict[str, Any] = {"dtype": settings.get("dtype"), "threads": settings.get("threads"), "loras": loras_again}
    if settings.get("device") == "cpu":
        asked["device"] = "cpu"  # and not a GPU's other bits, where there is one now
    pipe = Pipeline.from_pretrained(folder, engine=engine, compile=bool(settings.get("compile")), **asked, **told)
    pipe.weights = recorded  # the same weights, under the name and path by which the picture knows them
    for known, file in zip(settings.get("words") or (), _words_again(settings, picture, words), strict=True):
        pipe.load_textual_inversion(file, known["word"], known_as=known["path"])
    row = int(company["row"])
    together = {**settings, **{key: company[key] for key in EACH}}
    again = pictures(pipe, together, progress)[row]
    machine = ("latentgen", "engine", "torch", "onnxruntime", "pillow", "device", "dtype", "threads")
    old, new = settings, again.settings
    return again.png(), [
        f"{key} was {old.get(key)}, is {new.get(key, 'absent')}" for key in machine if old.get(key) != new.get(key)
    ]
