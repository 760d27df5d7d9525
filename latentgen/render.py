"""From prompts to PNG files, and from a PNG file to the same file again.

A sum's last bits depend on what is summed beside it, so a picture rendered in a batch can differ from the same seed
rendered alone in a few of its 8-bit values. Here pictures are therefore rendered one by one unless a batch is asked
for, and a picture that was made in a batch names its company, which `replay` renders with it. Either way a replay on
the same machine gives the same file, byte for byte.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from latentgen.checkpoint import find, open_checkpoint
from latentgen.diffusion.prediction import Prediction
from latentgen.diffusion.sampling import SAMPLERS
from latentgen.diffusion.schedule.reading import as_pipelines_take
from latentgen.durable import sha256
from latentgen.errors import InputError
from latentgen.image import read_settings
from latentgen.models.lora import read_lora
from latentgen.models.memory import pictures_at_a_time
from latentgen.models.precision import type_name
from latentgen.models.prompt import embedding_file
from latentgen.pipeline import Pipeline, terms_of
from latentgen.placing import places_of, replay_place, write_picture, write_replay
from latentgen.processes import Processes
from latentgen.request import Request, read_request, way_of

EACH = ("prompt", "negative_prompt", "seed")  # what each picture of a batch has of its own
GUIDING = (
    "guidance_interval", "guidance_projection", "condition_annealing", "pag_scale", "vae_tiling", "feature_cache",
    "clip_skip", "timesteps", "eta",
)  # fmt: skip
MACHINE = ("latentgen", "engine", "torch", "onnxruntime", "pillow", "device", "dtype", "threads")  # may change bits
WHOLE = (0.0, 1.0)  # of the way: no interval
ALONE = Processes()
Progress = Callable[[int, int], None]  # (steps done, steps in all), over all pictures


@dataclass(frozen=True)
class Order:
    """What `latentgen render` was asked for; None is the weights' own default.

    prompts: one or more. size: (width, height) in pixels. batch: pictures at a time, or "auto", as many as memory
    holds. loras: (file or folder, weight) of each. words: files of new words' embeddings. feature_cache, vae_tiling,
    compile, guidance_interval, prediction_type, tokenizer, dtype, clip_skip, timesteps, eta: as the pipeline's.
    """

    prompts: str | Sequence[str]
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

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):  # one, and not one for each letter
            object.__setattr__(self, "prompts", [self.prompts])


def render(
    order: Order,
    out: str | Path | None = None,
    weights: str | Path | None = None,
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
    out = None if out is None else Path(out)
    request, targets = _planned(order, out, weights, among)
    loras = [{"path": path, "weight": weight} for path, weight in order.loras]
    with among.to_the_end() as written:
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
                place = write_picture(targets[row], out, request.prompts[row], request.seeds[row], picture.png())
                written[str(row)] = str(place)
                if among.rank or among.count == 1:
                    yield place
    if among.rank == 0 and among.count > 1:
        yield from (Path(written[str(row)]) for row in range(len(request)))


def _planned(
    order: Order, out: Path | None, weights: str | Path | None, among: Processes
) -> tuple[Request, Sequence[Path]]:
    """The checked request and each picture's place; of several processes the first decides on fresh seeds and names."""

    def decide() -> dict[str, Any]:
        request = _request(order, weights, order.seed)
        pictures_at_a_time(order.batch, 1, 1)  # that it is a number or "auto"
        targets = places_of(out, request.prompts, request.seeds)
        for path, _ in order.loras:
            read_lora(path)
        return {"seeds": list(request.seeds), "places": list(map(str, targets))}

    decided = among.agree(decide)
    return _request(order, weights, decided["seeds"]), [Path(place) for place in decided["places"]]


