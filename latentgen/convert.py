"""A checkpoint from one form into the other, a folder or a single file; what was written is opened and rendered."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latentgen.checkpoint import (
    OPENCLIP,
    SingleFile,
    check_prediction,
    find,
    open_checkpoint,
    open_folder,
    write_folder,
    write_pipeline,
)
from latentgen.checkpoint.folder import DEFAULTS
from latentgen.checkpoint.tokenizers import OPENCLIP_PAD, copy_tokenizer
from latentgen.checkpoint.write_single import remove_all, write_single
from latentgen.durable import new_place
from latentgen.errors import InputError
from latentgen.models.onnx.places import why_not
from latentgen.pipeline import Pipeline

PREDICTIONS = ("epsilon", "v_prediction")
STEPS, LARGEST = 2, 1e-5  # of the rendering that compares; the largest difference of a latent that is rounding


def convert(
    source: str | Path, target: Path, *, tokenizer: str | Path | None = None, prediction_type: str | None = None
) -> tuple[Path, float]:
    """Write `source` to `target`: a .safetensors file in the original key layout, or a folder in diffusers' layout.

    tokenizer: a CLIP tokenizer's folder, for a single file that has none beside it. prediction_type: "epsilon" or
    "v_prediction", which the target shall say instead of what the source does. Weights keep their stored type.
    What latentgen.json says (defaults, sample_size) goes along. Returns the target and the largest difference between
    both: of rendered latents and pictures, and of the weights that encode pictures. Raises InputError for a target that
    is there or is being written, forms that are the same, a tokenizer or a prediction_type that the source has no use
    for, a network the layout cannot say, and a result that renders otherwise (which is then removed).
    """
    if prediction_type not in (None, *PREDICTIONS):
        raise InputError(f"prediction_type {prediction_type!r} is not known; it can be {' or '.join(PREDICTIONS)}")
    with new_place(target):
        return target, _convert(source, target, tokenizer, prediction_type)


def _convert(source: str | Path, target: Path, tokenizer: str | Path | None, prediction_type: str | None) -> float:
    """The largest difference."""
    known = open_checkpoint(find(source), tokenizer=tokenizer)
    check_prediction(known.folder, known.config("scheduler"), prediction_type)
    told = {} if prediction_type is None else {"prediction_type": prediction_type}
    into_file = target.suffix == ".safetensors"
    if isinstance(known, SingleFile) == into_file:
        form, other = ("a single file", "a folder") if into_file else ("a folder", "a .safetensors file")
        raise InputError(f"{source} is {form} already; name {other} to convert it into")
    if isinstance(known, SingleFile):
        made = [
            write_folder(target, lambda aside: _fill(known, aside, told))
        ]  # the ONNX graphs, too, where they can be
    else:
        made = write_single(known, target, told)
    try:
        difference = _difference(source, target, tokenizer, prediction_type)
        if not difference <= LARGEST:
            unlike = f"{target} renders otherwise than {source} (by {difference:.2g})"
            raise InputError(f"{unlike} and was removed; report this")
    except BaseException:
        remove_all(made)
        raise
    return difference


def _fill(known: SingleFile, aside: Path, told: Mapping[str, Any]) -> None:
    """told: what the scheduler's config says otherwise."""
    write_pipeline(
        aside,
        tensors={part: lambda part=part: known.tensors(part) for part in known.weights},  # type: ignore[misc]
        configs={part: known.config(part) for part in known.weights},
        tokenizers={},
        scheduler_config={**known.config("scheduler"), **told},
        force_zeros_for_empty_prompt=bool(known.index.get("force_zeros_for_empty_prompt", True)),
        extra_files={DEFAULTS: json.dumps(known.extras, indent=2) + "\n"} if known.extras else None,
    )
    for part, place in known.tokenizers.items():
        openclip = known.tower(part.replace("tokenizer", "text_encoder")) == OPENCLIP
        copy_tokenizer(place, aside / part, OPENCLIP_PAD if openclip else None)
    if why_not(open_folder(aside, verify=False)) is None:
        from latentgen.models.onnx.export import write_graphs  # imports torch

        write_graphs(aside)


def _difference(source: str | Path, target: Path, tokenizer: str | Path | None, prediction_type: str | None) -> float:
    """Both are opened, one after the other, and render the same noise under the same prompt.

    What no rendering uses, the autoencoder's encoder, is compared by its weights. NaN where anything is.
    """
    from latentgen.models.latent import Latent  # imports torch

    found: list[dict[str, np.ndarray]] = []
    said: dict[str, Any] = {"tokenizer": tokenizer, "prediction_type": prediction_type}  # which the target says itself
    for place, told in ((source, said), (target, {})):
        pipe = Pipeline.from_pretrained(place, device="cpu", engine="torch", **told)
        side = 8 * pipe.terms.factor
        drawn = pipe(
            "a red apple",
            num_inference_steps=STEPS,
            guidance_scale=2.0,
            height=side,
            width=side,
            seed=0,
            output_type="latent",
        )
        assert isinstance(pipe.latent, Latent)
        state = pipe.latent.vae.state_dict()
        encoder = {name: value for name, value in state.items() if name.startswith(("encoder.", "quant_conv."))}
        values = {"latents": drawn.images, "pixels": pipe.latent.decode(drawn.images), **encoder}
        found.append({name: np.asarray(value) for name, value in values.items()})
    one, other = found
    return float(np.max([np.abs(one[name] - other[name]).max() for name in one]))
