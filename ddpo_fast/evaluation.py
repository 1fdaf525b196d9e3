"""The fixed evaluation sets: the same prompts and the same noise every time; and whether rewards are good enough to learn from."""

from torch import Tensor

from ddpo_fast.distributed.engine import all_gather, gather
from ddpo_fast.records.metrics import diversity, image_grid, save_grid
from ddpo_fast.records.run_directory import Record
from ddpo_fast.rollout import collect
from ddpo_fast.run import Run
from ddpo_fast.scoring.scorer import BadRewards, last_failure
from ddpo_fast.timing import StageTimer


def evaluate(run: Run, record: Record, iteration: int) -> dict[str, float]:
    """Rewards of the fixed evaluation sets; their pictures go to <run_dir>/images/. Returns the metrics.

    Raises BadRewards when no picture of a set gets a number from the untrained model.
    """
    row, schedule = {}, run.evaluating.schedule(run.config.run.seed, 1)
    for chosen in run.task.evaluations:
        kind, mine = chosen.kind, run.ranks.block(len(chosen.prompts))
        timer = StageTimer(run.policy.device)
        _, rewards, images = collect(run, schedule, kind.first_id + mine.start, chosen.prompts[mine], timer, kind.name)
        rewards, images = all_gather(rewards), all_gather(images)
        if run.ranks.is_first:
            shown = slice(48)
            grid = image_grid(images[shown], chosen.prompts.texts[shown], rewards[shown])
            with run.directory.claim.writing("the pictures", iteration):
                run.directory.claim.hold()
                save_grid(grid, run.directory.path / "images" / f"{kind.pictures}_{iteration:05d}.png")
            record.write_images(grid, kind, iteration)
        good = rewards[rewards.isfinite()]
        if len(good):
            result = {"reward_mean": good.mean().item(), "reward_std": good.std(correction=0).item(), "samples": len(good)}
            result["diversity"] = diversity(images[rewards.isfinite()])
            record.progress.evaluated(kind, iteration, result)
            row |= {f"{kind.name}_{key}": value for key, value in result.items()}
        elif iteration == 0:
            raise BadRewards(
                f"the reward gave no finite number for any picture of the untrained model on the prompts of {kind.option}{_why()}"
            )
    return row


def good_rewards(rewards: Tensor, most_bad: float, iteration: int) -> Tensor:
    """Those of an iteration's rewards that are finite. Raises BadRewards if more than the share `most_bad` is not, or if none is."""
    good = rewards[rewards.isfinite()]
    if len(rewards) - len(good) > most_bad * len(rewards) or not len(good):
        raise BadRewards(
            f"iteration {iteration}: {len(rewards) - len(good)} of {len(rewards)} samples got no finite reward, and "
            f"reward.max_bad_fraction={most_bad}{_why()}; mend the reward, then --resume continues from the newest checkpoint"
        )
    return good


def _why() -> str:
    """What the first rank that knows says of its reward's last failure."""
    return next((f": {failure}" for failure in gather(last_failure()) if failure), "")
