"""Runs whose disk fails, or whose directory is another's: nothing hangs, and the last lines and the exit code say what is there."""

import errno
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from runs import deepspeed
from shared import weights
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

from ddpo_fast import assemble as assembling
from ddpo_fast import files
from ddpo_fast import train as trainer
from ddpo_fast.claim import Claim, _one_run
from ddpo_fast.records import run_directory
from ddpo_fast.records.checkpoint import list_checkpoints
from ddpo_fast.records.metrics import MetricsWriter, read_metrics
from ddpo_fast.records.run_directory import Record

SMALL = {"sample__num_samples": 4, "sample__num_steps": 2, "eval__num_samples": 2, "run__iterations": 1, "run__trackers": "[]"}


@pytest.fixture
def disk(monkeypatch):
    """Fails, once iteration 1 has begun, with the error number in `disk["fails"]`; `disk["then"]` is called when it begins."""
    state, improve, flush = {"fails": None, "then": lambda: None, "begun": False}, trainer.improve, files.flush

    def begin(*args):
        state["begun"] = True
        state["then"]()
        return improve(*args)

    def fail(path):
        if state["begun"] and state["fails"]:
            raise OSError(state["fails"], os.strerror(state["fails"]))
        flush(path)

    monkeypatch.setattr(trainer, "improve", begin)
    monkeypatch.setattr(files, "flush", fail)
    return state


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_the_end_says_what_could_not_be_written_and_resume_writes_it(options, disk, reports, tmp_path, capsys, number):
    argv, disk["fails"] = options(**SMALL), number
    with pytest.raises(SystemExit) as end:
        trainer.main(argv)
    folder, out = tmp_path / "run", capsys.readouterr().out
    assert end.value.code == (
        f"error: iteration 1: the checkpoint, the weights and the best weights could not be written ({os.strerror(number)}); "
        f"--run.dir={folder} --resume continues from iteration 0"
    )
    assert out.splitlines()[-2:] == [
        f"report: could not be written ({os.strerror(number)}); ddpo-fast report {folder} writes it",
        f"weights: those of iteration 1 could not be written; those in {folder / 'lora'} are of iteration 0, not trained",
    ]
    assert all((tensor == 0).all() for name, tensor in weights(folder).items() if "lora_B" in name)
    assert not [path for path in folder.rglob(".*")]
    disk["fails"] = None
    trainer.main([f"--run.dir={folder}", "--resume"])
    assert f"weights: {folder / 'lora'}" in capsys.readouterr().out and [row["iteration"] for row in read_metrics(folder)] == [0, 1]
    assert any((tensor != 0).any() for name, tensor in weights(folder).items() if "lora_B" in name) and (folder / "best").exists()


