"""Verbs of rendering: render, replay, samplers."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from latentgen.errors import InputError

Weights = Annotated[
    str | None,
    typer.Option(help="A weights folder in diffusers' layout, or a hub id.", show_default="the embedded weights"),
]
PredictionType = Annotated[
    str | None,
    typer.Option(
        help="What the U-Net predicts: epsilon or v_prediction.",
        show_default="as its files say; SD 2's single files: v",
    ),
]

RENDER = """Examples:

latentgen render "a red apple" --steps 20 --guidance 5 --seed 7 --out apple.png

latentgen render "a red apple" "a blue bird" --n 4 --out pictures/

latentgen render "a cat, 3d fluent emoji" --negative "black and white" --size 96x64

latentgen render "an ankle boot" --weights weights/fashion --n 4 --out boots/"""
REPLAY = """Examples:

latentgen replay apple.png

latentgen replay apple.png --weights weights/icons"""


def add(app: typer.Typer) -> None:
    """Give the command line these verbs."""
    app.command(epilog=RENDER)(render)
    app.command(epilog=REPLAY)(replay)
    app.command()(samplers)


def render(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to paint; quote each prompt.")],
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the weights' own")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="How hard to follow the prompt; 1 is off.", show_default="the weights' own"),
    ] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(
            help="The part of the steps guided, from 0 (noise) to 1 (clean); fewer are faster.",
            metavar="FIRST LAST",
            show_default="the weights' own, mostly 0 1",
        ),
    ] = None,
    negative: Annotated[str, typer.Option(help="What to keep away from.", show_default="nothing")] = "",
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first picture; picture k has seed + k.", show_default="a fresh one")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Pixels: 64, or WIDTHxHEIGHT as 96x64.", metavar="SIZE", show_default="the weights' own"),
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Pictures for each prompt.")] = 1,
    sampler: Annotated[
        str | None, typer.Option(help="ddim, dpmpp-2m, euler, heun, …", show_default="the weights' own")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A .png file (replaced if it is there) or a folder.", show_default="the present folder"),
    ] = None,
    weights: Weights = None,
    batch: Annotated[
        str,
        typer.Option(
            help="Pictures rendered at a time, or auto: as many as the free memory holds. A replay repeats the batch.",
            metavar="N|auto",
        ),
    ] = "1",
    prompt_weights: Annotated[
        bool, typer.Option(help="Read (word:1.3), [word] and BREAK in prompts; off, brackets are plain text.")
    ] = True,
    max_chunks: Annotated[
        int | None,
        typer.Option(help="How many contexts long a prompt may be; 1 cuts it.", show_default="as long as it is"),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA's .safetensors file and its weight, 1 if not said; repeat it.", metavar="FILE[:WEIGHT]"
        ),
    ] = None,
    style: Annotated[
        list[str] | None,
        typer.Option(
            help="A style that finetune learned, and how far the dial is turned: 0 is off, 1 is as it was learned.",
            metavar="FOLDER[:DIAL]",
        ),
    ] = None,
    word: Annotated[
        list[str] | None,
        typer.Option(help="A new word's embeddings (textual inversion); repeat it.", metavar="FILE"),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="onnx (a CPU), torch, or auto: onnx where it can run this, else torch.")
    ] = "auto",
    feature_cache: Annotated[
        int,
        typer.Option(help="Compute the U-Net's deep levels at every N-th step only (torch); 1 is off.", metavar="N"),
    ] = 1,
    vae_tiling: Annotated[
        bool | None,
        typer.Option(
            "--vae-tiling/--no-vae-tiling",
            help="Decode in tiles with blended seams, in less memory.",
            show_default="above 1536·1024 pixels",
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the U-Net first (torch; minutes, for many pictures).")
    ] = False,
    prediction_type: PredictionType = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A CLIP tokenizer's folder, for a single file that has none beside it.")
    ] = None,
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

        refused = {"feature_cache": feature_cache > 1, "vae_tiling": vae_tiling, "compile": compile}
        refused |= {"negative": bool(negative), "guidance_interval": guidance_interval is not None}
        refused |= {"prediction_type": prediction_type is not None, "tokenizer": tokenizer is not None}
        refuse_for_pixels(size=size, lora=lora, max_chunks=max_chunks, **refused)
        told = {"steps": steps, "guidance": guidance, "sampler": sampler}
        if among.rank:
            return  # a pixel model's pictures are small: the first process renders them all
        for path in render_files(Path(weights), prompts, out, n=n, seed=seed, **told):
            typer.echo(path)
        return
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
    )
    with progress_bar("rendering") as progress:
        written = list(run(order, out, weights, None if among.rank else progress, among))
    for path in written if among.rank == 0 else ():
        typer.echo(path)


def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG file that latentgen rendered.")],
    out: Annotated[
        Path | None, typer.Option(help="A .png file or a folder.", show_default="NAME-replay.png beside it")
    ] = None,
    weights: Weights = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="Where a LoRA of the picture is now; repeat it.", metavar="FILE")
    ] = None,
    word: Annotated[
        list[str] | None, typer.Option(help="Where a new word of the picture is now; repeat it.", metavar="FILE")
    ] = None,
) -> None:
    """Make a picture again from what its PNG says: on the same machine the same file, byte for byte."""
    from latentgen.render import replay as run

    with progress_bar("rendering") as progress:
        target, remarks = run(picture, out, weights, progress, lora or (), word or ())
    for remark in remarks:
        print(f"latentgen: {remark}", file=sys.stderr, flush=True)
    typer.echo(target)


def samplers() -> None:
    """Say what each sampler is, its source, its order of convergence, and when to choose it."""
    from rich.console import Console
    from rich.table import Table

    from latentgen.diffusion.sampling import TABLE

    table = Table(box=None, padding=(0, 2, 1, 0))
    for column in ("sampler", "what it is", "order", "choose it for", "source"):
        table.add_column(column, no_wrap=column == "sampler", overflow="fold")
    for note in TABLE:
        order = f"{note.order}; {note.evaluations} a step" + ("; random" if note.random else "")
        table.add_row(note.name, note.what, order, note.when, note.source)
    Console().print(table)


def refuse_for_pixels(**given: object) -> None:
    """InputError for an option that a pixel model, which knows classes only, has no use for."""
    for name, value in given.items():
        if value:
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
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
