"""What the recipe keys for small models do: the same short training with each of them, judged alike; a table.

usage: python scripts/compare_keys.py [--recipe pipelines/icons-64.toml] [--data FOLDER] [--out runs/keys]
           [--only 'plain;layout;…'] [--steps 600] [--pictures 100] [--seed 0]

The recipe is made small (a U-Net of 64 and 128 channels) and short, then trained once for each variant into OUT/NAME;
stages that a variant does not touch are trained once for all. What is done is not done again; what another recipe, seed
or length made, or other data, stays, and OUT is refused. Each is evaluated on the held-out pictures; in brackets 95 %
bootstrap intervals. One seed: a difference inside the intervals is none.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from latentgen.build import Run
from latentgen.checkpoint import read_json
from latentgen.durable import write_file
from latentgen.errors import InputError
from latentgen.evaluation.metrics import Figure
from latentgen.evaluation.run import Order, evaluate
from latentgen.fields import explained
from latentgen.recipe import Recipe, read_recipe

ROOT = Path(__file__).parents[1]
VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {  # name -> section -> keys
        "plain": {},
        "min-snr": {"unet": {"weighting": "min-snr"}},
        "logit-normal": {"unet": {"times": "logit-normal", "times_mean": 1.0, "times_std": 1.4}},
        "flow, logit-normal": {"unet": {"schedule": "flow", "prediction": "flow", "times": "logit-normal"}},
        "layout": {"layout": {"train": {"steps": 400}}},
        "layout, logit-normal": {
            "layout": {"train": {"steps": 400}},
            "unet": {"times": "logit-normal", "times_mean": 1.0, "times_std": 1.4},
        },
        "align": {"unet": {"align": 0.5}},
        "disperse": {"unet": {"disperse": 0.25}},
        "equivariance": {"vae": {"loss": {"equivariance": 0.5}}},
    }
)
SHOWN = {
    "validation loss": "validation loss",
    "Fréchet distance": "Fréchet distance",
    "KID": "KID",
    "precision": "precision",
    "recall": "recall",
    "reconstruction: PSNR, dB": "VAE's PSNR, dB",
}


def small(recipe: Path, name: str, steps: int, seed: int, data: Path | None = None) -> Recipe:
    """The recipe with a small U-Net and short stages, and the variant's keys. data: instead of its own."""
    table = read_recipe(recipe).model_dump(mode="json", exclude_unset=True)
    if data is not None:
        table["data"]["folder"] = str(data)
    for stage, length in (("clip", 150), ("vae", 500), ("unet", steps)):
        table[stage]["train"] |= {"steps": length, "warmup": 100 if stage == "unet" else 50}
    for key in ("times", "times_mean", "times_std", "align"):
        table["unet"].pop(key, None)
    table.pop("decoder", None)
    layout = table.pop("layout", {"train": {"batch": 256, "rate": 1.5e-3, "warmup": 50}})
    if "layout" in VARIANTS[name]:
        table["layout"] = layout
    for stage in ("clip", "layout", "vae", "unet"):
        if stage in table:
            table[stage]["gate"] = {}
    table["unet"] |= {"channels": [64, 128], "head_width": 64}
    table["unet"]["train"] |= {"batch": 32, "rate": 1.5e-3, "ema": 0.995}
    table["pace"] = {"validate_steps": steps}
    for section, keys in VARIANTS[name].items():
        for key, value in keys.items():
            table[section][key] = {**table[section].get(key, {}), **value} if isinstance(value, dict) else value
    return explained(Recipe, {**table, "seed": seed}, f"recipe {recipe}")


def is_done(folder: Path, recipe: Recipe) -> bool:
    """Whether the variant is there already. Raises InputError where it is another recipe's or of other data."""
    if not (folder / "manifest.json").is_file():
        return False
    where = folder / "recipe.json"
    if explained(Recipe, read_json(where), str(where)) != recipe:
        raise InputError(f"{folder} was trained by another recipe or on other data; give another --out")
    return True


def told(figure: Figure | None) -> str:
    """A cell: the figure and its interval."""
    if figure is None:
        return ""
    return f"{figure.value:.3g} [{figure.low:.3g}, {figure.high:.3g}]"


def table(found: Mapping[str, Mapping[str, Figure]]) -> str:
    """Markdown: a row for each variant."""
    lines = [f"| key | {' | '.join(SHOWN.values())} |", "|---" * (len(SHOWN) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(told(of.get(key)) for key in SHOWN)} |" for name, of in found.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; 0, or 2 after one line on standard error."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", type=Path, default=ROOT / "pipelines/icons-64.toml", help="the recipe")
    options.add_argument("--data", type=Path, help="captioned pictures instead of the recipe's")
    options.add_argument("--out", type=Path, default=ROOT / "runs/keys", help="where the weights folders go")
    options.add_argument("--only", default=";".join(VARIANTS), help="variants, with semicolons between them")
    options.add_argument("--steps", type=int, default=600, help="of the U-Net")
    options.add_argument("--pictures", type=int, default=100, help="held-out pictures to judge by")
    options.add_argument("--seed", type=int, default=0, help="of the training")
    given = options.parse_args(arguments)
    chosen = [name.strip() for name in given.only.split(";")]
    unknown = [name for name in chosen if name not in VARIANTS]
    if unknown:
        print(f"compare_keys: no variant {unknown[0]!r}; there is {'; '.join(VARIANTS)}", file=sys.stderr)
        return 2

    def report(line: object) -> None:
        print(line, file=sys.stderr, flush=True)

    found: dict[str, Mapping[str, Figure]] = {}
    try:
        recipes = {name: small(given.recipe, name, given.steps, given.seed, given.data) for name in chosen}
        missing = [name for name, recipe in recipes.items() if not is_done(given.out / name, recipe)]
        for name, recipe in recipes.items():
            report(f"--- {name}")
            folder = given.out / name
            if name in missing:
                Run(recipe, given.out / "model", recipe.data.folder, report).all().rename(folder)
            order = Order(recipe.data.folder, pictures=given.pictures)
            found[name] = evaluate(folder, order, given.out / "cache", report).figures
            write_file(given.out / "table.md", (table(found) + "\n").encode())
    except InputError as error:
        print(f"compare_keys: {error}", file=sys.stderr)
        return 2
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
