"""Standard streams that no run dies of, in real processes."""

import os
import subprocess
import sys

import pytest

from ddpo_fast.terminal import SteadyStream

SCRIPT = """
import sys
from ddpo_fast.terminal import steady_streams
steady_streams()
steady_streams()
for stream in (sys.stdout, sys.stderr):
    for _ in range(5000):
        print("0.5 ± 0.1, 猫, \\udcff", file=stream, flush=True)
    stream.writelines(["0.5 ± 0.1, 猫, \\udcff\\n"])
assert open("/dev/null").fileno() > 2
sys.exit(3)
"""


def start(redirection: str, **environment) -> subprocess.CompletedProcess:
    command = ["bash", "-c", f'"$0" "$@" {redirection}; exit "${{PIPESTATUS[0]}}"', sys.executable, "-c", SCRIPT]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, timeout=120)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "utf-16"])
def test_any_encoding(encoding):
    done = start("", PYTHONIOENCODING=encoding)
    assert done.returncode == 3
    for text in (done.stdout, done.stderr):
        (line,) = set(text.decode(encoding).splitlines()) - {""}
        assert line.startswith("0.5 ") and line.endswith("\\udcff") and ("\\xb1" in line) == (encoding == "ascii")


@pytest.mark.parametrize(
    "redirection", ["| head -1 > /dev/null", "2>&1 | true", ">&-", "2>&-", ">&- 2>&- <&-", "> /dev/full", "2> /dev/full"]
)
def test_a_stream_that_takes_nothing(redirection):
    assert start(redirection).returncode == 3


def test_a_stream_of_a_notebook_is_left_alone(monkeypatch):
    from ddpo_fast.terminal import steady_streams

    class Notebook:
        def write(self, text):
            pass

    stream = Notebook()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    steady_streams()
    assert sys.stdout is stream and not isinstance(sys.stderr, SteadyStream)
