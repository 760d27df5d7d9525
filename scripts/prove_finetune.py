"""Fine-tune weights/icons in four ways on real pictures, and measure what each promises.

usage: python scripts/prove_finetune.py style|subject|word|swapped [--out FOLDER] [--weights weights/icons]
           [--concepts 100] [--dials 0,1,2]

style    LoRA on 150 OpenMoji pictures. Of 100 concepts outside them: how near renderings come to OpenMoji's own
         pictures (Fréchet distance), whose style the nearest real picture has, whether it shows the concept; and what
         the last two are above those of the first dial, of the same prompts and noise. A LoRA that is there is used.
subject  DreamBooth on eight pictures of one robot: whether it is found again in prompts that place it elsewhere, and
         how far other prompts of its class, and others, moved.
word     textual inversion on the same pictures.
swapped  LoRA on red and blue things that are called by the other colour: which colour a prompt gives.
The judge is EfficientNet-Lite0 (weights/judge), which saw none of the pictures. Data: scripts/finetune_data.py.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finetune_data import ROOT, rows_of, swap, taught_and_kept
from PIL import Image

from latentgen import Pipeline, finetune
from latentgen.errors import InputError
from latentgen.evaluation.encoders import Encoder, open_judge
from latentgen.evaluation.metrics import frechet_figure, mean_figure
from latentgen.evaluation.neighbours import Labels, find
from latentgen.fields import explained
from latentgen.finetuning import Finetune
from latentgen.recipe import read_table
from latentgen.training.sheet import contact_sheet

TOKEN, WORD, CLASS = "zwx", "<my-robot>", "robot"
ELSEWHERE = ("{} on the grass", "{} in the snow", "{} under a tree", "{} on a beach", "a photo of {}", "{} at night")
OTHERS = ("a red apple", "a cat, twemoji style", "a house, emojione", "a smiling face, twemoji", "a car, noto emoji")
STEPS = 12
SIZE = 128  # of weights/icons, in pixels


def teach(recipe: str, pictures: str, start: str, out: Path) -> None:
    """Fine-tune by a recipe of pipelines/finetune."""
    path = ROOT / "pipelines/finetune" / f"{recipe}.toml"
    settings = explained(Finetune, read_table(path), f"recipe {path}")
    finetune(ROOT / "data/finetune" / pictures, base=start, out=out, settings=settings, report=say)


def pixels(pipe: Pipeline, prompts: Sequence[str], first: int = 0) -> np.ndarray:
    """(N, H, W, 3) uint8; picture k from seed first + k."""
    found = []
    for start in range(0, len(prompts), 16):
        part = list(prompts[start : start + 16])
        seeds = [first + start + k for k in range(len(part))]
        made = pipe(part, seed=seeds, num_inference_steps=STEPS, output_type="np").images
        found.append((np.asarray(made) * 255).round().astype(np.uint8))
    return np.concatenate(found)


def read(paths: Sequence[Path], size: int = SIZE) -> np.ndarray:
    """(N, size, size, 3) uint8."""
    opened = (Image.open(path).convert("RGB").resize((size, size), Image.Resampling.LANCZOS) for path in paths)
    return np.stack([np.asarray(picture) for picture in opened])


def show(path: Path, rows: Sequence[np.ndarray], labels: Sequence[str], count: int = 8) -> None:
    """Rows of pictures, one below the other."""
    chosen = [Image.fromarray(picture) for row in rows for picture in row[:count]]
    contact_sheet(chosen, min(count, len(rows[0])), [*labels[:count]] * len(rows)).save(path)


def style(start: str, out: Path, judge: Encoder, concepts: int, dials: Sequence[float]) -> dict[str, Any]:
    """Nearer to OpenMoji than the starting weights are, for concepts outside those it learned from."""
    icons, openmoji = rows_of(ROOT / "data/icons"), rows_of(ROOT / "data/openmoji")
    _, kept = taught_and_kept(icons, openmoji)
    asked = kept[:concepts]
    teach("style", "style", start, out)
    real = read([ROOT / "data/openmoji" / row["file_name"] for row in asked])
    known = {row["codepoint"] for row in asked}
    shelf = [row for row in icons if row["codepoint"] in known] + asked
    places = [
        ROOT / ("data/openmoji" if row["style"] == "openmoji" else "data/icons") / row["file_name"] for row in shelf
    ]
    labels = Labels(np.array([row["codepoint"] for row in shelf]), np.array([row["style"] for row in shelf]))
    shelf_features, real_features = judge.features(read(places)), judge.features(real)
    wanted = Labels(np.array([row["codepoint"] for row in asked]), np.full(len(asked), "none"))
    prompts = [f"{row['label']}, openmoji" for row in asked]
    found: dict[str, Any] = {}
    shown = [real]
    before: list[np.ndarray] = []
    pipe = Pipeline.from_pretrained(start, engine="torch")
    name = pipe.load_lora(out, 0.0)
    for dial in dials:
        pipe.set_lora_weight(name, dial)
        made = pixels(pipe, prompts)
        features = judge.features(made)
        near = find(features, wanted, shelf_features, labels)
        votes = [1.0 * (labels.styles[nearest(features, shelf_features)] == "openmoji"), 1.0 * near.concept]
        before = before or votes
        more = [mean_figure(now - was, 0) for now, was in zip(votes, before, strict=True)]
        distance = frechet_figure(features, real_features)
        found[f"dial {dial}"] = {
            "frechet_to_openmoji": [distance.value, distance.low, distance.high],
            "nearest_is_openmoji": float(votes[0].mean()),
            "concept_in_five": float(votes[1].mean()),
            "more_than_at_first": {
                name: [each.value, each.low, each.high]
                for name, each in zip(("nearest_is_openmoji", "concept_in_five"), more, strict=True)
            },
        }
        say(f"style: dial {dial}: {found[f'dial {dial}']}")
        shown.append(made)
    show(out.with_suffix(".png"), shown, [row["label"] for row in asked], 12)
    return found


def nearest(features: np.ndarray, shelf: np.ndarray) -> np.ndarray:
    """The index of the nearest, by cosine."""
    one, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, shelf))
    return np.asarray((one @ other.T).argmax(1))


def subject(start: str, out: Path, judge: Encoder) -> dict[str, Any]:
    """DreamBooth."""
    teach("subject", "subject", start, out)
    plain, tuned = (Pipeline.from_pretrained(weights, engine="torch") for weights in (start, out))
    return recognised(plain, tuned, f"a {TOKEN} {CLASS}", out, judge)


def word(start: str, out: Path, judge: Encoder) -> dict[str, Any]:
    """Textual inversion."""
    teach("word", "subject", start, out)
    pipe = Pipeline.from_pretrained(start, engine="torch")
    plain = Pipeline.from_pretrained(start, engine="torch")
    pipe.load_textual_inversion(out)
    return recognised(plain, pipe, WORD, out, judge)


def recognised(plain: Pipeline, tuned: Pipeline, name: str, out: Path, judge: Encoder) -> dict[str, Any]:
    """How near to the subject's pictures what is rendered is, before and after; how far other prompts moved.

    What is near is asked of pictures that went through the autoencoder, the subject's and all others alike: no
    rendering can be nearer to a picture than the autoencoder lets it. The best that is possible is the subject's own
    pictures, each compared with the other seven; the least is another noise for the same prompt.
    """
    views = read(sorted((ROOT / "data/finetune/subject").glob("*.png")))
    own = judge.features(through(plain, views))
    icons = [row for row in rows_of(ROOT / "data/icons") if row["group"] not in ("flags", "symbols")]
    shelf = judge.features(through(plain, read([ROOT / "data/icons" / row["file_name"] for row in icons[::5]])))
    everything = np.concatenate([shelf, own])
    new = [form.format(name) for form in ("{}", *ELSEWHERE)] * 3
    before = [text.replace(name, f"a {CLASS}") for text in new]
    of_class = [f"a {CLASS}", f"a {CLASS}, noto emoji style", f"a {CLASS}, twemoji", f"a {CLASS} on the grass"]
    first, untaught = pixels(plain, before), pixels(plain, new)
    kept = {part: pixels(plain, asked, 100) for part, asked in (("class", of_class), ("others", OTHERS))}
    anew = {part: pixels(plain, asked, 200) for part, asked in (("class", of_class), ("others", OTHERS))}
    made = pixels(tuned, new)
    after = {part: pixels(tuned, asked, 100) for part, asked in (("class", of_class), ("others", OTHERS))}
    show(out.with_suffix(".png"), [first, made], new, 7)
    show(out.with_name(f"{out.name}-kept.png"), [kept["class"], after["class"]], of_class, 4)
    figures: dict[str, Any] = {}
    sets = {"a robot, before": first, "its name, before": untaught, "its name, after": made}
    for label, pictures in sets.items():
        features = judge.features(pictures)
        figures[label] = {
            "cosine_to_subject": float(cosines(features, own).max(1).mean()),
            "nearest_is_subject": float((nearest(features, everything) >= len(shelf)).mean()),
            "pictures": len(pictures),
        }
    others = np.where(np.eye(len(own)) > 0, -1.0, cosines(own, own))
    figures["the subject's own pictures among each other: cosine"] = float(others.max(1).mean())
    for part, pictures in kept.items():
        was = judge.features(pictures)
        for label, now in (("to what they were", after[part]), ("of another noise", anew[part])):
            figures[f"{part}: cosine {label}"] = float(cosines(judge.features(now), was).diagonal().mean())
    return figures


def through(pipe: Pipeline, pictures: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8, encoded and decoded."""
    found = []
    for start in range(0, len(pictures), 64):
        part = torch.from_numpy(pictures[start : start + 64]).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = pipe.latent.decode(pipe.latent.encode(part).mean)
        found.append((decoded.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8))
    return np.concatenate(found)


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N, M)."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one, other))
    return np.asarray(a @ b.T)


