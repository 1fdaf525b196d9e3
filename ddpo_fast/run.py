"""What a run is made of."""

from dataclasses import dataclass
from pathlib import Path

from ddpo_fast.claim import Claim
from ddpo_fast.config.options import Config
from ddpo_fast.distributed.engine import Engine
from ddpo_fast.distributed.ranks import Ranks
from ddpo_fast.kernels import Ops
from ddpo_fast.memory import Room
from ddpo_fast.planning.work import Calls, Work
from ddpo_fast.policy import Policy
from ddpo_fast.prompts import EvaluationSet, Prompts, draw_prompts
from ddpo_fast.schedule import Denoising, Schedule
from ddpo_fast.scoring.scorer import Reward
from ddpo_fast.updates.gradients import Gradients
from ddpo_fast.updates.objectives import Objective
from ddpo_fast.updates.transitions import Update, updates


@dataclass(frozen=True)
class Directory:
    """Where a run leaves its record."""

    path: Path
    claim: Claim
    """To the directory, where the run has one."""
    started_in: Path
    """The working directory as the run began, before a reward's code could change it."""
    resumed: Path | None = None
    """The checkpoint that the run continues from; None for a new run."""

    def shown(self, place: str | Path) -> str:
        """A path as it can be typed where the run was started; a place that is not below that directory is returned unchanged."""
        path = Path(place)
        return str(path.relative_to(self.started_in)) if path.is_relative_to(self.started_in) else str(place)


@dataclass(frozen=True)
class Task:
    """What the pictures are of, and the reward that scores them."""

    prompts: Prompts
    evaluations: list[EvaluationSet]
    """The last decides which weights are the best."""
    reward: Reward


@dataclass(frozen=True)
class Run:
    """The parts of a run, once the options have been found good."""

    config: Config
    ranks: Ranks
    directory: Directory
    task: Task
    policy: Policy
    denoising: Denoising
    """How samples are made to train on."""
    evaluating: Denoising
    """How evaluation pictures are made."""
    calls: Calls
    ops: Ops
    objective: Objective
    gradients: Gradients
    engine: Engine
    room: Room
    """What has been found to fit into memory."""
    fingerprints: dict[str, str]
    """A hash of each thing that the run is made of; empty except on rank 0."""

    def schedule(self, iteration: int) -> Schedule:
        """The denoising steps of an iteration's samples."""
        return self.denoising.schedule(self.config.run.seed, iteration)

    def draw(self, iteration: int) -> Prompts:
        """The prompts of all of an iteration's samples, all ranks'."""
        options = self.config
        return draw_prompts(
            self.task.prompts, options.sample.num_samples, options.prompts.samples_per_prompt, options.run.seed, iteration
        )  # fmt: skip

    @property
    def mine(self) -> slice:
        """This rank's part of an iteration's samples."""
        return self.ranks.block(self.config.sample.num_samples)

    def first_sample_id(self, iteration: int) -> int:
        """The number of this rank's first sample of an iteration; the others follow."""
        return (iteration - 1) * self.config.sample.num_samples + self.mine.start

    def updates(self, schedule: Schedule, iteration: int) -> list[Update]:
        """This rank's part of every update of an iteration, whose samples are made by `schedule`."""
        return updates(Work.of(self.config, self.calls), self.objective.population(schedule), self.ranks, (self.config.run.seed, iteration))
