"""Fine-tuning proves what it saves, on every kind of weights; resumes to the bit; and refuses in one line."""

import errno
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latentgen import InputError, Pipeline, finetune
from latentgen.checkpoint.defaults import write_defaults
from latentgen.fields import explained
from latentgen.finetuning import prove, run
from latentgen.finetuning.base import Base
from latentgen.finetuning.examples import count_pictures
from latentgen.finetuning.objective import KeptConditions, LiveConditions
from latentgen.finetuning.page import how_to_use
from latentgen.finetuning.prior import prior_prompts
from latentgen.finetuning.settings import Finetune, Start, choose
from latentgen.recipe import read_table
from latentgen.training.finish import Before
from latentgen.values import as_path
from tests.forked import Verb, verb
from tests.shards import png, tar

ROOT = Path(__file__).parents[2]
FAST: dict[str, Any] = {"steps": 6, "batch": 4, "size": 32, "rate": 2e-2, "validate_steps": 6}
FAST |= {"report": lambda line: None, "prompts": ("a red apple", "a blue bird")}
CALL: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}


def picture(colour: tuple[int, int, int], k: int) -> Image.Image:
    found = Image.new("RGB", (32, 32), "white")
    found.paste(colour, (4 + k, 6, 24 + k % 4, 26))
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pictures")
    for k in range(10):
        red = k % 2 == 0
        picture((200, 20 + k, 20) if red else (20, 20 + k, 200), k).save(place / f"{k}.png")
        (place / f"{k}.txt").write_text("a red apple" if red else "a blue bird")
    return place


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "method",
    [
        {"method": "lora"},
        {"method": "lora", "text_encoder": True},
        {"method": "lora", "mirror": True, "scale": (0.8, 1.0)},
        {"method": "dora", "targets": "attention"},
        {"method": "dora", "targets": "all"},
        {"method": "dora", "text_encoder": True},
        {"method": "lokr"},
        {"method": "style"},
        {"method": "full", "rate": 2e-3},
        {"method": "full", "text_encoder": True, "rate": 2e-3},
        {"method": "dreambooth", "on": "lora", "class": "bird", "prior_pictures": 3},
        {"method": "dreambooth", "on": "full", "class": "bird", "prior_pictures": 3, "rate": 2e-3},
        {"method": "textual-inversion", "token": "<my-bird>", "like": "bird", "rate": 0.5},
        {"method": "textual-inversion", "token": "<two>", "vectors": 2, "rate": 0.5},
    ],
    ids=lambda method: "-".join(str(value) for value in method.values()),
)
def test_what_is_saved_renders_as_in_memory_here_and_in_diffusers(
    method: dict[str, Any], folder: Path, pictures: Path, tmp_path: Path
) -> None:
    before = files(folder)
    lines: list[str] = []
    asked = {**FAST, **method, "prompts": ('a "big" $HOME bird', "a bird"), "report": lines.append}
    out = finetune(pictures, base=folder, out=tmp_path / "mine", **asked)
    told = shlex.split(lines[-1].partition("; ")[2])  # as a shell reads it
    shown = method.get("token", 'a "big" $HOME bird')  # a new word's own prompts come first
    assert told[:2] == ["latentgen", "render"] and shown in told[2] and told[-1].startswith(str(out))
    assert told[3:5] == (["--weights", str(folder)] if len(told) == 7 else ["--weights", str(out)])
    proof = json.loads((out / "metrics.json").read_text())["proof"]
    assert proof["saved"] <= 2e-3 and proof["stock"] <= 2e-3 < proof["changed"]
    assert files(folder) == before  # the starting weights are never touched
    assert any("stock diffusers" in line for line in lines) and any(line.startswith("chosen: ") for line in lines)
    page = (out / "report.html").read_text()
    assert "before and after" in page and "<svg" in page and "data:image/png" in page
    again: list[str] = []
    assert finetune(pictures, base=folder, out=out, **{**asked, "report": again.append}) == out
    assert any("done before" in line for line in again)


