"""What is installed: a wheel has everything that a run reads, and the licences of it; versions are stated once and tested as stated."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def pinned(name: str) -> dict[str, list[Version]]:
    """Package -> the versions that a requirements file has of it, one for all Pythons or one for each range."""
    versions = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            (exact,) = requirement.specifier
            assert exact.operator == "==", line
            versions.setdefault(canonicalize_name(requirement.name), []).append(Version(exact.version))
    return versions


def required() -> dict[str, Requirement]:
    """Package -> what setup.py asks for."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (value,) = (node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "install_requires")
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, ast.literal_eval(value))}


def test_lower_bounds_are_what_test_oldest_runs():
    oldest = pinned("requirements-oldest.txt")
    for name, requirement in required().items():
        (bound,) = (Version(part.version) for part in requirement.specifier if part.operator in (">=", "=="))
        assert oldest[name] == [bound], name


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-newest.txt"])
def test_sets_are_within_the_bounds(name):
    versions, oldest = pinned(name), pinned("requirements-oldest.txt")
    assert versions.keys() == oldest.keys()
    for package, requirement in required().items():
        assert all(version in requirement.specifier for version in versions[package]), package


def test_readme_states_the_versions_that_are_tested():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    columns = [pinned(name) for name in ("requirements-oldest.txt", "requirements.txt", "requirements-newest.txt")]
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.MULTILINE)
    assert {"torch", "triton", "transformers", "diffusers", "deepspeed"} <= {package for package, *_ in rows}
    for package, *stated in rows:
        if package == "Python":
            continue  # which no file pins
        assert [Version(version) for version in stated] == [max(column[canonicalize_name(package)]) for column in columns], package


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
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
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    for name in ("LICENSE", "NOTICE"):
        assert wheel.read(f"{folder}/licenses/{name}") == (ROOT / name).read_bytes()
    for name in re.findall(r"ddpo_fast/\w+/NOTICE", (ROOT / "NOTICE").read_text(encoding="utf-8")):
        assert name in wheel.namelist()


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
    (tmp_path / "setuptools.py").write_text(
        f"__version__ = {version!r}\nfind_packages = dict\n\ndef setup(**keywords):\n    print(keywords['name'])\n"
    )
    command, environment = [sys.executable, "-S", str(ROOT / "setup.py")], os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if builds:
        assert (done.returncode, done.stdout, done.stderr) == (0, "ddpo_fast\n", "")
    else:
        line = f"setuptools {version} cannot build ddpo_fast without the package wheel; first: pip install 'setuptools>=77'\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
