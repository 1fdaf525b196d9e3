"""Which environments make a process a rank, a run of its own, or neither."""

import os

import pytest
import torch.distributed as dist

from ddpo_fast.distributed import engine
from ddpo_fast.distributed.launcher import check_launcher

RANK = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"},  # what a job script may export
        {"SLURM_NTASKS": "8"},  # salloc's shell
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_NPROCS": "1"},  # a batch script
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},  # srun -n 1 within eight
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", **RANK},  # a batch script that runs deepspeed
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", **RANK},  # srun torchrun
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", **RANK},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_RANK": "0"},
    ],
)
def test_ranks_and_runs_of_their_own(environment):
    check_launcher(environment)


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "SLURM_NPROCS": "2"},
            "this is one of 2 processes of srun",
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}, "SLURM_PROCID=0: this is one of 4 processes of srun"),
        ({"SLURM_PROCID": "0", "SLURM_NPROCS": "2"}, "SLURM_PROCID=0: this is one of 2 processes of srun"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "this is one of 2 processes of mpirun"),
        ({"PMI_RANK": "0", "PMI_SIZE": "3"}, "PMI_RANK=0: this is one of 3 processes of mpirun"),
        ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_RANK=0: this is one of 2 processes of mpirun"),
        ({"RANK": "0"}, "RANK=0: WORLD_SIZE and LOCAL_RANK and MASTER_ADDR and MASTER_PORT not set"),
        ({**RANK, "MASTER_PORT": ""}, "RANK=1: MASTER_PORT not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: RANK is not set"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1: RANK is not set"),
        ({**RANK, "RANK": "2"}, "RANK=2: valid is 0 to 1 with WORLD_SIZE=2"),
        ({**RANK, "RANK": "-1"}, "RANK=-1: valid is a whole number"),
        ({**RANK, "WORLD_SIZE": "two"}, "WORLD_SIZE=two: valid is a whole number"),
        ({**RANK, "MASTER_PORT": "http"}, "MASTER_PORT=http: valid is a whole number"),
    ],
)
def test_what_is_neither_is_refused(environment, message):
    with pytest.raises(ValueError) as refusal:
        check_launcher(environment)
    assert message in str(refusal.value) and "valid " in str(refusal.value)


def test_ranks_that_do_not_find_each_other_are_told(monkeypatch):
    """A port that is taken, and a rank that never comes."""
    taken = dist.TCPStore("127.0.0.1", 0, is_master=True)
    for name, value in (RANK | {"RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": str(taken.port)}).items():
        monkeypatch.setitem(os.environ, name, value)
    monkeypatch.setattr(engine, "MEETING_S", 1)
    with pytest.raises(ValueError, match=f"MASTER_PORT={taken.port}: another program has it; valid is a free one"):
        engine._meet()
    free = dist.TCPStore("127.0.0.1", 0, is_master=True)
    port = free.port
    del free
    monkeypatch.setitem(os.environ, "MASTER_PORT", str(port))
    with pytest.raises(ValueError, match=f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: the 2 ranks did not find each other within 1 s"):
        engine._meet()
