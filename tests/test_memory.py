"""Running out of memory: fewer rows from then on, the same samples and the same gradient."""

import logging
import subprocess
import sys

import bounds
import pytest
import torch
from shared import run, untimed, weights

from ddpo_fast.memory import Room
from ddpo_fast.policy import Policy
from ddpo_fast.records.metrics import read_metrics


@pytest.fixture
def scarce(monkeypatch):
    """`scarce(rollout, update)`: memory for so many UNet rows. In the update it runs out in the middle of the backward pass."""

    def limit(rollout: int, update: int) -> list[int]:
        own, rows = Policy.predict, []

        def predict(policy, x, *args):
            rows.append(len(x))
            if not torch.is_grad_enabled() and len(x) > rollout:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            if not torch.is_grad_enabled() or len(x) <= update:
                return own(policy, x, *args)
            watch = policy.network.up_blocks[0].register_forward_hook(lambda module, args, out: out.register_hook(run_out) and None)
            out = own(policy, x, *args)
            watch.remove()
            return out

        def run_out(gradient):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        monkeypatch.setattr(Policy, "predict", predict)
        return rows

    return limit


SAME = dict(run__iterations=2, sample__num_samples=8, sample__num_steps=3, sample__batch_size=8, train__micro_batch=10, eval__num_samples=2)
HALVED = ["sample.batch_size=4", "train.micro_batch=5", "train.micro_batch=2"]


@pytest.mark.rounding
@pytest.mark.parametrize(
    "changes, halved",
    [
        ({}, HALVED),
        ({"lora__scope": "mid_up", "cache__mode": "on", "train__inner_epochs": 2}, HALVED),
        ({"train__estimator": "score_accumulation", "train__num_minibatches": 1}, ["sample.batch_size=4", "sample.batch_size=2"]),
    ],
)
def test_less_memory_is_the_same_run(options, scarce, caplog, changes, halved):
    expected = run(options("plenty", **SAME, **changes))
    with caplog.at_level(logging.WARNING):
        rows = scarce(rollout=8, update=5)
        folder = run(options("scarce", **SAME, **changes))
    said = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert [text.removeprefix("out of memory: ").split(" from here")[0] for text in said] == halved
    assert max(rows[len(rows) // 2 :]) <= 8
    rows, others = (untimed(read_metrics(name)) for name in (expected, folder))
    bound = bounds.of_run(expected)
    learned = bound.learned(min(row["reward_std"] for row in rows[1:]))
    for row, other, relative in zip(rows, others, (0, learned, bounds.turned(learned)), strict=True):  # Adam has moved the second's weights
        assert row["transitions"] == other["transitions"] and row["bad_rewards"] == 0
        if row["iteration"]:
            assert other["reward_mean"] == pytest.approx(row["reward_mean"], rel=0, abs=row["iteration"] * bound.reward)
            assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=relative)
    plain, scarcer = (torch.cat([tensor.flatten() for _, tensor in sorted(weights(run_dir).items())]) for run_dir in (expected, folder))
    assert (scarcer - plain).norm() <= bound.weights(len(plain), learned) < 0.5 * bounds.moved(expected)


def test_zero_says_what_to_lower(options, scarce):
    scarce(rollout=100, update=5)
    with pytest.raises(RuntimeError, match="with zero.stage=1 an update cannot start again: lower train.micro_batch, then --resume"):
        run(options(**SAME, zero__stage=1))


@pytest.mark.parametrize("error", [RuntimeError("a bug"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_what_fewer_rows_do_not_mend_is_raised(error):
    sizes = []

    def work(size):
        sizes.append(size)
        raise error

    with pytest.raises(type(error), match=str(error)):
        Room().attempt("train.micro_batch", 5, work)
    assert sizes == ([5, 2, 1] if isinstance(error, torch.OutOfMemoryError) else [5])


def test_where_other_ranks_wait_for_each_call_there_is_no_second_attempt():
    calls = []

    def work(size):
        calls.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(torch.OutOfMemoryError):
        Room(retry=False).attempt("sample.batch_size", 8, work)
    assert calls == [8]


ALLOCATOR = """
import resource, torch
from ddpo_fast.memory import Room
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20), resource.RLIM_INFINITY))
room, sizes = Room(), []
for size in (16, 16):
    sizes.append(len(room.attempt("train.micro_batch", size, lambda rows: torch.ones(rows, 64 << 20, dtype=torch.uint8))))
print(sizes, room.largest)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and sizes of a process as Linux has them")
def test_a_cpu_s_allocator_that_has_no_more(tmp_path):
    done = subprocess.run([sys.executable, "-c", ALLOCATOR], capture_output=True, text=True)
    assert done.stdout == "[8, 8] {'train.micro_batch': 8}\n", done.stderr
