"""Weights as they lie on the disk: find them, read them, verify them, write them. Only safetensors, never pickle.

Two layouts are read: a folder in diffusers' layout, and a single .safetensors file in the original layout of latent
diffusion (LDM). Nothing heavy is imported here until something is written: a torn or foreign file is told apart from
its header.
"""

from latentgen.checkpoint.defaults import write_defaults
from latentgen.checkpoint.folder import (
    PARTS,
    STEMS,
    Checkpoint,
    check_safetensors,
    open_folder,
    read_json,
    read_manifest,
    variant_of,
)
from latentgen.checkpoint.keys import CLIP, OPENCLIP
from latentgen.checkpoint.kinds import check_prediction, refuse_other_kinds, unet_kind
from latentgen.checkpoint.places import default_weights, find
from latentgen.checkpoint.single import SingleFile, open_checkpoint
from latentgen.checkpoint.write import save_pipeline, write_pipeline
from latentgen.durable import write_folder

__all__ = [
    "CLIP",
    "OPENCLIP",
    "PARTS",
    "STEMS",
    "Checkpoint",
    "SingleFile",
    "check_prediction",
    "check_safetensors",
    "default_weights",
    "find",
    "open_checkpoint",
    "open_folder",
    "read_json",
    "read_manifest",
    "refuse_other_kinds",
    "save_pipeline",
    "unet_kind",
    "variant_of",
    "write_defaults",
    "write_folder",
    "write_pipeline",
]
