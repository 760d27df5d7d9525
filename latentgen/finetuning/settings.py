"""What can be asked of a fine-tuning run, and what is chosen where nothing is asked, each with its reason."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from latentgen.errors import InputError
from latentgen.fields import Above, Amount, Below, Number, Positive, Scale, Whole, explained

METHODS = {  # what each is, for people
    "lora": "small matrices beside the U-Net's own (Hu et al. 2021)",
    "dora": "LoRA with each row's length learned apart (Liu et al. 2024)",
    "lokr": "Kronecker products instead of low rank (Yeh et al. 2024): the smallest files",
    "full": "every weight of the U-Net",
    "dreambooth": "a subject by a rare word, its class kept by the class's own pictures (Ruiz et al. 2023)",
    "textual-inversion": "a new word's embeddings alone (Gal et al. 2022)",
    "style": "a look that a dial sets at render time: a LoRA, its weight being the dial",
}
SMALL = 150e6  # weights of a U-Net below which it is a small one, trained with larger steps


class Finetune(BaseModel):
    """A fine-tuning run. None is chosen from the pictures and the weights, and said with the reason.

    token, class: DreamBooth's rare word and what kind of thing it is ("zwx", "cat"); textual inversion's new word.
    prior_pictures: of the class, and as many again of other things, rendered by the starting weights; prior: what is
    kept to, the starting weights' answers on them at every noise level, or the pictures alone.
    like: the word whose embedding a new word starts from. vectors: embeddings of a new word. on: what DreamBooth
    trains. caption: one caption for every picture, in place of its own. targets: the layers that adapters change.
    times: the density of the noise's times (mean and spread are of a logit-normal one). caption_dropout: how often a
    picture is shown without its caption, so that guidance stays what it was.
    mirror, scale: the pictures are learned from mirrored too, but where a caption says left, right or the like, and
    made smaller or larger by a factor between two (`data.variants`); versions: of each picture, the first as it is.
    folders: those named train, test or validation are splits. held_out: the split that is not trained on; hold_out: the
    part that is kept where no picture is in it.
    strength: how much of what a style learned is stored, and so is dial 1; the dial goes above 1 for more.
    keep: the weights with the best held-out loss, or the last. patience: validations without a better one before it
    stops; 0 never stops. prompts: looked at while it trains.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    method: Literal["lora", "dora", "lokr", "full", "dreambooth", "textual-inversion", "style"] = "lora"
    on: Literal["lora", "full"] | None = None
    rank: Positive | None = None
    targets: Literal["attention", "all"] | None = None
    strength: Above | None = None
    text_encoder: bool = False
    steps: Positive | None = None
    batch: Positive | None = None
    rate: Above | None = None
    warmup: Positive | None = None
    decay: Below = 0.5
    weight_decay: Amount = 0.01
    ema: Below | None = None
    optimizer: Literal["adamw", "adamw-8bit", "adafactor", "sgd", "muon"] = "adamw"
    accumulate: Positive = 1
    weighting: Literal["simple", "min-snr", "p2", "sigmoid", "bound", "edm"] = "simple"
    times: Literal["uniform", "logit-normal", "lognormal-sigma"] | None = None
    times_mean: Number | None = None
    times_std: Above | None = None
    caption_dropout: Below | None = None
    size: Positive | None = None
    captions: Literal["files", "names"] = "files"
    caption: str | None = None
    background: str = "white"
    mirror: bool = False
    scale: tuple[Scale, Scale] = (1.0, 1.0)
    versions: Positive | None = None
    held_out: str = "test"
    folders: bool = True
    hold_out: Below | None = None
    token: str | None = None
    class_word: str | None = Field(None, alias="class")
    like: str | None = None
    vectors: Positive | None = None
    prior_pictures: Annotated[Whole, Field(ge=0)] | None = None
    prior_weight: Amount = 1.0
    prior: Literal["answers", "pictures"] | None = None
    keep: Literal["best", "last"] | None = None
    patience: Annotated[Whole, Field(ge=0)] = 4
    validate_steps: Positive | None = None
    prompts: tuple[str, ...] = ()
    seed: Whole = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    @classmethod
    def of(cls, asked: Mapping[str, Any] | Self) -> Self:
        """Settings by name, or as they are. Raises InputError for the first that is not right."""
        return explained(cls, dict(asked) if isinstance(asked, Mapping) else asked, "finetune")

    @property
    def adapter(self) -> str | None:
        """The kind of adapter that is trained: "lora", "dora" or "lokr"; None for whole weights and new words."""
        if self.method == "dreambooth":
            return None if self.on == "full" else "lora"
        return {"lora": "lora", "style": "lora", "dora": "dora", "lokr": "lokr"}.get(self.method)

    @property
    def varied(self) -> bool:
        """Whether the pictures are learned from in other versions too."""
        return self.mirror or self.scale != (1.0, 1.0)

    def check(self) -> None:
        """Raises InputError for what does not go together."""
        if self.method == "dreambooth" and not self.class_word:
            raise InputError('class is missing: dreambooth wants the kind of thing it is shown, as --class "cat"')
        if self.method == "textual-inversion":
            if not self.token:
                raise InputError('token is missing: textual-inversion wants the new word, as --token "<my-cat>"')
            if self.text_encoder:
                raise InputError("text_encoder is not trained by textual-inversion, which learns new words alone")
        elif self.vectors is not None or self.like:
            raise InputError(f"vectors and like are textual-inversion's; {self.method} has no new word")
        if self.token and self.method not in ("dreambooth", "textual-inversion"):
            raise InputError(f"token is dreambooth's and textual-inversion's; {self.method} learns from captions")
        if self.class_word and self.method != "dreambooth":
            raise InputError(f"class is dreambooth's; {self.method} learns from captions")
        alone = self.method in ("dreambooth", "textual-inversion")
        if self.caption is not None and alone:
            raise InputError(f"caption is for methods that learn from captions; {self.method} makes its own")
        if self.on is not None and self.method != "dreambooth":
            raise InputError('on is dreambooth\'s; for every weight of the U-Net give method = "full"')
        if self.prior is not None and self.method == "textual-inversion":
            raise InputError("prior is for networks that are trained; textual-inversion leaves them as they are")
        if "weight_decay" in self.model_fields_set and self.method == "textual-inversion":
            raise InputError("weight_decay is for networks that are trained; textual-inversion's words have none")
        if self.prior == "answers" and self.text_encoder:
            raise InputError('prior = "answers" wants the text encoder as it was; leave text_encoder out')
        kept = self.method == "dreambooth" and self.prior_weight if self.prior_pictures is None else self.prior_pictures
        if self.prior is not None and not kept:
            raise InputError("prior is of pictures to keep to, and there are none; give prior_pictures")
        if self.strength is not None and self.method != "style":
            raise InputError(f"strength is a style's; what {self.method} learns is stored as it is")
        for name in ("rank", "targets"):
            if getattr(self, name) is not None and self.adapter is None:
                raise InputError(f"{name} is an adapter's; {self.method} has none")
        if self.times in (None, "uniform") and (self.times_mean is not None or self.times_std is not None):
            raise InputError('times_mean and times_std are of times = "logit-normal", say; give that too')
        if self.scale[0] > self.scale[1]:
            raise InputError(f"scale is {list(self.scale)}; give the smaller factor first")
        if (self.versions or 1) > 1 and not self.varied:
            raise InputError(f"{self.versions} versions would all be the same; give mirror or scale too")
        if (self.versions or 1) > 2 and self.scale == (1.0, 1.0):
            raise InputError("a mirrored picture is one version more; give versions = 2 or none, or a scale too")
        if self.versions == 1 and self.varied:
            raise InputError("mirror and scale make other versions of a picture; give versions = 2 or more, or none")
        if self.batch is not None and self.batch % self.accumulate:
            raise InputError(f"accumulate is {self.accumulate}; it must divide the batch of {self.batch}")


