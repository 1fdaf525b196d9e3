"""What is installed: a wheel has everything that a run reads, and the licences of it; an old setuptools is told what to do."""

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy, since setuptools leaves folders beside setup.py; without isolation, so that nothing is downloaded."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("ddpo_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("ddpo_fast-*.whl")
    with zipfile.ZipFile(file) as opened:
        yield opened


def test_wheel_has_every_file_of_the_package(wheel):
    """The embedded model, scorer and pictures, prompt sets, and kernels under their name inside the package."""
    files = {
        "/".join((package, file.relative_to(ROOT / folder).as_posix()))
        for folder, package in (("ddpo_fast", "ddpo_fast"), ("kernels", "ddpo_fast/kernels"))
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {"ddpo_fast/embedded/model/unet/diffusion_pytorch_model.safetensors", "ddpo_fast/embedded/data/train.png"} <= files
    assert files - set(wheel.namelist()) == set()


def test_wheel_carries_the_licences(wheel):
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = message_from_bytes(wheel.read(f"{folder}/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    named = metadata.get_all("License-File")
    assert sorted(named) == ["LICENSE", "NOTICE", "ddpo_fast/embedded/NOTICE", "ddpo_fast/prompt_sets/NOTICE"]
    for name in named:
        assert wheel.read(f"{folder}/licenses/{name}") == (ROOT / name).read_bytes()


def test_notice_names_every_set_of_pictures():
    """What build_data.py draws is in both notices, with its licence."""
    from ddpo_fast.embedded.build_data import PACKAGES

    detailed = (ROOT / "ddpo_fast/embedded/NOTICE").read_text(encoding="utf-8")
    for package, version in PACKAGES.values():
        assert package in detailed and version in detailed
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for work, licence in (
        ("Noto Emoji,", "Apache-2.0"),
        ("Noto Emoji (v1),", "Apache-2.0"),
        ("Twemoji,", "CC-BY-4.0"),
        ("Fluent Emoji,", "MIT"),
    ):
        assert any(work in line and licence in line for line in notice.splitlines()), work
        assert work in detailed


@pytest.mark.parametrize("version, builds", [("65.5.0", False), ("70.0.0", False), ("70.1.0", True), ("84.2.1.post1", True)])
def test_old_setuptools_without_wheel_is_told_what_to_install(tmp_path, version, builds):
    """As under pip --no-build-isolation; -S leaves out what is installed, so there is no package wheel."""
    (tmp_path / "setuptools.py").write_text(f"__version__ = {version!r}\n\ndef setup(**keywords):\n    print(keywords['name'])\n")
    command, environment = [sys.executable, "-S", str(ROOT / "setup.py")], os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    if builds:
        assert (done.returncode, done.stdout, done.stderr) == (0, "ddpo_fast\n", "")
    else:
        line = f"setuptools {version} cannot build ddpo_fast without the package wheel; first: pip install 'setuptools>=77'\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
