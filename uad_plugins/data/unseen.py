"""Which images of a data set a training has not seen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uad_plugins.data.layouts import same_place, scan, usual_layout
from uad_plugins.data.samples import SampleTable, split_again
from uad_plugins.errors import UadxError
from uad_plugins.registry import registry


def unseen(data: str, layout: str | None, origin: Mapping[str, Any]) -> tuple[SampleTable, NDArray[np.int64], bool]:
    """Index a data set, and choose the images that a training has not seen.

    The data that was trained on is recognised where it was, and by its fingerprint elsewhere. Of other data the images that
    were trained on are left out, by their files, and those of the test split of that data, which nothing is set by.

    Args:
        data: Folder or index file.
        layout: Name of its layout; None takes that of the training where it fits, or recognises it.
        origin: What the training began with, as ``Run.source`` gives it.

    Returns:
        The samples; the indices of those that may be used; whether it is the data that was trained on, of which only the
        images held out are chosen.

    Raises:
        UsageError: Unknown layout.
        UadxError: The data cannot be read, or it is what was trained on, has changed since, and the training noted no names
            of the images that it held out.
    """
    if layout:
        # A name that there is not says nothing of the data.
        registry().get("layout", layout)
    fingerprint, at_home = origin.get("fingerprint"), same_place(data, origin)
    again = _as_trained(data, layout, origin)
    changed = again is None or fingerprint not in (None, again.fingerprint())
    if at_home and changed and (again is None or origin.get("held_out") is None):
        raise UadxError(
            f"{data}: has changed since it was trained on: which of its images were held out is not known any more",
            "give images that the training has not seen, in a folder of their own",
        )
    if again is not None and (at_home or again.fingerprint() == fingerprint):
        return again, again.where(split="val"), True
    samples = scan(data, layout or usual_layout(data, origin))
    taken = _files(origin, "train", "test")
    chosen = [index for index in range(len(samples)) if os.path.realpath(samples.paths[index]) not in taken]
    return samples, np.array(chosen, dtype=np.int64), False


def trained_on(samples: SampleTable, origin: Mapping[str, Any]) -> int:
    """Count the test images of a data set that a training has learnt from, by their files.

    Args:
        samples: The data set.
        origin: What the training began with, as ``Run.source`` gives it; nothing is known of what lies elsewhere now.
    """
    tested = [os.path.realpath(samples.paths[int(index)]) for index in samples.where(split="test")]
    return len(_files(origin, "train").intersection(tested))


def _as_trained(data: str, layout: str | None, origin: Mapping[str, Any]) -> SampleTable | None:
    """Index data with the splits of the training; None where that cannot be done, so that it is other data."""
    try:
        found = scan(data, layout or usual_layout(data, origin), origin.get("categories"))
        return split_again(found, origin)
    except UadxError:
        return None


def _files(origin: Mapping[str, Any], *splits: str) -> set[str]:
    """Return the files of splits of a training that still lie there.

    Those held out are taken for trained on where they cannot be told apart.
    """
    table = _as_trained(str(origin["data"]), None, origin) if origin.get("data") else None
    if table is None:
        return set()
    told_apart = origin.get("held_out") is not None or origin.get("fingerprint") in (None, table.fingerprint())
    splits = splits if told_apart else (*splits, "val")
    return {os.path.realpath(table.paths[int(index)]) for split in splits for index in table.where(split=split)}
