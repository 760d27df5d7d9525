"""Other averages of a U-Net's weights, made from what its training kept (`training.averages`), as weights folders."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from latentgen.checkpoint import STEMS, Checkpoint, check_safetensors, read_json, write_folder
from latentgen.checkpoint.tensors import save_tensors
from latentgen.checkpoint.write import stored
from latentgen.errors import InputError
from latentgen.models.onnx.export import write_graphs
from latentgen.training.averages import LARGEST, Stored, synthesise
from latentgen.training.averages import stored as kept_in

WIDTHS = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2)
FILE = f"unet/{STEMS['unet']}.safetensors"
GRAPH = "unet/model.onnx"


def find_averages(checkpoint: Checkpoint, report: Callable[[str], None] = lambda _: None) -> list[Stored]:
    """Those in OUT.training of the U-Net run that made the weights folder OUT, up to its last step; [] without any.

    It is known by its figures, which OUT tells. report: told where only other runs kept some.
    """
    folder = checkpoint.folder.resolve()
    told = folder / "metrics.json"
    figures = (read_json(told).get("unet") if told.is_file() else None) or {}
    state = folder.with_name(f"{folder.name}.training")
    places = [place for place in state.glob("unet-*/averages") if kept_in(place)]
    for place in places:
        done = place.with_name("done.json")
        ended = read_json(done).get("figures") if done.is_file() else None
        if ended and ended.items() <= figures.items():
            found = [each for each in kept_in(place) if each.step <= ended["steps"]]
            if found and found[-1].step == ended["steps"]:
                return found
    if places:
        report(f"the averages in {state} are of runs that did not end in these weights; none is tried")
    return []


def widths_near(kept: list[Stored]) -> list[float]:
    """What can be made of those that were kept, without reaching far beyond them."""
    own = [each.width for each in kept]
    return [width for width in WIDTHS if 0.5 * min(own) <= width <= min(2 * max(own), LARGEST)]


def weights_of(checkpoint: Checkpoint, kept: list[Stored], width: float) -> dict[str, torch.Tensor]:
    """The U-Net's tensors at the last step, of another width, in the type they are stored in.

    Raises InputError where the averages are of another network.
    """
    files = checkpoint.weights["unet"]
    header = {name: told for file in files for name, told in check_safetensors(file).items() if name != "__metadata__"}
    made = _of_unet(synthesise(kept, max(each.step for each in kept), width))
    shapes = {name: tuple(told["shape"]) for name, told in header.items()}
    if {name: tuple(value.shape) for name, value in made.items()} != shapes:
        raise InputError(f"the averages beside {checkpoint.folder} are of another network; train it to its end first")
    kind = "fp16" if any(told["dtype"] == "F16" for told in header.values()) else "fp32"
    return stored("unet", made, kind)


def _of_unet(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the U-Net, where it was trained beside a network of its own for `align` (`training.features`)."""
    if not any(name.startswith("alignment.") for name in tensors):
        return dict(tensors)
    return {name.removeprefix("unet."): value for name, value in tensors.items() if name.startswith("unet.")}


def trial(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], place: Path) -> Path:
    """A weights folder with other weights of the U-Net, for torch: its graphs would be of the old ones."""

    def write(aside: Path) -> None:
        for path in checkpoint.folder.rglob("*"):
            name = path.relative_to(checkpoint.folder)
            if path.is_file() and path.suffix != ".onnx" and name.as_posix() not in (FILE, "manifest.json"):
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (aside / name).write_bytes(path.read_bytes())
        put(aside, tensors)

    return write_folder(place, write)


def put(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the U-Net's file in a folder that lies aside; graphs that were there are made anew."""
    (folder / FILE).parent.mkdir(exist_ok=True)
    (folder / FILE).unlink(missing_ok=True)  # a link to the old one's bytes, which stay
    save_tensors(tensors, folder / FILE, {"format": "pt"})
    graphs = list(folder.rglob("*.onnx"))
    for graph in graphs:
        graph.unlink()
    if graphs:
        write_graphs(folder)
