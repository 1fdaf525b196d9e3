"""What a run is made of."""

from dataclasses import dataclass
from pathlib import Path

from ddpo_fast.claim import Claim
from ddpo_fast.config.options import Config
from ddpo_fast.kernels import Ops
from ddpo_fast.memory import Room
from ddpo_fast.networks.split_unet import SplitUNet
from ddpo_fast.policy import Policy
from ddpo_fast.prompts import Prompts
from ddpo_fast.schedule import Noising, Schedule
from ddpo_fast.scoring.scorer import Reward
from ddpo_fast.updates.score_accumulation import ScoreAccumulator


@dataclass(frozen=True)
class Setup:
    """What a run is made of once the options have been found good."""

    config: Config
    run_dir: Path
    claim: Claim
    """To run_dir, where the run has one."""
    started_in: Path
    """The working directory as the run began, before a reward's code could change it."""
    rank: int
    world_size: int
    prompts: Prompts
    evaluations: dict[str, Prompts]
    """The prompts of each picture of the fixed evaluation sets: `eval` and, with eval.heldout, `heldout`."""
    reward: Reward
    policy: Policy
    schedule: Schedule
    ops: Ops
    split: SplitUNet | None
    """Where the activation cache takes up the UNet; None without one."""
    clip_range: float
    """`train.clip_range` scaled to this model's latents."""
    scores: ScoreAccumulator | None
    """What takes the gradient during sampling; None where `update` does."""
    noising: Noising | None
    """What reward-weighted regression trains on; None for the policy gradient."""
    room: Room
    """What has been found to fit into memory."""
    checkpoint: Path | None
    """What to continue from; None for a new run."""
    deepspeed: dict
    """The user's own DeepSpeed options."""
    fingerprints: dict[str, str]
    """Of what the run is made of, on rank 0."""

    def shown(self, place: str | Path) -> str:
        """A path as it can be typed where the run was started; what is none stays as it is."""
        path = Path(place)
        return str(path.relative_to(self.started_in)) if path.is_relative_to(self.started_in) else str(place)
