"""The command line. Each verb is one call into the library, imported when called; one room of verbs a file.

Exit codes: 0 done, 2 something given cannot be used (one line, `latentgen: …`), 130 stopped by Ctrl-C.
"""

import errno
import os
import sys
import warnings
from typing import Any

import click

from latentgen import __version__
from latentgen.cli import converting, data, evaluating, finetuning, rendering, training
from latentgen.cli.parts import say
from latentgen.errors import InputError


class Verbs(click.Group):
    """Verbs in the order in which they are named here."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(self.commands)


@click.group(
    cls=Verbs,
    name="latentgen",
    help="Pictures from words, with a model of your own: render prompts, make a picture again, train from a folder.",
    epilog='Start with:  latentgen render "a red apple"',
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    invoke_without_command=True,
)
@click.option("--version", is_flag=True, help="Say the version and stop.")
@click.pass_context
def app(context: click.Context, version: bool) -> None:
    """What comes before a verb."""
    if version:
        click.echo(f"latentgen {__version__}")
        context.exit()
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        context.exit()


OPTIONS = {  # what a person typed, for what Python calls it
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "num_images_per_prompt": "--n",
    "max_embeddings_multiples": "--max-chunks",
    "seed": "--seed",
    "feature_cache": "--feature-cache",
    "compile": "--compile",
    "dtype": "--dtype",
    "prediction_type": "--prediction-type",
}

NO_MEMORY = ("out of memory", "can't allocate memory", "Failed to allocate memory")  # torch's words, ONNX Runtime's

for verbs in (rendering, training, finetuning, evaluating, converting, data):
    verbs.add(app)


def main() -> None:
    """The `latentgen` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.showwarning = show_warning
    try:
        with app.make_context("latentgen", sys.argv[1:]) as context:
            app.invoke(context)
        sys.exit(0)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except InputError as error:
        if error.said:
            sys.exit(2)
        name, _, rest = str(error).partition(" ")
        sys.exit(refuse(f"{OPTIONS.get(name, name)} {rest}"))
    except (KeyboardInterrupt, click.Abort):
        say("stopped")
        sys.exit(130)
    except BrokenPipeError:
        be_silent()  # whoever read us has gone; nothing more to say
        sys.exit(0)
    except click.ClickException as error:
        sys.exit(refuse(f"{error.format_message()} (see: {command(error)} --help)"))
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            be_silent()
            sys.exit(refuse("cannot write the output: no space is left where it goes; free space or send it elsewhere"))
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            sys.exit(refuse(f"{os.fsdecode(error.filename)}: {error.strerror}; name another place, or mend that"))
        if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
            sys.exit(refuse("not enough memory; render smaller pictures (--size) or fewer at a time (--batch)"))
        raise


def be_silent() -> None:
    """Standard output takes everything and says nothing: what is still buffered fails no second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refuse(line: str) -> int:
    """Say why, on one line, and give the exit code."""
    say(" ".join(line.split()))
    return 2


def command(error: click.ClickException) -> str:
    """The command a usage error is about."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    return context.command_path if context is not None else "latentgen"


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Warnings of ours as one line; those of the libraries are not for who renders a picture."""
    if category.__module__.startswith("latentgen"):
        say(str(message))
