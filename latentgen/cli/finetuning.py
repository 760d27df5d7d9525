"""Verbs of fine-tuning: finetune."""

from pathlib import Path
from typing import Any

import click

from latentgen.cli.parts import FOLDER, PATH, PLACE, report
from latentgen.errors import InputError

FINETUNE = """Examples:

latentgen finetune my_pictures/ --from weights/icons --out weights/mine

latentgen finetune my_cat/ --method dreambooth --class cat --out weights/my-cat

latentgen finetune my_cat/ --method textual-inversion --token "<my-cat>" --like cat --out weights/my-word

latentgen finetune my_look/ --method style --out weights/my-look"""


def add(app: click.Group) -> None:
    """Give the command line these verbs."""
    app.command(epilog=FINETUNE)(finetune)


@click.argument("pictures", type=PATH, metavar="PICTURES", help="A folder of captioned pictures.")
@click.option("--out", type=FOLDER, required=True, help="The folder to make.")
@click.option(
    "--from", "base", type=PLACE, help="The weights to start from; not changed.", show_default="the embedded weights"
)
@click.option("--recipe", type=PATH, help="A TOML file with any of the settings; what is said here goes before it.")
@click.option("--method", help="lora, dora, lokr, full, dreambooth, textual-inversion or style.", show_default="lora")
@click.option("--token", help="DreamBooth's rare word; textual inversion's new one.", show_default="zwx")
@click.option("--class", "class_word", help="DreamBooth: what kind of thing it is, as cat.")
@click.option("--like", help="Textual inversion: a word to start from.")
@click.option("--caption", help="One caption for every picture, in place of its own.")
@click.option("--captions", help="files: tables and sidecars; names: of the files.", show_default="files")
@click.option(
    "--mirror",
    is_flag=True,
    default=None,
    help="Learn from mirrored pictures too, but where captions say left, right or the like.",
    show_default="off",
)
@click.option("--steps", type=int, help="Training steps.", show_default="by the pictures")
@click.option("--batch", type=int, help="Pictures a step.", show_default="by the weights")
@click.option("--rate", type=float, help="Learning rate.", show_default="by the weights")
@click.option("--rank", type=int, help="Of an adapter.", show_default="by the pictures")
@click.option(
    "--text-encoder", "text_encoder", is_flag=True, default=None, help="Train the text encoder too.", show_default="off"
)
@click.option("--size", type=int, help="Pixels a side.", show_default="the weights' own")
@click.option("--seed", type=int, help="Of everything random.", show_default="0")
@click.option(
    "--prompt", multiple=True, help="Something to look at while it trains; repeat it.", show_default="captions"
)
def finetune(
    pictures: Path,
    out: Path,
    base: str | None,
    recipe: Path | None,
    method: str | None,
    token: str | None,
    class_word: str | None,
    like: str | None,
    caption: str | None,
    captions: str | None,
    mirror: bool | None,
    steps: int | None,
    batch: int | None,
    rate: float | None,
    rank: int | None,
    text_encoder: bool | None,
    size: int | None,
    seed: int | None,
    prompt: tuple[str, ...],
) -> None:
    """Teach finished weights your own captioned pictures, and prove what is saved.

    Stop it at any moment; the same command goes on from there.
    """

    from latentgen.fields import explained
    from latentgen.finetuning import Finetune
    from latentgen.recipe import read_table

    asked: dict[str, Any] = {} if recipe is None else read_table(recipe)
    said = {
        "method": method,
        "token": token,
        "class": class_word,
        "like": like,
        "caption": caption,
        "captions": captions,
        "mirror": mirror,
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

    click.echo(run(pictures, base=base, out=out, settings=settings, report=report))