@pytest.mark.parametrize(
    "method",
    [
        {"method": "lora"},
        {"method": "lora", "text_encoder": True},
        {"method": "dora", "targets": "all"},
        {"method": "dora", "text_encoder": True},
        {"method": "full", "rate": 2e-3},
        {"method": "full", "text_encoder": True, "rate": 2e-3},
        {"method": "dreambooth", "on": "lora", "class": "bird", "prior_pictures": 3},
        {"method": "textual-inversion", "token": "<two>", "vectors": 2, "rate": 0.5},
    ],
    ids=lambda method: "-".join(str(value) for value in method.values()),
)
@pytest.mark.parametrize("base", ["two", "xl"])
def test_stable_diffusion_2_and_xl_are_tuned_and_proved(
    method: dict[str, Any], base: str, pictures: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = finetune(pictures, base=request.getfixturevalue(base), out=tmp_path / "mine", **{**FAST, **method})
    proof = json.loads((out / "metrics.json").read_text())["proof"]
    assert proof["stock"] <= 2e-3 < proof["changed"]


def test_an_optimizer_that_is_not_installed_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    said = 'the optimizer "adamw-8bit" needs the package bitsandbytes; install it, or choose "adamw"'
    with pytest.raises(InputError, match=said):
        finetune(tmp_path / "nowhere", out=tmp_path / "mine", optimizer="adamw-8bit")


def test_what_text_encoders_get_beside_dora_makes_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "fingerprint", lambda *told: told)
    base, nothing = SimpleNamespace(checkpoint=SimpleNamespace(fingerprint="")), np.zeros((0, 4, 4, 3), np.uint8)
    examples = SimpleNamespace(pictures=(), held=(), pixels=nothing, held_pixels=nothing)

    def key(**asked: Any) -> Any:
        what = Finetune.of(asked)
        return run.Run(tmp_path, None, tmp_path, what, print)._key(cast(Any, base), what, cast(Any, examples))

    for asked in ({}, {"text_encoder": True}, {"method": "dora"}):
        assert len(key(**asked)) == 4  # and runs of before go on
        assert key(**asked, folders=False) == key(**asked)  # it shows in the pictures, if at all
    assert key(method="dora", text_encoder=True)[4:] == ("lora",)


def test_the_command_that_uses_a_result_is_quoted_for_the_shell_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Finetune(), "a red bird", "my weights", Path("out")
    assert how_to_use(*told) == "latentgen render 'a red bird' --weights 'my weights' --lora out"
    monkeypatch.setattr(sys, "platform", "win32")
    assert how_to_use(*told) == 'latentgen render "a red bird" --weights "my weights" --lora out'


def test_an_address_is_taken_where_the_file_system_knows_no_such_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: Path) -> None:
        raise OSError(number, "The filename, directory name, or volume label syntax is incorrect")

    monkeypatch.setattr(Path, "stat", refuse)
    number = errno.EINVAL  # as on Windows
    assert as_path("pictures", "https://example.org/p.tar") == Path("https://example.org/p.tar")
    number = errno.ENAMETOOLONG
    with pytest.raises(InputError, match=r"^pictures is 'p', which cannot be used as a path: The filename"):
        as_path("pictures", "p")


def test_a_full_run_opens_with_its_own_graphs(folder: Path, pictures: Path, tmp_path: Path) -> None:
    out = finetune(pictures, base=folder, out=tmp_path / "mine", method="full", **{**FAST, "rate": 2e-3})
    ours = Pipeline.from_pretrained(out)
    assert ours.machine is not None and ours.machine["engine"] == "onnx"
    expected = Pipeline.from_pretrained(out, engine="torch")("a red apple", seed=1, **CALL).images
    np.testing.assert_allclose(ours("a red apple", seed=1, **CALL).images, expected, atol=1e-3)


