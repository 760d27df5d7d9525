"""Aspect-ratio buckets: pictures keep nearly their shape, each in the bucket that cuts the least of it away.

After NovelAI's "Aspect ratio bucketing" (2022): all buckets have about the area of the square they take the place of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from latentgen.data.folder import CaptionedFolder
from latentgen.data.picture import Picture, Problem
from latentgen.data.survey import Facts
from latentgen.errors import InputError


@dataclass(frozen=True)
class Fit:
    """How a picture lies in a bucket. lost: the part of its area cut away; scale: of its sides, above 1 is enlarged."""

    bucket: int
    lost: float
    scale: float


@dataclass(frozen=True)
class Buckets:
    """shapes: (width, height) in pixels each. largest_crop: the part of a picture's area that may be cut away at most.

    upscale: whether pictures smaller than their bucket are enlarged, or else left out.
    """

    shapes: tuple[tuple[int, int], ...]
    largest_crop: float = 0.1
    upscale: bool = False

    @classmethod
    def around(cls, size: int, step: int, ratio: float, largest_crop: float, upscale: bool) -> "Buckets":
        """Every width and height that are multiples of `step`, the larger at most `ratio` times the smaller.

        For each width the height is the largest that keeps the area within size**2; the square is always there.
        Raises InputError where `size` is no multiple of `step`.
        """
        if size % step:
            raise InputError(f"size {size} is no multiple of the buckets' step {step}; give one of {step}")
        sides = range(step, int(size * ratio**0.5) + step, step)
        wide = {(side, size**2 // side // step * step) for side in sides if side >= size}
        kept = {(w, h) for w, h in wide if h > 0 and w <= ratio * h}
        return cls(tuple(sorted(kept | {(h, w) for w, h in kept} | {(size, size)})), largest_crop, upscale)

    @classmethod
    def square(cls, size: int, upscale: bool) -> "Buckets":
        """One square, to which every picture is cut that is large enough for it, or that may be enlarged."""
        return cls(((size, size),), 1.0, upscale)

    def fit(self, width: int, height: int) -> Fit:
        """The bucket that least of a picture is lost in; of equal ones the first."""
        scales = [max(w / width, h / height) for w, h in self.shapes]
        areas = zip(self.shapes, scales, strict=True)
        lost = [1 - w * h / (width * height * scale**2) for (w, h), scale in areas]
        best = min(range(len(lost)), key=lambda bucket: (round(lost[bucket], 9), bucket))
        return Fit(best, max(0.0, lost[best]), scales[best])

    def refuses(self, width: int, height: int) -> str:
        """Why a picture of this size is left out; "" if it is not."""
        fit = self.fit(width, height)
        w, h = self.shapes[fit.bucket]
        if fit.lost > self.largest_crop:
            return (
                f"{width} x {height}: {fit.lost:.0%} would be cut away in the nearest bucket, {w} x {h}; "
                f"at most {self.largest_crop:.0%} may be (largest_crop)"
            )
        if fit.scale > 1 and not self.upscale:
            return (
                f"{width} x {height}: would be enlarged {fit.scale:.3g} times for {w} x {h}; upscale = true allows it"
            )
        return ""


def keep_fitting(
    folder: CaptionedFolder, facts: Sequence[Facts], buckets: Buckets
) -> tuple[CaptionedFolder, dict[Picture, int]]:
    """The folder without the pictures that fit no bucket, which are listed; and the bucket of each that stays.

    facts: of each picture of the folder. What cannot be read stays: it is listed when it is decoded.
    Raises InputError where no picture fits.
    """
    kept: list[Picture] = []
    problems: list[Problem] = []
    bucket: dict[Picture, int] = {}
    for picture, seen in zip(folder.pictures, facts, strict=True):
        why = "" if seen.error else buckets.refuses(seen.width, seen.height)
        if why:
            problems.append(Problem(picture.path, why, "does not fit", picture.box, picture.stored))
            continue
        kept.append(picture)
        if not seen.error:
            bucket[picture] = buckets.fit(seen.width, seen.height).bucket
    if problems and not kept:
        raise InputError(
            f"{folder.root}: none of {len(problems)} pictures fits {_shapes(buckets)}; the first is "
            f"{problems[0].reason}"
        )
    return replace(folder, pictures=tuple(kept), problems=(*folder.problems, *problems)), bucket


def _shapes(buckets: Buckets) -> str:
    (width, height), *others = buckets.shapes
    return "a bucket" if others else f"{width} x {height}"
