"""The whole of a fine-tuning run: look over, choose, train, prove, save."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from latentgen.checkpoint import read_json
from latentgen.data.variants import Augmentation
from latentgen.durable import alone, remove_leftovers, write_file
from latentgen.errors import InputError
from latentgen.finetuning.base import Base
from latentgen.finetuning.examples import Examples, count_pictures, read_examples
from latentgen.finetuning.methods import Trainee, make_trainee, untrained
from latentgen.finetuning.objective import Conditions, FinetuneObjective, Kept, KeptConditions, LiveConditions, Times
from latentgen.finetuning.page import Told, how_to_use, write_page
from latentgen.finetuning.prior import CHECKED, prior_prompts, render_prior
from latentgen.finetuning.prove import Proof, look, prove
from latentgen.finetuning.settings import Chosen, Finetune, choose
from latentgen.image import to_bytes
from latentgen.training.cache import cached, latent_moments
from latentgen.training.captions import CaptionTable
from latentgen.training.denoise import Latents
from latentgen.training.draw import Draw, Order
from latentgen.training.finish import Before, check_outside, check_place, notice_of, state_of
from latentgen.training.intake import keep_ledger
from latentgen.training.loop import LoopSettings
from latentgen.training.memory import saying_what_saves
from latentgen.training.optimizer import check_optimizers
from latentgen.training.precision import accelerator_for
from latentgen.training.sheet import contact_sheet
from latentgen.training.snapshots import Snapshots
from latentgen.training.stage import Pace, Report, duration, fingerprint, run_stage
from latentgen.values import as_path

ABOUT = "finetune.json"  # in the folder that is written: what it is, of what, by which settings
SHOWN = 4  # new prompts, and as many old ones, on a sheet
STAGE = "finetune"


def finetune(
    pictures: str | Path,
    *,
    out: str | Path,
    base: str | Path | None = None,
    settings: Finetune | Mapping[str, Any] | None = None,
    report: Report = print,
    **asked: Any,
) -> Path:
    """Teach a finished pipeline somebody's captioned pictures; returns the folder `out`, proved.

    pictures: a captioned folder (DreamBooth and textual inversion need no captions). base: the weights to start from,
    as `Pipeline.from_pretrained` takes them; they are not changed. settings, or its fields by name: see `Finetune`.
    Interrupted, the same call goes on. Raises InputError, one line, and leaves `out` as it was.
    """
    if settings is not None and asked:
        raise InputError(f"settings and {next(iter(asked))} are both given; put it into the settings")
    what = Finetune.of(asked if settings is None else settings)
    what.check()
    return Run(as_path("pictures", pictures), base, as_path("out", out), what, report).all()


@dataclass
class Run:
    """One run. Its own things (checkpoints, caches, sheets) stand beside the result, in OUT.training."""

    folder: Path
    start: str | Path | None
    out: Path
    asked: Finetune
    say: Report
    reasons: tuple[str, ...] = field(default=(), init=False)

    @property
    def state(self) -> Path:
        """Where the run keeps its own things."""
        return state_of(self.out)

    @cached_property
    def accelerator(self) -> Accelerator:
        """Devices and precision."""
        found = accelerator_for(self.asked.precision)
        if found.num_processes > 1:
            raise InputError("finetune runs in one process; start it without torchrun or accelerate launch")
        return found

    def all(self) -> Path:
        """Look over, choose, train, prove, save."""
        check_optimizers([self.asked.optimizer])
        self._check_place()
        folder, count, marked = count_pictures(self.folder, self.asked)
        base = Base.open(self.start, self.asked, self.accelerator.device)
        chosen = self._choose(base, count, marked)
        what = chosen.settings
        with alone(self.state):
            remove_leftovers(self.state)
            examples = read_examples(folder, what, self.state / "cache", self.say)
            key = self._key(base, what, examples)
            if self._is_done(key):
                self.say(f"finetune: done before; {self.out} is what this command makes")
                return self.out
            self._announce(base, chosen, examples)
            earlier = Before.of(base.checkpoint.folder)
            return _Lesson(self, base, what, chosen.reasons, examples, key, earlier).learn()

    def _check_place(self) -> None:
        """Raises InputError where the result would lie among the pictures, or where something else stands."""
        check_outside(self.out, self.folder)
        check_place(self.out, ABOUT, ("*",))

    def _choose(self, base: Base, count: int, marked: int) -> Chosen:
        chosen = choose(self.asked, count, base.start, marked)
        factor, size = base.pipe.terms.factor, int(chosen.settings.size or 0)
        if size % factor or size < factor:
            raise InputError(f"size is {size}; for these weights it must be a multiple of {factor}")
        return chosen

    def _key(self, base: Base, what: Finetune, examples: Examples) -> str:
        """Changes with anything that the result depends on."""
        captions = [picture.captions for picture in (*examples.pictures, *examples.held)]
        seen = [content(part) for part in (examples.pixels, examples.held_pixels)]
        later = {"folders"} if what.varied else {"folders", "mirror", "scale", "versions"}  # runs of before go on
        told = what.model_dump(mode="json", exclude=later)  # what folders come to is in the pictures
        beside = ["lora"] if what.adapter == "dora" and what.text_encoder else []  # text encoders had DoRA too once
        return fingerprint(base.checkpoint.fingerprint, told, captions, seen, *beside)

    @property
    def _about(self) -> Path:
        return self.out / ABOUT

    def _is_done(self, key: str) -> bool:
        """Whether `out` is this run's result. Raises InputError where another's stands there."""
        if not self._about.is_file():
            return False
        if read_json(self._about).get("key") == key:
            return True
        raise InputError(f"{self.out} holds what another run made; name another place with --out, or move it")

    def _announce(self, base: Base, chosen: Chosen, examples: Examples) -> None:
        what = chosen.settings
        captions = examples.captions.texts
        self.say(
            f"finetune: {what.method} of {base.checkpoint.folder.name} ({base.count / 1e6:.1f}M weights) on "
            f"{len(examples.pictures)} pictures of {what.size} px with {len(captions)} captions, {len(examples.held)} "
            f"held out; on {self.accelerator.device}"
        )
        for reason in chosen.reasons:
            self.say(f"chosen: {reason}")
        if len(captions) == 1 and what.method not in ("dreambooth", "textual-inversion") and len(examples.pictures) > 1:
            self.say(f"data: all pictures have one caption, {captions[0]!r}: it will mean all that they show")
        told = [*captions, *(text for picture in examples.held for text in picture.captions)]
        lengths = {text: base.text.count(text) for text in dict.fromkeys(told)}
        self.say(keep_ledger(examples.ledger, lengths, base.text.tokenizer, self.state))


@dataclass
class _Lesson:
    """What is taught, once everything is chosen."""

    run: Run
    base: Base
    what: Finetune
    reasons: tuple[str, ...]
    examples: Examples
    key: str
    earlier: Before

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """What is looked at: some of the new captions, some of what the starting weights were looked at with."""
        new = self.what.prompts or tuple(dict.fromkeys(picture.captions[0] for picture in self._spread()))[:SHOWN]
        word = self.what.token if self.what.method == "textual-inversion" else None
        if word is not None and not any(word in prompt for prompt in new):
            new = (f"a picture of {word}", *new)  # nothing else shows what was learned
        if self.what.method == "dreambooth" and not self.what.prompts:
            new += (f"{new[0]} on the grass", f"{new[0]} in the snow")
        return (*new, *self.base.prompts[: max(SHOWN, 2)])

    @property
    def new(self) -> int:
        """How many of the prompts are new ones."""
        return len(self.prompts) - len(self.base.prompts[: max(SHOWN, 2)])

    def _spread(self) -> Sequence[Any]:
        pictures = self.examples.held or self.examples.pictures
        return [pictures[k] for k in np.linspace(0, len(pictures) - 1, min(SHOWN, len(pictures))).astype(int)]

    def learn(self) -> Path:
        """Train, keep the best, prove, save."""
        run, base, what = self.run, self.base, self.what
        size = int(what.size or 0)
        began = time.monotonic()
        first = look(untrained(base, what), base, self.prompts, size)
        watched, prior = self._watched(), self._prior()
        trainee = make_trainee(base, what)
        objective = self._objective(trainee, watched, prior, first)
        settings = self._loop()
        self._foresee(objective, settings)
        place = run.state / f"{STAGE}-{self.key}"
        before = self._before(objective, place)
        patience = what.patience if what.keep == "best" else 0
        pace = Pace(log_seconds=10, save_seconds=120, validate_steps=int(what.validate_steps or 1), patience=patience)
        figures = dict(
            run_stage(
                STAGE, objective, settings, place, run.accelerator, seed=what.seed, gate={}, pace=pace, report=run.say
            )
        )
        if what.keep == "best" and (best := Snapshots(place / "checkpoints").load_best(trainee.module)) is not None:
            run.say(f"finetune: keeps step {best['step']}, whose held-out loss {best['value']:.4g} is the least")
            figures |= {"kept_step": float(best["step"])}
        trainee.settle()
        figures |= objective.validate()  # of what is saved
        figures |= {f"{name}_before": value for name, value in before.items()}

        def finish(aside: Path) -> None:
            proof = prove(base, trainee, what, first, self.prompts, aside)
            run.say(proof.line())
            self._tell(aside, place, figures, proof, first, time.monotonic() - began)

        trainee.save(run.out, finish)
        run.say(f"finetune: wrote {run.out}; {self._use}")
        return run.out

    def _loop(self) -> LoopSettings:
        what = self.what
        names = ("steps", "batch", "rate", "warmup", "decay", "weight_decay", "ema", "optimizer", "accumulate")
        chosen = {name: getattr(what, name) for name in names}
        if what.method == "textual-inversion":
            chosen["weight_decay"] = 0.0
        return LoopSettings(**chosen)

    def _texts(self, prompts: Sequence[str]) -> tuple[str, ...]:
        told = [*self.examples.captions.texts, *(picture.captions[0] for picture in self.examples.held), *prompts]
        return (*dict.fromkeys(text for text in told if text), "")

    def _watched(self) -> np.ndarray:
        prompts = [self.base.prompts[k % len(self.base.prompts)] for k in range(CHECKED)]
        cache, size = self.run.state / "cache", int(self.what.size or 0)
        return render_prior(self.base, prompts, size, cache, "pictures to measure forgetting on", self.run.say, 1000)

    def _prior(self) -> np.ndarray | None:
        cache, size, told = self.run.state / "cache", int(self.what.size or 0), self._prior_prompts
        what = f"pictures of {self.of_class!r} and of other things"
        return render_prior(self.base, told, size, cache, what, self.run.say, 5000) if told else None

    @property
    def _prior_prompts(self) -> list[str]:
        return prior_prompts(self.of_class, self.base.prompts, int(self.what.prior_pictures or 0))

    @property
    def of_class(self) -> str:
        """The class alone: what the prior's pictures are called."""
        return f"a {self.what.class_word}" if self.what.class_word else self.base.prompts[0]

    def _objective(
        self, trainee: Trainee, watched: np.ndarray, prior: np.ndarray | None, first: np.ndarray
    ) -> FinetuneObjective:
        base, what, examples = self.base, self.what, self.examples
        shown = [base.prompts[k % len(base.prompts)] for k in range(len(watched))]
        texts = self._texts([*shown, *self._prior_prompts])
        table = CaptionTable(examples.pictures)
        if table.texts != texts[: len(table.texts)]:
            raise InputError("a caption is empty; write what the picture shows")
        number = {text: place for place, text in enumerate(texts)}
        conditions: Conditions
        if trainee.live:
            conditions = LiveConditions(base.text, texts, int(what.size or 0))
        else:
            conditions = KeptConditions(base.text, texts, int(what.size or 0))
        latents = self._latents("train", examples.pixels)
        versions = self._versions()
        if examples.held:
            named = np.array([number[picture.captions[0]] for picture in examples.held])
            held = Kept(self._latents("held", examples.held_pixels), named)
        else:
            held = Kept(latents, np.array([number[picture.captions[0]] for picture in examples.pictures]))
        return FinetuneObjective(
            trainee.module,
            base.pipe.network,
            base.plan,
            (latents, *versions),
            table,
            conditions,
            held=held,
            watched=Kept(_still(watched), np.array([number[text] for text in shown])),
            prior=None if prior is None else Kept(_still(prior), np.array([number[t] for t in self._prior_prompts])),
            prior_weight=what.prior_weight,
            teacher=trainee.teacher,
            caption_dropout=what.caption_dropout or 0.0,
            weighting=what.weighting,
            times=Times(what.times or "uniform", what.times_mean, what.times_std),
            accelerator=self.run.accelerator,
            sheet=lambda: self._sheet(first),
        )

    def _versions(self) -> tuple[Latents, ...]:
        """The pictures to train on, varied, where that is asked for."""
        what, examples = self.what, self.examples
        if not what.varied:
            return ()
        how = Augmentation(what.versions or 1, what.mirror, what.scale, seed=what.seed)
        may = how.may_mirror(examples.pictures)
        self.run.say(how.line(may))
        others = [version[np.arange(len(may))] for version in how.others(examples.pixels, may)]
        return tuple(self._latents("train", pixels) for pixels in others)

    def _latents(self, name: str, pixels: np.ndarray) -> Latents:
        base, terms = self.base, self.base.pipe.terms
        seen = fingerprint(base.checkpoint.fingerprint, content(pixels))
        side = pixels.shape[1] // terms.factor
        path = self.run.state / "cache" / f"latents-{name}-{seen}.npy"
        vae, device = base.latent.vae, self.run.accelerator.device
        shape = (len(pixels), 2, terms.channels, side, side)
        moments = cached(path, shape, np.float32, lambda: latent_moments(vae, np.asarray(pixels), device))
        return Latents(moments)

    def _foresee(self, objective: FinetuneObjective, settings: LoopSettings) -> None:
        """Say how long it will take, from two steps that leave no trace."""
        objective.module.train()
        part = settings.batch // settings.accumulate
        order = Order(objective.weights, part, self.what.seed)
        for turn in range(2):
            began = time.monotonic()
            with saying_what_saves(STAGE, objective, settings, self.run.accelerator):
                with self.run.accelerator.autocast():
                    loss = objective.loss(order.items(turn), Draw(self.what.seed, turn, part))["loss"]
                loss.backward()  # type: ignore[no-untyped-call]
            spent = settings.accumulate * (time.monotonic() - began)
        for weight in objective.module.parameters():
            weight.grad = None
        trained = sum(weight.numel() for weight in objective.module.parameters())
        self.run.say(
            f"finetune: trains {trained:,} weights; {settings.steps} steps of {settings.batch} pictures at "
            f"{settings.batch / spent:.1f} pictures/s: about {duration(settings.steps * spent)}"
        )

    def _before(self, objective: FinetuneObjective, place: Path) -> Mapping[str, float]:
        """The validation before the first step, kept for when the run goes on."""
        path = place / "before.json"
        if not path.is_file():
            write_file(path, json.dumps(dict(objective.validate())).encode())
        figures: dict[str, float] = read_json(path)
        self.run.say("finetune: before: " + ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in figures.items()))
        return figures

    def _sheet(self, first: np.ndarray) -> Image.Image:
        """The starting weights' pictures, and below them those of the weights as they are."""
        now = look(self.base.pipe, self.base, self.prompts, int(self.what.size or 0))
        pictures = [Image.fromarray(each) for each in (*to_bytes(first), *to_bytes(now))]
        return contact_sheet(pictures, len(self.prompts), [*self.prompts, *self.prompts])

    @property
    def _use(self) -> str:
        return how_to_use(self.what, self.prompts[0], self.run.start, self.run.out)

    def _tell(
        self, aside: Path, place: Path, figures: Mapping[str, float], proof: Proof, first: np.ndarray, seconds: float
    ) -> None:
        """Everything that stands beside the weights: what it is, figures, a sheet, a page."""
        run, base, what = self.run, self.base, self.what
        sheet = self._sheet(first)
        about: dict[str, Any] = {
            "key": self.key,
            "method": what.method,
            "base": {"name": base.checkpoint.folder.resolve().name, "sha256": base.checkpoint.fingerprint},
            "settings": what.model_dump(mode="json", by_alias=True),
            "reasons": list(self.reasons),
            "prompts": list(self.prompts),
        }
        told = Told(
            name=run.out.name,
            method=what.method,
            base=base.checkpoint.folder.resolve().name,
            pictures=len(self.examples.pictures),
            ledger=self.examples.ledger.line(),
            reasons=self.reasons,
            settings=about["settings"],
            figures=figures,
            proof=proof.line(),
            use=self._use,
            seconds=seconds,
            held=len(self.examples.held),
            credits_before=self.earlier.credits,
            notice=notice_of(run.folder),
        )
        sheet.save(aside / "sheet.png", "PNG", optimize=True)
        (aside / ABOUT).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        loop, steps = self._loop(), figures.get("kept_step", figures["steps"])
        part = {"steps": steps, "batch": loop.batch, "rate": loop.rate}
        history = self.earlier.then(part) if what.adapter is None and what.method != "textual-inversion" else {}
        metrics = {**history, STAGE: dict(figures), "proof": proof.figures(), "seconds": round(seconds, 1)}
        (aside / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(told.card(), encoding="utf-8")
        (aside / "report.html").write_text(write_page(told, place, aside / "sheet.png"), encoding="utf-8")


def content(pixels: np.ndarray) -> str:
    """A hash of pictures (N, H, W, 3) and of how many there are, computed one by one."""
    found = hashlib.sha256(repr(pixels.shape).encode())
    for picture in pixels:
        found.update(np.ascontiguousarray(picture).data)
    return found.hexdigest()


def _still(latents: np.ndarray) -> Latents:
    """Latents (N, C, h, w) that are known exactly: moments of no spread."""
    return Latents(np.stack([latents, np.zeros_like(latents)], axis=1))
