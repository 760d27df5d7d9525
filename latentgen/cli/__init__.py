"""The command line. Each verb is one call into the library, imported when called; one room of verbs a file.

Exit codes: 0 done, 2 something given cannot be used (one line, `latentgen: …`), 130 stopped by Ctrl-C.
"""

import os
import sys
import warnings
from typing import Annotated, Any

import typer

from latentgen import __version__
from latentgen.cli import converting, data, evaluating, finetuning, rendering, training
from latentgen.errors import InputError

app = typer.Typer(
    name="latentgen",
    help="Pictures from words, with a model of your own: render prompts, make a picture again, train from a folder.",
    epilog='Start with:  latentgen render "a red apple"',
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # boxes and colours would take a third of the start of --help
    pretty_exceptions_enable=False,
    add_completion=False,
)

OPTIONS = {  # what a person typed, for what Python calls it
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "num_images_per_prompt": "--n",
    "max_embeddings_multiples": "--max-chunks",
    "seed": "--seed",
    "feature_cache": "--feature-cache",
    "compile": "--compile",
    "prediction_type": "--prediction-type",
}

for verbs in (rendering, training, finetuning, evaluating, converting, data):
    verbs.add(app)


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
        if error.said:
            sys.exit(2)
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
