"""Verbs of rendering: render, replay, samplers."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from latentgen.cli.parts import FOLDER, PATH, PLACE, console, read_values, say
from latentgen.errors import InputError

weights_option = click.option(
    "--weights",
    type=PLACE,
    metavar="WEIGHTS",
    help="A weights folder in diffusers' layout, or a hub id.",
    show_default="the embedded weights",
)
prediction_type_option = click.option(
    "--prediction-type",
    help="What the U-Net predicts: epsilon or v_prediction.",
    show_default="as its files say; SD 2's single files: v",
)

RENDER = """Examples:

latentgen render "a red apple" --steps 20 --guidance 5 --seed 7 --out apple.png

latentgen render "a red apple" "a blue bird" --n 4 --out pictures/

latentgen render "a cat, 3d fluent emoji" --negative "black and white" --size 96x64

latentgen render "an ankle boot" --weights weights/fashion --n 4 --out boots/"""
REPLAY = """Examples:

latentgen replay apple.png

latentgen replay apple.png --weights weights/icons"""


def add(app: click.Group) -> None:
    """Give the command line these verbs."""
    app.command(epilog=RENDER)(render)
    app.command(epilog=REPLAY)(replay)
    app.command()(samplers)


@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT", help="What to paint; each in quotes.")
@click.option("--steps", type=int, help="Denoising steps.", show_default="the weights' own")
@click.option(
    "--guidance", type=float, help="How hard to follow the prompt; 1 is off.", show_default="the weights' own"
)
@click.option(
    "--guidance-interval",
    type=(float, float),
    metavar="FIRST LAST",
    help="The part of the steps guided, from 0 (noise) to 1 (clean); fewer are faster.",
    show_default="the weights' own, mostly 0 1",
)
@click.option("--negative", default="", help="What to keep away from.", show_default="nothing")
@click.option("--seed", type=int, help="Seed of the first picture; picture k has seed + k.", show_default="a fresh one")
@click.option("--size", metavar="SIZE", help="Pixels: 64, or WIDTHxHEIGHT as 96x64.", show_default="the weights' own")
@click.option("--n", "-n", "n", type=int, default=1, help="Pictures for each prompt.")
@click.option("--sampler", help="ddim, dpmpp-2m, euler, heun, …", show_default="the weights' own")
@click.option(
    "--out", type=PATH, help="A .png file (replaced if it is there) or a folder.", show_default="the present folder"
)
@weights_option
@click.option(
    "--batch",
    default="1",
    metavar="N|auto",
    help="Pictures rendered at a time, or auto: as many as the free memory holds. A replay repeats the batch.",
)
@click.option(
    "--prompt-weights/--no-prompt-weights",
    default=True,
    help="Read (word:1.3), [word] and BREAK in prompts; off, brackets are plain text.",
)
@click.option(
    "--max-chunks", type=int, help="How many contexts long a prompt may be; 1 cuts it.", show_default="as long as it is"
)
@click.option("--clip-skip", type=int, default=0, metavar="N", help="Layers the text encoder reads the prompt without.")
@click.option(
    "--timesteps", help="To denoise at, falling, instead of the sampler's own, as 999,850,736; one for each step."
)
@click.option("--eta", type=float, default=0.0, help="Of the noise that ddim puts back at each step: 0 none, 1 DDPM's.")
@click.option(
    "--lora",
    type=PLACE,
    multiple=True,
    metavar="FILE[:WEIGHT]",
    help="A LoRA's .safetensors file and its weight, 1 if not said; repeat it.",
)
@click.option(
    "--style",
    type=PLACE,
    multiple=True,
    metavar="FOLDER[:DIAL]",
    help="A style that finetune learned, and how far the dial is turned: 0 is off, 1 is as it was learned.",
)
@click.option(
    "--word", type=PLACE, multiple=True, metavar="FILE", help="A new word's embeddings (textual inversion); repeat it."
)
@click.option("--engine", default="auto", help="onnx (a CPU), torch, or auto: onnx where it can run this, else torch.")
@click.option(
    "--feature-cache",
    type=int,
    default=1,
    metavar="N",
    help="Compute the U-Net's deep levels at every N-th step only (torch); 1 is off.",
)
@click.option(
    "--vae-tiling/--no-vae-tiling",
    default=None,
    help="Decode in tiles with blended seams, in less memory.",
    show_default="above 1536·1024 pixels",
)
@click.option(
    "--dtype",
    metavar="TYPE",
    help="What networks compute in: float32, float16 or bfloat16; the half types are torch's and take less memory.",
    show_default="float16 on a GPU, float32 on a CPU",
)
@click.option("--compile", "compile", is_flag=True, help="Compile the U-Net first (torch; minutes, for many pictures).")
@prediction_type_option
@click.option("--tokenizer", type=FOLDER, help="A CLIP tokenizer's folder, for a single file that has none beside it.")
def render(
    prompts: tuple[str, ...],
    steps: int | None,
    guidance: float | None,
    guidance_interval: tuple[float, float] | None,
    negative: str,
    seed: int | None,
    size: str | None,
    n: int,
    sampler: str | None,
    out: Path | None,
    weights: str | None,
    batch: str,
    prompt_weights: bool,
    max_chunks: int | None,
    clip_skip: int,
    timesteps: str | None,
    eta: float,
    lora: tuple[str, ...],
    style: tuple[str, ...],
    word: tuple[str, ...],
    engine: str,
    feature_cache: int,
    vae_tiling: bool | None,
    dtype: str | None,
    compile: bool,
    prediction_type: str | None,
    tokenizer: Path | None,
) -> None:
    """Render each PROMPT into a PNG file that holds everything it takes to make it again.

    The written paths are the last lines of standard output. Under accelerate launch or torchrun the processes share
    the pictures; the first alone says the paths, once all are written.
    """
    from latentgen.pixels import is_pixel_folder
    from latentgen.processes import started

    among = started()

    if weights is not None and is_pixel_folder(Path(weights)):
        from latentgen.pixels.render import render_files

        refused = {"feature_cache": feature_cache != 1, "compile": compile, "dtype": dtype is not None}
        refused |= {"vae_tiling" if vae_tiling else "no_vae_tiling": vae_tiling is not None, "size": size is not None}
        refused |= {"negative": bool(negative), "guidance_interval": guidance_interval is not None}
        refused |= {"clip_skip": clip_skip != 0, "timesteps": timesteps is not None, "eta": eta != 0}
        refused |= {"prediction_type": prediction_type is not None, "tokenizer": tokenizer is not None}
        refused |= {"style": bool(style), "word": bool(word), "engine": engine != "auto", "batch": batch != "1"}
        refused |= {"no_prompt_weights": not prompt_weights, "max_chunks": max_chunks is not None, "lora": bool(lora)}
        refuse_for_pixels(refused)
        told = {"steps": steps, "guidance": guidance, "sampler": sampler}
        if among.rank:
            return  # a pixel model's pictures are small: the first process renders them all
        for path in render_files(Path(weights), prompts, out, n=n, seed=seed, **told):
            click.echo(path)
        return
    if engine != "torch" and dtype in (None, "float32", "fp32") and not (lora or style or compile):
        from latentgen.models.onnx.ahead import open_ahead

        open_ahead(weights, tokenizer)
    from latentgen.render import Order
    from latentgen.render import render as run

    loras = [read_lora_option(one) for one in (*(lora or ()), *(style or ()))]
    order = Order(
        prompts,
        negative,
        steps,
        guidance,
        seed,
        read_size(size),
        n,
        sampler,
        read_batch(batch),
        prompt_weights,
        max_chunks,
        loras,
        engine,
        word or (),
        feature_cache,
        vae_tiling,
        compile,
        guidance_interval,
        prediction_type,
        None if tokenizer is None else str(tokenizer),
        dtype,
        clip_skip,
        None if timesteps is None else read_values(timesteps, "--timesteps", 0),
        eta,
    )
    with progress_bar("rendering") as progress:
        written = list(run(order, out, weights, None if among.rank else progress, among))
    for path in written if among.rank == 0 else ():
        click.echo(path)


@click.argument("picture", type=PATH, metavar="PICTURE", help="A PNG file that latentgen rendered.")
@click.option(
    "--out",
    type=PATH,
    help="A .png file (replaced if it is there) or a folder.",
    show_default="NAME-replay.png beside it",
)
@weights_option
@click.option(
    "--lora", type=PLACE, multiple=True, metavar="FILE", help="Where a LoRA of the picture is now; repeat it."
)
@click.option(
    "--word", type=PLACE, multiple=True, metavar="FILE", help="Where a new word of the picture is now; repeat it."
)
def replay(
    picture: Path,
    out: Path | None,
    weights: str | None,
    lora: tuple[str, ...],
    word: tuple[str, ...],
) -> None:
    """Make a picture again from what its PNG says: on the same machine the same file, byte for byte."""
    from latentgen.image import read_settings

    if read_settings(picture).get("kind") == "pixels":
        from latentgen.pixels.render import replay as run_pixels

        target, remarks = run_pixels(picture, out, weights, lora, word)
    else:
        from latentgen.render import replay as run

        with progress_bar("rendering") as progress:
            target, remarks = run(picture, out, weights, progress, lora, word)
    for remark in remarks:
        say(remark)
    click.echo(target)


def samplers() -> None:
    """Say what each sampler is, its source, its order of convergence, and when to choose it."""
    from rich.table import Table

    from latentgen.diffusion.sampling import TABLE

    table = Table(box=None, padding=(0, 2, 1, 0))
    for column in ("sampler", "what it is", "order", "choose it for", "source"):
        table.add_column(column, no_wrap=column == "sampler", overflow="fold")
    for note in TABLE:
        order = f"{note.order}; {note.evaluations} a step" + ("; random" if note.random else "")
        table.add_row(note.name, note.what, order, note.when, note.source)
    console().print(table)


def refuse_for_pixels(given: Mapping[str, bool]) -> None:
    """InputError for an option that was given and that a pixel model, which knows classes only, has no use for."""
    for name, was in given.items():
        if was:
            raise InputError(
                f"--{name.replace('_', '-')} is not for a pixel model, which is told a class, steps, guidance and seed"
            )


def read_size(size: str | None) -> tuple[int, int] | None:
    """ "64" or "96x64" as (width, height) in pixels."""
    if size is None:
        return None
    sides = size.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise InputError(f"--size is {size!r}; it must be pixels as 64, or WIDTHxHEIGHT as 96x64")
    width, height = int(sides[0]), int(sides[-1])
    return width, height


def read_batch(text: str) -> int | str:
    """ "4" or "auto" as it stands; what is neither is for the renderer to refuse."""
    return int(text) if text.lstrip("-").isdecimal() else text


def read_lora_option(text: str) -> tuple[str, float]:
    """ "style.safetensors:0.7" as its file and weight; the weight is 1 where none is said."""
    file, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return file, float(weight)
    except ValueError:
        return text, 1.0  # a colon of the path itself


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error where that is a terminal; nothing in a pipe."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
