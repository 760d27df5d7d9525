"""Captioned folders of pictures and their pixels."""

from latentgen.data.folder import CaptionedFolder, Picture, Pixels, Problem, load_pixels, read_folder

__all__ = ["CaptionedFolder", "Picture", "Pixels", "Problem", "load_pixels", "read_folder"]
