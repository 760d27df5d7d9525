"""Which layer a name in an adapter file means: one layer has a name in every form that people's files use."""

from collections.abc import Iterable, Iterator, Mapping

KOHYA = {"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}
LDM = "diffusion_model."  # before a U-Net layer's name in the LDM layout
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
    for form in (*forms, *original):
        for start in KOHYA.get(part, ()):
            yield f"{start}_{form.replace('.', '_')}"
    for form in original:
        yield f"{LDM}{form}"


def index(layers: Mapping[str, Mapping[str, Iterable[str]]]) -> dict[str, tuple[str, str]]:
    """Every name -> (part, layer). layers: part -> layer -> its names in the LDM layout.

    Where two layers share a name the first part keeps it: a bare name means the U-Net's layer.
    """
    found: dict[str, tuple[str, str]] = {}
    for part, names in layers.items():
        for layer, original in names.items():
            for alias in aliases(part, layer, original):
                found.setdefault(alias, (part, layer))
    return found