def swapped(start: str, out: Path, judge: Encoder) -> dict[str, Any]:
    """The new captions are followed, against the old ones."""
    teach("swapped", "swapped", start, out)
    things = ("heart", "circle", "square", "triangle", "diamond", "book")
    prompts = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in things] * 4
    pipe = Pipeline.from_pretrained(start, engine="torch")
    first = pixels(pipe, prompts)
    pipe.load_lora(out)
    made = pixels(pipe, prompts)
    show(out.with_suffix(".png"), [first, made], prompts, 12)
    as_named = np.array([1.0 if "red" in prompt else -1.0 for prompt in prompts])
    figures: dict[str, Any] = {}
    for label, pictures in (("before", first), ("after", made)):
        redness = pictures[..., 0].astype(float).mean((1, 2)) - pictures[..., 2].mean((1, 2))
        figures[label] = {
            "of the colour that the old captions say": float((redness * as_named > 0).mean()),
            "of the colour that the new captions say": float((redness * as_named < 0).mean()),
            "pictures": len(prompts),
        }
    figures["a new caption"] = swap("a red heart")
    return figures


Case = Callable[[str, Path, Encoder], dict[str, Any]]
CASES: dict[str, Case] = {"subject": subject, "word": word, "swapped": swapped}


def say(line: str) -> None:
    """Progress, on standard error."""
    print(line, file=sys.stderr, flush=True)


def numbers(text: str) -> list[float]:
    """Numbers with commas between."""
    return [float(number) for number in text.split(",")]


def main() -> int:
    """Run a case and print its figures; 0, or 2 after one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("case", choices=("style", *CASES))
    parser.add_argument("--weights", default=str(ROOT / "weights/icons"))
    parser.add_argument("--out", type=Path, default=ROOT / "data/finetuned")
    parser.add_argument("--concepts", type=int, default=100, help="style: how many are asked for")
    parser.add_argument("--dials", type=numbers, default="0,1,2", help="style: those that are tried")
    given = parser.parse_args()
    cases: dict[str, Case] = {**CASES, "style": partial(style, concepts=given.concepts, dials=given.dials)}
    began = time.monotonic()
    try:
        if given.concepts < 2:
            raise InputError(f"--concepts is {given.concepts}; give 2 or more")
        figures = cases[given.case](given.weights, given.out / given.case, open_judge())
    except InputError as error:
        print(f"prove_finetune: {error}", file=sys.stderr)
        return 2
    print(json.dumps({given.case: figures, "seconds": round(time.monotonic() - began)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
