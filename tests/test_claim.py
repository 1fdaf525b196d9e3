"""A run's claim to its directory: one run's at a time, released by any death; and what could not be written there."""

import errno
import fcntl
import logging
import os
import shutil
import signal

import pytest
from safetensors import SafetensorError

from ddpo_fast.claim import LOCK_FILE, Claim


def fork(work) -> int:
    """The process id of a child that does `work`, then waits for its end."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            work()
            os.write(writing, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_directory_is_one_runs_until_it_gives_it_up(tmp_path):
    with Claim() as first, Claim() as second:
        assert first.take(tmp_path / "run", new=False) == tmp_path / "run"
        with pytest.raises(ValueError, match=rf"run.dir=.*/run: a run is going on there, that of process {os.getpid()} on .*; valid is"):
            second.take(tmp_path / "run", new=False)
        (tmp_path / "link").symlink_to(tmp_path / "run")
        with pytest.raises(ValueError, match="a run is going on there"):
            second.take(tmp_path / "link", new=False)
        first.release()
        second.take(tmp_path / "run", new=False)


@pytest.mark.parametrize("there, left", [("nothing", False), ("folder", True), ("file", True)])
def test_only_what_was_made_for_a_run_and_is_empty_goes_with_it(tmp_path, there, left):
    if there == "folder":
        (tmp_path / "run").mkdir()
    with Claim() as claim:
        claim.take(tmp_path / "run", new=False)
        if there == "file":
            (tmp_path / "run" / "config.yaml").touch()
    assert (tmp_path / "run").exists() == left and not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_default_name_that_is_taken_gets_a_number(tmp_path):
    with Claim() as first, Claim() as second, Claim() as third:
        taken = [claim.take(tmp_path / "runs" / "jpeg-20260101-000000", new=True).name for claim in (first, second, third)]
    assert taken == ["jpeg-20260101-000000", "jpeg-20260101-000000-2", "jpeg-20260101-000000-3"]


def test_a_run_that_is_killed_leaves_no_lock(tmp_path):
    child = fork(lambda: Claim().take(tmp_path, new=False))
    with Claim() as claim:
        with pytest.raises(ValueError, match=f"process {os.getpid()} on|process {child} on"):
            claim.take(tmp_path, new=False)
        kill(child)
        claim.take(tmp_path, new=False)


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    """As a worker of a reward's, which may outlive the run."""
    first = Claim()
    first.take(tmp_path, new=False)
    child = fork(lambda: None)
    first.release()
    with Claim() as second:
        second.take(tmp_path, new=False)
    kill(child)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.ESTALE, errno.EIO])
@pytest.mark.parametrize("call", ["open", "pwrite", "mkdir"])
def test_what_cannot_be_written_to_is_refused(tmp_path, monkeypatch, number, call):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with Claim() as claim, pytest.raises(ValueError, match=rf"run.dir=.*/run: cannot be written to \({os.strerror(number)}\); valid is"):
        claim.take(tmp_path / "run", new=False)


def test_a_file_or_a_name_too_long_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with Claim() as claim, pytest.raises(ValueError, match="cannot be written to"):
            claim.take(folder, new=False)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    for _ in range(2):
        claim = Claim()
        claim.take(tmp_path, new=False)
        with claim.writing("the weights", 1):
            claim.hold()
        assert claim.newest == {"the weights": 1}
    assert [record.message.split(" (")[0] for record in caplog.records] == [f"{tmp_path}: its file system has no locks"] * 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOENT])
def test_no_fault_of_a_disk_ends_a_run_and_all_are_remembered(tmp_path, caplog, number):
    with Claim() as claim:
        claim.take(tmp_path, new=False)
        for error in (OSError(number, os.strerror(number)), SafetensorError(f"I/O error: something (os error {number})")):
            with claim.writing("the weights", 3):
                raise error
            assert claim.unwritten == {"the weights": os.strerror(number)} and not claim.newest
            with claim.writing("the weights", 4):
                pass
            assert not claim.unwritten and claim.newest.pop("the weights") == 4
    assert [record.message for record in caplog.records] == [
        f"the weights of iteration 3 could not be written ({os.strerror(number)}); the run goes on"
    ] * 2


def test_other_faults_are_none_of_its(tmp_path):
    with Claim() as claim:
        claim.take(tmp_path, new=False)
        for error in (ZeroDivisionError(), SafetensorError("not contiguous")):
            with pytest.raises(type(error)), claim.writing("the weights", 3):
                raise error


def test_a_directory_that_was_deleted_is_taken_again(tmp_path, caplog):
    with Claim() as claim, Claim() as other:
        claim.take(tmp_path / "run", new=False)
        shutil.rmtree(tmp_path / "run")
        with claim.writing("the weights", 1):
            claim.hold()
            (tmp_path / "run" / "weights").touch()
        with pytest.raises(ValueError, match="a run is going on there"):
            other.take(tmp_path / "run", new=False)
    assert not caplog.records


def test_a_directory_that_is_another_runs_by_now_is_left_alone(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    with Claim() as claim, Claim() as other:
        claim.take(tmp_path / "run", new=False)
        shutil.rmtree(tmp_path / "run")
        other.take(tmp_path / "run", new=False)
        with claim.writing("the weights", 1):
            claim.hold()
            (tmp_path / "run" / "weights").touch()
        assert "is another run's by now, that of process" in claim.unwritten["the weights"]
        claim.release()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]
        with other.writing("the weights", 1):
            other.hold()
        assert not other.unwritten
