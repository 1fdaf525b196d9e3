"""The layout of the source: which way imports go, what modules may be called, what no file may contain."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, KERNELS = sorted((ROOT / "ddpo_fast").rglob("*.py")), sorted((ROOT / "kernels").rglob("*.py"))
NOT_STDLIB = (
    "accelerate attention bench bitsandbytes cv2 datasets deepspeed diffusers einops evaluate flash_attn huggingface_hub hypothesis "
    "jsonargparse kernels matplotlib numpy peft PIL pytest requests safetensors scipy setuptools tensorboard tests timm tokenizers torch "
    "torchvision tqdm trackio transformers triton urllib3 wandb xformers yaml"
).split()
"""Top-level names of installed packages, which a script started inside ddpo_fast/ must not hide from them."""


def module_name(file: Path) -> str:
    """The dotted name that a file is imported as; kernels/ is installed as ddpo_fast.kernels."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = ("ddpo_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, source: str | None = None) -> Iterator[str]:
    """Every module, and member of one, that a file imports anywhere in it, as absolute dotted names."""
    for node in ast.walk(ast.parse(source or file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = [node.module] if node.module else []
            if node.level:
                package = module_name(file).split(".")
                origin = package[: len(package) - node.level + (file.name == "__init__.py")] + origin
            yield from (".".join([*origin, *member]) for member in ([], *([alias.name] for alias in node.names)))


def importers(modules: tuple[str, ...], files: list[Path]) -> set[str]:
    """The files, relative to the root, that import one of the modules or something inside it."""
    return {
        str(file.relative_to(ROOT))
        for file in files
        if any(name == module or name.startswith(module + ".") for name in imports(file) for module in modules)
    }


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import a.b as c", {"a.b"}),
        ("from ddpo_fast import config", {"ddpo_fast", "ddpo_fast.config"}),
        ("def f():\n    from ddpo_fast.config.options import Config", {"ddpo_fast.config.options", "ddpo_fast.config.options.Config"}),
        ("from . import aesthetic", {"ddpo_fast.rewards", "ddpo_fast.rewards.aesthetic"}),
        ("from ..config import Config", {"ddpo_fast.config", "ddpo_fast.config.Config"}),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert set(imports(ROOT / "ddpo_fast/rewards/aesthetic.py", source)) == expected
    if source.startswith("from . "):
        assert set(imports(ROOT / "ddpo_fast/rewards/__init__.py", source)) == expected


def test_there_are_files_to_look_at():
    assert {"ddpo_fast/train.py", "ddpo_fast/config/rules.py"} <= importers(("sys",), PACKAGE)
    assert "kernels/reference.py" in importers(("torch",), KERNELS)


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: str(file.relative_to(ROOT)))
def test_kernels_know_only_torch_triton_and_themselves(file):
    for name in imports(file):
        top = name.split(".")[0]
        assert top in {"torch", "triton"} | sys.stdlib_module_names or (name + ".").startswith("ddpo_fast.kernels.") or name == "ddpo_fast"


@pytest.mark.parametrize("module", ["ddpo_fast.train", "bench", "tests"])
def test_nothing_imports_what_runs_the_rest(module):
    assert importers((module,), PACKAGE + KERNELS) == set()


FLOORS = [
    "algorithms distributed dtypes embedded files gpus kernels memory places prompt_files samplers terminal timing",
    "claim networks prompts",
    "pipelines",
    "config schedule",
    "planning policy scoring",
    "rewards updates",
    "run",
    "records rollout",
    "evaluation",
    "assemble",
    "sample train",
]
"""Folders and modules of the package from the bottom up. `__main__` starts modules by their names."""
INTERFACES = {"ddpo_fast.algorithms", "ddpo_fast.rewards", "ddpo_fast.samplers"}
"""Folders of choices, one a file; what is in their `__init__` every floor may know."""
MODULES = {module_name(file) for file in PACKAGE + KERNELS}
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}


def test_every_module_has_a_floor():
    found = {module_name(file).split(".")[1] for file in PACKAGE + KERNELS if module_name(file) != "ddpo_fast"}
    assert found == FLOOR.keys() | {"__main__"}


@pytest.mark.parametrize("file", PACKAGE, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down(file):
    """From a folder only to lower floors, to its own folder, or to the interface of a folder of choices, which imports none of them."""
    module = module_name(file)
    here = module.split(".")[1] if "." in module else module
    for name in imports(file):
        there = next((found for found in (name, name.rpartition(".")[0]) if found in MODULES), "ddpo_fast")
        if there not in INTERFACES and there != "ddpo_fast" and there.split(".")[1] != here:
            assert FLOOR[there.split(".")[1]] < FLOOR.get(here, len(FLOORS)), f"{module} imports {there}"


@pytest.mark.parametrize("package", sorted(INTERFACES))
def test_an_interface_imports_nothing_of_ours(package):
    file = ROOT / package.replace(".", "/") / "__init__.py"
    assert not [name for name in imports(file) if name.startswith("ddpo_fast")]


def test_the_loop_is_read_at_one_sitting():
    assert len((ROOT / "ddpo_fast/train.py").read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("file", PACKAGE, ids=lambda file: str(file.relative_to(ROOT)))
def test_functions_are_short(file):
    """At most 60 lines and 8 parameters; torch gives a custom gradient's `forward` one argument for each input."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
            assert len(arguments) <= 8 or arguments[0] == "ctx", f"{node.name} has {len(arguments)} parameters"


def test_installed_packages_are_not_imported_by_the_name_of_the_folder():
    assert importers(("kernels",), PACKAGE + KERNELS) == set()  # Hugging Face's package; ours is ddpo_fast.kernels


@pytest.mark.parametrize(
    "name", sorted({file.stem for file in PACKAGE} | {file.parent.name for file in PACKAGE if file.parent.parent != ROOT})
)
def test_module_hides_no_other(name):
    assert name == "__init__" or name not in sys.stdlib_module_names | set(NOT_STDLIB)


def test_no_tracked_file_names_somebodys_folder():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    folder = re.compile(rf"(?<![\w.~$}}/-])(?:/(?:home|Users|root)/\w|{re.escape(str(ROOT))}\b)".encode())
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    assert ROOT / "kernels/reference.py" in files
    found = {str(file.relative_to(ROOT)): match.group() for file in files if file.is_file() and (match := folder.search(file.read_bytes()))}
    assert found == {}
