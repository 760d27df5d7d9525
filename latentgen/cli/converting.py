"""Verbs of checkpoints: convert."""

from pathlib import Path

import click

from latentgen.cli.parts import FOLDER, PLACE
from latentgen.cli.rendering import prediction_type_option
from latentgen.errors import InputError

CONVERT = """Examples:

latentgen convert model.safetensors weights/model

latentgen convert weights/model model.safetensors

latentgen convert weights/my-lora my-lora.safetensors

latentgen convert weights/my-xl-lora my-xl-lora.safetensors --base weights/xl"""


def add(app: click.Group) -> None:
    """Give the command line these verbs."""
    app.command(epilog=CONVERT)(convert)


@click.argument(
    "source", type=PLACE, metavar="SOURCE", help="A .safetensors file, a folder in diffusers' layout, or a hub id."
)
@click.argument(
    "target", type=FOLDER, metavar="TARGET", help="The other form: a folder, or a file that ends in .safetensors."
)
@click.option("--tokenizer", type=FOLDER, help="A CLIP tokenizer's folder, for a file that has none beside it.")
@prediction_type_option
@click.option("--base", type=PLACE, help="The weights an adapter is for, where they are Stable Diffusion XL's.")
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
    from latentgen.checkpoint import find
    from latentgen.convert import convert as run
    from latentgen.models.lora.file import is_adapter
    from latentgen.models.lora.kohya import write_kohya

    adapter = is_adapter(source)
    if adapter and (tokenizer, prediction_type) != (None, None):
        raise InputError(f"{source} is an adapter; leave away --tokenizer and --prediction-type, of whole weights")
    if base is not None and not adapter:
        find(source)  # which says so where nothing is there
        raise InputError(f"{source} is no adapter; leave away --base, which names the weights that an adapter is for")
    if adapter:
        click.echo(f"the same changes within {write_kohya(source, target, base):.2g}", err=True)
        click.echo(target)
        return
    place, difference = run(source, target, tokenizer=tokenizer, prediction_type=prediction_type)
    click.echo(f"the same latents within {difference:.2g}", err=True)
    click.echo(place)