def test_tensorboards_thread_fails_in_one_line(tmp_path, caplog, capsys, monkeypatch):
    """What another thread raises is said as ever."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Claim() as claim:
        claim.take(tmp_path, new=False)
        writer = MetricsWriter(tmp_path, claim, -1, ["tensorboard"], {})
        with monkeypatch.context() as patch:
            patch.setattr(LocalFileSystem, "append", full)
            patch.setattr(LocalFileSystem, "write", full)
            writer.write({"iteration": 0, "reward_mean": 1.0})
        writer.write({"iteration": 1, "reward_mean": 2.0})
        writer.close()
    assert caplog.messages == ["TensorBoard's file of iteration 0 could not be written (No space left on device); the run goes on"]
    assert capsys.readouterr().err == ""
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_stop_whose_checkpoint_cannot_be_written_says_so(options, disk, tmp_path, capsys, monkeypatch):
    disk["fails"] = errno.EIO
    monkeypatch.setattr(trainer.StopRequest, "requested", property(lambda _: disk["begun"]))
    with pytest.raises(SystemExit) as end:
        trainer.main(options(**SMALL | {"run__iterations": 3}))
    assert "iteration 1: the checkpoint and the weights could not be written (Input/output error); --run.dir=" in end.value.code
    assert "stopped after" not in capsys.readouterr().out


def test_a_directory_that_is_deleted_is_made_again(options, disk, reports, tmp_path):
    folder = tmp_path / "run"
    disk["then"] = lambda: shutil.rmtree(folder)
    trainer.main(options(**SMALL))
    assert [row["iteration"] for row in read_metrics(folder)] == [0, 1]
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "environment.json", "lora", "best", "report.html", "images"}
    assert [path.name for path in list_checkpoints(folder)] == ["1"]


def test_best_weights_that_were_deleted_are_said(options, disk, tmp_path, monkeypatch):
    publish = Record._publish
    monkeypatch.setattr(Record, "_publish", lambda *args: (publish(*args), shutil.rmtree(tmp_path / "run" / "best", ignore_errors=True)))
    with pytest.raises(SystemExit) as end:
        trainer.main(options(**SMALL))
    assert end.value.code == "error: iteration 1: the best weights could not be written (deleted)"


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_where_a_run_is_going_on_is_refused_before_a_model_is_loaded(options, tmp_path, capsys, monkeypatch, resume):
    monkeypatch.setattr(assembling, "Policy", None)
    monkeypatch.setattr("ddpo_fast.config.command_line._check_resumed", lambda _: None)
    monkeypatch.setattr("ddpo_fast.config.rules._has_checkpoint", lambda _: resume)
    with Claim() as claim:
        claim.take(tmp_path / "run", new=False)
        with pytest.raises(SystemExit, match="2"):
            trainer.main(options() + ["--resume"] * resume)
    error = capsys.readouterr().err
    assert error.startswith(f"error: run.dir={tmp_path / 'run'}: a run is going on there, that of process") and error.count("\n") == 1


def test_a_disk_that_is_full_from_the_start_is_one_line(options, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_directory, "write_text", full)
    with pytest.raises(SystemExit, match="2"):
        trainer.main(options())
    assert "error: run.dir=" in (line := capsys.readouterr().err.splitlines()[-1]) and "cannot be written to" in line


def test_two_runs_of_one_second_have_two_directories(options, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assembling.time, "strftime", lambda *_: "20260101-000000")
    argv = [option for option in options(**SMALL, run__keep_best="false") if not option.startswith("--run.dir")]
    (Path("runs") / "rewards.py-redness-20260101-000000").mkdir(parents=True)
    trainer.main(argv)
    assert "weights: runs/rewards.py-redness-20260101-000000-2/lora" in capsys.readouterr().out


def test_a_run_in_a_thread_and_only_one_at_a_time(options, tmp_path, caplog, capsys):
    thread = threading.Thread(target=trainer.main, args=(options(**SMALL),))
    thread.start()
    while thread.is_alive() and not _one_run.locked():
        time.sleep(0.01)
    with pytest.raises(SystemExit, match="2"):
        trainer.main(options("other"))
    assert "error: a run is going on in this process, in another thread" in capsys.readouterr().err
    thread.join()
    assert weights(tmp_path / "run") and not (tmp_path / "other").exists()
    assert len([record for record in caplog.records if "not in the main thread" in record.message]) == 1


def test_no_rank_waits_for_one_that_cannot_write(launch_options, tmp_path):
    (tmp_path / "full.py").write_text("""
import os, resource
calls = 0
def redness(images, prompts):
    global calls
    calls += 1
    if calls == 2 and os.environ["RANK"] == "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
""")
    argv = launch_options("run", f"--reward.name={tmp_path / 'full.py'}:redness", "--zero.stage=2", "--run.iterations=1")
    done = deepspeed(2, "ddpo_fast/train.py", argv)
    text = done.stdout + done.stderr
    assert done.returncode == 1 and text.count("error: iteration 1: the checkpoint") == 1, text
    assert "weights: those of iteration 1 could not be written; those in" in text and "another rank is gone" not in text


def test_a_finished_run_without_its_metrics_is_resumed(options, tmp_path, capsys):
    trainer.main(options(**SMALL))
    folder = tmp_path / "run"
    (folder / "metrics.jsonl").unlink()
    shutil.rmtree(folder / "lora")
    trainer.main([f"--run.dir={folder}", "--resume"])
    assert f"weights: {folder / 'lora'}" in capsys.readouterr().out and weights(folder)
