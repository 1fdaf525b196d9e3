"""Finds models, which are folders here or repositories of the hub, and the files of their weights. Each error is one line."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

CONFIGS = ["*.json", "*.txt", "*.model", "*.jinja"]
"""The files that a model has besides its weights. A * stands for folders, too."""
_ID = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")


def local_folder(option: str, source: str, patterns: list[str] = CONFIGS) -> Path:
    """The folder `source`; if it is a repository of the hub, the folder to which its files that fit `patterns` are downloaded.

    Without a network it is the folder of what is cached. Raises ValueError, naming the option, if nothing is found.
    """
    if Path(source).is_dir():
        if not os.access(source, os.R_OK | os.X_OK):
            raise ValueError(f"{option}={source}: {os.strerror(errno.EACCES)}; valid is a folder that may be read")
        return Path(source)
    parent = Path(source).parent
    if not _ID.fullmatch(source):
        raise ValueError(f"{option}={source}: there is no such folder")
    if parent != Path() and parent.is_dir() and not _is_cached(source):
        raise ValueError(f"{option}={source}: there is no such folder: the hub is not asked, because {parent}/ is a folder here")
    with in_one_line(f"{option}={source}"):
        return Path(snapshot_download(source, allow_patterns=patterns))


def _is_cached(repository: str) -> bool:
    return Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}").is_dir()


def file_names(option: str, source: str, folder: Path) -> list[str]:
    """The names of all files of `source`, a folder or a repository of the hub; without a network, of those that are cached.

    folder: the `local_folder` of `source`. Raises ValueError, naming the option, if there is no network and only configs are cached.
    """
    lost = None
    if not Path(source).is_dir():
        try:
            return HfApi().list_repo_files(source)
        except Exception as error:  # of the network or the hub: take what is cached
            lost = error
    names = [path.relative_to(folder).as_posix() for pattern in ("*", "*/*") for path in folder.glob(pattern)]
    if lost is not None and not any(name.endswith((".safetensors", ".bin")) for name in names):
        reason = " ".join(f"{type(lost).__name__}: {lost}".split())
        raise ValueError(f"{option}={source}: the hub's cache has its configs but no weights, and the hub cannot be asked: {reason}")
    return names


def choose_weights(option: str, names: list[str], part: str, stem: str, variant: str | None) -> tuple[str | None, list[str]]:
    """The variant of a network's weights to read, None for the plain weights, and its files.

    option: "model.path=..." for errors. names: from `file_names`. part: the network's folder, or "". stem: what its files' names begin
    with. variant: the wanted one. If it is None, or the network does not have it, the plain weights are taken. If there are no plain
    weights and `variant` is None, the only variant is taken. Raises ValueError in all other cases.
    """
    inside, found = f"{part}/" if part else "", {}
    files = [name.removeprefix(inside) for name in names if name.startswith(inside) and "/" not in name.removeprefix(inside)]
    pattern = re.compile(
        rf"{stem}(?:\.([\w-]+?))?(?:-\d+-of-\d+)?(?:\.([\w-]+))?\.safetensors|{stem}\.safetensors\.index(?:\.([\w-]+))?\.json"
    )
    for name in files:
        if match := pattern.fullmatch(name):
            found.setdefault(match[1] or match[2] or match[3], []).append(inside + name)
    found = {kind: parts for kind, parts in found.items() if any(name.endswith(".safetensors") for name in parts)}  # not an index alone
    where = f"its {part}/" if part else "it"
    if not found:
        pickles = [name for name in files if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]
        if pickles:
            raise ValueError(
                f"{option}: {where} has its weights as {sorted(pickles)[0]}, a pickle, which runs code when it is loaded; valid is "
                f"{stem}.safetensors; docs/models.md has the line that converts a model that you trust"
            )
        raise ValueError(f"{option}: {where} has no weights; valid is {stem}.safetensors, or a variant such as {stem}.fp16.safetensors")
    if variant in found or None in found:
        chosen = variant if variant in found else None
    elif variant is None and len(found) == 1:
        (chosen,) = found
    else:
        there = ", ".join(sorted(found))
        raise ValueError(
            f"{option}: {where} has weights of the variants {there} alone; model.variant={variant or 'null'}: valid is one of them"
        )
    return chosen, found[chosen]


def check_readable(option: str, folder: Path, names: list[str]) -> None:
    """Raises ValueError for a file that may not be read. Libraries would say that there is no such file."""
    for name in names:
        if (folder / name).exists() and not os.access(folder / name, os.R_OK):
            raise ValueError(f"{option}: {name} cannot be read: {os.strerror(errno.EACCES)}")


@contextmanager
def in_one_line(option: str) -> Iterator[None]:
    """Inside, what a library raises about a model's files becomes a ValueError of one line that names the option and says what to do."""
    try:
        yield
    except Exception as error:  # the libraries may raise anything for a damaged folder
        what = of_hub(error) or f"it cannot be loaded: {type(error).__name__}: {error}"
        raise ValueError(f"{option}: {' '.join(what.split())}") from error


def of_hub(error: Exception | None) -> str | None:
    """What a user can do about an error of the hub, or of not reaching the hub; None for another error."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    log_in = "`hf auth login`, or HF_TOKEN in the environment"
    if any(isinstance(error, GatedRepoError) for error in chain):
        page = f"on its page at {constants.ENDPOINT}"
        return f"the hub gives it only to those who have accepted its licence, {page}, and have logged in: {log_in}"
    if any(isinstance(error, RepositoryNotFoundError) or _status(error) in (401, 403) for error in chain):
        return f"there is no such folder, and no such public model on the hub; a private one needs a login: {log_in}"
    if constants.HF_HUB_OFFLINE and any(isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError) for error in chain):
        return (
            "there is no such folder, it is not in the hub's cache, and the offline mode (HF_HUB_OFFLINE=1) keeps the hub from being asked"
        )
    lost = [error for error in chain if _is_of_network(error)]
    if lost:
        return f"there is no such folder, it is not in the hub's cache, and the hub cannot be asked: {type(lost[-1]).__name__}: {lost[-1]}"
    return None


def _is_of_network(error: Exception) -> bool:
    is_down = (_status(error) or 0) >= 500 or _status(error) == 429
    return is_down or isinstance(error, LocalEntryNotFoundError) or type(error).__module__.startswith(("httpx", "httpcore"))


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None
