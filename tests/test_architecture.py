"""The rules of the house, read from the code itself: who may import whom, and what must not be there at all."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "latentgen"
FILES = sorted(PACKAGE.rglob("*.py"))

# leaves that anyone may use
SHARED = {"errors", "durable", "fields", "hints", "image", "page", "processes", "stopping", "values"}
MAY_USE = {  # room -> rooms it may import; what is not listed is a back edge
    "__init__": {"pipeline", "output", "errors", "finetuning"},
    "errors": set(),
    "durable": set(),
    "fields": set(),
    "hints": set(),
    "values": set(),
    "image": set(),
    "page": set(),
    "processes": set(),
    "checkpoint": set(),
    "request": {"checkpoint", "diffusion"},
    "diffusion": set(),
    "data": set(),
    "models": {"diffusion", "checkpoint"},
    "output": {"checkpoint"},
    "conditions": {"diffusion", "models", "request"},
    "guiding": {"diffusion", "models", "request"},
    "pipeline": {"diffusion", "models", "checkpoint", "request", "output", "conditions", "guiding"},
    "placing": set(),
    "stopping": set(),
    "render": {"diffusion", "models", "checkpoint", "request", "pipeline", "output", "placing"},
    "evaluation": {"diffusion", "models", "checkpoint", "request", "pipeline", "output", "data"},
    "training": {"diffusion", "models", "data", "checkpoint"},
    "recipe": set(),
}
MAY_USE["pixels"] = {*MAY_USE["render"], "render", "data", "training", "recipe"}
MAY_USE["foundations"] = {*MAY_USE["training"], "training", "recipe"}
MAY_USE["build"] = {*MAY_USE["evaluation"], "evaluation", "foundations", "training", "recipe", "pixels"}
MAY_USE["finetuning"] = {*MAY_USE["evaluation"], "evaluation", "training"}
MAY_USE["tuning"] = {*MAY_USE["evaluation"], "evaluation", "training"}
MAY_USE["convert"] = {"checkpoint", "models", "pipeline"}
MAY_USE["continuation"] = {*MAY_USE["build"], "build"}
MAY_USE["rehearsal"] = {*MAY_USE["continuation"], "continuation"}
MAY_USE["cli"] = {name for name in MAY_USE if name != "__init__"}
MAY_USE["__main__"] = {"cli"}
NETWORKS = {"diffusers", "transformers", "onnxruntime", "onnx"}  # models/ alone brings them in
FULL_OF_TORCH = {"latentgen/diffusion/loss.py", "latentgen/diffusion/likelihood.py"}
NO_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
VERSION_STAMP = {("latentgen/checkpoint/write.py", "diffusers")}  # model_index.json names the version that wrote it


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST, *, types_too: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and for_types_only(child) and not types_too:
            for other in child.orelse:
                yield from statements(other, types_too=types_too)
        else:
            yield from statements(child, types_too=types_too)


def imported(path: Path, *, types_too: bool) -> Iterator[str]:
    """Every module a file imports, whole dotted names; of our own package also the names taken from it."""
    for node in statements(tree(path), types_too=types_too):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        else:
            assert node.level == 0, f"{relative(path)}: relative import"
            assert node.module is not None
            if node.module == "latentgen":
                yield from (f"latentgen.{name.name}" for name in node.names)
            else:
                yield node.module


def own_rooms(path: Path) -> set[str]:
    names = {name for name in imported(path, types_too=True) if name.split(".")[0] == "latentgen"}
    rooms = {(*name.split("."), "__init__")[1] for name in names - {"latentgen.__version__"}}
    return {name if name in MAY_USE else "__init__" for name in rooms}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_arrows_run_one_way(path: Path) -> None:
    here = room(path)
    assert here in MAY_USE, f"{here} has no place in the order of the house; give it one here and in the design"
    back = own_rooms(path) - MAY_USE[here] - SHARED - {here}
    assert not back, f"{relative(path)} imports {sorted(back)}"


def test_the_order_has_no_circle() -> None:
    """Whoever may be used may not use back, over any number of doors."""

    def below(name: str, path: tuple[str, ...] = ()) -> None:
        assert name not in path, f"a circle: {' -> '.join((*path, name))}"
        for other in MAY_USE[name] - {"__init__"}:
            below(other, (*path, name))

    for name in MAY_USE:
        below(name)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_models_bring_in_the_networks_of_others(path: Path) -> None:
    if room(path) == "models":
        return
    found = {name.split(".")[0] for name in imported(path, types_too=False)} & NETWORKS
    excused = {module for file, module in VERSION_STAMP if file == relative(path)}
    assert not found - excused, f"{relative(path)} imports {sorted(found)}; move what needs it to models/"


def test_the_version_stamp_takes_the_version_alone() -> None:
    for file, module in VERSION_STAMP:
        taken = [
            [name.name for name in node.names]
            for node in statements(tree(ROOT / file), types_too=False)
            if isinstance(node, ast.ImportFrom) and node.module == module
        ]
        assert taken == [["__version__"]]


@pytest.mark.parametrize("path", [path for path in FILES if room(path) == "diffusion"], ids=relative)
def test_the_mathematics_knows_neither_networks_nor_files(path: Path) -> None:
    found = {name.split(".")[0] for name in imported(path, types_too=True)}
    barred = {"diffusers", "transformers", "onnxruntime", "accelerate", "safetensors", "PIL", "pathlib", "os", "io"}
    if relative(path) not in FULL_OF_TORCH:
        barred |= {"torch"}
        assert "latentgen.diffusion.loss" not in set(imported(path, types_too=True))
        assert "latentgen.diffusion.likelihood" not in set(imported(path, types_too=True))
    assert not found & barred
    assert not [call for call in calls(path) if call == "open"]


KNOW_RECIPES = ("foundations", "build", "cli", "continuation", "rehearsal", "pixels")


@pytest.mark.parametrize("path", [p for p in FILES if room(p) not in KNOW_RECIPES], ids=relative)
def test_only_who_makes_objects_of_recipes_knows_them(path: Path) -> None:
    assert "recipe" not in own_rooms(path)


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_is_unpickled(path: Path) -> None:
    names = {name.split(".")[0] for name in imported(path, types_too=True)}
    assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {"torch.load", "torch.save", "pickle.load", "pickle.loads"} & set(calls(path))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
            allowed = [ast.unparse(key.value) for key in node.keywords if key.arg == "allow_pickle"]
            assert allowed == ["False"], f"{relative(path)}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_tensors_are_saved_in_one_place_which_sees_to_who_may_read_them(path: Path) -> None:
    if relative(path) != "latentgen/checkpoint/tensors.py":
        assert not [call for call in calls(path) if call.rpartition(".")[2] == "save_file"]
        assert "safe_serialization" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_is_found_by_a_string(path: Path) -> None:
    found = {"importlib.import_module", "import_module", "__import__", "eval", "exec"} & set(calls(path))
    lazy = {"import_module"} if relative(path) == "latentgen/__init__.py" else set()  # the public names, from a table
    assert not found - lazy


def test_what_tests_need_is_in_their_own_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    of_tests = {"pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "scipy"}

    def named(packages: list[str]) -> set[str]:
        return {re.split(r"[<>=\[ ]", package)[0] for package in packages}

    extras = project["optional-dependencies"]
    assert of_tests <= named(extras.pop("test"))
    assert not of_tests & set().union(named(project["dependencies"]), *map(named, extras.values()))


def test_no_module_is_named_for_nothing() -> None:
    named = [path for folder in ("latentgen", "tests", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert not [relative(path) for path in named if {part.removesuffix(".py") for part in path.parts} & NO_NAMES]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


def test_all_weights_have_the_recipe_that_made_them() -> None:
    made = [path.parent.name for path in (ROOT / "weights").glob("*/model_index.json")]
    assert not [name for name in made if not (ROOT / "pipelines" / f"{name}.toml").is_file()]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import latentgen", {"torch", "numpy", "diffusers", "transformers", "PIL", "pydantic", "click"}),
        ("import latentgen.cli", {"torch", "numpy", "diffusers", "transformers", "PIL", "pydantic"}),
        ("import latentgen.diffusion.sampling", {"torch", "diffusers", "transformers", "PIL"}),
        ("import latentgen.diffusion.guidance, latentgen.diffusion.schedule, latentgen.diffusion.noise", {"torch"}),
        ("import latentgen.recipe", {"torch", "numpy", "diffusers", "transformers"}),
        ("import latentgen.models.onnx.session, latentgen.models.onnx.text", {"torch", "diffusers", "transformers"}),
        ("import latentgen.data", {"torch", "diffusers", "transformers"}),
    ],
)
def test_what_is_light_stays_light(statement: str, absent: set[str]) -> None:
    code = f"{statement}; import sys; print(*(name for name in {sorted(absent)!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
