"""Which documents are for training and which for validation: decided by their content and a seed, free of
leaks.

Documents that share a prompt or a content (up to case and blanks) go to the same side, whatever their order
in the file. Moving records around, or reading the file in another order, changes nothing.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from tunewise.errors import InputError


def split(group_keys: NDArray[np.uint64], fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices (train, validation) of N documents, both in file order.

    Whole groups go to validation in the order of a seeded hash, as long as they fit into `fraction` of the
    documents; when none fits, the smallest does. So validation has at least one document and never all of
    them.

    Args:
        group_keys: uint64 (N,); equal keys stay together.
        fraction: the wanted share of validation, 0 to 1; 0 gives none.
        seed: another seed draws other groups.

    Raises:
        InputError: a validation part is wanted of fewer than two groups.
    """
    indices = np.arange(len(group_keys), dtype=np.int64)
    if fraction == 0.0:
        return indices, indices[:0]
    keys, group_of, sizes = np.unique(group_keys, return_inverse=True, return_counts=True)
    if len(keys) < 2:
        raise InputError(
            f"the data have {len(keys)} distinct record(s), too few to set some aside for validation. "
            "Bring more records, name a file with data.validation, set data.validation_fraction: 0, "
            "or (one long text) data.too_long: split."
        )
    ranks = np.fromiter((_rank(int(key), seed) for key in keys), dtype=np.uint64, count=len(keys))
    order = np.lexsort((keys, ranks))
    room = min(max(1, round(fraction * len(group_keys))), len(group_keys) - 1)
    chosen = np.zeros(len(keys), dtype=np.bool_)
    for group in order:
        if sizes[group] <= room:
            chosen[group] = True
            room -= int(sizes[group])
    if not chosen.any():
        chosen[order[np.argmin(sizes[order])]] = True
    is_validation = chosen[group_of]
    return indices[~is_validation], indices[is_validation]


def leak_groups(content_keys: NDArray[np.uint64], prompt_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return keys (N,) under which documents must stay together: their prompt, or their content.

    Where nearly all records share one prompt (an instruction that never changes), the prompt tells nothing,
    and the content decides.
    """
    if len(prompt_keys) == 0:
        return content_keys
    _, counts = np.unique(prompt_keys, return_counts=True)
    return content_keys if counts.max() > len(prompt_keys) / 2 else prompt_keys


def _rank(key: int, seed: int) -> int:
    content = key.to_bytes(8, "big") + seed.to_bytes(8, "big")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
