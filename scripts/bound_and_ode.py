"""Why a pixel model's bound and its ODE's likelihood differ: both from the same start, with the same decoder.

usage: python scripts/bound_and_ode.py WEIGHTS [WEIGHTS …] --data FOLDER

Of the same held-out pictures as metrics.json, in bits a dimension, ± one standard error over the pictures:

between   from the noise at the bound's clean end to the prior: the bound's prior + diffusion, and the ODE's
          log q(z | x0) − log p(z), which takes their place
whole     with the bound's own reconstruction added to either
uniform   the ODE's usual value: from uniformly dequantised pictures, at the schedule's own clean end, no reconstruction
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from latentgen.checkpoint import read_json
from latentgen.diffusion.likelihood import Bits, bits
from latentgen.errors import InputError
from latentgen.fields import explained
from latentgen.pixels.build import PixelRun
from latentgen.pixels.recipe import PixelRecipe
from latentgen.pixels.weights import load_pixels

COLUMNS = ("bound, between", "ODE, between", "reconstruction", "bound, whole", "ODE, whole", "ODE, uniform")


def compared(folder: Path, data: Path, cache: Path) -> list[Bits]:
    """The columns of one weights folder. Raises InputError where the data has other classes."""
    model, classes, _ = load_pixels(folder)
    recipe = explained(PixelRecipe, read_json(folder / "recipe.json"), str(folder / "recipe.json"))
    run = PixelRun(recipe, folder, data, lambda line: None, cache)
    if run.classes != classes:
        odd = min({*run.classes} ^ {*classes})
        raise InputError(f"{odd!r} is a class of {data} or of {folder} alone; give the pictures it was trained on")
    held, items = run.judged()
    what, parts = recipe.likelihood, []
    for number, start in enumerate(range(0, len(items), what.batch)):
        x0, labels = held.rows(items[start : start + what.batch], torch.device("cpu"))
        generator = torch.Generator().manual_seed(number)  # as the run had it: the same figures
        bound = model.bound(x0, labels, levels=what.bound_levels, samples=what.bound_samples, generator=generator)
        told = {"probes": what.probes, "tolerance": what.tolerance}
        uniform = model.flow_likelihood(x0, labels, generator=generator, **told)
        ode = model.flow_likelihood(x0, labels, levels=what.bound_levels, generator=generator, **told).between
        assert ode is not None
        between, decoder = bound.prior.rows + bound.diffusion.rows, bound.reconstruction.rows
        rows = (between, ode.rows, decoder, between + decoder, ode.rows + decoder, uniform.bits.rows)
        parts.append(torch.stack([row.double() for row in rows]))
    return [bits(column * torch.log(torch.tensor(2.0)), 1) for column in torch.cat(parts, dim=1)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; 0, or 2 after one line on standard error."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("weights", type=Path, nargs="+", help="folders that a pixel recipe trained")
    options.add_argument("--data", type=Path, required=True, help="the captioned pictures they were trained on")
    given = options.parse_args(arguments)
    print(f"| weights | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}", flush=True)
    try:
        with tempfile.TemporaryDirectory() as cache:
            for folder in given.weights:
                found = compared(folder, given.data, Path(cache))
                print(f"| {folder.name} | {' | '.join(f'{b.mean:.3f} ± {b.error:.3f}' for b in found)} |", flush=True)
    except InputError as error:
        print(f"bound_and_ode: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
