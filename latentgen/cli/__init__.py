"""The command line. Each verb is one call into the library, imported when called; one room of verbs a file.

Exit codes: 0 done, 2 something given cannot be used (one line, `latentgen: …`), 130 stopped by Ctrl-C.
"""

import codecs
import errno
import io
import os
import sys
import warnings
from typing import Any, TextIO

import click

from latentgen import __version__
from latentgen.cli import converting, data, evaluating, finetuning, rendering, training
from latentgen.cli.parts import say
from latentgen.errors import InputError, is_no_memory
from latentgen.stopping import STOPPED, stop_at_once


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
    "height": "--size",
    "width": "--size",
    "guidance_interval": "--guidance-interval",
    "clip_skip": "--clip-skip",
    "timesteps": "--timesteps",
    "eta": "--eta",
    "engine": "--engine",
    "feature_cache": "--feature-cache",
    "compile": "--compile",
    "dtype": "--dtype",
    "prediction_type": "--prediction-type",
}

LESS_MEMORY = {  # what a verb needs less of; for what is not here, other programs have to make room
    "render": "render smaller pictures (--size) or fewer at a time (--batch)",
    "replay": "close other programs; size and batch are those that the picture was made with",
    "train": "lower size in [data], or batch in the [train] of the stage it was at",
    "finetune": "give a smaller --size or --batch, or a larger accumulate in --recipe",
    "evaluate": "judge fewer --pictures, or close other programs",
    "tune": "take fewer --pictures, or close other programs",
}

for verbs in (rendering, training, finetuning, evaluating, converting, data):
    verbs.add(app)


def main() -> None:
    """The `latentgen` command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.showwarning = show_warning
    stop_at_once()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files are bytes, and told as they are
        utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "replace")
    context = None
    try:
        with app.make_context("latentgen", sys.argv[1:]) as context:
            app.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.exit(0)
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except InputError as error:
        if error.said:
            sys.exit(2)
        name, _, rest = str(error).partition(" ")
        sys.exit(end(f"{as_typed(name, verb_of(context))} {rest}"))
    except (KeyboardInterrupt, click.Abort):
        sys.exit(end("stopped", STOPPED))
    except BrokenPipeError:
        be_silent(sys.stdout, sys.stderr)  # whoever read us has gone; nothing more to say
        sys.exit(0)
    except click.ClickException as error:
        sys.exit(end(f"{error.format_message()} (see: {command(error)} --help)"))
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            be_silent(sys.stdout)
            sys.exit(end("cannot write the output: no space is left where it goes; free space or send it elsewhere"))
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            sys.exit(end(f"{os.fsdecode(error.filename)}: {error.strerror}; name another place, or mend that"))
        if is_no_memory(error):
            sys.exit(end(f"not enough memory; {LESS_MEMORY.get(verb_of(context), 'close other programs')}"))
        raise


def verb_of(context: click.Context | None) -> str:
    """The verb that was asked for; empty as long as none is known."""
    return (context.invoked_subcommand if context is not None else None) or ""


def as_typed(name: str, verb: str) -> str:
    """The option that a person knows `name` by; the name where the verb has no such option."""
    option = OPTIONS.get(name, name)
    known = app.commands[verb].params if verb in app.commands else []
    return option if any(option in parameter.opts for parameter in known) else name


def be_silent(*streams: TextIO | None) -> None:
    """These take everything and say nothing: what is still buffered fails no second time."""
    for stream in streams:
        if stream is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def end(line: str, code: int = 2) -> int:
    """Say why, on one line, if anybody still reads that, and give the exit code."""
    try:
        say(" ".join(line.split()))
    except BrokenPipeError:
        be_silent(sys.stderr)
    return code


def command(error: click.ClickException) -> str:
    """The command a usage error is about."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    return context.command_path if context is not None else "latentgen"


def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Warnings of ours as one line; those of the libraries are not for who renders a picture."""
    if category.__module__.startswith("latentgen"):
        say(str(message))
