"""Of a hub repository's files only those are fetched that rendering takes."""

import pytest

from latentgen.checkpoint.places import needed

TEXT, DIFFUSION = "model", "diffusion_pytorch_model"
WORDS = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")


def forms(part: str, stem: str, *more: str) -> list[str]:
    """A network as such repositories hold it: pickles and safetensors, in two types."""
    pickle = "pytorch_model" if stem == TEXT else stem
    names = ["config.json", f"{pickle}.bin", f"{pickle}.fp16.bin", f"{stem}.safetensors", f"{stem}.fp16.safetensors"]
    return [f"{part}/{name}" for name in (*names, *more)]


SD1 = [
    *(".gitattributes", "README.md", "model_index.json", "v1-inference.yaml"),
    *("v1-5-pruned-emaonly.ckpt", "v1-5-pruned-emaonly.safetensors", "v1-5-pruned.ckpt", "v1-5-pruned.safetensors"),
    "feature_extractor/preprocessor_config.json",
    *forms("safety_checker", TEXT),
    "scheduler/scheduler_config.json",
    *forms("text_encoder", TEXT),
    *(f"tokenizer/{name}" for name in WORDS),
    *forms("unet", DIFFUSION, f"{DIFFUSION}.non_ema.bin", f"{DIFFUSION}.non_ema.safetensors"),
    *forms("vae", DIFFUSION),
]
ONNX = ("model.onnx", "model.onnx_data", "openvino_model.bin", "openvino_model.xml", "flax_model.msgpack")
XL = [
    *(".gitattributes", "LICENSE.md", "README.md", "01.png", "comparison.png", "model_index.json"),
    *("sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors", "sd_xl_offset_example-lora_1.0.safetensors"),
    "scheduler/scheduler_config.json",
    *forms("text_encoder", TEXT, *ONNX),
    *forms("text_encoder_2", TEXT, *ONNX),
    *(f"tokenizer/{name}" for name in WORDS),
    *(f"tokenizer_2/{name}" for name in WORDS),
    *forms("unet", DIFFUSION, *ONNX),
    *forms("vae", DIFFUSION),
    *(f"vae_1_0/{name}" for name in ("config.json", f"{DIFFUSION}.fp16.safetensors", f"{DIFFUSION}.safetensors")),
    *(f"vae_decoder/{name}" for name in ("config.json", *ONNX)),
    *(f"vae_encoder/{name}" for name in ("config.json", *ONNX)),
]
ALL_OF_SD1 = {
    *("model_index.json", "scheduler/scheduler_config.json"),
    *("text_encoder/config.json", "text_encoder/model.safetensors"),
    *(f"tokenizer/{name}" for name in WORDS),
    *(f"{part}/{name}" for part in ("unet", "vae") for name in ("config.json", f"{DIFFUSION}.safetensors")),
}
ALL_OF_XL = {
    *ALL_OF_SD1,
    *("text_encoder_2/config.json", "text_encoder_2/model.safetensors"),
    *(f"tokenizer_2/{name}" for name in WORDS),
}


@pytest.mark.parametrize(("listing", "wanted"), [(SD1, ALL_OF_SD1), (XL, ALL_OF_XL)], ids=["SD 1.5", "SDXL"])
def test_each_part_of_a_pipeline_is_fetched_once_and_nothing_else(listing: list[str], wanted: set[str]) -> None:
    found = needed(listing)
    assert set(found) == wanted and len(found) == len(wanted)


def test_half_precision_is_fetched_where_there_is_no_other() -> None:
    plain = {f"{DIFFUSION}.safetensors", f"{TEXT}.safetensors"}
    halves = [name for name in XL if name.split("/")[-1] not in plain]
    weights = {name for name in needed(halves) if name.endswith(".safetensors")}
    parts = {"text_encoder": TEXT, "text_encoder_2": TEXT, "unet": DIFFUSION, "vae": DIFFUSION}
    assert weights == {f"{part}/{stem}.fp16.safetensors" for part, stem in parts.items()}


def test_shards_are_fetched_where_a_network_is_not_whole() -> None:
    shards = [f"unet/{DIFFUSION}-{k:05}-of-00002.safetensors" for k in (1, 2)]
    index = f"unet/{DIFFUSION}.safetensors.index.json"
    listing = [name for name in SD1 if not name.startswith(f"unet/{DIFFUSION}")]
    found = needed([*listing, *shards, index])
    assert {name for name in found if name.startswith("unet/")} == {"unet/config.json", index, *shards}


def test_a_repository_that_is_no_pipeline_gives_its_one_file() -> None:
    assert needed(["README.md", "model.ckpt", "model.safetensors", "inner/other.safetensors"]) == ["model.safetensors"]
    assert needed(["one.safetensors", "two.safetensors"]) == []