@dataclass(frozen=True)
class Chosen:
    """Settings with nothing left open, and why each was chosen that nobody gave."""

    settings: Finetune
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Start:
    """What the starting weights say of themselves: `weights` of the U-Net, the side in pixels it was trained at, and
    how its times were drawn, where its recipe tells.
    """

    weights: int
    size: int
    times: str = "uniform"
    times_mean: float | None = None
    times_std: float | None = None


def choose(asked: Finetune, pictures: int, start: Start, marked: int) -> Chosen:
    """Fill in what was not given. pictures: to train on; marked: those that are marked as held out beside them.

    The numbers are what worked on `weights/icons` for small networks and what the field uses on Stable Diffusion
    (its DreamBooth, LoRA and textual-inversion papers and diffusers' examples) for large ones.
    """
    small = start.weights < SMALL
    how = f"the U-Net is {'small' if small else 'large'} ({start.weights / 1e6:.0f}M weights)"
    few = f"{pictures} pictures"
    open_: dict[str, tuple[Any, str]] = {}
    if asked.method == "dreambooth" and asked.on is None:
        open_["on"] = ("full" if small and asked.rank is None and asked.targets is None else "lora", how)
        asked = asked.model_copy(update={"on": open_["on"][0]})
    batch = asked.batch or asked.accumulate * max(1, min(16 if small else 2, pictures) // asked.accumulate)
    open_["batch"] = (batch, f"{how}; {few}")
    each = {"dreambooth": 300, "textual-inversion": 600 if small else 300}.get(asked.method, 80)
    samples = max(1600, min(each * pictures, 9600)) if small else max(800, min(each * pictures, 6400))
    open_["steps"] = (math.ceil(samples / batch), f"{few}, each seen about {samples / pictures:.0f} times")
    rates = {"full": (2e-4, 1e-5), "textual-inversion": (2e-2, 5e-3), "lokr": (2e-3, 3e-4), "style": (3e-4, 1e-4)}
    kind = "full" if asked.method == "dreambooth" and asked.on == "full" else asked.method
    open_["rate"] = (rates.get(kind, (1e-3, 1e-4))[not small], f"{how}; {asked.method}")
    if asked.adapter is not None:
        open_["rank"] = (4 if pictures < 12 else 8 if pictures < 60 else 16, few)
        open_["targets"] = ("all" if small else "attention", how)
    if asked.method == "style":
        open_["strength"] = (0.5, "the most that leaves what prompts name; the dial goes above 1 for more")
    if asked.method == "textual-inversion":
        open_["vectors"] = (8 if small else 1, how)
    open_["size"] = (start.size, "what the weights were trained at")
    alone = asked.method in ("dreambooth", "textual-inversion")  # one thing: every view of it is needed
    open_["hold_out"] = (0.0 if pictures < 16 or alone else 0.1, few)
    held = marked or asked.hold_out or (asked.hold_out is None and open_["hold_out"][0])
    open_["keep"] = ("best" if held else "last", "pictures are held out" if held else "no picture is held out")
    if asked.method == "dreambooth":
        dropped = (0.0, "what no caption is told must not become the subject")
    elif asked.method == "textual-inversion":
        dropped = (0.0, "the networks stay what they are")
    else:
        dropped = (0.1, "as text-to-image models are trained")
    open_["caption_dropout"] = dropped
    if asked.times is None and start.times != "uniform":
        open_["times"] = (start.times, "as the starting weights were trained")
        open_["times_mean"] = (start.times_mean, "as the starting weights were trained")
        open_["times_std"] = (start.times_std, "as the starting weights were trained")
    else:
        open_["times"] = ("uniform", "as the starting weights were trained")
    prior = (32 if small else 100) if asked.method == "dreambooth" and asked.prior_weight else 0
    open_["prior_pictures"] = (prior, asked.method)
    if (asked.prior_pictures or (asked.prior_pictures is None and prior)) and asked.method != "textual-inversion":
        open_["prior"] = prior_kept(asked, small, how)
    if asked.varied:
        many = asked.scale != (1.0, 1.0)
        open_["versions"] = (4 if many else 2, "scaled, each differently" if many else "as they are, and mirrored")
    steps = asked.steps or int(open_["steps"][0])
    open_["warmup"] = (max(1, min(100, steps // 20)), f"{steps} steps")
    open_["ema"] = (min(0.99, max(0.0, 1 - 20 / steps)), f"{steps} steps")
    open_["validate_steps"] = (max(1, steps // 12), f"{steps} steps")
    given = {key for key, value in asked.model_dump(by_alias=False).items() if value is not None} - {"on"}
    chosen = {key: value for key, (value, _) in open_.items() if key not in given and value is not None}
    reasons = tuple(f"{key} = {value} ({open_[key][1]})" for key, value in chosen.items())
    return Chosen(asked.model_copy(update=chosen), reasons)


def prior_kept(asked: Finetune, small: bool, how: str) -> tuple[str, str]:
    """What of the prior is kept to, and why: answers want the starting weights beside those that are trained."""
    if asked.text_encoder:
        return "pictures", "the text encoder is trained too"
    if asked.adapter is None and not small:
        return "pictures", f"{how}, and answers would want it twice in memory"
    return "answers", "they tell more of what is to stay than pictures do"
