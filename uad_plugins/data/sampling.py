"""Which sample comes next: natural or balanced over categories, on one process or shared among several."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DistributedSampler, Sampler

NATURAL, BALANCED = "natural", "balanced"


def _world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0


class CategorySampler(DistributedSampler[int]):
    """Training order: a fresh permutation each epoch that depends on the seed and the epoch alone.

    ``natural`` shows every image once an epoch. ``balanced`` shows every category equally often: small ones repeat, large
    ones show another part of themselves each epoch. With several processes each takes its own share; the shares are equal,
    filled up with the first samples of the order where the number does not divide.

    Args:
        category_index: int ``(N,)``, category of each sample.
        mode: ``natural`` or ``balanced``.
        samples_per_epoch: Samples that make one epoch over all processes; None: as many as there are.
        seed: Same seed, same order.
    """

    def __init__(
        self,
        category_index: NDArray[np.integer],
        mode: str = NATURAL,
        samples_per_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        if mode not in {NATURAL, BALANCED}:
            raise ValueError(f"sampling is '{NATURAL}' or '{BALANCED}', not '{mode}'")
        replicas, rank = _world()
        super().__init__(range(len(category_index)), num_replicas=replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.mode = mode
        self.category_index = np.asarray(category_index)
        self.length = samples_per_epoch or len(self.category_index)
        self.num_samples = -(-self.length // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the sample indices of one epoch, over all processes, before they are shared out."""
        if self.mode == NATURAL:
            return self._draw(np.arange(len(self.category_index)), self.length, self.length * epoch)
        groups = [np.flatnonzero(self.category_index == value) for value in np.unique(self.category_index)]
        shares = np.full(len(groups), self.length // len(groups))
        # Which categories get the remainder turns with the epoch.
        shares[(np.arange(self.length % len(groups)) + epoch) % len(groups)] += 1
        usual = -(-self.length // len(groups))
        drawn = [self._draw(group, int(share), usual * epoch) for group, share in zip(groups, shares, strict=True)]
        return np.random.default_rng([self.seed, epoch]).permutation(np.concatenate(drawn))

    def _draw(self, group: NDArray[np.int64], count: int, offset: int) -> NDArray[np.int64]:
        """Take ``count`` indices from an endless sequence of permutations of the group, from position ``offset`` on."""
        first, start = divmod(offset, len(group))
        rounds = -(-(start + count) // len(group))
        sequence = [
            np.random.default_rng([self.seed, len(group), int(group[0]), first + r]).permutation(group)
            for r in range(rounds)
        ]
        return np.concatenate(sequence)[start : start + count]

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)
        padded = np.resize(order, self.total_size)
        return iter(padded[self.rank :: self.num_replicas].tolist())

    def __len__(self) -> int:
        return self.num_samples


class ShareSampler(DistributedSampler[int]):
    """Evaluation order: as stored; with several processes each takes its share, none is shown twice."""

    def __init__(self, length: int) -> None:
        replicas, rank = _world()
        super().__init__(range(length), num_replicas=replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self._indices = range(rank, length, replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


class GroupedBatchSampler(BatchSampler):
    """Batches that never mix samples of different groups; with several processes each takes every n-th batch.

    Args:
        groups: int ``(N,)``; a batch ends where the value changes.
        batch_size: Largest number of samples in a batch.
        sampler: Not used. Lightning, for predictions and wherever several processes share a loader, makes the batch sampler
            anew with a sampler of its own and refuses one that does not take it.
        drop_last: Not used, for the same reason: no sample is ever left out.
    """

    def __init__(
        self, groups: NDArray[np.integer], batch_size: int, sampler: Sampler[int] | None = None, drop_last: bool = False
    ) -> None:
        super().__init__(torch.utils.data.SequentialSampler(range(len(groups))), batch_size, drop_last=False)
        edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
        replicas, rank = _world()
        everything = [
            range(start, min(start + batch_size, end))
            for begin, end in pairwise(edges)
            for start in range(begin, end, batch_size)
        ]
        self._batches = everything[rank::replicas]

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self._batches)

    def __len__(self) -> int:
        return len(self._batches)
