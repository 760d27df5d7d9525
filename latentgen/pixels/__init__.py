"""Labelled diffusion in pixels, each family of the field by one key: the classic exercise, with its likelihoods."""

from pathlib import Path

FORM = "pixels.json"  # what makes a weights folder one of a pixel model


def is_pixel_folder(folder: Path) -> bool:
    """Whether a folder holds a pixel model."""
    return (folder / FORM).is_file()
