"""What a person's name for weights means: the embedded default, a folder, a single file, or an id of the hub."""

import difflib
import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

from latentgen.checkpoint.folder import PARTS
from latentgen.durable import recover
from latentgen.errors import InputError
from latentgen.values import as_path

SHIPPED = "icons"  # the embedded default
PACKAGE = Path(__file__).parents[1]
SETTINGS = ("*.json", "*.txt")  # of the subfolders that decide a picture


def default_weights() -> Path:
    """The folder of the embedded default, inside an installed package or in a checkout's `weights/`."""
    for folder in (PACKAGE / "weights" / SHIPPED, PACKAGE.parent / "weights" / SHIPPED):
        if (folder / "model_index.json").is_file():
            return folder
    raise InputError(
        f"no embedded weights here (looked for {SHIPPED}); name a weights folder, or train one: "
        "latentgen train pipelines/icons.toml"
    )


def find(path: str | Path | None) -> Path:
    """The folder or file `path` means: None is the embedded default; an "org/name" that is not here is the hub's."""
    if path is None:
        return default_weights()
    try:
        place = as_path("the weights' path", path).expanduser()
    except RuntimeError as error:
        raise InputError(f"no weights folder at {path}: there is no home folder of that name") from error
    recover(place)
    if place.exists():
        return place
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not place.parent.is_dir():
        return _from_hub(str(path))
    siblings = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, [name for name in siblings if not name.startswith(".")], n=1)
    hint = (
        f"did you mean {place.parent / near[0]}?"
        if near
        else "give a weights folder in diffusers' layout, or a .safetensors file"
    )
    raise InputError(f"no weights folder at {path}; {hint}")


def needed(files: Sequence[str]) -> list[str]:
    """Of a hub repository's files, those that rendering takes: settings, and each network's safetensors once.

    A network is taken whole or in shards, in its plain form where there is one, else in fp16. A repository that is no
    pipeline folder but holds one .safetensors file gives that file. Nothing else is fetched: no pickles, no ONNX, no
    part that rendering does without (a safety checker, a second autoencoder).
    """
    if "model_index.json" not in files:
        single = [name for name in files if "/" not in name and name.endswith(".safetensors")]
        return single if len(single) == 1 else []
    inner = [name for name in files if name.count("/") == 1 and name.split("/")[0] in PARTS]
    chosen = ["model_index.json", *(name for name in files if name == "latentgen.json")]
    chosen += [name for name in inner if any(fnmatch.fnmatch(name.split("/")[1], form) for form in SETTINGS)]
    for part in dict.fromkeys(name.split("/")[0] for name in inner):
        weights = [name for name in inner if name.startswith(f"{part}/") and name.endswith(".safetensors")]
        weights = [name for name in weights if re.match(r"(model|diffusion_pytorch_model)[.-]", name.split("/")[1])]
        weights = [name for name in weights if "non_ema" not in name]
        plain = [name for name in weights if ".fp16" not in name]
        whole = [name for name in plain or weights if not re.search(r"-\d{5}-of-\d{5}", name)]
        chosen += whole or plain or weights
    return chosen


def _from_hub(name: str) -> Path:
    """The hub's snapshot of `name`, only the files that are needed: from the network, else from the cache."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = HfApi().list_repo_files(name)
    except Exception as error:  # the hub's client raises many kinds, and each means: cannot be asked
        try:
            return _the_one(Path(snapshot_download(name, local_files_only=True)))
        except Exception:
            raise InputError(
                f"{name} is no folder here, and the hub cannot give it ({_line(error)}); name a weights folder"
            ) from error
    wanted = needed(files)
    if not wanted:
        pickles = [file for file in files if file.endswith((".ckpt", ".bin", ".pt", ".pth"))]
        what = f"only pickles ({pickles[0]})" if pickles else "no model_index.json and no single .safetensors file"
        raise InputError(f"{name} on the hub holds {what}; name a Stable Diffusion checkpoint in safetensors")
    try:
        return _the_one(Path(snapshot_download(name, allow_patterns=wanted)))
    except Exception as error:
        raise InputError(f"{name} could not be fetched from the hub ({_line(error)}); try again later") from error


def _the_one(snapshot: Path) -> Path:
    """The folder itself where it is a pipeline's, else the single file in it."""
    files = sorted(snapshot.glob("*.safetensors"))
    return snapshot if (snapshot / "model_index.json").is_file() or len(files) != 1 else files[0]


def _line(error: Exception) -> str:
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
