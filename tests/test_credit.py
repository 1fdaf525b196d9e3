"""Rewards against the running baseline of their prompt."""

import json

import numpy as np
import pytest
import torch

from ddpo_fast.updates.credit import Advantages, PromptBaseline


def advantages_of(rewards, baseline_mean, baseline_std) -> torch.Tensor:
    return (torch.as_tensor(rewards, dtype=torch.float64) - baseline_mean) / (baseline_std + 1e-6)


def test_two_prompts_by_hand():
    advantages = PromptBaseline(buffer_size=4, min_count=2).update(["a", "a", "b", "b"], torch.tensor([1.0, 2, 5, 9]))
    assert advantages.dtype == torch.float64
    assert advantages.tolist() == pytest.approx([-0.999998, 0.999998, -0.9999995, 0.9999995], rel=0, abs=1e-9)


def test_history_of_the_prompt_is_its_baseline():
    baseline = PromptBaseline(buffer_size=8, min_count=2)
    baseline.update(["a", "b", "a"], torch.tensor([1.0, 50, 2]))
    history = np.array([1.0, 2, 6])  # the current reward enters first
    advantages = baseline.update(["b", "a"], torch.tensor([50.0, 6]))
    torch.testing.assert_close(advantages[1:], advantages_of([6], history.mean(), history.std()), rtol=1e-14, atol=0)
    assert advantages[0] == 0


