"""`evaluate` told the truth beforehand: real pictures, a copy, and the wrong captions put in the renderings' place."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentgen.checkpoint import open_checkpoint
from latentgen.data import load_pixels, read_folder
from latentgen.evaluation import run
from latentgen.evaluation.encoders import Encoder, open_judge
from latentgen.evaluation.run import Artist, Evaluation, Order, evaluate
from latentgen.pipeline import terms_of

ICONS = Path(__file__).parents[1] / "data" / "icons"
SIZE = json.dumps({"sample_size": 32})
Draw = Callable[[Sequence[str]], np.ndarray]


class Unopened:
    """In the pipeline's place, which has nothing to render."""

    machine = None

    def __init__(self, weights: Path) -> None:
        self.terms = terms_of(open_checkpoint(weights))

    from_pretrained = classmethod(lambda cls, weights: cls(weights))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The real picture (32, 32, 3) of each main caption."""
    found = load_pixels(read_folder(ICONS), 32, tmp_path_factory.mktemp("pixels"))
    pixels = {picture.captions[0]: np.asarray(row) for picture, row in zip(found.pictures, found.array, strict=True)}
    assert len(pixels) == len(found.pictures)
    return pixels


@pytest.fixture(scope="module")
def held() -> list[str]:
    """The held-out captions in the order they are judged in."""
    return [picture.captions[0] for picture in read_folder(ICONS).select("test")]


@pytest.fixture(scope="module")
def told(make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Evaluation]:
    """told(draw): an evaluation in which `draw` makes the pictures; what is inside the weights is looked at once."""
    place, folder = tmp_path_factory.mktemp("evaluations"), make_folder(extra_files={"latentgen.json": SIZE})
    look, looked = run.look_inside, list[Any]()

    def once(*given: Any) -> Any:
        looked[:] = looked or [look(*given)]
        return looked[0]

    def call(draw: Draw, **asked: Any) -> Evaluation:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "look_inside", once)
            patch.setattr(run, "Pipeline", Unopened)
            patch.setattr(Artist, "draw", lambda _, captions: draw(captions))
            return evaluate(folder, Order(ICONS, steps=2, **asked), place)

    return call


@pytest.fixture(scope="module")
def perfect(told: Callable[..., Evaluation], real: dict[str, np.ndarray]) -> Evaluation:
    """Every caption's own picture."""
    return told(lambda captions: np.stack([real[caption] for caption in captions]))


def value(found: Evaluation, name: str) -> float:
    return found.figures[name].value


@pytest.mark.slow
def test_real_pictures_in_the_renderings_place_are_perfect(perfect: Evaluation, held: list[str]) -> None:
    assert perfect.captions == held
    assert np.array_equal(perfect.renderings, perfect.real)
    assert value(perfect, "Fréchet distance") < 1e-3 * value(perfect, "Fréchet distance (training pictures)")
    assert value(perfect, "KID") <= 0 < value(perfect, "KID (training pictures)")  # unbiased, so below where all is one
    assert value(perfect, "precision") == value(perfect, "recall") == value(perfect, "own picture at 1") == 1
    np.testing.assert_allclose(perfect.likeness, 1, atol=1e-5)
    for kind in ("held-out pairs: concept", "held-out pairs: style", "seen pairs: concept", "seen pairs: style"):
        assert value(perfect, kind) == value(perfect, f"{kind}, real")
    assert value(perfect, "style by the probe, share") == 1
    assert value(perfect, "diversity within a prompt") == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_training_pictures_as_renderings_of_their_captions_are_memorised_and_held_out_ones_are_not(
    perfect: Evaluation,
) -> None:
    assert value(perfect, "memorised, of training captions") == 1
    assert value(perfect, "memorised") == value(perfect, "memorised (held-out pictures)") < 1
    for k, caption in enumerate(perfect.seen.captions):
        nearest = perfect.training[perfect.seen.copies.nearest[k]]
        assert np.array_equal(nearest, perfect.seen.renderings[k]), caption


