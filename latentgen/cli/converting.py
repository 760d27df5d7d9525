"""Verbs of checkpoints: convert."""

from pathlib import Path
from typing import Annotated

import typer

from latentgen.cli.rendering import PredictionType

CONVERT = """Examples:

latentgen convert model.safetensors weights/model

latentgen convert weights/model model.safetensors

latentgen convert weights/my-lora my-lora.safetensors

latentgen convert weights/my-xl-lora my-xl-lora.safetensors --base weights/xl"""


def add(app: typer.Typer) -> None:
    """Give the command line these verbs."""
    app.command(epilog=CONVERT)(convert)


def convert(
    source: Annotated[str, typer.Argument(help="A .safetensors file, a folder in diffusers' layout, or a hub id.")],
    target: Annotated[Path, typer.Argument(help="The other form: a folder, or a file that ends in .safetensors.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A CLIP tokenizer's folder, for a file that has none beside it.")
    ] = None,
    prediction_type: PredictionType = None,
    base: Annotated[
        str | None, typer.Option(help="The weights an adapter is for, where they are Stable Diffusion XL's.")
    ] = None,
) -> None:
    """Turn a single-file checkpoint into a folder, or a folder into a single file, and render both to compare.

    An adapter (LoRA, DoRA, LoKr, LoHa; a file or its folder) becomes a file in kohya's form.
    """
    from latentgen.convert import convert as run
    from latentgen.models.lora.file import is_adapter
    from latentgen.models.lora.kohya import write_kohya

    if is_adapter(source):
        typer.echo(f"the same changes within {write_kohya(source, target, base):.2g}", err=True)
        typer.echo(target)
        return
    place, difference = run(source, target, tokenizer=tokenizer, prediction_type=prediction_type)
    typer.echo(f"the same latents within {difference:.2g}", err=True)
    typer.echo(place)
