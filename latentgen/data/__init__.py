"""Captioned pictures (folders, tar shards, saved data sets), their pixels, and a ledger of every file."""

from latentgen.data.buckets import Buckets, keep_fitting
from latentgen.data.folder import CaptionedFolder
from latentgen.data.hold_out import hold_out
from latentgen.data.ledger import Ledger, count_tokens, write_ledger
from latentgen.data.page import write_page
from latentgen.data.picture import Picture, Problem
from latentgen.data.pixels import Pixels, load_pixels
from latentgen.data.source import read_folder

__all__ = [
    "Buckets",
    "CaptionedFolder",
    "Ledger",
    "Picture",
    "Pixels",
    "Problem",
    "count_tokens",
    "hold_out",
    "keep_fitting",
    "load_pixels",
    "read_folder",
    "write_ledger",
    "write_page",
]
