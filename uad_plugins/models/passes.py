"""Passes over the images of a training beside the trainer's own, for statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from uad_plugins.data.sampling import ShareSampler


def flattened(loaders: Any) -> list[Any]:
    """Return the loaders of a trainer, however they are nested, as a list."""
    return [] if loaders is None else list(CombinedLoader(loaders, "sequential").flattened)


def beside(loader: Any) -> Any:
    """Return a loader of the same images that may be iterated while the trainer iterates the one given.

    A loader with persistent workers has a single iterator: a second pass over it takes the batches away from the trainer.
    Where the sampler covers the whole data set each image comes once, whatever it repeats or leaves out, and processes
    share the images; a sampler of its own kind is kept, as it may leave out what is held out.
    """
    if not isinstance(loader, DataLoader):
        return loader
    options: dict[str, Any] = {
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
    }
    everything = isinstance(loader.sampler, RandomSampler | SequentialSampler | DistributedSampler)
    if everything and loader.batch_size is not None:
        options |= {"batch_size": loader.batch_size, "sampler": ShareSampler(len(loader.dataset))}  # type: ignore[arg-type]
    elif loader.batch_sampler is not None:
        options |= {"batch_sampler": loader.batch_sampler}
    else:
        options |= {"batch_size": loader.batch_size}
    return DataLoader(loader.dataset, **options)


def batches(loaders: Any, limits: Sequence[float] | None = None) -> Iterator[Any]:
    """Yield the batches of a trainer's loaders without disturbing it, or its random numbers.

    Args:
        loaders: The trainer's.
        limits: How many batches of each; None: all.
    """
    with torch.random.fork_rng(devices=[]):
        for position, loader in enumerate(flattened(loaders)):
            limit = math.inf if limits is None else limits[position]
            yield from islice(beside(loader), None if math.isinf(limit) else int(limit))