def _request(order: Order, weights: str | Path | None, seed: int | Sequence[int] | None) -> Request:
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

    A file that is named is replaced; else a name that is not free is numbered, as `render` does.
    loras, words: where its LoRAs and new words are now, in any order, if they are not where they were.
    Returns the new file and remarks: whether it is the same byte for byte, and what has changed if it is not. Raises
    InputError where the picture does not say enough, or the weights at hand are not those it was made with.
    """
    return replayed(picture, out, partial(_again, picture, weights, progress, loras, words))


def replayed(
    picture: Path, out: Path | None, again: Callable[[Mapping[str, Any]], tuple[bytes, Mapping[str, Any]]]
) -> tuple[Path, list[str]]:
    """As `replay`, with what makes the bytes, and the new settings, from a picture's settings."""
    settings = read_settings(picture)
    target = replay_place(picture, out)
    try:
        made, now = again(settings)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{picture}: its settings are not whole ({error}); it cannot be made again") from error
    remarks = ["the same file, byte for byte"]
    if made != picture.read_bytes():
        changed = [key for key in MACHINE if settings.get(key) != now.get(key)]
        remarks = [f"{key} was {settings.get(key)}, is {now.get(key, 'absent')}" for key in changed]
        remarks.append("the new file differs from the old one")
    return write_replay(target, out, made), remarks


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


def _loras_again(recorded: Sequence[Mapping[str, Any]], picture: Path, places: Sequence[str]) -> list[str]:
    """Where the LoRAs of a picture are now; an InputError where one is not there, or is another."""
    known = {place: _known(place) for place in places}
    here = {hashed: place for place, both in known.items() for hashed in both}
    for place, both in known.items():
        if not any(lora["sha256"] in both for lora in recorded):
            raise not_of(picture, f"--lora {place}", [f"{lora['name']} ({lora['sha256'][:12]})" for lora in recorded])
    found = []
    for lora in recorded:
        named = f"{picture} was made with LoRA {lora['name']} ({lora['sha256'][:12]})"
        place = here.get(lora["sha256"], lora["path"])
        if not Path(place).expanduser().exists():
            raise InputError(f"{named}, not found at {place}; name its file with --lora")
        both = known.get(place) or _known(place)
        if lora["sha256"] not in both:
            raise InputError(f"{named}, and {place} is another ({both[0][:12]}); name the right file with --lora")
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
    recorded = settings.get("words") or ()
    for place in here.keys() - {known["sha256"] for known in recorded}:
        names = [f"{known['word']} ({known['sha256'][:12]})" for known in recorded]
        raise not_of(picture, f"--word {here[place]}", names)
    found = []
    for known in recorded:
        named = f"{picture} was made with the word {known['word']} ({known['sha256'][:12]})"
        file = here.get(known["sha256"]) or embedding_file(known["path"])
        if not file.is_file() or sha256(file) != known["sha256"]:
            raise InputError(f"{named}, which is not at {known['path']}; name its file with --word")
        found.append(file)
    return found


def not_of(picture: Path, given: str, made_with: Sequence[str]) -> InputError:
    """What was given for a replay and is nothing that the picture was made with."""
    rest = f"which was made with {', '.join(made_with)}" if made_with else "which was made with none"
    return InputError(f"{given} is not of {picture}, {rest}; leave it away, or name the right file")


def _again(
    picture: Path,
    weights: str | None,
    progress: Progress | None,
    loras: Sequence[str],
    words: Sequence[str],
    settings: Mapping[str, Any],
) -> tuple[bytes, Mapping[str, Any]]:
    """The bytes of a picture made again from its settings, and the new ones."""
    if settings.get("kind") == "pixels":
        raise InputError(f"{picture} is a pixel model's, which latentgen.pixels.render.replay makes again")
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
        place = find(folder)
        told["tokenizer"] = told["tokenizer"] if place.is_file() else None  # which older pictures of folders say too
        checkpoint = open_checkpoint(place, tokenizer=told["tokenizer"], verify=False)
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
    files = _words_again(settings, picture, words)
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
    for known, file in zip(settings.get("words") or (), files, strict=True):
        pipe.load_textual_inversion(file, known["word"], known_as=known["path"])
    row = int(company["row"])
    together = {**settings, **{key: company[key] for key in EACH}}
    again = pictures(pipe, together, progress)[row]
    return again.png(), again.settings
