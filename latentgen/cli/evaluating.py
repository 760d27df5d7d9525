"""Verbs of evaluation: evaluate, tune."""

from pathlib import Path

import click

from latentgen.cli.parts import PATH, PLACE, check_report, read_values, say
from latentgen.errors import InputError

# how the JSON files of these verbs begin, by which earlier ones are known
EVALUATION = r'\[\n  \{\n    "weights": ".*",\n    "settings": \{'
TUNING = r'\{\n  "name": ".*",\n  "figure": ".*",\n  "chosen": \{'
split_option = click.option(
    "--split", help="The split that is held out.", show_default="the weights' recipe's, else test"
)
hold_out_option = click.option(
    "--hold-out",
    type=float,
    help="The part held out where none is in it.",
    show_default="the weights' recipe's, else 0.05",
)
captions_option = click.option("--captions", help="files or names.", show_default="the weights' recipe's, else files")
background_option = click.option(
    "--background", help="Under transparent ones.", show_default="the weights' recipe's, else white"
)

EVALUATE = """Examples:

latentgen evaluate weights/icons --data data/icons --out report.html

latentgen evaluate weights/icons --data data/icons --guidances 1,2,4,7 --step-counts 5,10,25

latentgen evaluate weights/mine --data pictures/ --compare weights/icons --pictures 100"""

TUNE = """Examples:

latentgen tune weights/icons --data data/icons --evaluations 20 --dry-run

latentgen tune weights/mine --data pictures/ --evaluations 30 --figure unlikeness --samplers dpmpp-2m,unipc"""


def add(app: click.Group) -> None:
    """Give the command line these verbs."""
    app.command(epilog=EVALUATE)(evaluate)
    app.command(epilog=TUNE)(tune)


@click.argument("weights", type=PLACE, metavar="WEIGHTS", help="A weights folder.")
@click.option("--data", type=PATH, required=True, help="A folder of captioned pictures.")
@click.option(
    "--out", type=PATH, default=Path("report.html"), help="The report; a .json with the figures goes beside it."
)
@click.option("--pictures", type=int, default=400, help="Held-out pictures, at most.")
@split_option
@hold_out_option
@captions_option
@background_option
@click.option("--steps", type=int, help="Denoising steps.", show_default="the weights' own")
@click.option("--guidance", type=float, help="Guidance scale.", show_default="the weights' own")
@click.option("--sampler", help="Sampler.", show_default="the weights' own")
@click.option("--seed", type=int, default=0, help="Of renderings and of what is drawn.")
@click.option(
    "--judge", type=PLACE, default="default", help="default, or a folder with a CLIP, DINOv2 or Inception v3."
)
@click.option("--clip", type=PLACE, help="A CLIP folder, for scores of captions.")
@click.option("--concept", help="The metadata column of what is shown.")
@click.option("--style", help="The metadata column of the style.")
@click.option("--guidances", help="Guidance scales of a curve, as 1,2,4,7.")
@click.option("--step-counts", help="Numbers of steps of a curve, as 5,10,25.")
@click.option("--curve-pictures", type=int, default=24, help="Pictures rendered for each point of a curve.")
@click.option("--compare", type=PLACE, help="Another weights folder, on the same pictures.")
def evaluate(
    weights: str,
    data: Path,
    out: Path,
    pictures: int,
    split: str | None,
    hold_out: float | None,
    captions: str | None,
    background: str | None,
    steps: int | None,
    guidance: float | None,
    sampler: str | None,
    seed: int,
    judge: str,
    clip: str | None,
    concept: str | None,
    style: str | None,
    guidances: str | None,
    step_counts: str | None,
    curve_pictures: int,
    compare: str | None,
) -> None:
    """Judge a model on held-out captions: figures with intervals, and a page of pictures.

    A stopped run goes on from OUT.cache.
    """
    if out.suffix != ".html":
        raise InputError(f"{out} is no .html; the report is a page, name it so")
    import json
    from dataclasses import replace

    from latentgen.checkpoint import find
    from latentgen.durable import write_file
    from latentgen.evaluation.division import Asked, divided, division_of
    from latentgen.evaluation.report import write_report
    from latentgen.evaluation.run import Order
    from latentgen.evaluation.run import evaluate as run
    from latentgen.page import BEGINS

    table = out.with_suffix(".json")
    check_report(out, BEGINS)
    check_report(table, EVALUATION)
    asked = Asked(split, hold_out, captions, background)
    order = Order(data, pictures, steps, guidance, sampler, seed, judge, clip, concept, style, asked=asked)
    scales = () if guidances is None else read_values(guidances, "--guidances", 0)
    counts = () if step_counts is None else tuple(map(int, read_values(step_counts, "--step-counts", 1, whole=True)))
    order = replace(order, guidances=scales, step_counts=counts, curve_pictures=curve_pictures)
    both = [each for each in (weights, compare) if each is not None]
    ways = [division_of(find(each), asked)[0] for each in both]
    judged = [(divided(data, way)[0], way.background) for way in ways]
    if judged[0] != judged[-1]:
        raise InputError(
            f"the recipes of {weights} and {compare} hold other pictures out; say for both what is held out, with "
            "--split, --hold-out, --captions and --background"
        )
    found = [run(each, order, out.with_suffix(".cache"), say) for each in both]
    write_file(table, json.dumps([each.as_dict() for each in found], indent=2).encode())
    write_file(out, write_report(*found).encode())
    for each in found:
        if compare is not None:
            print(f"{each.name}:")
        for name, figure in each.figures.items():
            print(f"{name:45} {figure.value:.4g}  [{figure.low:.4g}, {figure.high:.4g}]  of {figure.count}")
    print(out)


