"""Verbs of checkpoints: convert."""

from pathlib import Path

import click

from latentgen.cli.parts import PATH
from latentgen.cli.rendering import prediction_type_option

CONVERT = """Examples:

latentgen convert model.safetensors weights/model

latentgen convert weights/model model.safetensors

latentgen convert weights/my-lora my-lora.safetensors

latentgen convert weights/my-xl-lora my-xl-lora.safetensors --base weights/xl"""


def add(app: click.Group) -> None:
    """Give the command line these verbs."""
    app.command(epilog=CONVERT)(convert)


@click.argument("source", metavar="SOURCE", help="A .safetensors file, a folder in diffusers' layout, or a hub id.")
@click.argument(
    "target", type=PATH, metavar="TARGET", help="The other form: a folder, or a file that ends in .safetensors."
)
@click.option("--tokenizer", type=PATH, help="A CLIP tokenizer's folder, for a file that has none beside it.")
@prediction_type_option
@click.option("--base", help="The weights an adapter is for, where they are Stable Diffusion XL's.")
def convert(
    source: str,
    target: Path,
    tokenizer: Path | None,
    prediction_type: str | None,
    base: str | None,
) -> None:
    """Turn a single-file checkpoint into a folder, or a folder into a single file, and render both to compare.

    An adapter (LoRA, DoRA, LoKr, LoHa; a file or its folder) becomes a file in kohya's form.
    """
    from latentgen.convert import convert as run
    from latentgen.models.lora.file import is_adapter
    from latentgen.models.lora.kohya import write_kohya

    if is_adapter(source):
        click.echo(f"the same changes within {write_kohya(source, target, base):.2g}", err=True)
        click.echo(target)
        return
    place, difference = run(source, target, tokenizer=tokenizer, prediction_type=prediction_type)
    click.echo(f"the same latents within {difference:.2g}", err=True)
    click.echo(place)
