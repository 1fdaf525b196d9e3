"""Sample pictures, score them, raise the probability of the better ones: DDPO (arXiv:2305.13301) and other algorithms.

    deepspeed ddpo_fast/train.py --config configs/X.yaml --section.key value ...

`train` is the run, `improve` one iteration. `rollout.collect` makes samples, `run.objective` says what an update costs, and
`run.gradients` where its gradient is taken.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    found = (find_spec(name) for name in ("ddpo_fast", "ddpo_fast.kernels"))
    if not all(spec and Path(spec.origin).resolve().is_relative_to(root) for spec in found):
        print(f"error: this Python has not installed ddpo_fast from this folder: pip install -e {root}", file=sys.stderr)
        sys.exit(2)
    from ddpo_fast.config.command_line import parse_or_exit
    from ddpo_fast.distributed.preemption import die_with_launcher
    from ddpo_fast.terminal import steady_streams

    steady_streams()
    die_with_launcher()
    parse_or_exit(sys.argv[1:])  # --help and a wrong option are answered before the imports below take their seconds

import faulthandler
import logging

from torch import Tensor

from ddpo_fast.assemble import assemble
from ddpo_fast.claim import Claim, only_run
from ddpo_fast.config.command_line import parse_or_exit
from ddpo_fast.config.options import Config
from ddpo_fast.distributed.engine import WrongCheckpoint, all_gather, all_reduce, any_rank, is_lost_rank
from ddpo_fast.distributed.preemption import StopRequest
from ddpo_fast.evaluation import evaluate, good_rewards
from ddpo_fast.planning.plan import print_plan
from ddpo_fast.records.run_directory import CannotBegin, NotSaved, Record
from ddpo_fast.rollout import collect
from ddpo_fast.run import Run
from ddpo_fast.scoring.scorer import BadRewards
from ddpo_fast.terminal import steady_streams, user_error
from ddpo_fast.timing import StageTimer, progress_bar
from ddpo_fast.updates.transitions import Rollout, Update
from ddpo_fast.updates.update_statistics import UpdateStatistics


def main(argv: list[str] | None = None) -> None:
    """Runs a command line. A wrong option is one line on standard error and exit code 2; a fault is exit code 1."""
    if argv is None:
        steady_streams()
    config = parse_or_exit(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if config.run.plan is not None:
        return print_plan(config)
    with only_run() as claim:
        _run(config, claim)


def _run(config: Config, claim: Claim) -> None:
    """Makes a run; its last line and its exit code say what has ended it."""
    rank = os.environ.get("RANK", "0")
    try:
        try:
            run = assemble(config, claim)
        except ValueError as error:
            user_error(error)
        with StopRequest() as stop:
            train(run, stop)
    except (WrongCheckpoint, CannotBegin) as error:
        user_error(error)
    except (BadRewards, NotSaved) as error:
        sys.exit(f"error: {error}" if rank == "0" else 1)
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        sys.exit(f"error (rank {rank}): another rank is gone ({str(error).splitlines()[0]}); --resume continues the run")


def train(run: Run, stop: StopRequest) -> None:
    """The run: iteration 0 evaluates the untrained model, every later one improves it; metrics, pictures and checkpoints as it goes.

    Asked to stop, it saves a checkpoint when the iteration is done and returns. Raises what `Record` does, and BadRewards.
    """
    with Record(run) as record:
        for iteration in range(record.progress.iteration + 1, record.last + 1):
            timer, row = StageTimer(run.policy.device), {}
            with timer("total"):
                if iteration > 0:
                    row |= improve(run, timer, iteration)
                if iteration % run.config.eval.every == 0 or iteration == record.last:
                    with timer("eval"):
                        row |= evaluate(run, record, iteration)
            record.write(iteration, row, timer)
            stopping = any_rank(stop.requested)
            record.save(iteration, timer, stopping)
            if stopping:
                break


def improve(run: Run, timer: StageTimer, iteration: int) -> dict[str, float]:
    """One iteration: sample under the current policy, score, turn rewards into credit, update. Returns its metrics.

    Raises BadRewards, before anything is updated, when too many samples have no reward.
    """
    schedule, prompts, mine = run.schedule(iteration), run.draw(iteration), run.mine
    updates = run.updates(schedule, iteration)
    run.gradients.begin(updates, len(prompts[mine]), schedule)
    rollout, rewards, _ = collect(run, schedule, run.first_sample_id(iteration), prompts[mine], timer, "sample", run.gradients)
    rewards = all_gather(rewards)
    good = good_rewards(rewards, run.config.reward.max_bad_fraction, iteration)
    credit = run.objective.credit.of(prompts.texts, rewards)[mine].float().to(run.policy.device)
    rollout.good &= rewards[mine].isfinite().to(rollout.good.device)  # what has no reward is in no part of the loss
    with timer("train"):
        row = update(run, updates, rollout, credit, iteration)
    return row | run.gradients.metrics() | {
        "reward_mean": good.mean().item(), "reward_std": good.std(correction=0).item(), "bad_rewards": len(rewards) - len(good),
        "images_per_s": len(rewards) / timer.seconds["sample"],
        "transitions_per_s": row["transitions"] / sum(timer.seconds[stage] for stage in run.gradients.stages),
        "learning_rate": run.config.train.learning_rate,
    }  # fmt: skip


def update(run: Run, updates: list[Update], rollout: Rollout, credit: Tensor, iteration: int) -> dict[str, float]:
    """One iteration's optimizer updates: inner epochs x minibatches of samples x micro-batches of transitions. Returns their metrics.

    The gradient of an update is the mean over all of its minibatch's transitions on all ranks. credit: (M,) fp32, of this rank's samples.
    Raises FloatingPointError if none had a finite gradient.
    """
    statistics = UpdateStatistics(run.objective.figures, rollout.schedule.num_steps, rollout.good)
    with progress_bar("train", sum(len(update.rows) for update in updates), "transition", run.ranks.is_first) as bar:
        for update in updates:
            statistics.add(run.gradients.add(update, rollout, credit, bar.update), update.is_first)
            statistics.stepped(run.engine.step())
    row = statistics.summary(all_reduce)
    if row["grad_norm"] is None and not run.engine.adapts_scale:  # fp16 may need some updates to find its loss scale
        raise FloatingPointError(f"iteration {iteration}: no update had a finite gradient; a lower train.learning_rate may help")
    return row


if __name__ == "__main__":
    # a process that a reward starts by multiprocessing's spawn or forkserver imports the main module if it finds it: DeepSpeed and all
    __spec__ = None
    del __file__
    faulthandler.enable()  # a reward that crashes takes the run along: say at which line
    main()
