"""Which earlier frames a frame sees: the policies, for training and for generation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loom_jax.core import ConfigError, InputError
from loom_jax.document import POLICIES, HistoryPolicy

ANY = st.builds(HistoryPolicy, st.sampled_from(sorted(POLICIES)), st.integers(0, 7))


def chosen(text, count, seed=0):
    return HistoryPolicy.parse(text).choose(count, np.random.default_rng(seed))


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(policy=ANY, count=st.integers(0, 20), seed=st.integers(0, 99))
def test_choices_are_earlier_frames_in_order_and_follow_the_generator(policy, count, seed):
    once, again = (policy.choose(count, np.random.default_rng(seed)) for _ in range(2))
    assert once == again == sorted(set(once)) and all(0 <= index < count for index in once)
    if POLICIES[policy.name][1]:
        assert len(once) <= policy.k
    assert all(type(index) is int for index in once)


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("none", 5, []),
        ("all", 4, [0, 1, 2, 3]),
        ("last(2)", 5, [3, 4]),
        ("last(0)", 5, []),
        ("last(9)", 3, [0, 1, 2]),
        ("uniform(2)", 5, [0, 4]),
        ("uniform(3)", 5, [0, 2, 4]),
        ("uniform(1)", 5, [4]),
        ("uniform(0)", 5, []),
        ("uniform(4)", 2, [0, 1]),
        ("uniform(2)", 1, [0]),
        ("uniform(2)", 0, []),
        ("random(0)", 5, []),
    ],
)
def test_what_each_policy_chooses(text, count, expected):
    assert chosen(text, count) == expected


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(k=st.integers(2, 6), count=st.integers(2, 64))
def test_uniform_has_the_first_the_last_and_even_gaps(k, count):
    indices = chosen(f"uniform({k})", count)
    assert indices[0] == 0 and indices[-1] == count - 1 and len(indices) == min(k, count)
    gaps = np.diff(indices)
    assert gaps.max() - gaps.min() <= 1


def test_random_draws_every_size_and_every_frame():
    draws = [chosen("random(2)", 4, seed) for seed in range(300)]
    sizes = np.bincount([len(d) for d in draws], minlength=3)
    assert len(sizes) == 3 and sizes.min() > 70
    assert {tuple(d) for d in draws if len(d) == 2} == {(a, b) for a in range(4) for b in range(a + 1, 4)}


@pytest.mark.parametrize("policy", [HistoryPolicy("none", 0), HistoryPolicy("random", 3), HistoryPolicy("all", 0)])
def test_a_training_subset_is_a_last_frame_and_the_history_chosen_for_it(policy):
    subsets = [policy.choose_subset(5, np.random.default_rng(seed)) for seed in range(200)]
    assert {s[-1] for s in subsets} == set(range(5))  # every frame is learned
    assert all(s == sorted(set(s)) for s in subsets)
    if policy.name == "all":
        assert all(s == list(range(s[-1] + 1)) for s in subsets)
    if policy.name == "none":
        assert all(len(s) == 1 for s in subsets)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(policy=ANY)
def test_a_policy_is_read_as_it_is_written(policy):
    again = HistoryPolicy.parse(str(policy))
    assert str(again) == str(policy) and again.name == policy.name
    assert again.k == policy.k or not POLICIES[policy.name][1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"last({'9' * 5000})", "expected a name such as all"),
        ("uniform(-1)", r"uniform\(-1\): k must be at least 0"),
        ("sometimes", "'sometimes' is not one of none, all, last, uniform, random"),
        ("uniform", r"expected uniform\(k\)"),
        ("all(3)", "expected all"),
        ("uniform(2", "expected a name"),
        ("", "expected a name"),
    ],
)
def test_a_bad_policy_is_one_clear_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        HistoryPolicy.parse(text)
    assert "\n" not in str(caught.value) and isinstance(caught.value, InputError)
