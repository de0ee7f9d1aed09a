"""Prediction intervals: ranks worked by hand, coverage where theory promises it, and what a checkpoint keeps."""

import base64
import json
import math

import numpy as np
import pytest

from utils.results.bands import Intervals, continued, deviations, ends, fewest_windows, probabilities, quantiles, rank, supported


def test_ranks_worked_by_hand() -> None:
    # 19 errors split the line into 20 pieces, each as likely to hold the next one: 10 % lie below the second.
    assert [rank(19, p) for p in (0.1, 0.9)] == [2, 18]
    # Between two ranks the wider one counts: of 25, floor(2.6) and ceil(23.4).
    assert [rank(25, p) for p in (0.1, 0.9)] == [2, 24]
    assert [rank(39, p) for p in (0.025, 0.975)] == [1, 39]
    assert [rank(38, p) for p in (0.025, 0.975)] == [None, None]
    # Without rounding to tenths of a millionth, 0.1 * 50 or 1 - 0.9 would lie beside the whole number.
    assert [rank(49, p) for p in ends(80)] == [5, 45] and [rank(1999, p) for p in ends(99.9)] == [1, 1999]


def test_the_fewest_windows_are_those_of_which_one_lies_beyond_each_end() -> None:
    assert [fewest_windows(level) for level in (80, 90, 95, 99)] == [9, 19, 39, 199]
    for level in (10, 50, 80, 90, 95, 99, 99.9):
        n = fewest_windows(level)
        assert rank(n, ends(level)[0]) == 1 and rank(n - 1, ends(level)[0]) in (None, 0)
    assert supported((80, 95), 38) == (80,) and supported((80, 95), 39) == (80, 95) and supported((80, 95), 8) == ()


def test_quantiles_are_the_errors_of_these_ranks() -> None:
    errors = np.random.default_rng(1).permutation(np.arange(1.0, 20.0))[:, None] * [[1.0, -2.0]]  # 19 windows, 2 steps
    found = quantiles(errors, (0.025, 0.1, 0.5, 0.9, 0.975))
    assert np.isnan(found[[0, 4]]).all()
    np.testing.assert_array_equal(found[1:4], [[2, -36], [10, -20], [18, -4]])


def test_coverage_of_exchangeable_errors_is_what_was_promised() -> None:
    """Coverage given n errors is Beta distributed; over many draws its mean lies between the level and level + 2/(n+1)."""
    generator, n, draws = np.random.default_rng(7), 60, 4000
    for level in (80.0, 90.0, 95.0):
        low, high = ends(level)
        # Skewed errors, and a step each with its own scale.
        errors = generator.exponential(size=(n + 1, draws)) * generator.uniform(0.1, 10, draws)
        bounds = quantiles(errors[:-1], (low, high))
        inside = (errors[-1] >= bounds[0]) & (errors[-1] <= bounds[1])
        exact = (math.ceil((n + 1) * high) - math.floor((n + 1) * low)) / (n + 1)
        assert level / 100 <= exact <= level / 100 + 2 / (n + 1)
        assert abs(inside.mean() - exact) < 4 * math.sqrt(exact * (1 - exact) / draws)


def test_the_unit_is_the_models_own() -> None:
    torch = pytest.importorskip("torch")
    from layers.norm import instance_norm

    x = np.random.default_rng(3).normal(size=(5, 40)) * [[0], [1e-4], [1], [10], [1e4]]
    np.testing.assert_allclose(deviations(x), instance_norm(torch.from_numpy(x))[2].numpy(), rtol=1e-12)


def made(levels=(80.0, 95.0), channels=2, steps=3, windows=100) -> Intervals:
    generator = np.random.default_rng(5)
    errors = generator.normal(size=(channels, windows, steps))
    offsets = np.stack([quantiles(part, probabilities(levels)) for part in errors], axis=1)
    return Intervals(levels, offsets, windows)


def test_what_is_kept_is_what_was_calibrated() -> None:
    intervals = made(windows=30)  # too few for 95 %: NaN is kept, too
    held = Intervals.decode(intervals.encode())
    assert held.levels == intervals.levels and held.windows == 30 and held.offsets.flags.writeable
    np.testing.assert_array_equal(held.offsets, intervals.offsets)
    assert held.has([80]) and held.has([60, 40]) and not held.has([95]) and not held.has([70])


def test_some_of_the_levels() -> None:
    intervals = made()
    for level in (80.0, 95.0):
        alone = intervals.only([level])
        np.testing.assert_array_equal(alone.band(level), intervals.band(level))
        low, high = alone.band(level)
        assert (low < high).all()
    np.testing.assert_array_equal(intervals.only([40]).band(40)[0], intervals.offsets[intervals.probabilities.index(0.3)])


@pytest.mark.parametrize(
    "change",
    [
        {"levels": [80, 100]}, {"levels": ["80"]}, {"levels": [True]}, {"levels": 80}, {"windows": 0}, {"windows": 1.5},
        {"shape": [2]}, {"shape": [2, 4]}, {"shape": [-2, -3]}, {"offsets": "@@"}, {"offsets": 3}, {"offsets": ""},
        {"offsets": base64.b64encode(np.full(66, np.inf, "<f4").tobytes()).decode()},
        {"offsets": base64.b64encode(np.full(66, 1e38, "<f4").tobytes()).decode()},
    ],
)  # fmt: skip
def test_what_anyone_may_have_written_is_refused(change) -> None:
    held = json.loads(made().encode())
    assert Intervals.decode(json.dumps(held)).windows == 100
    with pytest.raises(ValueError, match="intervals"):
        Intervals.decode(json.dumps(held | change))
    for text in ("", "[]", "3", "null", "[" * 100_000):
        with pytest.raises(ValueError, match="intervals"):
            Intervals.decode(text)


def test_a_forecast_that_goes_on_from_itself_widens() -> None:
    high = np.array([[1.0, 2.0]])
    # The second round's errors come on top of a whole first one's: hypot(2, 1), hypot(2, 2), then hypot(sqrt(2) * 2, 1).
    expected = [[1, 2, math.sqrt(5), math.sqrt(8), 3]]
    np.testing.assert_allclose(continued(high, 5), expected)
    np.testing.assert_allclose(continued(-high, 5), np.negative(expected))
    np.testing.assert_array_equal(continued(high, 1), [[1]])