@click.argument("weights", type=PLACE, metavar="WEIGHTS", help="A weights folder.")
@click.option("--data", type=PATH, required=True, help="A folder of captioned pictures.")
@click.option(
    "--evaluations",
    type=int,
    required=True,
    help="What a picture may cost: network evaluations, two a step where guidance acts.",
)
@click.option("--out", type=PATH, default=Path("tuning.json"), help="The whole table as JSON.")
@click.option("--pictures", type=int, default=48, help="Held-out captions rendered by the last candidates.")
@split_option
@hold_out_option
@captions_option
@background_option
@click.option("--figure", default="kid", help="kid, or unlikeness to the caption's own picture.")
@click.option("--samplers", help="Samplers to try, commas between.", show_default="seven of them")
@click.option("--guidances", help="Guidance scales to try.", show_default="1,2,3,4,6")
@click.option("--seed", type=int, default=0, help="Of renderings and of what is drawn.")
@click.option(
    "--judge", type=PLACE, default="default", help="default, or a folder with a CLIP, DINOv2 or Inception v3."
)
@click.option("--dry-run", "dry_run", is_flag=True, help="Search and say; leave the weights as they are.")
def tune(
    weights: str,
    data: Path,
    evaluations: int,
    out: Path,
    pictures: int,
    split: str | None,
    hold_out: float | None,
    captions: str | None,
    background: str | None,
    figure: str,
    samplers: str | None,
    guidances: str | None,
    seed: int,
    judge: str,
    dry_run: bool,
) -> None:
    """Find the best sampler, steps, guidance and average at a price, and make them the weights' defaults.

    A stopped search goes on from OUT.cache.
    """
    if out.suffix != ".json":
        raise InputError(f"{out} is no .json; the table is one, name it so")
    import json
    from dataclasses import replace

    from latentgen.diffusion.sampling import SAMPLERS
    from latentgen.durable import write_file
    from latentgen.evaluation.division import Asked
    from latentgen.request import nearest_sampler
    from latentgen.tuning.report import lines
    from latentgen.tuning.run import Order, Tuned
    from latentgen.tuning.run import tune as run

    check_report(out, TUNING)
    asked = Asked(split, hold_out, captions, background)
    order = Order(data, evaluations, pictures, seed, judge, figure, asked=asked)
    if samplers is not None:
        order = replace(order, samplers=tuple(nearest_sampler(name.strip(), SAMPLERS) for name in samplers.split(",")))
    if guidances is not None:
        order = replace(order, guidances=read_values(guidances, "--guidances", 1))

    def keep(found: Tuned) -> None:
        write_file(out, json.dumps(found.as_dict(), indent=2).encode())

    found = run(weights, order, out.with_suffix(".cache"), say, write=not dry_run, keep=keep)
    for line in lines(found):
        print(line)
    print(f"{weights} is as it was (--dry-run)" if dry_run else f"{weights} renders so by default now")
    print(out)
