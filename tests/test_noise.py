"""The counter-based noise: published vectors, statistics, independence of the batch. Triton's numbers: test_kernels.py."""

import bounds
import pytest
import torch

from ddpo_fast.kernels.reference import INITIAL_STEP, normal_noise, philox4x32

KNOWN_ANSWERS = [  # Random123, kat_vectors: philox 4x32, 10 rounds: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def noise(seed=0, ids=(0,), steps=0, num_elements=64) -> torch.Tensor:
    ids = torch.tensor(ids) if isinstance(ids, (tuple, list)) else ids
    steps = torch.full_like(ids, steps) if isinstance(steps, int) else torch.tensor(steps)
    return normal_noise(seed, ids, steps, num_elements)


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, result):
    words = philox4x32(key[0] + (key[1] << 32), *(torch.tensor([c]) for c in counter))
    assert tuple(word.item() for word in words) == result


@pytest.fixture(scope="module")
def many() -> torch.Tensor:
    """A million values: 64 samples of SD's latents."""
    return noise(seed=7, ids=torch.arange(64), steps=3, num_elements=16384).double().flatten()


def test_moments_are_those_of_the_standard_normal(many):
    n = len(many)
    # within four standard errors of each estimate
    assert many.mean().item() == pytest.approx(0, abs=4 / n**0.5)
    assert many.var().item() == pytest.approx(1, abs=4 * (2 / n) ** 0.5)
    assert many.pow(3).mean().item() == pytest.approx(0, abs=4 * (15 / n) ** 0.5)
    assert many.pow(4).mean().item() == pytest.approx(3, abs=4 * (96 / n) ** 0.5)


def test_distribution_is_the_standard_normal(many):
    cdf = 0.5 * (1 + torch.erf(many.sort().values / 2**0.5))
    n = len(many)
    empirical = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - empirical[:-1]).abs(), (cdf - empirical[1:]).abs()).max().item()
    assert distance * n**0.5 < 1.63  # Kolmogorov-Smirnov, 1 % level
    assert many.abs().max() > 4.5  # the tail is there: P(no |z| > 4.5 in a million) < 0.1 %


def rows_of(what: str, count: int, length: int) -> torch.Tensor:
    """`count` rows of noise that differ in one argument alone, (count, length)."""
    match what:
        case "sample ids":
            return noise(ids=torch.arange(count), num_elements=length)
        case "distant sample ids":
            return noise(ids=torch.arange(count) << 32, num_elements=length)
        case "steps":
            return noise(ids=[5] * count, steps=[*range(count - 1), INITIAL_STEP], num_elements=length)
        case "seeds":
            return torch.cat([noise(seed=seed, num_elements=length) for seed in range(count)])
        case "distant seeds":
            return torch.cat([noise(seed=seed << 32, num_elements=length) for seed in range(count)])
        case "elements":
            return noise(ids=torch.arange(length), num_elements=count).T


@pytest.mark.parametrize("what", ["sample ids", "distant sample ids", "steps", "seeds", "distant seeds", "elements"])
def test_noise_is_independent_across(what):
    count, length = 16, 16384
    rows = rows_of(what, count, length).double()
    for values in (rows, rows.square()):  # the squares: Box-Muller pairs share a radius
        correlation = torch.corrcoef(values) - torch.eye(count)
        assert correlation.abs().max() < 4.5 / length**0.5


def test_neighbouring_elements_are_uncorrelated_at_every_lag(many):
    length = len(many)
    lags = torch.stack([(many[:-lag] * many[lag:]).mean() for lag in range(1, 17)])
    assert lags.abs().max() < 4 / length**0.5


def test_words_are_the_same_alone_and_in_a_batch():
    """Integers, so every bit."""
    counters = torch.arange(64) * 977, torch.arange(64) % 5, torch.arange(64) << 20, torch.full((64,), 2)
    batch = torch.stack(philox4x32(9 << 33, *counters))
    for row in (0, 1, 31, 63):
        assert torch.equal(torch.stack(philox4x32(9 << 33, *(counter[row : row + 1] for counter in counters))), batch[:, row : row + 1])


@pytest.mark.rounding
@pytest.mark.parametrize("num_elements", [1, 2, 3, 5, 63, 101, 4096])
def test_a_sample_is_the_same_alone_and_in_a_batch(num_elements):
    """To rounding: an element's place among others decides whether a vector or a scalar function computes it."""
    ids = torch.arange(64) * 977 + 2**33
    steps = (torch.arange(64) % 5).tolist()
    batch = noise(9, ids, steps, num_elements)
    assert batch.shape == (64, num_elements) and batch.dtype == torch.float32
    for row in (0, 1, 31, 63):
        bounds.assert_same_noise(noise(9, ids[row : row + 1], steps[row : row + 1], num_elements)[0], batch[row])


@pytest.mark.rounding
@pytest.mark.parametrize("num_elements", [1, 2, 3, 5, 63, 101])
def test_fewer_elements_are_a_prefix_of_more(num_elements):
    bounds.assert_same_noise(noise(9, (1, 2), 3, num_elements), noise(9, (1, 2), 3, 256)[:, :num_elements])


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 33, 40, 62])
def test_every_bit_of_a_sample_id_counts(bit):
    assert not torch.isclose(noise(ids=(12345,)), noise(ids=(12345 ^ 1 << bit,))).any()


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_every_bit_of_the_seed_counts(bit):
    assert not torch.isclose(noise(seed=12345), noise(seed=12345 ^ 1 << bit)).any()
