"""Verbs of fine-tuning: finetune."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from latentgen.errors import InputError

FINETUNE = """Examples:

latentgen finetune my_pictures/ --from weights/icons --out weights/mine

latentgen finetune my_cat/ --method dreambooth --class cat --out weights/my-cat

latentgen finetune my_cat/ --method textual-inversion --token "<my-cat>" --like cat --out weights/my-word

latentgen finetune my_look/ --method style --out weights/my-look"""


def add(app: typer.Typer) -> None:
    """Give the command line these verbs."""
    app.command(epilog=FINETUNE)(finetune)


def finetune(
    pictures: Annotated[Path, typer.Argument(help="A folder of captioned pictures.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    base: Annotated[
        str | None,
        typer.Option("--from", help="The weights to start from; not changed.", show_default="the embedded weights"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A TOML file with any of the settings; what is said here goes before it.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="lora, dora, lokr, full, dreambooth, textual-inversion or style.", show_default="lora"),
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="DreamBooth's rare word; textual inversion's new one.", show_default="zwx")
    ] = None,
    class_word: Annotated[
        str | None, typer.Option("--class", help="DreamBooth: what kind of thing it is, as cat.")
    ] = None,
    like: Annotated[str | None, typer.Option(help="Textual inversion: a word to start from.")] = None,
    caption: Annotated[str | None, typer.Option(help="One caption for every picture, in place of its own.")] = None,
    captions: Annotated[
        str | None, typer.Option(help="files: tables and sidecars; names: of the files.", show_default="files")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.", show_default="by the pictures")] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures a step.", show_default="by the weights")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate.", show_default="by the weights")] = None,
    rank: Annotated[int | None, typer.Option(help="Of an adapter.", show_default="by the pictures")] = None,
    text_encoder: Annotated[
        bool | None, typer.Option("--text-encoder", help="Train the text encoder too.", show_default="off")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Pixels a side.", show_default="the weights' own")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.", show_default="0")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Something to look at while it trains; repeat it.", show_default="captions")
    ] = None,
) -> None:
    """Teach finished weights your own captioned pictures, and prove what is saved.

    Stop it at any moment; the same command goes on from there.
    """

    def report(line: object) -> None:
        print(line, file=sys.stderr, flush=True)

    from latentgen.finetuning import Finetune
    from latentgen.recipe import explained, read_table

    asked: dict[str, Any] = {} if recipe is None else read_table(recipe)
    said = {
        "method": method,
        "token": token,
        "class": class_word,
        "like": like,
        "caption": caption,
        "captions": captions,
        "steps": steps,
        "batch": batch,
        "rate": rate,
        "rank": rank,
        "text_encoder": text_encoder,
        "size": size,
        "seed": seed,
        "prompts": prompt or None,
    }
    asked |= {name: value for name, value in said.items() if value is not None}
    settings = explained(Finetune, asked, f"recipe {recipe}" if recipe is not None else "finetune")
    if not isinstance(settings, Finetune):
        raise InputError("these are no settings of finetune")
    from latentgen.finetuning import finetune as run

    typer.echo(run(pictures, base=base, out=out, settings=settings, report=report))
