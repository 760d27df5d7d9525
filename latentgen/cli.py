"""The command line: render, replay, train, samplers. Each verb is one call into the library, imported when called.

Exit codes: 0 done, 2 something given cannot be used (one line, `latentgen: …`), 130 stopped by Ctrl-C.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from latentgen import __version__
from latentgen.errors import InputError

app = typer.Typer(
    name="latentgen",
    help="Pictures from words, with a model of your own: render prompts, make a picture again, train from a folder.",
    epilog='Start with:  latentgen render "a red apple"',
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

Weights = Annotated[
    str | None,
    typer.Option(help="A weights folder in diffusers' layout, or a hub id.", show_default="the embedded weights"),
]

OPTIONS = {  # what a person typed, for what Python calls it
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "num_images_per_prompt": "--n",
    "max_embeddings_multiples": "--max-chunks",
    "seed": "--seed",
}


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Say the version and stop.")] = False,
) -> None:
    """What comes before a verb."""
    if version:
        typer.echo(f"latentgen {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


@app.command(
    epilog='Examples:\n\nlatentgen render "a red apple" --steps 20 --guidance 5 --seed 7 --out apple.png\n\n'
    'latentgen render "a red apple" "a blue bird" --n 4 --out pictures/\n\n'
    'latentgen render "a cat, 3d fluent emoji" --negative "black and white" --size 96x64'
)
def render(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to paint; quote each prompt.")],
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the weights' own")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="How hard to follow the prompt; 1 is off.", show_default="the weights' own"),
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
        int, typer.Option(help="Pictures rendered at a time; more is faster, and a replay repeats the whole batch.")
    ] = 1,
    prompt_weights: Annotated[
        bool, typer.Option(help="Read (word:1.3), [word] and BREAK in prompts; off, brackets are plain text.")
    ] = True,
    max_chunks: Annotated[
        int | None,
        typer.Option(help="How many contexts long a prompt may be; 1 cuts it.", show_default="as long as it is"),
    ] = None,
) -> None:
    """Render each PROMPT into a PNG file that holds everything it takes to make it again.

    The written paths are the last lines of standard output.
    """
    from latentgen.render import Order
    from latentgen.render import render as run

    order = Order(
        prompts, negative, steps, guidance, seed, read_size(size), n, sampler, batch, prompt_weights, max_chunks
    )
    with progress_bar("rendering") as progress:
        written = list(run(order, out, weights, progress))
    for path in written:
        typer.echo(path)


@app.command(epilog="Examples:\n\nlatentgen replay apple.png\n\nlatentgen replay apple.png --weights weights/icons")
def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG file that latentgen rendered.")],
    out: Annotated[
        Path | None, typer.Option(help="A .png file or a folder.", show_default="NAME-replay.png beside it")
    ] = None,
    weights: Weights = None,
) -> None:
    """Make a picture again from what its PNG says: on the same machine the same file, byte for byte."""
    from latentgen.render import replay as run

    with progress_bar("rendering") as progress:
        target, remarks = run(picture, out, weights, progress)
    for remark in remarks:
        say(remark)
    typer.echo(target)


@app.command(
    epilog="Examples:\n\nlatentgen train pipelines/icons.toml\n\nlatentgen train my.toml --data pictures/ --out mine"
)
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe: a TOML file, as those in pipelines/.")],
    out: Annotated[
        Path | None, typer.Option(help="The weights folder to make.", show_default="weights/NAME of the recipe")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder of captioned pictures.", show_default="the recipe's own")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, measure a few steps, say what it will take; no more.")
    ] = False,
) -> None:
    """Train every stage of a recipe: tokenizer, CLIP, VAE and U-Net, from captioned pictures to a weights folder.

    Stop it at any moment; the same command goes on from there.
    """

    def report(line: object) -> None:
        print(line, file=sys.stderr, flush=True)

    if dry_run:
        from latentgen.rehearsal import rehearse

        rehearse(recipe, out, data, report)
        return
    from latentgen import build

    folder = build.train(recipe, out, data, report)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(folder)


@app.command()
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


def main() -> None:
    """The `latentgen` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.showwarning = show_warning
    try:
        code = app(prog_name="latentgen", standalone_mode=False)
        if code == 130:
            raise KeyboardInterrupt
    except InputError as error:
        name, _, rest = str(error).partition(" ")
        sys.exit(refuse(f"{OPTIONS.get(name, name)} {rest}"))
    except (KeyboardInterrupt, typer.Abort):
        say("stopped")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read us has gone; nothing more to say
        sys.exit(0)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of click, of which typer has its own copy or not
            sys.exit(refuse(f"{error.format_message()} (see: {command(error)} --help)"))
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
            sys.exit(refuse("not enough memory; render smaller pictures (--size) or fewer at a time (--batch)"))
        raise
    sys.exit(code or 0)


def read_size(size: str | None) -> tuple[int, int] | None:
    """ "64" or "96x64" as (width, height) in pixels."""
    if size is None:
        return None
    sides = size.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise InputError(f"--size is {size!r}; it must be pixels as 64, or WIDTHxHEIGHT as 96x64")
    width, height = int(sides[0]), int(sides[-1])
    return width, height


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


def say(line: str) -> None:
    """One line for the person, on standard error."""
    print(f"latentgen: {line}", file=sys.stderr, flush=True)


def refuse(line: str) -> int:
    """Say why, on one line, and give the exit code."""
    say(" ".join(line.split()))
    return 2


def command(error: Any) -> str:
    """The command a usage error is about."""
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context is not None else "latentgen"


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Warnings of ours as one line; those of the libraries are not for who renders a picture."""
    if category.__module__.startswith("latentgen"):
        say(str(message))


if __name__ == "__main__":
    main()