def test_weights_with_a_guidance_interval_of_their_own_are_proved_too(
    folder: Path, pictures: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    write_defaults(own, {"guidance_scale": 5.0, "guidance_interval": (0.2, 0.6)})
    out = finetune(pictures, base=own, out=tmp_path / "mine", method="lora", **FAST)
    proof = json.loads((out / "metrics.json").read_text())["proof"]
    assert proof["saved"] <= 2e-3 and proof["stock"] <= 2e-3 < proof["changed"]


@pytest.mark.parametrize("method", ["full", "lora", "textual-inversion"])
def test_what_the_starting_weights_tell_of_themselves_is_told_on(
    method: str, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    base, mine = shutil.copytree(folder, tmp_path / "base"), shutil.copytree(pictures, tmp_path / "pictures")
    figures = {"layout": {"explained": 0.4}, "vae": {"psnr": 26.0}, "unet": {"steps": 4200.0, "caption_gain": 0.1}}
    train = {"batch": 512, "rate": 1e-3}
    for name, value in (("metrics.json", figures), ("recipe.json", {"layout": {}, "unet": {"train": train}})):
        (base / name).write_text(json.dumps(value))
    (base / "README.md").write_text("# tiny\n\n## What it was trained on\n\nBy Ann, MIT.\n")
    (mine / "NOTICE").write_text("By Bob, CC BY-SA 4.0.\n")
    asked = {"token": "<x>", "rate": 0.5} if method == "textual-inversion" else {"rate": 2e-3}
    out = finetune(mine, base=base, out=tmp_path / "mine", method=method, **{**FAST, **asked})
    card = (out / "README.md").read_text()
    first, own = "## What the starting weights were trained on", "## What it was trained on"
    assert card.endswith(f"\n\n{first}\n\nBy Ann, MIT.\n\n{own}\n\nBy Bob, CC BY-SA 4.0.\n")
    found = json.loads((out / "metrics.json").read_text())
    assert found["finetune"]["steps"] == 6 and "saved" in found["proof"]
    if method != "full":
        assert found.keys() == {"finetune", "proof", "seconds"}
        return
    parts = [{"steps": 4200.0, **train}, {"steps": 6.0, "batch": 4, "rate": 2e-3}]
    assert {name: found[name] for name in ("layout", "vae")} == {name: figures[name] for name in ("layout", "vae")}
    again = Before.of(out)
    assert again.has_layout and again.history() == {"steps_before": 4206.0, "parts_before": parts}
    assert again.credits == "By Ann, MIT.\n\nBy Bob, CC BY-SA 4.0."


def test_an_adapters_folder_says_how_it_is_used(folder: Path, pictures: Path, tmp_path: Path) -> None:
    out = finetune(pictures, base=folder, out=tmp_path / "mine", **FAST)
    with pytest.raises(InputError, match="render tiny with --lora"):
        Pipeline.from_pretrained(out)


def test_the_dial_of_a_style_is_the_weight_of_its_change(folder: Path, pictures: Path, tmp_path: Path) -> None:
    out = finetune(pictures, base=folder, out=tmp_path / "look", method="style", **FAST)
    pipe = Pipeline.from_pretrained(folder, engine="torch")
    plain = pipe("a red apple", seed=1, **CALL).images
    name = pipe.load_lora(out, 0.0)
    assert np.array_equal(pipe("a red apple", seed=1, **CALL).images, plain)
    apart = []
    for dial in (0.02, 0.05, 0.1):
        pipe.set_lora_weight(name, dial)
        apart.append(float(np.abs(pipe("a red apple", seed=1, **CALL).images - plain).mean()))
    assert 0 < apart[0] < apart[1] < apart[2]


def test_a_new_word_is_read_in_prompts_and_replayed(folder: Path, pictures: Path, tmp_path: Path) -> None:
    out = finetune(
        pictures, base=folder, out=tmp_path / "word", method="textual-inversion", token="<x>", vectors=2,
        **{**FAST, "rate": 0.5},
    )  # fmt: skip
    target = tmp_path / "x.png"
    rendered = verb("render", "a <x> bird", "--weights", folder, "--word", out, "--seed", "3", "--out", target)
    assert rendered.returncode == 0, rendered.stderr
    moved = out.rename(tmp_path / "elsewhere")
    replayed = verb("replay", target, "--word", moved, "--out", tmp_path / "y.png")
    assert replayed.returncode == 0 and "byte for byte" in replayed.stderr
    assert target.read_bytes() == (tmp_path / "y.png").read_bytes()
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"another word")
    refused = verb("replay", target, "--word", moved, "--word", other)
    assert refused.returncode == 2 and f"--word {other} is not of {target}, which was made with <x> (" in refused.stderr
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.load_textual_inversion(moved) == "<x>"
    ids = [token.id for token in pipe.text.tokens("a <x> bird")]
    first = pipe.text.tokenizer.convert_tokens_to_ids("<x>")
    assert [*ids].count(first) == 1 and ids[ids.index(first) + 1] == first + 1
    with pytest.raises(InputError, match="already"):
        pipe.load_textual_inversion(moved)


def test_killed_and_started_again_it_ends_in_the_same_bits(folder: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("steps = 24\nbatch = 4\nsize = 32\nrate = 2e-2\nhold_out = 0.2\nvalidate_steps = 4\n")

    def start(out: Path) -> Verb:
        return Verb("finetune", pictures, "--from", folder, "--recipe", recipe, "--out", out)

    assert start(tmp_path / "whole").wait() == 0
    torn = start(tmp_path / "torn")
    for line in torn.lines():
        if "step 8, held out" in line:
            torn.signal(signal.SIGTERM)  # it saves between two steps, as Ctrl-C would have it
    assert torn.wait() == 130
    assert not (tmp_path / "torn").exists()  # nothing half-made stands in its place
    killed = start(tmp_path / "torn")
    for line in killed.lines():
        if "step 16, held out" in line:
            killed.signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not (tmp_path / "torn").exists()
    assert start(tmp_path / "torn").wait() == 0
    one, other = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("whole", "torn"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_an_adapter_without_effect_is_an_error_and_leaves_nothing(folder: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="changed nothing"):
        finetune(pictures, base=folder, out=tmp_path / "mine", **{**FAST, "rate": 1e-12})
    assert not (tmp_path / "mine").exists()


def test_a_file_that_is_not_what_was_trained_is_caught(
    folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentgen.finetuning import methods
    from latentgen.models.adapters import write_adapter

    def torn(place: Path, kind: str, networks: Any) -> Path:
        with torch.no_grad():
            for name, weight in networks["unet"].named_parameters():
                if "lora_B" in name:
                    weight.mul_(3)
            file = write_adapter(place, kind, networks)
            for name, weight in networks["unet"].named_parameters():
                if "lora_B" in name:
                    weight.div_(3)
        return file

    monkeypatch.setattr(methods, "write_adapter", torn)
    with pytest.raises(InputError, match="other pictures than the model in memory"):
        finetune(pictures, base=folder, out=tmp_path / "mine", **FAST)
    assert not (tmp_path / "mine").exists()


def test_forgetting_and_overfitting_are_two_curves(folder: Path, pictures: Path, tmp_path: Path) -> None:
    asked = {**FAST, "steps": 20, "hold_out": 0.2, "validate_steps": 5, "keep": "best"}
    out = finetune(pictures, base=folder, out=tmp_path / "mine", **asked)
    (log,) = (tmp_path / "mine.training").glob("finetune-*/log.jsonl")
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    looked = [entry for entry in entries if "prior_loss" in entry]
    assert [entry["step"] for entry in looked][:2] == [5, 10] and all("validation_loss" in entry for entry in looked)
    figures = json.loads((out / "metrics.json").read_text())["finetune"]
    assert figures["validation_loss"] == pytest.approx(min(e["validation_loss"] for e in looked), rel=1e-4)
    assert figures["validation_loss"] < figures["validation_loss_before"]
    assert figures["prior_loss"] != figures["prior_loss_before"]


@pytest.mark.parametrize("on", ["lora", "full"])
def test_dreambooth_keeps_to_what_the_starting_weights_answer(
    on: str, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    asked = {**FAST, "method": "dreambooth", "class": "bird", "on": on, "prior_pictures": 2, "rate": 2e-3}
    firsts = {}
    for prior in ("answers", "pictures"):
        finetune(pictures, base=folder, out=tmp_path / prior, **{**asked, "prior": prior})
        (log,) = (tmp_path / f"{prior}.training").glob("finetune-*/log.jsonl")
        firsts[prior] = next(entry for entry in map(json.loads, log.read_text().splitlines()) if "prior" in entry)
    assert firsts["answers"]["step"] == firsts["pictures"]["step"] == 1
    assert firsts["answers"]["prior"] < 1e-6 < 1e-2 < firsts["pictures"]["prior"]


def test_half_of_the_class_that_is_kept_to_is_plain_and_half_in_the_ways_that_are_known() -> None:
    others = ["a red apple, noto", "a cat, twemoji", "a dog"]
    found = prior_prompts("a robot", others, 6)
    named = ["a robot", "a robot, noto", "a robot", "a robot, twemoji", "a robot", "a robot"]
    assert found[::2] == named and found[1::2] == [*others, *others]
    assert prior_prompts("a robot", ["a dog"], 2) == ["a robot", "a dog", "a robot", "a dog"]
    assert prior_prompts("a robot", others, 0) == []


def test_what_is_kept_to_is_chosen_by_what_there_is_room_for() -> None:
    small, large = Start(10_000_000, 64), Start(860_000_000, 512)
    bird = {"method": "dreambooth", "class": "bird"}
    assert choose(Finetune.of(bird), 5, small, 0).settings.prior == "answers"
    assert choose(Finetune.of(bird), 5, large, 0).settings.prior == "answers"  # a LoRA is switched off for it
    assert choose(Finetune.of({**bird, "on": "full"}), 5, large, 0).settings.prior == "pictures"
    assert choose(Finetune.of({**bird, "text_encoder": True}), 5, small, 0).settings.prior == "pictures"
    assert choose(Finetune.of({"method": "lora"}), 5, small, 0).settings.prior is None
    for method in ("lora", "style", "full"):
        asked = Finetune.of({"method": method, "prior_pictures": 4})
        assert choose(asked, 5, small, 0).settings.prior == "answers"
    assert choose(Finetune.of({"method": "full", "prior_pictures": 4}), 5, large, 0).settings.prior == "pictures"
    word = Finetune.of({"method": "textual-inversion", "token": "<it>", "prior_pictures": 4})
    assert choose(word, 5, small, 0).settings.prior is None


def test_a_style_is_stored_at_its_strength(folder: Path, pictures: Path, tmp_path: Path) -> None:
    found = {}
    for strength in (0.5, 1.0):
        out = finetune(pictures, base=folder, out=tmp_path / f"{strength}", method="style", strength=strength, **FAST)
        found[strength] = load_file(out / "pytorch_lora_weights.safetensors")
    assert all(value.dtype == torch.float16 for value in found[1.0].values())
    for name, value in found[1.0].items():
        torch.testing.assert_close(found[0.5][name], value * (0.5 if ".lora_B." in name else 1.0), atol=1e-7, rtol=1e-3)
    pipe = Pipeline.from_pretrained(folder, engine="torch")
    pictures_of = []
    for strength, dial in ((0.5, 2.0), (1.0, 1.0)):
        pipe.load_lora(tmp_path / f"{strength}", weight=dial)
        pictures_of.append(np.asarray(pipe("a red apple", seed=1, **CALL).images))
        pipe.unload_lora()
    np.testing.assert_allclose(*pictures_of, atol=1e-3)
    chosen = choose(Finetune.of({"method": "style"}), 20, Start(10_000_000, 64), 0).settings
    assert chosen.strength == 0.5 and choose(Finetune.of({}), 20, Start(10_000_000, 64), 0).settings.strength is None


def test_rounding_that_the_model_amplifies_is_no_other_picture(
    folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "SAME", 1e-9)
    monkeypatch.setattr(prove, "NUDGE", 0.0)
    with pytest.raises(InputError, match="other pictures"):
        finetune(pictures, base=folder, out=tmp_path / "mine", **FAST)
    monkeypatch.setattr(prove, "NUDGE", 1e-4)
    out = finetune(pictures, base=folder, out=tmp_path / "mine", **FAST)
    assert 1e-9 < json.loads((out / "metrics.json").read_text())["proof"]["stock"] < 1e-4


def test_it_stops_where_nothing_gets_better(folder: Path, pictures: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    asked = {**FAST, "steps": 200, "rate": 0.5, "hold_out": 0.2, "validate_steps": 2, "patience": 2}
    finetune(pictures, base=folder, out=tmp_path / "mine", **{**asked, "keep": "best", "report": lines.append})
    assert any("stops at step" in line for line in lines), lines
    assert any("keeps step" in line for line in lines)


def bare(place: Path, count: int, same: bool = False) -> Path:
    place.mkdir()
    for k in range(count):
        picture((200, 30, 30), 0 if same else k).save(place / f"{k}.png")
    return place


def held_out(place: Path, count: int, marked: int) -> Path:
    """A folder of captioned pictures, the last of them marked."""
    bare(place, count)
    rows = [{"file_name": f"{k}.png", "text": "a red apple"} for k in range(count)]
    for row in rows[count - marked :]:
        row["split"] = "test"
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def refused(pictures: Path, folder: Path, out: Path, **asked: Any) -> str:
    with pytest.raises(InputError) as caught:
        finetune(pictures, base=folder, out=out, **{**FAST, **asked})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_bad_input_gets_one_line(folder: Path, xl: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    assert "holds no pictures" in refused(_empty(tmp_path / "empty"), folder, out)
    assert "no captions" in refused(bare(tmp_path / "bare", 3), folder, out)
    assert "all the same" in refused(bare(tmp_path / "same", 3, same=True), folder, out, caption="a red apple")
    assert "class is missing" in refused(pictures, folder, out, method="dreambooth")
    assert "token is missing" in refused(pictures, folder, out, method="textual-inversion")
    assert "multiple of 4" in refused(pictures, folder, out, size=30)
    assert "already" in refused(pictures, folder, out, method="textual-inversion", token="apple")
    assert "no weights" in refused(pictures, tmp_path / "nowhere", out)
    assert "method is 'loro'" in refused(pictures, folder, out, method="loro")
    assert "divide the batch" in refused(pictures, folder, out, accumulate=3)
    assert "strength is a style's" in refused(pictures, folder, out, strength=0.5)
    assert "text encoder as it was" in refused(pictures, folder, out, prior="answers", text_encoder=True)
    assert 'times = "logit-normal"' in refused(pictures, folder, out, times_mean=0.5)
    for none in ({}, {"prior_pictures": 0}, {"method": "dreambooth", "class": "bird", "prior_weight": 0.0}):
        assert "there are none; give prior_pictures" in refused(pictures, folder, out, prior="pictures", **none)
    word = {"method": "textual-inversion", "token": "<it>"}
    assert "caption is for methods" in refused(pictures, folder, out, caption="a bird", **word)
    assert "on is dreambooth's" in refused(pictures, folder, out, on="full")
    assert "targets is an adapter's" in refused(pictures, folder, out, method="full", targets="all")
    assert "leaves them as they are" in refused(pictures, folder, out, prior="answers", **word)
    assert "words have none" in refused(pictures, folder, out, weight_decay=0.1, **word)
    assert "lies among the pictures" in refused(pictures, folder, pictures / "mine")
    assert "all pictures are held out" in refused(held_out(tmp_path / "held", 3, 3), folder, out)
    wrong: Any = 3
    assert "pictures is 3; it must be a path" in refused(wrong, folder, out)
    assert "the weights' path is 3; it must be a path" in refused(pictures, wrong, out)
    assert "out is 3; it must be a path" in refused(pictures, folder, wrong)
    told: tuple[tuple[Any, str], ...] = (
        (3, "the whole is 3: input should"),
        ({"stps": 3}, r"unknown key 'stps' in the top level; did you mean 'steps'\?"),
        ({"steps": 0}, "steps is 0: input should"),
    )
    for settings, line in told:
        with pytest.raises(InputError, match=f"^finetune: {line}"):
            finetune(pictures, base=folder, out=out, settings=settings)
    with pytest.raises(InputError, match="settings and steps"):
        finetune(pictures, base=folder, out=out, settings=Finetune(), steps=5)
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "exists" in refused(pictures, folder, out)
    stray = tmp_path / "stray"
    shutil.copytree(pictures, stray)
    (stray / "gone.txt").write_text("a picture that is not there")
    (stray / "torn.png").write_bytes(b"no picture")
    (stray / "torn.txt").write_text("a torn one")
    lines: list[str] = []
    finetune(stray, base=folder, out=tmp_path / "stray-mine", **{**FAST, "report": lines.append})
    assert any("torn.png" in line and "left out" in line for line in lines)
    assert any("gone.txt" in line for line in lines)


def _empty(place: Path) -> Path:
    place.mkdir()
    return place


def test_one_picture_goes_on_with_a_warning(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    asked = {**FAST, "report": lines.append, "caption": "a red apple", "batch": None}
    finetune(bare(tmp_path / "one", 1), base=folder, out=tmp_path / "mine", **asked)
    assert any("one picture alone" in line for line in lines)


@pytest.mark.parametrize("recipe", sorted((ROOT / "pipelines/finetune").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_of_fine_tuning_reads_and_holds_together(recipe: Path) -> None:
    explained(Finetune, read_table(recipe), str(recipe)).check()


@pytest.mark.parametrize(
    ("toml", "said"),
    [("rnk = 4\n", "did you mean 'rank'"), ("rank = 0\n", "rank is 0"), ("rank = \n", "is not TOML")],
)
def test_a_recipe_that_is_not_right_is_refused_on_the_command_line(
    toml: str, said: str, pictures: Path, folder: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(toml)
    verb = ["finetune", str(pictures), "--from", str(folder), "--recipe", str(recipe), "--out", str(tmp_path / "o")]
    done = subprocess.run([sys.executable, "-m", "latentgen", *verb], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_is_given_is_never_chosen_anew() -> None:
    asked = Finetune(rank=3, steps=7, rate=0.5)
    chosen = choose(asked, 20, Start(10**7, 64), 0)
    assert (chosen.settings.rank, chosen.settings.steps, chosen.settings.rate) == (3, 7, 0.5)
    assert not any(reason.startswith(("rank", "steps", "rate")) for reason in chosen.reasons)
    assert all(value is not None for key, value in chosen.settings if key in ("batch", "size", "keep", "ema"))


@pytest.mark.parametrize(("pictures", "part"), [(15, 0.0), (20, 0.1)])
def test_a_tenth_is_held_out_where_there_are_pictures_enough(pictures: int, part: float) -> None:
    chosen = choose(Finetune(), pictures, Start(10**7, 64), 0)
    assert chosen.settings.hold_out == part and chosen.settings.keep == ("best" if part else "last")


def test_pictures_marked_as_held_out_are_what_the_best_is_kept_by(folder: Path, tmp_path: Path) -> None:
    place, lines = held_out(tmp_path / "few", 8, 3), list[str]()
    out = finetune(place, base=folder, out=tmp_path / "mine", **{**FAST, "report": lines.append})
    assert "chosen: keep = best (pictures are held out)" in lines
    assert "3 held-out pictures" in (out / "report.html").read_text()
    assert json.loads((out / "metrics.json").read_text())["finetune"]["kept_step"] >= 1


def test_without_held_out_pictures_the_page_does_not_speak_of_any(folder: Path, pictures: Path, tmp_path: Path) -> None:
    out = finetune(pictures, base=folder, out=tmp_path / "mine", **FAST)
    said = (out / "report.html").read_text()
    assert "trained on (none is held out)" in said and "held-out pictures" not in said


def test_a_subject_keeps_captions_that_say_its_word(tmp_path: Path) -> None:
    place = bare(tmp_path / "own", 3)
    for k, text in enumerate(("a Zwx, on grass", "a zwxy bird", "some bird")):
        (place / f"{k}.txt").write_text(text)
    folder, count, marked = count_pictures(place, Finetune(method="dreambooth", class_word="bird"))
    assert (count, marked) == (3, 0)
    assert [each.captions for each in folder.pictures] == [("a Zwx, on grass",), ("a zwx bird",), ("a zwx bird",)]


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("asked", [{"method": "dreambooth", "class": "bird"}, {"caption": "a zwx bird"}])
def test_pictures_without_a_caption_keep_their_box_and_split(
    asked: dict[str, Any], described: bool, tmp_path: Path
) -> None:
    place = bare(tmp_path / "own", 3)
    rows: list[dict[str, Any]] = [{"file_name": "0.png", "box": [0, 0, 16, 32]}]
    rows += [{"file_name": "0.png", "box": [16, 0, 32, 32]}, {"file_name": "1.png", "split": "test"}]
    if described:
        rows[0]["text"] = "a zwx bird"
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, count, marked = count_pictures(place, Finetune.of(asked))
    found = {(each.path.name, each.box, each.split, each.captions) for each in folder.pictures}
    boxes = {("0.png", (0, 0, 16, 32), "train"), ("0.png", (16, 0, 32, 32), "train")}
    expected = {*boxes, ("1.png", None, "test"), ("2.png", None, "train")}
    assert found == {(*each, ("a zwx bird",)) for each in expected} and (count, marked) == (3, 1)
    assert len(folder.pictures) == 4 and not folder.problems


def test_members_of_a_shard_without_a_caption_are_read_where_they_stand(tmp_path: Path) -> None:
    pictures = [(f"{k}.png", png((k, 0, 0))) for k in range(3)]
    tar(tmp_path / "shards" / "0.tar", *pictures, ("0.txt", b"a zwx bird"), ("2.json", b'{"split": "test"}'))
    folder, count, marked = count_pictures(tmp_path / "shards", Finetune(method="dreambooth", class_word="bird"))
    assert [(each.path.name, each.read()) for each in folder.pictures] == pictures and (count, marked) == (2, 1)


def test_folders_that_are_named_as_splits_hold_out_pictures_without_captions(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    folder, count, marked = count_pictures(tmp_path, Finetune(method="dreambooth", class_word="bird"))
    assert (count, marked) == (2, 1)
    assert [picture.path.name for picture in folder.select("test")] == ["c.png"]


def test_a_folder_without_captions_is_read_with_the_folders_it_links_to(tmp_path: Path) -> None:
    place = bare(tmp_path / "own", 1)
    (place / "more").symlink_to(bare(tmp_path / "elsewhere", 2))
    folder, count, _ = count_pictures(place, Finetune(method="dreambooth", class_word="bird"))
    assert count == 3 and [each.path.parent.name for each in folder.pictures] == ["own", "more", "more"]


@pytest.mark.parametrize("kind", [KeptConditions, LiveConditions])
def test_a_dropped_caption_is_what_guidance_starts_from(kind: Any, folder: Path, xl: Path) -> None:
    for weights, zeros in ((xl, True), (folder, False)):
        base = Base.open(weights, Finetune(), torch.device("cpu"))
        rows = kind(base.text, ["a red apple", ""], 32).rows(np.array([1, 0]))
        told = base.text.encode(["", "a red apple"])
        for part in ("states", "pooled"):
            found, encoded = getattr(rows, part), getattr(told, part)
            if encoded is not None:
                torch.testing.assert_close(found[1], encoded[1], atol=1e-3, rtol=1e-3)
                expected = torch.zeros_like(encoded[0]) if zeros else encoded[0]
                torch.testing.assert_close(found[0], expected, atol=0 if zeros else 1e-3, rtol=1e-3)


def test_the_figures_of_a_style_are_of_what_is_saved(folder: Path, pictures: Path, tmp_path: Path) -> None:
    """At a small strength that is nearly the starting weights."""
    figures = {}
    for strength in (0.05, 1.0):
        out = finetune(pictures, base=folder, out=tmp_path / f"{strength}", method="style", strength=strength, **FAST)
        figures[strength] = json.loads((out / "metrics.json").read_text())["finetune"]
    for name in ("validation_loss", "prior_loss"):
        before = {found[f"{name}_before"] for found in figures.values()}
        assert len(before) == 1
        few, all_ = (abs(found[name] - found[f"{name}_before"]) for found in figures.values())
        assert few < 0.2 * all_


def test_times_are_the_starting_weights_own_and_a_subject_is_never_unnamed() -> None:
    start = Start(10**7, 64, "logit-normal", 0.5, 1.1)
    found = choose(Finetune(method="dreambooth", class_word="cat"), 8, start, 0).settings
    assert (found.times, found.times_mean, found.times_std, found.caption_dropout) == ("logit-normal", 0.5, 1.1, 0)
    assert (
        found.on == "full"
        and choose(Finetune(method="dreambooth", class_word="cat", rank=4), 8, start, 0).settings.on == "lora"
    )
    other = choose(Finetune(), 8, Start(10**7, 64, "lognormal-sigma", -0.4, 1.0), 0).settings
    assert (other.times, other.times_mean, other.times_std) == ("lognormal-sigma", -0.4, 1.0)
    found = choose(Finetune(times="uniform"), 8, start, 0).settings
    assert (found.times, found.times_mean, found.caption_dropout) == ("uniform", None, 0.1)


def test_full_weights_of_a_wider_base_are_proved(folder: Path, pictures: Path, tmp_path: Path) -> None:
    """Float32 weights of every network, that halves do not hold."""
    wide = tmp_path / "wide"
    shutil.copytree(folder, wide)
    for file in wide.rglob("*.safetensors"):
        generator = torch.Generator().manual_seed(1)
        held = {name: value.float() for name, value in load_file(file).items()}
        save_file({k: v + 1e-3 * torch.randn(v.shape, generator=generator) for k, v in held.items()}, file)
    (wide / "manifest.json").unlink(missing_ok=True)
    out = finetune(pictures, base=wide, out=tmp_path / "mine", method="full", **{**FAST, "rate": 2e-3})
    proof = json.loads((out / "metrics.json").read_text())["proof"]
    assert proof["saved"] < 1e-4 and proof["stock"] < 2e-3


def test_a_base_of_half_precision_files_is_proved_in_diffusers(folder: Path, pictures: Path, tmp_path: Path) -> None:
    halves = tmp_path / "halves"
    shutil.copytree(folder, halves)
    for file in halves.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    (halves / "manifest.json").unlink(missing_ok=True)
    for graph in halves.rglob("*.onnx"):
        graph.unlink()
    out = finetune(pictures, base=halves, out=tmp_path / "mine", **FAST)
    assert json.loads((out / "metrics.json").read_text())["proof"]["stock"] < 2e-3


@pytest.mark.parametrize("method", [{"method": "lora"}, {"method": "full", "rate": 2e-3}])
def test_a_base_whose_tokenizer_states_no_bound_is_bounded_by_its_tower(
    method: dict[str, Any], folder: Path, pictures: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(folder, tmp_path / "base")
    (base / "manifest.json").unlink()
    config = base / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": int(1e30)}))
    out = finetune(pictures, base=base, out=tmp_path / "mine", **{**FAST, **method})
    assert json.loads((tmp_path / "mine.training/ledger.json").read_text())["context"] == 16  # the tower's
    assert json.loads((out / "metrics.json").read_text())["proof"]["stock"] <= 2e-3


def test_the_trained_weights_alone_are_in_a_checkpoint(folder: Path, pictures: Path, tmp_path: Path) -> None:
    finetune(pictures, base=folder, out=tmp_path / "mine", **FAST)
    found = sorted((tmp_path / "mine.training").glob("finetune-*/checkpoints/step-*/model.safetensors"))
    held = load_file(found[-1])
    assert held and all("lora_" in name for name in held)


def test_more_training_changes_more(folder: Path, pictures: Path, tmp_path: Path) -> None:
    """The loss on what it is trained on falls: it is training that happens."""

    def figures(steps: int) -> dict[str, float]:
        asked = {**FAST, "steps": steps, "rate": 5e-3}
        out = finetune(pictures, base=folder, out=tmp_path / f"m{steps}", **asked)
        found: dict[str, float] = json.loads((out / "metrics.json").read_text())["finetune"]
        return found

    few, many = figures(4), figures(60)
    assert many["validation_loss"] < few["validation_loss"] < few["validation_loss_before"]
