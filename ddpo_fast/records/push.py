"""Puts a run's weights and model card on the Hugging Face hub.  ddpo-fast push RUN_DIR REPO_ID [--private]"""

import argparse
import re
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from ddpo_fast.places import without_folders
from ddpo_fast.records.model_card import card, pictures, weights_folder
from ddpo_fast.records.report import read_run
from ddpo_fast.terminal import steady_streams

_FAULTS = (ValueError, OSError, *HfHubHTTPError.__bases__)
"""Errors of using the hub. The last ones are those of its HTTP library, which raises them also without a connection."""


def push(run_dir: Path, repo_id: str, private: bool) -> str:
    """Makes the repository if there is none, and one commit: the weights, README.md, pictures, config.yaml, metrics.jsonl. Returns its URL.

    Raises ValueError if `run_dir` is not that of a run with weights, and one of `_FAULTS` if the hub cannot be reached or refuses.
    """
    run, folder = read_run(run_dir), weights_folder(run_dir)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id) is None:
        raise ValueError(f"REPO_ID={repo_id}: valid is user/name")
    if get_token() is None:
        raise ValueError(f"REPO_ID={repo_id}: there is no token for the hub; `hf auth login`, or HF_TOKEN in the environment, gives it one")
    files = {path.name: path for path in sorted(folder.iterdir())} | pictures(run)
    files["metrics.jsonl"] = run_dir / "metrics.jsonl"
    files["config.yaml"] = yaml.safe_dump(without_folders(run.config), sort_keys=False).encode()
    files["README.md"] = card(run, repo_id, public=True).encode()
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    hub = HfApi()
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return hub.create_commit(repo_id, operations, commit_message=f"{run.name}, trained with ddpo_fast").commit_url


def main(argv: list[str] | None = None) -> None:
    """Runs a command line. A mistake is one line on standard error and exit code 2."""
    if argv is None:
        steady_streams()
    parser = argparse.ArgumentParser(prog="ddpo-fast push", description="A run's weights and model card for the hub.")
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("repo_id", metavar="REPO_ID", help="user/name; it is made if there is none.")
    parser.add_argument("--private", action="store_true", help="If it is made, only you can see it.")
    args = parser.parse_args(argv)
    try:
        print(push(args.run_dir, args.repo_id, args.private))
    except _FAULTS as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