@pytest.mark.slow
def test_one_planted_training_picture_is_flagged_and_found(
    told: Callable[..., Evaluation], perfect: Evaluation, real: dict[str, np.ndarray], held: list[str]
) -> None:
    copied = next(k for k in range(len(held)) if not perfect.copies.flagged[k])
    planted = "banana, twemoji"
    assert planted in real and planted not in held

    def draw(captions: Sequence[str]) -> np.ndarray:
        return np.stack([real[planted if caption == held[copied] else caption] for caption in captions])

    found = told(draw)
    assert (np.flatnonzero(found.copies.flagged != perfect.copies.flagged)).tolist() == [copied]
    assert np.array_equal(found.training[found.copies.nearest[copied]], real[planted])
    everywhere = told(lambda captions: np.stack([real[planted]] * len(captions)))
    assert value(everywhere, "memorised") == value(everywhere, "memorised, of training captions") == 1
    assert value(everywhere, "own picture at 1") <= 1 / len(held) + 1e-9
    assert value(everywhere, "Fréchet distance") > value(everywhere, "Fréchet distance (training pictures)")


def knowing(real: dict[str, np.ndarray]) -> Encoder:
    """A CLIP that knows each picture's caption: one direction for both."""

    def direction(caption: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big")
        return np.random.default_rng(seed).standard_normal(64).astype(np.float32)

    by_picture = {pixels.tobytes(): caption for caption, pixels in real.items()}

    def pictures(batch: torch.Tensor) -> torch.Tensor:
        pixels = (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        return torch.from_numpy(np.stack([direction(by_picture[each.tobytes()]) for each in pixels]))

    def texts(captions: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(np.stack([direction(caption) for caption in captions]))

    return Encoder("clip", "knowing", pictures, texts)


@pytest.mark.slow
def test_pictures_under_each_other_s_captions_drop_to_chance_and_only_there(
    told: Callable[..., Evaluation],
    perfect: Evaluation,
    real: dict[str, np.ndarray],
    held: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over all turns of a wheel each picture stands once under its own caption: on average 1 of N, which is chance."""
    monkeypatch.setattr(run, "open_judge", lambda path=None: knowing(real) if path == "knowing" else open_judge(path))
    own_picture, own_caption = [], []
    for turn in (0, 1, len(held) - 1):
        wheel = dict(zip(held, [*held[turn:], *held[:turn]], strict=True))
        found = told(
            lambda texts, wheel=wheel: np.stack([real[wheel.get(text, text)] for text in texts]), clip="knowing"
        )
        own_picture.append(value(found, "own picture at 1"))
        own_caption.append(value(found, "own caption at 1"))
        assert value(found, "own caption at 1 (real pictures)") == 1
        assert value(found, "Fréchet distance") == pytest.approx(value(perfect, "Fréchet distance"), abs=1e-2)
        assert value(found, "CMMD") <= 1e-6
        assert (value(found, "CLIP score") > 99) == (turn == 0)
    assert own_picture == own_caption == [1, 0, 0]
    assert found.settings["chance of own picture"] == 1 / len(held)
    assert (found.likeness < 1 - 1e-3).all()


@pytest.mark.slow
def test_the_clip_option_scores_as_transformers_own_model_does(
    told: Callable[..., Evaluation], real: dict[str, np.ndarray], held: list[str], tmp_path: Path, parts: dict[str, Any]
) -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = parts["tokenizer"]
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": words.eos_token_id}
    config = CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=12
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    words.save_pretrained(tmp_path / "clip")
    other = dict(zip(held, held[::-1], strict=True))
    found = told(
        lambda captions: np.stack([real[other.get(each, each)] for each in captions]), clip=str(tmp_path / "clip")
    )

    ids = words(held, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    for name, pixels in (("", found.renderings), (" (real pictures)", found.real)):
        values = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=values).logits_per_image
            cosines = (logits / model.logit_scale.exp()).double().numpy()
        assert value(found, f"CLIP score{name}") == pytest.approx(
            100 * np.maximum(np.diag(cosines), 0).mean(), abs=1e-3
        )
        first = cosines.argmax(1) == np.arange(len(held))
        assert value(found, f"own caption at 1{name}") == pytest.approx(first.mean())
    assert value(found, "CMMD") <= 1e-6  # the same pictures, whatever stands under them
    assert found.figures["CLIP score"].count == len(held)
    json.dumps(found.as_dict())
