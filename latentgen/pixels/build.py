"""From a pixel recipe to a weights folder: the data, the model, its one stage, its likelihoods, and all of it saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from latentgen.data import Buckets, CaptionedFolder, Ledger, Pixels
from latentgen.data.page import keep_ledger
from latentgen.data.remote import as_told
from latentgen.durable import alone, remove_leftovers, write_file
from latentgen.errors import InputError
from latentgen.models.pixel import pixel_unet
from latentgen.pixels.model import BINS, Family, PixelModel, sampler_of
from latentgen.pixels.objective import LabelledPictures, PixelObjective
from latentgen.pixels.recipe import PixelRecipe, read_pixel_recipe
from latentgen.pixels.weights import class_sheet, save_pixels
from latentgen.training import board
from latentgen.training.cache import cached
from latentgen.training.finish import check_places, notice_of, state_of
from latentgen.training.intake import divide, look_over, read_pictures
from latentgen.training.loop import LoopSettings
from latentgen.training.optimizer import check_optimizers
from latentgen.training.precision import accelerator_for
from latentgen.training.report import write_page
from latentgen.training.stage import Pace, Report, fingerprint, run_stage, settings_fingerprint

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
CLASSES_MOST = 1000


def train(
    recipe: Path,
    out: Path | None = None,
    data: Path | None = None,
    report: Report = print,
    *,
    cache: Path | None = None,
    **changes: Any,
) -> Path:
    """Train a pixel recipe's model, take its likelihoods and write the weights folder; what is done is not done again.

    Arguments as `latentgen.build.train`'s; cache: where decoded pictures are kept, if not with the run's state;
    changes: of top-level keys of the recipe, such as `objective`.
    """
    what = read_pixel_recipe(recipe, **changes)
    return PixelRun(what, out or Path("weights") / what.name, data or what.data.folder, report, cache).all()


@dataclass
class PixelRun:
    """One run of a pixel recipe."""

    recipe: PixelRecipe
    out: Path
    folder: Path
    say: Report
    cache: Path | None = None

    def __post_init__(self) -> None:
        check_optimizers([self.recipe.train.optimizer])

    @cached_property
    def state(self) -> Path:
        """Where the run keeps its own things."""
        return state_of(self.out)

    @cached_property
    def accelerator(self) -> Accelerator:
        """Devices and processes; everything is fp32."""
        return accelerator_for("fp32")

    def report(self, line: str) -> None:
        """One line, from the main process alone."""
        if self.accelerator.is_main_process:
            self.say(line)

    def all(self) -> Path:
        """Train, judge, save."""
        check_places(self.out, self.folder, self.recipe.data.captions)
        what, main = self.recipe, self.accelerator.is_main_process
        self.report(f"{what.name}: {what.objective} with {what.network.blocks} blocks, on {self.accelerator.device}")
        if not board.is_there():
            self.report(f"{what.name}: {board.ABSENT}")
        with alone(self.state) if main else nullcontext():
            if main:
                remove_leftovers(self.state)
            if main:
                self.report(f"data: {self.ledger.line()}; see {keep_ledger(self.ledger, self.state)}")
            model, trained = self.trained()
            if main:
                figures = {"pixels": dict(trained), "likelihood": self.likelihoods(model)}
                told = what.model_dump(mode="json")
                licences = notice_of(self.folder)
                sheet = self.sheet(model)
                save_pixels(self.out, model, self.classes, told, figures, sheet=sheet, licences=licences)
                self.report(f"{what.name}: wrote {self.out}")
                page = write_page(what.name, self.state, figures, told)
                write_file(self.state / "report.html", page.encode())
        return self.out

    # --- data

    @cached_property
    def _decoded(self) -> tuple[CaptionedFolder, Pixels]:
        """The folder and its pixels; what cannot be used is listed."""
        what = self.recipe.data
        with self.accelerator.main_process_first():
            folder, pixels, remark = read_pictures(
                self.folder,
                what.size,
                self._kept,
                captions=what.captions,
                background=what.background,
                held_out=what.held_out,
                part=what.hold_out,
                folders=what.folders,
                buckets=Buckets.square(what.size, what.upscale),
            )
        for problem in (*folder.problems, *pixels.problems):
            self.report(f"data: left out {problem.path}: {problem.reason}")
        for line in filter(None, (folder.remark, remark)):
            self.report(line)
        return folder, pixels

    @property
    def _kept(self) -> Path:
        return self.cache or self.state / "cache"

    @cached_property
    def ledger(self) -> Ledger:
        """What becomes of every file of the folder."""
        what = self.recipe.data
        shapes = Buckets.square(what.size, what.upscale)
        return look_over(self._decoded[0], what.size, what.background, self._kept, shapes)

    @cached_property
    def _pictures(self) -> tuple[LabelledPictures, LabelledPictures, np.ndarray, str, tuple[str, ...]]:
        """To train on, held out, how often each is seen, a fingerprint of all, and the classes."""
        what = self.recipe.data
        data = divide(self.folder, self._decoded[1], what.held_out, what.weights)
        told = [picture.captions[0] for picture in data.pictures]
        classes = tuple(sorted(set(told)))
        if len(classes) > CLASSES_MOST:
            raise InputError(
                f"{self.folder} has {len(classes)} different captions, which a pixel recipe takes for classes "
                f"({CLASSES_MOST} at most); give a folder with a class as the caption of each picture"
            )
        number = {name: place for place, name in enumerate(classes)}
        unknown = next((name for name in data.held_captions if name not in number), None)
        if unknown is not None:
            raise InputError(f"the class {unknown!r} is held out and never trained on; mark some of it for training")
        if len(data.held_captions) < 2:
            raise InputError(f"{self.folder} has one picture held out, which gives no standard error; mark two or more")
        taught, tested = (np.array([number[name] for name in names]) for names in (told, data.held_captions))
        train = LabelledPictures(self._planes(data.pixels, f"train-{data.fingerprint}"), taught)
        held = LabelledPictures(self._planes(data.held_pixels, f"held-{data.fingerprint}"), tested)
        self.report(
            f"data: {len(train)} pictures of {len(classes)} classes, {len(held)} held out, from {as_told(self.folder)}"
        )
        return train, held, data.weights, data.fingerprint, classes

    def _planes(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """(N, H, W, 3) uint8 -> (N, C, H, W), memory-mapped, C being 1 where the recipe says grey."""
        if not self.recipe.data.grey:
            return pixels.transpose(0, 3, 1, 2)
        shape = (len(pixels), 1, *pixels.shape[1:3])

        def parts() -> Iterator[np.ndarray]:
            for start in range(0, len(pixels), 4096):
                yield np.rint(pixels[start : start + 4096] @ LUMA).astype(np.uint8)[:, None]

        with self.accelerator.main_process_first():
            return cached(self._kept / f"grey-{name[:40]}.npy", shape, np.uint8, parts)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The classes by number: the captions, sorted."""
        return self._pictures[4]

    # --- the model

    def model(self) -> PixelModel:
        """The model before its first step; its weights start from the recipe's seed."""
        what = self.recipe
        sampler_of(what.objective, what.sample.sampler)  # before the hours, not after them
        if what.objective == "ddpm" and what.sample.steps > what.diffusion.levels:
            raise InputError(
                f"sample.steps {what.sample.steps} are more than the {what.diffusion.levels} diffusion.levels of ddpm; "
                "give fewer steps, or more levels"
            )
        family = Family.of({"objective": what.objective, **what.diffusion.model_dump()})
        channels = 1 if what.data.grey else 3
        torch.manual_seed(what.seed)
        unet = pixel_unet(
            **what.network.model_dump(),
            side=what.data.size,
            picture_channels=channels,
            classes=len(self.classes),
            learned_variance=family.learns_variance,
        )
        return PixelModel(
            unet, family, len(self.classes), (channels, what.data.size, what.data.size), what.network.patch
        )

    @cached_property
    def place(self) -> Path:
        """The folder of the stage, named for all it depends on."""
        what = self.recipe
        parts = (what.seed, what.objective, what.data.grey, what.network.model_dump(), what.diffusion.model_dump())
        loop = settings_fingerprint(LoopSettings(**what.train.model_dump()))
        return self.state / f"pixels-{fingerprint(*parts, loop, self._pictures[3])}"

    def trained(self) -> tuple[PixelModel, Mapping[str, float]]:
        """The model, its averaged weights in it, and its figures."""
        what = self.recipe
        train, held, weights, _, _ = self._pictures
        model = self.model()
        count = sum(weight.numel() for weight in model.parameters())
        self.report(f"{what.name}: {count / 1e6:.2f}M weights")
        objective = PixelObjective(
            model,
            train,
            held,
            self._validated,
            weights,
            self.accelerator,
            label_dropout=what.diffusion.label_dropout,
            sheet=lambda: self.sheet(model),
        )
        return model.eval(), {**self._run(objective), "weights": float(count)}

    def _run(self, objective: PixelObjective) -> Mapping[str, float]:
        what = self.recipe
        return run_stage(
            "pixels",
            objective,
            LoopSettings(**what.train.model_dump()),
            self.place,
            self.accelerator,
            seed=what.seed,
            gate=what.gate,
            pace=Pace(**what.pace.model_dump()),
            report=self.report,
            held_out=fingerprint(self._validated.tolist(), self._pictures[1].labels[self._validated].tolist()),
        )

    def _chosen(self, count: int) -> np.ndarray:
        """So many of the held-out pictures at most, whatever order their files are in."""
        return np.random.default_rng(self.recipe.seed).permutation(len(self._pictures[1]))[:count]

    @property
    def _validated(self) -> np.ndarray:
        """Which held-out pictures every validation is of."""
        return np.sort(self._chosen(self.recipe.validation))

    def sheet(self, model: PixelModel) -> Any:
        """A column for each class, from fixed noise."""
        what, classes = self.recipe.sample, range(len(self.classes))
        labels = [label for _ in range(what.rows) for label in classes]
        seeds = [what.seed + number for number in range(len(labels))]
        options = what.model_dump(include={"steps", "sampler", "guidance"})
        return class_sheet(model.render(labels, seeds, **options), self.classes)

    # --- likelihoods

    def judged(self) -> tuple[LabelledPictures, np.ndarray]:
        """The held-out pictures, and which of them the likelihoods are taken of."""
        return self._pictures[1], self._chosen(self.recipe.likelihood.pictures)

    def likelihoods(self, model: PixelModel) -> dict[str, float]:
        """The bound with its terms and the ODE's value, bits a dimension given the class, with standard errors.

        On as many held-out pictures as the recipe says, by fixed draws; kept beside the stage's checkpoints.
        """
        what = self.recipe.likelihood
        steps, classes = self.recipe.train.steps, self._pictures[1].labels.tolist()
        kept = self.place / f"likelihood-{fingerprint(what.model_dump(), steps, classes)}.json"
        if kept.is_file():
            figures: dict[str, float] = json.loads(kept.read_text(encoding="utf-8"))
            return figures
        held, items = self.judged()
        rows: dict[str, list[torch.Tensor]] = {}
        for number, start in enumerate(range(0, len(items), what.batch)):
            x0, labels = held.rows(items[start : start + what.batch], self.accelerator.device)
            generator = torch.Generator().manual_seed(number)
            bound = model.bound(x0, labels, levels=what.bound_levels, samples=what.bound_samples, generator=generator)
            for name, term in bound._asdict().items():
                rows.setdefault(f"bound_{name}", []).append(term.rows.detach())
            ode = model.flow_likelihood(x0, labels, probes=what.probes, tolerance=what.tolerance, generator=generator)
            rows.setdefault("ode", []).append(ode.bits.rows)
            self.report(f"{self.recipe.name}: likelihood of {start + len(x0)} of {len(items)} pictures")
        figures = {}
        for name, parts in rows.items():
            values = torch.cat([part.double().cpu() for part in parts])
            figures[name] = float(values.mean())
            figures[f"{name}_error"] = float(values.std()) / len(values) ** 0.5
        figures |= {"pictures": float(len(items)), "levels_of_grey": float(BINS)}
        shown = ", ".join(
            f"{name.replace('_', ' ')} {figures[name]:.3f} ± {figures[f'{name}_error']:.3f}" for name in rows
        )
        self.report(f"{self.recipe.name}: bits a dimension: {shown}")
        write_file(kept, (json.dumps(figures, indent=2) + "\n").encode())
        return figures
