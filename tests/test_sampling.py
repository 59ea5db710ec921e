"""Sampling: what each mode promises about an epoch, a category, a process, a seed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from uad_plugins.data import sampling
from uad_plugins.data.sampling import CategorySampler, GroupedBatchSampler, ShareSampler

UNEVEN = np.repeat([0, 1, 2], [60, 8, 3])
"""Three categories of 60, 8 and 3 images."""


@pytest.fixture
def world(monkeypatch):
    """Pretend to be one of several processes: ``world(size, rank)``."""
    return lambda size, rank: monkeypatch.setattr(sampling, "_world", lambda: (size, rank))


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def shares(index, order):
    return [int(n) for n in np.bincount(index[order], minlength=index.max() + 1)]


def test_natural_shows_every_image_once_an_epoch():
    sampler = CategorySampler(UNEVEN)
    epochs = [epoch_of(sampler, epoch) for epoch in range(3)]
    assert [sorted(order) for order in epochs] == [list(range(71))] * 3
    assert len({tuple(order) for order in [*epochs, range(71)]}) == 4
    assert len(sampler) == 71


@pytest.mark.parametrize("length", [10, 71, 100])
def test_natural_goes_through_all_images_before_any_comes_again(length):
    sampler = CategorySampler(UNEVEN, samples_per_epoch=length)
    epochs = [epoch_of(sampler, epoch) for epoch in range(10)]
    assert {len(order) for order in epochs} == {length} == {len(sampler)}
    shown = Counter(index for order in epochs for index in order)
    assert set(shown.values()) <= {10 * length // 71, 10 * length // 71 + 1}


@pytest.mark.parametrize("length", [None, 9, 30, 72])
def test_balanced_shows_every_category_equally_often(length):
    sampler = CategorySampler(UNEVEN, "balanced", length)
    counted = [shares(UNEVEN, epoch_of(sampler, epoch)) for epoch in range(3)]
    each, rest = divmod(length or 71, 3)
    assert [sorted(count) for count in counted] == [sorted([each + (i < rest) for i in range(3)])] * 3
    # The category that gets one more (or less) is another one each epoch.
    assert [sum(count[i] for count in counted) for i in range(3)] == [length or 71] * 3


def test_balanced_shows_all_of_a_small_category_before_repeating_it():
    order = epoch_of(CategorySampler(UNEVEN, "balanced", 36), 0)
    assert sorted(Counter(i for i in order if UNEVEN[i] == 2).values()) == [4, 4, 4]
    assert sorted(Counter(i for i in order if UNEVEN[i] == 1).values()) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert max(Counter(i for i in order if UNEVEN[i] == 0).values()) == 1


def test_balanced_covers_a_large_category_over_epochs():
    sampler = CategorySampler(UNEVEN, "balanced", 30)
    large = [index for epoch in range(6) for index in epoch_of(sampler, epoch) if UNEVEN[index] == 0]
    assert sorted(large) == list(range(60))


def test_balanced_mixes_the_categories_within_an_epoch():
    categories = UNEVEN[epoch_of(CategorySampler(UNEVEN, "balanced", 90), 0)]
    assert [sorted(set(categories[start : start + 30])) for start in (0, 30, 60)] == [[0, 1, 2]] * 3


@pytest.mark.parametrize("mode", ["natural", "balanced"])
def test_the_order_depends_on_seed_and_epoch_alone(mode):
    def run(seed, epochs):
        return [epoch_of(CategorySampler(UNEVEN, mode, seed=seed), epoch) for epoch in epochs]

    assert run(4, [0, 1, 2]) == run(4, [2, 1, 0])[::-1]
    assert len({tuple(order) for seed in (4, 5) for order in run(seed, [0, 1, 2])}) == 6


def test_the_order_does_not_touch_global_random_state():
    state = np.random.get_state()[1].copy()
    epoch_of(CategorySampler(UNEVEN, "balanced"), 3)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("mode", ["natural", "balanced"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_processes_share_an_epoch_equally_and_without_overlap(world, mode, size):
    alone = epoch_of(CategorySampler(UNEVEN, mode, seed=1), 2)
    parts = []
    for rank in range(size):
        world(size, rank)
        sampler = CategorySampler(UNEVEN, mode, seed=1)
        parts.append(epoch_of(sampler, 2))
        assert len(sampler) == len(parts[-1])
    assert {len(part) for part in parts} == {-(-71 // size)}
    together = [parts[i % size][i // size] for i in range(sum(map(len, parts)))]
    assert together == alone + alone[: len(together) - 71]


def test_more_processes_than_samples_still_get_one_each(world):
    parts = []
    for rank in range(5):
        world(5, rank)
        parts.append(list(CategorySampler(np.array([0, 0]))))
    assert [len(part) for part in parts] == [1] * 5
    assert {index for part in parts for index in part} == {0, 1}


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="sampling is 'natural' or 'balanced', not 'even'"):
        CategorySampler(UNEVEN, "even")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_evaluation_shows_each_sample_to_exactly_one_process(world, size):
    parts = []
    for rank in range(size):
        world(size, rank)
        sampler = ShareSampler(7)
        parts.append(list(sampler))
        assert len(sampler) == len(parts[-1])
        assert parts[-1] == sorted(parts[-1])
    assert sorted(index for part in parts for index in part) == list(range(7))


@pytest.mark.parametrize(
    ("groups", "batches"),
    [
        ([1, 1, 1, 1, 1], [[0, 1], [2, 3], [4]]),
        ([0, 1, 1, 0, 0, 0], [[0], [1, 2], [3, 4], [5]]),
        ([0, 1, 0], [[0], [1], [2]]),
        ([], []),
    ],
)
def test_batches_end_where_the_group_changes(groups, batches):
    sampler = GroupedBatchSampler(np.array(groups, dtype=np.int8), 2)
    assert list(sampler) == batches
    assert len(sampler) == len(batches)


def test_processes_take_turns_with_whole_batches(world):
    groups = np.array([0, 0, 0, 1, 1, 0, 1], dtype=np.int8)
    everything = list(GroupedBatchSampler(groups, 2))
    parts = []
    for rank in range(2):
        world(2, rank)
        parts.append(list(GroupedBatchSampler(groups, 2)))
    assert parts == [everything[0::2], everything[1::2]]
