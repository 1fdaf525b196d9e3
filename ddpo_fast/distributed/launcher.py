"""Checks what started this process. A launcher's variables make it one rank of a run; other programs start processes that are not ranks."""

from collections.abc import Mapping

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""deepspeed, torchrun and accelerate each set all of these."""
STARTERS = (
    ("srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")),
    ("mpirun", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
    ("mpirun", "MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",)),
    ("mpirun", "PMI_RANK", ("PMI_SIZE",)),
)
"""Programs that start several processes, with the variable for a process's number and those for how many there are. The first one that is
set counts."""


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raises ValueError if the process is one of several that would not know of each other, or a rank that lacks variables."""
    if "RANK" in environment:
        _check_rank(environment)
        return
    for name, alone in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        if environment.get(name, alone) != alone:
            raise ValueError(f"{name}={environment[name]}: RANK is not set; valid are all of {', '.join(VARIABLES)}, or none")
    for starter, number, sizes in STARTERS:
        size = next((environment[name] for name in sizes if name in environment), "1")
        if number in environment and size != "1":
            raise ValueError(
                f"{number}={environment[number]}: this is one of {size} processes of {starter}, which do not know of each other; valid is "
                f"deepspeed or torchrun, or {starter} with {', '.join(VARIABLES)} set, see docs/distribution.md; "
                f"for a run of this process alone, unset {number}"
            )


def _check_rank(environment: Mapping[str, str]) -> None:
    if missing := [name for name in VARIABLES if not environment.get(name)]:
        raise ValueError(f"RANK={environment['RANK']}: {' and '.join(missing)} not set; valid are all of {', '.join(VARIABLES)}, or none")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not environment[name].isdecimal():
            raise ValueError(f"{name}={environment[name]}: valid is a whole number")
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank >= size:
        raise ValueError(f"RANK={rank}: valid is 0 to {size - 1} with WORLD_SIZE={size}")
