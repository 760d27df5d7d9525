"""Which layer a name in an adapter file means: one layer has a name in every form that people's files use."""

from collections.abc import Iterable, Iterator, Mapping

KOHYA = {"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}
LDM = "diffusion_model."  # before a U-Net layer's name in the LDM layout
CLIPS = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}  # ComfyUI's, OMI's; clip_h is SD2's
# How the names of a U-Net's layers begin in the LDM layout.
ORIGINAL = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
BUNDLED = "bundle_emb."  # before a new word's name, and its tensors', that lie in the file of a LoRA
BIAS = ".bias"  # after a layer's name: its bias, which is changed apart from its weight
TOWER = "text_model."  # transformers 5 leaves it out of CLIP's names; files have it


def aliases(part: str, layer: str, original: Iterable[str] = ()) -> Iterator[str]:
    """The names of a network's layer in adapter files. part: "unet", "text_encoder" or "text_encoder_2".

    original: its names in the LDM layout, without a prefix, by which kohya's scripts know the layers of SDXL.
    """
    forms = [layer]
    if part != "unet":
        bare = layer.removeprefix(TOWER)
        forms = [TOWER + bare, bare]
    for form in forms:
        yield f"{part}.{form}"  # diffusers
        yield f"base_model.model.{form}"  # PEFT, on the network alone
        yield form  # the same, as diffusers' training scripts take it out
        for clip in CLIPS.get(part, ()):
            yield f"{clip}.{form}"  # OMI
            yield f"text_encoders.{clip}.transformer.{form}"  # ComfyUI
    for form in (*forms, *original):
        for start in KOHYA.get(part, ()):
            yield f"{start}_{form.replace('.', '_')}"
    for form in original:
        yield f"{LDM}{form}"
        yield f"{part}.{form}"  # OMI


def divided(name: str) -> tuple[str, str]:
    """A dotted name of a layer in an adapter file as the part that it is of, and its name there."""
    bare = name.removeprefix("base_model.model.").removeprefix("text_encoders.")
    start, _, rest = bare.partition(".")
    if start in KOHYA:
        return start, rest
    for part, clips in CLIPS.items():
        if start in clips:
            return part, rest.removeprefix("transformer.")
    if bare.startswith(LDM):
        return "unet", bare.removeprefix(LDM)
    return "text_encoder" if bare.startswith(TOWER) else "unet", bare


def index(layers: Mapping[str, Mapping[str, Iterable[str]]]) -> dict[str, tuple[str, str]]:
    """Every name -> (part, layer). layers: part -> layer -> its names in the LDM layout; biases are called as theirs.

    Where two layers share a name the first part keeps it: a bare name means the U-Net's layer.
    """
    found: dict[str, tuple[str, str]] = {}
    for part, names in layers.items():
        for layer in names:
            bare = layer.removesuffix(BIAS)
            for alias in aliases(part, bare, names[bare]):
                found.setdefault(alias + layer.removeprefix(bare), (part, layer))
    return found
