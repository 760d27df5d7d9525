"""Captioned folders of pictures, and their pixels."""

from latentgen.data.folder import CaptionedFolder, read_folder
from latentgen.data.picture import Picture, Problem
from latentgen.data.pixels import Pixels, load_pixels

__all__ = [
    "CaptionedFolder",
    "Picture",
    "Pixels",
    "Problem",
    "load_pixels",
    "read_folder",
]