@pytest.mark.parametrize("buffer_size, min_count", [(4, 2), (16, 16), (16, 1), (64, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_samples_does_not_matter(buffer_size, min_count, seed):
    generator = np.random.default_rng(seed)
    prompts, rewards = [str(p) for p in generator.integers(6, size=64)], torch.from_numpy(generator.normal(size=64))
    past_prompts, past_rewards = [str(p) for p in generator.integers(6, size=20)], torch.from_numpy(generator.normal(size=20))
    order = generator.permutation(64)

    def advantages(order):
        baseline = PromptBaseline(buffer_size, min_count)
        baseline.update(past_prompts, past_rewards)
        return baseline.update([prompts[i] for i in order], rewards[order])

    assert torch.equal(advantages(order), advantages(np.arange(64))[order])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float16, torch.float32, torch.float64])
def test_advantages_do_not_take_the_dtype_of_the_rewards(dtype):
    advantages = PromptBaseline(4, 1).update(["a"] * 3, torch.tensor([1, 2, 6], dtype=dtype))
    torch.testing.assert_close(advantages, advantages_of([1, 2, 6], 3, np.std([1, 2, 6])), rtol=1e-14, atol=0)


@pytest.mark.parametrize("min_count", [1, 100])
def test_equal_rewards_give_no_advantage(min_count):
    advantages = PromptBaseline(16, min_count).update(["a"] * 7 + ["b"], torch.full((8,), 3.25))
    assert advantages.tolist() == [0] * 8


@pytest.mark.parametrize("reward", [0.1, -114.8, 1 / 3])
def test_equal_rewards_that_fp64_cannot_sum_exactly_give_next_to_none(reward):
    advantages = PromptBaseline(16, 1).update(["a"] * 7, torch.full((7,), reward, dtype=torch.float64))
    assert advantages.abs().max() < 4 * np.spacing(abs(reward)) / 1e-6  # a few roundings of the mean, over the 1e-6 of the formula


def test_more_samples_than_the_buffer_all_count():
    baseline, rewards = PromptBaseline(buffer_size=4, min_count=2), torch.arange(10.0)
    expected = advantages_of(rewards, 4.5, np.arange(10).std())
    torch.testing.assert_close(baseline.update(["a"] * 10, rewards), expected, rtol=1e-14, atol=1e-14)
    # the next iteration sees the buffer's size again: the last three of those, and its own
    history = np.array([7.0, 8, 9, 1])
    expected = advantages_of([1], history.mean(), history.std())
    torch.testing.assert_close(baseline.update(["a"], torch.tensor([1.0])), expected, rtol=1e-14, atol=0)


def test_oldest_rewards_leave_a_full_buffer():
    baseline = PromptBaseline(buffer_size=3, min_count=1)
    for reward in (100.0, 1.0, 2.0):
        baseline.update(["a"], torch.tensor([reward]))
    torch.testing.assert_close(baseline.update(["a"], torch.tensor([6.0])), advantages_of([6], 3, np.std([1, 2, 6])), rtol=1e-14, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("min_count", [1, 100])
def test_non_finite_rewards_enter_nothing(bad, min_count):
    baseline, clean = PromptBaseline(16, min_count), PromptBaseline(16, min_count)
    advantages = baseline.update(["a", "a", "a", "b"], torch.tensor([1.0, bad, 2.0, bad]))
    assert advantages[[1, 3]].tolist() == [0, 0]
    assert torch.equal(advantages[[0, 2]], clean.update(["a", "a"], torch.tensor([1.0, 2.0])))
    assert baseline.buffers == clean.buffers


def test_an_iteration_without_any_good_reward_gives_no_advantage():
    baseline = PromptBaseline(16, 16)
    assert baseline.update(["a", "b"], torch.full((2,), torch.nan)).tolist() == [0, 0]
    assert baseline.buffers == {}


def test_prompts_with_little_history_use_the_batch():
    baseline = PromptBaseline(buffer_size=16, min_count=3)
    rewards = torch.tensor([1.0, 2, 6, 50])
    batch = advantages_of(rewards, rewards.mean(), rewards.double().std(correction=0))
    advantages = baseline.update(["a", "a", "a", "b"], rewards)
    torch.testing.assert_close(advantages[:3], advantages_of([1, 2, 6], 3, np.std([1, 2, 6])), rtol=1e-14, atol=0)  # three: enough
    torch.testing.assert_close(advantages[3:], batch[3:], rtol=1e-14, atol=0)
    # the whole current batch, not past ones
    rewards = torch.tensor([4.0, 8])
    torch.testing.assert_close(baseline.update(["b", "c"], rewards), advantages_of(rewards, 6, 2), rtol=1e-14, atol=0)


def test_state_survives_json():
    generator = np.random.default_rng(0)
    credit = Advantages(PromptBaseline(buffer_size=5, min_count=3), 5.0)
    iterations = [([f"prompt {p}" for p in generator.integers(4, size=9)], torch.from_numpy(generator.normal(size=9))) for _ in range(6)]
    for prompts, rewards in iterations[:3]:
        credit.of(prompts, rewards)
    resumed = Advantages(PromptBaseline(buffer_size=5, min_count=3), 5.0)
    resumed.load_state_dict(json.loads(json.dumps(credit.state_dict())))
    for prompts, rewards in iterations[3:]:
        assert torch.equal(resumed.of(prompts, rewards), credit.of(prompts, rewards))


def test_advantages_are_clamped():
    found = Advantages(PromptBaseline(0, 1, "batch"), 0.5).of(["a"] * 3, torch.tensor([0.0, 1.0, 9.0]))
    assert found.min() == -0.5 and found.max() == 0.5


@pytest.mark.parametrize("state", [{"a": ["x"]}, {"a": 1}, {"a": None}, []])
def test_a_state_of_another_kind_is_refused(state):
    with pytest.raises((TypeError, ValueError, AttributeError)):
        Advantages(PromptBaseline(4, 2), 5.0).load_state_dict(state)


def test_std_of_the_batch_leaves_small_differences_small():
    rewards = torch.tensor([0.999, 1.0, 0.0, 1.0])
    advantages = PromptBaseline(2, 2, std="batch").update(["solved", "solved", "open", "open"], rewards)
    std = rewards.double().std(correction=0)
    expected = torch.tensor([-0.0005, 0.0005, -0.5, 0.5], dtype=torch.float64) / (std + 1e-6)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-6)
