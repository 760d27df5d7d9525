"""Deep features taken over from an earlier step: what is computed, and what it does to a picture."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from latentgen import InputError, Pipeline
from latentgen.cli import main
from latentgen.diffusion.denoiser import Condition
from latentgen.image import read_settings
from latentgen.models.feature_cache import FeatureCache
from latentgen.models.memory import in_groups
from latentgen.models.network import unet_network
from latentgen.render import replay

CALL: dict[str, Any] = {"num_inference_steps": 6, "seed": 3, "guidance_scale": 3.0, "output_type": "np"}


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    ).eval()


def test_the_deep_blocks_run_at_every_nth_time_and_come_back(unet: Any) -> None:
    ran: list[str] = []
    for name in ("down_blocks.0", "down_blocks.1.resnets.0", "mid_block.resnets.0", "up_blocks.1.resnets.0"):
        unet.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    cached = FeatureCache(unet, unet_network(unet), 3)
    x, states = torch.randn(2, 4, 8, 12), torch.randn(2, 5, 16)
    counts = []
    for time in (900.0, 800.0, 700.0, 600.0):
        ran.clear()
        out = cached(x, torch.full((2,), time), Condition(states=states))
        assert out.shape == x.shape
        counts.append(len(ran))
    assert counts == [4, 1, 1, 4]
    plain = unet_network(unet)
    torch.testing.assert_close(out, plain(x, torch.full((2,), 600.0), Condition(states=states)), rtol=0, atol=0)


def test_features_of_the_very_same_input_give_the_very_same_output(unet: Any) -> None:
    """Only the time differs, and a network deaf to it cannot tell: so what is taken over is the right tensor."""
    deaf = UNet2DConditionModel.from_config(unet.config).eval()
    deaf.load_state_dict(unet.state_dict())
    with torch.no_grad():
        deaf.time_embedding.linear_2.weight.zero_()
    cached, plain = FeatureCache(deaf, unet_network(deaf), 2), unet_network(deaf)
    x, condition = torch.randn(2, 4, 9, 11), Condition(states=torch.randn(2, 5, 16))
    cached(x, torch.full((2,), 900.0), condition)
    again = cached(x, torch.full((2,), 500.0), condition)
    torch.testing.assert_close(again, plain(x, torch.full((2,), 500.0), condition), rtol=0, atol=1e-6)


def test_a_step_in_groups_keeps_the_features_of_each_and_other_rows_get_their_own(unet: Any) -> None:
    cached, plain = FeatureCache(unet, unet_network(unet), 2), unet_network(unet)
    x, states = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16)
    for time in (900.0, 800.0):
        for rows in (slice(0, 2), slice(2, 3)):
            cached(x[rows], torch.full((len(x[rows]),), time), Condition(states=states[rows]))
    assert [len(kept) for kept in cached.features.values()] == [2, 1]
    cached(x, torch.full((3,), 700.0), Condition(states=states))
    out = cached(x[:1], torch.full((1,), 600.0), Condition(states=states[:1]))  # one row, where three were kept
    torch.testing.assert_close(out, plain(x[:1], torch.full((1,), 600.0), Condition(states=states[:1])), rtol=0, atol=0)


def test_other_rows_at_the_same_place_get_their_own_however_alike_they_are_laid_out(unet: Any) -> None:
    cached, plain = FeatureCache(unet, unet_network(unet), 3), unet_network(unet)
    x, condition, other = torch.randn(2, 4, 8, 8), *(Condition(states=torch.randn(2, 5, 16)) for _ in range(2))
    for time in (900.0, 800.0):
        cached(x, torch.full((2,), time), condition)
    time = torch.full((2,), 700.0)
    torch.testing.assert_close(cached(x, time, other), plain(x, time, other), rtol=0, atol=0)


def test_states_that_are_new_at_every_step_take_features_over_until_the_groups_are_others(unet: Any) -> None:
    cached, plain = FeatureCache(unet, unet_network(unet), 9), unet_network(unet)
    x = torch.randn(4, 4, 8, 8)

    def step(time: float, count: int) -> bool:
        """Whether the first two of `count` rows are computed whole."""
        times, condition = torch.full((count,), time)[:2], Condition(states=torch.randn(2, 5, 16))
        return torch.equal(cached(x[:2], times, condition), plain(x[:2], times, condition))

    assert [step(900.0, 2), step(800.0, 2), step(700.0, 2)] == [True, False, False]
    assert [step(600.0, 4), step(500.0, 4)] == [True, False]


@pytest.mark.parametrize("states", ["kept", "annealed"])
@pytest.mark.parametrize(("rows", "before"), [(1, 1), (1, 2), (2, 2)])
def test_texts_of_two_lengths_get_their_own_features_from_where_guidance_begins(
    unet: Any, rows: int, before: int, states: str
) -> None:
    """Unguided, one row of each length is shown; guided, two, of which the first is of the negative prompt."""
    cached, plain = in_groups(FeatureCache(unet, unet_network(unet), 9), rows), in_groups(unet_network(unet), rows)
    x, told = torch.randn(4, 4, 8, 8), torch.randn(4, 7, 16)
    mask = np.arange(7) < np.array([[7], [5], [5], [7]])  # the negatives of 7 and 5 tokens, then the prompts of 5 and 7

    def step(time: float, guided: bool) -> bool:
        """Whether the step is what is computed without a cache."""
        count = 4 if guided else 2
        noise = 0.1 * torch.randn(7, 16) if states == "annealed" else 0.0
        condition = kept[guided] if states == "kept" else Condition(states=told[-count:] + noise, mask=mask[-count:])
        times = torch.full((count,), time)
        return torch.equal(cached(x[-count:], times, condition), plain(x[-count:], times, condition))

    kept = {guided: Condition(states=told[-n:], mask=mask[-n:]) for guided, n in ((False, 2), (True, 4))}
    assert [step(time, False) for time in (900.0, 800.0)[:before]] == [True, False][:before]
    assert [step(700.0, True), step(600.0, True)] == [True, False]


def test_a_walk_that_begins_anew_takes_nothing_over_and_counts_from_its_own_start(unet: Any) -> None:
    """As where rows are walked one after the other: each is what it is alone, however many steps were before."""
    alone, after = (FeatureCache(unet, unet_network(unet), 2) for _ in range(2))
    x = torch.randn(1, 4, 8, 8)
    for time in (900.0, 800.0, 700.0):
        after(x, torch.full((1,), time), Condition(states=torch.randn(1, 5, 16)))
    for time in (900.0, 600.0, 500.0, 400.0):
        condition = Condition(states=torch.randn(1, 5, 16))
        found, expected = (network(x, torch.full((1,), time), condition) for network in (after, alone))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("annealing", [None, (0.2, 0.9, 0.3)])
@pytest.mark.parametrize("interval", [(0.25, 1.0), (0.5, 1.0), (0.0, 0.5)])
def test_pictures_in_groups_are_those_made_alone_where_guidance_is_not_everywhere(
    interval: tuple[float, float], annealing: tuple[float, float, float] | None, folder: Path
) -> None:
    pipe = Pipeline.from_pretrained(folder, engine="torch")
    how: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 6.0, "feature_cache": 2, "output_type": "np"}
    how |= {"guidance_interval": interval, "condition_annealing": annealing}
    prompts = ["a red apple", "a blue bird"]
    alone = [pipe(prompt, seed=5 + row, **how).images[0] for row, prompt in enumerate(prompts)]
    np.testing.assert_allclose(pipe(prompts, seed=5, batch=1, **how).images, alone, atol=1e-4)


def test_it_is_off_unless_asked_for_and_said_in_the_settings(folder: Path) -> None:
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    plain = pipe("a red apple", **CALL)
    assert "feature_cache" not in plain.settings
    cached = pipe("a red apple", feature_cache=2, **CALL)
    assert cached.settings["engine"] == "torch" and cached.settings["feature_cache"] == 2
    assert 0 < np.abs(cached.images - plain.images).mean() < 0.1
    np.testing.assert_array_equal(pipe("a red apple", feature_cache=2, **CALL).images, cached.images)
    np.testing.assert_allclose(pipe("a red apple", **CALL).images, plain.images, atol=1e-3)


def test_what_cannot_cache_says_so(folder: Path) -> None:
    with pytest.raises(InputError, match="feature_cache needs the torch engine"):
        Pipeline.from_pretrained(folder, engine="onnx")("a", feature_cache=2)
    with pytest.raises(InputError, match="feature_cache is 0; it must be 1 or more"):
        Pipeline.from_pretrained(folder, engine="onnx")("a", feature_cache=0)


def test_the_command_line_has_the_feature_cache_and_tiling_and_a_replay_repeats_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["latentgen", "render", "a red apple", "--seed", "1", "--steps", "4", "--weights", str(folder)]
    for name, options in (("plain", []), ("cached", ["--feature-cache", "2", "--vae-tiling"])):
        target = tmp_path / f"{name}.png"
        monkeypatch.setattr("sys.argv", [*common, *options, "--engine", "torch", "--out", str(target)])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0
    settings = read_settings(target)
    assert (settings["feature_cache"], settings["vae_tiling"]) == (2, True)
    pixels = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "cached")]
    assert np.abs(pixels[0].astype(int) - pixels[1]).max() > 0
    _, remarks = replay(target)
    assert remarks == ["the same file, byte for byte"]


def test_a_feature_cache_below_one_is_refused_under_its_options_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["latentgen", "render", "a", "--feature-cache", "0", "--weights", str(folder)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("latentgen: --feature-cache is 0")
