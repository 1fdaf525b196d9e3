"""The command `ddpo-fast`: its commands, and what it says of one that there is not."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from runs import BIN, ENVIRONMENT, LIMIT_S

from ddpo_fast.__main__ import COMMANDS, main


def ddpo_fast(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([BIN / "ddpo-fast", *arguments], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_S)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_names_every_command(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ddpo-fast", *arguments])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(COMMANDS) and all(len(line) < 120 for line in lines)


@pytest.mark.parametrize("name, hint", [("smaple", "did you mean sample?"), ("x", "no such command"), ("--plan", "did you mean plan?")])
def test_an_unknown_command_is_one_line(name, hint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ddpo-fast", name])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error == f"error: ddpo-fast {name}: {hint}; valid is {', '.join(COMMANDS)}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_module_that_runs_by_itself(name):
    source = Path(importlib.util.find_spec(COMMANDS[name][0]).origin).read_text()
    assert source.count('if __name__ == "__main__":') == 1 + (COMMANDS[name][0] == "ddpo_fast.train")


def test_a_command_has_its_own_help(tmp_path):
    done = ddpo_fast("report", "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: ddpo-fast report"), done.stderr


@pytest.mark.parametrize("devices", [[], ["2xH200"]])
def test_plan_is_trains_option(tiny_model, tmp_path, devices):
    done = ddpo_fast("plan", *devices, f"--model.path={tiny_model}", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("it fits\n"), done.stderr
    assert ("2 x H200" in done.stdout) == bool(devices), done.stdout
    assert not list(tmp_path.iterdir())
