"""Verbs of training: train."""

import os
from pathlib import Path

import click

from latentgen.cli.parts import FOLDER, PATH, report
from latentgen.errors import InputError

TRAIN = """Examples:

latentgen train pipelines/icons.toml

latentgen train my.toml --data pictures/ --out mine

latentgen train pipelines/icons.toml --start weights/icons --out weights/icons-more

latentgen train pipelines/icons.toml --start weights/icons --only decoder --out weights/icons-sharper

latentgen train pipelines/fashion.toml"""


def add(app: click.Group) -> None:
    """Give the command line these verbs."""
    app.command(epilog=TRAIN)(train)


@click.argument("recipe", type=PATH, metavar="RECIPE", help="A recipe: a TOML file, as those in pipelines/.")
@click.option("--out", type=FOLDER, help="The weights folder to make.", show_default="weights/NAME of the recipe")
@click.option(
    "--data",
    type=PATH,
    help="Captioned pictures: a folder, tar shards, a saved data set.",
    show_default="the recipe's own",
)
@click.option(
    "--start", type=FOLDER, help="A weights folder to go on from: its U-Net trains on, and [decoder]; all else stays."
)
@click.option(
    "--only",
    type=click.Choice(["decoder"]),
    help="With --start: this stage alone is trained, the U-Net too is taken as it is.",
)
@click.option(
    "--dry-run", "dry_run", is_flag=True, help="Check everything, measure a few steps, say what it will take; no more."
)
def train(
    recipe: Path,
    out: Path | None,
    data: Path | None,
    start: Path | None,
    only: str | None,
    dry_run: bool,
) -> None:
    """Train every stage of a recipe: tokenizer, CLIP, VAE and U-Net, from captioned pictures to a weights folder.

    Stop it at any moment; the same command goes on from there.
    """

    from latentgen.pixels.recipe import PixelRecipe, read_any_recipe

    what = read_any_recipe(recipe)  # a mistake in it is said before what takes seconds is imported
    if start is not None and isinstance(what, PixelRecipe):
        raise InputError(f"{recipe} is a pixel recipe, which takes no --start; leave it away")
    if only is not None and start is None:
        raise InputError(f"--only {only} needs the weights whose {only} it is; name them with --start")
    if dry_run:
        from latentgen.rehearsal import rehearse

        rehearse(recipe, out, data, report, start, only)
        return
    from latentgen import build, continuation

    if start is None:
        folder = build.train(recipe, out, data, report)
    else:
        folder = continuation.train_on(recipe, start, out, data, report, only=only)
    if os.environ.get("RANK", "0") == "0":
        click.echo(folder)
